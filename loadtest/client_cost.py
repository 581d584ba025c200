"""What the smart client costs beside aiohttp's own client, which talks to a fixed address.

    python -m loadtest.client_cost [--seconds 2] [--rounds 9] [--connections 32] [--json FILE]

Both ask one real worker from one process, in turns: the same requests with the same headers, as many at a time. Told
are requests a second (which the worker bounds, where it is the slower one) and requests for a second of this process's
own CPU (which nothing but the client bounds), as medians over the rounds, and the medians of each round's ratios.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import uvloop
from aiohttp import web

from shardlead import Client, Leadership
from shardlead.testing import LocalCluster

KEYS: Final = 64
WARM_UP_S: Final = 0.3
Ask = Callable[[int], Awaitable[None]]


class Echo:
    """A worker that costs little: it answers what came."""

    def __init__(self, lead: Leadership) -> None:
        self._lead = lead

    async def open(self) -> None:
        """Nothing is stored, so nothing need be fenced."""
        self._lead.note_barrier()

    async def handle(self, request: web.Request) -> web.Response:
        return web.Response(body=await request.read())


@dataclass(frozen=True, slots=True)
class Measured:
    """One round of one client."""

    rps: float
    cpu_us: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """One client's figures for one kind of request: medians over the rounds. `ratio_*` are the smart client's beside
    aiohttp's in the same round; above 1 it is the faster one."""

    target: str
    method: str
    body_bytes: int
    connections: int
    requests_per_cpu_s: float
    rps: float
    p50_ms: float
    p99_ms: float
    ratio_rps: float
    ratio_cpu: float


async def measure(ask: Ask, connections: int, seconds: float) -> Measured:
    """Ask for so long, so many at a time."""
    spent: list[float] = []
    clock = time.perf_counter
    until = clock() + seconds

    async def one(number: int) -> None:
        while (began := clock()) < until:
            await ask(number)
            number += connections
            spent.append(clock() - began)

    began, cpu = clock(), time.process_time()
    await asyncio.gather(*(one(number) for number in range(connections)))
    cpu, wall = time.process_time() - cpu, clock() - began
    spent.sort()
    count = len(spent)
    return Measured(count / wall, cpu / count * 1e6, spent[count // 2] * 1e3, spent[int(count * 0.99)] * 1e3)


async def compare(options: argparse.Namespace) -> list[Row]:
    """Every kind of request, the two clients in turns."""
    rows: list[Row] = []
    settings = {"log.level": "warning"}
    async with (
        LocalCluster("loadtest.client_cost:Echo", workers=1, routers=1, settings=settings) as cluster,
        Client(cluster.store_url, cluster=cluster.name) as client,
        aiohttp.ClientSession() as session,
    ):
        targets = []
        for number in range(KEYS):
            led = await client.leader(f"key-{number}")
            headers = {"Shardlead-Shard": str(led.shard), "Shardlead-Epoch": str(led.epoch)}
            targets.append((f"http://{led.address}/k/{number}", {**headers, "Shardlead-Key": f"key-{number}"}))
        for method, size in (("GET", 0), ("POST", 0), ("POST", 1_024)):
            body = bytes(size) if method == "POST" else None
            rounds = await _in_turns(
                _by_client(client, method, body), _by_aiohttp(session, method, body, targets), options
            )
            rows += _rows(rounds, method, size, options.connections)
    return rows


async def _in_turns(ours: Ask, theirs: Ask, options: argparse.Namespace) -> list[tuple[Measured, Measured]]:
    """Both, in each round the other one first."""
    rounds = []
    for ask in (ours, theirs):
        await measure(ask, options.connections, WARM_UP_S)
    for number in range(options.rounds):
        if number % 2:
            ours_now = await measure(ours, options.connections, options.seconds)
            theirs_now = await measure(theirs, options.connections, options.seconds)
        else:
            theirs_now = await measure(theirs, options.connections, options.seconds)
            ours_now = await measure(ours, options.connections, options.seconds)
        rounds.append((ours_now, theirs_now))
    return rounds


def _rows(rounds: Sequence[tuple[Measured, Measured]], method: str, size: int, connections: int) -> list[Row]:
    median = statistics.median
    ratio_rps = round(median(ours.rps / theirs.rps for ours, theirs in rounds), 3)
    ratio_cpu = round(median(theirs.cpu_us / ours.cpu_us for ours, theirs in rounds), 3)
    return [
        Row(
            target,
            method,
            size,
            connections,
            round(1e6 / median(each.cpu_us for each in of_one), 1),
            round(median(each.rps for each in of_one), 1),
            round(median(each.p50_ms for each in of_one), 3),
            round(median(each.p99_ms for each in of_one), 3),
            ratio_rps,
            ratio_cpu,
        )
        for target, of_one in zip(("client", "aiohttp"), zip(*rounds, strict=True), strict=True)
    ]


def _by_client(client: Client, method: str, body: bytes | None) -> Ask:
    async def ask(number: int) -> None:
        number %= KEYS
        async with client.request(method, f"/k/{number}", key=f"key-{number}", data=body) as answer:
            assert answer.status == 200
            await answer.read()

    return ask


def _by_aiohttp(
    session: aiohttp.ClientSession, method: str, body: bytes | None, targets: Sequence[tuple[str, dict[str, str]]]
) -> Ask:
    async def ask(number: int) -> None:
        url, headers = targets[number % KEYS]
        async with session.request(method, url, headers=headers, data=body) as answer:
            assert answer.status == 200
            await answer.read()

    return ask


def report(rows: Sequence[Row]) -> str:
    """A table: the two clients, line by line."""
    lines = [f"{'request':<14}{'by':<9}{'rps':>8}{'per CPU-s':>11}{'p50 ms':>9}{'p99 ms':>9}   client ÷ aiohttp"]
    for row in rows:
        ratio = f"   rps {row.ratio_rps:.3f}, per CPU-s {row.ratio_cpu:.3f}" if row.target == "client" else ""
        lines.append(
            f"{row.method + ' ' + str(row.body_bytes) + ' B':<14}{row.target:<9}{row.rps:>8.0f}"
            f"{row.requests_per_cpu_s:>11.0f}{row.p50_ms:>9.2f}{row.p99_ms:>9.2f}{ratio}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measure and tell; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtest client-cost", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="of each client and kind of request (default 9)")
    parser.add_argument("--connections", type=int, default=32, help="requests at a time (default 32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    options = parser.parse_args(arguments)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rows = runner.run(compare(options))
    print(report(rows))
    if options.json is not None:
        value: dict[str, Any] = {"rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(value, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
