"""The tasks of a host: none is forgotten, none outlives it, and a defect in one is told.

Law: every task has a parent. One here ends by itself, or with the host within a grace.
"""

import asyncio
import logging
from collections.abc import Coroutine

log = logging.getLogger("shardlead.tasks")


class Tasks:
    """What one host has under way."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def begin(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """Run our own work; if it fails, that is a defect and is logged."""
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def keep(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """Run work whose outcome the caller looks at."""
        task = asyncio.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def end(self, grace_s: float) -> None:
        """Cancel everything, and wait for its end at most so long."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=grace_s)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("defect in shardlead: a shard's task failed", exc_info=error, extra={"task": task.get_name()})
