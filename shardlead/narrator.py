"""Tells what happens in a cluster in lines that a person can follow: many changes at once become one line.

Pure: it is fed the admin server's events and asked for lines; it reads no clock and prints nothing.

Law: every change of leader that was observed is told exactly once, whether alone or within a group.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

LISTED_MAX: Final = 4  # so many shards are named one by one; more are only counted


@dataclass(slots=True)
class _Change:
    """What has become of one shard since the last telling."""

    source: str | None
    lost_s: float | None = None  # when it was seen without a leader
    target: str | None = None
    led_s: float | None = None


class Narrator:
    """Holds who leads what, and what has changed since it was last asked."""

    def __init__(self) -> None:
        self.leaders: dict[int, str] = {}
        self.states: dict[str, str] = {}
        """Each worker's state: up, draining, gone, or died (then `died` was called)."""
        self._lost: dict[int, tuple[str | None, float]] = {}  # shards without a leader: the last one, and since when
        self._changes: dict[int, _Change] = {}
        self._notes: list[str] = []
        self._revision = 0
        self._has_left: dict[str, str] = {}

    def begin(self, leaders: Mapping[int, str], workers: Mapping[str, str], revision: int) -> None:
        """Start from a map; events up to its revision are part of it already."""
        self.leaders = dict(leaders)
        self.states = dict(workers)
        self._revision = revision
        self._changes.clear()
        self._lost.clear()

    @property
    def has_news(self) -> bool:
        return bool(self._changes or self._notes)

    def died(self, worker: str, how: str) -> None:
        """A worker's process has ended without being asked to."""
        self.states[worker] = "died"
        self._has_left[worker] = f"{worker} died"
        gone = _gone(worker)  # its parent revokes the lease first, and ends then
        self._notes = [note for note in self._notes if note != gone]
        self._notes.append(f"{worker} died ({how})")

    def observe(self, event: Mapping[str, Any]) -> None:
        """Take one line of /v1/events into account; kinds and shapes that are not known are passed over."""
        match event:
            case {"event": "leader", "shard": int(), "t": int() | float()} if isinstance(event.get("revision", 0), int):
                self._leader(event)
            case {"event": "worker", "worker": str(worker), "state": str(state)}:
                self._worker(worker, state)
            case _:
                pass

    def tell(self) -> list[str]:
        """The lines for everything since the last call; then it is told."""
        lines, self._notes = self._notes, []
        changes, self._changes = self._changes, {}
        groups: dict[tuple[str | None, str | None], list[int]] = defaultdict(list)
        for shard, change in changes.items():
            if change.target != change.source or change.led_s is None:
                groups[change.source, change.target].append(shard)
            else:
                groups[change.target, change.target].append(shard)
        for source, target in sorted(groups, key=lambda pair: (pair[0] or "", pair[1] or "")):
            shards = sorted(groups[source, target])
            lines.append(self._group(source, target, shards, [changes[shard] for shard in shards]))
        return lines

    def counts(self) -> dict[str, int]:
        """How many shards each worker leads; workers that live and lead nothing are there with 0."""
        counts = {worker: 0 for worker, state in self.states.items() if state in ("up", "draining")}
        for worker in self.leaders.values():
            counts[worker] = counts.get(worker, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: _natural(item[0])))

    def _leader(self, event: Mapping[str, Any]) -> None:
        if int(event.get("revision", 0)) <= self._revision:
            return
        shard, target, at_s = int(event["shard"]), event.get("worker"), float(event["t"])
        source = self.leaders.get(shard)
        if target is None:
            self.leaders.pop(shard, None)
            self._lost.setdefault(shard, (source, at_s))
            change = self._changes.setdefault(shard, _Change(source))
            change.target, change.led_s, change.lost_s = None, None, change.lost_s or at_s
            return
        self.leaders[shard] = str(target)
        lost = self._lost.pop(shard, None)
        change = self._changes.setdefault(shard, _Change(lost[0] if lost else source))
        change.target, change.led_s = str(target), at_s
        if lost is not None:
            change.lost_s = change.lost_s or lost[1]

    def _worker(self, worker: str, state: str) -> None:
        before = self.states.get(worker)
        if state == before or (state == "gone" and before == "died"):
            return
        match state:
            case "up":
                self._notes.append(f"{worker} joined" if before in (None, "gone", "died") else f"{worker} is up again")
                self._has_left.pop(worker, None)
            case "draining":
                self._notes.append(f"{worker} is leaving")
                self._has_left[worker] = f"{worker} is leaving"
            case "gone":
                self._notes.append(f"{worker} left" if before == "draining" else _gone(worker))
                self._has_left[worker] = f"{worker} left" if before == "draining" else f"{worker} is gone"
            case _:
                self._notes.append(f"{worker} is {state}")
        self.states[worker] = state

    def _group(self, source: str | None, target: str | None, shards: list[int], changes: Iterable[_Change]) -> str:
        what = _name(shards)
        if source is None and target is None:
            return f"{what}: claimed and given up, still nobody leads"
        if target is None:
            return f"{source or 'nobody'} -> nobody: {what}{self._why(source)}"
        if source is None:
            return f"{target} leads {what}"
        waits = [
            change.led_s - change.lost_s for change in changes if change.lost_s is not None and change.led_s is not None
        ]
        gap = f", without a leader for at most {max(waits) * 1000:.0f} ms" if waits else ""
        if source == target:
            return f"{target} leads {what} again, under a new epoch{gap}"
        return f"{source} -> {target}: {what}{self._why(source)}{gap}"

    def _why(self, source: str | None) -> str:
        reason = self._has_left.get(source or "")
        return f" ({reason})" if reason else ""


def _gone(worker: str) -> str:
    return f"{worker} is gone: its lease ended"


def _name(shards: list[int]) -> str:
    if len(shards) == 1:
        return f"shard {shards[0]}"
    if len(shards) <= LISTED_MAX:
        return f"shards {', '.join(str(shard) for shard in shards)}"
    return f"{len(shards)} shards"


def _natural(name: str) -> tuple[str, int, str, str]:
    """w2 before w10; by digits, for Python converts no more than 4,300 of them."""
    stem = name.rstrip("0123456789")
    digits = name[len(stem) :].lstrip("0")
    return stem, len(digits), digits, name
