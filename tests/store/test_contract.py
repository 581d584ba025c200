"""What shardlead relies on in a store: one list, asked of the embedded store and of real etcds through EtcdStore.

The names are those of protocol.md (T0 … T8, A.2 … A.7). A store that passes can carry a cluster.
"""

import asyncio
import http.client
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import orjson
import pytest

from shardlead.clock import NS_PER_S, SystemClock
from shardlead.config import StoreSettings
from shardlead.errors import Compacted, LeaseGone, StoreRejected, WatchCanceled
from shardlead.store.base import (
    TXN_OPS_MAX,
    UNGUARDED,
    Committed,
    Compare,
    Conflict,
    Delete,
    DeleteResult,
    Event,
    KeyValue,
    Op,
    Outcome,
    Put,
    PutResult,
    Range,
    RangeResult,
    Target,
    Txn,
    TxnResult,
    WatchBatch,
    absent,
    created_at,
    leased_by,
    modified_at,
    prefix_end,
)
from shardlead.store.etcd import EtcdStore
from tests.support.embedded import embedded_server
from tests.support.etcd import etcd_server

STORY_TIMEOUT_S: Final = 20.0
Relation = Literal["EQUAL", "NOT_EQUAL", "GREATER", "LESS"]
TTL_S: Final = 60  # for leases that shall not end by themselves here


@dataclass(frozen=True)
class Server:
    """A running store."""

    kind: str
    url: str

    def call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Something that the Store interface does not have."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=5)
        try:
            connection.request("POST", path, orjson.dumps(body))
            answer = orjson.loads(connection.getresponse().read())
        finally:
            connection.close()
        assert isinstance(answer, dict)
        return answer


@pytest.fixture(
    scope="module",
    params=["embedded", pytest.param("3.5", marks=pytest.mark.etcd), pytest.param("3.4", marks=pytest.mark.etcd)],
)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """One server of a kind for all stories; each story has its own keys."""
    if request.param == "embedded":
        with embedded_server() as url:
            yield Server("embedded", url)
    else:
        with etcd_server(request.param) as etcd:
            yield Server(request.param, etcd.url)


@dataclass(frozen=True)
class World:
    """What a story acts in: a store, the server behind it, and keys of its own."""

    store: EtcdStore
    server: Server
    prefix: bytes

    def key(self, name: str | int) -> bytes:
        return self.prefix + str(name).encode()

    @property
    def end(self) -> bytes:
        return prefix_end(self.prefix)

    async def commit(
        self, *ops: Op, guards: tuple[Compare, ...] = UNGUARDED, otherwise: tuple[Op, ...] = ()
    ) -> Outcome:
        return await self.store.commit(Txn(guards, ops, otherwise))

    async def put(self, name: str | int, value: bytes = b"v", lease: int = 0) -> int:
        """Unguarded, since these keys are the story's alone. The revision."""
        outcome = await self.commit(Put(self.key(name), value, lease))
        assert isinstance(outcome, Committed)
        return outcome.revision

    async def get(self, name: str | int) -> KeyValue | None:
        kvs = (await self.store.read(Range(self.key(name)))).kvs
        return kvs[0] if kvs else None

    async def all(self) -> tuple[KeyValue, ...]:
        return (await self.store.read(Range(self.prefix, self.end))).kvs

    async def revision(self) -> int:
        return (await self.store.read(Range(self.prefix))).revision

    async def lease(self) -> int:
        return (await self.store.grant(TTL_S)).lease


Story = Callable[[World], Awaitable[None]]


def contract(story: Story) -> Callable[[Server], None]:
    """Make a test of a story: bounded in time, on every kind of server."""

    async def told(server: Server) -> None:
        # patient, so that a busy machine makes no Unknown out of an answer
        settings = StoreSettings(endpoints=(server.url,), try_timeout_s=8.0, call_timeout_s=8.0)
        async with EtcdStore(settings, clock=SystemClock(), rng=random.Random(1)) as store:
            world = World(store, server, f"/{story.__name__}/".encode())
            async with asyncio.timeout(STORY_TIMEOUT_S):
                await story(world)

    def test(server: Server) -> None:
        asyncio.run(told(server))

    test.__name__ = story.__name__
    test.__doc__ = story.__doc__
    return test


