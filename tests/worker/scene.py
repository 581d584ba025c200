"""Several real workers in one process, on one store, with an application that writes down what is done with it.

Nothing here sleeps: `Scene.until` waits for the next change of the store or the next word of an application.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client import CollectorRegistry

from shardlead.config import ClusterSettings, LeaseSettings, Settings, StoreSettings, WorkerSettings
from shardlead.core.duties import Order
from shardlead.core.fleet import Fleet
from shardlead.core.keyspace import decode, encode
from shardlead.core.model import Assignment, LeaderRecord, Record
from shardlead.errors import LeaseGone
from shardlead.metrics import WorkerMetrics
from shardlead.store.base import UNGUARDED, Committed, Delete, KeyValue, Op, Put, Txn, prefix_end
from shardlead.store.etcd import EtcdStore
from shardlead.store.gateway import TXN, b64
from shardlead.store.mirror import Mirror
from shardlead.store.transport import Answer, Channel, Stream, TransportError
from shardlead.worker.application import Application
from shardlead.worker.host import Host
from shardlead.worker.leadership import Leadership
from shardlead.worker.runtime import Worker
from shardlead.worker.steward import Steward
from shardlead.worker.will import LastWill
from tests.cluster.stage import SHARDS, Stage, SteppedClock, stage
from tests.support.between import Between, Meddler

BOUND_S = 25.0
LOOK_S = 0.02
LEASE = LeaseSettings(ttl_s=5, renew_interval_s=0.5, margin_s=0.5)
SHORT = LeaseSettings(ttl_s=2, renew_interval_s=0.2, margin_s=0.5)
WORKER = WorkerSettings(
    drain_timeout_s=3.0,
    open_timeout_s=2.0,
    close_timeout_s=0.3,
    cancel_grace_s=0.3,
    park_timeout_s=2.0,
    shutdown_timeout_s=6.0,
    linger_s=0.0,
    backoff_s=0.2,
    controller=False,
)

Step = Callable[[Leadership], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Word:
    """Something that was done with an application's object."""

    what: str  # opening, open, run, ran, close
    worker: str
    shard: int
    epoch: int


@dataclass
class Script:
    """What one worker's objects do; a test may change it at any time."""

    fenced: bool = True
    open: Step | None = None
    run: Step | None = None
    close: Step | None = None
    healthy: Callable[[Leadership], bool] | None = None


