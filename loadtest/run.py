"""One run from the first process to the report.

Law: everything is bounded in time, and everything that was started is gone at the end, however it comes: a kept
promise, a broken one, an error, Ctrl-C.
"""

import asyncio
import contextlib
import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from loadtest import machine
from loadtest.errors import CannotBegin
from loadtest.generators import Generators
from loadtest.ground import Ground, own_ground, running_ground, stop_gracefully
from loadtest.leadership import Story
from loadtest.live import Live
from loadtest.messages import Task
from loadtest.options import Options
from loadtest.reckon import Run, reckon
from loadtest.result import Result
from loadtest.samples import Samples
from loadtest.scenarios import OVERTIME_S, SCENARIOS, Scenario, by_command
from loadtest.stage import Stage
from loadtest.verify import NO_LOGS, NOT_OURS, verify
from shardlead import ShardleadError

QUIET_S: Final = 1.0
"""Load goes on for so long after the last thing that was done."""


@dataclass(frozen=True)
class Outcome:
    """A result, and what its report needs beside it."""

    result: Result
    samples: Samples
    story: Story
    shards: int


async def play(options: Options, live: Live, command: str = "") -> Outcome:
    """Run it. Raises CannotBegin if there was nothing to measure, or the scenario could not be played to its end."""
    scenario = SCENARIOS[options.scenario]
    if not options.is_own and not scenario.is_for_any and not options.do:
        raise CannotBegin(
            f"{scenario.name} hurts the cluster, and one that was not started here is not touched: "
            "give a command that makes the fault with --do"
        )
    ttl_s = options.ttl_s or scenario.ttl_s
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    began_s = time.monotonic()
    if options.is_own:
        live.say(f"{scenario.name}: starting {_describe(options, scenario)}")
    ground_of = own_ground(options, scenario, ttl_s) if options.is_own else running_ground(options)
    async with ground_of as ground:
        live.say(f"{ground.ring.shards} shards led, after {time.monotonic() - began_s:.1f} s; {_load(options)}")
        async with Generators(_tasks(options, ground), live.tick) as generators:
            stage, ended_s = await _load_it(options, scenario, ground, generators, live, ttl_s)
            harvest = await generators.stop(options.timeout_s + 10)
            story = Story(ground.leaders, ground.events(), generators.begin_wall_s)
        live.finish()
        found, note = None, NO_LOGS if options.is_own else NOT_OURS
        if ground.own is not None:
            live.say("stopping")
            await stop_gracefully(ground.own)
        if ground.audit is not None:
            found, note = await verify(ground.audit)
        settings = _settings(options, ground, ttl_s)
    run = Run(
        options=options,
        harvest=harvest,
        story=story,
        shards=ground.ring.shards,
        marks=stage.marks,
        losses=stage.losses,
        ended_s=ended_s,
        verify=found,
        verify_note=note,
        promises=scenario.promises(ttl_s),
        started=started,
        settings=settings,
        machine=machine.describe(),
        command=command,
    )
    return Outcome(reckon(run), harvest.samples, story, ground.ring.shards)


