"""Real workers on a real store: claims, failover, handoffs, stops and faults, as protocol.md A.3 to A.6 has them."""

import asyncio
import random
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import Any

import orjson
import pytest

from shardlead.cluster.bootstrap import raise_generation
from shardlead.config import ClusterSettings, LeaseSettings
from shardlead.core import duties
from shardlead.core.keyspace import decode, encode
from shardlead.core.model import Eviction, History, LeaderRecord, Meta, Offer, Want, Wish, WorkerRecord, epoch_of
from shardlead.core.ownership import Due, Serving, Waiting
from shardlead.errors import Fenced, LeadershipLost, MetaMismatch, NotLeading, StoreUnavailable, WriteUnknown
from shardlead.parent import WillReader
from shardlead.store.base import Delete, Put
from shardlead.worker import steward
from shardlead.worker.leadership import Leadership
from shardlead.worker.runtime import STORE_AWAY_S
from shardlead.worker.will import LastWill
from tests.cluster.stage import SHARDS
from tests.worker.scene import SHORT, Player, Scene, Script, Step, play

Act = Callable[[Scene], Coroutine[Any, Any, None]]
Play = Callable[[Act], None]
FEW = tuple(range(4))


@pytest.fixture
def on_scene() -> Play:
    return lambda act: play("embedded", act)


@pytest.fixture(params=["embedded", pytest.param("3.5", marks=pytest.mark.etcd)])
def on_each(request: pytest.FixtureRequest) -> Play:
    return lambda act: play(request.param, act)


def orders(*names: str, shards: tuple[int, ...] = FEW) -> dict[int, tuple[str, ...]]:
    return dict.fromkeys(shards, names)


async def led_by_first(scene: Scene, *names: str, **settings: Any) -> list[Player]:
    """These workers, up, the first leading FEW and the others its successors in this order."""
    players = [await scene.start(name, **settings) for name in names]
    await scene.assign(orders(*names))
    await scene.until_serving(names[0], *FEW)
    return players


# --- claims and failover ---


def test_a_worker_claims_what_it_was_assigned_before_it_started(on_each: Play) -> None:
    """Its rank-0 records at its session's start, and nothing that it only succeeds in."""

    async def act(scene: Scene) -> None:
        await scene.assign(orders("w1", "w2"))
        await scene.assign(orders("w2", "w1", shards=(9,)))
        await scene.start("w1")
        await scene.until_serving("w1", *FEW)
        assert scene.leader(9) == ""

    on_each(act)


def test_the_first_successor_takes_over_within_milliseconds(on_each: Play) -> None:
    """The leader's lease is revoked: its rank-0 successor opens all of its shards, without a controller."""

    async def act(scene: Scene) -> None:
        one, *_ = await led_by_first(scene, "w1", "w2", "w3")
        await scene.settle()
        began_s = asyncio.get_running_loop().time()
        await one.kill()
        await scene.until_serving("w2", *FEW)
        assert asyncio.get_running_loop().time() - began_s < 0.5
        assert scene.said("opening", "w3") == []

    on_each(act)


def test_two_deaths_at_once_leave_the_last_in_the_order(on_scene: Play) -> None:
    """Leader and first successor end together: the second claims, without waiting for its rank's turn."""

    async def act(scene: Scene) -> None:
        one, two, _ = await led_by_first(scene, "w1", "w2", "w3")
        await scene.settle()
        await asyncio.gather(one.kill(), two.kill())
        await scene.until_serving("w3", *FEW, within_s=1.0)

    on_scene(act)