async def first_events(world: World, start: int, count: int) -> list[WatchBatch]:
    """The batches of a watch of the story's keys until `count` events have come."""
    batches: list[WatchBatch] = []
    async with world.store.watch(world.prefix, world.end, start) as watch:
        async for batch in watch:
            if batch.events:
                batches.append(batch)
            if sum(len(each.events) for each in batches) >= count:
                break
    return batches


def inner(outcome: Outcome, index: int = 0) -> TxnResult:
    """The answer of the nested transaction at `index`."""
    assert isinstance(outcome, Committed)
    result = outcome.results[index]
    assert isinstance(result, TxnResult)
    return result


# --- epochs and leadership keys (A.2, A.3) -----------------------------------------------------------------------


@contract
async def test_a_handoff_in_place_changes_mod_revision_and_keeps_create_revision(world: World) -> None:
    """So the epoch is the mod_revision; and the old leader's lease has no say any more."""
    old, new = await world.lease(), await world.lease()
    claimed = await world.put("leader", b"A", old)
    outcome = await world.commit(
        Put(world.key("leader"), b"B", new),
        Put(world.key("offer"), b"yours", new),
        guards=(modified_at(world.key("leader"), claimed),),
    )
    assert isinstance(outcome, Committed)
    await world.store.revoke(old)
    leader, offer = await world.get("leader"), await world.get("offer")
    assert leader is not None
    assert offer is not None
    assert (leader.value, leader.lease) == (b"B", new)
    assert (leader.create_revision, leader.mod_revision, leader.version) == (claimed, outcome.revision, 2)
    assert offer.mod_revision == leader.mod_revision, "B learns its epoch from the offer"


@contract
async def test_delete_and_put_of_one_key_is_refused(world: World) -> None:
    """So a handoff has to be a put."""
    await world.put("leader")
    with pytest.raises(StoreRejected) as refusal:
        await world.commit(Delete(world.key("leader")), Put(world.key("leader"), b"B"))
    assert refusal.value.code == 3
    with pytest.raises(StoreRejected):
        await world.commit(Put(world.key("leader"), b"B"), Put(world.key("leader"), b"C"))
    with pytest.raises(StoreRejected):
        await world.commit(Delete(world.prefix, world.end), Txn((), (Put(world.key("leader"), b"B"),)))
    leader = await world.get("leader")
    assert leader is not None
    assert leader.value == b"v"


@contract
async def test_both_branches_of_a_nested_transaction_may_write_one_key(world: World) -> None:
    """Only one of them is taken; two nested transactions may not."""
    either = Txn((absent(world.key("k")),), (Put(world.key("k"), b"new"),), (Put(world.key("k"), b"old"),))
    assert inner(await world.commit(either)).succeeded
    assert not inner(await world.commit(either)).succeeded
    with pytest.raises(StoreRejected):
        await world.commit(either, either)


def claim(world: World, shard: int, lease: int, *, puts: int = 1) -> Txn:
    """T1's inner transaction."""
    return Txn(
        (absent(world.key(f"leaders/{shard}")),),
        tuple(Put(world.key(f"{('leaders', 'history', 'more')[n]}/{shard}"), b"A", lease) for n in range(puts)),
        (Range(world.key(f"leaders/{shard}")),),
    )


