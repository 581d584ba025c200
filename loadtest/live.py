"""What a run shows in the terminal while it runs: one line a second, and what is done to the cluster.

On a terminal a line is written over by the next one, unless something happened; elsewhere every line stays.
"""

import sys
import time
from collections.abc import Mapping
from typing import Final, TextIO

from loadtest.generators import Tick
from loadtest.histogram import fine, percentiles_ms, record
from loadtest.result import Mark, Result

COUNTS_SHOWN_MAX: Final = 6
WIDTH: Final = 100


class Live:
    """Told of everything as it comes; prints once a second."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._is_terminal = self._out.isatty()
        self._is_open = False
        self._reset()
        self._in_flight: dict[int, int] = {}
        self._printed_s = time.monotonic()

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
        for flags, latency_us in zip(tick.samples.flags, tick.samples.latency_us, strict=True):
            self._ok += flags & 1
            record(self._latencies, latency_us)
        self._failed += sum(not flags & 1 for flags in tick.samples.flags)
        for lag_us in tick.lags_us:
            record(self._lags, lag_us)
        self._in_flight[tick.share] = tick.in_flight

    def second(self, at_s: float, counts: Mapping[str, int]) -> None:
        """Print what has come since the last time."""
        now_s = time.monotonic()
        passed_s, self._printed_s = max(now_s - self._printed_s, 1e-3), now_s
        p50, p99, longest = percentiles_ms(self._latencies, [50, 99, 100])
        (lag,) = percentiles_ms(self._lags, [99])
        shown = " ".join(f"{name} {count}" for name, count in list(counts.items())[:COUNTS_SHOWN_MAX])
        if len(counts) > COUNTS_SHOWN_MAX:
            shown = f"{len(counts)} workers, {min(counts.values())} to {max(counts.values())} shards"
        line = (
            f"{at_s:6.1f} s  {self._sent / passed_s:6.0f}/s  ok {self._ok:5}  failed {self._failed:3}  "
            f"ms p50 {p50:5.1f}  p99 {p99:6.1f}  max {longest:6.0f}  under way {sum(self._in_flight.values()):4}  {shown}"
        )
        if lag > 10:
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
    latency, pause, failover = result.latency_ms, result.pause_ms, result.failover
    rates = ", ".join(f"{rate:g}" for rate in result.rates_rps)
    rows = [
        ("requests", f"{result.sent:,} sent at {rates}/s, {result.ok:,} ok, {result.failed:,} failed"),
        (
            "latency ms",
            f"p50 {latency.p50:.2f}   p90 {latency.p90:.2f}   p99 {latency.p99:.2f}   "
            f"p99.9 {latency.p999:.2f}   max {latency.max:.1f}",
        ),
    ]
    throughputs = sorted(shard.throughput_rps for shard in result.per_shard)
    if throughputs:
        middle = throughputs[(len(throughputs) - 1) // 2]
        text = (
            f"{throughputs[0]:.1f} to {throughputs[-1]:.1f} per second, median {middle:.1f}, {len(throughputs)} shards"
        )
        rows.append(("per shard", text))
    if result.moves:
        text = (
            f"{len(result.moves)}, {pause.count} met by a request: pause ms p50 {pause.p50:.1f}   p99 {pause.p99:.1f}"
        )
        rows.append(("moves", f"{text}   max {pause.max:.1f}"))
    if result.failover_ms:
        text = f"{failover.count} shards: ms p50 {failover.p50:.0f}   p99 {failover.p99:.0f}   max {failover.max:.0f}"
        rows.append(("failover", text))
    if result.verify is not None:
        verify = result.verify
        text = f"{verify.leaderships:,} leaderships, {verify.requests:,} requests, {verify.violations} violations"
        rows.append(("verify", text))
    generators = result.generators
    text = (
        f"{generators.processes}, late by p50 {generators.lag_p50_ms:.2f}   p99 {generators.lag_p99_ms:.2f}   "
        f"max {generators.lag_max_ms:.1f} ms; {generators.cpu_s:.1f} s of CPU"
    )
    rows.append(("generators", text))
    lines = [f"{name:<11} {text}" for name, text in rows]
    for verdict in result.promises:
        lines.append(f"{'kept' if verdict.is_kept else 'BROKEN':<11} {verdict.promise}: {verdict.found}")
    lines += [f"{'warning':<11} {text}" for text in result.warnings]
    if result.failed:
        lines += [f"{'failed':<11} {count:,} x {reason}" for reason, count in result.failures.items()]
        lines += [f"{'':<11}   {example}" for example in result.failure_examples[:5]]
    for text in result.seen.violations[:5]:
        lines.append(f"{'violation':<11} {text}")
    if result.verify is not None and result.verify.text:
        lines.append(result.verify.text)
    return "\n".join(lines)
