"""What has come before is known by its bytes: what comes of a message is the same as if it had come first."""

import asyncio
import contextlib
import re
from dataclasses import dataclass

import pytest

from shardlead.router.known import BYTES_MAX, KNOWN_MAX, Known
from tests.router.support import WAIT_S, Request, Stage, run, stage

FIELDS = b"Host: test\r\nX-Shard-Key: a\r\nAccept: */*\r\nConnection: keep-alive\r\n"
OWN = re.compile(rb"(?im)^(?:date|x-request-id): .*\r\n|\"request_id\":\"[^\"]*\"")
DATE = b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"


def get(line: bytes, fields: bytes = FIELDS) -> bytes:
    return line + b"\r\n" + fields + b"\r\n"


def post(body: bytes, length: int = 3, line: bytes = b"POST /p HTTP/1.1") -> bytes:
    return line + b"\r\n" + FIELDS + b"Content-Length: %d\r\n\r\n" % length + body


@dataclass(frozen=True)
class Told:
    """What a client got, and what the worker was asked: method, target, body, and the fields that passed."""

    answers: bytes
    requests: list[tuple[str, str, bytes, list[tuple[str, str]]]]


async def answer(request: Request, bodies: list[bytes]) -> None:
    """An ordinary answer, with a Date."""
    body = b"" if request.method == "HEAD" else await request.read_body()
    bodies.append(body)
    said = b"" if request.method == "HEAD" else request.target.encode()
    request.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n%b" % (len(said), DATE, said))


async def tell(*packets: bytes, before: tuple[bytes, ...]) -> Told:
    """Each packet behind what came of the one before; `before` goes over a connection of its own, twice."""
    async with stage() as here:
        bodies: list[bytes] = []
        worker = await here.start("w1", lambda request: answer(request, bodies))
        await here.lead(worker)
        for packet in (*before, *before):
            await ask_all(here, packet)
        if before:
            known = here.router.known
            assert known, "the ordinary ones are known"
        asked, heard = len(worker.requests), len(bodies)
        got = await ask_all(here, *packets)
        requests = [
            (
                request.method,
                request.target,
                body,
                sorted(each for each in request.raw_headers if each[0] != "X-Request-Id"),
            )
            for request, body in zip(worker.requests[asked:], bodies[heard:], strict=True)
        ]
        return Told(re.sub(OWN, b"", got), requests)


async def ask_all(here: Stage, *packets: bytes) -> bytes:
    """All that comes to these packets, until the router has nothing more to say."""
    client = await here.client()
    got = b""
    for packet in packets:
        with contextlib.suppress(ConnectionError, RuntimeError):
            await client.send(packet)
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(0.15):
                while more := await client.reader.read(65_536):
                    got += more
    client.writer.write_eof() if not client.writer.is_closing() else None
    async with asyncio.timeout(WAIT_S):
        with contextlib.suppress(ConnectionError):
            while more := await client.reader.read(65_536):
                got += more
    client.leave()
    return got


LINES = [
    b"GET /p HTTP/1.1", b"GET /q?x=1&y=%20 HTTP/1.1", b"HEAD /p HTTP/1.1", b"OPTIONS /p HTTP/1.1",
    b"DELETE /p HTTP/1.1", b"POST /p HTTP/1.1", b"get /p HTTP/1.1", b"GET  /p HTTP/1.1", b"GET /p  HTTP/1.1",
    b"GET /p HTTP/1.1 ", b"GET /p HTTP/1.0", b"GET /p HTTP/2.0", b"GET /p http/1.1", b"GET /p", b"GET",
    b" GET /p HTTP/1.1",
    b"GET\t/p HTTP/1.1", b"GET /p\tx HTTP/1.1", b"GET /p\x00 HTTP/1.1", b"GET /p\x7f HTTP/1.1",
    b"GET /p\xc3\xa9 HTTP/1.1", b"GET /p#x HTTP/1.1", b'GET /p"<>\\^`{|} HTTP/1.1', b"GET /p[1] HTTP/1.1",
    b"GET p HTTP/1.1", b"GET  HTTP/1.1", b"GET * HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET http://test/p HTTP/1.1",
    b"GET //p HTTP/1.1", b"CONNECT test:80 HTTP/1.1", b"GET /p HTTP/1.1\r", b"\r\nGET /p HTTP/1.1",
    b"GET /k/b HTTP/1.1",     b"GET /k/a HTTP/1.1", b"GET /k/%zz HTTP/1.1", b"GET /" + b"x" * 9_000 + b" HTTP/1.1",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda line: repr(line[:30]))
def test_a_first_line_above_known_fields_is_judged_as_ever(line: bytes) -> None:
    """Whatever stands there: refused or read as it would be if its fields had never come before."""

    async def main() -> None:
        packet = get(line)
        assert await tell(packet, before=(get(b"GET /p HTTP/1.1"),)) == await tell(packet, before=())

    run(main)


