"""What a run shows in the terminal while it runs: one line a second, and what is done to the cluster.

On a terminal a line is written over by the next one, unless something happened; elsewhere every line stays.
"""

import sys
from collections.abc import Mapping
from typing import Final, TextIO

from loadtest.generators import Tick
from loadtest.histogram import fine, percentiles_ms, record
from loadtest.result import Mark, Result
from loadtest.samples import OK

COUNTS_SHOWN_MAX: Final = 6
EXAMPLES_MAX: Final = 5
LATE_SHOWN_MS: Final = 10.0
WIDTH: Final = 100


class Live:
    """Told of everything as it comes; prints once a second."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._is_terminal = self._out.isatty()
        self._is_open = False
        self._reset()
        self._in_flight: dict[int, int] = {}
        self._printed_s = 0.0

    def _reset(self) -> None:
        self._sent = self._ok = self._failed = 0
        self._latencies, self._lags = fine(), fine()

    def say(self, text: str) -> None:
        """One line that stays."""
        self._close_line()
        print(text, file=self._out, flush=True)

    def mark(self, mark: Mark) -> None:
        """Something is done to the cluster."""
        self.say(f"{mark.at_s:6.1f} s  {'! ' if mark.is_fault else '- '}{mark.text}")

    def tick(self, tick: Tick) -> None:
        """A generator has reported."""
        self._sent += tick.sent
        good = sum(flags & OK for flags in tick.samples.flags)
        self._ok += good
        self._failed += len(tick.samples) - good
        for latency_us in tick.samples.latency_us:
            record(self._latencies, latency_us)
        for lag_us in tick.lags_us:
            record(self._lags, lag_us)
        self._in_flight[tick.share] = tick.in_flight

    def second(self, at_s: float, counts: Mapping[str, int]) -> None:
        """Print what has come since the last time."""
        passed_s, self._printed_s = max(at_s - self._printed_s, 1e-3), at_s
        p50, p99, longest = percentiles_ms(self._latencies, [50, 99, 100])
        (lag,) = percentiles_ms(self._lags, [99])
        shown = " ".join(f"{name} {count}" for name, count in list(counts.items())[:COUNTS_SHOWN_MAX])
        if len(counts) > COUNTS_SHOWN_MAX:
            shown = f"{len(counts)} workers, {min(counts.values())} to {max(counts.values())} shards"
        line = (
            f"{at_s:6.1f} s  {self._sent / passed_s:6.0f}/s  ok {self._ok:5}  failed {self._failed:3}  "
            f"ms p50 {p50:5.1f}  p99 {p99:6.1f}  max {longest:6.0f}  "
            f"under way {sum(self._in_flight.values()):4}  {shown}"
        )
        if lag > LATE_SHOWN_MS:
            line += f"  generator late: {lag:.0f} ms"
        self._reset()
        if self._is_terminal:
            self._out.write(f"\r\x1b[K{line[: WIDTH + 40]}")
            self._out.flush()
            self._is_open = True
        else:
            print(line, file=self._out, flush=True)

    def _close_line(self) -> None:
        if self._is_open:
            self._out.write("\n")
            self._is_open = False

    def finish(self) -> None:
        """Nothing more is written over."""
        self._close_line()


def table(result: Result) -> str:
    """The end of a run, for people."""
    rows = [("requests", _requests(result)), ("latency ms", _latency(result))]
    throughputs = sorted(shard.throughput_rps for shard in result.per_shard)
    if throughputs:
        low, middle, high = throughputs[0], throughputs[(len(throughputs) - 1) // 2], throughputs[-1]
        rows.append(("per shard", f"{low:.1f} to {high:.1f}/s, median {middle:.1f}, {len(throughputs)} shards"))
    if result.moves:
        pause = result.pause_ms
        text = (
            f"{len(result.moves)}, {pause.count} met by a request: pause ms p50 {pause.p50:.1f}   p99 {pause.p99:.1f}"
        )
        rows.append(("moves", f"{text}   max {pause.max:.1f}"))
    if result.failover_ms:
        found = result.failover
        text = f"{found.count} shards: ms p50 {found.p50:.0f}   p99 {found.p99:.0f}   max {found.max:.0f}"
        rows.append(("failover", text))
    if result.verify is not None:
        verify = result.verify
        text = f"{verify.leaderships:,} leaderships, {verify.requests:,} requests, {verify.violations} violations"
        rows.append(("verify", text))
    rows.append(("generators", _generators(result)))
    rows += [
        ("kept" if verdict.is_kept else "BROKEN", f"{verdict.promise}: {verdict.found}") for verdict in result.promises
    ]
    rows += [("warning", text) for text in result.warnings]
    rows += [("failed", f"{count:,} x {reason}") for reason, count in result.failures.items()]
    rows += [("", f"  {example}") for example in result.failure_examples[:EXAMPLES_MAX]]
    rows += [("violation", text) for text in result.seen.violations[:EXAMPLES_MAX]]
    if result.verify is not None and result.verify.text:
        rows.append(("verify", result.verify.text))
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def _requests(result: Result) -> str:
    rates = ", ".join(f"{rate:g}" for rate in result.rates_rps)
    return f"{result.sent:,} sent at {rates}/s, {result.ok:,} ok, {result.failed:,} failed"


def _latency(result: Result) -> str:
    found = result.latency_ms
    low = f"p50 {found.p50:.2f}   p90 {found.p90:.2f}   p99 {found.p99:.2f}"
    return f"{low}   p99.9 {found.p999:.2f}   max {found.max:.1f}"


def _generators(result: Result) -> str:
    found = result.generators
    late = f"late by p50 {found.lag_p50_ms:.2f}   p99 {found.lag_p99_ms:.2f}   max {found.lag_max_ms:.1f} ms"
    return (
        f"{found.processes}, {late}; {found.cpu_s:.1f} s of CPU, {found.cpu_s / max(result.sent, 1) * 1e6:.0f} µs each"
    )
