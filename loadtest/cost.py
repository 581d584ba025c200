"""`python -m loadtest cost`: what a request costs in the router, beside HAProxy, nginx and a plain aiohttp proxy.

Each is pinned to one core and stands in front of the same three upstreams (nginx, files from memory); wrk and the
upstreams have the other core. They take turns, several rounds in one run, so that whatever else the machine does
strikes all. A request's cost is the CPU time of the proxy's processes, as the kernel counts it, by the number of
requests: it does not depend on how fast the load was. What runs is `shardlead router` as it ships, with every check,
limit, time-out, counter and header policy on, in front of real workers' records (their `advertise` names the
upstreams) in a real store.
"""

import argparse
import asyncio
import contextlib
import functools
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtest import figures, machine, peers, wrk
from loadtest.processes import LOOPBACK, cores, cpu_time, free_ports, pin, started
from shardlead.errors import CommandError, ShardleadError
from shardlead.testing import LocalCluster

TARGETS: Final = ("router", "haproxy", "nginx", "aiohttp")
CONNECTIONS: Final = (32, 512)
WORKERS: Final = 3
ROUNDS: Final = 5
QUICK_ROUNDS: Final = 3
ROUND_S: Final = 3.0
QUICK_ROUND_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one target."""

    requests_per_cpu_s: float
    user_us: float
    system_us: float
    rps: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the rounds. `user_us` and `system_us` are CPU time a request, of the proxy alone."""

    target: str
    body_bytes: int
    connections: int
    requests_per_cpu_s: float
    user_us: float
    system_us: float
    rps: float
    p50_ms: float
    p99_ms: float
    ratio: float  # the router's requests per CPU-second by this target's, median of the rounds' ratios