def test_a_newcomer_is_placed_once_an_order_of_its_session_names_it(on_scene: Play) -> None:
    """Orders from before its session do not count; nor does it wait where there is nobody to succeed, or for ever."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1")
        await one.worker.wait_placed(10.0)  # alone, and nothing is led
        await scene.assign(orders("w1", "w2"))
        await scene.until_serving("w1", *FEW)
        await one.worker.wait_placed(10.0)  # alone still
        two = await scene.start("w2")
        placed = asyncio.create_task(two.worker.wait_placed(10.0))
        await two.worker.wait_placed(0.5)  # longer than the moment for which no more orders must come
        assert not placed.done()
        await scene.assign({9: ("w1", "w2")})
        await placed

    on_scene(act)


def test_a_name_that_comes_back_claws_nothing_back(on_scene: Play) -> None:
    """Its old orders count as absent for wants; a new one counts."""

    async def act(scene: Scene) -> None:
        one, _ = await led_by_first(scene, "w1", "w2")
        await one.kill()
        await scene.until_serving("w2", *FEW)
        await scene.start("w1")
        await scene.assign({9: ("w1", "w2")})  # what comes after its start it does take: it has looked by then
        await scene.until_serving("w1", 9)
        assert set(scene.leaders().items()) == {(shard, "w2") for shard in FEW} | {(9, "w1")}
        await scene.assign({3: ("w1", "w2")})
        await scene.until_serving("w1", 3)

    on_scene(act)


# --- planned handoff ---


@pytest.mark.parametrize("is_draining", [False, True])
@pytest.mark.parametrize("refusal", [WriteUnknown, Fenced])
def test_a_write_of_unknown_outcome_ends_what_else_runs_under_its_epoch(
    on_scene: Play, refusal: Any, is_draining: bool
) -> None:
    """It may yet be applied, and would undo what another request was told it had written: while serving and, what a
    simulation found to be forgotten, while draining."""

    async def act(scene: Scene) -> None:
        one, _ = await led_by_first(scene, "w1", "w2")
        epoch = one.epoch(0)

        entered = asyncio.Event()

        async def other() -> None:
            async with one.request(0):
                entered.set()
                await asyncio.Event().wait()

        async def refused() -> None:
            async with one.request(0) as subject:
                if is_draining:
                    await scene.assign({0: ("w2", "w1")})
                    await asyncio.wait_for(subject.lead.draining.wait(), 5)
                raise refusal(0, epoch, epoch)

        waiting = asyncio.create_task(other())
        await entered.wait()
        lead = scene.lead(0)
        with pytest.raises(refusal):
            await refused()
        assert not lead.is_valid(0.0)
        with pytest.raises(LeadershipLost):
            await asyncio.wait_for(waiting, 2)
        await scene.until(lambda: scene.epoch(0) > epoch)
        await scene.until_serving("w2" if is_draining else "w1", 0)

    on_scene(act)


def test_a_planned_move_lets_the_running_request_end_first(on_each: Play) -> None:
    """Assignment, want, drain, close, one transaction for leader and epoch, open."""

    async def act(scene: Scene) -> None:
        one, two = await led_by_first(scene, "w1", "w2")
        async with one.request(0) as subject:
            await scene.assign({0: ("w2", "w1")})
            await asyncio.wait_for(subject.lead.draining.wait(), 5)
            assert subject.lead.is_valid()
            assert scene.leader(0) == "w1"
            assert scene.said("close") == []
        await scene.until_serving("w2", 0)
        what = [(word.what, word.worker) for word in scene.words if word.shard == 0]
        assert what == [("opening", "w1"), ("open", "w1"), ("close", "w1"), ("opening", "w2"), ("open", "w2")]
        assert scene.under(scene.keys.inbox("w1") + b"wants/") == []
        assert two.epoch(0) == scene.epoch(0)

    on_each(act)


def test_a_graceful_stop_hands_everything_to_the_successors(on_each: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """By wants of the first in each order; nothing is ever without a leader, however slow the machine is just now."""
    monkeypatch.setattr(steward, "RESIGN_AFTER_S", steward.RESIGN_AFTER_MAX_S)

    async def act(scene: Scene) -> None:
        one, _ = await led_by_first(scene, "w1", "w2")
        assert await one.stop()
        await scene.until_serving("w2", *FEW)
        assert [kv.version for kv in scene.changes if kv.key == scene.keys.leader(0)] == [1, 2]
        assert len(scene.said("close", "w1")) == len(FEW)
        await scene.until(lambda: scene.kv(scene.keys.worker("w1")) is None)

    on_each(act)


def test_shards_wanted_together_are_served_until_their_turn_comes(on_scene: Play) -> None:
    """A stopping worker lets go of a few at a time."""

    async def act(scene: Scene) -> None:
        every = tuple(range(SHARDS))
        ending: list[int] = []

        async def close(_lead: Leadership) -> None:
            ending.append(sum(scene.lead(shard).draining.is_set() for shard in every if scene.leader(shard) == "w1"))

        one = await scene.start("w1", Script(close=close))
        await scene.start("w2")
        await scene.assign(orders("w1", "w2", shards=every))
        await scene.until_serving("w1", *every)
        assert await one.stop()
        await scene.until_serving("w2", *every)
        assert len(ending) == SHARDS
        assert 1 <= ending[0] <= duties.HANDED_AT_ONCE < SHARDS

    on_scene(act)


def test_shards_whose_requests_take_long_hold_up_no_others(on_scene: Play) -> None:
    """More of them than are let go at once, in a move of all."""

    async def act(scene: Scene) -> None:
        every = tuple(range(SHARDS))
        slow = every[: 2 * duties.HANDED_AT_ONCE]
        one = await scene.start("w1", drain_timeout_s=20.0)
        await scene.start("w2")
        await scene.assign(orders("w1", "w2", shards=every))
        await scene.until_serving("w1", *every)
        requests = [await endless(one, shard) for shard in slow]
        await scene.assign(orders("w2", "w1", shards=every))
        await scene.until_serving("w2", *every[len(slow) :])
        assert {scene.leader(shard) for shard in slow} == {"w1"}
        for request in requests:
            request.cancel()
        await scene.until_serving("w2", *slow)

    on_scene(act)


def test_an_order_that_is_read_after_its_leader_has_begun_to_stop_is_acted_on(on_scene: Play) -> None:
    """Inbox and fleet are two watches without a common order: the successor's inbox may be the later one."""

    async def act(scene: Scene) -> None:
        released = asyncio.Event()
        one = await scene.start("w1")
        two = await scene.start("w2", held_back={scene.keys.inbox("w2"): released})
        await scene.until(lambda: two.is_listening)
        await scene.assign(orders("w1", "w2"))
        await scene.until_serving("w1", *FEW)
        one.worker.stop()
        await scene.until(lambda: two.fleet.members["w1"].record.state == "draining")
        assert two.orders == {}
        released.set()
        await scene.until_serving("w2", *FEW)
        assert [kv.version for kv in scene.changes if kv.key == scene.keys.leader(0)] == [1, 2]

    on_scene(act)


def test_an_order_that_is_read_after_its_leaders_death_is_acted_on(on_scene: Play) -> None:
    """The same for an end: its successor need not wait for a controller, or for the shard to be found orphaned."""

    async def act(scene: Scene) -> None:
        released = asyncio.Event()
        one = await scene.start("w1")
        two = await scene.start("w2", held_back={scene.keys.inbox("w2"): released})
        await scene.until(lambda: two.is_listening)
        await scene.assign(orders("w1", "w2"))
        await scene.until_serving("w1", *FEW)
        await one.kill()
        await scene.until(lambda: "w1" not in two.fleet.members)
        assert two.orders == {}
        released.set()
        await scene.until_serving("w2", *FEW, within_s=1.0)

    on_scene(act)


def test_a_graceful_stop_without_assignments_offers_its_shards_around(on_scene: Play) -> None:
    """No controller ever wrote anything: rendezvous finds the heirs."""

    async def act(scene: Scene) -> None:
        one, *_ = await led_by_first(scene, "w1", "w2", "w3")
        await scene.assign(orders(), revoke_from=("w1", "w2", "w3"))
        assert await one.stop()
        await scene.until(lambda: all(scene.is_serving(scene.leader(shard), shard) for shard in FEW))

    on_scene(act)


def test_the_last_worker_gives_everything_up_and_leaves(on_scene: Play) -> None:
    """There is nobody to offer to."""

    async def act(scene: Scene) -> None:
        (one,) = await led_by_first(scene, "w1")
        assert await one.stop()
        await scene.settle()
        assert scene.leaders() == {}
        assert len(scene.said("close", "w1")) == len(FEW)

    on_scene(act)