class Fickle(Between):
    """A transport that loses what a test tells it to lose: the request on its way, or the answer on its way back,
    or holds a request back so that it arrives when nobody waits for it any more."""

    def __init__(self, settings: StoreSettings, rng: random.Random) -> None:
        super().__init__(settings)
        self.flow = asyncio.Event()  # while it is not set, nothing gets through, and no watch tells anything
        self.flow.set()
        self.loss = 0.0  # share of the transactions that are lost, one way or the other
        self.held_back: dict[bytes, asyncio.Event] = {}  # watches that begin at this key tell nothing until it is set
        self._rng = rng
        self._late: set[asyncio.Task[Answer]] = set()

    async def post(
        self, channel: Channel, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Answer:
        if not self.flow.is_set():
            raise TransportError("the test's own fault: cut", is_sent=False)
        if path != TXN or self._rng.random() >= self.loss:
            return await super().post(channel, endpoint, path, body, headers, timeout_s)
        fate = self._rng.choice(("lost", "answer lost", "late"))
        if fate == "answer lost":
            await super().post(channel, endpoint, path, body, headers, timeout_s)
        if fate == "late":
            task = asyncio.create_task(self._send_late(channel, endpoint, path, body, headers, timeout_s))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
        raise TransportError(f"the test's own fault: {fate}", is_sent=True)

    async def stream(
        self, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Stream:
        stream = await super().stream(endpoint, path, body, headers, timeout_s)
        for key, released in self.held_back.items():
            if b64(key) in body.decode():
                return _HeldBack(stream, released)
        return _HeldBack(stream, self.flow)

    async def _send_late(self, *request: Any) -> Answer:
        await asyncio.sleep(self._rng.uniform(0.0, 0.1))
        return await super().post(*request)

    async def close(self) -> None:
        await asyncio.gather(*self._late, return_exceptions=True)
        await super().close()


class _HeldBack:
    """A watch whose first message comes, and the others only when a test lets them."""

    def __init__(self, inner: Stream, released: asyncio.Event) -> None:
        self._inner = inner
        self._released = released
        self._has_begun = False
        self.status = inner.status

    async def read(self) -> bytes:
        data = await self._inner.read()
        if self._has_begun:
            await self._released.wait()
        self._has_begun = True
        return data

    def close(self) -> None:
        self._inner.close()


class Recorder:
    """The application's object: writes down, and does as the script says."""

    def __init__(self, scene: "Scene", script: Script, lead: Leadership) -> None:
        self.scene, self.script, self.lead = scene, script, lead

    async def open(self) -> None:
        self.scene.note("opening", self.lead)
        self.lead.note_barrier()
        if self.script.open is not None:
            await self.script.open(self.lead)
        self.scene.note("open", self.lead)

    async def handle(self, _request: object) -> object:
        raise NotImplementedError("requests come through admit")

    async def close(self) -> None:
        self.scene.note("close", self.lead)
        if self.script.close is not None:
            await self.script.close(self.lead)


class Runner(Recorder):
    async def run(self) -> None:
        self.scene.note("run", self.lead)
        assert self.script.run is not None
        try:
            await self.script.run(self.lead)
        finally:
            self.scene.note("ran", self.lead)


class Patient(Recorder):
    def healthy(self) -> bool:
        assert self.script.healthy is not None
        return self.script.healthy(self.lead)


@dataclass
class Player:
    """A worker and what a test may do with it."""

    scene: "Scene"
    worker: Worker
    store: EtcdStore
    transport: Fickle
    script: Script
    clock: SteppedClock
    exits: list[int]
    task: "asyncio.Task[bool]" = field(init=False)

    @property
    def name(self) -> str:
        return self.worker.name

    @property
    def lease(self) -> int:
        assert self.worker.session is not None
        return self.worker.session.lease

    @property
    def host(self) -> Host:
        host = self.worker._host  # the one thing of it that a test cannot see from outside
        assert host is not None
        return host

    @property
    def fleet(self) -> Fleet:
        """What this worker knows of the fleet."""
        assert isinstance(self.host.envoy, Steward)
        return self.host.envoy.view.fleet

    @property
    def orders(self) -> Mapping[int, Order]:
        """What this worker has read of its assignments."""
        assert isinstance(self.host.envoy, Steward)
        return self.host.envoy.inbox.orders

    @property
    def is_listening(self) -> bool:
        """Whether the watch of its inbox stands."""
        return isinstance(self.host.envoy, Steward) and self.host.envoy.inbox.mirror.is_connected

    def epoch(self, shard: int) -> int:
        return self.worker.led.get(shard, 0)

    async def kill(self) -> None:
        """The process is gone and its parent has revoked the lease."""
        lease = self.lease
        self.task.cancel()
        await asyncio.wait({self.task})
        with suppress(LeaseGone):
            await self.scene.stage.store.revoke(lease)

    async def stop(self) -> bool:
        """Leave gracefully; what `run` says."""
        self.worker.stop()
        return await asyncio.wait_for(self.task, 15)

    @asynccontextmanager
    async def request(self, shard: int) -> AsyncIterator[Recorder]:
        """A running request of that shard."""
        async with self.worker.admit(self.scene.key(shard), self.epoch(shard)) as subject:
            yield subject


class Scene:
    """The store, the workers, and all that has been said."""

    def __init__(self, built: Stage) -> None:
        self.stage = built
        self.keys = built.keys
        self.words: list[Word] = []
        self.players: dict[str, Player] = {}
        self.changes: list[KeyValue] = []  # each put of a leader key, in order
        self._changed = asyncio.Event()
        self._mirror = Mirror(
            built.store,
            built.keys.prefix,
            prefix_end(built.keys.prefix),
            self._apply,
            name="test",
            clock=built.clock,
            rng=random.Random(2),
        )
        self._keys: dict[int, str] = {}
        self._leads: dict[int, Leadership] = {}  # the last one of each shard
        self.faults: list[str] = []

    # --- what is known ---

    def note(self, what: str, lead: Leadership) -> None:
        if what == "opening":
            before = self._leads.get(lead.shard)
            if before is not None and before.is_valid(0.0):
                self.faults.append(f"served twice: {before!r} and {lead!r}")
            self._leads[lead.shard] = lead
        self.words.append(Word(what, lead.worker, lead.shard, lead.epoch))
        self._wake()

    def said(self, what: str, worker: str = "", shard: int | None = None) -> list[Word]:
        """Who did that, in order."""
        return [
            word
            for word in self.words
            if word.what == what and worker in ("", word.worker) and shard in (None, word.shard)
        ]

    def leader(self, shard: int) -> str:
        """Who leads, by the store; "" for nobody."""
        kv = self.kv(self.keys.leader(shard))
        return decode(LeaderRecord, kv.key, kv.value).worker if kv is not None else ""

    def lead(self, shard: int) -> Leadership:
        """The last leadership of that shard that an object was made for."""
        return self._leads[shard]

    def leaders(self) -> dict[int, str]:
        return {shard: name for shard in range(SHARDS) if (name := self.leader(shard))}

    def epoch(self, shard: int) -> int:
        kv = self.kv(self.keys.leader(shard))
        return kv.mod_revision if kv is not None else 0

    def kv(self, key: bytes) -> KeyValue | None:
        return self._mirror.kvs.get(key)

    def under(self, prefix: bytes) -> list[bytes]:
        return [key for key in self._mirror.kvs if key.startswith(prefix)]

    def is_serving(self, name: str, shard: int) -> bool:
        """Whether that worker's object is open under the epoch that the store names."""
        return self.leader(shard) == name and Word("open", name, shard, self.epoch(shard)) in self.words

    def serve(self, name: str, shards: Sequence[int]) -> bool:
        return all(self.is_serving(name, shard) for shard in shards)

    async def until(self, is_so: Callable[[], object], within_s: float = 10.0) -> None:
        """Wait for changes until it holds."""
        try:
            async with asyncio.timeout(within_s):
                while not is_so():
                    with suppress(TimeoutError):  # a worker's own state has no event, so that it is looked at, too
                        async with asyncio.timeout(LOOK_S):
                            await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"not within {within_s} s; {self.leaders()} {self.words[-20:]}") from None

    async def until_serving(self, name: str, *shards: int, within_s: float = 10.0) -> None:
        """Until it serves them, and the scene's own watch, which may lag behind the worker's, has seen it."""

        def is_so() -> bool:
            return self.serve(name, shards) and all(self.leader(shard) == name for shard in shards)

        await self.until(is_so, within_s)

    def key(self, shard: int) -> str:
        """A key of that shard."""
        host = next(iter(self.players.values())).host
        number = 0
        while shard not in self._keys:
            self._keys.setdefault(host.shard_of(b"%d" % number), str(number))
            number += 1
        return self._keys[shard]

    # --- what a test does ---

    async def write(self, *ops: Op) -> int:
        """By the test's own hand, as a controller or an operator would. The revision."""
        outcome = await self.stage.store.commit(Txn(UNGUARDED, ops))
        assert isinstance(outcome, Committed), outcome
        return outcome.revision

    async def put(self, key: bytes, record: Record, lease: int = 0) -> int:
        return await self.write(Put(key, encode(record), lease))

    async def delete(self, key: bytes) -> None:
        await self.write(Delete(key))

    async def assign(
        self, orders: dict[int, tuple[str, ...]], revoke_from: Sequence[str] = (), reason: str = "test"
    ) -> None:
        """A controller's wish: one copy in each concerned inbox, all in one transaction."""
        ops: list[Op] = []
        for shard, order in orders.items():
            record = encode(Assignment(order=order, reason=reason))
            ops += [Put(self.keys.assignment(name, shard), record) for name in order]
            ops += [Delete(self.keys.assignment(name, shard)) for name in revoke_from if name not in order]
        await self.write(*ops)

    async def settle(self) -> None:
        """Until everything written so far has been seen here."""
        revision = await self.put(self.keys.prefix + b"test/settle", LeaderRecord(worker="t", sid="t"))
        await self.until(lambda: self._mirror.revision >= revision)

    def player(
        self,
        name: str,
        script: Script | None = None,
        *,
        lease: LeaseSettings = LEASE,
        explicit: Sequence[str] = (),
        cluster: ClusterSettings | None = None,
        will: LastWill | None = None,
        **changes: Any,
    ) -> Player:
        script = script or Script()
        clock = SteppedClock()
        exits: list[int] = []
        kind = Runner if script.run is not None else Patient if script.healthy is not None else Recorder

        def make(lead: Leadership) -> object:
            return kind(self, script, lead)

        make.fenced = script.fenced  # type: ignore[attr-defined]  # where an application's class says it
        settings = Settings(
            cluster=cluster or ClusterSettings(name="test", shards=SHARDS),
            store=self.stage.settings,
            lease=lease,
            worker=replace(WORKER, name=name, **changes),
        )
        transport = Fickle(self.stage.settings, random.Random(name))
        store = EtcdStore(self.stage.settings, clock=clock, rng=random.Random(name), transport=transport)
        worker = Worker(
            store,
            Application(make, name="recorder"),
            settings,
            clock=clock,
            rng=random.Random(name),
            metrics=WorkerMetrics(CollectorRegistry()),
            explicit=explicit,
            exit_process=exits.append,
            will=will,
        )
        return Player(self, worker, store, transport, script, clock, exits)

    async def start(
        self,
        name: str,
        script: Script | None = None,
        *,
        held_back: Mapping[bytes, asyncio.Event] | None = None,
        by: Mapping[str, Meddler] | None = None,
        **settings: Any,
    ) -> Player:
        """A worker that is up. `by`: what a test does with its requests from the first one on (see `Between`)."""
        player = self.player(name, script, **settings)
        player.transport.held_back.update(held_back or {})
        player.transport.by.update(by or {})
        entered = asyncio.Event()

        async def live() -> bool:
            async with player.store, player.worker:  # each worker has a store of its own
                entered.set()
                return await player.worker.run()

        player.task = asyncio.create_task(live(), name=f"worker {name}")
        waiting = asyncio.create_task(entered.wait())
        await asyncio.wait({player.task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if player.task.done():
            await player.task
        self.players[name] = player
        await self.until(lambda: self.kv(self.keys.worker(name)) is not None and player.worker.is_ready)
        return player

    # --- inside ---

    def _apply(self, change: Any) -> None:
        self.changes += [kv for kv in change.puts if kv.key.startswith(self.keys.leaders)]
        self._wake()

    def _wake(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    @asynccontextmanager
    async def playing(self) -> AsyncIterator["Scene"]:
        following = asyncio.create_task(self._mirror.run())
        try:
            await self._mirror.wait_loaded(5)
            yield self
        finally:
            tasks = [following, *(player.task for player in self.players.values())]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


def play(kind: str, act: Callable[[Scene], Coroutine[Any, Any, None]]) -> None:
    """Play on a fresh store, bounded; then hold everything that was said against the law."""

    async def bounded() -> None:
        async with asyncio.timeout(BOUND_S), stage(kind) as built, Scene(built).playing() as scene:
            await act(scene)
            check(scene)

    defects = Defects()
    logging.getLogger("shardlead").addHandler(defects)
    try:
        asyncio.run(bounded())
    finally:
        logging.getLogger("shardlead").removeHandler(defects)
    assert defects.found == []


class Defects(logging.Handler):
    """What was logged about shardlead's own tasks that have failed."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "defect" in record.msg or "task of the worker" in record.msg:
            self.found.append(self.format(record))


def check(scene: Scene) -> None:
    """One object a leadership: opened once, closed at most once; epochs of a shard only grow; none is opened twice."""
    assert scene.faults == []
    opened = [(word.shard, word.epoch) for word in scene.words if word.what == "opening"]
    assert len(opened) == len(set(opened)), "an epoch was opened twice"
    closed = [(word.shard, word.epoch) for word in scene.words if word.what == "close"]
    assert len(closed) == len(set(closed)), "an object was closed twice"
    for shard in {shard for shard, _ in opened}:
        epochs = [epoch for each, epoch in opened if each == shard]
        assert epochs == sorted(epochs), f"epochs of shard {shard} went back: {epochs}"