KEYS = [
    b"b", b"", b" b", b"b ", b"b c", b"b\tc", b"b\x00", b"\xc3\xa9", b"b\r\nX-Shard-Key: b", b"b\r\nX-Shard-Key: c",
    b"b\r\nx-shard-key: b", b"b\r\n c", b"b\nHost: x", b"b\rc", b"%62", b"b,c", b"\x7f", b"k" * 2_048, b"k" * 2_049,
    b"b\r\nContent-Length: 0", b"b\r\n",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS, ids=lambda key: repr(key[:30]))
def test_a_key_among_known_fields_is_judged_as_ever(key: bytes) -> None:
    """Whatever the value is, on the client's known connection, too."""

    async def main() -> None:
        line = b"GET /p HTTP/1.1"
        ordinary, packet = get(line), get(line, FIELDS.replace(b"Key: a\r\n", b"Key: %b\r\n" % key))
        told = await tell(packet, before=())
        assert await tell(packet, before=(ordinary,)) == told
        behind = await tell(ordinary, packet, before=(ordinary,))
        assert behind == await tell(ordinary, packet, before=())
        assert behind.requests[1:] == told.requests

    run(main)


@pytest.mark.parametrize(
    "packets",
    [
        (post(b"abc"),),
        (post(b"ab"), b"c"),
        (post(b""), b"abc"),
        (post(b"abcd"),),
        (post(b"abc") + post(b"def"),),
        (post(b"abc") + b"GET /p HTT",),
        (post(b"abc")[:40], post(b"abc")[40:]),
        (get(b"GET /p HTTP/1.1") + post(b"abc"),),
        (post(b"abc"), post(b"def"), get(b"GET /p HTTP/1.1"), post(b"ghi", line=b"PUT /p HTTP/1.1")),
        (get(b"GET /p HTTP/1.1") + b"x",),
        (get(b"GET /p HTTP/1.1")[:-2], b"X-More: 1\r\n\r\n"),
        (get(b"GET /p HTTP/1.1")[:-1], b"\n"),
        (get(b"GET /p HTTP/1.1")[:-1], b"x"),
    ],
    ids=range(13),
)
def test_bodies_and_packets_behind_known_fields_are_read_as_ever(packets: tuple[bytes, ...]) -> None:
    """A body that is short, long, in pieces, or followed by more; a head in pieces."""

    async def main() -> None:
        before = (post(b"xyz"), get(b"GET /p HTTP/1.1"))
        assert await tell(*packets, before=before) == await tell(*packets, before=())

    run(main)


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n" + DATE + b"\r\n"


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([ANSWER + b"abc"], b"abc"),
        ([ANSWER + b"ab", b"c"], b"abc"),
        ([ANSWER, b"abc"], b"abc"),
        ([ANSWER[:20], ANSWER[20:] + b"abc"], b"abc"),
        ([b"HTTP/1.1 103 Early Hints\r\n\r\n" + ANSWER + b"abc"], b"abc"),
        ([b"HTTP/1.1 103 Early Hints\r\n\r\n", ANSWER + b"abc"], b"abc"),
    ],
    ids=range(6),
)
def test_a_known_answer_may_come_in_pieces(pieces: list[bytes], expected: bytes) -> None:
    """The same head as before, with its body, without, or behind something else."""

    async def main() -> None:
        async with stage() as here:

            async def script(request: Request) -> None:
                for piece in pieces if request.number >= 2 else [ANSWER + b"xyz"]:
                    request.writer.write(piece)
                    await request.writer.drain()
                    await asyncio.sleep(0.02)  # so that it comes as a packet of its own

            worker = await here.start("w1", script)
            await here.lead(worker)
            client = await here.client()
            for body in (b"xyz", b"xyz", expected, expected):
                answer = await client.ask("GET", "/k/a")
                assert (answer.status, answer.body) == (200, body)

    run(main)


def test_a_worker_that_says_more_than_its_known_answer_is_let_go() -> None:
    """Bytes behind the answer are nobody's: the answer passes, the connection does not stay."""

    async def main() -> None:
        async with stage() as here:

            async def script(request: Request) -> None:
                request.writer.write(ANSWER + (b"abc" if request.number < 2 else b"abcHTTP/1.1 200 OK\r\n"))

            worker = await here.start("w1", script)
            await here.lead(worker)
            client = await here.client()
            for _ in range(4):
                answer = await client.ask("GET", "/k/a")
                assert (answer.status, answer.body) == (200, b"abc")
            assert worker.connections == 2

    run(main)


def test_only_so_many_are_kept_and_the_latest_are() -> None:
    """Two generations; what is asked for stays."""
    known: Known[int] = Known()
    known.keep(b"x" * (BYTES_MAX + 1), 1)
    assert known[b"x" * (BYTES_MAX + 1)] is None
    known.keep(b"often", -1)
    for number in range(10 * KNOWN_MAX):
        known.keep(b"%d" % number, number)
        assert known[b"often"] == -1
    assert known[b"%d" % (10 * KNOWN_MAX - 1)] is not None
    assert known[b"0"] is None
    assert len(known) + len(known._old) <= 2 * KNOWN_MAX + 1
