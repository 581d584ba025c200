"""A store, a cluster in it, and sessions that play workers without serving anything."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from shardlead.clock import NS_PER_S, SystemClock
from shardlead.cluster.bootstrap import Shape, ensure_shape
from shardlead.cluster.courier import Courier
from shardlead.cluster.election import Election
from shardlead.cluster.history import Histories
from shardlead.cluster.leaders import Leaders
from shardlead.cluster.passing import Passing
from shardlead.cluster.session import Session, open_session
from shardlead.config import ClusterSettings, LeaseSettings, StoreSettings
from shardlead.core.keyspace import Keyspace, decode
from shardlead.core.model import WorkerRecord
from shardlead.core.shardmap import Member
from shardlead.store.base import KeyValue, Range, prefix_end
from shardlead.store.embedded import serve
from shardlead.store.etcd import EtcdStore
from tests.support.etcd import etcd_server

BOUND_S = 20.0
SHARDS = 16
LEASE = LeaseSettings(ttl_s=5, renew_interval_s=0.5, margin_s=0.5)


class SteppedClock(SystemClock):
    """The machine's clock, which a test may push forward as a pause of the process would."""

    __slots__ = ("ahead_ns", "asleep_ns")

    def __init__(self) -> None:
        self.ahead_ns = 0
        self.asleep_ns = 0

    def now_ns(self) -> int:
        return super().now_ns() + self.ahead_ns

    def awake_ns(self) -> int:
        return super().awake_ns() + self.ahead_ns - self.asleep_ns

    def wall_s(self) -> float:
        return super().wall_s() + self.ahead_ns / NS_PER_S

    def jump(self, seconds: float) -> None:
        self.ahead_ns += int(seconds * NS_PER_S)

    def sleep(self, seconds: float) -> None:
        """As `jump`, by a machine that was suspended."""
        self.asleep_ns += int(seconds * NS_PER_S)
        self.jump(seconds)


class Stage:
    """One cluster in a fresh store."""

    def __init__(self, url: str) -> None:
        self.settings = StoreSettings(endpoints=(url,))
        self.keys = Keyspace("test")
        self.rng = random.Random(1)
        self.clock = SteppedClock()
        self.store = EtcdStore(self.settings, clock=self.clock, rng=self.rng)
        self.shape: Shape
        self.tick = 1  # the cluster's

    async def actor(self, name: str, lease: LeaseSettings = LEASE) -> "Actor":
        """A worker's session under that name."""
        record = WorkerRecord(sid="", address=f"{name}.test:1", pid=1)
        session = await open_session(
            self.store,
            self.keys,
            lease,
            clock=self.clock,
            rng=self.rng,
            name=name,
            record=record,
            meta_revision=self.shape.meta_revision,
        )
        return Actor(self, session)

    async def get(self, key: bytes) -> KeyValue | None:
        """What stands under a key."""
        result = await self.store.read(Range(key))
        return result.kvs[0] if result.kvs else None

    async def count(self, prefix: bytes) -> int:
        """How many keys stand under a prefix."""
        return (await self.store.read(Range(prefix, prefix_end(prefix), count_only=True))).count


class Actor:
    """A session with its elections and its letters."""

    def __init__(self, stage: Stage, session: Session) -> None:
        self.stage = stage
        self.session = session
        self.courier = Courier(stage.store, stage.keys, session)
        self.vote_through(stage.store)

    def vote_through(self, store: EtcdStore) -> None:
        """Take part in elections by this store from now on, as a session does that remembers nothing yet."""
        keys, session, clock = self.stage.keys, self.session, self.stage.clock
        self.histories = Histories(store, keys, tick=lambda: self.stage.tick, clock=clock)
        self.leaders = Leaders(store, keys, session)
        self.election = Election(store, keys, session, self.leaders, self.histories, clock=clock)
        self.passing = Passing(store, keys, session, self.leaders, self.histories, clock=clock)

    async def member(self) -> Member:
        """This worker as others see it."""
        kv = await self.stage.get(self.stage.keys.worker(self.session.name))
        assert kv is not None
        return Member(decode(WorkerRecord, kv.key, kv.value), kv.lease, kv.create_revision, kv.mod_revision)


@asynccontextmanager
async def stage(kind: str) -> AsyncIterator[Stage]:
    """`kind`: "embedded", "3.5" or "3.4"."""
    async with AsyncExitStack() as stack:
        url: str
        if kind == "embedded":
            ready = asyncio.get_running_loop().create_future()
            server = asyncio.create_task(serve("127.0.0.1", 0, data=None, on_ready=ready.set_result))
            stack.push_async_callback(_ended, server)
            url = await ready
        else:
            url = stack.enter_context(etcd_server(kind)).endpoints[0]
        built = Stage(url)
        await stack.enter_async_context(built.store)
        built.shape = await ensure_shape(built.store, built.keys, ClusterSettings(name="test", shards=SHARDS))
        yield built


async def _ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait({task})


def play(kind: str, scene: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
    """Run a scene on a fresh stage, bounded."""

    async def bounded() -> None:
        async with asyncio.timeout(BOUND_S), stage(kind) as built:
            await scene(built)

    asyncio.run(bounded())
