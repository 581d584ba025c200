"""Letters, on the embedded store and on a real etcd."""

from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from shardlead.cluster.courier import Ticked, TickLost
from tests.cluster.stage import SHARDS, Stage, play

Play = Callable[[Callable[[Stage], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=["embedded", pytest.param("3.5", marks=pytest.mark.etcd)])
def on_stage(request: pytest.FixtureRequest) -> Play:
    return lambda scene: play(request.param, scene)


def test_orphans_are_offered_in_one_transaction_and_led_ones_are_passed_over(on_stage: Play) -> None:
    """Thousands of shards without a leader must not cost a round trip each."""

    async def scene(stage: Stage) -> None:
        one, two = await stage.actor("w1"), await stage.actor("w2")
        ticked = await one.courier.tick(0, 1)
        assert isinstance(ticked, Ticked)
        await two.election.claim([3], "test")
        member = await two.member()
        assert await one.courier.offer(range(SHARDS), "w2", member, ticked.revision, "orphan") == SHARDS - 1
        offers = [await stage.get(stage.keys.offer("w2", shard)) for shard in range(SHARDS)]
        assert offers[3] is None
        standing = [offer for offer in offers if offer is not None]
        assert len({offer.mod_revision for offer in standing}) == 1
        assert {offer.lease for offer in standing} == {two.session.lease}

    on_stage(scene)


def test_no_orphan_is_offered_on_an_old_tick_or_to_the_dead(on_stage: Play) -> None:
    """Who looked at an older tick has been overtaken; an offer on a lease that is gone would be for nobody."""

    async def scene(stage: Stage) -> None:
        one, two = await stage.actor("w1"), await stage.actor("w2")
        member = await two.member()
        first = await one.courier.tick(0, 1)
        assert isinstance(first, Ticked)
        assert isinstance(await two.courier.tick(0, 1), TickLost)
        second = await two.courier.tick(first.revision, 2)
        assert isinstance(second, Ticked)
        assert await one.courier.offer([1, 2], "w2", member, first.revision, "orphan") == 0
        await two.session.close()
        assert await one.courier.offer([1, 2], "w2", member, second.revision, "orphan") == 0
        assert await stage.count(stage.keys.inboxes) == 0

    on_stage(scene)
