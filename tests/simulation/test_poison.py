"""I12: a shard that kills whoever opens it takes down few workers, and claims stay paced."""

import asyncio
from collections import Counter
from itertools import pairwise

from shardlead.clock import NS_PER_S
from tests.simulation.world import Setup, World

POISONED = 3
MINUTES = 15
RESTART_S = 1.0
DEATHS_MAX = 6 + MINUTES + 3
"""Three before the brake, then after 1, 2, 4, … seconds, then once a minute; and some to spare for the restarts."""
CLAIMS_PER_S_MAX = 24
"""The shards of a dead worker are claimed at once, each once; not again and again."""


def test_a_shard_that_kills_its_workers_is_braked_and_the_others_are_served() -> None:
    world = World(1, Setup(clients=0))
    world.loop.steps_max = 3_000_000

    async def story() -> None:
        await world.begin()
        world.manners.poison = POISONED
        leader = world.etcd.get(world.keyspace.leader(POISONED))
        next(process for process in world.living if leader and process.name in leader.value.decode()).crash()
        until_ns = world.loop.true_ns() + MINUTES * 60 * NS_PER_S
        while world.loop.true_ns() < until_ns:
            await asyncio.sleep(RESTART_S)
            for name in world.founders:
                if not world.workers[name].is_alive:
                    world.start_worker(name)

    try:
        world.loop.run_until_complete(story())
    finally:
        world.abandon()
    assert world.witness.violations == []
    deaths = [float(line.split()[0]) for line in world.trace if line.endswith("is killed")]
    assert 6 < len(deaths) <= DEATHS_MAX, deaths
    assert min(later - earlier for earlier, later in pairwise(deaths[8:])) > 30, deaths
    claims = Counter(
        change.true_ns // NS_PER_S
        for change in world.etcd.history
        if world.is_leader_key(change.key) and change.value is not None
    )
    assert max(claims.values()) <= CLAIMS_PER_S_MAX
    last_s = max(claims)
    unled = [shard for shard in range(world.shards) if world.etcd.get(world.keyspace.leader(shard)) is None]
    assert set(unled) <= {POISONED}, (unled, last_s)
