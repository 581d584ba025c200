"""Workers without processes: records, leases and leader keys in a real store, written by hand.

`Fleet.hands()` obeys assignments as workers do, but takes a led shard at once, by a put on the new leader's lease:
handoff is not what is tested here.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TypeVar

from prometheus_client import CollectorRegistry

from shardlead.clock import SystemClock
from shardlead.cluster.bootstrap import Shape, ensure_shape
from shardlead.cluster.session import Session, open_session
from shardlead.config import ClusterSettings, ControllerSettings, LeaseSettings, StoreSettings
from shardlead.controller.controller import Controller
from shardlead.core.keyspace import Keyspace, Place, decode, encode
from shardlead.core.model import Assignment, History, LeaderRecord, Record, WorkerRecord
from shardlead.errors import KeyspaceError
from shardlead.metrics import ControllerMetrics
from shardlead.store.base import Committed, Put, Range, Txn, absent, modified_at, prefix_end
from shardlead.store.etcd import EtcdStore
from shardlead.store.mirror import Change, Mirror

R = TypeVar("R", bound=Record)

WAIT_S = 20.0
CALM = ControllerSettings(settle_s=0.2, first_wait_max_s=2.0, interval_s=1.0)


class Fleet:
    """A cluster in a store, with as many hand-written workers as a test wants."""

    def __init__(self, store: EtcdStore, keyspace: Keyspace, shape: Shape) -> None:
        self.store = store
        self.keyspace = keyspace
        self.shape = shape
        self.clock = SystemClock()
        self.rng = random.Random(7)
        self.sessions: dict[str, Session] = {}
        self.controllers: dict[str, Controller] = {}
        self._changed = asyncio.Event()  # for `until`
        self._work = asyncio.Event()  # for `hands`; an event that two wait for and clear loses wakings
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # What was read once, for `until` looks at all of it after every change, on the loop that renews all leases.
        self._places: dict[bytes, Place | None] = {}
        self._records: dict[bytes, tuple[int, Record]] = {}
        prefix = keyspace.prefix
        self.mirror = Mirror(
            store, prefix, prefix_end(prefix), self._on_change, clock=self.clock, rng=self.rng, name="test"
        )

    def _on_change(self, _change: Change) -> None:
        self._changed.set()
        self._work.set()

    # --- what stands

    async def until(self, is_so: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        """Return once `is_so`, looked at after every change in the store."""
        async with asyncio.timeout(timeout_s):
            while not is_so():
                self._changed.clear()
                with contextlib.suppress(TimeoutError):  # what is waited for may not be in the store at all
                    async with asyncio.timeout(0.1):
                        await self._changed.wait()

    def leaders(self) -> dict[int, str]:
        return {place.shard: record.worker for place, record in self._read("leaders", LeaderRecord)}

    def _read(self, kind: str, record: type[R]) -> Iterator[tuple[Place, R]]:
        """The readable records of a kind."""
        for key, kv in self.mirror.kvs.items():
            if key not in self._places:
                self._places[key] = self.keyspace.parse(key)
            place = self._places[key]
            if place is None or place.kind != kind:
                continue
            known = self._records.get(key)
            if known is None or known[0] != kv.mod_revision:
                try:
                    known = self._records[key] = (kv.mod_revision, decode(record, key, kv.value))
                except KeyspaceError:
                    continue
            assert isinstance(known[1], record)
            yield place, known[1]

    def counts(self) -> dict[str, int]:
        led = Counter(self.leaders().values())
        return {name: led[name] for name in sorted(self.sessions)}

    def copies(self) -> dict[int, dict[str, Assignment]]:
        found: dict[int, dict[str, Assignment]] = {}
        for place, assignment in self._read("assignments", Assignment):
            found.setdefault(place.shard, {})[place.worker] = assignment
        return found

    def seated(self) -> list[str]:
        return [name for name, controller in self.controllers.items() if controller.seat_revision]

    def is_even(self) -> bool:
        counts = self.counts()
        return sum(counts.values()) == self.shape.meta.shards and max(counts.values()) - min(counts.values()) <= 1

    def is_in_order(self) -> bool:
        """Every shard is led by the first of its order, of which each one named, and nobody else, has a copy."""
        leaders, copies = self.leaders(), self.copies()
        return len(leaders) == len(copies) == self.shape.meta.shards and all(
            {name: item.order for name, item in copies[shard].items()}
            == dict.fromkeys((order := next(iter(copies[shard].values())).order), order)
            and order[0] == leader
            for shard, leader in leaders.items()
        )

    # --- what happens

    async def join(self, *names: str, controller: ControllerSettings | None = None) -> None:
        for name in names:
            session = await open_session(
                self.store,
                self.keyspace,
                LeaseSettings(),
                clock=self.clock,
                rng=self.rng,
                name=name,
                record=WorkerRecord("", f"{name}:80"),
                meta_revision=self.shape.meta_revision,
            )
            self.sessions[name] = session
            self._start(f"session {name}", session.run())
            if controller is not None:
                self.controllers[name] = self.candidate(session, controller)
                self._start(f"controller {name}", self.controllers[name].run())

    def candidate(self, session: Session, settings: ControllerSettings = CALM) -> Controller:
        return Controller(
            self.store,
            self.keyspace,
            session,
            settings,
            clock=self.clock,
            rng=self.rng,
            metrics=ControllerMetrics(CollectorRegistry()),
        )

    def _start(self, name: str, work: object) -> None:
        self._tasks[name] = asyncio.ensure_future(work)  # type: ignore[call-overload]  # a coroutine

    async def stop_controller(self, name: str) -> None:
        await self._end(f"controller {name}")
        del self.controllers[name]

    async def end(self, name: str) -> None:
        """The worker is dead and its lease is revoked, as its parent would."""
        for task in (f"controller {name}", f"session {name}"):
            if task in self._tasks:
                await self._end(task)
        self.controllers.pop(name, None)
        await self.sessions.pop(name).close()

    async def _end(self, name: str) -> None:
        task = self._tasks.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def claim(self, shard: int, name: str, revision: int = 0) -> bool:
        """T1 or T5 in short: `name` leads the shard that had this leader key (0: none)."""
        session = self.sessions[name]
        key = self.keyspace.leader(shard)
        guard = modified_at(key, revision) if revision else absent(key)
        record = encode(LeaderRecord(name, session.sid))
        history = encode(History(name, session.sid, 0.0, "test"))
        outcome = await self.store.commit(
            Txn((guard,), (Put(key, record, session.lease), Put(self.keyspace.history(shard), history)))
        )
        return isinstance(outcome, Committed)

    async def hands(self) -> None:
        """Obey assignments until cancelled: whoever is first in a fresh order leads."""
        while True:
            self._work.clear()
            for shard, copies in self.copies().items():
                order = next(iter(copies.values())).order
                copy = self.mirror.kvs.get(self.keyspace.assignment(order[0], shard))
                leader = self.mirror.kvs.get(self.keyspace.leader(shard))
                session = self.sessions.get(order[0])
                if session is None or copy is None or copy.mod_revision <= session.create_revision:
                    continue
                if leader is None or decode(LeaderRecord, leader.key, leader.value).worker != order[0]:
                    await self.claim(shard, order[0], leader.mod_revision if leader is not None else 0)
            await self._work.wait()  # no time-out: cancelled at the end of the test

    async def read_assignments(self) -> int:
        inboxes = self.keyspace.inboxes
        return (await self.store.read(Range(inboxes, prefix_end(inboxes), count_only=True))).count


@contextlib.asynccontextmanager
async def fleet(url: str, *, shards: int = 24, hands: bool = True) -> AsyncIterator[Fleet]:
    """A new cluster in the store at `url`; everything of it is stopped at the end."""
    rng = random.Random()
    keyspace = Keyspace(f"test-{rng.getrandbits(40):x}")
    async with EtcdStore(StoreSettings(endpoints=(url,)), clock=SystemClock(), rng=rng) as store:
        shape = await ensure_shape(store, keyspace, ClusterSettings(shards=shards))
        world = Fleet(store, keyspace, shape)
        world._start("mirror", world.mirror.run())
        await world.mirror.wait_loaded(WAIT_S)
        if hands:
            world._start("hands", world.hands())
        try:
            yield world
        finally:
            for name in tuple(world._tasks):
                await world._end(name)
            for session in world.sessions.values():
                await session.close()