@contract
async def test_claims_are_nested_and_each_is_won_or_lost_alone(world: World) -> None:
    """A won claim's epoch is the outer revision; a lost one names the leader, and if that is the claimant itself
    (an answer was lost) the epoch is the key's mod_revision."""
    ours, theirs = await world.lease(), await world.lease()
    before = await world.put("leaders/1", b"B", theirs)
    outcome = await world.commit(*(claim(world, shard, ours) for shard in range(3)))
    assert isinstance(outcome, Committed)
    assert [inner(outcome, n).succeeded for n in range(3)] == [True, False, True]
    named = inner(outcome, 1).results[0]
    assert isinstance(named, RangeResult)
    assert [(kv.value, kv.mod_revision, kv.lease) for kv in named.kvs] == [(b"B", before, theirs)]
    again = await world.commit(claim(world, 0, ours))
    mine = inner(again).results[0]
    assert isinstance(mine, RangeResult)
    assert [(kv.value, kv.mod_revision) for kv in mine.kvs] == [(b"A", outcome.revision)]


@contract
async def test_127_claims_fit_one_transaction_and_128_do_not(world: World) -> None:
    """Nested operations count against 128 minus the outer ones; with a history put each, 126 fit."""
    lease = await world.lease()
    with pytest.raises(StoreRejected) as refusal:
        await world.commit(*(claim(world, shard, lease) for shard in range(128)))
    assert refusal.value.code == 3
    with pytest.raises(StoreRejected):
        await world.commit(*(claim(world, shard, lease, puts=2) for shard in range(127)))
    assert await world.all() == ()
    outcome = await world.commit(*(claim(world, shard, lease) for shard in range(127)))
    assert all(inner(outcome, shard).succeeded for shard in range(127))
    await world.commit(Delete(world.prefix, world.end))
    outcome = await world.commit(*(claim(world, shard, lease, puts=2) for shard in range(126)))
    assert all(inner(outcome, shard).succeeded for shard in range(126))
    assert len(await world.all()) == 252


@contract
async def test_125_confirmations_fit_one_transaction_and_126_do_not(world: World) -> None:
    """T3: the write is one operation of 128, and a nested transaction with two guards leaves room for 126 in all.
    Of whole claims (T1: two puts, two deletes) 124 fit, so batches of 64 do."""

    def confirm(shard: int) -> Txn:
        key = world.key(f"leaders/{shard}")
        return Txn((modified_at(key, 0), leased_by(key, 0)), (), (Range(key),))

    def whole_claim(shard: int) -> Txn:
        key, history = world.key(f"leaders/{shard}"), world.key(f"history/{shard}")
        offer, want = world.key(f"offers/{shard}"), world.key(f"wants/{shard}")
        effects = (Put(key, b"A"), Put(history, b"h"), Delete(offer), Delete(want))
        return Txn((absent(key), modified_at(history, 0)), effects, (Range(key),))

    mine = Put(world.key("workers/A"), b"A")
    assert isinstance(await world.commit(mine, *(confirm(shard) for shard in range(125))), Committed)
    with pytest.raises(StoreRejected):
        await world.commit(mine, *(confirm(shard) for shard in range(126)))
    with pytest.raises(StoreRejected):
        await world.commit(*(whole_claim(shard) for shard in range(125)))
    assert isinstance(await world.commit(*(whole_claim(shard) for shard in range(124))), Committed)


@contract
async def test_each_part_of_a_transaction_has_128_places(world: World) -> None:
    """TXN_OPS_MAX in compares, in success, in failure."""
    guards = tuple(absent(world.key("none")) for _ in range(TXN_OPS_MAX))
    puts = tuple(Put(world.key(n), b"v") for n in range(TXN_OPS_MAX))
    reads = tuple(Range(world.key(n)) for n in range(TXN_OPS_MAX))
    assert isinstance(await world.store.commit(Txn(guards, puts, reads)), Committed)
    for txn in (
        Txn((*guards, absent(world.key("none"))), (), ()),
        Txn((), (*puts, Put(world.key("one more"), b"v")), ()),
        Txn((), (), (*reads, Range(world.key("one more")))),
    ):
        with pytest.raises(StoreRejected):
            await world.store.commit(txn)


