"""Who has stopped and is expected back: the controller's memory of stops that were announced.

Most workers that stop are only restarted, and a successor leads meanwhile, level within two. What moved for evenness
in between would move back; so evenness waits until the worker is back, or another in its place, or for
`return_wait_s`. Nothing else waits. A worker that an operator has drained leads nothing any more: it is not expected.

What it never does: read a clock; all times are given, in ns of the controller's own.
"""

from collections.abc import Iterable

from shardlead.clock import NS_PER_S
from shardlead.core.fleet import Fleet
from shardlead.core.model import TICK_S, History


class Returning:
    """Names of workers, each with the time of the last news of its stop, oldest first."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._since_ns: dict[str, int] = {}

    def note(self, before: Fleet, after: Fleet, now_ns: int) -> None:
        """The fleet has changed: who began to stop or is gone is expected; each who came is one less to expect."""
        for name in sorted(before.members.keys() | after.members.keys()):
            is_stopping, was_stopping = _is_stopping(after, name), _is_stopping(before, name)
            is_gone = name not in after.members
            if (is_stopping and not was_stopping) or (is_gone and was_stopping):
                self._since_ns.pop(name, None)
                if name not in after.drained:
                    self._since_ns[name] = now_ns
        for name, member in after.members.items():
            known = before.members.get(name)
            if self._since_ns and after.is_up(name) and (known is None or known.record.sid != member.record.sid):
                del self._since_ns[name if name in self._since_ns else next(iter(self._since_ns))]

    def recall(self, histories: Iterable[History], fleet: Fleet, tick: int, now_ns: int) -> None:
        """What a controller that has just taken the seat did not see: whose shards changed hands within the last ticks,
        and who is not there any more. Whether those stopped or died the histories do not say; both are expected."""
        for history in histories:
            if history.previous and (tick - history.tick) * TICK_S <= self._wait_s:
                name = history.previous[0].worker
                if name not in fleet.members:
                    self._since_ns.setdefault(name, now_ns)

    def left_s(self, now_ns: int) -> float:
        """How much longer somebody is expected; 0 if nobody is."""
        wait_ns = int(self._wait_s * NS_PER_S)
        self._since_ns = {name: since_ns for name, since_ns in self._since_ns.items() if now_ns - since_ns < wait_ns}
        if not self._since_ns:
            return 0.0
        return (max(self._since_ns.values()) + wait_ns - now_ns) / NS_PER_S


def _is_stopping(fleet: Fleet, name: str) -> bool:
    return name in fleet.members and not fleet.is_up(name)
