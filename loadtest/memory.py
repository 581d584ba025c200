"""`python -m loadtest memory`: what the router holds in memory under load that lasts, large bodies, and idle clients.

    python -m loadtest memory [--seconds 60] [--bytes 1073741824] [--idle 10000] [--json FILE]

One router process as it ships, in front of a plain upstream that never keeps a body. Told is its resident memory (the
kernel's buffers of its sockets are not in it):

- `busy`: 512 connections, each asking again as soon as it is answered. By how much memory grew between the end of the
  first sixth of the time and the end of it.
- `download`, `upload`: one large body; the highest memory while it passed, above that before it.
- `idle`: connections that have had one answer and say nothing more; memory for each.
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop

from loadtest import figures
from loadtest.machine import describe_line
from loadtest.peers import KEY_HEADER
from loadtest.processes import LOOPBACK, children, cores, free_ports, pin, resident_bytes, started
from shardlead.errors import CommandError, ShardleadError
from shardlead.testing import LocalCluster

CONNECTIONS: Final = 512
BULK_BYTES: Final = 1 << 30
IDLE: Final = 10_000
SECONDS: Final = 60.0
OPENING: Final = 200  # at once
ANSWER_TIMEOUT_S: Final = 20.0
BULK_TIMEOUT_S: Final = 300.0
PIECE_BYTES: Final = 262_144
KIB: Final = 1_024
MIB: Final = 1_024 * KIB
PROMISED: Final = {"busy": 1_024.0, "download": 32 * 1_024.0, "upload": 32 * 1_024.0, "idle": 10.0}


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: KiB of growth, above idle, or for each connection; `promised_kib` is the most allowed."""

    target: str
    connections: int
    body_bytes: int
    kib: float
    promised_kib: float
    before_kib: float  # what the router held when it began


def main(arguments: Sequence[str]) -> int:
    """Measure and tell; the exit code, 1 if a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m loadtest memory", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seconds", type=figures.seconds, default=SECONDS, help=f"of load ({SECONDS:g})")
    parser.add_argument(
        "--bytes", type=figures.number(1, BULK_BYTES), default=BULK_BYTES, help=f"a large body ({BULK_BYTES})"
    )
    parser.add_argument("--idle", type=figures.number(1, IDLE), default=IDLE, help=f"idle connections ({IDLE:,})")
    parser.add_argument("--json", type=figures.file, metavar="FILE", help="write the figures here, too")
    asked = parser.parse_args(arguments)
    print(describe_line(), flush=True)
    try:
        rows = uvloop.run(measure(asked.seconds, asked.bytes, asked.idle, say=lambda text: print(text, flush=True)))
    except KeyboardInterrupt:
        return 130
    except ShardleadError as exc:
        print(f"loadtest memory: {exc}", file=sys.stderr)
        return 1
    is_written = figures.write(asked.json, rows)
    is_kept = all(row.kib <= row.promised_kib for row in rows)
    return 2 if not is_written else 0 if is_kept else 1


async def measure(seconds: float, body_bytes: int, idle: int, *, say: Callable[[str], object]) -> list[Row]:
    """All of them, one after the other, in one router's life. Raises ShardleadError."""
    rows: list[Row] = []

    def note(target: str, connections: int, size: int, kib: float, before_kib: float) -> None:
        row = Row(target, connections, size, round(kib, 2), PROMISED[target], round(before_kib))
        rows.append(row)
        say(_line(row))

    async with _router() as (port, pid):
        async with contextlib.AsyncExitStack() as warming:
            await _open(port, CONNECTIONS, warming)
        for target, size in (("download", body_bytes), ("upload", body_bytes)):
            before = resident_bytes(pid)
            _forget_peak(pid)
            with _told(f"{target} of {size} bytes through the router"):
                async with asyncio.timeout(BULK_TIMEOUT_S):
                    await (_download if target == "download" else _upload)(port, size)
            note(target, 1, size, (_peak_bytes(pid) - before) / KIB, before / KIB)
        before = resident_bytes(pid)
        async with contextlib.AsyncExitStack() as opened:
            await _open(port, idle, opened)
            note("idle", idle, 0, (resident_bytes(pid) - before) / KIB / idle, before / KIB)
        begin, end = await _busy(port, pid, seconds)
        note("busy", CONNECTIONS, 0, (end - begin) / KIB, begin / KIB)
    return rows