@pytest.mark.parametrize("is_back", [False, True])
def test_a_stop_without_a_store_ends_soon_after_its_deadline(on_scene: Play, is_back: bool) -> None:
    """What cannot be handed over is closed and left to the lease's end; the rest of the time allowed would be waited
    for nothing. A store that comes back in time still gets everything handed over."""

    async def act(scene: Scene) -> None:
        one, _ = await led_by_first(scene, "w1", "w2", lease=SHORT, shutdown_timeout_s=60.0)
        loop = asyncio.get_running_loop()
        one.transport.flow.clear()
        began_s = loop.time()
        one.worker.stop()
        if is_back:
            session = one.worker.session
            assert session is not None
            await scene.until(lambda: not session.is_active)
            one.transport.flow.set()
        assert await asyncio.wait_for(one.task, 15) == is_back
        assert loop.time() - began_s < SHORT.ttl_s + STORE_AWAY_S + 3.0
        assert len(scene.said("close", "w1")) == len(FEW)
        await scene.until_serving("w2", *FEW)

    on_scene(act)


@pytest.mark.parametrize("is_away", [False, True])
@pytest.mark.parametrize("is_lost", [False, True])
def test_a_lease_that_could_not_be_revoked_is_left_to_the_parent(on_scene: Play, is_lost: bool, is_away: bool) -> None:
    """The last will is withdrawn once there is nothing left to revoke, and not before."""

    async def act(scene: Scene) -> None:
        ours, theirs = socket.socketpair()
        with ours:
            will = LastWill(theirs)
            reader = WillReader(ours)
            one = await scene.start("w1", will=will)
            lease = one.lease
            if is_away:
                one.store.revoke = away  # type: ignore[method-assign]  # the rest of the store stays
            if is_lost:
                session = one.worker.session
                assert session is not None
                one.worker.stop()  # no other session follows, whose will would take the place of this one's
                session.lose("the test")
            else:
                one.worker.stop()
            await asyncio.wait_for(one.task, 15)
            will.close()
            while reader.read():
                pass
            assert orjson.loads(reader.last)["lease"] == (str(lease) if is_away else None)

    async def away(lease: int) -> None:
        raise StoreUnavailable(f"the test's own fault, lease {lease}")

    on_scene(act)


async def endless(player: Player, shard: int) -> "asyncio.Task[None]":
    """A request that has begun and never ends by itself."""
    begun = asyncio.Event()

    async def request() -> None:
        async with player.request(shard):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(request())
    await asyncio.wait_for(begun.wait(), 5)
    return task


async def dummy(scene: Scene, name: str) -> Any:
    """A worker that is only a record: it is up, and does nothing at all."""
    actor = await scene.stage.actor(name)
    kv = await scene.stage.get(scene.keys.worker(name))
    assert kv is not None
    return actor.session


async def want_of(scene: Scene, session: Any, leader: str, shard: int) -> None:
    want = Want(session.name, session.sid, session.lease, scene.epoch(shard), "test")
    await scene.put(scene.keys.want(leader, shard), want, session.lease)


@pytest.mark.parametrize("step", ["want put", "leader draining", "handed over"])
def test_a_handoff_whose_target_dies_is_served_at_once_by_its_old_leader(on_scene: Play, step: str) -> None:
    """Under a new epoch and with a fresh object, whatever step it had come to."""

    async def act(scene: Scene) -> None:
        (one,) = await led_by_first(scene, "w1")
        await scene.assign(orders("w1", "w2"))
        target = await dummy(scene, "w2")
        epoch = scene.epoch(0)
        await scene.settle()
        match step:
            case "want put":
                async with one.request(0):
                    await want_of(scene, target, "w1", 0)
                    await target.close()
            case "leader draining":
                async with one.request(0) as subject:
                    await want_of(scene, target, "w1", 0)
                    await asyncio.wait_for(subject.lead.draining.wait(), 5)
                    await target.close()
            case _:
                await want_of(scene, target, "w1", 0)
                await scene.until(lambda: scene.leader(0) == "w2")
                await target.close()
        await scene.until(lambda: step == "want put" or scene.epoch(0) > epoch, within_s=1.0)
        await scene.until_serving("w1", 0, within_s=1.0)

    on_scene(act)


def test_a_target_that_dies_while_it_opens_is_followed_by_the_old_leader(on_scene: Play) -> None:
    """The successors in the order claim as after any death."""

    async def act(scene: Scene) -> None:
        await led_by_first(scene, "w1")
        opening = asyncio.Event()

        async def hang(_lead: Leadership) -> None:
            opening.set()
            await asyncio.Event().wait()

        two = await scene.start("w2", Script(open=hang))
        await scene.assign({0: ("w2", "w1")})
        await asyncio.wait_for(opening.wait(), 5)
        await two.kill()
        await scene.until_serving("w1", 0, within_s=1.0)

    on_scene(act)


