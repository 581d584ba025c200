"""The router: listens, keeps house, stops in order.

What it never does: read the store (it is given a view, which its caller runs) or decide about a request.

Law: nothing waits without a bound; time-outs are found by coarse sweeps, because a timer for each request costs more
than the request. Stopping: no new connections, requests under way end, answers say `Connection: close`.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Final

from shardlead.clock import NS_PER_S, Clock
from shardlead.cluster.view import View
from shardlead.config import RouterSettings, TlsSettings
from shardlead.core.routing import KeyRules
from shardlead.errors import CommandError
from shardlead.router.access import AccessLog
from shardlead.router.counts import Counts
from shardlead.router.dispatch import Dispatch
from shardlead.router.downstream import Downstream
from shardlead.router.exchange import Exchange
from shardlead.router.heads import request_kinds
from shardlead.router.known import Known, RequestFields
from shardlead.router.plans import request_plans
from shardlead.tls import WorkerTls, towards_clients, towards_workers

log = logging.getLogger("shardlead.router")

SWEEP_S: Final = 1.0
STOPPING_SWEEP_S: Final = 0.05
PAUSE_S: Final = 5.0  # a sweep that comes so late means that this process was stopped
BACKLOG: Final = 1_024


class Router:
    """`async with Router(settings, view, clock=clock) as router:` listens until left. `run()` serves until told to
    `stop()`. The view is run by the caller."""

    def __init__(
        self,
        settings: RouterSettings,
        view: View,
        *,
        clock: Clock,
        counts: Counts | None = None,
        share_port: bool = False,
        tls: TlsSettings | None = None,
    ) -> None:
        """`tls`: the inner hop's; None: workers are spoken to in plain HTTP."""
        self.settings = settings
        self.view = view
        self.counts = counts if counts is not None else Counts()
        self.rules = KeyRules.parse(settings.key_rules)
        self.kinds = request_kinds(self.rules.headers)
        self.plans = request_plans(self.kinds, settings.headers_max)
        self.known: Known[RequestFields] = Known()
        self.is_stopping = False
        self.now_ns: Callable[[], int] = clock.now_ns
        self.now_s = clock.now_ns() / NS_PER_S
        self._clock = clock
        self._paused_s = 0.0
        self._share_port = share_port
        self._tls = tls if tls is not None else TlsSettings()
        self.access: AccessLog | None = None
        self._worker_tls: WorkerTls | None = None
        self._desk: Dispatch | None = None
        self._server: asyncio.Server | None = None
        self._connections: dict[Downstream, None] = {}  # a set that keeps its order
        self._peers: Counter[str] = Counter()
        self.next_number: Callable[[], int] = itertools.count(1).__next__
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._left = asyncio.Event()

    def __repr__(self) -> str:
        return (
            f"<Router at {self.address or 'no address yet'}: {len(self._connections)} clients, {self.counts.held} held>"
        )

    # --- lifecycle

    async def __aenter__(self) -> "Router":
        """Listen. Raises OSError if the port cannot be had, CommandError for certificates that cannot be used and an
        access log that cannot be written."""
        loop = asyncio.get_running_loop()
        context = towards_clients(self.settings)
        self._worker_tls = towards_workers(self._tls)
        self._server = await loop.create_server(
            lambda: Downstream(self),
            self.settings.host,
            self.settings.port,
            backlog=BACKLOG,
            reuse_port=self._share_port or None,
            ssl=context,
            ssl_handshake_timeout=self.settings.head_timeout_s if context is not None else None,
            start_serving=False,
        )
        if self.settings.access_log:
            try:
                self.access = AccessLog(self.settings.access_log, clock=self._clock, counts=self.counts)
            except CommandError:
                self._server.close()
                raise
        started = loop.create_future()
        self._task = loop.create_task(self._serve(self._server, started), name="router")
        await asyncio.wait((started, self._task), return_when=asyncio.FIRST_COMPLETED)
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Stop, in order and bounded by `shutdown_timeout_s`."""
        self._stop.set()
        assert self._task is not None
        try:
            await asyncio.shield(self._task)
        except asyncio.CancelledError:
            self._task.cancel()
            raise

    async def run(self) -> None:
        """Serve until `stop()`; then end in order and return. Raises OSError if the port cannot be had."""
        async with self:
            assert self._task is not None
            await asyncio.wait((self._task,))

    def stop(self) -> None:
        """Let `run` return. May be called from a signal handler of the loop."""
        self._stop.set()

    async def _serve(self, server: asyncio.Server, started: asyncio.Future[None]) -> None:
        """The parent of all that runs for this router."""
        async with asyncio.TaskGroup() as tasks:
            desk = self._desk = Dispatch(
                self.settings,
                self.view,
                counts=self.counts,
                clock=self._clock,
                tasks=tasks,
                access=self.access,
                tls=self._worker_tls,
            )
            sweeper = tasks.create_task(self._sweep(), name="router sweep")
            try:
                await server.start_serving()
                log.info("router listens", extra={"address": self.address})
                started.set_result(None)
                await self._stop.wait()
                await self._drain()
            finally:
                sweeper.cancel()
                server.close()
                for connection in tuple(self._connections):
                    connection.abort()
                desk.close()
                if self.access is not None:
                    self.access.close()

    async def _drain(self) -> None:
        """No new connections; those under way end, but not for longer than `shutdown_timeout_s`."""
        self.is_stopping = True
        if self._server is not None:
            self._server.close()
        for connection in tuple(self._connections):
            connection.stop()
        try:
            async with asyncio.timeout(self.settings.shutdown_timeout_s):
                while self._connections:
                    self._house_keep()
                    self._left.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(STOPPING_SWEEP_S):
                            await self._left.wait()
        except TimeoutError:
            log.warning("stopped with clients left", extra={"clients": len(self._connections)})

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._house_keep()

    def _house_keep(self) -> None:
        now_s = self._clock.now_ns() / NS_PER_S - self._paused_s
        if now_s - self.now_s > PAUSE_S:
            # The whole process stood still, and so did its clients' time-outs: what they sent meanwhile lies unread.
            self._paused_s += now_s - self.now_s
            return
        self.now_s = now_s
        for connection in tuple(self._connections):
            connection.check(now_s)
        self.desk.sweep_pools(now_s)
        if self.access is not None:
            self.access.flush()

    # --- for others

    @property
    def address(self) -> str:
        """host:port it listens on; empty before."""
        if self._server is None or not self._server.sockets:
            return ""
        name = self._server.sockets[0].getsockname()
        host = f"[{name[0]}]" if ":" in name[0] else name[0]
        return f"{host}:{name[1]}"

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests and knows where they go."""
        return self._server is not None and not self.is_stopping and self.view.is_ready

    # --- `downstream.Front`

    @property
    def desk(self) -> Dispatch:
        assert self._desk is not None
        return self._desk

    def admit(self, connection: Downstream, peer: str) -> str:
        self._connections[connection] = None
        self._peers[peer] += 1
        self.counts.client_connections += 1
        if len(self._connections) > self.settings.connections_max:
            return "too many connections"
        if self._peers[peer] > self.settings.connections_per_peer_max:
            return "too many connections from this address"
        return ""

    def forget(self, connection: Downstream, peer: str) -> None:
        if connection in self._connections:
            del self._connections[connection]
            self.counts.client_connections -= 1
            self._peers[peer] -= 1
            if not self._peers[peer]:
                del self._peers[peer]
            self._left.set()

    def tunnelled(self, exchange: Exchange) -> bool:
        return self.desk.tunnelled(exchange)