@contract
async def test_one_bad_lease_fails_the_whole_transaction_without_effect(world: World) -> None:
    """However deep it stands; behind a guard that does not hold it does no harm."""
    good, bad = await world.lease(), await world.lease()
    await world.store.revoke(bad)
    before = await world.revision()
    for op in (Put(world.key("b"), b"v", bad), Txn((), (Txn((), (Put(world.key("b"), b"v", bad),)),))):
        with pytest.raises(LeaseGone):
            await world.commit(Put(world.key("a"), b"v", good), op)
    assert await world.all() == ()
    assert await world.revision() == before
    behind = Txn((modified_at(world.key("a"), 1),), (Put(world.key("b"), b"v", bad),))
    outcome = await world.commit(Put(world.key("a"), b"v", good), behind)
    assert not inner(outcome, 1).succeeded
    assert [kv.key for kv in await world.all()] == [world.key("a")]


@contract
async def test_guards_are_decided_before_anything_is_written(world: World) -> None:
    """A nested guard does not see what its own transaction writes; a read inside does."""
    outcome = await world.commit(
        Put(world.key("a"), b"v"),
        Txn((absent(world.key("a")),), (Put(world.key("b"), b"v"),)),
        Range(world.prefix, world.end),
    )
    assert inner(outcome, 1).succeeded
    assert isinstance(outcome, Committed)
    seen = outcome.results[2]
    assert isinstance(seen, RangeResult)
    assert [(kv.key, kv.mod_revision) for kv in seen.kvs] == [
        (world.key("a"), outcome.revision),
        (world.key("b"), outcome.revision),
    ]


@contract
async def test_a_guard_over_a_range_holds_only_if_the_range_is_empty(world: World) -> None:
    """`absent(prefix, end)`: what `generation raise` and the first `meta` stand on."""
    guard = (absent(world.key("workers/"), prefix_end(world.key("workers/"))),)
    assert isinstance(await world.commit(guards=guard), Committed)
    await world.put("workers/w1")
    assert isinstance(await world.commit(guards=guard), Conflict)
    await world.commit(Delete(world.key("workers/w1")))
    assert isinstance(await world.commit(guards=guard), Committed)


@contract
async def test_a_conflict_does_nothing_of_success_and_answers_failure(world: World) -> None:
    """And uses no revision if failure only reads."""
    revision = await world.put("k", b"there")
    outcome = await world.commit(
        Put(world.key("k"), b"lost"), guards=(modified_at(world.key("k"), 1),), otherwise=(Range(world.key("k")),)
    )
    assert isinstance(outcome, Conflict)
    assert outcome.revision == revision
    (found,) = outcome.results
    assert isinstance(found, RangeResult)
    assert [kv.value for kv in found.kvs] == [b"there"]


@contract
async def test_every_comparison(world: World) -> None:
    """Each target, each relation, of a key that is there and of one that is not."""
    lease = await world.lease()
    created = await world.put("k", b"m", lease)
    changed = await world.put("k", b"n", lease)
    have: dict[Target, int | bytes] = {
        Target.VERSION: 2,
        Target.CREATE: created,
        Target.MOD: changed,
        Target.LEASE: lease,
        Target.VALUE: b"n",
    }
    cases: tuple[tuple[Relation, bool, bool], ...] = (
        ("EQUAL", False, True),
        ("EQUAL", True, False),
        ("NOT_EQUAL", False, False),
        ("NOT_EQUAL", True, True),
        ("GREATER", True, True),
        ("GREATER", False, False),
        ("LESS", False, False),
    )
    for target, value in have.items():
        below: int | bytes = value - 1 if isinstance(value, int) else b"m"
        for relation, is_below, is_met in cases:
            guard = Compare(world.key("k"), target, below if is_below else value, relation)
            outcome = await world.commit(guards=(guard,))
            assert isinstance(outcome, Committed if is_met else Conflict), guard
    for target in (Target.VERSION, Target.CREATE, Target.MOD, Target.LEASE):
        guard = Compare(world.key("none"), target, 0)
        assert isinstance(await world.commit(guards=(guard,)), Committed), guard
    for guard in (
        Compare(world.key("none"), Target.VALUE, b"", "EQUAL"),
        Compare(world.key("none"), Target.VALUE, b"", "NOT_EQUAL"),
    ):
        assert isinstance(await world.commit(guards=(guard,)), Conflict), "nothing is true of an absent value"


