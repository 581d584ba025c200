"""The row about handoffs: whoever dies, and whenever, the shard is served again soon, and by one."""

import asyncio
from typing import Final

import pytest

from shardlead.store import gateway
from shardlead.store.transport import Answer
from shardlead.worker.leadership import Leadership
from tests.support.between import Sent, held_for_ever
from tests.worker.scene import Player, Scene, Script, play

SOON_S: Final = 3.0
"""Far from any lease's end: a process that dies has its lease revoked, and its successors claim at once."""


async def holding(one: Player, has_begun: asyncio.Event) -> None:
    """A request of shard 0 that does not end by itself."""
    async with one.request(0):
        has_begun.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("step", ["wanted", "draining", "closing", "sent", "applied, not answered", "handed over"])
def test_30_a_leader_that_dies_in_a_handoff_leaves_its_shard_to_the_target_at_once(step: str) -> None:
    """KCL (#1718, #1729, #1765, #1788) needed several mends for handoffs that hang when one side dies, and for a former
    owner that goes on renewing what it gave away. Here the leader dies at each step of T5: the target leads within
    moments; the transaction of the dead that arrives late changes nothing; and once the shard was handed over the
    former leader's end touches nobody. (That the target dies at each step: tests/worker/test_worker.py.)"""

    async def act(scene: Scene) -> None:
        closing, is_dead = asyncio.Event(), asyncio.Event()

        async def hang(_lead: Leadership) -> None:
            closing.set()
            if step == "closing":
                await is_dead.wait()

        one = await scene.start("w1", Script(close=hang), close_timeout_s=20.0, drain_timeout_s=20.0)
        two = await scene.start("w2")
        await scene.assign({0: ("w1", "w2")})
        await scene.until_serving("w1", 0)
        epoch, has_begun, sent_off, late = scene.epoch(0), asyncio.Event(), asyncio.Event(), list[Sent]()

        async def handoff(sent: Sent) -> Answer:
            if not sent.is_about(scene.keys.leader(0), scene.keys.offer("w2", 0)):
                return await one.transport.forward(sent)
            late.append(sent)
            if step == "applied, not answered":
                await one.transport.forward(sent)
            sent_off.set()
            return await held_for_ever(sent)  # it dies here

        request = None
        if step in ("wanted", "draining"):
            request = asyncio.create_task(holding(one, has_begun))
            await has_begun.wait()
        if step in ("sent", "applied, not answered"):
            one.transport.by[gateway.TXN] = handoff
        if step == "wanted":
            two.transport.mute(scene.keys.inbox("w2"))
        await scene.assign({0: ("w2", "w1")})
        match step:
            case "wanted":
                two.transport.unmute()
                await scene.until(lambda: scene.kv(scene.keys.want("w1", 0)) is not None)
            case "draining":
                await scene.until(lambda: scene.lead(0).draining.is_set())
            case "closing":
                await asyncio.wait_for(closing.wait(), 5)
            case "sent" | "applied, not answered":
                await asyncio.wait_for(sent_off.wait(), 5)
            case _:
                await scene.until_serving("w2", 0)
        moved = scene.epoch(0) if step == "handed over" else 0
        one.transport.by[gateway.TXN] = held_for_ever  # the dead send nothing more
        dying = asyncio.create_task(one.kill())
        is_dead.set()
        await dying
        if request is not None:
            request.cancel()
        await scene.until_serving("w2", 0, within_s=SOON_S)
        assert scene.epoch(0) > epoch
        if step == "sent":
            standing = scene.epoch(0)
            answer = await two.transport.forward(late[0])
            assert answer.status != 200 or b'"succeeded"' not in answer.body
            await scene.settle()
            assert scene.epoch(0) == standing
        if moved:
            await scene.settle()
            assert scene.epoch(0) == moved
            assert len(scene.said("opening", "w2", 0)) == 1
        kv = scene.kv(scene.keys.leader(0))
        assert kv is not None
        assert kv.lease == two.lease

    play("embedded", act)
