"""The view: one map, kept current, whatever stands under our prefix."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shardlead.clock import NS_PER_S, SystemClock
from shardlead.cluster.bootstrap import ensure_shape
from shardlead.cluster.view import View
from shardlead.config import ClusterSettings, StoreSettings
from shardlead.core.keyspace import Keyspace, decode, encode
from shardlead.core.model import LeaderRecord, Meta, Tick, WorkerRecord
from shardlead.core.shardmap import Delta
from shardlead.errors import ClusterMissing, StoreUnavailable
from shardlead.store.base import UNGUARDED, Committed, Delete, Op, Put, Range, Txn, WatchBatch
from shardlead.store.embedded import serve
from shardlead.store.etcd import EtcdStore

BOUND_S = 10.0
KEYS = Keyspace("test")


class SteppedClock(SystemClock):
    """The machine's clock, which a test may push forward."""

    __slots__ = ("ahead_ns",)

    def __init__(self) -> None:
        self.ahead_ns = 0

    def now_ns(self) -> int:
        return super().now_ns() + self.ahead_ns


class DeafStore(EtcdStore):
    """A real store whose watches fall silent when a test says so, as behind an isolated member."""

    is_deaf = False
    rotations = 0

    @asynccontextmanager
    async def watch(
        self, key: bytes, range_end: bytes, start_revision: int
    ) -> AsyncIterator[AsyncIterator[WatchBatch]]:
        async with super().watch(key, range_end, start_revision) as batches:

            async def heard() -> AsyncIterator[WatchBatch]:
                async for batch in batches:
                    if self.is_deaf:
                        await asyncio.get_running_loop().create_future()
                    yield batch

            yield heard()

    def rotate(self, reason: str) -> None:
        self.rotations += 1
        self.is_deaf = False
        super().rotate(reason)


