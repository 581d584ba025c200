"""What the smart client costs beside aiohttp's own client, which talks to a fixed address: the worker's, or that of an
HAProxy in front of it, which is how a fleet without smart clients is reached.

    python -m loadtest client [--targets aiohttp,haproxy] [--seconds 2] [--rounds 9] [--connections 32] [--json FILE]

All ask one real worker from one process, in turns: the same requests with the same headers, as many at a time. Told are
requests a second (which the worker bounds, where it is the slower one) and requests for a second of CPU of all that
stands before the worker: this process, and HAProxy where it takes part. Medians over the rounds, and the medians of
each round's ratios.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
import uvloop
from aiohttp import web

from loadtest import figures, machine, peers
from loadtest.processes import LOOPBACK, cores, cpu_time, free_ports, started
from shardlead import Client, Leadership
from shardlead.config import split_address
from shardlead.errors import ShardleadError
from shardlead.testing import LocalCluster

TARGETS: Final = ("aiohttp", "haproxy")
"""What the smart client is held against: aiohttp's own to the worker, and to HAProxy."""
KEYS: Final = 64
WARM_UP_S: Final = 0.3
Ask = Callable[[int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to the worker. `pids`: whatever else than this process works for it."""

    ask: Ask
    pids: tuple[int, ...] = ()


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
    """One way's figures for one kind of request: medians over the rounds. `ratio_*` are the smart client's beside this
    one's in the same round; above 1 the smart client is the faster one."""

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


async def measure(way: Way, connections: int, seconds: float) -> Measured:
    """Ask for so long, so many at a time."""
    spent: list[float] = []
    clock = time.perf_counter
    until = clock() + seconds
    ask = way.ask

    async def one(number: int) -> None:
        while (began := clock()) < until:
            await ask(number)
            number += connections
            spent.append(clock() - began)

    others = cpu_time(way.pids)
    began, cpu = clock(), time.process_time()
    await asyncio.gather(*(one(number) for number in range(connections)))
    cpu, wall = time.process_time() - cpu, clock() - began
    cpu += (cpu_time(way.pids) - others).total_s
    spent.sort()
    count = len(spent)
    return Measured(count / wall, cpu / count * 1e6, spent[count // 2] * 1e3, spent[int(count * 0.99)] * 1e3)


async def compare(options: argparse.Namespace) -> list[Row]:
    """Every kind of request, the ways in turns. Raises CommandError if HAProxy is missing."""
    rows: list[Row] = []
    settings = {"log.level": "warning"}
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        cluster = await enter(LocalCluster("loadtest.client_cost:Echo", workers=1, routers=1, settings=settings))
        client = await enter(Client(cluster.store_url, cluster=cluster.name))
        session = await enter(aiohttp.ClientSession())
        paths: list[tuple[str, dict[str, str]]] = []
        address = ""
        for number in range(KEYS):
            led = await client.leader(f"key-{number}")
            headers = {"Shardlead-Shard": str(led.shard), "Shardlead-Epoch": str(led.epoch)}
            paths.append((f"/k/{number}", {**headers, "Shardlead-Key": f"key-{number}"}))
            address = led.address
        proxies: dict[str, tuple[str, tuple[int, ...]]] = {"aiohttp": (address, ())}
        if "haproxy" in options.targets:
            proxies["haproxy"] = await enter(_haproxy(address))
        for method, size in (("GET", 0), ("POST", 0), ("POST", 1_024)):
            body = bytes(size) if method == "POST" else None
            ways = {"client": Way(_by_client(client, method, body))}
            for name in options.targets:
                where, pids = proxies[name]
                ways[name] = Way(_by_aiohttp(session, method, body, where, paths), pids)
            rows += _rows(await _in_turns(ways, options), method, size, options.connections)
    return rows


@contextlib.asynccontextmanager
async def _haproxy(worker: str) -> AsyncIterator[tuple[str, tuple[int, ...]]]:
    """HAProxy in front of the worker: its address and processes."""
    endpoint = split_address(worker)
    assert endpoint is not None, "a worker of our own has an address"
    with tempfile.TemporaryDirectory(prefix="shardlead-client-cost-") as name:
        folder, port = Path(name), free_ports(1)[0]
        command = peers.haproxy_command(folder, port, [endpoint[1]])
        with started("haproxy", command, core=cores()[0], folder=folder, port=port) as process:
            yield f"{LOOPBACK}:{port}", tuple(process.pids)


async def _in_turns(ways: Mapping[str, Way], options: argparse.Namespace) -> dict[str, list[Measured]]:
    """All of them in each round, and in each round another one first. Each way's rounds."""
    rounds: dict[str, list[Measured]] = {name: [] for name in ways}
    names = list(ways)
    for way in ways.values():
        await measure(way, options.connections, WARM_UP_S)
    for _ in range(options.rounds):
        for name in names:
            rounds[name].append(await measure(ways[name], options.connections, options.seconds))
        names.append(names.pop(0))
    return rounds


def _rows(rounds: Mapping[str, Sequence[Measured]], method: str, size: int, connections: int) -> list[Row]:
    median = statistics.median
    own = rounds["client"]
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
            round(median(ours.rps / theirs.rps for ours, theirs in zip(own, of_one, strict=True)), 3),
            round(median(theirs.cpu_us / ours.cpu_us for ours, theirs in zip(own, of_one, strict=True)), 3),
        )
        for target, of_one in rounds.items()
    ]


def _by_client(client: Client, method: str, body: bytes | None) -> Ask:
    async def ask(number: int) -> None:
        number %= KEYS
        async with client.request(method, f"/k/{number}", key=f"key-{number}", data=body) as answer:
            assert answer.status == 200
            await answer.read()

    return ask


def _by_aiohttp(
    session: aiohttp.ClientSession,
    method: str,
    body: bytes | None,
    address: str,
    paths: Sequence[tuple[str, dict[str, str]]],
) -> Ask:
    targets = [(f"http://{address}{path}", headers) for path, headers in paths]

    async def ask(number: int) -> None:
        url, headers = targets[number % KEYS]
        async with session.request(method, url, headers=headers, data=body) as answer:
            assert answer.status == 200
            await answer.read()

    return ask


def report(rows: Sequence[Row]) -> str:
    """A table: the ways, line by line."""
    lines = [f"{'request':<14}{'by':<9}{'rps':>8}{'per CPU-s':>11}{'p50 ms':>9}{'p99 ms':>9}   client ÷ it"]
    for row in rows:
        ratio = f"   rps {row.ratio_rps:.3f}, per CPU-s {row.ratio_cpu:.3f}" if row.target != "client" else ""
        lines.append(
            f"{row.method + ' ' + str(row.body_bytes) + ' B':<14}{row.target:<9}{row.rps:>8.0f}"
            f"{row.requests_per_cpu_s:>11.0f}{row.p50_ms:>9.2f}{row.p99_ms:>9.2f}{ratio}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measure and tell; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtest client", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seconds", type=figures.seconds, default=2.0, help="of each measurement (default 2)")
    parser.add_argument(
        "--rounds", type=figures.count, default=9, help="of each client and kind of request (default 9)"
    )
    parser.add_argument("--connections", type=figures.count, default=32, help="requests at a time (default 32)")
    parser.add_argument("--json", type=figures.file, metavar="FILE", help="write the figures here, too")
    parser.add_argument(
        "--targets", type=figures.names(TARGETS), default=list(TARGETS), help="which, with commas between"
    )
    options = parser.parse_args(arguments)
    print(machine.describe_line())
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rows = runner.run(compare(options))
    except KeyboardInterrupt:
        return 130
    except ShardleadError as exc:
        print(f"loadtest client: {exc}", file=sys.stderr)
        return 1
    print(report(rows))
    return 0 if figures.write(options.json, rows) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
