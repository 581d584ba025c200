"""The etcd fence (T7), on a real etcd: the leadership's own key is the fence."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Final

import pytest

from shardlead.clock import SystemClock
from shardlead.config import StoreSettings
from shardlead.core.keyspace import Keyspace, encode
from shardlead.core.model import LeaderRecord, epoch_of
from shardlead.errors import EpochRegressed, Fenced, LeadershipLost, WriteUnknown
from shardlead.fencing import EtcdFence
from shardlead.store.base import UNGUARDED, Committed, Delete, Outcome, Put, Range, Store, Txn, Unknown
from shardlead.store.etcd import EtcdStore
from tests.fencing.rivals import Session, lead_of
from tests.support.etcd import KINDS, EtcdCluster, etcd_server

pytestmark = pytest.mark.etcd

KEYS: Final = Keyspace("fencing")
DATA: Final = b"/accounts/"
BALANCE: Final = DATA + b"balance"


@pytest.fixture(scope="module", params=KINDS)
def etcd(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    with etcd_server(request.param) as cluster:
        yield cluster


class Bench:
    """A store, and leaderships taken on it as T1 and T5 would: by writing `leaders/<shard>`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.fence = EtcdFence(store, KEYS, DATA)

    async def lead(self, shard: int, worker: str, *, generation: int = 0) -> int:
        put = Put(KEYS.leader(shard), encode(LeaderRecord(worker, worker)))
        # UNGUARDED: the test plays the election, alone.
        outcome = await self.store.commit(Txn(UNGUARDED, (put,)))
        assert isinstance(outcome, Committed)
        return epoch_of(generation, outcome.revision)

    async def balance(self) -> int:
        found = await self.store.read(Range(BALANCE))
        return int(found.kvs[0].value) if found.kvs else 0


