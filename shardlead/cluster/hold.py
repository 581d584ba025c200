"""Requests that wait for their shard: first in first out per shard, bounded in number, time and bytes.

What it never does: decide what a request does next (`core.routing`), or touch a socket.

Law: a shard has a gate only while something about it is out of the ordinary, so an ordinary request pays one dict
look-up. A request that comes back (refused, say) takes its old place by its number of arrival.
"""

from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from shardlead.core.shardmap import Leader


class Waiting(Protocol):
    """What a gate needs to know of a request."""

    @property
    def number(self) -> int:
        """Its number of arrival."""
        ...


W = TypeVar("W", bound=Waiting)


@dataclass(slots=True)
class Gate(Generic[W]):
    """What is out of the ordinary about one shard.

    `floor`: the largest epoch seen. `turned_down`: the largest epoch under which a request was turned down; nothing
    goes under it, except one request now and then to ask again (`probe`). `hint`: a leader that a worker named,
    while the view is behind.
    """

    shard: int
    floor: int = 0
    turned_down: int = 0
    hint: Leader | None = None
    ask_at_ns: int | None = None
    pause_ns: int = 0
    probe: W | None = None
    asked: int = -1  # the number of the last one that asked
    _queue: dict[int, W] = field(default_factory=dict)
    _is_sorted: bool = True
    _last: int = -1

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, waiting: W) -> None:
        """Wait, in order of arrival; one that comes back takes its old place."""
        number = waiting.number
        if number < self._last:
            self._is_sorted = False
        else:
            self._last = number
        self._queue[number] = waiting

    def next_probe(self) -> W | None:
        """Who asks next, and waits no more: they take turns, because what turns one down need not concern the others.
        None if nobody waits."""
        self._sort()
        number = next((number for number in self._queue if number > self.asked), None)
        if number is None:
            number = next(iter(self._queue), None)
        if number is None:
            return None
        self.asked = number
        return self._queue.pop(number)

    def remove(self, waiting: W) -> None:
        """It waits no more (its client left, or its time is over)."""
        self._queue.pop(waiting.number, None)

    def waiting(self) -> list[W]:
        """All that wait, first come first."""
        self._sort()
        return list(self._queue.values())

    def take_all(self) -> list[W]:
        """All that wait, first come first; nobody waits afterwards."""
        everybody = self.waiting()
        self._queue.clear()
        self._last = -1
        return everybody

    def _sort(self) -> None:
        if not self._is_sorted:
            self._queue = dict(sorted(self._queue.items()))
            self._is_sorted = True
