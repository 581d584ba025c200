"""A worker: it joins the cluster, leads shards, serves their requests, and leaves without a failed request.

    start: shape ─▸ application ─▸ listen ─▸ session ─▸ steward ⟲ (a lost session is followed by a new one)
    stop:  controller's seat ─▸ record `draining` ─▸ handoffs ─▸ linger for routers ─▸ revoke ─▸ done

Law: design.md, Worker; protocol.md A.3 (T8) and A.5. One session at a time. After a loss the work of the lost
leaderships ends before the lease is given back, and before a new session begins.
"""

import asyncio
import contextlib
import logging
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final, Protocol

from prometheus_client import CollectorRegistry

from shardlead.clock import NS_PER_S, Clock, SystemClock
from shardlead.cluster.bootstrap import Shape, ensure_shape
from shardlead.cluster.session import Session, open_session
from shardlead.config import Settings
from shardlead.core.contract import Refused
from shardlead.core.keyspace import Keyspace
from shardlead.core.model import WorkerRecord
from shardlead.core.ring import slot_of
from shardlead.errors import (
    ClusterError,
    ClusterMissing,
    Fenced,
    KeyspaceError,
    LeadershipError,
    LeadershipLost,
    NotLeading,
    StoreError,
    StoreReplaced,
    WriteUnknown,
    weightiest,
)
from shardlead.metrics import WorkerMetrics
from shardlead.store.base import KeyValue, Store
from shardlead.tls import of_worker
from shardlead.worker.admission import Admitted, Parked, Turned
from shardlead.worker.application import Application, Factory
from shardlead.worker.audit import AuditLog
from shardlead.worker.host import Host
from shardlead.worker.http import Front
from shardlead.worker.steward import Steward
from shardlead.worker.tenure import CANCELLED

log = logging.getLogger("shardlead.worker")

REJOIN_S: Final = 0.2  # first pause before a session is opened again after a failure; doubles
REJOIN_MAX_S: Final = 2.0
BLOCKING_THREADS_MAX: Final = 32  # of `lead.run_blocking`, for all shards of a worker
STORE_AWAY_S: Final = 3.0  # a stop that has lost its store waits so long for it: an etcd leader change takes 1 to 3 s
SOUND_SESSION_S: Final = 2.0  # a session that lasts so long is followed by the next at once


class Will(Protocol):
    """Who revokes our lease when this process is dead (`worker.will.LastWill`)."""

    def declare(self, lease: int, settings: Any, *, fenced: bool) -> None: ...

    def withdraw(self) -> None: ...


Companion = Callable[[Session], Awaitable[None]]
"""Work beside a session, for as long as it lasts: the controller's candidate. Cancelled when the session ends or the
worker stops; it resigns its seat then."""


def default_name() -> str:
    """<hostname>-<pid>: unique among the living."""
    host = "".join(char if char.isalnum() or char in "-._" else "-" for char in socket.gethostname()).strip("-._")
    return f"{host or 'worker'}-{os.getpid()}"