def test_a_drain_that_does_not_end_cancels_the_request_in_time(on_scene: Play) -> None:
    """After `drain_timeout_s` the request is cancelled and its leadership is over; then the shard moves."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1", drain_timeout_s=0.2)
        await scene.start("w2")
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w1", 0)

        request = await endless(one, 0)
        await scene.assign({0: ("w2", "w1")})
        await asyncio.wait({request}, timeout=5)
        assert isinstance(request.exception(), LeadershipLost)
        await scene.until_serving("w2", 0)

    on_scene(act)


# --- the application's faults ---


@pytest.mark.parametrize("fault", ["raises", "is cancelled from within", "hangs"])
def test_a_shard_that_does_not_open_goes_to_the_next_worker(on_scene: Play, fault: str) -> None:
    """It is closed, given up as a failure and offered; the failing worker does not claim it back at once."""

    async def act(scene: Scene) -> None:
        async def fail(_lead: Leadership) -> None:
            match fault:
                case "raises":
                    raise RuntimeError("boom")
                case "hangs":
                    await asyncio.Event().wait()
                case _:
                    raise asyncio.CancelledError

        await scene.start("w1", Script(open=fail), open_timeout_s=0.2, backoff_s=30.0)
        await scene.start("w2")
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w2", 0, within_s=3.0)
        assert len(scene.said("close", "w1", 0)) == 1
        await scene.settle()
        kv = scene.kv(scene.keys.history(0))
        assert kv is not None
        assert decode(History, kv.key, kv.value).short_tenures == 1

    on_scene(act)


@pytest.mark.parametrize("fault", ["raises", "is cancelled from within"])
def test_a_shard_whose_run_fails_is_given_up(on_scene: Play, fault: str) -> None:
    """run() is part of leading: without it the shard is not led here."""

    async def act(scene: Scene) -> None:
        async def fail(_lead: Leadership) -> None:
            raise RuntimeError("boom") if fault == "raises" else asyncio.CancelledError

        await scene.start("w1", Script(run=fail), backoff_s=30.0)
        await scene.start("w2")
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w2", 0, within_s=3.0)
        assert len(scene.said("close", "w1", 0)) == 1

    on_scene(act)


@pytest.mark.parametrize("fault", ["raises", "is cancelled from within", "hangs"])
def test_a_close_that_fails_holds_up_nobody(on_scene: Play, fault: str) -> None:
    """The shard moves on after `close_timeout_s` at the latest; close() is not called twice."""

    async def act(scene: Scene) -> None:
        async def fail(_lead: Leadership) -> None:
            match fault:
                case "raises":
                    raise RuntimeError("boom")
                case "hangs":
                    await asyncio.Event().wait()
                case _:
                    raise asyncio.CancelledError

        one = await scene.start("w1", Script(close=fail))
        await scene.start("w2")
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w1", 0)
        assert await one.stop()
        await scene.until_serving("w2", 0)
        assert len(scene.said("close", "w1", 0)) == 1

    on_scene(act)


def test_an_object_that_is_not_healthy_gives_its_shard_up(on_scene: Play) -> None:
    """Three times no, a second apart; the next worker's object is served instead."""

    async def act(scene: Scene) -> None:
        await scene.start("w1", Script(healthy=lambda lead: lead.shard != 0), backoff_s=30.0)
        await scene.start("w2")
        await scene.assign(orders("w1", "w2", shards=(0, 1)))
        await scene.until_serving("w1", 0, 1)
        await scene.until_serving("w2", 0, within_s=5.0)
        assert scene.leader(1) == "w1"

    on_scene(act)


@pytest.mark.parametrize("place", ["open", "run"])
def test_an_object_that_always_finds_itself_fenced_is_given_up_in_the_end(on_scene: Play, place: str) -> None:
    """A new epoch helps against a newer leader that was; against anything else a few tries are enough."""

    async def act(scene: Scene) -> None:
        async def fenced(lead: Leadership) -> None:
            raise Fenced(lead.shard, lead.epoch, lead.epoch + 1_000_000)

        script = Script(open=fenced) if place == "open" else Script(run=fenced)
        await scene.start("w1", script, backoff_s=30.0)
        await scene.start("w2")
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w2", 0, within_s=3.0)
        assert 2 <= len(scene.said("opening", "w1", 0)) <= 5

    on_scene(act)


@pytest.mark.parametrize("fenced", [True, False])
def test_work_that_will_not_end_costs_an_unfenced_class_its_process(on_scene: Play, fenced: bool) -> None:
    """Storage refuses what is left behind of a fenced class; nothing else would stop an unfenced one's."""

    async def act(scene: Scene) -> None:
        may_end = asyncio.Event()

        async def stubborn(_lead: Leadership) -> None:
            while not may_end.is_set():
                with suppress(asyncio.CancelledError):
                    await may_end.wait()

        one = await scene.start("w1", Script(run=stubborn, fenced=fenced))
        await scene.start("w2", Script(fenced=fenced))
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w1", 0)
        await scene.assign({0: ("w2", "w1")})
        if fenced:
            await scene.until_serving("w2", 0)
            assert one.exits == []
        else:
            await scene.until(lambda: one.exits == [70])
        may_end.set()

    on_scene(act)


def test_an_open_that_will_not_end_costs_an_unfenced_class_its_process(on_scene: Play) -> None:
    """The session is over while it opens, and it heeds no cancellation: the next leader would be the second."""

    async def act(scene: Scene) -> None:
        opening, may_end = asyncio.Event(), asyncio.Event()

        async def stubborn(_lead: Leadership) -> None:
            opening.set()
            while not may_end.is_set():
                with suppress(asyncio.CancelledError):
                    await may_end.wait()

        one = await scene.start("w1", Script(open=stubborn, fenced=False))
        await scene.assign({0: ("w1",)})
        await asyncio.wait_for(opening.wait(), 5.0)
        assert one.worker.session is not None
        one.worker.session.lose("the test")
        await scene.until(lambda: one.exits == [70])
        may_end.set()

    on_scene(act)


@pytest.mark.parametrize("place", ["open", "close"])
def test_an_object_that_will_not_be_cancelled_holds_up_nobody(on_scene: Play, place: str) -> None:
    """Its time is over when it is over."""

    async def act(scene: Scene) -> None:
        may_end = asyncio.Event()

        async def stubborn(_lead: Leadership) -> None:
            while not may_end.is_set():
                with suppress(asyncio.CancelledError):
                    await may_end.wait()

        script = Script(open=stubborn) if place == "open" else Script(close=stubborn)
        one = await scene.start("w1", script, open_timeout_s=0.2, backoff_s=30.0)
        await scene.start("w2")
        await scene.assign({0: ("w1", "w2")})
        if place == "close":
            await scene.until_serving("w1", 0)
            assert await one.stop()
        await scene.until_serving("w2", 0, within_s=3.0)
        may_end.set()

    on_scene(act)


# --- the session's faults ---


async def until_rejoined(scene: Scene, player: Player, lease: int) -> None:
    """Until that worker's record stands on another lease."""
    key = scene.keys.worker(player.name)
    await scene.until(lambda: (kv := scene.kv(key)) is not None and kv.lease != lease)
    await scene.until(lambda: player.worker.is_ready)


