"""The controller against real stores: it places, evens out, follows facts, and never writes without its seat."""

import asyncio
from collections.abc import Iterator

import pytest

from shardlead.cluster.seat import Seated, claim_seat
from shardlead.controller.writing import OPS_MAX, transactions
from shardlead.core.keyspace import encode
from shardlead.core.model import Wish
from shardlead.core.planner import Plan, Reason, Write
from shardlead.store.base import UNGUARDED, Committed, Conflict, Delete, Put, Txn, TxnResult
from tests.controller.fleet import CALM, Fleet, fleet
from tests.support.embedded import embedded_server
from tests.support.etcd import etcd_server


@pytest.fixture(scope="module", params=["embedded", pytest.param("3.5", marks=pytest.mark.etcd)])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "embedded":
        with embedded_server() as address:
            yield address
    else:
        with etcd_server(request.param) as etcd:
            yield etcd.url


def test_a_first_start_is_even_without_a_second_move(url: str) -> None:
    """Three workers, one of which gets the seat: all shards led, even within one, each with its order."""

    async def main() -> None:
        async with fleet(url) as world:
            await world.join("a", "b", "c", controller=CALM)
            await world.until(lambda: world.is_even() and world.is_in_order())
            assert len(world.seated()) == 1
            assert world.mirror.kvs[world.keyspace.leader(0)].version == 1
            reasons = {item.reason for copies in world.copies().values() for item in copies.values()}
            assert all(reason.startswith("no leader: nobody to ") for reason in reasons), reasons

    asyncio.run(main())


def test_a_newcomer_gets_its_share_and_a_death_is_made_good(url: str) -> None:
    """Up by one, down by one: the fleet is even again, and no inbox keeps a record of the dead."""

    async def main() -> None:
        async with fleet(url) as world:
            await world.join("a", "b", "c", controller=CALM)
            await world.until(world.is_even)
            await world.join("d")
            await world.until(lambda: world.counts() == dict.fromkeys("abcd", 6) and world.is_in_order())
            await world.end("d")
            await world.until(lambda: world.is_even() and world.is_in_order())
            assert not [key for key in world.mirror.kvs if key.startswith(world.keyspace.inbox("d"))]

    asyncio.run(main())


def test_a_quiet_cluster_is_written_nothing(url: str) -> None:
    """Once all is in order the controller looks and leaves everything as it is."""

    async def main() -> None:
        async with fleet(url) as world:
            await world.join("a", "b", controller=CALM)
            await world.until(lambda: world.is_even() and world.is_in_order())
            (name,) = world.seated()
            plans = set[int]()

            def has_looked_thrice() -> bool:
                plans.add(id(world.controllers[name].last_plan))
                return len(plans) > 3

            await world.until(lambda: world.controllers[name].last_plan == Plan(shares={"a": 12, "b": 12}))
            before = {key: kv.mod_revision for key, kv in world.mirror.kvs.items()}
            await world.until(has_looked_thrice)
            assert before == {key: kv.mod_revision for key, kv in world.mirror.kvs.items()}

    asyncio.run(main())


def test_operators_wishes_are_carried_out(url: str) -> None:
    """A drain empties a worker, a pin moves a shard, and they end with the wish."""

    async def main() -> None:
        async with fleet(url) as world:
            await world.join("a", "b", "c", controller=CALM)
            await world.until(world.is_even)
            keys = world.keyspace
            await put(world, keys.drain("a"), encode(Wish("test")))
            await world.until(lambda: world.counts() == {"a": 0, "b": 12, "c": 12})
            shard = next(shard for shard, name in world.leaders().items() if name == "b")
            await put(world, keys.pin(shard), encode(Wish("test", worker="c")))
            await world.until(lambda: world.leaders()[shard] == "c")
            await delete(world, keys.drain("a"))
            await world.until(lambda: world.is_even() and world.is_in_order())
            assert world.leaders()[shard] == "c"

    asyncio.run(main())


def test_garbage_under_the_prefix_stops_nothing(url: str) -> None:
    """Foreign keys and damaged records are passed over."""

    async def main() -> None:
        async with fleet(url) as world:
            keys = world.keyspace
            for key in (
                keys.prefix + b"novelty",
                keys.worker("zed"),
                keys.leader(3)[:-6] + b"x",
                keys.history(2),
                keys.freeze,
                keys.pin(1),
                keys.assignment("a", 4),
                keys.assignment("zed", 5),
            ):
                await put(world, key, b"\xffgarbage")
            await world.join("a", "b", controller=CALM)
            await world.until(world.is_even)

    asyncio.run(main())


# --- the seat --------------------------------------------------------------------------------------------------


def test_one_candidate_has_the_seat_and_another_follows_at_once(url: str) -> None:
    """Resigned or dead, the seat is taken within a moment, and planning goes on."""

    async def main() -> None:
        async with fleet(url) as world:
            await world.join("a", "b", "c", controller=CALM)
            await world.until(lambda: len(world.seated()) == 1)
            (first,) = world.seated()
            await world.stop_controller(first)
            await world.until(lambda: len(world.seated()) == 1, timeout_s=2.0)
            (second,) = world.seated()
            await world.end(second)
            await world.until(lambda: len(world.seated()) == 1, timeout_s=2.0)
            await world.join("d")
            await world.until(world.is_even)

    asyncio.run(main())


