"""The SQLite fence: an old leader's late write is refused, and each part of the fence is needed for that."""

import asyncio
import contextlib
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlead.errors import EpochRegressed, Fenced, LeadershipLost, ResourceUnavailable, WriteUnknown
from shardlead.fencing import SqliteFence, Transaction
from tests.fencing.rivals import (
    SCHEMA,
    FencedSql,
    Session,
    WithoutBarrier,
    WithoutLock,
    balance_of,
    lead_of,
    set_balance,
)

WAIT_S = 10.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "accounts.sqlite3"


def fence_at(path: Path, busy_timeout_s: float = 5.0) -> SqliteFence:
    return SqliteFence(path, schema=SCHEMA, busy_timeout_s=busy_timeout_s, synchronous="NORMAL")


def run(main: Callable[[], Coroutine[None, None, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(WAIT_S * 2):
            await main()

    asyncio.run(bounded())


# --- the interleaving that matters --------------------------------------------------------------------------------


async def late_write(old_side: FencedSql, new_side: FencedSql) -> tuple[list[int], int]:
    """An old leader's deposit lands between its successor's read and that one's first write.

    Returns the deposits that were acknowledged, and the balance in the end. All is well if the one is the sum of the
    other.
    """
    acknowledged = []
    old, new = lead_of(1, 10), lead_of(1, 20)
    await old_side.barrier(old)
    await old_side.write(old, lambda tx: set_balance(tx, 1, 100))
    acknowledged.append(100)

    await new_side.barrier(new)
    loaded = await new_side.read(lambda tx: balance_of(tx, 1))
    with contextlib.suppress(Fenced):
        await old_side.write(old, lambda tx: set_balance(tx, 1, 100 + 7))
        acknowledged.append(7)
    await new_side.write(new, lambda tx: set_balance(tx, 1, loaded + 5))
    acknowledged.append(5)

    return acknowledged, await new_side.read(lambda tx: balance_of(tx, 1))


def test_a_late_write_of_an_old_leader_is_refused(path: Path) -> None:
    """It raises Fenced, names the epoch in its way, and no acknowledged write is lost."""

    async def main() -> None:
        async with fence_at(path) as old_side, fence_at(path) as new_side:
            acknowledged, balance = await late_write(old_side, new_side)
            with pytest.raises(Fenced) as refused:
                await old_side.write(lead_of(1, 10), lambda tx: set_balance(tx, 1, 0))

        assert acknowledged == [100, 5]
        assert balance == 105
        assert refused.value.registered == 20

    run(main)


def test_the_same_interleaving_loses_a_write_without_the_barrier(path: Path) -> None:
    """Ablation: a token check alone acknowledges the late write and then overwrites it."""

    async def main() -> None:
        with contextlib.closing(WithoutBarrier(path)) as old_side, contextlib.closing(WithoutBarrier(path)) as new_side:
            acknowledged, balance = await late_write(old_side, new_side)

        assert acknowledged == [100, 7, 5]
        assert balance == 105, "the acknowledged 7 is lost"

    run(main)


def test_a_barrier_waits_for_a_write_that_has_compared_already(path: Path) -> None:
    """The fence row is locked: a write that found its epoch registered commits before the next leader's barrier, so
    that leader's load sees it."""

    async def main() -> None:
        async with fence_at(path) as old_side, fence_at(path) as new_side:
            old, new = lead_of(1, 10), lead_of(1, 20)
            await old_side.barrier(old)
            has_compared, may_go_on = threading.Event(), threading.Event()

            def slowly(tx: Transaction) -> None:
                has_compared.set()
                assert may_go_on.wait(WAIT_S)
                set_balance(tx, 1, 7)

            writing = asyncio.create_task(old_side.write(old, slowly))
            assert await asyncio.to_thread(has_compared.wait, WAIT_S)
            barrier = asyncio.create_task(new_side.barrier(new))
            await asyncio.wait([barrier], timeout=0.05)
            was_early = barrier.done()
            may_go_on.set()
            await writing
            await barrier
            loaded = await new_side.read(lambda tx: balance_of(tx, 1))

        assert not was_early
        assert loaded == 7

    run(main)


def test_without_the_lock_a_barrier_slips_in_between(path: Path) -> None:
    """Ablation: a comparison outside of the write's transaction acknowledges a write that the new leader never saw."""

    async def main() -> None:
        with contextlib.closing(WithoutLock(path)) as old_side, contextlib.closing(WithoutLock(path)) as new_side:
            old, new = lead_of(1, 10), lead_of(1, 20)
            await old_side.barrier(old)
            old_side.compare(old)
            await new_side.barrier(new)
            loaded = await new_side.read(lambda tx: balance_of(tx, 1))
            old_side.apply(lambda tx: set_balance(tx, 1, 7))  # acknowledged
            await new_side.write(new, lambda tx: set_balance(tx, 1, loaded + 5))

            assert await new_side.read(lambda tx: balance_of(tx, 1)) == 5, "the acknowledged 7 is lost"

    run(main)


# --- epochs -------------------------------------------------------------------------------------------------------


def test_a_leader_that_forgot_its_barrier_cannot_write(path: Path) -> None:
    """Equality, not "at least": a newer epoch that was never registered is refused too, and so is a first one."""

    async def main() -> None:
        async with fence_at(path) as fence:
            with pytest.raises(Fenced) as first:
                await fence.write(lead_of(1, 10), lambda tx: set_balance(tx, 1, 1))
            await fence.barrier(lead_of(1, 10))
            with pytest.raises(Fenced) as newer:
                await fence.write(lead_of(1, 20), lambda tx: set_balance(tx, 1, 1))
            balance = await fence.read(lambda tx: balance_of(tx, 1))

        assert first.value.registered is None
        assert newer.value.registered == 10
        assert balance == 0

    run(main)


def test_a_barrier_below_the_registered_epoch_says_so(path: Path) -> None:
    """EpochRegressed, with both epochs and what an operator has to do; the registered one stays."""

    async def main() -> None:
        async with fence_at(path) as fence:
            await fence.barrier(lead_of(1, 20))
            with pytest.raises(EpochRegressed, match="generation raise") as regressed:
                await fence.barrier(lead_of(1, 10))
            await fence.barrier(lead_of(1, 20))  # the same again is fine
            await fence.write(lead_of(1, 20), lambda tx: set_balance(tx, 1, 1))

        assert (regressed.value.epoch, regressed.value.registered) == (10, 20)

    run(main)


def test_shards_are_fenced_apart(path: Path) -> None:
    """A new leader of one shard refuses nobody else's writes."""

    async def main() -> None:
        async with fence_at(path) as fence:
            await fence.barrier(lead_of(1, 10))
            await fence.barrier(lead_of(2, 11))
            await fence.barrier(lead_of(1, 20))
            await fence.write(lead_of(2, 11), lambda tx: set_balance(tx, 2, 1))

    run(main)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["barrier", "write"]), st.integers(0, 1), st.integers(1, 2), st.integers(1, 5)),
        max_size=30,
    )
)
def test_accepted_epochs_never_decrease(steps: list[tuple[str, int, int, int]]) -> None:
    """Whatever leaders of any epoch do through two connections: accepted writes of a shard have non-decreasing
    epochs, each the one registered at that moment."""

    async def main() -> None:
        registered = {1: 0, 2: 0}
        accepted: dict[int, list[int]] = {1: [], 2: []}
        async with contextlib.AsyncExitStack() as stack:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "epochs.sqlite3"
            sides = [await stack.enter_async_context(fence_at(path)) for _ in range(2)]
            for what, side, shard, epoch in steps:
                lead, fence = lead_of(shard, epoch), sides[side]
                if what == "barrier":
                    try:
                        await fence.barrier(lead)
                    except EpochRegressed:
                        assert registered[shard] > epoch
                    else:
                        assert registered[shard] <= epoch
                        registered[shard] = epoch
                else:
                    try:
                        await fence.write(lead, partial(set_balance, shard=shard, balance=epoch))
                    except Fenced:
                        assert registered[shard] != epoch
                    else:
                        assert registered[shard] == epoch
                        accepted[shard].append(epoch)
        for epochs in accepted.values():
            assert epochs == sorted(epochs)

    run(main)