def test_an_evicted_session_is_given_up_and_another_one_opened(on_scene: Play) -> None:
    """The order names the session: its work ends, its lease is given back, the successor leads; a second session
    begins with nothing."""

    async def act(scene: Scene) -> None:
        one, _ = await led_by_first(scene, "w1", "w2")
        assert one.worker.session is not None
        lease = one.lease
        order = Eviction(sid=one.worker.session.sid, by="test", reason="wedged")
        await scene.put(scene.keys.eviction("w1"), order)
        await until_rejoined(scene, one, lease)
        await scene.until(lambda: all(scene.is_serving(scene.leader(shard), shard) for shard in FEW))
        assert scene.kv(scene.keys.eviction("w1")) is None
        assert len(scene.said("close", "w1")) == len(FEW)

    on_scene(act)


def test_a_revoked_lease_under_a_living_worker_stops_its_work_in_milliseconds(on_each: Play) -> None:
    """The watch tells that its record is gone: what runs is cancelled, and a new session begins."""

    async def act(scene: Scene) -> None:
        one, _ = await led_by_first(scene, "w1", "w2")
        lease = one.lease
        request = await endless(one, 0)
        await scene.stage.store.revoke(lease)
        await asyncio.wait({request}, timeout=1.0)
        assert isinstance(request.exception(), LeadershipLost)
        await scene.until(lambda: all(scene.is_serving(scene.leader(shard), shard) for shard in FEW), within_s=2.0)
        await until_rejoined(scene, one, lease)

    on_each(act)


def test_a_session_that_is_lost_with_a_claim_under_way_claims_again(on_scene: Play) -> None:
    """A claim that was queued or sent by the lost session does not keep the shard from the next one."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1", Script(open=None), backoff_s=0.2)
        lease = one.lease
        assert one.worker.session is not None
        one.clock.jump(60.0)  # suspended: what falls due now is claimed later
        one.worker.session.doubt("the test")
        assert one.host.envoy is not None
        one.host.feed(0, Due())
        one.worker.session.lose("the test")
        await until_rejoined(scene, one, lease)
        await scene.assign({0: ("w1",)})
        await scene.until_serving("w1", 0, within_s=3.0)
        assert await one.stop()

    on_scene(act)


def test_a_leader_key_that_an_administrator_deleted_is_missed_within_a_ttl(on_scene: Play) -> None:
    """The audit notices, T3 proves it; the shard is served again under a higher epoch, and never by two at once."""

    async def act(scene: Scene) -> None:
        (one,) = await led_by_first(scene, "w1", lease=SHORT)
        epoch = scene.epoch(0)
        await scene.delete(scene.keys.leader(0))
        await scene.until(lambda: one.epoch(0) != epoch, within_s=SHORT.ttl_s + 1.0)
        await scene.until(lambda: scene.epoch(0) > epoch and scene.is_serving("w1", 0), within_s=8.0)

    on_scene(act)


def test_an_offer_of_a_shard_that_one_believes_to_lead_proves_the_contrary(on_scene: Play) -> None:
    """It was written when nobody led: the leadership is checked, found gone, and claimed anew from that offer."""

    async def act(scene: Scene) -> None:
        (one,) = await led_by_first(scene, "w1")
        epoch = scene.epoch(0)
        assert one.worker.session is not None
        offer = Offer(sid=one.worker.session.sid, by="test", reason="orphan")
        await scene.write(Delete(scene.keys.leader(0)), Put(scene.keys.offer("w1", 0), encode(offer), one.lease))
        await scene.until(lambda: scene.epoch(0) > epoch and scene.is_serving("w1", 0), within_s=2.5)

    on_scene(act)


def test_a_claim_that_was_applied_late_is_adopted(on_scene: Play) -> None:
    """A key on our lease that nobody here knows of is found by the audit and served."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1", lease=SHORT)
        assert one.worker.session is not None
        await scene.put(scene.keys.leader(7), LeaderRecord(worker="w1", sid=one.worker.session.sid), one.lease)
        await scene.until_serving("w1", 7, within_s=SHORT.ttl_s + 1.0)

    on_scene(act)


def test_an_idle_shard_goes_on_under_its_epoch_after_a_suspension(on_each: Play) -> None:
    """Nothing ran and nothing was cancelled: the same object, the same epoch."""

    async def act(scene: Scene) -> None:
        (one,) = await led_by_first(scene, "w1")
        epochs = {shard: scene.epoch(shard) for shard in FEW}
        await scene.until(lambda: all(isinstance(one.host.state(shard), Serving) for shard in FEW))  # not just open
        one.clock.jump(60.0)
        assert not one.worker.is_ready
        await scene.until(lambda: one.worker.is_ready, within_s=4.0)
        async with one.request(0):
            pass
        await scene.settle()
        assert epochs == {shard: scene.epoch(shard) for shard in FEW}
        assert len(scene.said("opening")) == len(FEW)

    on_each(act)


@pytest.mark.parametrize("work", ["request", "run", "ended late"])
def test_a_busy_shard_gets_a_new_epoch_after_a_suspension(on_scene: Play, work: str) -> None:
    """What ran when the deadline passed may have a write on its way: cancelled, closed, re-minted, opened afresh."""

    async def act(scene: Scene) -> None:
        async def forever(_lead: Leadership) -> None:
            await asyncio.Event().wait()

        one = await scene.start("w1", Script(run=forever if work == "run" else None))
        await scene.assign({0: ("w1",)})
        await scene.until_serving("w1", 0)
        epoch = scene.epoch(0)
        request = None
        match work:
            case "request":
                request = await endless(one, 0)
                one.clock.jump(60.0)
            case "run":
                await scene.until(lambda: scene.said("run"))
                one.clock.jump(60.0)
            case _:
                async with one.request(0):  # frozen in the middle, and ended before anybody looked at the clock
                    one.clock.jump(60.0)
        await scene.until(lambda: scene.epoch(0) > epoch and scene.is_serving("w1", 0), within_s=5.0)
        if request is not None:
            assert isinstance(request.exception(), LeadershipLost)
        assert len(scene.said("close", "w1", 0)) == 1

    on_scene(act)


