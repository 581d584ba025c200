"""A session's life: its name, its deadline, suspension and loss."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from shardlead.cluster.seat import Seated, SeatTaken, claim_seat, resign_seat
from shardlead.cluster.session import Session
from shardlead.config import LeaseSettings
from shardlead.core.lease import Active, Lost, State, Suspended
from shardlead.errors import NameTaken
from shardlead.store.base import UNGUARDED, Put, Txn
from tests.cluster.stage import Stage, play

Play = Callable[[Callable[[Stage], Coroutine[Any, Any, None]]], None]
SHORT = LeaseSettings(ttl_s=2, renew_interval_s=0.2, margin_s=0.5)


@pytest.fixture(params=["embedded", pytest.param("3.5", marks=pytest.mark.etcd)])
def on_stage(request: pytest.FixtureRequest) -> Play:
    return lambda scene: play(request.param, scene)


class Watched:
    """The states a running session goes through, as a queue to wait on."""

    def __init__(self, session: Session) -> None:
        self.states: asyncio.Queue[State] = asyncio.Queue()
        session.on_change = self.states.put_nowait
        self.task = asyncio.create_task(session.run())

    async def next(self) -> State:
        async with asyncio.timeout(10):
            return await self.states.get()

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})


def test_a_living_name_is_taken_and_free_when_its_session_ends(on_stage: Play) -> None:
    """The second worker of a name waits, and has it the moment it is free."""

    async def scene(stage: Stage) -> None:
        first = await stage.actor("w1")
        second = asyncio.create_task(stage.actor("w1"))
        await asyncio.wait({second}, timeout=0.3)
        assert not second.done()
        await first.session.close()
        actor = await asyncio.wait_for(second, 2)
        assert actor.session.sid != first.session.sid
        assert actor.session.create_revision > first.session.create_revision

    on_stage(scene)


def test_a_name_that_stays_taken_is_refused_with_its_holder(on_stage: Play) -> None:
    """After TTL + 5 s, with the other's address and pid."""

    async def scene(stage: Stage) -> None:
        first = Watched((await stage.actor("w1")).session)
        second = asyncio.create_task(stage.actor("w1", SHORT))
        await asyncio.wait({second}, timeout=0.3)
        stage.clock.jump(0.0)
        with pytest.raises(NameTaken, match=r"w1.test:1 \(pid 1\)"):
            await asyncio.wait_for(second, SHORT.ttl_s + 7)
        await first.end()

    on_stage(scene)


def test_a_name_whose_holder_is_dead_is_waited_for_as_long_as_its_lease_lasts(on_stage: Play) -> None:
    """Longer than TTL + 5 s: nobody renews it, so nobody lives there. Its TTL was another one, or the store has
    prolonged it."""

    async def scene(stage: Stage) -> None:
        first = await stage.actor("w1", LeaseSettings(ttl_s=9, renew_interval_s=1.0, margin_s=0.5))  # and never runs
        actor = await asyncio.wait_for(stage.actor("w1", SHORT), 15)
        assert actor.session.create_revision > first.session.create_revision

    on_stage(scene)


def test_the_guard_is_false_at_once_after_a_pause_and_true_again_only_when_confirmed(on_stage: Play) -> None:
    """A process that was held still for longer than its lease allows: false before any task has run; then a renewal
    and T3, in this order."""

    async def scene(stage: Stage) -> None:
        actor = await stage.actor("w1")
        session = actor.session
        asked = asyncio.Event()
        verdict: asyncio.Queue[bool | None] = asyncio.Queue()

        async def confirm() -> bool | None:
            asked.set()
            return await verdict.get()

        session.confirm = confirm
        watched = Watched(session)
        assert session.is_valid()
        stage.clock.jump(60.0)
        assert not session.is_valid()
        assert isinstance(await watched.next(), Suspended)
        async with asyncio.timeout(5):
            await asked.wait()
        assert not session.is_valid()
        verdict.put_nowait(None)
        verdict.put_nowait(True)
        assert isinstance(await watched.next(), Active)
        assert session.is_valid()
        await watched.end()

    on_stage(scene)


