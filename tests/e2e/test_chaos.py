"""Faults at random under load: whatever came together, what was promised holds. Long; a seed replays the order."""

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable

import pytest

from tests.e2e.conftest import COUNTER, STORES, Scene, stage
from tests.support.load import Ledger, Load, Mix

TTL_S = 3
NAMES = ("w1", "w2", "w3", "w4")
CHAOS_S = 60.0
HEALED_S = TTL_S + 15.0


class Monkey:
    """One fault after the other; never all workers at once."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene, self.rng = scene, rng
        self.done: list[str] = []

    async def play(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        faults: list[Callable[[str], Awaitable[None]]] = [
            *(self.crash, self.crash, self.lose_host, self.freeze_briefly, self.freeze, self.roll, self.roll),
            *(self.drain, self.two_at_once, self.store_pause),
        ]
        while time.monotonic() < until_s:
            fault = self.rng.choice(faults)
            name = self.rng.choice(NAMES)
            self.done.append(f"{fault.__name__}({name})")
            await fault(name)
            await asyncio.sleep(self.rng.random() * 2)
            await self.revive()

    async def revive(self) -> None:
        """Start whoever is dead; a host that is lost keeps its name until its lease ends."""
        cluster = self.scene.cluster
        dead = [name for name in NAMES if not cluster.workers[name].is_running]
        await asyncio.gather(*(cluster.add_worker(name) for name in dead))

    async def crash(self, name: str) -> None:
        self.scene.cluster.workers[name].kill()
        await self.scene.cluster.workers[name].exited(20)

    async def lose_host(self, name: str) -> None:
        self.scene.cluster.workers[name].kill_host()
        await self.scene.cluster.workers[name].exited(20)

    async def freeze_briefly(self, name: str) -> None:
        await self._freeze(name, self.rng.random())

    async def freeze(self, name: str) -> None:
        await self._freeze(name, TTL_S + self.rng.random() * 2)

    async def _freeze(self, name: str, seconds: float) -> None:
        self.scene.cluster.workers[name].stop()
        await asyncio.sleep(seconds)
        self.scene.cluster.workers[name].cont()

    async def roll(self, name: str) -> None:
        await self.scene.cluster.restart(name)

    async def drain(self, name: str) -> None:
        await self.scene.cluster.command("drain", name, "--wait", "0")
        await asyncio.sleep(self.rng.random() * 2)
        await self.scene.cluster.command("drain", name, "--undo")

    async def two_at_once(self, name: str) -> None:
        other = NAMES[(NAMES.index(name) + 1) % len(NAMES)]
        self.scene.cluster.workers[name].kill()
        self.scene.cluster.workers[other].kill()
        await self.scene.cluster.workers[name].exited(20)
        await self.scene.cluster.workers[other].exited(20)

    async def store_pause(self, _name: str) -> None:
        store = self.scene.cluster.store
        assert store is not None
        store.stop()
        await asyncio.sleep(self.rng.random() * (TTL_S + 2))
        store.cont()


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("store", STORES)
def test_chaos(store: str, seed: int) -> None:
    """A minute of crashes, lost hosts, freezes, restarts, drains and store pauses under load: no acknowledged increment
    is lost or counted twice, no two leaders answer under one epoch, no request gets an answer that it should not, and
    afterwards every shard is led and leadership is even."""
    options = {
        "workers": len(NAMES),
        "ttl_s": TTL_S,
        "settings": {"router.key_rules": "path:/counters/{key}", "router.hold_timeout_s": 20},
    }
    with stage(COUNTER, store, options) as scene:
        monkey = Monkey(scene, random.Random(seed))

        async def story() -> Ledger:
            await scene.prepare(*NAMES)
            mix = Mix(rate=200, prefix="chaos", idempotent_share=0.5, seed=seed, timeout_s=60)
            async with Load(scene.cluster.routers[0].address, mix) as load:
                await monkey.play(CHAOS_S)
                with contextlib.suppress(TimeoutError):
                    await load.answered(100, timeout_s=HEALED_S)
                await scene.cluster.wait_even(HEALED_S)
                healed_s = load.now_s()
                await asyncio.sleep(2)
            after = load.ledger.between(healed_s, float("inf"))
            assert after.failures() == [], after.summary()
            return load.ledger

        try:
            ledger = scene.run(story())
        finally:
            print(f"seed {seed}: {' '.join(monkey.done)}")
        print(ledger.summary())
        assert ledger.split_leaderships() == []
        assert ledger.values_answered_twice() == []
        assert ledger.lost(scene.stored("chaos")) == []
        for entry in ledger.failures():
            is_unknown = entry.status == 502 and entry.error == "outcome-unknown"
            is_plain_post = entry.is_post and not entry.idempotency_key
            # the demo's own answer while a frozen process holds SQLite's write lock has no problem type
            is_refused = entry.status == 503 and entry.error in ("not-led", "suspended", "")
            assert is_refused or (is_unknown and is_plain_post), f"{entry}\n{ledger.summary()}"
