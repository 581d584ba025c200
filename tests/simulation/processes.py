"""The simulated fleet's processes: what `shardlead worker`, `shardlead router` and a worker's parent put together.

All of it is the shipped code. Replaced are the sockets (`shardlead.virtual.network`), the clock, the random numbers and
the store's transport; the store's client is extended by notes of what it sends, for the witness.
"""

import asyncio
import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

from prometheus_client import CollectorRegistry

from shardlead.client import Client
from shardlead.client.call import Call
from shardlead.client.pool import Pool
from shardlead.cluster.session import Session
from shardlead.cluster.traffic import Request, Traffic, read_hint
from shardlead.cluster.view import View
from shardlead.controller.controller import Controller
from shardlead.core.keyspace import Keyspace
from shardlead.core.routing import Happened
from shardlead.core.shardmap import Delta
from shardlead.errors import LeaseGone, ShardleadError, StoreError
from shardlead.metrics import ControllerMetrics, WorkerMetrics
from shardlead.router.dispatch import Dispatch
from shardlead.router.exchange import Exchange
from shardlead.router.server import Router
from shardlead.router.upstream import Upstream
from shardlead.store.base import Delete, Outcome, Put, Target, Txn
from shardlead.store.etcd import EtcdStore
from shardlead.store.mirror import Mirror
from shardlead.virtual import Machine
from shardlead.worker.application import Application
from shardlead.worker.runtime import Worker
from tests.simulation.service import Lists, Surroundings
from tests.simulation.witness import ProcessWatch

if TYPE_CHECKING:
    from tests.simulation.world import World

PARENT_NOTICES_S: Final = 0.003
PARENT_TRIES_S: Final = 5.0
JOIN_PAUSE_S: Final = 1.0
CLIENT_ENDS_S: Final = 30.0
METRICS: Final = WorkerMetrics(CollectorRegistry())  # shared: nobody reads them here, and making them takes long
CONTROLLER_METRICS: Final = ControllerMetrics(CollectorRegistry())


class NotingStore(EtcdStore):
    """The shipped client, which tells the witness which epochs are given up before it sends the transaction."""

    def note_to(self, world: "World", name: str) -> "NotingStore":
        self._world = world
        self._name = name
        return self

    async def commit(self, txn: Txn) -> Outcome:
        world = self._world
        for shard, revision in _given_up(txn, world.keyspace):
            world.witness.gives_up(self._name, shard, revision)
        outcome = await super().commit(world.tamper(self._name, txn))
        if world.is_tracing:
            world.say(self._name, f"txn {world.shown(txn)}: {type(outcome).__name__}")
        return outcome


def _given_up(txn: Txn, keyspace: Keyspace) -> list[tuple[int, int]]:
    """(shard, mod_revision) of each leader key that this transaction overwrites or deletes if it stands so."""
    found: list[tuple[int, int]] = []
    written = {op.key for op in txn.success if isinstance(op, Put | Delete)}
    for compare in txn.compares:
        if compare.target is Target.MOD and compare.key in written and compare.operand:
            place = keyspace.parse(compare.key)
            if place is not None and place.kind == "leaders":
                assert isinstance(compare.operand, int)
                found.append((place.shard, compare.operand))
    for op in txn.success:
        if isinstance(op, Txn):
            found += _given_up(op, keyspace)
    return found


class Parent:
    """A worker's parent and last will: when the process is dead, it revokes the lease, if the work is fenced."""

    def __init__(self, world: "World", process: "WorkerProcess") -> None:
        self._world = world
        self._process = process
        self._lease = 0
        self._is_fenced = False
        self._machine = world.loop.machine(f"{process.machine.name}'s parent", address=process.machine.address)

    def declare(self, lease: int, _settings: object, *, fenced: bool) -> None:
        self._lease, self._is_fenced = lease, fenced

    def withdraw(self) -> None:
        self._lease = 0

    def worker_died(self, with_machine: bool) -> None:
        if with_machine:
            self._machine.crash()
        elif self._lease and self._is_fenced:
            self._machine.call_later(PARENT_NOTICES_S, self._begin)

    def _begin(self) -> None:
        self._machine.spawn(self._revoke(), "parent")

    async def _revoke(self) -> None:
        world = self._world
        async with world.store(self._machine) as store:
            try:
                async with asyncio.timeout(PARENT_TRIES_S):
                    while True:
                        try:
                            await store.revoke(self._lease)
                        except LeaseGone:
                            return
                        except StoreError:
                            await asyncio.sleep(0.2)
                        else:
                            world.say(self._machine.name, f"revoked lease {self._lease:x}")
                            return
            except TimeoutError:
                return


