"""One leadership as this process lives it: the application's object, and everything that runs for it.

Law: design.md, Worker. Work is entered and left, so that a drain can wait for its end and a loss can cancel it.
The object is opened once and closed once. Nothing here decides; `worker.objects` does what `core.ownership` says.
"""

import asyncio
import logging
from collections import Counter
from typing import Any, Final, Protocol

from shardlead.worker.audit import Trail
from shardlead.worker.leadership import Leadership

log = logging.getLogger("shardlead.tenure")

CANCELLED: Final = "leadership lost"
"""The message with which the work of a lost leadership is cancelled."""


class Hosted(Protocol):
    """The application's object, every method present. `subject` is what the application itself made."""

    subject: object
    has_run: bool
    has_healthy: bool

    async def open(self) -> None: ...

    async def run(self) -> None: ...

    async def close(self) -> None: ...

    def healthy(self) -> bool: ...


class Tunnel(Protocol):
    """An upgraded connection: it has no end of its own, so a drain closes it."""

    def close(self) -> object: ...


class Tenure:
    """The application's object of one leadership, and its running work."""

    __slots__ = ("_cancels", "_idle", "_running", "application", "lead", "opening", "run_task", "trail", "tunnels")

    def __init__(self, lead: Leadership, trail: Trail | None = None) -> None:
        self.lead = lead
        self.trail = trail  # its lines in the audit log, if one is written
        self.application: Hosted | None = None
        self.opening: asyncio.Task[None] | None = None
        self.run_task: asyncio.Task[None] | None = None
        self.tunnels: set[Tunnel] = set()
        self._running: Counter[asyncio.Task[object]] = Counter()  # how many times each has entered
        self._cancels: Counter[asyncio.Task[object]] = Counter()  # of those that run
        self._idle = asyncio.Event()
        self._idle.set()

    def __repr__(self) -> str:
        return f"<Tenure {self.lead!r} running={len(self._running)}>"

    @property
    def is_lost(self) -> bool:
        return self.lead.is_lost

    @property
    def is_busy(self) -> bool:
        """Whether anything of this leadership runs or has run past its deadline: a request, a tunnel, run(), a
        thread."""
        return bool(self._running or self.tunnels or self.lead.threads or self.lead.has_overrun) or (
            self.run_task is not None and not self.run_task.done()
        )

    @property
    def running_count(self) -> int:
        return len(self._running)

    def enter(self, task: "asyncio.Task[object]") -> None:
        """`task` handles a request of this shard from now on. It may enter again before it leaves: two keys, one
        shard."""
        self._running[task] += 1
        self._idle.clear()

    def leave(self, task: "asyncio.Task[object]") -> None:
        """It has done so, once."""
        self._running[task] -= 1
        if self._running[task] <= 0:
            del self._running[task], self._cancels[task]
        self.lead.note_end()
        if not self._running:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Return once no request runs. The caller bounds it."""
        await self._idle.wait()  # no time-out: worker.objects bounds it by drain_timeout_s

    async def wait_threads(self, until_s: float) -> None:
        """Return once no blocking function runs, or at that time of the loop's clock: they cannot be cancelled."""
        threads = self.lead.threads
        while threads and (left_s := until_s - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(threads, timeout=left_s)
            threads = self.lead.threads

    def revoke(self, reason: str) -> None:
        """Take the leadership away, at once and for good."""
        if self.trail is not None:
            self.trail.stop(reason)
        self.lead.revoke(reason)

    def close_tunnels(self) -> None:
        """Close every upgraded connection, now."""
        for tunnel in tuple(self.tunnels):
            tunnel.close()

    def cancel(self) -> None:
        """Cancel all that runs. Threads cannot be; `wait_ended` waits for them."""
        self.close_tunnels()
        self._cancels.update(self._running.keys())
        for task in (self.opening, self.run_task, *self._running):
            if task is not None:
                task.cancel(CANCELLED)

    def uncancel(self, task: "asyncio.Task[object]") -> bool:
        """Take back whatever `cancel` has asked of running work; False if somebody else has cancelled it, too."""
        for _ in range(self._cancels.pop(task, 0)):
            task.uncancel()
        return not task.cancelling()

    async def wait_ended(self, timeout_s: float) -> bool:
        """Wait for everything to end, at most so long; whether it has."""
        idle = asyncio.ensure_future(self._idle.wait())
        try:
            others: list[asyncio.Future[Any]] = [
                future for future in (self.opening, self.run_task, *self.lead.threads) if future is not None
            ]
            _, late = await asyncio.wait([idle, *others], timeout=timeout_s)
            return not late
        finally:
            idle.cancel()