def test_an_object_that_is_open_only_after_its_deadline_never_runs(on_scene: Play) -> None:
    """The process slept while it opened, and hears of that before it hears of the deadline."""

    async def act(scene: Scene) -> None:
        async def run(_lead: Leadership) -> None:
            await asyncio.Event().wait()

        async def open_late(lead: Leadership) -> None:
            if not late:
                late.append(lead.epoch)
                one.clock.jump(60.0)

        late: list[int] = []
        one = await scene.start("w1", Script(run=run, open=open_late))
        await scene.assign({0: ("w1",)})
        await scene.until(lambda: scene.said("run"))
        epochs = [word.epoch for word in scene.said("run")]
        assert late[0] not in epochs
        assert [word.epoch for word in scene.said("close")] == late
        await scene.until(lambda: scene.is_serving("w1", 0))
        assert one.epoch(0) == epochs[-1]

    on_scene(act)


def test_a_doubt_ends_with_the_next_renewal_at_once(on_scene: Play) -> None:
    """A clock alarm costs a renewal and a confirmation, not a renewal interval."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1", lease=LeaseSettings(ttl_s=20, renew_interval_s=8.0))
        assert one.worker.session is not None
        one.worker.session.doubt("the test")
        assert not one.worker.is_ready
        await scene.until(lambda: one.worker.is_ready, within_s=1.5)

    on_scene(act)


# --- classes that storage does not fence ---


def test_an_unfenced_successor_waits_after_an_unclean_end_and_not_after_a_clean_one(on_scene: Play) -> None:
    """TTL and margin; the claim itself is made at once."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1", Script(fenced=False), lease=SHORT)
        await scene.start("w2", Script(fenced=False), lease=SHORT)
        three = await scene.start("w3", Script(fenced=False), lease=SHORT)
        await scene.assign({0: ("w1", "w2"), 1: ("w3", "w2")})
        await scene.until(lambda: scene.is_serving("w1", 0) and scene.is_serving("w3", 1))
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        assert await three.stop()
        await scene.until_serving("w2", 1)
        assert loop.time() - began_s < 1.5
        began_s = loop.time()
        await one.kill()
        await scene.until(lambda: scene.leader(0) == "w2", within_s=0.5)
        assert not scene.is_serving("w2", 0)
        await scene.until_serving("w2", 0)
        assert loop.time() - began_s >= SHORT.ttl_s + SHORT.margin_s

    on_scene(act)


def test_a_wait_that_is_broken_off_leaves_the_wait_to_the_next_leader(on_scene: Play) -> None:
    """Who waits and is stopped before it has served has not made the former end a clean one."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1", Script(fenced=False))
        two = await scene.start("w2", Script(fenced=False))
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w1", 0)
        await one.kill()
        await scene.until(lambda: scene.leader(0) == "w2", within_s=0.5)
        assert await two.stop()
        await scene.settle()
        kv = scene.kv(scene.keys.history(0))
        assert kv is not None
        history = decode(History, kv.key, kv.value)
        assert history.ended
        assert not history.clean

    on_scene(act)


def test_an_unfenced_class_waits_after_cancelled_work_whoever_leads_next(on_scene: Play) -> None:
    """What was cancelled in the middle may still take effect: its successor waits, and so does the same worker under a
    new epoch. Work that ended by itself, run() included, costs nothing."""

    async def act(scene: Scene) -> None:
        async def until_draining(lead: Leadership) -> None:
            await lead.draining.wait()

        async def on(_lead: Leadership) -> None:
            await asyncio.Event().wait()

        def script(run: Step | None) -> Script:
            return Script(fenced=False, run=run)

        settings: dict[str, Any] = {"lease": SHORT, "drain_timeout_s": 0.2}
        one = await scene.start("w1", script(until_draining), **settings)
        two = await scene.start("w2", script(None), **settings)
        await scene.assign({0: ("w1", "w2"), 1: ("w1", "w2")})
        await scene.until_serving("w1", 0, 1)
        loop = asyncio.get_running_loop()
        wait_s = SHORT.ttl_s + SHORT.margin_s

        began_s = loop.time()
        await scene.assign({0: ("w2", "w1")})
        await scene.until_serving("w2", 0)
        assert loop.time() - began_s < wait_s  # its run() returned

        request = await endless(one, 1)
        began_s = loop.time()
        await scene.assign({1: ("w2", "w1")})
        await scene.until(lambda: scene.leader(1) == "w2", within_s=1.0)
        with pytest.raises(LeadershipLost):
            await request
        await scene.until_serving("w2", 1)
        assert loop.time() - began_s >= wait_s

        epoch = two.epoch(1)
        request = await endless(two, 1)
        assert two.worker.session is not None
        began_s = loop.time()
        two.worker.session.doubt("the test")
        with pytest.raises(LeadershipLost):
            await request
        await scene.until(lambda: scene.is_serving("w2", 1) and two.epoch(1) > epoch)
        assert loop.time() - began_s >= wait_s

        one.script.run = on
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w1", 0)
        began_s = loop.time()
        await scene.assign({0: ("w2", "w1")})
        await scene.until_serving("w2", 0)
        assert loop.time() - began_s >= wait_s  # its run() went on until it was cancelled

    on_scene(act)


@pytest.mark.parametrize("is_clean", [True, False])
def test_a_handoff_that_a_request_overtakes_waits_only_if_its_offer_says_so(on_scene: Play, is_clean: bool) -> None:
    """The request makes the new leader find its key before the offer tells it how the former tenure ended, and on
    what lease it stood."""

    async def act(scene: Scene) -> None:
        flow = asyncio.Event()
        flow.set()
        longer = replace(SHORT, ttl_s=4)
        one = await scene.start("w1", Script(fenced=False), lease=longer, drain_timeout_s=0.2)
        two = await scene.start("w2", Script(fenced=False), lease=SHORT, held_back={scene.keys.inbox("w2"): flow})
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w1", 0)
        cancelled = None if is_clean else await endless(one, 0)
        async with one.request(0) as subject:
            await scene.assign({0: ("w2", "w1")})
            await subject.lead.draining.wait()
            flow.clear()
        loop = asyncio.get_running_loop()
        await scene.until(lambda: scene.leader(0) == "w2")
        began_s = loop.time()

        async def ask() -> None:
            async with two.worker.admit(scene.key(0), scene.epoch(0)):
                pass

        asked = asyncio.create_task(ask())
        await scene.until(lambda: two.host.state(0) == Waiting(scene.epoch(0)))
        flow.set()
        await scene.until_serving("w2", 0)
        if cancelled is None:
            assert loop.time() - began_s < SHORT.ttl_s / 2
            await asked
        else:
            assert loop.time() - began_s >= longer.ttl_s + longer.margin_s
            with suppress(NotLeading):  # it was parked for as long as it may be
                await asked
            with pytest.raises(LeadershipLost):
                await cancelled

    on_scene(act)


# --- wishes, garbage, shapes ---


def test_freeze_holds_back_new_wants_and_no_failover(on_scene: Play) -> None:
    """A shard that is to move for evenness stays; one that is wanted moves; one whose leader dies is claimed."""

    async def act(scene: Scene) -> None:
        one, two = await led_by_first(scene, "w1", "w2")
        async with one.request(1) as subject:
            await scene.assign({1: ("w2", "w1")}, reason="evenness: test")
            await asyncio.wait_for(subject.lead.draining.wait(), 5)
            await scene.put(scene.keys.freeze, Wish(by="test"))
            await scene.until(lambda: two.fleet.is_frozen)
            await scene.assign({0: ("w2", "w1")}, reason="evenness: test")
            await scene.assign({9: ("w2", "w1")})  # seen after that, and without a leader
            await scene.until_serving("w2", 9)
        await scene.until_serving("w2", 1)
        assert scene.leader(0) == "w1"
        assert len(scene.said("opening", "", 1)) == 2
        assert scene.under(scene.keys.inbox("w1") + b"wants/") == []
        await one.kill()
        await scene.until_serving("w2", *FEW)

    on_scene(act)


def test_a_want_that_the_assignment_names_no_more_is_withdrawn(on_scene: Play) -> None:
    """Else the leader would meet it later, against everybody's wish."""

    async def act(scene: Scene) -> None:
        (one,) = await led_by_first(scene, "w1")
        await scene.start("w2")
        wants = scene.keys.inbox("w1") + b"wants/"
        request = await endless(one, 0)
        one.script.open = None
        await scene.assign({9: ("w1", "w2")})
        await scene.until_serving("w1", 9)
        frozen = await dummy(scene, "w3")  # leads a shard and answers nothing
        await scene.put(scene.keys.leader(10), LeaderRecord(worker="w3", sid=frozen.sid), frozen.lease)
        wants = scene.keys.inbox("w3") + b"wants/"
        await scene.assign({10: ("w2", "w3")})
        await scene.until(lambda: scene.under(wants))
        await scene.assign({10: ("w3", "w2")})
        await scene.until(lambda: not scene.under(wants), within_s=2.0)
        request.cancel()

    on_scene(act)