class WorkerProcess:
    """One worker process from its start to its end."""

    def __init__(self, world: "World", name: str, machine: Machine) -> None:
        self.world = world
        self.name = name
        self.machine = machine
        self.settings = replace(world.settings, worker=replace(world.settings.worker, name=name))
        self.guard_ns = 0  # as last seen
        machine.on_step = self._look
        self.rng = random.Random(world.rng.getrandbits(64))
        self.exit_code: int | None = None  # None while it lives; -9 if killed
        self.died_ns = -1  # true time
        self.task: asyncio.Task[None] | None = None
        self.has_joined = False
        self._stalled_ns = 0
        self._stalled_since_ns = -1
        parent = Parent(world, self)
        machine.on_crash.append(parent.worker_died)
        machine.on_crash.append(self._died)
        surroundings = Surroundings(
            world.storage,
            world.manners,
            self.rng,
            ProcessWatch(world.witness, self),
            world.keys_of,
            self.crash,
            world.is_idempotent,
        )

        def make(lead: Any) -> Lists:
            return Lists(lead, surroundings)

        make.fenced = world.is_fenced  # type: ignore[attr-defined]  # where an application's class says it
        make.idempotent = world.is_idempotent  # type: ignore[attr-defined]
        self.worker: Worker | None = None  # once its store is open
        self.make = make
        self.parent = parent

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.machine!r} exit={self.exit_code}>"

    def start(self) -> None:
        self.task = self.machine.spawn(self._main(), self.machine.name)

    @property
    def is_alive(self) -> bool:
        return self.exit_code is None

    @property
    def session(self) -> Session | None:
        return self.worker.session if self.worker is not None else None

    def lived_ns(self) -> int:
        """Its machine's clock, without the time in which it did not run."""
        return self.machine.now_ns() - self._stalled_ns

    # --- what befalls it

    def stop(self) -> None:
        """SIGTERM."""
        if self.is_alive and self.worker is not None:
            self.machine.call_soon(self.worker.stop)

    def crash(self, *, with_machine: bool = False) -> None:
        """SIGKILL, or the loss of the machine."""
        if self.is_alive:
            self.world.say(self.machine.name, "is lost with its machine" if with_machine else "is killed")
            self.machine.crash(with_machine=with_machine)

    def pause(self) -> None:
        self._stalled_since_ns = self.machine.now_ns()
        self.machine.pause()

    def resume(self) -> None:
        self._stalled_ns += self.machine.now_ns() - self._stalled_since_ns
        self.machine.resume()

    def _died(self, _with_machine: bool) -> None:
        self.died_ns = self.world.loop.true_ns()
        if self.exit_code is None:
            self.exit_code = -9

    def _exit(self, code: int) -> None:
        self.exit_code = code
        self.world.say(self.machine.name, f"exits with {code}")
        self.machine.crash()

    # --- its life

    async def _main(self) -> None:
        world, clock = self.world, self.machine.clock
        async with world.store(self.machine) as store:
            self.worker = worker = Worker(
                store,
                Application(self.make, name="lists"),
                self.settings,
                clock=clock,
                rng=random.Random(self.rng.getrandbits(64)),
                metrics=METRICS,
                explicit=("shards",),
                version="simulated",
                will=self.parent,
                companion=lambda session: self._candidate(store, session),
                exit_process=self._exit,
            )
            is_good = False
            try:
                while True:
                    try:
                        async with worker:
                            self.has_joined = True
                            is_good = await worker.run()
                        break
                    except StoreError as exc:
                        world.say(self.machine.name, f"cannot join yet: {exc}")
                        await asyncio.sleep(JOIN_PAUSE_S)
            except ShardleadError as exc:
                world.say(self.machine.name, f"ends: {exc}")
        self._exit(0 if is_good else 1)

    async def _candidate(self, store: EtcdStore, session: Session) -> None:
        world = self.world
        await Controller(
            store,
            world.keyspace,
            session,
            world.settings.controller,
            clock=self.machine.clock,
            rng=random.Random(self.rng.getrandbits(64)),
            metrics=CONTROLLER_METRICS,
        ).run()

    def _look(self) -> None:
        """Tell the witness if the guard's time is another than when last asked."""
        worker = self.worker
        session = worker.session if worker is not None else None
        guard_ns = session._guard_ns if session is not None else 0  # the witness sees everything
        if guard_ns != self.guard_ns:
            self.guard_ns = guard_ns
            self.world.witness.guard_changed(self)


class RouterProcess:
    """One router process."""

    def __init__(self, world: "World", name: str, machine: Machine) -> None:
        self.world = world
        self.name = name
        self.machine = machine
        self.router: Router | None = None
        self.view: View | None = None
        self.rng = random.Random(world.rng.getrandbits(64))
        self.is_alive = True
        machine.on_crash.append(self._died)

    def start(self) -> None:
        self.machine.spawn(self._main(), self.machine.name)

    @property
    def address(self) -> tuple[str, int] | None:
        """Where it listens; None if it does not take requests."""
        if not self.is_alive or self.router is None or not self.router.is_ready:
            return None
        host, _, port = self.router.address.rpartition(":")
        return host, int(port)

    def crash(self) -> None:
        self.world.say(self.machine.name, "is killed")
        self.machine.crash()

    def leaders(self) -> dict[int, tuple[str, int]]:
        """shard -> (worker, epoch), as it sees them."""
        if self.view is None or not self.view.is_ready:
            return {}
        found = {}
        for shard in range(self.world.shards):
            leader = self.view.map.leader(shard)
            if leader is not None:
                found[shard] = (leader.worker, leader.epoch)
        return found

    def _died(self, _with_machine: bool) -> None:
        self.is_alive = False

    async def _main(self) -> None:
        world = self.world
        async with world.store(self.machine) as store:
            view = self.view = View(
                store, world.keyspace, clock=self.machine.clock, rng=random.Random(self.rng.getrandbits(64))
            )
            view.subscribe(self._changed)
            router = self.router = Router(world.settings.router, view, clock=self.machine.clock)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(view.run(), name="view")
                await router.run()

    def _changed(self, delta: Delta) -> None:
        for change in delta.leaders:
            if change.after is not None:
                self.world.witness.router_saw(self.machine.name, change.shard, change.after.epoch)


