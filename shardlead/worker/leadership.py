"""What an application holds in its hand while it leads a shard: shard, epoch, and the guard.

Law: protocol.md A.4. The guard is one clock read and one comparison, at the point of use. It says that nobody else
leads this shard *now*, by elapsed time on this machine; it cannot speak for a machine that was held still as a whole.
Only a fence at the resource can (`shardlead.fencing`).
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, ParamSpec, Protocol, TypeVar

from shardlead.errors import LeadershipLost

P = ParamSpec("P")
R = TypeVar("R")

NEED_S = 0.05


class Guard(Protocol):
    """What a leadership asks of its session."""

    def is_valid(self, need_s: float) -> bool: ...


class Draining:
    """Whether the shard is being passed on: no new requests come, running ones should come to an end."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def is_set(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        """Return once draining has begun."""
        await self._event.wait()  # no time-out: the caller is work of this leadership and is cancelled with it

    def begin(self) -> None:
        """For the runtime alone."""
        self._event.set()


class Leadership:
    """One shard, led by this process under one epoch.

    Made by the runtime and given to the application's class. Valid from before `open()` until the shard is passed
    on, the lease is lost, or its deadline passes; never valid again afterwards.
    """

    __slots__ = (
        "_executor",
        "_guard",
        "_lost",
        "_on_unknown",
        "_threads",
        "draining",
        "epoch",
        "has_barrier",
        "has_overrun",
        "shard",
        "state",
        "worker",
    )

    def __init__(
        self,
        shard: int,
        epoch: int,
        worker: str,
        guard: Guard,
        executor: Executor | None = None,
        on_unknown: Callable[[str], object] | None = None,
    ) -> None:
        self.shard = shard
        self.epoch = epoch
        self.worker = worker
        self.draining = Draining()
        self.state: Any = None  # the application's own: what its open() keeps for the shard (`hosting`)
        self.has_barrier = False
        self.has_overrun = False  # for the runtime: some work of it ended when its right to work was over
        self._guard = guard
        self._executor = executor
        self._on_unknown = on_unknown
        self._lost = ""
        self._threads: set[asyncio.Future[object]] = set()

    def __repr__(self) -> str:
        state = f"lost: {self._lost}" if self._lost else "valid" if self.is_valid(0) else "not valid now"
        return f"<Leadership shard={self.shard} epoch={self.epoch} of {self.worker}, {state}>"

    def is_valid(self, need_s: float = NEED_S) -> bool:
        """Whether an act that takes effect within `need_s` seconds may begin now. Ask again after every await."""
        return not self._lost and self._guard.is_valid(need_s)

    def check(self, need_s: float = NEED_S) -> None:
        """Raises LeadershipLost unless `is_valid(need_s)`."""
        if not self.is_valid(need_s):
            raise LeadershipLost(self.shard, self.epoch, self._lost or "the lease could end at any moment")

    def note_barrier(self) -> None:
        """For fences: this epoch is registered at a resource. A fence of one's own calls it at the end of its barrier;
        a class that says `fenced = True` and whose `open()` passes no barrier is warned of."""
        self.has_barrier = True

    def note_unknown(self, reason: str) -> None:
        """For fences: the outcome of a write under this epoch is unknown, and it may take effect late. Whatever else
        runs under the epoch ends, and the shard goes on under a new one, whatever the application makes of the error.
        A fence of one's own calls it before it raises WriteUnknown, and when a write that was sent is cancelled."""
        if self._on_unknown is not None:
            # a turn later: whoever called this may end by itself, and say why, before it would be cancelled
            asyncio.get_running_loop().call_soon(self._on_unknown, reason)

    async def run_blocking(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a blocking function in a thread of the worker's pool. The leadership counts it as work: it is not
        passed on before the function has returned. A thread cannot be cancelled: check the leadership inside it before
        each effect. One that has not begun is not begun any more once it is cancelled, or the leadership lost."""
        started = threading.Lock()  # taken by whoever comes first: the thread, or a cancellation

        def begin() -> R:
            if self._lost or not started.acquire(blocking=False):
                raise LeadershipLost(self.shard, self.epoch, self._lost or "cancelled before it began")
            return function(*args, **kwargs)

        future: asyncio.Future[R] = asyncio.get_running_loop().run_in_executor(self._executor, begin)
        threads: set[asyncio.Future[R]] = self._threads  # type: ignore[assignment]  # only waited for, never read
        threads.add(future)
        future.add_done_callback(self._thread_ended)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if started.acquire(blocking=False):
                threads.discard(future)
                future.remove_done_callback(self._thread_ended)
                future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody else asks
            raise

    # --- for the runtime alone ---

    @property
    def is_lost(self) -> bool:
        """Whether the runtime has taken the leadership away."""
        return bool(self._lost)

    @property
    def threads(self) -> frozenset[asyncio.Future[object]]:
        """Blocking functions that still run."""
        return frozenset(self._threads)

    def note_end(self) -> None:
        """A piece of work has ended. If the deadline had passed by then, what it sent may still be on its way, and
        would carry this epoch: the epoch must not go on (protocol.md A.5)."""
        if not self.is_valid(0.0):
            self.has_overrun = True

    def _thread_ended(self, future: "asyncio.Future[Any]") -> None:
        self._threads.discard(future)
        self.note_end()

    def revoke(self, reason: str) -> None:
        """Take the leadership away, at once and for good."""
        self._lost = self._lost or reason
        self.draining.begin()
