"""The scenarios: what is done to a cluster under load, and what is promised meanwhile.

Law: a scenario only acts, through the stage; what came of it is judged by its promises from the result alone. Shares
of the duration say when things happen at the earliest; what takes longer lengthens the load, up to OVERTIME_S.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from loadtest.promises import (
    NO_VIOLATIONS,
    NONE_FAILED,
    NOTHING_MOVED,
    ONLY_UNKNOWN,
    SOMETHING_MOVED,
    Promise,
    failover_within,
    others_within,
    pause_within,
)
from loadtest.stage import EVEN_TIMEOUT_S, LED_MARGIN_S, Stage
from shardlead.core.duties import SHORT_TENURE_S
from shardlead.core.model import TICK_S

OVERTIME_S: Final = 240.0
TTL_S: Final = 5
PAUSE_MS: Final = 50.0
FAILOVER_MS: Final = 300.0
OTHERS_P99_MS: Final = 50.0
KILLS_MAX: Final = 12
KILL_GAP_S: Final = SHORT_TENURE_S + 2 * TICK_S  # tenures are told by ticks, and those are coarse
CALM: Final = 0.2  # of the duration, before anything is done
LATEST: Final = 0.85  # of the duration: nothing new is begun later


@dataclass(frozen=True)
class Scenario:
    """What is done, and what is promised. `promises` takes the lease's time-out."""

    name: str
    summary: str
    play: Callable[[Stage], Awaitable[None]]
    promises: Callable[[int], tuple[Promise, ...]]
    workers_min: int = 1
    controllers: int = 0
    etcd_members: int = 1
    ttl_s: int = TTL_S
    is_for_any: bool = False
    """Whether it needs nothing but requests, so that a running cluster will do without --do."""
    needs_gates: bool = False


async def steady(stage: Stage) -> None:
    """Nothing is done."""


async def scale_out(stage: Stage) -> None:
    """One worker more."""
    await stage.until(CALM)
    stage.mark("one worker more starts")
    worker = await stage.cluster.add_worker()
    stage.mark(f"{worker.name} is up")
    await stage.cluster.wait_even(EVEN_TIMEOUT_S)
    stage.mark("even")


async def rolling_restart(stage: Stage) -> None:
    """Each worker stops gracefully and starts again, one after another."""
    names = list(stage.cluster.workers)
    for number, name in enumerate(names):
        await stage.until(CALM + (LATEST - CALM) * number / len(names))
        stage.mark(f"SIGTERM to {name}")
        await stage.cluster.restart(name)
        stage.mark(f"{name} is up again")
        await stage.cluster.wait_even(EVEN_TIMEOUT_S)


async def kill_leader(stage: Stage) -> None:
    """Worker after worker dies by SIGKILL and is started again; its parent lives and gives the lease back. The next one
    dies only when no shard's tenure is short any more: after three short ones in a row a shard is held back for seconds
    on purpose, as it may itself be what kills its leaders (`duties.brake_s`)."""
    names = list(stage.cluster.workers)
    await stage.until(CALM)
    for number in range(KILLS_MAX):
        name = names[number % len(names)]
        stage.lose(name, f"SIGKILL to {name}")
        stage.cluster.workers[name].kill()
        await stage.led_elsewhere(name, stage.ttl_s)
        await stage.cluster.workers[name].exited(LED_MARGIN_S)
        await stage.back(name)
        if stage.now_s() + KILL_GAP_S > LATEST * stage.duration_s:
            return
        await asyncio.sleep(KILL_GAP_S)


async def kill_host(stage: Stage) -> None:
    """A machine is lost: the worker and its parent die together, so the lease has to run out."""
    name = next(iter(stage.cluster.workers))
    await stage.until(CALM)
    stage.lose(name, f"{name} and its parent are killed")
    stage.cluster.workers[name].kill_host()
    await stage.led_elsewhere(name, stage.ttl_s)
    await stage.back(name)


async def pause_leader(stage: Stage) -> None:
    """A worker is frozen for longer than its lease, and thawed."""
    name = next(iter(stage.cluster.workers))
    await stage.until(CALM)
    stage.lose(name, f"SIGSTOP to {name}")
    stage.cluster.workers[name].stop()
    try:
        await stage.led_elsewhere(name, stage.ttl_s)
        await asyncio.sleep(1.0)
    finally:
        stage.mark(f"SIGCONT to {name}")
        stage.cluster.workers[name].cont()
    await returned(stage)


async def partition(stage: Stage) -> None:
    """A worker is cut off from the store for longer than its lease, not from its clients."""
    name = next(iter(stage.gates))
    await stage.until(CALM)
    stage.lose(name, f"{name} is cut off from the store")
    for gate in stage.gates[name]:
        gate.shut()
    try:
        await stage.led_elsewhere(name, stage.ttl_s)
        await asyncio.sleep(1.0)
    finally:
        stage.mark(f"{name} reaches the store again")
        for gate in stage.gates[name]:
            gate.open()
    await returned(stage)