def test_a_seat_that_is_taken_away_is_noticed(url: str) -> None:
    """Somebody deletes the seat: the holder leaves it and becomes a candidate again, under a new epoch."""

    async def main() -> None:
        async with fleet(url) as world:
            await world.join("a", controller=CALM)
            await world.until(lambda: world.seated() == ["a"])
            revision = world.controllers["a"].seat_revision
            await delete(world, world.keyspace.seat)
            await world.until(lambda: world.controllers["a"].seat_revision > revision)

    asyncio.run(main())


def test_a_replaced_controller_writes_nothing(url: str) -> None:
    """Its transactions compare the seat: once another sits there, they are refused as a whole."""

    async def main() -> None:
        async with fleet(url, hands=False) as world:
            await world.join("a", "b")
            old = await claim_seat(world.store, world.keyspace, world.sessions["a"])
            assert isinstance(old, Seated)
            await delete(world, world.keyspace.seat)
            new = await claim_seat(world.store, world.keyspace, world.sessions["b"])
            assert isinstance(new, Seated)
            planned = Plan((Write(0, ("a",), Reason.NO_LEADER, ("a",), (), 0),))

            for seat_revision, expected in ((old.revision, Conflict), (new.revision, Committed)):
                for txn, _ in transactions(planned, world.keyspace, seat_revision):
                    assert isinstance(await world.store.commit(txn), expected)
            assert await world.read_assignments() == 1

    asyncio.run(main())


def test_a_wish_that_was_overtaken_by_facts_is_not_written(url: str) -> None:
    """Each shard's part compares the leader key it was planned from; the other parts are written."""

    async def main() -> None:
        async with fleet(url, hands=False) as world:
            await world.join("a", "b")
            seat = await claim_seat(world.store, world.keyspace, world.sessions["a"])
            assert isinstance(seat, Seated)
            await world.claim(0, "b")
            planned = Plan(tuple(Write(shard, ("a",), Reason.NO_LEADER, ("a",), (), 0) for shard in (0, 1)))
            ((txn, _),) = transactions(planned, world.keyspace, seat.revision)
            outcome = await world.store.commit(txn)

            assert isinstance(outcome, Committed)
            assert [isinstance(part, TxnResult) and part.succeeded for part in outcome.results] == [False, True]

    asyncio.run(main())


def test_a_session_in_doubt_writes_nothing(url: str) -> None:
    """The guard is asked right before each write: while the session is suspended nothing is claimed or assigned."""

    async def main() -> None:
        async with fleet(url, hands=False) as world:
            await world.join("a")
            session = world.sessions["a"]
            await world._end("session a")  # nobody renews or confirms it from here on
            session.doubt("test")
            controller = world.candidate(session)
            running = asyncio.create_task(controller.run())
            await asyncio.sleep(0.5)  # nothing can be awaited where nothing shall happen
            assert controller.seat_revision == 0
            assert world.keyspace.seat not in world.mirror.kvs
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def test_a_lost_session_ends_the_candidate(url: str) -> None:
    """Its run returns by itself, so that whoever runs it can open a new session."""

    async def main() -> None:
        async with fleet(url) as world:
            await world.join("a")
            running = asyncio.create_task(world.candidate(world.sessions["a"]).run())
            await world.until(lambda: world.keyspace.seat in world.mirror.kvs)
            world.sessions["a"].lose("test")
            async with asyncio.timeout(5):
                await running

    asyncio.run(main())


# --- size ------------------------------------------------------------------------------------------------------


def test_transactions_keep_within_etcds_bound() -> None:
    """At most 126 operations each, all writes in their order, whatever their sizes."""
    from shardlead.core.keyspace import Keyspace

    names = tuple(f"w{number}" for number in range(300))
    writes = tuple(
        Write(shard, names[:3], Reason.TIDY, names[:3], names[3 : 3 + (shard * 37) % 297], 0) for shard in range(200)
    )
    batches = list(transactions(Plan(writes), Keyspace("test"), 5))

    assert [write for _, batch in batches for write in batch] == list(writes)
    for txn, _ in batches:
        nested = [op for op in txn.success if isinstance(op, Txn)]
        assert len(nested) + sum(len(part.success) for part in nested) <= OPS_MAX


@pytest.mark.parametrize("shards", [3_000])
def test_many_shards_are_placed_in_seconds(url: str, shards: int) -> None:
    """So many that planning is left to a thread."""

    async def main() -> None:
        async with fleet(url, shards=shards, hands=False) as world:
            await world.join("a", "b", "c", controller=CALM)
            await world.until(lambda: len(world.copies()) == shards)

    asyncio.run(main())


async def put(world: Fleet, key: bytes, value: bytes) -> None:
    await world.store.commit(Txn(UNGUARDED, (Put(key, value),)))  # tests write what they like


async def delete(world: Fleet, key: bytes) -> None:
    await world.store.commit(Txn(UNGUARDED, (Delete(key),)))  # as above