class Stage:
    def __init__(self, store: DeafStore, view: View, clock: SteppedClock) -> None:
        self.store = store
        self.view = view
        self.clock = clock
        self.deltas: list[Delta] = []
        self._changed = asyncio.Event()
        view.subscribe(self._on_delta)

    def _on_delta(self, delta: Delta) -> None:
        self.deltas.append(delta)
        self._changed.set()

    async def write(self, *ops: Op) -> int:
        outcome = await self.store.commit(Txn(UNGUARDED, ops))  # the test is alone with this store
        assert isinstance(outcome, Committed)
        return outcome.revision

    async def true(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(BOUND_S):
            while not holds():  # noqa: ASYNC110  # ticks and freshness change without telling anybody
                await asyncio.sleep(0.01)


def on_stage(body: Callable[[Stage], Coroutine[Any, Any, None]], *, has_cluster: bool = True) -> None:
    async def main() -> None:
        async with asyncio.timeout(4 * BOUND_S), asyncio.TaskGroup() as tasks:
            url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            server = tasks.create_task(serve("127.0.0.1", 0, data=None, on_ready=url.set_result))
            clock = SteppedClock()
            settings = StoreSettings(endpoints=(await url,))
            async with DeafStore(settings, clock=clock, rng=random.Random(1)) as store:
                if has_cluster:
                    await ensure_shape(store, KEYS, ClusterSettings(name="test", shards=16))
                view = View(store, KEYS, clock=clock, rng=random.Random(2))
                here = Stage(store, view, clock)
                following = tasks.create_task(view.run())
                if has_cluster:
                    await view.wait_ready(BOUND_S)
                await body(here)
                following.cancel()
            server.cancel()

    asyncio.run(main())


def _worker(name: str, **changes: Any) -> Put:
    return Put(KEYS.worker(name), encode(WorkerRecord(sid=f"sid-{name}", address=f"{name}.test:1", **changes)))


def _leader(shard: int, name: str) -> Put:
    return Put(KEYS.leader(shard), encode(LeaderRecord(name, f"sid-{name}")))


def test_a_view_shows_what_is_written_and_tells_each_change_once() -> None:
    """A subscriber hears of every change after the map shows it; one that has left hears no more."""

    async def body(here: Stage) -> None:
        seen: list[tuple[int, str]] = []
        epochs: list[int] = []

        def listen(delta: Delta) -> None:
            for change in delta.leaders:
                assert here.view.map.leader(change.shard) == change.after
                if change.after is not None:
                    seen.append((change.shard, change.after.worker))
                    epochs.append(change.after.epoch)

        leave = here.view.subscribe(listen)
        for number in range(20):
            name = f"w{number % 3}"
            revision = await here.write(_worker(name), _leader(number % 16, name))
        await here.true(lambda: here.view.map.revision >= revision)
        assert seen == [(number % 16, f"w{number % 3}") for number in range(20)]
        assert epochs == sorted(set(epochs))
        leave()
        leave()
        await here.write(Delete(KEYS.leader(3)))
        await here.true(lambda: here.view.map.leader(3) is None)
        assert len(seen) == 20

    on_stage(body)


def test_a_listener_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """The other listeners hear, the watch goes on."""

    async def body(here: Stage) -> None:
        def fails(delta: Delta) -> None:
            raise RuntimeError("on purpose")

        here.view.subscribe(fails)
        later: list[Delta] = []
        here.view.subscribe(later.append)
        for shard in range(2):
            revision = await here.write(_leader(shard, "w1"))
            await here.true(lambda: here.view.map.revision >= revision)  # noqa: B023  # used within this round
        assert len(later) == 2

    on_stage(body)
    assert [record.message for record in caplog.records].count("a listener failed on a change") == 2


def test_foreign_and_damaged_records_are_logged_once_and_count_as_absent(caplog: pytest.LogCaptureFixture) -> None:
    """Garbage under our prefix is no reason to stop, and says so once a key, however often it is written."""
    caplog.set_level(logging.WARNING, "shardlead.view")

    async def body(here: Stage) -> None:
        await here.write(_worker("w1"), _leader(1, "w1"), _leader(2, "w1"))
        for _ in range(3):
            revision = await here.write(
                Put(KEYS.leader(1), b"garbage \xff"),
                Put(KEYS.worker("w2"), b'{"v": 1}'),
                Put(KEYS.leaders + b"12", b"{}"),
                Put(KEYS.prefix + b"nobody-knows", b""),
                Put(KEYS.workers + b"a/b", b""),
            )
        await here.true(lambda: here.view.map.revision >= revision)
        map_ = here.view.map
        assert map_.leader(1) is None
        assert map_.leader(2) is not None
        assert set(map_.workers) == {"w1"}
        revision = await here.write(_leader(1, "w1"))
        await here.true(lambda: here.view.map.leader(1) is not None)

    on_stage(body)
    keys = [record.__dict__["key"] for record in caplog.records if record.message == "record ignored"]
    assert sorted(keys) == [
        "/test/leaders/000001",
        "/test/leaders/12",
        "/test/nobody-knows",
        "/test/workers/a/b",
        "/test/workers/w2",
    ]


def test_a_raised_generation_lifts_every_epoch() -> None:
    """`generation raise` rewrites meta alone; the epochs of what stands grow with it."""

    async def body(here: Stage) -> None:
        revision = await here.write(_worker("w1"), _leader(5, "w1"))
        await here.true(lambda: here.view.map.leader(5) is not None)
        kv = (await here.store.read(Range(KEYS.meta))).kvs[0]
        meta = decode(Meta, kv.key, kv.value)
        raised = Meta(**{name: getattr(meta, name) for name in meta.__dataclass_fields__} | {"generation": 3})
        await here.write(Put(KEYS.meta, encode(raised)))
        await here.true(lambda: here.view.map.leader(5).epoch > revision)  # type: ignore[union-attr]  # it leads
        leader = here.view.map.leader(5)
        assert leader is not None
        assert leader.epoch == (3 << 48) | revision
        assert here.deltas[-1].is_reset
        assert here.view.is_ready

    on_stage(body)


def test_waiting_for_a_cluster_says_what_is_missing() -> None:
    """Nobody has created it: ClusterMissing; then somebody does, and the view is ready."""

    async def body(here: Stage) -> None:
        with pytest.raises(ClusterMissing):
            await here.view.wait_ready(0.5)
        assert here.view.is_loaded
        await ensure_shape(here.store, KEYS, ClusterSettings(name="test", shards=16))
        await here.view.wait_ready(BOUND_S)
        assert here.view.map.meta is not None

    on_stage(body, has_cluster=False)


def test_waiting_for_a_store_that_does_not_answer_says_so() -> None:
    """StoreUnavailable, within the time given."""

    async def main() -> None:
        clock = SystemClock()
        settings = StoreSettings(endpoints=("http://127.0.0.1:9",), try_timeout_s=0.1, call_timeout_s=0.2)
        async with EtcdStore(settings, clock=clock, rng=random.Random(1)) as store:
            view = View(store, KEYS, clock=clock, rng=random.Random(2))
            following = asyncio.create_task(view.run())
            with pytest.raises(StoreUnavailable):
                await view.wait_ready(0.3)
            assert not view.is_loaded
            assert view.age_s == float("inf")
            assert not view.is_fresh
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    asyncio.run(main())


def test_a_tick_makes_it_fresh_and_its_absence_makes_it_ask() -> None:
    """Without a tick for three periods the view is not fresh; it asks the store, hears that nobody ticks, and is."""

    async def body(here: Stage) -> None:
        await here.true(lambda: here.view.is_fresh)
        here.clock.ahead_ns += 60 * NS_PER_S
        assert here.view.age_s > 50
        await here.write(Put(KEYS.tick, encode(Tick(1))))
        await here.true(lambda: here.view.is_fresh)
        here.clock.ahead_ns += 60 * NS_PER_S
        assert here.view.age_s > 50
        await here.true(lambda: here.view.is_fresh)
        assert here.store.rotations == 0

    on_stage(body)


def test_a_watch_that_sleeps_is_found_out() -> None:
    """The store knows a tick that the watch has not told: another endpoint, and what was missed is caught up."""

    async def body(here: Stage) -> None:
        await here.write(Put(KEYS.tick, encode(Tick(1))))
        await here.true(lambda: here.view.tick_revision > 0)
        here.store.is_deaf = True
        await here.write(_worker("w1"), _leader(7, "w1"), Put(KEYS.tick, encode(Tick(2))))
        here.clock.ahead_ns += 60 * NS_PER_S
        await here.true(lambda: here.view.map.leader(7) is not None)
        assert here.store.rotations == 1
        await here.true(lambda: here.view.is_fresh)

    on_stage(body)


def test_a_sleeping_watch_is_found_out_when_nobody_ticks_any_more() -> None:
    """The last worker dies while the watch sleeps: the number of records tells."""

    async def body(here: Stage) -> None:
        await here.write(_worker("w1"), _leader(7, "w1"), Put(KEYS.tick, encode(Tick(1))))
        await here.true(lambda: here.view.map.leader(7) is not None)
        here.store.is_deaf = True
        await here.write(Delete(KEYS.worker("w1")), Delete(KEYS.leader(7)))
        here.clock.ahead_ns += 60 * NS_PER_S
        await here.true(lambda: here.view.map.leader(7) is None)

    on_stage(body)
