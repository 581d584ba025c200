"""The connections to workers: last used, first taken; opened when needed, closed when idle.

What it never does: send anything; a connection is handed to its taker, who does.

Law: never more than `connections_max`; who finds none waits its turn. The router closes idle connections long before
the worker would. Before a request that must not be sent twice goes out on a used connection, the connection is looked
at: if the worker's end is already known to be closed, another one is taken, so that what was sent into the void is
never "maybe processed".

Health is learnt by use: an address at which connecting has failed is let be for a moment, twice as long after each
failure that follows; who would be sent there is told so at once, without a system call. News of the worker end the
pause.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from shardlead.config import RouterSettings, split_address
from shardlead.core.shardmap import ShardMap
from shardlead.router.counts import Counts
from shardlead.router.heads import Kinds, answer_kinds
from shardlead.router.known import AnswerLooks, Known
from shardlead.router.plans import AnswerPlan, Plans, answer_plans
from shardlead.router.upstream import Taker, Upstream
from shardlead.tls import WorkerTls

CONNECTING_MAX: Final = 16  # at once, to one address; a burst upon one that is dead must not all wait for it
REST_S: Final = 0.05  # after the first failure; doubles
REST_MAX_S: Final = 1.0
SKIP_S: Final = 2.0  # how long the rest of a refusal may take to come, for its connection to be used again


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
        plans: Plans[AnswerPlan],
        known: Known[AnswerLooks],
        counts: Counts,
        tasks: asyncio.TaskGroup,
        tls: WorkerTls | None = None,
    ) -> None:
        self.worker = worker
        self.address = address
        self.idle: list[Upstream] = []  # last used, first taken
        self.busy: dict[Upstream, None] = {}  # a set that keeps its order
        self.waiting: deque[Taker] = deque()
        self.is_leaving = False
        self.now_s = 0.0
        self._is_closed = False
        self._failures = 0  # to connect, in a row
        self._rests_until_s = 0.0  # on the loop's clock
        self._tls = tls
        self._connecting: set[asyncio.Task[None]] = set()
        self._connections_max = connections_max
        self._connect_timeout_s = connect_timeout_s
        self._kinds = kinds
        self._plans = plans
        self._known = known
        self._counts = counts
        self._tasks = tasks
        self._endpoint = split_address(address)  # None: a worker's record may say anything

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
        connection = self.take_idle(must_be_alive=must_be_alive)
        if connection is not None:
            self._hand_over(connection, deque((taker,)))
            return
        self.waiting.append(taker)
        if self._failures and self._is_resting():
            asyncio.get_running_loop().call_soon(self._turn_away, len(self.waiting))
            return
        self._open_more()

    def take_idle(self, *, must_be_alive: bool) -> Upstream | None:
        """An idle connection, which is busy from now on; None if there is none."""
        while self.idle:
            connection = self.idle.pop()
            if connection.transport is None or (must_be_alive and not connection.is_alive()):
                connection.close()
                continue
            self.busy[connection] = None
            return connection
        return None

    def news(self) -> None:
        """Something has become known of this worker: try at once."""
        self._failures = 0
        self._rests_until_s = 0.0
        if self.waiting:
            self._open_more()

    def withdraw(self, taker: Taker) -> bool:
        """It does not wait any more; False if it did not."""
        try:
            self.waiting.remove(taker)
        except ValueError:
            return False
        return True

    def give_back(self, connection: Upstream) -> None:
        """It is free: its answer was received whole, nobody wants it, or it is new."""
        self.busy.pop(connection, None)
        if not (connection.is_reusable and connection.is_sent):
            connection.close()
            self._open_more()
        elif self.waiting:
            self._hand_over(connection, self.waiting)
        elif self.is_leaving:
            connection.close()
        else:
            connection.idle_since_s = self.now_s
            self.idle.append(connection)

    def forget(self, connection: Upstream) -> None:
        """The connection has ended."""
        self.busy.pop(connection, None)
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
        self._is_closed = self.is_leaving = True
        self.waiting.clear()
        for task in tuple(self._connecting):
            task.cancel()
        for connection in [*self.idle, *self.busy]:
            connection.abort()

    def _hand_over(self, connection: Upstream, takers: deque[Taker]) -> None:
        """To the first of them that still wants it; if none does, it goes home."""
        self.busy[connection] = None
        while takers:
            taker = connection.taker = takers.popleft()
            if taker.connected(connection):
                return
        self.give_back(connection)

    def _open_more(self) -> None:
        if self._is_closed:
            return
        room = self._connections_max - len(self.busy) - len(self.idle) - len(self._connecting)
        at_once = 1 if self._failures else CONNECTING_MAX  # after a failure one tries for all
        room = min(room, at_once - len(self._connecting))
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
        if connection is None:
            self._failures += 1
            rest_s = min(REST_S * 2 ** min(self._failures - 1, 16), REST_MAX_S)
            self._rests_until_s = asyncio.get_running_loop().time() + rest_s
            self._turn_away(len(self.waiting) - len(self._connecting))
            return
        self._failures = 0
        if connection.transport is None:
            if self.waiting and not self._is_closed:
                self.waiting.popleft().not_connected()
        else:
            self.give_back(connection)
            if self.waiting:
                self._open_more()  # one may have tried for all

    def _is_resting(self) -> bool:
        return asyncio.get_running_loop().time() < self._rests_until_s

    def _turn_away(self, count: int) -> None:
        """Tell those who wait that there is no connection, unless that has changed meanwhile."""
        for _ in range(count):
            if not self.waiting or self._is_closed or not self._failures:
                break
            self.waiting.popleft().not_connected()

    async def _connect(self) -> Upstream | None:
        loop = asyncio.get_running_loop()
        try:
            if self._endpoint is None:
                raise ValueError(f"not an address: {self.address}")
            async with asyncio.timeout(self._connect_timeout_s):
                create = partial(Upstream, self, self._kinds, self._plans, self._known)
                if self._tls is None:
                    _, connection = await loop.create_connection(create, *self._endpoint)
                else:
                    _, connection = await loop.create_connection(
                        create,
                        *self._endpoint,
                        ssl=self._tls.context,
                        server_hostname=self._tls.name or self._endpoint[0],
                    )
        except (OSError, TimeoutError, ValueError) as exc:  # UnicodeError: a host that no name service could know
            self._counts.connects["timed-out" if isinstance(exc, TimeoutError) else "failed"] += 1
            return None
        self._counts.connects["connected"] += 1
        return connection


class Pools:
    """The pool of each worker's address; made when first asked for."""

    def __init__(
        self, settings: RouterSettings, *, counts: Counts, tasks: asyncio.TaskGroup, tls: WorkerTls | None = None
    ) -> None:
        self._tls = tls
        self._settings = settings
        self._counts = counts
        self._tasks = tasks
        self._kinds = answer_kinds()
        self._plans = answer_plans(self._kinds)
        self._known: Known[AnswerLooks] = Known()
        self._pools: dict[tuple[str, str], Pool] = {}
        self.find: Callable[[tuple[str, str]], Pool | None] = self._pools.get
        """The pool of a worker and its address, if there is one."""

    def values(self) -> tuple[Pool, ...]:
        """All pools."""
        return tuple(self._pools.values())

    def to(self, worker: str, address: str) -> Pool:
        """The pool of this worker at this address."""
        pool = self._pools.get((worker, address))
        if pool is None:
            pool = self._pools[worker, address] = Pool(
                worker,
                address,
                connections_max=self._settings.upstream_connections_max,
                connect_timeout_s=self._settings.connect_timeout_s,
                kinds=self._kinds,
                plans=self._plans,
                known=self._known,
                counts=self._counts,
                tasks=self._tasks,
                tls=self._tls,
            )
        return pool

    def news_of(self, worker: str) -> None:
        """Something has become known of this worker."""
        for pool in self._pools.values():
            if pool.worker == worker:
                pool.news()

    def of(self, worker: str) -> list[Pool]:
        """The pools of this worker: one for each address it has had."""
        return [pool for pool in self._pools.values() if pool.worker == worker]

    def session_ended(self, worker: str, sid: str) -> None:
        """Tell whoever was sent, or is about to be, to that session."""
        for pool in self.of(worker):
            for connection in tuple(pool.busy):
                if connection.taker is not None:
                    connection.taker.session_ended(sid)
            for taker in tuple(pool.waiting):
                taker.session_ended(sid)

    def heed(self, map_: ShardMap, worker: str) -> None:
        """What is known of a worker has changed. One that is leaving, and leads nothing any more, waits for its
        routers to go: keep no idle connection to it."""
        member = map_.workers.get(worker)
        for pool in self.of(worker):
            is_gone = member is None or member.record.address != pool.address
            is_left = is_gone or (member is not None and member.record.state == "draining" and worker not in map_.led)
            pool.leave(is_leaving=is_left)
            if is_gone and pool.is_empty:
                del self._pools[pool.worker, pool.address]

    def sweep(self, map_: ShardMap, now_s: float) -> None:
        """Close what has been idle for too long, and what is not worth waiting for; forget who is gone."""
        for pool in self.values():
            pool.now_s = now_s
            pool.close_idle(now_s - self._settings.upstream_idle_timeout_s)
            pool.close_skipping(now_s - SKIP_S)
            if pool.is_empty:
                self.heed(map_, pool.worker)

    def close(self) -> None:
        """End everything, at once and for good."""
        for pool in self.values():
            pool.close()
