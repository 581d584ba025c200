"""The connections to one worker: last used, first taken; opened when needed, closed when idle.

What it never does: send anything; a connection is handed to its taker, who does.

Law: never more than `connections_max`; who finds none waits its turn. The router closes idle connections long before
the worker would. Before a request that must not be sent twice goes out on a used connection, the connection is looked
at: if the worker's end is already known to be closed, another one is taken, so that what was sent into the void is
never "maybe processed".
"""

import asyncio
from collections import deque

from shardlead.router.counts import Counts
from shardlead.router.heads import Kinds
from shardlead.router.upstream import Taker, Upstream


class Pool:
    """The connections to one worker at one address, and the requests that wait for one."""

    def __init__(
        self,
        worker: str,
        address: str,
        *,
        connections_max: int,
        connect_timeout_s: float,
        kinds: Kinds,
        counts: Counts,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.worker = worker
        self.address = address
        self.idle: list[Upstream] = []  # last used, first taken
        self.busy: set[Upstream] = set()
        self.waiting: deque[Taker] = deque()
        self.is_leaving = False
        self.now_s = 0.0
        self._is_closed = False
        self._connecting: set[asyncio.Task[None]] = set()
        self._connections_max = connections_max
        self._connect_timeout_s = connect_timeout_s
        self._kinds = kinds
        self._counts = counts
        self._tasks = tasks
        host, _, port = address.rpartition(":")
        self._host = host.removeprefix("[").removesuffix("]")
        self._port = int(port) if port.isdigit() else 0

    def __repr__(self) -> str:
        return (
            f"<Pool of {self.worker} at {self.address}: {len(self.busy)} busy, {len(self.idle)} idle, "
            f"{len(self._connecting)} opening, {len(self.waiting)} waiting>"
        )

    @property
    def is_empty(self) -> bool:
        return not (self.idle or self.busy or self.waiting or self._connecting)

    def take(self, taker: Taker, *, must_be_alive: bool) -> None:
        """Call `taker.connected` with a connection, now or later; or `taker.not_connected`, later."""
        while self.idle:
            connection = self.idle.pop()
            if connection.transport is None or (must_be_alive and not connection.is_alive()):
                connection.close()
                continue
            connection.taker = taker
            self.busy.add(connection)
            taker.connected(connection)
            return
        self.waiting.append(taker)
        self._open_more()

    def withdraw(self, taker: Taker) -> bool:
        """It does not wait any more; False if it did not."""
        try:
            self.waiting.remove(taker)
        except ValueError:
            return False
        return True

    def give_back(self, connection: Upstream) -> None:
        """An answer was received whole."""
        self.busy.discard(connection)
        if not (connection.is_reusable and connection.is_sent):
            connection.close()
            self._open_more()
        elif self.waiting:
            self._hand_over(connection)
        elif self.is_leaving:
            connection.close()
        else:
            connection.is_used = True
            connection.idle_since_s = self.now_s
            self.idle.append(connection)

    def forget(self, connection: Upstream) -> None:
        """The connection has ended."""
        self.busy.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)
        if self.waiting:
            self._open_more()

    def leave(self, *, is_leaving: bool) -> None:
        """Keep no idle connections any more (or again): the worker waits for its routers to go."""
        self.is_leaving = is_leaving
        if is_leaving:
            self.close_idle(before_s=float("inf"))

    def close_idle(self, before_s: float) -> None:
        """Close what has been unused since before then."""
        for connection in [each for each in self.idle if each.idle_since_s < before_s]:
            connection.close()

    def close_skipping(self, before_s: float) -> None:
        """Close what was told since before then to skip the rest of an answer: it is not worth waiting for."""
        for connection in [each for each in self.busy if each.taker is None and each.idle_since_s < before_s]:
            connection.close()

    def close(self) -> None:
        """End everything, at once and for good."""
        self._is_closed = True
        self.waiting.clear()
        for task in tuple(self._connecting):
            task.cancel()
        for connection in [*self.idle, *self.busy]:
            connection.abort()

    def _hand_over(self, connection: Upstream) -> None:
        connection.is_used = True
        taker = self.waiting.popleft()
        connection.taker = taker
        self.busy.add(connection)
        taker.connected(connection)

    def _open_more(self) -> None:
        if self._is_closed:
            return
        room = self._connections_max - len(self.busy) - len(self.idle) - len(self._connecting)
        for _ in range(min(len(self.waiting) - len(self._connecting), room)):
            task = self._tasks.create_task(self._open(), name=f"connect to {self.worker}")
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _open(self) -> None:
        try:
            connection = await self._connect()
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._connecting.discard(task)
        if connection is None or connection.transport is None:
            if self.waiting and not self._is_closed:
                self.waiting.popleft().not_connected()
        elif self.waiting:
            taker = connection.taker = self.waiting.popleft()
            self.busy.add(connection)
            taker.connected(connection)
        elif self.is_leaving:
            connection.close()
        else:
            connection.idle_since_s = self.now_s
            self.idle.append(connection)

    async def _connect(self) -> Upstream | None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Upstream(self, self._kinds), self._host, self._port
                )
        except (OSError, TimeoutError) as exc:
            self._counts.connects["timed-out" if isinstance(exc, TimeoutError) else "failed"] += 1
            return None
        self._counts.connects["connected"] += 1
        return connection