# --- the lease, at the last moment --------------------------------------------------------------------------------


def test_a_lease_that_ends_during_the_write_undoes_it(path: Path) -> None:
    """The guard is asked right before the commit: LeadershipLost, and nothing was written."""

    async def main() -> None:
        async with fence_at(path) as fence:
            session = Session()
            lead = lead_of(1, 10, session)
            await fence.barrier(lead)

            def outlast(tx: Transaction) -> None:
                set_balance(tx, 1, 7)
                session.is_good = False

            with pytest.raises(LeadershipLost):
                await fence.write(lead, outlast)
            assert await fence.read(lambda tx: balance_of(tx, 1)) == 0
            with pytest.raises(LeadershipLost):
                await fence.barrier(lead)

    run(main)


def test_a_cancelled_caller_leaves_no_write_behind_that_had_not_begun(path: Path) -> None:
    """What still waits in the queue when its handler is cancelled is never applied."""

    async def main() -> None:
        async with fence_at(path) as fence:
            lead = lead_of(1, 10)
            await fence.barrier(lead)
            is_busy, may_go_on = threading.Event(), threading.Event()

            def hold(tx: Transaction) -> None:
                is_busy.set()
                assert may_go_on.wait(WAIT_S)

            holding = asyncio.create_task(fence.read(hold))
            assert await asyncio.to_thread(is_busy.wait, WAIT_S)
            writing = asyncio.create_task(fence.write(lead, lambda tx: set_balance(tx, 1, 7)))
            await asyncio.sleep(0)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
            may_go_on.set()
            await holding
            assert await fence.read(lambda tx: balance_of(tx, 1)) == 0

    run(main)