def main(arguments: Sequence[str]) -> int:
    """Parse, measure, print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtest cost", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small GETs at 32 connections alone, under 50 s")
    parser.add_argument("--rounds", type=figures.count, help=f"how many ({ROUNDS}; quick: {QUICK_ROUNDS})")
    parser.add_argument("--round-s", type=figures.seconds, help=f"seconds each ({ROUND_S:g}; quick: {QUICK_ROUND_S:g})")
    parser.add_argument(
        "--targets", type=figures.names(TARGETS), default=list(TARGETS), help="which, with commas between"
    )
    parser.add_argument(
        "--traced",
        action="store_true",
        help="each request has a trace id of its own; without it only keys differ from request to request",
    )
    parser.add_argument("--json", type=figures.file, metavar="FILE", help="write the figures here, too")
    asked = parser.parse_args(arguments)
    shapes = [(0, 32)] if asked.quick else [(size, count) for size in peers.SIZES for count in CONNECTIONS]
    rounds = asked.rounds or (QUICK_ROUNDS if asked.quick else ROUNDS)
    round_s = asked.round_s or (QUICK_ROUND_S if asked.quick else ROUND_S)
    try:
        measuring = measure(
            asked.targets, shapes, rounds, round_s, is_traced=asked.traced, say=lambda text: print(text, flush=True)
        )
        rows = asyncio.run(measuring)
    except KeyboardInterrupt:
        return 130
    except ShardleadError as exc:
        print(f"loadtest cost: {exc}", file=sys.stderr)
        return 1
    return 0 if figures.write(asked.json, rows) else 2


async def measure(
    targets: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    rounds: int,
    round_s: float,
    *,
    is_traced: bool = False,
    say: Callable[[str], object],
) -> list[Row]:
    """All targets over all shapes (body bytes, connections). Raises CommandError if a tool is missing."""
    core, other = cores()[:2]
    rows: list[Row] = []
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shardlead-cost-")))
        peers.write_bodies(folder)
        upstreams = free_ports(WORKERS)
        stack.enter_context(
            started("upstream", peers.upstream_command(folder, upstreams), core=other, folder=folder, port=upstreams[0])
        )
        addresses: dict[str, tuple[str, list[int]]] = {}
        if "router" in targets:
            addresses["router"] = await stack.enter_async_context(_router(upstreams, core, other))
        for name in targets:
            if name != "router":
                port = free_ports(1)[0]
                proxy = stack.enter_context(_peer(name, port, upstreams, core=core, folder=folder))
                addresses[name] = f"{LOOPBACK}:{port}", proxy.pids
        say(machine.describe_line())
        say(_headline())
        for size, connections in shapes:
            samples: dict[str, list[Sample]] = {name: [] for name in targets}
            for _ in range(rounds):
                for name in targets:
                    address, pids = addresses[name]
                    url = f"http://{address}/{size}"
                    load = functools.partial(
                        wrk.run,
                        url,
                        connections=connections,
                        duration_s=round_s,
                        core=other,
                        folder=folder,
                        is_traced=is_traced,
                    )
                    sample = await asyncio.to_thread(_sample, name, load, pids)
                    samples[name].append(sample)
            for row in _rows(samples, size, connections):
                rows.append(row)
                say(_line(row))
    return rows


@contextlib.asynccontextmanager
async def _router(upstreams: Sequence[int], core: int, other: int) -> AsyncIterator[tuple[str, list[int]]]:
    """A cluster of which only the router is under load, on its core; its address and processes."""
    settings = {"router.key_rules": f"header:{peers.KEY_HEADER}"}
    async with LocalCluster("loadtest.cost:Silent", workers=0, routers=0, settings=settings) as cluster:
        for port in upstreams:
            await cluster.add_worker(settings={"worker.advertise": f"{LOOPBACK}:{port}"})
        router = await cluster.add_router()
        await cluster.wait_even(timeout_s=30.0)
        for process in [*cluster.workers.values(), cluster.store]:
            if process is not None:
                pin(process.pid, {other})
        pin(router.pid, {core})
        yield router.address, [router.pid]


class Silent:
    """The application of the workers whose records the router reads; its requests go to the upstreams instead."""

    def __init__(self, lead: object) -> None:
        del lead

    async def handle(self, request: object) -> object:
        raise AssertionError(f"{request!r} came to a worker that advertises another address")


@contextlib.contextmanager
def _peer(name: str, port: int, upstreams: Sequence[int], *, core: int, folder: Path):  # type: ignore[no-untyped-def]
    match name:
        case "haproxy":
            command = peers.haproxy_command(folder, port, upstreams)
        case "nginx":
            command = peers.nginx_command(folder, port, upstreams)
        case _:
            command = peers.aiohttp_command(port, upstreams)
    with started(name, command, core=core, folder=folder, port=port) as proxy:
        yield proxy


def _sample(name: str, load: Callable[[], wrk.Found], pids: Sequence[int]) -> Sample:
    before = cpu_time(pids)
    found = load()
    used = cpu_time(pids) - before
    if found.bad or not found.requests:
        raise CommandError(f"{name}: {found.bad} of {found.requests} requests failed; a cost without answers is none")
    return Sample(
        found.requests / used.total_s,
        used.user_s / found.requests * 1e6,
        used.system_s / found.requests * 1e6,
        found.requests / (found.duration_us / 1e6),
        found.p50_us / 1e3,
        found.p99_us / 1e3,
    )


def _rows(samples: dict[str, list[Sample]], size: int, connections: int) -> list[Row]:
    own = samples.get("router", [])
    rows = []
    for name, found in samples.items():
        ratios = [mine.requests_per_cpu_s / its.requests_per_cpu_s for mine, its in zip(own, found, strict=False)]
        middle = {
            field: statistics.median(getattr(each, field) for each in found)
            for field in ("requests_per_cpu_s", "user_us", "system_us", "rps", "p50_ms", "p99_ms")
        }
        rows.append(Row(name, size, connections, **middle, ratio=statistics.median(ratios) if ratios else 0.0))
    return rows


def _headline() -> str:
    return (
        f"{'target':<8} {'body':>8} {'conns':>5} {'req/CPU-s':>9} {'user µs':>8} {'sys µs':>7} {'req/s':>8} "
        f"{'p50 ms':>7} {'p99 ms':>7} {'router ÷ it':>11}"
    )


def _line(row: Row) -> str:
    return (
        f"{row.target:<8} {row.body_bytes:>8} {row.connections:>5} {row.requests_per_cpu_s:>9.0f} {row.user_us:>8.1f} "
        f"{row.system_us:>7.1f} {row.rps:>8.0f} {row.p50_ms:>7.2f} {row.p99_ms:>7.2f} {row.ratio:>11.2f}"
    )