async def returned(stage: Stage) -> None:
    """Every worker is there again, and leadership is even."""
    count = len(stage.cluster.workers)
    await stage.cluster.wait_map(
        lambda seen: len(seen.workers) == count, f"{count} workers again", stage.ttl_s + EVEN_TIMEOUT_S
    )
    await stage.cluster.wait_even(EVEN_TIMEOUT_S)


async def controller_down(stage: Stage) -> None:
    """The only controller dies for good; then each worker but one is stopped gracefully and started again."""
    await stage.until(CALM)
    (controller,) = stage.cluster.controllers
    stage.mark("SIGKILL to the only controller", is_fault=True)
    controller.kill()
    await controller.exited(LED_MARGIN_S)
    names = list(stage.cluster.workers)[:-1]
    for number, name in enumerate(names):
        await stage.until(2 * CALM + (LATEST - 2 * CALM) * number / len(names))
        stage.mark(f"SIGTERM to {name}")
        await stage.cluster.restart(name)
        stage.mark(f"{name} is up again")
        await stage.cluster.wait_led(EVEN_TIMEOUT_S)


async def etcd_leader_change(stage: Stage) -> None:
    """The etcd member that leads the others dies by SIGKILL, and comes back."""
    cluster = stage.cluster
    await stage.until(CALM)
    number = await cluster.etcd_leader(LED_MARGIN_S)
    stage.mark(f"SIGKILL to etcd member {number}, which leads", is_fault=True)
    cluster.members[number].kill()
    await cluster.members[number].exited(LED_MARGIN_S)
    successor = await cluster.etcd_leader(EVEN_TIMEOUT_S)
    stage.mark(f"etcd member {successor} leads")
    await stage.until(0.5)
    stage.mark(f"etcd member {number} starts again")
    await cluster.start_member(number)


async def hot_shard(stage: Stage) -> None:
    """After a while of even load half of all requests go to one key."""
    await stage.until(CALM)
    stage.mark("half of the load goes to one key", is_fault=True)
    stage.choose("hot:0.5")


def _planned(_ttl_s: int) -> tuple[Promise, ...]:
    return NONE_FAILED, SOMETHING_MOVED, pause_within(PAUSE_MS), NO_VIOLATIONS


def _lease(ttl_s: int) -> tuple[Promise, ...]:
    return ONLY_UNKNOWN, failover_within((ttl_s + 1) * 1000, " (lease + 1 s)"), NO_VIOLATIONS


_ALL: Final = (
    Scenario(
        "steady", "nothing is done to the cluster", steady, lambda _: (NONE_FAILED, NO_VIOLATIONS), is_for_any=True
    ),
    Scenario("scale-out", "one worker more joins", scale_out, _planned),
    Scenario("rolling-restart", "each worker stops and starts again", rolling_restart, _planned, workers_min=2),
    Scenario(
        "kill-leader",
        "worker after worker dies by SIGKILL",
        kill_leader,
        lambda _: (ONLY_UNKNOWN, failover_within(FAILOVER_MS), NO_VIOLATIONS),
        workers_min=2,
    ),
    Scenario("kill-host", "a worker and its parent die together: a lost machine", kill_host, _lease, workers_min=2),
    Scenario("pause-leader", "a worker is frozen for longer than its lease", pause_leader, _lease, workers_min=2),
    Scenario("partition", "a worker is cut off from the store", partition, _lease, workers_min=2, needs_gates=True),
    Scenario(
        "controller-down",
        "the controller dies for good, then workers restart",
        controller_down,
        _planned,
        workers_min=2,
        controllers=1,
    ),
    Scenario(
        "etcd-leader-change",
        "the leading one of three etcd members dies",
        etcd_leader_change,
        lambda _: (NONE_FAILED, NOTHING_MOVED, NO_VIOLATIONS),
        etcd_members=3,
        ttl_s=10,
    ),
    Scenario(
        "hot-shard",
        "half of the load goes to one key",
        hot_shard,
        lambda _: (NONE_FAILED, others_within(OTHERS_P99_MS), NO_VIOLATIONS),
        workers_min=2,
        is_for_any=True,
    ),
)

SCENARIOS: Final[Mapping[str, Scenario]] = {scenario.name: scenario for scenario in _ALL}
"""By name, in the order in which --help lists them."""


async def by_command(stage: Stage) -> None:
    """In place of `play` on a cluster that was not started here: the operator's command makes the fault."""
    await stage.until(CALM)
    await stage.run_command()