class ClientProcess:
    """A process of a user's, which asks the leaders itself by the smart client."""

    name = "smart"

    def __init__(self, world: "World", machine: Machine) -> None:
        self.world = world
        self.machine = machine
        self.client: Client | None = None
        self.rng = random.Random(world.rng.getrandbits(64))
        self._is_over = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = self.machine.spawn(self._main(), self.machine.name)

    def ask(self) -> Client | None:
        """What to ask by; None while it has no picture of the cluster."""
        return self.client

    async def leave(self) -> None:
        """Return when it has ended and closed its connections."""
        self.client = None
        self._is_over.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=CLIENT_ENDS_S)

    def leaders(self) -> dict[int, tuple[str, int]]:
        """shard -> (worker, epoch), as it sees them."""
        if self.client is None:
            return {}
        return {shard: (leader.worker, leader.epoch) for shard, leader in self.client._view.map.leaders()}

    async def _main(self) -> None:
        world = self.world
        async with world.store(self.machine) as store:
            while not self._is_over.is_set():
                with contextlib.suppress(StoreError):
                    clock, rng = self.machine.clock, random.Random(self.rng.getrandbits(64))
                    async with Client(
                        store, cluster=world.keyspace.cluster, settings=world.settings, clock=clock, rng=rng
                    ) as client:
                        client._view.subscribe(self._changed)
                        self.client = client
                        await self._is_over.wait()

    def _changed(self, delta: Delta) -> None:
        for change in delta.leaders:
            if change.after is not None:
                self.world.witness.router_saw(self.machine.name, change.shard, change.after.epoch)


class _Dialled:
    """What stands for a socket that aiohttp has connected."""

    def __init__(self, host: str, port: int) -> None:
        self._peer = (host, port)

    def getpeername(self) -> tuple[str, int]:
        return self._peer


async def _dial(addr_infos: Any, **_options: Any) -> _Dialled:
    """In place of aiohttp's own connecting, which is done with real sockets; the loop does it, then."""
    host, port = addr_infos[0][4][:2]
    return _Dialled(host, port)


@contextlib.contextmanager
def noting_sends(world: "World") -> Iterator[None]:
    """While it lasts, the witness hears of each request that a router or smart client sends, with the epoch, and of
    each larger epoch that a worker's refusal tells them (I11); and aiohttp's client connects by the loop."""
    send = Exchange.connected

    def noted(exchange: Exchange, connection: Upstream) -> bool:
        is_sent = send(exchange, connection)
        if is_sent and exchange.leader is not None:
            world.witness.router_sends(world.loop.current.name, exchange.shard, exchange.leader.epoch)
        return is_sent

    turned_down = Traffic.turned_down

    def told(traffic: Traffic[Any], request: Request, what: Happened, epoch: int, leader: str) -> None:
        hint = read_hint(leader)
        router = world.loop.current.name
        world.witness.router_saw(router, request.shard, max(epoch, hint.epoch if hint is not None else 0))
        turned_down(traffic, request, what, epoch, leader)

    exchange_by_client = Pool._exchange

    async def asked(pool: Pool, call: Call, request: Any, connection: Any) -> Any:
        assert call.leader is not None
        world.witness.router_sends(world.loop.current.name, call.shard, call.leader.epoch)
        return await exchange_by_client(pool, call, request, connection)

    take_at_once = Dispatch.take_at_once

    def taken(dispatch: Dispatch, key: bytes, *, is_safe: bool, size: int) -> Any:
        ride = take_at_once(dispatch, key, is_safe=is_safe, size=size)
        if ride is not None:
            _, _, leader, shard = ride
            world.witness.router_sends(world.loop.current.name, shard, leader.epoch)
        return ride

    with (
        mock.patch.object(Exchange, "connected", noted),
        mock.patch.object(Dispatch, "take_at_once", taken),
        mock.patch.object(Traffic, "turned_down", told),
        mock.patch.object(Pool, "_exchange", asked),
        mock.patch("aiohttp.connector.aiohappyeyeballs.start_connection", _dial),
    ):
        yield


@contextlib.contextmanager
def following_mirrors(world: "World") -> Iterator[None]:
    """While it lasts, the world knows each mirror of the store that any process keeps (I8)."""
    run = Mirror.run

    async def followed(mirror: Mirror) -> None:
        watched = world.watch_mirror(world.loop.current, mirror)
        try:
            await run(mirror)
        finally:
            watched.is_over = True

    with mock.patch.object(Mirror, "run", followed):
        yield