# --- batches ------------------------------------------------------------------------------------------------------


def test_a_failing_write_takes_no_neighbour_along(path: Path) -> None:
    """Of writes that share a transaction, the fenced, the lost and the broken fail; all others are applied once."""

    async def main() -> None:
        async with fence_at(path) as fence:
            for shard in range(1, 7):
                await fence.barrier(lead_of(shard, 10))

            def add_one(tx: Transaction, shard: int) -> int:
                return set_balance(tx, shard, balance_of(tx, shard) + 1)

            def broken(tx: Transaction) -> int:
                set_balance(tx, 3, 99)
                raise ZeroDivisionError

            answers = await asyncio.gather(
                fence.write(lead_of(1, 10), partial(add_one, shard=1)),
                fence.write(lead_of(2, 9), partial(add_one, shard=2)),
                fence.write(lead_of(3, 10), broken),
                fence.write(lead_of(4, 10, Session(is_good=False)), partial(add_one, shard=4)),
                fence.write(lead_of(5, 10), partial(add_one, shard=5)),
                fence.read(lambda tx: balance_of(tx, 5)),
                fence.write(lead_of(6, 10), partial(add_one, shard=6)),
                return_exceptions=True,
            )
            balances = [await fence.read(partial(balance_of, shard=shard)) for shard in range(1, 7)]

        assert [type(answer) for answer in answers] == [
            int, Fenced, ZeroDivisionError, LeadershipLost, int, int, int
        ]  # fmt: skip
        assert balances == [1, 0, 0, 0, 1, 1]

    run(main)


def test_many_writes_of_one_shard_all_count(path: Path) -> None:
    """1,000 increments, all at once, are 1,000 in the end, and every one was answered with a value of its own."""

    async def main() -> None:
        async with fence_at(path) as fence:
            lead = lead_of(1, 10)
            await fence.barrier(lead)
            values = await asyncio.gather(
                *(fence.write(lead, lambda tx: set_balance(tx, 1, balance_of(tx, 1) + 1)) for _ in range(1_000))
            )
        assert values == list(range(1, 1_001))

    run(main)


def test_an_exit_or_stop_raised_by_a_function_reaches_its_caller_alone(path: Path) -> None:
    """Whatever a function raises, the thread lives on and nobody waits for ever."""

    async def main() -> None:
        async with fence_at(path) as fence:
            lead = lead_of(1, 10)
            await fence.barrier(lead)

            def stop(tx: Transaction) -> None:
                raise StopIteration

            def cancel(tx: Transaction) -> None:
                raise asyncio.CancelledError

            with pytest.raises(RuntimeError, match="StopIteration"):
                await fence.write(lead, stop)
            with pytest.raises(asyncio.CancelledError):
                await fence.write(lead, cancel)
            assert await fence.write(lead, lambda tx: set_balance(tx, 1, 1)) == 1

    run(main)


# --- misuse and trouble -------------------------------------------------------------------------------------------


def test_a_read_cannot_write(path: Path) -> None:
    """It would be a write without a fence."""

    async def main() -> None:
        async with fence_at(path) as fence:
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                await fence.read(lambda tx: set_balance(tx, 1, 7))
            await fence.barrier(lead_of(1, 10))
            assert await fence.write(lead_of(1, 10), lambda tx: set_balance(tx, 1, 1)) == 1

    run(main)


