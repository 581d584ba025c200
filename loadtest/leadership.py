"""Who led what and when, from the events of a router, and what each change cost those who asked.

Two costs are kept apart. A change's *leaderless* time is what the router saw: from the event that a shard has no
leader to the one that it has one again; a handoff changes the leader in one transaction and has none. The *longest
wait* is what a user felt: the longest latency, from the due time, of all requests of that shard that were under way at
any moment from BEFORE_S before the change began until AFTER_S after the new leader was seen (it opens in that time).

`pause_ms` is the larger of the two. It contains a request's ordinary latency, and whatever else held that request up:
it errs towards too long. It errs towards nothing where no request came while the shard moved; `requests` says how many
there were. `failover_ms` counts from the fault (the signal, the cut) to the event that another worker leads, or the
longest wait of a request of that shard around that time, whichever is longer; one figure for each shard that was lost.

Pure: fed with events, asked for changes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from loadtest.result import Move
from loadtest.samples import ByShard

BEFORE_S: Final = 0.01  # events carry whole milliseconds
AFTER_S: Final = 0.25


@dataclass(frozen=True)
class Change:
    """A shard's leadership passed from `source` to `target` at `led_s`; it had no leader from `lost_s`, if that is
    not None. `target` None: it has had no leader since, to the end of the events."""

    shard: int
    source: str | None
    target: str | None
    lost_s: float | None
    led_s: float

    @property
    def leaderless_ms(self) -> float:
        return 0.0 if self.lost_s is None else max(0.0, (self.led_s - self.lost_s) * 1000)

    @property
    def is_move(self) -> bool:
        """Whether another worker leads than before."""
        return None not in (self.source, self.target) and self.source != self.target


@dataclass(frozen=True)
class Loss:
    """A fault took a worker away, and with it the shards that it led."""

    at_s: float
    worker: str
    shards: frozenset[int]


class Story:
    """Leadership over the time of the load: who led at the begin, and every event since, in order.

    `zero_s` is the wall-clock time at which the load began; events carry wall-clock times.
    """

    def __init__(self, leaders: Mapping[int, str], events: Iterable[Mapping[str, Any]], zero_s: float) -> None:
        self.begin = dict(leaders)
        self.marks: list[tuple[float, int, str | None]] = []
        """(seconds, shard, who leads it from then on), in order of arrival."""
        self.workers: list[tuple[float, str, str]] = []
        """(seconds, worker, its state from then on)."""
        for event in events:
            at_s = float(event["t"]) - zero_s
            if event["event"] == "leader":
                self.marks.append((at_s, int(event["shard"]), event["worker"]))
            elif event["event"] == "worker":
                self.workers.append((at_s, str(event["worker"]), str(event["state"])))

    def leaders_at(self, at_s: float) -> dict[int, str]:
        """Who led what then; shards without a leader are missing."""
        leaders = dict(self.begin)
        for mark_s, shard, worker in self.marks:
            if mark_s > at_s:
                break
            if worker is None:
                leaders.pop(shard, None)
            else:
                leaders[shard] = worker
        return leaders

    def changes(self, end_s: float) -> list[Change]:
        """Every change of leader, those to itself under a new epoch included, in order of `led_s`."""
        leaders: dict[int, str] = dict(self.begin)
        lost: dict[int, tuple[float, str | None]] = {}
        found = []
        for at_s, shard, worker in self.marks:
            if worker is None:
                lost.setdefault(shard, (at_s, leaders.pop(shard, None)))
                continue
            lost_s, source = lost.pop(shard, (None, leaders.get(shard)))
            leaders[shard] = worker
            found.append(Change(shard, source, worker, lost_s, at_s))
        found += [Change(shard, source, None, lost_s, end_s) for shard, (lost_s, source) in lost.items()]
        return found

    def counts(self) -> list[tuple[float, dict[str, int]]]:
        """How many shards each worker leads, from the begin (0.0) on: one entry for each time something changed."""
        leaders: dict[int, str] = dict(self.begin)
        counts: dict[str, int] = {}
        for worker in leaders.values():
            counts[worker] = counts.get(worker, 0) + 1
        steps = [(0.0, dict(counts))]
        for at_s, shard, leader in self.marks:
            before = leaders.pop(shard, None)
            if before is not None:
                counts[before] -= 1
            if leader is not None:
                leaders[shard] = leader
                counts[leader] = counts.get(leader, 0) + 1
            if steps[-1][0] == at_s:
                steps[-1] = (at_s, dict(counts))
            else:
                steps.append((at_s, dict(counts)))
        return steps


def moves(changes: Sequence[Change], by_shard: ByShard) -> list[Move]:
    """Every change from one worker to another, with its pause."""
    found = []
    for change in changes:
        if not change.is_move:
            continue
        assert change.source is not None
        assert change.target is not None
        begin_s = change.led_s if change.lost_s is None else change.lost_s
        felt = by_shard.felt(change.shard, begin_s - BEFORE_S, change.led_s + AFTER_S)
        found.append(
            Move(
                shard=change.shard,
                source=change.source,
                target=change.target,
                pause_ms=round(max(change.leaderless_ms, felt.longest_ms), 3),
                at_s=round(change.led_s, 3),
                leaderless_ms=round(change.leaderless_ms, 3),
                longest_wait_ms=round(felt.longest_ms, 3),
                requests=felt.requests,
                is_handoff=change.lost_s is None,
            )
        )
    return found


def failovers_ms(changes: Sequence[Change], losses: Sequence[Loss], by_shard: ByShard, end_s: float) -> list[float]:
    """For each shard of each loss: how long it was without service. A shard that nobody led again counts to the end."""
    by_number: dict[int, list[Change]] = {}
    for change in changes:
        by_number.setdefault(change.shard, []).append(change)
    found = []
    for loss in losses:
        for shard in sorted(loss.shards):
            led_s = next(
                (
                    change.led_s
                    for change in by_number.get(shard, ())
                    if change.led_s >= loss.at_s and change.target not in (None, loss.worker)
                ),
                end_s,
            )
            felt = by_shard.felt(shard, loss.at_s, led_s + AFTER_S)
            found.append(round(max((led_s - loss.at_s) * 1000, felt.longest_ms), 3))
    return found
