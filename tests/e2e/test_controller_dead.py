"""Failover needs no controller: successors claim by themselves. A lone controller is killed, then others.

One cluster a store: four workers that are no candidates for the seat, one controller, one router.
"""

import asyncio
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import COUNTER, EVEN_S, STORES, Scene, stage
from tests.support.load import Ledger, Load, Mix

FOUR = ("w1", "w2", "w3", "w4")


@pytest.fixture(scope="module", params=STORES)
def lone(request: pytest.FixtureRequest) -> Iterator[Scene]:
    settings = {"router.key_rules": "path:/counters/{key},header:X-Shard-Key"}
    options = {"workers": 4, "controllers": 1, "settings": settings}
    with stage(COUNTER, request.param, options) as scene:
        yield scene


async def controller_dies(lone: Scene) -> None:
    """The seat's holder is gone, and nobody can follow it."""
    for controller in lone.cluster.controllers:
        controller.kill()
        await controller.exited(10)


async def ready(lone: Scene) -> None:
    """Four workers, even, successors assigned, one living controller."""
    if not any(controller.is_running for controller in lone.cluster.controllers):
        await lone.cluster.add_controller()
    await lone.prepare(*FOUR)
    await lone.cluster.wait_planned(EVEN_S)


def test_a_death_without_a_controller_is_survived(lone: Scene) -> None:
    """The controller is killed, then a worker: its successors lead its shards within 500 ms, spread among them, and no
    acknowledged increment is lost."""
    prefix = lone.prefix("alone")

    async def story() -> tuple[Ledger, float, list[int]]:
        await ready(lone)
        await controller_dies(lone)
        async with Load(lone.cluster.routers[0].address, Mix(prefix=prefix, idempotent_share=1.0)) as load:
            await asyncio.sleep(0.5)
            began_s = time.monotonic()
            lone.cluster.workers["w1"].kill()
            await lone.cluster.wait_gone("w1", 5)
            seen = await lone.cluster.wait_led(5)
            led_s = time.monotonic() - began_s
            await asyncio.sleep(0.5)
        return load.ledger, led_s, sorted(seen.counts().values())

    ledger, led_s, counts = lone.run(story())
    assert led_s < 0.5
    assert counts[-1] - counts[0] <= 2, "successors are spread"
    assert ledger.failures() == [], ledger.summary()
    assert ledger.lost(lone.stored(prefix)) == []


def test_two_deaths_at_once_without_a_controller(lone: Scene) -> None:
    """Two of four workers killed in one instant with the controller dead: every shard is led again at once."""

    async def story() -> float:
        await ready(lone)
        await controller_dies(lone)
        began_s = time.monotonic()
        lone.cluster.workers["w2"].kill()
        lone.cluster.workers["w3"].kill()
        await lone.cluster.wait_gone("w2", 5)
        await lone.cluster.wait_gone("w3", 5)
        seen = await lone.cluster.wait_led(15)
        assert set(seen.counts()) == {"w1", "w4"}
        return time.monotonic() - began_s

    assert lone.run(story()) < 2.0


def test_a_death_in_the_middle_of_a_handoff_without_a_controller(lone: Scene) -> None:
    """A worker stops gracefully and one of those who take its shards over is killed meanwhile, with the controller
    dead: every shard is led again, and the stop ends with 0."""

    async def story() -> None:
        await ready(lone)
        await controller_dies(lone)
        mark = lone.cluster.events.mark()
        lone.cluster.workers["w1"].terminate()
        await lone.cluster.events.wait(
            lambda event: event["event"] == "worker" and event["state"] == "draining", timeout_s=10, since=mark
        )
        lone.cluster.workers["w2"].kill()
        assert await lone.cluster.workers["w1"].exited(40) == 0
        await lone.cluster.wait_gone("w2", 5)
        seen = await lone.cluster.wait_led(15)
        assert set(seen.counts()) == {"w3", "w4"}

    lone.run(story())