@pytest.mark.parametrize("sql", ["COMMIT", "  rollback", "begin", "END", "savepoint a", "PRAGMA query_only = OFF"])
def test_a_function_cannot_end_the_transaction(path: Path, sql: str) -> None:
    """Such statements are refused, and the write is undone."""

    async def main() -> None:
        async with fence_at(path) as fence:
            lead = lead_of(1, 10)
            await fence.barrier(lead)

            def meddle(tx: Transaction) -> None:
                set_balance(tx, 1, 7)
                tx.execute(sql)

            with pytest.raises(ValueError, match="the fence begins and ends"):
                await fence.write(lead, meddle)
            assert await fence.read(lambda tx: balance_of(tx, 1)) == 0

    run(main)


def test_a_function_that_ends_the_transaction_by_stealth_is_found_out(path: Path) -> None:
    """Its outcome is unknown, and so is that of its neighbours; none of them is run twice, and the leadership hears."""

    async def main() -> None:
        async with fence_at(path) as fence:
            heard: asyncio.Queue[str] = asyncio.Queue()
            lead = lead_of(1, 10, on_unknown=heard.put_nowait)
            await fence.barrier(lead)
            answers = await asyncio.gather(
                fence.write(lead, lambda tx: set_balance(tx, 1, balance_of(tx, 1) + 1)),
                fence.write(lead, lambda tx: tx.execute("/* ! */ COMMIT")),
                return_exceptions=True,
            )
            assert all(isinstance(answer, WriteUnknown) for answer in answers[1:])
            assert "ended the fence's transaction" in await asyncio.wait_for(heard.get(), 5)
            assert await fence.read(lambda tx: balance_of(tx, 1)) == 1

    run(main)


def test_a_schema_that_is_no_sql_is_told(path: Path) -> None:
    """Whoever enters the fence hears of it, and does not wait for ever."""

    async def main() -> None:
        fence = SqliteFence(path, schema=[b"CREATE TABLE t (x)"])  # type: ignore[list-item]  # as said
        with pytest.raises(ResourceUnavailable, match="cannot be opened"):
            await asyncio.wait_for(fence.__aenter__(), 5.0)

    run(main)


def test_a_lock_that_is_not_let_go_is_waited_for_no_longer_than_said(path: Path) -> None:
    """ResourceUnavailable after the busy time-out; nothing was written; the next try may succeed."""

    async def main() -> None:
        async with fence_at(path, busy_timeout_s=0.05) as fence:
            lead = lead_of(1, 10)
            await fence.barrier(lead)
            with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(ResourceUnavailable, match="locked"):
                    await fence.write(lead, lambda tx: set_balance(tx, 1, 7))
                assert await fence.read(lambda tx: balance_of(tx, 1)) == 0  # readers are not held up
                other.execute("ROLLBACK")
            assert await fence.write(lead, lambda tx: set_balance(tx, 1, 8)) == 8

    run(main)


def test_a_closed_fence_has_finished_what_was_asked_and_takes_no_more(path: Path) -> None:
    """close() comes after the writes that wait; then calls are refused at once."""

    async def main() -> None:
        fence = fence_at(path)
        async with fence:
            lead = lead_of(1, 10)
            await fence.barrier(lead)
            writing = [asyncio.create_task(fence.write(lead, lambda tx: set_balance(tx, 1, 7))) for _ in range(3)]
            await asyncio.sleep(0)
            was_healthy = fence.is_healthy
        assert (was_healthy, fence.is_healthy) == (True, False)
        assert await asyncio.gather(*writing) == [7, 7, 7]
        with pytest.raises(ResourceUnavailable, match="closed"):
            await fence.read(lambda tx: balance_of(tx, 1))
        await fence.close()

    run(main)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    """ResourceUnavailable with path and reason, not a foreign error."""

    async def main() -> None:
        with pytest.raises(ResourceUnavailable, match=r"missing/folder.*unable to open"):
            async with fence_at(tmp_path / "missing" / "folder"):
                pass
        (tmp_path / "text").write_text("not a database, but long enough to have a header of one hundred bytes" * 3)
        with pytest.raises(ResourceUnavailable, match="not a database"):
            async with fence_at(tmp_path / "text"):
                pass

    run(main)
