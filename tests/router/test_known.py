"""What has come before is known by its bytes: what comes of a message is the same as if it had come first."""

import asyncio
import contextlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from shardlead.router.known import BYTES_MAX, KNOWN_MAX, Known
from tests.router.support import Request, Stage, run, stage

FIELDS = b"Host: test\r\nX-Shard-Key: a\r\nAccept: */*\r\nConnection: keep-alive\r\n"
QUIET_S = 0.15  # then the client sends on, and the router may still answer what was whole
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


async def tell(*packets: bytes, before: tuple[bytes, ...], behind: Sequence[bytes] = ()) -> Told:
    """Each packet behind what came of the one before; `before` goes over a connection of its own, twice.

    `behind` are ordinary ones, which are not told of, over the same connection."""
    async with stage() as here:
        bodies: list[bytes] = []
        worker = await here.start("w1", lambda request: answer(request, bodies))
        await here.lead(worker)
        for packet in (*before, *before):
            await ask_all(here, packet)
        if before:
            known = here.router.known
            assert known, "the ordinary ones are known"
        asked, heard = len(worker.requests) + len(behind), len(bodies) + len(behind)
        got = await ask_all(here, *packets, behind=behind)
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


async def ask_all(here: Stage, *packets: bytes, behind: Sequence[bytes] = ()) -> bytes:
    """All that comes to these packets, until the router has nothing more to say; they come behind ordinary ones."""
    client = await here.client()
    for packet in behind:
        await client.send(packet)
        assert (await client.answer()).status == 200
    got = b""
    for packet in packets:
        with contextlib.suppress(ConnectionError, RuntimeError):
            await client.send(packet)
        got += await client.within(QUIET_S)
    return got + await client.rest()


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


def traced(trace: bytes, key: bytes = b"a", line: bytes = b"GET /p HTTP/1.1") -> bytes:
    return get(line, b"Traceparent: %b\r\n" % trace + FIELDS.replace(b"Key: a\r\n", b"Key: %b\r\n" % key))


TRACES = [
    b"t9", b"", b" t", b"t ", b"t u", b"t\tu", b"t\x00", b"\xc3\xa9", b"%25", b"%b", b'"t"', b"\x7f", b"t\r\n u",
    b"t\nHost: x", b"t\ru", b"t\r\nTraceparent: t", b"t\r\nX-Shard-Key: c", b"t\r\nContent-Length: 0", b"t\r\n",
    b"t\r\n\r\nGET /q HTTP/1.1", b"t" * 9_000,
]  # fmt: skip


@pytest.mark.parametrize("key", [b"a", b"b", b""], ids=repr)
@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: repr(trace[:30]))
def test_a_value_that_differs_each_time_is_judged_as_ever(trace: bytes, key: bytes) -> None:
    """A client's field that it never says the same in, beside a key that may be new."""

    async def main() -> None:
        ordinary = [traced(b"t%d" % number) for number in range(3)]
        packet = traced(trace, key)
        assert await tell(packet, before=(), behind=ordinary) == await tell(packet, before=())

    run(main)


def test_requests_that_differ_in_an_identifier_are_known_by_the_rest() -> None:
    """With a body or without, whatever the order: each worker's request has its own values, and few are kept."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", lambda request: answer(request, []))
            await here.lead(worker)
            packets = []
            for number in range(60):
                own = b"X-Request-Id: r-%d\r\nTraceparent: 00-%08x\r\n" % (number, number)
                own += b"Idempotency-Key: i-%d\r\nContent-Length: 2\r\n" % number if number % 3 else b""
                line = b"POST /p HTTP/1.1" if number % 3 else b"GET /p HTTP/1.1"
                packets.append(get(line, FIELDS + own) + (b"ab" if number % 3 else b""))
            await ask_all(here, behind=packets)
            for number, request in enumerate(worker.requests):
                said = dict(request.raw_headers)
                assert said["X-Request-Id"] == f"r-{number}"
                assert said["Traceparent"] == f"00-{number:08x}"
                assert said.get("Idempotency-Key") == (f"i-{number}" if number % 3 else None)
            assert len(here.router.known) <= 6

    run(main)


def test_clients_that_differ_in_different_fields_are_not_mixed_up() -> None:
    """What is left of their requests is the same: the one's field is empty where the other's was cut out."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", lambda request: answer(request, []))
            await here.lead(worker)
            one, other = await here.client(), await here.client()
            turns = [(one, b"A", b"B")] * 3 + [(other, b"B", b"A")] * 3 + [(one, b"A", b"B"), (other, b"B", b"A")]
            for number, (client, full, empty) in enumerate(turns):
                fields = {full: b"%d" % number, empty: b""}
                packet = get(b"GET /p HTTP/1.1", FIELDS + b"A: %b\r\nB: %b\r\n" % (fields[b"A"], fields[b"B"]))
                await client.send(packet)
                assert (await client.answer()).status == 200
            for number, ((_, full, empty), request) in enumerate(zip(turns, worker.requests, strict=True)):
                said = dict(request.raw_headers)
                assert (said[full.decode()], said[empty.decode()]) == (str(number), "")

    run(main)