def test_a_machine_that_was_suspended_doubts_its_lease(on_stage: Play, caplog: pytest.LogCaptureFixture) -> None:
    """For far less than the lease: the kernel knows only roughly how long it was, so a renewal and T3 say what holds;
    the log says why."""

    async def scene(stage: Stage) -> None:
        session = (await stage.actor("w1")).session
        watched = Watched(session)
        stage.clock.sleep(0.3)
        assert isinstance(await watched.next(), Suspended)
        assert isinstance(await watched.next(), Active)
        await watched.end()

    on_stage(scene)
    (record,) = [record for record in caplog.records if record.message == "session suspended"]
    assert vars(record)["reason"] == "this machine was suspended for about 0.30 s"


def test_a_refuted_session_is_lost_for_good(on_stage: Play) -> None:
    """T3 says that the record is not ours."""

    async def scene(stage: Stage) -> None:
        session = (await stage.actor("w1")).session

        async def confirm() -> bool | None:
            return False

        session.confirm = confirm
        watched = Watched(session)
        session.doubt("a test")
        assert isinstance(await watched.next(), Suspended)
        assert isinstance(await watched.next(), Lost)
        assert not session.is_valid()
        await asyncio.wait_for(watched.task, 2)

    on_stage(scene)


def test_a_revoked_lease_is_noticed_with_the_next_renewal(on_stage: Play) -> None:
    """An answer without a time-to-live is the end, whatever the clock says."""

    async def scene(stage: Stage) -> None:
        session = (await stage.actor("w1")).session
        watched = Watched(session)
        await stage.store.revoke(session.lease)
        assert isinstance(await watched.next(), Lost)

    on_stage(scene)


def test_renewals_hold_a_session_for_three_times_its_ttl(on_stage: Play) -> None:
    """Its record stands and its guard never becomes false (protocol B, row 16)."""

    async def scene(stage: Stage) -> None:
        session = (await stage.actor("w1", SHORT)).session
        watched = Watched(session)
        until = asyncio.get_running_loop().time() + 3 * SHORT.ttl_s
        while asyncio.get_running_loop().time() < until:
            assert session.is_valid()
            await asyncio.sleep(0.05)  # looks at a guard that must stay true; there is no event to wait for
        assert await stage.get(stage.keys.worker("w1")) is not None
        assert watched.states.empty()
        await watched.end()

    on_stage(scene)


def test_the_seat_has_one_holder(on_stage: Play) -> None:
    """A second candidate is told who sits; the seat is free again when left, and when its session ends."""

    async def scene(stage: Stage) -> None:
        one, two = (await stage.actor("w1")).session, (await stage.actor("w2")).session
        seated = await claim_seat(stage.store, stage.keys, one)
        assert isinstance(seated, Seated)
        assert await claim_seat(stage.store, stage.keys, one) == seated
        assert await claim_seat(stage.store, stage.keys, two) == SeatTaken("w1")
        await resign_seat(stage.store, stage.keys, seated.revision)
        second = await claim_seat(stage.store, stage.keys, two)
        assert isinstance(second, Seated)
        assert second.revision > seated.revision
        await resign_seat(stage.store, stage.keys, seated.revision)  # an old holder leaves nobody's seat
        assert await claim_seat(stage.store, stage.keys, one) == SeatTaken("w2")
        await two.close()
        assert isinstance(await claim_seat(stage.store, stage.keys, one), Seated)

    on_stage(scene)


def test_a_changed_meta_refuses_a_start(on_stage: Play) -> None:
    """T0 compares meta: a session is not registered in a cluster of another shape."""

    async def scene(stage: Stage) -> None:
        kv = await stage.get(stage.keys.meta)
        assert kv is not None
        await stage.store.commit(Txn(UNGUARDED, (Put(kv.key, kv.value),)))  # the test's own hand
        task = asyncio.create_task(stage.actor("w1", SHORT))
        await asyncio.wait({task}, timeout=0.5)
        task.cancel()
        await asyncio.wait({task})
        assert await stage.get(stage.keys.worker("w1")) is None

    on_stage(scene)