async def _load_it(
    options: Options, scenario: Scenario, ground: Ground, generators: Generators, live: Live, ttl_s: int
) -> tuple[Stage, float]:
    """The load, and what the scenario does meanwhile; the stage, and when the load ended."""
    await generators.begin()
    stage = Stage(
        ground.own,
        duration_s=options.duration_s,
        ttl_s=ttl_s,
        now_s=generators.now_s,
        choose=generators.choose,
        on_mark=live.mark,
        gates=ground.gates,
        do=options.do,
    )

    async def perform() -> None:
        await (scenario.play if options.is_own or scenario.is_for_any else by_command)(stage)
        await asyncio.sleep(QUIET_S if stage.marks else 0)
        await stage.until(1.0)

    playing = asyncio.create_task(perform())
    failing = asyncio.create_task(generators.failed())
    showing = asyncio.create_task(_show(ground, generators.now_s, live))
    tasks: list[asyncio.Task[None]] = [playing, failing, showing]
    try:
        limit_s = options.duration_s + OVERTIME_S
        done, _ = await asyncio.wait(tasks, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        ended_s = generators.now_s()
        for task in done:
            task.result()
        if playing not in done:
            raise CannotBegin(f"{scenario.name} was not over after {limit_s:g} s")
    except ShardleadError as exc:
        raise CannotBegin(f"{scenario.name} could not be played to its end: {exc}") from exc
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return stage, ended_s


async def _show(ground: Ground, now_s: Callable[[], float], live: Live) -> None:
    """A line a second, with how many shards each worker leads."""
    leaders, seen = dict(ground.leaders), 0
    while True:
        await asyncio.sleep(1.0)
        for event in ground.log[seen:]:
            if event["event"] == "leader" and event["revision"] > ground.revision:
                if event["worker"] is None:
                    leaders.pop(event["shard"], None)
                else:
                    leaders[event["shard"]] = event["worker"]
        seen = len(ground.log)
        counts: dict[str, int] = {}
        for worker in leaders.values():
            counts[worker] = counts.get(worker, 0) + 1
        live.second(now_s(), dict(sorted(counts.items())))


def _tasks(options: Options, ground: Ground) -> list[Task]:
    count = options.generator_count
    return [
        Task(
            share=share,
            shares=count,
            rates=options.rates,
            step_s=options.step_s,
            keys=options.key_count,
            choice=options.keys,
            path=options.path,
            payload_bytes=options.payload_bytes,
            posts=options.posts,
            idempotent=options.idempotent,
            timeout_s=options.timeout_s,
            seed=options.seed,
            through=options.through,
            routers=ground.routers,
            store=ground.store_url,
            cluster=ground.cluster,
            table=ground.table,
            shards=ground.ring.shards,
            hash_tags=ground.ring.hash_tags,
            connections_max=options.connections_max,
        )
        for share in range(count)
    ]


def _describe(options: Options, scenario: Scenario) -> str:
    store = options.store
    if scenario.etcd_members > 1:
        store = f"{scenario.etcd_members} etcd members"
    return f"{options.workers} workers, {options.shards} shards, {options.routers} router, store: {store}"


def _load(options: Options) -> str:
    rates = ", ".join(f"{rate:g}" for rate in options.rates)
    return f"{rates} requests/s for {options.duration_s:g} s from {options.generator_count} generator processes"


def _settings(options: Options, ground: Ground, ttl_s: int) -> dict[str, object]:
    own: dict[str, object] = {}
    if ground.own is not None:
        own = {"workers": options.workers, "routers": options.routers, "lease_ttl_s": ttl_s, "app": options.application}
    store = options.store if options.is_own else ground.store_url
    if ground.own is not None and len(ground.own.members) > 1:
        store = f"etcd, {len(ground.own.members)} members"
    return {
        "shards": ground.ring.shards,
        **own,
        "store": f"{store} ({ground.store_version})" if ground.store_version else store,
        "through": options.through,
        "generators": options.generator_count,
        "keys": f"{options.keys}, {options.key_count:,}",
        "posts": options.posts,
        "idempotent": options.idempotent,
        "payload_bytes": list(options.payload_bytes),
        "timeout_s": options.timeout_s,
        "audit logs": "written" if ground.audit else "none",
        "seed": options.seed,
        **dict(options.settings),
    }


async def interruptible(options: Options, live: Live, command: str, stop: asyncio.Event) -> Outcome | None:
    """`play`, or None once `stop` is set: then everything has ended all the same."""
    playing = asyncio.create_task(play(options, live, command))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({playing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if playing.done():
            return playing.result()
        live.say("interrupted: ending what was started")
        return None
    finally:
        stopping.cancel()
        playing.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await playing
