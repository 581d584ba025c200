"""Requests that are nearly as the ones before: what is known must change nothing about how they are read.

One router reads each packet twice: after ordinary requests of two clients, whose fields it knows by then, and with
nothing known. What the client gets and what the worker is asked must be the same.
"""

import random
import re
from collections.abc import Sequence

import pytest

from tests.router.support import Request, Stage, run, stage

QUIET_S = 0.04  # then the client says that nothing more comes, and the router may still answer what was whole
DIFFERING = (b"Traceparent", b"X-Request-Id", b"Idempotency-Key", b"A", b"Cookie")
BITS = [
    b"\r\n", b"\n", b"\r", b":", b" ", b"\t", b"\0", b"%", b"%b", b"%%d", b"\x7f", b"\xff", b'"', b",", b"\r\n\r\n",
    b"A: 1\r\n", b"Host: evil\r\n", b"X-Shard-Key: zz\r\n", b"x_shard_key: q\r\n", b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Connection: A\r\n", b"Expect: 100-continue\r\n",
    b"Shardlead-Epoch: 1\r\n", b"X-Forwarded-For: 1\r\n", b"Forwarded: for=1\r\n",
]  # fmt: skip
VALUES = [b"", b"", b"", b"x", b"a b", b"b,c", b"%41", b"%s", b"\xc3\xa9", b'"q"', b"close", b"0", b"9" * 140]
OWN = re.compile(rb"(?im)^date: .*\r\n|\"request_id\":\"[^\"]*\"|(?<=problem\+json\r\ncontent-length: )\d+")

Shape = tuple[list[tuple[bytes, bytes | None]], bool]  # fields, None for a value of its own each time; has a body
Heard = tuple[bytes, list[tuple[str, str, bytes, list[tuple[str, str]]]]]


class Author:
    """Writes requests. Everything from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._number = 0

    def shape(self) -> Shape:
        rng = self.rng
        fields: list[tuple[bytes, bytes | None]] = [(b"Host", b"test"), (b"X-Shard-Key", b"a"), (b"Accept", b"*/*")]
        fields += [(b"Connection", b"keep-alive")] * (rng.random() < 0.5)
        has_body = rng.random() < 0.3
        inserted: list[tuple[bytes, bytes | None]] = [(name, None) for name in rng.sample(DIFFERING, rng.randint(1, 4))]
        for field in inserted + [(b"Content-Length", b"3")] * has_body:
            fields.insert(rng.randint(0, len(fields)), field)
        return fields, has_body

    def emptied(self, shape: Shape) -> Shape:
        """The same, in which some of the values that differed are always empty."""
        fields, has_body = shape
        return [(name, b"" if value is None and self.rng.random() < 0.5 else value) for name, value in fields], has_body

    def packet(self, shape: Shape) -> bytes:
        fields, has_body = shape
        lines = [b"POST /p HTTP/1.1" if has_body else b"GET /p HTTP/1.1"]
        for name, value in fields:
            self._number += 1
            lines.append(b"%b: %b" % (name, b"v%d" % self._number if value is None else value))
        return b"\r\n".join([*lines, b"", b"abc" if has_body else b""])

    def spoilt(self, packet: bytes) -> bytes:
        rng = self.rng
        for _ in range(rng.randint(1, 3)):
            at, luck = rng.randrange(len(packet) + 1), rng.random()
            if luck < 0.35:
                packet = packet[:at] + rng.choice(BITS) + packet[at:]
            elif luck < 0.5:
                packet = packet[:at] + packet[at + rng.randint(1, 6) :]
            elif luck < 0.65:
                packet = packet[:at] + bytes([rng.randrange(256)]) + packet[at + 1 :]
            else:
                packet = self._line_spoilt(packet)
        return packet

    def _line_spoilt(self, packet: bytes) -> bytes:
        rng = self.rng
        head, end, body = packet.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        if len(lines) < 2:
            return packet
        at, other = rng.randrange(1, len(lines)), rng.randrange(1, len(lines))
        name, _, value = lines[at].partition(b": ")
        match rng.randrange(7):
            case 0:
                lines.insert(other, lines[at])
            case 1:
                del lines[at]
            case 2:
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines[at] = name.swapcase() + b": " + value
            case _:
                lines[at] = name + b": " + rng.choice(VALUES)
        return b"\r\n".join(lines) + end + body


async def answer(request: Request, bodies: list[bytes]) -> None:
    bodies.append(await request.read_body())
    said = request.target.encode()
    date = b"Date: Thu, 01 Jan 1970 00:00:00 GMT"
    request.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n\r\n%b" % (len(said), date, said))


async def ask(here: Stage, packet: bytes, behind: Sequence[bytes]) -> bytes:
    """All that comes to this packet, until nothing more does; it comes behind ordinary requests."""
    client = await here.client()
    for ordinary in behind:
        await client.send(ordinary)
        assert (await client.answer()).status == 200
    got = b""
    if packet:
        await client.send(packet)
        got += await client.within(QUIET_S)
    return re.sub(OWN, b"", got + await client.rest())


async def both(seed: int) -> tuple[bytes, Heard, Heard]:
    """The packet, and what was heard of them with all known and with nothing."""
    author = Author(seed)
    one = author.shape()
    other = author.emptied(one) if author.rng.random() < 0.6 else author.shape()
    ones = [author.packet(one) for _ in range(author.rng.randint(2, 4))]
    others = [author.packet(other) for _ in range(3)]
    packet = author.spoilt(author.packet(one if author.rng.random() < 0.8 else other))
    async with stage() as here:
        bodies: list[bytes] = []
        worker = await here.start("w1", lambda request: answer(request, bodies))
        await here.lead(worker)
        await ask(here, b"", behind=others)
        await ask(here, b"", behind=ones)
        heard = []
        for behind in (ones, []):
            if not behind:
                here.router.known.clear()
            asked, came = len(worker.requests) + len(behind), len(bodies) + len(behind)
            got = await ask(here, packet, behind)
            requests = [
                (
                    request.method,
                    request.target,
                    body,
                    sorted([_own_id(each, packet) for each in request.raw_headers]),
                )
                for request, body in zip(worker.requests[asked:], bodies[came:], strict=False)
            ]
            heard.append((got, requests))
        return packet, heard[0], heard[1]


def _own_id(field: tuple[str, str], packet: bytes) -> tuple[str, str]:
    """A field as the worker saw it; the request id that the router made has no value to compare."""
    name, value = field
    return (name, value if name != "X-Request-Id" or value.encode() in packet else "made")


def compare(seeds: Sequence[int]) -> None:
    for seed in seeds:

        async def main(seed: int = seed) -> None:
            packet, known, unknown = await both(seed)
            assert known == unknown, f"seed {seed}: {packet!r}"

        run(main)


def test_what_is_known_changes_nothing_about_what_is_nearly_the_same() -> None:
    compare(range(60))


@pytest.mark.long
def test_what_is_known_changes_nothing_about_a_thousand_more() -> None:
    compare(range(1_000, 2_000))
