"""One run of the simulation: a scenario, a seed, its trace, and what it broke.

python -m tests simulate --scenario crashes --first-seed 17 --seeds 1
"""

import asyncio
import contextlib
import gc
import hashlib
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from shardlead.clock import NS_PER_S
from shardlead.virtual import Stuck
from tests.simulation import invariants
from tests.simulation.invariants import Violation
from tests.simulation.nemesis import Nemesis
from tests.simulation.processes import following_mirrors, noting_sends
from tests.simulation.scenarios import ALL, Scenario
from tests.simulation.world import World

LIVE_EXTRA_S = 1.0
LEADER_CHANGE_EXTRA_S = 5.0
GC_EVERY = 10  # runs: collecting garbage takes as long as a tenth of a run
QUIET_EVERY = 16  # runs: one that must become even and then keep still, which takes three times as long as its harm
SETTLE_S = 25.0
QUIET_S = 15.0
CLAIM_S = 1.0
"""What a claim takes beside the TTL: history read, transaction, open with a barrier and a load."""


@dataclass
class Outcome:
    """What one run brought."""

    scenario: str
    seed: int
    violations: list[Violation] = field(default_factory=list)
    tolerated: list[Violation] = field(default_factory=list)  # what this scenario may break
    trace: list[str] = field(default_factory=list)
    deeds: tuple[str, ...] = ()
    steps: int = 0
    virtual_s: float = 0.0
    real_s: float = 0.0
    leaderships: int = 0
    requests: int = 0
    failed: int = 0
    whole_after_s: float = -1.0

    @property
    def digest(self) -> str:
        """Of the trace: equal for equal runs."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()[:16]

    @property
    def command(self) -> str:
        """What runs it again."""
        return f"python -m tests simulate --scenario {self.scenario} --first-seed {self.seed} --seeds 1 --trace"

    def __str__(self) -> str:
        what = "; ".join(map(str, self.violations)) or "clean"
        return f"{self.scenario} {self.seed}: {what}"


def simulate(
    name: str,
    seed: int,
    *,
    scenario: Scenario | None = None,
    is_tracing: bool = False,
    patch: Callable[[World], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Outcome:
    """Run it. What is broken stands in the outcome, tolerated invariants excepted; nothing is raised for it."""
    scenario = scenario if scenario is not None else ALL[name]
    outcome = Outcome(name, seed)
    logger = logging.getLogger("shardlead")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    began = time.perf_counter()
    if seed % GC_EVERY == 0:
        gc.collect()
    gc.disable()
    try:
        world = World(seed, scenario.setup, is_tracing=is_tracing)
        rng = random.Random(world.rng.getrandbits(64))
        nemesis = Nemesis(world, rng, scenario.chosen(rng), scenario.mean_pause_s)
        outcome.deeds = tuple(nemesis.deeds)
        try:
            with noting_sends(world), following_mirrors(world), patch(world):
                world.loop.run_until_complete(_live(world, nemesis, scenario, outcome))
        except Stuck as exc:
            world.witness.fail("STUCK", str(exc))
        except RuntimeError:
            if not world.witness.violations:
                raise
        outcome.violations = [each for each in world.witness.violations if each.name not in world.tolerated]
        outcome.tolerated = [each for each in world.witness.violations if each.name in world.tolerated]
        outcome.trace = world.trace
        outcome.steps = world.loop.steps
        outcome.virtual_s = world.loop.true_ns() / NS_PER_S
        outcome.leaderships = world.witness.leaderships
        outcome.requests = world.witness.requests
        outcome.failed = sum(operation.outcome != "ok" for operation in world.history)
        world.abandon()
    finally:
        gc.enable()
        logger.setLevel(level)
    outcome.real_s = time.perf_counter() - began
    return outcome


async def _live(world: World, nemesis: Nemesis, scenario: Scenario, outcome: Outcome) -> None:
    await world.begin()
    await nemesis.run(scenario.duration_s)
    world.heal()
    healed_ns = world.loop.true_ns()
    limit_s = world.setup.ttl_s + CLAIM_S + (LEADER_CHANGE_EXTRA_S if nemesis.has_changed_leader else LIVE_EXTRA_S)
    limit_s += scenario.heals_late_s + world.brake_s()
    is_whole = await world.until_whole(limit_s)
    if not is_whole and (braked_s := world.brake_s()):  # by what struck before everything was healed, and ended since
        limit_s += braked_s
        is_whole = await world.until_whole(braked_s)
    if not is_whole:
        missing = world.what_is_missing()
        is_late = await world.until_whole(60.0)
        after_s = (world.loop.true_ns() - healed_ns) / NS_PER_S
        invariants.whole_in_time(world.witness, limit_s, after_s if is_late else None, missing)
    outcome.whole_after_s = (world.loop.true_ns() - healed_ns) / NS_PER_S
    await asyncio.sleep(1.0)
    if world.seed % QUIET_EVERY == 0 and not scenario.has_failures(nemesis.deeds):
        await world.be_quiet(SETTLE_S, QUIET_S)
    await world.finish()
    if scenario.never_fails:
        invariants.no_request_fails(world.witness)