def test_blanks_around_a_value_are_no_part_of_it() -> None:
    """However a field's line is spelled, the worker is told the client's value, also if other lines' spelling makes up
    for the length."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", lambda request: answer(request, []))
            await here.lead(worker)
            await ask_all(here, behind=[get(b"GET /p HTTP/1.1", FIELDS + b"Auth: %d\r\nB: 1\r\n" % n) for n in (1, 2)])
            client = await here.client()
            for key, auth in itertools.product((b":\ta", b":  a", b":a", b": a ", b": a"), repeat=2):
                for last in (b"B: 1", b"B:1", b"B:\t1 "):
                    fields = b"Host: test\r\nX-Shard-Key%b\r\nAuth%b\r\n%b\r\n" % (key, auth, last)
                    await client.send(get(b"GET /p HTTP/1.1", fields))
                    assert (await client.answer()).status == 200
                    told = dict(worker.requests[-1].raw_headers)
                    assert [told[name] for name in ("X-Shard-Key", "Shardlead-Key", "Auth", "B")] == [
                        "a",
                        "a",
                        "a",
                        "1",
                    ]

    run(main)


def test_an_empty_host_hides_no_client() -> None:
    """Whether it is a connection's first request, is known, or comes behind another host; and it has a request id."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", lambda request: answer(request, []))
            await here.lead(worker)
            for hosts in ([b"", b"", b"test", b""], [b"test", b"", b""]):
                await ask_all(here, behind=[get(b"GET /p HTTP/1.1", FIELDS.replace(b"test", host)) for host in hosts])
            told = [dict(request.raw_headers) for request in worker.requests]
            assert [each["Host"] for each in told] == ["", "", "test", "", "test", "", ""]
            assert [each["X-Forwarded-Host"] for each in told] == [each["Host"] for each in told]
            assert {each["X-Forwarded-For"] for each in told} == {"127.0.0.1"}
            assert len({each["X-Request-Id"] for each in told}) == len(told)

    run(main)


def test_an_identifier_among_known_fields_is_replaced_if_it_cannot_stand_in_logs() -> None:
    """The request id is the one differing value that the router looks at."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", lambda request: answer(request, []))
            await here.lead(worker)
            ids = [b"r1", b"r2", b"r3", b'r"4', b"r" * 129, b"r6"]
            fields = [FIELDS + b"X-Request-Id: %b\r\n" % each for each in ids]
            await ask_all(here, behind=[get(b"GET /p HTTP/1.1", each) for each in fields])
            told = [dict(request.raw_headers)["X-Request-Id"] for request in worker.requests]
            assert [told[at] for at in (0, 1, 2, 5)] == ["r1", "r2", "r3", "r6"]
            assert not {'r"4', "r" * 129} & set(told)

    run(main)


def test_a_client_whose_fields_all_differ_is_served_as_ever() -> None:
    """Too many to cut out: it goes the long way."""

    async def main() -> None:
        def packet(number: int) -> bytes:
            return get(b"GET /p HTTP/1.1", FIELDS + b"".join(b"F%d: %d\r\n" % (at, number) for at in range(7)))

        alone = await tell(packet(5), before=())
        assert dict(alone.requests[0][3])["F6"] == "5"
        assert await tell(packet(5), before=(), behind=[packet(number) for number in range(5)]) == alone

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
