"""The first start of a fleet."""

import asyncio
import time
from collections import Counter

import pytest

from tests.e2e.conftest import COUNTER, STORES, stage


@pytest.mark.parametrize("store", STORES)
def test_a_first_start_is_even_and_moves_no_shard_twice(store: str) -> None:
    """Three workers started within two seconds: leadership is even within one after at most 10 s, and no shard has
    moved twice: it stayed where it was placed, or moved once, to a worker that came up after membership had been still
    for a second (a machine under load starts processes that far apart)."""
    with stage(COUNTER, store, {"workers": 0}) as scene:

        async def story() -> tuple[float, Counter[int]]:
            began_s = time.monotonic()
            started = []
            for _ in range(3):
                started.append(asyncio.ensure_future(scene.cluster.add_worker()))
                await asyncio.sleep(0.5)
            await asyncio.gather(*started)
            await scene.cluster.wait_map(
                lambda seen: seen.is_led and seen.spread <= 1 and len(seen.workers) == 3, "even over three", 15
            )
            took_s = time.monotonic() - began_s
            await asyncio.sleep(2)
            return took_s, Counter(
                event["shard"] for event in scene.cluster.events.all if event["event"] == "leader" and event["worker"]
            )

        took_s, led = scene.run(story())
        assert took_s < 10
        assert max(led.values()) <= 2, "each shard was placed once and moved at most once"
