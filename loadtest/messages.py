"""What a run and its generator processes say to each other over pipes: MessagePack behind a length of four bytes."""

import asyncio
import struct
from typing import Final

import msgspec

FRAME_BYTES_MAX: Final = 256 * 1_048_576
_LENGTH: Final = struct.Struct(">I")


class Task(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """To a generator, first: what to send, where to, and how answers are judged."""

    share: int
    """Which of the schedule's requests: `share`, `share + shares`, …"""
    shares: int
    rates: tuple[float, ...]
    step_s: float
    keys: int
    choice: str
    path: str
    """With {key} in it."""
    payload_bytes: tuple[int, ...]
    """Sizes of POST bodies, drawn evenly."""
    posts: float
    idempotent: float
    """The share of POSTs with an Idempotency-Key."""
    timeout_s: float
    seed: int
    through: str
    """"router" or "client"."""
    routers: tuple[str, ...]
    store: str
    cluster: str
    table: bytes
    shards: int
    hash_tags: bool
    connections_max: int


class Begin(msgspec.Struct, frozen=True, tag=True):
    """To a generator: the schedule begins at that monotonic time (common to all processes of a machine)."""

    at_ns: int


class Keys(msgspec.Struct, frozen=True, tag=True):
    """To a generator: draw keys so from now on."""

    choice: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """To a generator: nothing new; wait for what is under way, then `Done`."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """From a generator: it can begin."""


class Second(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """From a generator, once a second: what has ended since the last one."""

    columns: tuple[bytes, ...]
    """`samples.Samples.encode()`."""
    lags_us: bytes
    """How late each request left, as 32-bit numbers."""
    sent: int
    in_flight: int
    connections: int
    reasons: dict[str, int]
    """How often each reason for a failure came."""
    examples: list[str]


class Done(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """From a generator, last."""

    cpu_s: float
    leaderships: list[tuple[int, int, str]]
    """Each (shard, epoch, worker) that has answered."""
    violations: list[str]


Command = Task | Begin | Keys | Stop
Report = Ready | Second | Done


def frame(message: Command | Report) -> bytes:
    """The message as it crosses the pipe."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


async def next_command(reader: asyncio.StreamReader) -> Command | None:
    """The next command; None when the other side has closed."""
    raw = await _next(reader)
    return None if raw is None else msgspec.msgpack.decode(raw, type=Command)


async def next_report(reader: asyncio.StreamReader) -> Report | None:
    """The next report; None when the other side has closed."""
    raw = await _next(reader)
    return None if raw is None else msgspec.msgpack.decode(raw, type=Report)


async def _next(reader: asyncio.StreamReader) -> bytes | None:
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        assert length <= FRAME_BYTES_MAX, f"a frame of {length} bytes"
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