@contract
async def test_of_many_who_tick_at_once_exactly_one_wins(world: World) -> None:
    """A.7.7: the beacon's guard; the losers wrote nothing."""
    seen = await world.put("tick")
    outcomes = await asyncio.gather(
        *(
            world.commit(Put(world.key("tick"), b"%d" % n), guards=(modified_at(world.key("tick"), seen),))
            for n in range(8)
        )
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Committed", *["Conflict"] * 7]
    assert await world.revision() == seen + 1


@contract
async def test_a_confirmation_writes_and_shows_who_stands_there(world: World) -> None:
    """T3 goes through the log: it changes a revision, and answers the keys that are not ours any more."""
    lease, other = await world.lease(), await world.lease()
    await world.put("workers/A", b"A", lease)
    mine = await world.put("leaders/1", b"A", lease)
    theirs = await world.put("leaders/2", b"B", other)

    def confirm(shard: int, epoch: int) -> Txn:
        key = world.key(f"leaders/{shard}")
        return Txn((modified_at(key, epoch), leased_by(key, lease)), (), (Range(key),))

    guard = (leased_by(world.key("workers/A"), lease),)
    outcome = await world.commit(
        Put(world.key("workers/A"), b"A", lease), confirm(1, mine), confirm(2, theirs), guards=guard
    )
    assert isinstance(outcome, Committed)
    assert outcome.revision == theirs + 1
    assert (inner(outcome, 1).succeeded, inner(outcome, 2).succeeded) == (True, False)
    await world.store.revoke(lease)
    assert isinstance(await world.commit(Put(world.key("workers/A"), b"A"), guards=guard), Conflict)


# --- leases ------------------------------------------------------------------------------------------------------


@contract
async def test_a_lease_is_at_least_what_the_server_can_keep(world: World) -> None:
    """Use the TTL that was given, never the one that was asked."""
    short, long = await world.store.grant(1), await world.store.grant(7)
    assert (short.ttl_s, long.ttl_s) == (2, 7)
    assert short.lease != long.lease
    assert min(short.lease, long.lease) > 0
    assert await world.store.renew(long.lease) == 7


@contract
async def test_a_lease_without_renewal_ends_after_its_time_and_takes_its_keys(world: World) -> None:
    """Never earlier than the TTL after the last renewal was *sent*; all keys in one message; then it is gone."""
    clock = SystemClock()
    grant = await world.store.grant(2)
    await world.put("b", b"v", grant.lease)
    revision = await world.put("a", b"v", grant.lease)
    async with world.store.watch(world.prefix, world.end, revision + 1) as watch:
        await world.store.renew(grant.lease)
        sent_ns = clock.now_ns()
        assert await world.store.renew(grant.lease) == 2
        batch = await anext(aiter(watch))
        while not batch.events:
            batch = await anext(aiter(watch))
        lived_s = (clock.now_ns() - sent_ns) / NS_PER_S
    assert 2.0 <= lived_s < 6.0
    assert [(event.is_delete, event.kv.key) for event in batch.events] == [
        (True, world.key("a")),
        (True, world.key("b")),
    ]
    with pytest.raises(LeaseGone):
        await world.store.renew(grant.lease)
    with pytest.raises(LeaseGone):
        await world.store.lease_keys(grant.lease)


@contract
async def test_a_revocation_is_one_revision_and_one_message(world: World) -> None:
    """A thousand keys, in the order of keys; a key's deletion shows its key and its revision."""
    lease = await world.lease()
    names = [f"{n:04}" for n in range(1_000)]
    for start in range(0, len(names), 125):
        await world.commit(*(Put(world.key(name), b"v", lease) for name in names[start : start + 125]))
    revision = await world.revision()
    assert sorted((await world.store.lease_keys(lease)).keys) == [world.key(name) for name in names]
    async with world.store.watch(world.prefix, world.end, revision + 1) as watch:
        await world.store.revoke(lease)
        batch = await anext(aiter(watch))
    gone = tuple(Event(is_delete=True, kv=KeyValue(world.key(name), b"", 0, revision + 1, 0)) for name in names)
    assert batch.events == gone
    assert await world.revision() == revision + 1


@contract
async def test_what_was_revoked_is_gone(world: World) -> None:
    """For every call; an empty lease's end uses no revision."""
    before = await world.revision()
    lease = await world.lease()
    await world.store.revoke(lease)
    assert await world.revision() == before
    for call in (world.store.revoke, world.store.renew, world.store.lease_keys):
        with pytest.raises(LeaseGone):
            await call(lease)


@contract
async def test_a_lease_knows_its_keys(world: World) -> None:
    """What the audit reads: a key belongs to the lease of its last put, and to none after a plain put or a
    deletion. Asking uses no revision."""
    first, second = await world.lease(), await world.lease()
    for name in ("a", "b", "c", "d"):
        await world.put(name, b"v", first)
    await world.put("b", b"v", second)
    await world.put("c", b"detached")
    await world.commit(Delete(world.key("d")))
    before = await world.revision()
    known, taken = await world.store.lease_keys(first), await world.store.lease_keys(second)
    assert (known.keys, taken.keys) == ((world.key("a"),), (world.key("b"),))
    assert known.granted_ttl_s == TTL_S
    assert TTL_S - 5 <= known.ttl_s <= TTL_S
    assert await world.revision() == before
    await world.store.revoke(first)
    assert [kv.key for kv in await world.all()] == [world.key("b"), world.key("c")]


# --- reading -----------------------------------------------------------------------------------------------------


@contract
async def test_pages_pinned_to_a_revision_are_one_picture(world: World) -> None:
    """A.7.1: whatever changes meanwhile. `count` is the whole range's, `more` says that the limit cut it."""
    for name in ("a", "b", "c", "d", "e"):
        await world.put(name, b"old")
    revision = await world.revision()
    names: list[bytes] = []
    start, has_more, pages = world.prefix, True, 0
    while has_more:
        page = await world.store.read(Range(start, world.end, limit=2, revision=revision))
        assert page.count == 5 - len(names)
        assert all(kv.value == b"old" for kv in page.kvs)
        names += [kv.key for kv in page.kvs]
        start, has_more, pages = page.kvs[-1].key + b"\0", page.more, pages + 1
        await world.commit(Delete(world.key("c")), Put(world.key("e"), b"new"), Put(world.key("f"), b"new"))
    assert (names, pages) == ([world.key(name) for name in ("a", "b", "c", "d", "e")], 3)


@contract
async def test_reading_keys_or_counting_only(world: World) -> None:
    """`keys_only` keeps all but the value; `count_only` brings no key; the end of a range is not in it."""
    lease = await world.lease()
    revision = await world.put("a", b"value", lease)
    await world.put("b")
    bare = await world.store.read(Range(world.key("a"), world.key("b"), keys_only=True))
    assert bare.kvs == (KeyValue(world.key("a"), b"", revision, revision, 1, lease),)
    counted = await world.store.read(Range(world.prefix, world.end, count_only=True))
    assert (counted.kvs, counted.count, counted.more) == ((), 2, False)
    nothing = await world.store.read(Range(world.key("none")))
    assert (nothing.kvs, nothing.count, nothing.more) == ((), 0, False)
    assert nothing.revision == revision + 1


@contract
async def test_any_bytes_are_a_key_and_a_value(world: World) -> None:
    """Zeros and 0xff, and a value as large as a ring."""
    strange = world.prefix + bytes(range(256))
    ring = os.urandom(1_000_000)
    await world.commit(Put(strange, ring))
    async with world.store.watch(world.prefix, world.end, await world.revision()) as watch:
        batch = await anext(aiter(watch))
    (kv,) = await world.all()
    assert (kv.key, kv.value) == (strange, ring)
    assert batch.events == (Event(is_delete=False, kv=kv),)


@contract
async def test_what_is_too_large_is_refused(world: World) -> None:
    """Over 1.5 MiB; for good, so it is no Unknown."""
    with pytest.raises(StoreRejected) as refusal:
        await world.commit(Put(world.key("k"), b"\0" * 1_600_000))
    assert refusal.value.code == 3
    assert await world.all() == ()


@contract
async def test_the_future_cannot_be_read(world: World) -> None:
    """A revision that was not yet: refused, never an empty answer."""
    with pytest.raises(StoreRejected) as refusal:
        await world.store.read(Range(world.prefix, revision=await world.revision() + 1))
    assert refusal.value.code == 11


@contract
async def test_deletions_are_counted_and_an_empty_one_uses_no_revision(world: World) -> None:
    """What T4 and cleaning up rely on."""
    await world.put("a")
    revision = await world.put("b")
    outcome = await world.commit(Delete(world.prefix, world.end))
    assert outcome == Committed(revision + 1, (DeleteResult(revision + 1, 2),))
    outcome = await world.commit(Delete(world.prefix, world.end))
    assert outcome == Committed(revision + 1, (DeleteResult(revision + 1, 0),))


# --- watching ----------------------------------------------------------------------------------------------------


@contract
async def test_a_watch_tells_the_past_then_the_present_in_order(world: World) -> None:
    """From `start_revision` on, each change once, no transaction split."""
    await world.put("before")
    start = (await world.put("a", b"1")) + 0
    await world.put("a", b"2")
    async with world.store.watch(world.prefix, world.end, start) as watch:
        await world.commit(Put(world.key("a"), b"3"), Put(world.key("b"), b"3"), Delete(world.key("before")))
        last = await world.put("a", b"4")
        batches: list[WatchBatch] = []
        async for batch in watch:
            batches.append(batch)
            if batch.events and batch.events[-1].kv.mod_revision == last:
                break
    told = [
        (event.kv.mod_revision - start, event.kv.key[len(world.prefix) :], event.is_delete)
        for batch in batches
        for event in batch.events
    ]
    assert told == [
        (0, b"a", False),
        (1, b"a", False),
        (2, b"a", False),
        (2, b"b", False),
        (2, b"before", True),
        (3, b"a", False),
    ]
    of_the_transaction = {
        id(batch) for batch in batches for event in batch.events if event.kv.mod_revision == start + 2
    }
    assert len(of_the_transaction) == 1


@contract
async def test_a_watch_hears_its_own_range_only(world: World) -> None:
    """The end of the range is not in it; a single key is a range of one."""
    start = await world.put("a/1")
    await world.put("b")
    await world.put("a/2")
    events: list[Event] = []
    async with world.store.watch(world.key("a/"), world.key("b"), start) as watch:
        async for batch in watch:
            events += batch.events
            if len(events) == 2:
                break
    assert [event.kv.key for event in events] == [world.key("a/1"), world.key("a/2")]


@contract
async def test_a_resumed_watch_skips_nothing_and_repeats_nothing(world: World) -> None:
    """A.7.4: resume after the last event; the header's revision runs ahead while a watch catches up."""
    start = await world.put(0)
    for number in range(1, 30):
        await world.put(number)
    last = await world.revision()
    seen: list[int] = []
    following = start
    while len(seen) < 30:
        async with world.store.watch(world.prefix, world.end, following) as watch:
            batch = await anext(aiter(watch))
        assert batch.revision >= batch.events[-1].kv.mod_revision
        for event in batch.events[: random.Random(len(seen)).randint(1, len(batch.events))]:
            seen.append(event.kv.mod_revision)
            following = event.kv.mod_revision + 1
    assert seen == list(range(start, last + 1))


@contract
async def test_what_was_compacted_is_refused_and_cancels_a_watch(world: World) -> None:
    """A read says Compacted, a watch is cancelled with the revision up to which events are lost; the present stays,
    and so does what had happened after."""
    lost = await world.put("k", b"1")
    await world.put("k", b"2")
    kept = await world.put("k", b"3")
    world.server.call("/v3/kv/compaction", {"revision": str(kept)})
    with pytest.raises(Compacted):
        await world.store.read(Range(world.key("k"), revision=lost))
    with pytest.raises(WatchCanceled) as canceled:
        await first_events(world, lost, 1)
    assert canceled.value.compact_revision == kept
    page = await world.store.read(Range(world.key("k"), revision=kept))
    assert [(kv.value, kv.version) for kv in page.kvs] == [(b"3", 3)]
    await world.put("k", b"4")
    (batch,) = await first_events(world, kept + 1, 1)
    assert [event.kv.value for event in batch.events] == [b"4"]


@contract
async def test_revisions_only_grow_and_one_write_is_one_step(world: World) -> None:
    """And status tells who is there."""
    before = await world.store.status()
    revisions = [await world.put("k") for _ in range(5)]
    assert revisions == list(range(before.revision + 1, before.revision + 6))
    after = await world.store.status()
    assert (after.revision, after.cluster_id) == (revisions[-1], before.cluster_id)
    assert after.version.startswith({"embedded": "3.5."}.get(world.server.kind, world.server.kind))


@contract
async def test_the_life_of_a_shard(world: World) -> None:
    """T0, T1, T5, T5s, T4 as transactions, one after the other: each epoch is larger than the last."""
    leases = {name: await world.lease() for name in "AB"}
    for name, lease in leases.items():
        opened = await world.commit(
            Put(world.key(f"workers/{name}"), name.encode(), lease), guards=(absent(world.key(f"workers/{name}")),)
        )
        assert isinstance(opened, Committed)
    leader, want = world.key("leaders/1"), world.key("inbox/A/wants/1")
    claimed = await world.commit(claim(world, 1, leases["A"]), guards=(leased_by(world.key("workers/A"), leases["A"]),))
    assert inner(claimed).results == (PutResult(claimed.revision if isinstance(claimed, Committed) else 0),)
    assert isinstance(claimed, Committed)
    epochs = [claimed.revision]
    wanted = await world.commit(Put(want, b"B", leases["B"]), guards=(absent(want),))
    target = await world.get("workers/B")
    assert isinstance(wanted, Committed)
    assert target is not None
    handoff = await world.commit(
        Put(leader, b"B", leases["B"]),
        Delete(want),
        guards=(
            modified_at(leader, epochs[-1]),
            modified_at(want, wanted.revision),
            modified_at(target.key, target.mod_revision),
        ),
    )
    assert isinstance(handoff, Committed)
    epochs.append(handoff.revision)
    stale = await world.commit(Put(leader, b"A", leases["A"]), guards=(modified_at(leader, epochs[0]),))
    assert isinstance(stale, Conflict)
    reminted = await world.commit(
        Put(leader, b"B", leases["B"]),
        guards=(modified_at(leader, epochs[-1]), leased_by(world.key("workers/B"), leases["B"])),
    )
    assert isinstance(reminted, Committed)
    epochs.append(reminted.revision)
    late = await world.commit(Delete(leader), guards=(modified_at(leader, epochs[1]),))
    assert isinstance(late, Conflict)
    resigned = await world.commit(Delete(leader), guards=(modified_at(leader, epochs[-1]),))
    assert isinstance(resigned, Committed)
    again = await world.commit(claim(world, 1, leases["A"]))
    assert isinstance(again, Committed)
    epochs.append(again.revision)
    assert epochs == sorted(set(epochs))
    created = await world.commit(guards=(created_at(leader, epochs[-1]),))
    assert isinstance(created, Committed)