def test_garbage_in_the_inbox_and_among_the_leaders_stops_nobody(on_each: Play) -> None:
    """Unreadable records, shards that do not exist, leaders that nobody can be: passed over; and what stands in a
    leader's place without a lease, where no lease's end would ever delete it, gives way to a leader."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1")
        assert one.worker.session is not None
        inbox = scene.keys.inbox("w1")
        await scene.write(
            Put(inbox + b"assignments/000001", b"\xff garbage"),
            Put(inbox + b"assignments/one", b"{}"),
            Put(inbox + b"offers/000002", b'{"v": 1}'),
            Put(inbox + b"wants/000003", b"[]"),
            Put(inbox + b"eviction", b"null"),
            Put(scene.keys.leader(4), b"garbage"),
            Put(scene.keys.leaders + b"foreign", b"garbage"),
            Put(scene.keys.history(5), b"garbage"),
            Put(scene.keys.workers + b"w\xc3\xa9", b"garbage"),
            Put(scene.keys.cordon("w1"), b"garbage"),
        )
        await scene.assign({4: ("w1",), 5: ("w1",), 6: ("w1",), SHARDS + 3: ("w1",)})
        await scene.until_serving("w1", 6)
        await scene.until(lambda: (kv := scene.kv(scene.keys.leader(4))) is not None and kv.value != b"garbage")
        await scene.until_serving("w1", 4)
        await scene.settle()
        assert scene.leader(SHARDS + 3) == ""
        assert [key for key in scene.under(scene.keys.inboxes) if key.startswith(scene.keys.inboxes + b"/")] == []
        await scene.write(Delete(inbox + b"eviction"))
        await scene.until_serving("w1", 5)

    on_each(act)


def test_a_raised_generation_lifts_every_epoch(on_scene: Play) -> None:
    """With no worker alive; afterwards each epoch is above all that were."""

    async def act(scene: Scene) -> None:
        (one,) = await led_by_first(scene, "w1")
        before = one.epoch(0)
        await one.stop()
        await raise_generation(scene.stage.store, scene.keys)
        two = await scene.start("w1")
        await scene.until(lambda: two.epoch(0))
        assert two.epoch(0) > epoch_of(1, 0) > before
        async with two.request(0) as subject:
            assert subject.lead.epoch == two.epoch(0)

    on_scene(act)


def test_another_clusters_meta_is_refused_with_the_field(on_scene: Play) -> None:
    """A shape that somebody named explicitly and that differs; and a cluster of another name."""

    async def act(scene: Scene) -> None:
        with pytest.raises(MetaMismatch, match="shards"):
            await scene.start("w1", explicit=("shards",), cluster=ClusterSettings(name="test", shards=SHARDS * 2))
        kv = scene.kv(scene.keys.meta)
        assert kv is not None
        foreign = replace(decode(Meta, kv.key, kv.value), cluster="other")
        await scene.put(scene.keys.meta, foreign)
        with pytest.raises(MetaMismatch, match="cluster"):
            await scene.start("w1")

    on_scene(act)


def test_a_meta_that_changes_under_a_worker_is_met_without_a_storm(on_scene: Play) -> None:
    """The session is given up and a new one opened under the new meta."""

    async def act(scene: Scene) -> None:
        (one,) = await led_by_first(scene, "w1")
        lease = one.lease
        kv = scene.kv(scene.keys.meta)
        assert kv is not None
        await scene.write(Put(kv.key, kv.value))
        await until_rejoined(scene, one, lease)
        await scene.until_serving("w1", *FEW)

    on_scene(act)


def test_a_record_that_another_hand_set_back_to_up_says_draining_again(on_scene: Play) -> None:
    """While a worker leaves, its record is compared with what it should say: nobody is to send it shards."""

    async def act(scene: Scene) -> None:
        (one,) = await led_by_first(scene, "w1")
        request = await endless(one, 0)
        key = scene.keys.worker("w1")
        kv = scene.kv(key)
        assert kv is not None
        record = decode(WorkerRecord, key, kv.value)
        leaving = asyncio.create_task(one.stop())
        await scene.until(lambda: b'"draining"' in getattr(scene.kv(key), "value", b""))
        await scene.put(key, record, one.lease)
        await scene.until(lambda: b'"draining"' in getattr(scene.kv(key), "value", b""), within_s=2.0)
        request.cancel()
        assert await leaving

    on_scene(act)


def test_a_stop_is_heard_while_a_taken_name_is_waited_for(on_scene: Play) -> None:
    """A worker without a session has nothing to hand over."""

    async def act(scene: Scene) -> None:
        await dummy(scene, "w1")
        player = scene.player("w1")
        async with player.store, player.worker:
            task = asyncio.create_task(player.worker.run())
            await asyncio.wait({task}, timeout=0.2)
            player.worker.stop()
            assert await asyncio.wait_for(task, 1.0)

    on_scene(act)


def test_a_clock_that_is_ahead_elsewhere_delays_no_failover(on_scene: Play) -> None:
    """Wall clocks are for people: a history from the future brakes nothing."""

    async def act(scene: Scene) -> None:
        await scene.start("w2")
        history = History(worker="w1", sid="s", since=4e9, reason="test")
        await scene.put(scene.keys.history(0), history)
        await scene.assign({0: ("w2",)})
        await scene.until_serving("w2", 0, within_s=1.5)

    on_scene(act)


def test_admit_refuses_what_is_led_elsewhere(on_scene: Play) -> None:
    """With the leader, if known: whom it was handed to."""

    async def act(scene: Scene) -> None:
        one, two = await led_by_first(scene, "w1", "w2")
        epoch = one.epoch(0)
        await scene.assign({0: ("w2", "w1")})
        await scene.until_serving("w2", 0)
        with pytest.raises(NotLeading, match="w2"):
            async with one.worker.admit(scene.key(0), epoch):
                pytest.fail("not led here any more")
        async with two.worker.admit(scene.key(0).encode(), scene.epoch(0)):
            pass

    on_scene(act)


# --- everything at once ---


@pytest.mark.parametrize("seed", range(4))
def test_whatever_gets_lost_each_shard_is_served_by_one_in_the_end(on_scene: Play, seed: int) -> None:
    """Moves, deaths, returns, evictions and pauses, while every tenth transaction gets lost, goes unanswered or
    arrives late: no epoch is opened twice, none goes back, no two leaderships are valid at once; and when it is over
    all is led as assigned."""

    async def act(scene: Scene) -> None:
        await turmoil(scene, random.Random(seed), steps=25)

    on_scene(act)


async def turmoil(scene: Scene, rng: random.Random, steps: int) -> None:
    names = ("w1", "w2", "w3")
    for name in names:
        await scene.start(name)
    await scene.assign({shard: rotated(names, shard) for shard in range(SHARDS)})
    dead: set[str] = set()
    for _ in range(steps):
        for name, player in scene.players.items():
            player.transport.loss = 0.1 if name not in dead else 0.0
        living = [name for name in names if name not in dead]
        name = rng.choice(living)
        player = scene.players[name]
        words = len(scene.words)
        what = rng.choice(("move", "move", "move", "kill", "stop", "evict", "pause", "request"))
        match what:
            case "move":
                await scene.assign({rng.randrange(SHARDS): tuple(rng.sample(names, 3)) for _ in range(4)})
            case "kill" if len(living) > 1:
                await player.kill()
                dead.add(name)
            case "stop" if len(living) > 1:
                await player.stop()
                await scene.settle()
                dead.add(name)
            case "evict" if player.worker.session is not None:
                order = Eviction(sid=player.worker.session.sid, by="test", reason="turmoil")
                await scene.put(scene.keys.eviction(name), order)
            case "pause":
                player.clock.jump(60.0)
            case "request" if player.worker.led:
                with suppress(NotLeading, LeadershipLost):
                    async with player.request(rng.choice(list(player.worker.led))):
                        await scene.put(scene.keys.prefix + b"test/request", Wish(by="test"))
            case _:
                continue
        if dead and rng.random() < 0.5:
            back = rng.choice(sorted(dead))
            dead.discard(back)
            await scene.start(back)
        if rng.random() < 0.5:
            with suppress(AssertionError):
                await scene.until(lambda: len(scene.words) > words, within_s=0.2)  # noqa: B023  # awaited right here
    for name in sorted(dead):
        await scene.start(name)
    for player in scene.players.values():
        player.transport.loss = 0.0
    await scene.until(lambda: all(player.worker.is_ready for player in scene.players.values()))
    leases = {player.lease for player in scene.players.values()}
    await scene.assign({shard: rotated(names, shard) for shard in range(SHARDS)})

    def is_as_assigned() -> bool:
        return all(scene.is_serving(rotated(names, shard)[0], shard) for shard in range(SHARDS))

    def has_new_session() -> bool:
        return leases != {player.lease for player in scene.players.values()}

    await scene.until(lambda: is_as_assigned() or has_new_session(), within_s=12.0)
    if not is_as_assigned():  # the last eviction came late: to a new session the orders before it count as absent
        await scene.until(lambda: all(player.worker.is_ready for player in scene.players.values()))
        await scene.assign({shard: rotated(names, shard) for shard in range(SHARDS)})
        await scene.until(is_as_assigned, within_s=12.0)


def rotated(names: tuple[str, ...], by: int) -> tuple[str, ...]:
    at = by % len(names)
    return names[at:] + names[:at]