def on_etcd(etcd: EtcdCluster, main: Callable[[Bench], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30), bench(etcd) as ready:
            await main(ready)

    asyncio.run(bounded())


@asynccontextmanager
async def bench(etcd: EtcdCluster) -> AsyncIterator[Bench]:
    async with EtcdStore(StoreSettings(endpoints=etcd.endpoints), clock=SystemClock(), rng=random.Random(1)) as store:
        # UNGUARDED: an empty table to begin with; nobody else works here.
        await store.commit(Txn(UNGUARDED, (Delete(DATA, b"/accounts0"), Delete(KEYS.leaders, KEYS.leaders + b"\xff"))))
        yield Bench(store)


def amount(number: int) -> Put:
    return Put(BALANCE, b"%d" % number)


async def late_write(on: Bench, write_late: Callable[[int], Awaitable[None]]) -> list[int]:
    """As in test_sqlite: the deposits that were acknowledged; the balance should be their sum."""
    acknowledged = []
    old = lead_of(1, await on.lead(1, "old"))
    await on.fence.barrier(old)
    await on.fence.write(old, amount(100))
    acknowledged.append(100)

    new = lead_of(1, await on.lead(1, "new"))
    await on.fence.barrier(new)
    (found,) = await on.fence.read(new, Range(BALANCE))
    try:
        await write_late(old.epoch)
        acknowledged.append(7)
    except Fenced:
        pass
    await on.fence.write(new, amount(int(found.kvs[0].value) + 5))
    acknowledged.append(5)
    return acknowledged


def test_a_late_write_of_an_old_leader_is_refused(etcd: EtcdCluster) -> None:
    """It raises Fenced with the new leader's epoch, and no acknowledged write is lost."""

    async def main(on: Bench) -> None:
        refused: list[Fenced] = []

        async def late(old_epoch: int) -> None:
            try:
                await on.fence.write(lead_of(1, old_epoch), amount(100 + 7))
            except Fenced as exc:
                refused.append(exc)
                raise

        acknowledged = await late_write(on, late)

        leader = (await on.store.read(Range(KEYS.leader(1)))).kvs[0]
        assert acknowledged == [100, 5]
        assert await on.balance() == 105
        assert [exc.registered for exc in refused] == [leader.mod_revision]

    on_etcd(etcd, main)


def test_the_same_interleaving_loses_a_write_without_the_guard(etcd: EtcdCluster) -> None:
    """Ablation: a plain put is acknowledged and then overwritten."""

    async def main(on: Bench) -> None:
        async def late(old_epoch: int) -> None:
            # UNGUARDED: the very thing that must not be done.
            assert isinstance(await on.store.commit(Txn(UNGUARDED, (amount(100 + 7),))), Committed)

        acknowledged = await late_write(on, late)

        assert acknowledged == [100, 7, 5]
        assert await on.balance() == 105, "the acknowledged 7 is lost"

    on_etcd(etcd, main)


def test_the_claim_alone_refuses_the_leader_before(etcd: EtcdCluster) -> None:
    """Even ahead of the new leader's barrier: the old one's epoch is not the key's revision any more. So does the end
    of its lease."""

    async def main(on: Bench) -> None:
        old = lead_of(1, await on.lead(1, "old"))
        await on.fence.barrier(old)
        new_epoch = await on.lead(1, "new")
        with pytest.raises(Fenced) as replaced:
            await on.fence.write(old, amount(1))
        with pytest.raises(Fenced) as late:
            await on.fence.barrier(old)
        # UNGUARDED: plays the end of the lease.
        await on.store.commit(Txn(UNGUARDED, (Delete(KEYS.leader(1)),)))
        with pytest.raises(Fenced) as ended:
            await on.fence.write(old, amount(1))

        assert [exc.value.registered for exc in (replaced, late, ended)] == [new_epoch, new_epoch, None]
        assert await on.balance() == 0

    on_etcd(etcd, main)


def test_a_leader_that_forgot_its_barrier_cannot_write(etcd: EtcdCluster) -> None:
    """The record of the whole epoch is compared too."""

    async def main(on: Bench) -> None:
        lead = lead_of(1, await on.lead(1, "new"))
        with pytest.raises(Fenced) as refused:
            await on.fence.write(lead, amount(1))
        assert refused.value.registered is None
        with pytest.raises(Fenced):
            await on.fence.read(lead, Range(BALANCE))
        await on.fence.barrier(lead)
        await on.fence.barrier(lead)  # the same again is fine
        await on.fence.write(lead, amount(1))

    on_etcd(etcd, main)


def test_a_generation_below_the_registered_one_says_so(etcd: EtcdCluster) -> None:
    """After a restore without `generation raise` the barrier names it; after it, all is well."""

    async def main(on: Bench) -> None:
        before = lead_of(1, await on.lead(1, "before", generation=3))
        await on.fence.barrier(before)
        with pytest.raises(EpochRegressed, match="generation raise"):
            await on.fence.barrier(lead_of(1, await on.lead(1, "after", generation=2)))
        after = lead_of(1, await on.lead(1, "after", generation=4))
        await on.fence.barrier(after)
        await on.fence.write(after, amount(1))

    on_etcd(etcd, main)


def test_a_lost_lease_sends_nothing(etcd: EtcdCluster) -> None:
    """The guard is asked before each request."""

    async def main(on: Bench) -> None:
        session = Session()
        lead = lead_of(1, await on.lead(1, "new"), session)
        await on.fence.barrier(lead)
        session.is_good = False
        for call in (on.fence.barrier(lead), on.fence.write(lead, amount(1)), on.fence.read(lead, Range(BALANCE))):
            with pytest.raises(LeadershipLost):
                await call
        assert await on.balance() == 0

    on_etcd(etcd, main)


@pytest.mark.parametrize(
    "op",
    [
        Put(KEYS.leader(1), b"x"),
        Put(DATA + b"fence/000001", b"1"),
        Delete(DATA, b"/accounts0"),
        Delete(DATA + b"a", DATA + b"g"),
        Delete(DATA + b"z", b"/b"),
        Delete(DATA + b"z", b"\x00"),
    ],
)
def test_nothing_but_data_is_touched(etcd: EtcdCluster, op: Put | Delete) -> None:
    """Leaders' keys, fence records and what lies outside of the prefix are out of reach."""

    async def main(on: Bench) -> None:
        lead = lead_of(1, await on.lead(1, "new"))
        await on.fence.barrier(lead)
        with pytest.raises(ValueError, match="is not data below"):
            await on.fence.write(lead, op)

    on_etcd(etcd, main)


def test_a_prefix_apart_from_the_cluster_is_asked_for(etcd: EtcdCluster) -> None:
    """Data below the cluster's own prefix, or around it, is refused."""

    async def main(on: Bench) -> None:
        for prefix in (b"", b"/", KEYS.prefix, KEYS.leaders):
            with pytest.raises(ValueError, match="overlaps"):
                EtcdFence(on.store, KEYS, prefix)

    on_etcd(etcd, main)


class Deaf(EtcdStore):
    """A store whose answers to writes get lost after the write was applied, `losses` times."""

    losses = 0

    async def commit(self, txn: Txn) -> Outcome:
        outcome = await super().commit(txn)
        if self.losses:
            self.losses -= 1
            return Unknown("the answer was lost")
        return outcome


def test_an_unknown_barrier_is_repeated_and_an_unknown_write_is_not(etcd: EtcdCluster) -> None:
    """Registering twice is harmless; whether a write was applied, the caller has to find out."""

    async def main(on: Bench) -> None:
        settings = StoreSettings(endpoints=etcd.endpoints)
        async with Deaf(settings, clock=SystemClock(), rng=random.Random(1)) as store:
            fence = EtcdFence(store, KEYS, DATA)
            lead = lead_of(1, await on.lead(1, "new"))
            store.losses = 2
            await fence.barrier(lead)
            assert store.losses == 0
            store.losses = 100
            with pytest.raises(WriteUnknown):
                await fence.barrier(lead)
            store.losses = 1
            with pytest.raises(WriteUnknown):
                await fence.write(lead, amount(7))
            assert (store.losses, await on.balance()) == (0, 7)

    on_etcd(etcd, main)


def test_the_leadership_hears_of_unknown_outcomes(etcd: EtcdCluster) -> None:
    """Of an answer that was lost, and of a write that was cancelled under way; not of one that was done."""

    async def main(on: Bench) -> None:
        settings = StoreSettings(endpoints=etcd.endpoints)
        async with Deaf(settings, clock=SystemClock(), rng=random.Random(1)) as store:
            heard: asyncio.Queue[str] = asyncio.Queue()
            fence = EtcdFence(store, KEYS, DATA)
            lead = lead_of(1, await on.lead(1, "new"), on_unknown=heard.put_nowait)
            await fence.barrier(lead)
            await fence.write(lead, amount(1))
            await asyncio.sleep(0)
            assert heard.empty()
            store.losses = 1
            with pytest.raises(WriteUnknown):
                await fence.write(lead, amount(2))
            assert "lost" in await asyncio.wait_for(heard.get(), 5)
            writing = asyncio.create_task(fence.write(lead, amount(3)))
            await asyncio.sleep(0)  # it has begun
            writing.cancel()
            assert "cancelled" in await asyncio.wait_for(heard.get(), 5)
            with pytest.raises(asyncio.CancelledError):
                await writing

    on_etcd(etcd, main)
