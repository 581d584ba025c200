"""What a scenario promises of the cluster under its load, each judged by what was found.

Law: a promise is a sentence and a pure function of the result; a scenario states its own, and breaking one of them
makes the exit code 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from loadtest.result import Result, Verdict

UNKNOWN_OUTCOMES: Final = frozenset({"POST: 502 outcome-unknown", "POST: outcome-unknown"})
"""The one failure that a crash may cause, as the router and as the smart client say it: a POST without an
Idempotency-Key that was with the dead worker."""
MEASURED_MAX: Final = 5


@dataclass(frozen=True)
class Promise:
    """A sentence, and a function that says whether it was kept and what was found."""

    text: str
    judge: Callable[[Result], tuple[bool, str]]

    def verdict(self, result: Result) -> Verdict:
        is_kept, found = self.judge(result)
        return Verdict(self.text, is_kept, found)


def _reasons(result: Result, without: frozenset[str] = frozenset()) -> str:
    rows = sorted(result.failures.items(), key=lambda row: -row[1])
    shown = [f"{count} x {reason}" for reason, count in rows if reason not in without]
    return "; ".join(shown[:MEASURED_MAX]) + (
        f"; {len(shown) - MEASURED_MAX} more" if len(shown) > MEASURED_MAX else ""
    )


def _none_failed(result: Result) -> tuple[bool, str]:
    found = f"{result.failed:,} of {result.sent:,} failed"
    return result.failed == 0 and result.sent > 0, found + (f": {_reasons(result)}" if result.failed else "")


def _only_unknown_outcomes(result: Result) -> tuple[bool, str]:
    unknown = sum(result.failures.get(reason, 0) for reason in UNKNOWN_OUTCOMES)
    others = result.failed - unknown
    found = f"{result.failed:,} of {result.sent:,} failed: {unknown} with unknown outcome, {others} otherwise"
    return others == 0 and result.sent > 0, found + (f": {_reasons(result, UNKNOWN_OUTCOMES)}" if others else "")


def _no_violations(result: Result) -> tuple[bool, str]:
    seen = result.seen
    text = f"answers under {seen.leaderships:,} leaderships, {len(seen.violations)} violations"
    if result.verify is None:
        return not seen.violations, f"{text}; audit logs: {result.verify_note}"
    verify = result.verify
    logs = f"{verify.leaderships:,} leaderships, {verify.requests:,} requests, {verify.violations} violations"
    return not seen.violations and verify.violations == 0, f"audit logs: {logs}; {text}"


NONE_FAILED: Final = Promise("no request fails: each is a 2xx of the application with the right shard", _none_failed)
ONLY_UNKNOWN: Final = Promise(
    "nothing fails but POSTs without an Idempotency-Key that were with the lost worker (502 outcome-unknown)",
    _only_unknown_outcomes,
)
NO_VIOLATIONS: Final = Promise("never two leaders: no violation in the audit logs nor in the answers", _no_violations)


def pause_within(limit_ms: float) -> Promise:
    """p99 of the pauses of moves that a request met."""

    def judge(result: Result) -> tuple[bool, str]:
        pause = result.pause_ms
        if not result.moves:
            return True, "no shard moved"
        found = f"p99 {pause.p99:.1f} ms, max {pause.max:.1f} ms over {pause.count} moves that a request met"
        return pause.p99 <= limit_ms, found + f", of {len(result.moves)}"

    return Promise(f"a move's pause has a p99 of at most {limit_ms:g} ms", judge)


def failover_within(limit_ms: float, what: str = "") -> Promise:
    """p99 of the failovers; there must be some."""

    def judge(result: Result) -> tuple[bool, str]:
        if not result.failover_ms:
            return False, "no shard was lost: nothing was measured"
        found = result.failover
        return found.p99 <= limit_ms, f"p99 {found.p99:.0f} ms, max {found.max:.0f} ms over {found.count} lost shards"

    return Promise(f"lost shards serve again with a p99 of at most {limit_ms:g} ms{what}", judge)


def _moved(result: Result) -> tuple[bool, str]:
    return len(result.moves) > 0, f"{len(result.moves)} moves"


SOMETHING_MOVED: Final = Promise("shards move", _moved)


def _nothing_moved(result: Result) -> tuple[bool, str]:
    return not result.moves, f"{len(result.moves)} moves"


NOTHING_MOVED: Final = Promise("no shard changes its leader", _nothing_moved)


def others_within(limit_ms: float) -> Promise:
    """The shards that other workers lead than the most loaded one's do not feel it."""

    def judge(result: Result) -> tuple[bool, str]:
        hot = max(result.per_shard, key=lambda row: row.requests, default=None)
        if hot is None:
            return False, "no shard was asked"
        others = [row.p99_ms for row in result.per_shard if row.leader != hot.leader and row.requests >= MEASURED_MAX]
        if not others:
            return False, "no other worker leads a shard that was asked"
        worst = sorted(others)[(len(others) - 1) // 2]
        text = f"shard {hot.shard} ({hot.throughput_rps:.0f}/s, {hot.leader}) p99 {hot.p99_ms:.1f} ms; "
        return worst <= limit_ms, f"{text}others' p99 {worst:.1f} ms (median of {len(others)} shards)"

    return Promise(f"shards of other workers keep a p99 of at most {limit_ms:g} ms (their median)", judge)