@contextlib.asynccontextmanager
async def _router() -> AsyncIterator[tuple[int, int]]:
    """A cluster of which only the router is under load; its port and process."""
    core, other = cores()[:2]
    port = free_ports(1)[0]
    settings = {"router.key_rules": f"header:{KEY_HEADER}"}
    with tempfile.TemporaryDirectory(prefix="shardlead-memory-") as folder:
        upstream = [sys.executable, "-m", "loadtest.bulk", str(port)]
        with started("upstream", upstream, core=other, folder=Path(folder), port=port):
            async with LocalCluster("loadtest.cost:Silent", workers=0, routers=0, settings=settings) as cluster:
                worker = await cluster.add_worker(settings={"worker.advertise": f"{LOOPBACK}:{port}"})
                router = await cluster.add_router()
                await cluster.wait_led(30.0)
                pin(worker.pid, {other})
                pin(router.pid, {core})
                assert not children(router.pid), "one process is all of it"
                yield int(router.address.rpartition(":")[2]), router.pid


def _head(method: str, path: str, number: int = 0, length: int = 0) -> bytes:
    length_line = f"Content-Length: {length}\r\n" if method != "GET" else ""
    return f"{method} {path} HTTP/1.1\r\nHost: bulk\r\n{KEY_HEADER}: key-{number}\r\n{length_line}\r\n".encode()


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever ends the connections of `what`, as one CommandError."""
    try:
        yield
    except Exception as exc:
        first = exc
        while isinstance(first, ExceptionGroup):
            first = first.exceptions[0]
        if not isinstance(first, (CommandError, OSError, EOFError, asyncio.LimitOverrunError)):
            raise
        raise CommandError(f"{what}: {str(first) or 'it took too long'}") from exc


async def _open(port: int, count: int, stack: contextlib.AsyncExitStack) -> None:
    """So many connections that have each had one answer, open until the stack is left."""
    gate = asyncio.Semaphore(OPENING)

    async def one(number: int) -> None:
        async with gate, asyncio.timeout(ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
            stack.callback(writer.close)
            await _ask(reader, writer, number)

    with _told(f"{count} connections to the router"):
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(one(number))


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(_head("GET", "/0", number))
    head = await reader.readuntil(b"\r\n\r\n")
    _check(head)


def _check(head: bytes) -> None:
    if not head.startswith(b"HTTP/1.1 200 "):
        raise CommandError(f"the router answered {head.splitlines()[0][:200].decode('latin-1')!r}")


async def _download(port: int, count: int) -> None:
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    with contextlib.closing(writer):
        writer.write(_head("GET", f"/{count}"))
        _check(await reader.readuntil(b"\r\n\r\n"))
        left = count
        while left:
            piece = await reader.read(PIECE_BYTES)
            if not piece:
                raise CommandError(f"the answer ended {left} bytes early")
            left -= len(piece)


async def _upload(port: int, count: int) -> None:
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    with contextlib.closing(writer):
        writer.write(_head("PUT", "/", length=count))
        piece, left = bytes(PIECE_BYTES), count
        while left:
            part = piece[: min(left, PIECE_BYTES)]
            writer.write(part)
            await writer.drain()
            left -= len(part)
        _check(await reader.readuntil(b"\r\n\r\n"))


async def _busy(port: int, pid: int, seconds: float) -> tuple[int, int]:
    """The router's memory after a sixth of the time and at its end, all connections under load."""
    is_over = asyncio.Event()

    async def one(number: int) -> None:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
        with contextlib.closing(writer):
            while not is_over.is_set():
                async with asyncio.timeout(ANSWER_TIMEOUT_S):
                    await _ask(reader, writer, number)

    with _told(f"{CONNECTIONS} busy connections to the router"):
        async with asyncio.TaskGroup() as group:
            for number in range(CONNECTIONS):
                group.create_task(one(number))
            await asyncio.sleep(seconds / 6)
            begin = resident_bytes(pid)
            await asyncio.sleep(seconds * 5 / 6)
            end = resident_bytes(pid)
            is_over.set()
    return begin, end


def _forget_peak(pid: int) -> None:
    """From now on `_peak_bytes` tells the highest memory since now (man 5 proc, clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith("VmHWM:"))


def _line(row: Row) -> str:
    mark = "" if row.kib <= row.promised_kib else "  BROKEN"
    what = {
        "busy": f"{row.connections} busy connections: growth",
        "download": f"download of {row.body_bytes / MIB:,.0f} MiB: peak above idle",
        "upload": f"upload of {row.body_bytes / MIB:,.0f} MiB: peak above idle",
        "idle": f"{row.connections:,} idle connections: each",
    }[row.target]
    return f"{what:<44} {row.kib:>10,.2f} KiB, at most {row.promised_kib:,.0f}{mark}   (before: {row.before_kib:,.0f})"