class Worker:
    """One worker in this process. `async with Worker(store, application, settings) as worker: await worker.run()`.

    Entering joins the cluster far enough that a wrong setting, a taken port or a taken name is raised
    (ConfigError, ClusterError, CommandError, StoreError); `run` leads and serves until `stop`.
    """

    def __init__(
        self,
        store: Store,
        application: Any,
        settings: Settings | None = None,
        *,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        metrics: WorkerMetrics | None = None,
        explicit: Collection[str] = (),
        version: str = "",
        will: Will | None = None,
        companion: Companion | None = None,
        exit_process: Callable[[int], object] = os._exit,
    ) -> None:
        """`application`: an Application, or what one is made of (a class, a factory, a context manager). `explicit`
        names the fields of the section `cluster` that must be as the stored cluster's."""
        settings = settings or Settings()
        clock, rng = clock or SystemClock(), rng or random.Random()
        metrics = metrics or WorkerMetrics(CollectorRegistry())
        if not isinstance(application, Application):
            application = Application(application)
        self.name = settings.worker.name or default_name()
        self.address = ""
        self.admin = ""
        self._store = store
        self._application: Application = application
        self._settings = settings
        self._keyspace = Keyspace(settings.cluster.name)
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._explicit = explicit
        self._version = version
        self._will = will
        self._companion = companion
        self._exit_process = exit_process
        self._stack = contextlib.AsyncExitStack()
        self._shape: Shape | None = None
        self._host: Host | None = None
        self._front: Front | None = None
        self._factory: Factory | None = None
        self._session: Session | None = None
        self._steward: Steward | None = None
        self._audit: AuditLog | None = None
        self._stopping = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Worker {self.name} at {self.address or 'no address yet'} {self._session!r}>"

    # --- for whoever runs it ---

    @property
    def is_ready(self) -> bool:
        """Whether it may lead and serve now: its session is active and it is not stopping."""
        return self._session is not None and self._session.is_active and not self._stopping.is_set()

    @property
    def session(self) -> Session | None:
        return self._session

    @property
    def led(self) -> dict[int, int]:
        """shard -> epoch, by this worker's own account."""
        return self._host.led() if self._host is not None else {}

    async def wait_placed(self, timeout_s: float) -> None:
        """Returns once others may stop without loss of evenness: the controller has made this worker a successor or a
        leader in its present session. At the latest after `timeout_s`: no controller may live."""
        if self._steward is None:
            return
        with contextlib.suppress(TimeoutError, StoreError):
            async with asyncio.timeout(timeout_s):
                await self._steward.wait_placed()

    def stop(self) -> None:
        """Begin to leave: hand over, let running requests end, revoke. `run` returns when it is done."""
        self._stopping.set()

    async def __aenter__(self) -> "Worker":
        try:
            await self._enter()
        except BaseException:  # cancelled, too: without __aenter__ nobody calls __aexit__, and a port is open by now
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def run(self) -> bool:
        """Lead and serve until `stop`, then leave. Whether everything was handed over or given up in time; if not,
        the lease stands and ends by itself, or by the parent's hand.

        Raises StoreReplaced if another etcd cluster answers at the endpoints, NameTaken and other ClusterErrors when
        a lost session cannot be followed by a new one.
        """
        pause_s = REJOIN_S
        while not self._stopping.is_set():
            began_ns = self._clock.now_ns()
            try:
                session = await self._open_session_unless_stopping()
            except StoreReplaced:
                raise  # another cluster stands at the endpoints now: nothing of ours is there, and no epoch compares
            except (StoreError, KeyspaceError, ClusterMissing) as exc:
                log.warning("no session yet", extra={"worker": self.name, "reason": str(exc)})
            else:
                if session is not None and not await self._live(session):
                    return False
                if self._clock.now_ns() - began_ns > SOUND_SESSION_S * NS_PER_S:
                    pause_s = REJOIN_S
                    continue  # the session was sound while it lasted; those that end at once come slower and slower
            await self._sleep_unless_stopping(pause_s * self._rng.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, REJOIN_MAX_S)
        return True

    async def _open_session_unless_stopping(self) -> Session | None:
        """A session; None if this worker was told to stop before it had one (it may wait long for its name)."""
        opening = asyncio.create_task(self._open_session(), name="open session")
        stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
        try:
            await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return opening.result() if opening.done() else None
        finally:
            for task in (opening, stopping):
                task.cancel()
            await asyncio.wait({opening, stopping})  # bounded: what has been granted is given back within seconds

    @contextlib.asynccontextmanager
    async def admit(self, key: bytes | str, epoch: int) -> AsyncIterator[Any]:
        """For protocols of one's own: the application's object for `key`, as work of its leadership.

        The work is waited for by a drain and cancelled by a loss; check the leadership before each effect. Waits for
        a shard that opens. Raises NotLeading, with the leader if known, and LeadershipLost in place of that
        cancellation.
        """
        host = self._host
        if host is None:
            raise NotLeading(-1, epoch, reason="the worker has not started")
        shard = host.shard_of(key.encode() if isinstance(key, str) else key)
        asked_ns = self._clock.now_ns()
        verdict = host.admission(shard, epoch)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.worker.park_timeout_s):
                while isinstance(verdict, Parked):
                    await host.changed(shard)
                    asked_ns = self._clock.now_ns()
                    verdict = host.admission(shard, epoch)
        if self._audit is not None and not isinstance(verdict, Admitted):
            self._audit.reject(shard, epoch, verdict.reason if isinstance(verdict, Turned) else Refused.UNKNOWN)
        match verdict:
            case Admitted(tenure):
                if tenure.trail is not None:
                    tenure.trail.accept(asked_ns, asked_ns)
                task = asyncio.current_task()
                assert task is not None, "admit is entered within a task"
                error: LeadershipError | None = None
                tenure.enter(task)
                try:
                    yield tenure.application.subject if tenure.application is not None else None
                except asyncio.CancelledError as exc:
                    if not tenure.is_lost or exc.args != (CANCELLED,) or not tenure.uncancel(task):
                        raise  # somebody else's cancellation, or theirs too
                    raise LeadershipLost(shard, epoch, "its work was cancelled") from exc
                except (Exception, BaseExceptionGroup) as exc:  # the caller's own code may raise anything
                    error = weightiest(exc)
                    raise
                finally:
                    tenure.leave(task)  # first: it has ended by itself, and is not to be cancelled any more
                    if isinstance(error, Fenced | WriteUnknown) and error.shard == shard:
                        host.fenced_off(shard, tenure.lead.epoch, str(error))
            case Turned(reason, own_epoch, leader):
                raise NotLeading(shard, own_epoch, reason=reason, leader=leader)
            case Parked():
                raise NotLeading(shard, 0, reason=Refused.UNKNOWN, leader=host.leader_hint(shard))

    # --- joining ---

    async def _enter(self) -> None:
        settings = self._settings
        self._shape = await ensure_shape(self._store, self._keyspace, settings.cluster, self._explicit)
        if settings.worker.audit_dir:  # once the store has answered: who tries to join again and again leaves no files
            self._audit = AuditLog.open(settings.worker.audit_dir, self.name, self._clock)
            self._stack.callback(self._audit.close)
        self._factory = await self._stack.enter_async_context(self._application.factory())
        # The application's threads have a pool of their own: were it the loop's, look-ups of names, on which the
        # lease's renewal depends, and the controller's planning would wait for them.
        threads = ThreadPoolExecutor(BLOCKING_THREADS_MAX, thread_name_prefix="shardlead-blocking")
        self._stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        self._host = await self._stack.enter_async_context(
            Host(
                settings.worker,
                self.name,
                self._factory,
                self._shard_of,
                fenced=self._factory.fenced,
                clock=self._clock,
                rng=self._rng,
                metrics=self._metrics,
                executor=threads,
                exit_process=self._exit_process,
                audit=self._audit,
            )
        )
        self._front = Front(
            settings.worker,
            self._host,
            self._factory.description,
            clock=self._clock,
            metrics=self._metrics,
            tls=of_worker(settings.tls),
        )
        self._stack.push_async_callback(self._front.close)
        self.address = await self._front.start()
        self._metrics.lease_remaining.set_function(self._remaining_s)

    def _shard_of(self, key: bytes) -> int:
        shape = self._shape
        assert shape is not None, "requests come after the start"
        return shape.table[slot_of(key, shape.meta.slot_count, shape.meta.hash_tags)]

    def _remaining_s(self) -> float:
        return self._session.remaining_s() if self._session is not None else -1.0

    async def _open_session(self) -> Session:
        shape = await ensure_shape(self._store, self._keyspace, self._settings.cluster, self._explicit)
        if self._shape is not None and shape.meta.ring_crc != self._shape.meta.ring_crc:
            raise ClusterError("the cluster's ring is another one than at the start: restart this worker")
        self._shape = shape
        worker, factory = self._settings.worker, self._factory
        assert factory is not None, "sessions come after the start"
        record = WorkerRecord(
            sid="",
            address=self.address,
            pid=os.getpid(),
            zone=worker.zone,
            capacity=worker.capacity,
            version=self._version,
            drain_timeout_s=worker.drain_timeout_s,
            idempotent=factory.idempotent,
            fenced=factory.fenced,
            admin=self.admin,
        )
        session = await open_session(
            self._store,
            self._keyspace,
            self._settings.lease,
            clock=self._clock,
            rng=self._rng,
            name=self.name,
            record=record,
            meta_revision=shape.meta_revision,
            on_wait=self._name_is_taken,
            on_grant=self._declare,
        )
        self._metrics.sessions.inc()
        log.info("session opened", extra={"worker": self.name, "sid": session.sid, "ttl_s": session.ttl_s})
        return session

    def _declare(self, lease: int) -> None:
        if self._will is not None:
            assert self._factory is not None, "sessions come after the start"
            self._will.declare(lease, self._settings.store, fenced=self._factory.fenced)

    def _withdraw(self) -> None:
        """The lease is gone. One that could not be revoked is left to the parent, who tries again once we are dead."""
        if self._will is not None:
            self._will.withdraw()

    def _name_is_taken(self, _kv: KeyValue) -> None:
        log.warning("worker name is taken by a living session, waiting for it to end", extra={"worker": self.name})

    # --- living ---

    async def _live(self, session: Session) -> bool:
        """One session, from its opening to its end; False if the worker left with something not drained."""
        assert self._shape is not None, "sessions come after the start"
        assert self._host is not None, "sessions come after the start"
        host = self._host
        steward = Steward(
            self._store,
            self._keyspace,
            session,
            host,
            self._settings.worker,
            generation=self._shape.meta.generation,
            shards=self._shape.meta.shards,
            clock=self._clock,
            rng=self._rng,
            metrics=self._metrics,
        )
        self._session, self._steward = session, steward
        if self._audit is not None:
            self._audit.begin_session(session)
        host.envoy = steward
        self._metrics.set_session_state("active")
        work = asyncio.create_task(steward.run(), name=f"steward {session.sid}")
        companion = asyncio.create_task(self._accompany(session), name=f"companion {session.sid}")
        stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await _ended(companion)
            if work.done():
                await self._after_loss(session, work)
                return True
            return await self._leave(session, steward, work)
        finally:
            for task in (companion, stopping, work):
                await _ended(task)
            host.envoy = None

    async def _accompany(self, session: Session) -> None:
        if self._companion is None:
            return
        try:
            await self._companion(session)
        except Exception:  # it is not the worker's own work, which goes on without it
            log.exception("the session's companion failed", extra={"worker": self.name})

    async def _after_loss(self, session: Session, work: asyncio.Task[None]) -> None:
        """Our handlers end, then we give the lease back ourselves, so that nobody waits for its TTL."""
        assert self._host is not None, "sessions come after the start"
        if (error := work.exception()) is not None:
            log.error("defect in shardlead: the session's work failed", exc_info=error, extra={"worker": self.name})
            session.lose(f"its work failed: {error}")
        self._metrics.sessions_lost.labels("lost").inc()
        self._host.lose_all("the session is lost")
        worker = self._settings.worker
        is_idle = await self._host.wait_idle(worker.cancel_grace_s + worker.close_timeout_s)
        if (is_idle or self._host.fenced) and await session.close():
            self._withdraw()

    # --- leaving ---

    async def _leave(self, session: Session, steward: Steward, work: asyncio.Task[None]) -> bool:
        """T8. The lease is revoked only when nothing of it is in use any more."""
        assert self._host is not None, "leaving comes after the start"
        assert self._front is not None, "leaving comes after the start"
        worker = self._settings.worker
        log.info("leaving", extra={"worker": self.name, "shards": len(self._host.led())})
        self._host.is_stopping = True
        began_ns = self._clock.now_ns()
        if session.record is not None:
            await session.announce(replace(session.record, state="draining"))
        steward.drain((self._clock.now_ns() - began_ns) / NS_PER_S)
        if not await self._handed_over(session, work):
            reason = "the store is away" if not session.is_active else "the time allowed is over"
            facts = {"worker": self.name, "reason": reason}
            log.error("leaving with shards not handed over; they are led again once the lease has ended", extra=facts)
            return False
        await self._front.stop_accepting()
        await self._front.linger(worker.linger_s)
        work.cancel()
        if await session.close():
            self._withdraw()
        log.info("left", extra={"worker": self.name})
        return True

    async def _handed_over(self, session: Session, work: asyncio.Task[None]) -> bool:
        """Whether nothing is led and nothing runs any more, within the time allowed.

        A store that is away for long ends the wait as well. Nothing has been served since the session's deadline, so
        that all that could still be handed over is time: the parent's, to give the lease back before both are killed.
        """
        assert self._host is not None, "leaving comes after the start"
        idle = asyncio.create_task(self._host.wait_idle(self._settings.worker.shutdown_timeout_s), name="wait idle")
        away = asyncio.create_task(session.suspended_for(STORE_AWAY_S), name="store away")
        try:
            await asyncio.wait({idle, away, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                self._host.lose_all("the session is lost")
            elif away.done():
                return self._host.is_idle
            return await idle
        finally:
            idle.cancel()
            away.cancel()

    async def _sleep_unless_stopping(self, pause_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._stopping.wait()


async def _ended(task: "asyncio.Task[Any]") -> None:
    """Cancel a task and wait until it has ended; its failure is logged, not raised."""
    task.cancel()
    await asyncio.wait({task})  # bounded by the task: each of ours ends its own within named time-outs
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a task of the worker failed", exc_info=error, extra={"task": task.get_name()})
