"""Whatever clients and workers send, cut wherever: no exception, no leak, and the same verdict however it was cut.

The router's own connections, intake, exchanges and upstream parsers, on transports made of lists; a desk that always
knows the leader; and a worker whose parser is not the router's and forgives nothing.
"""

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shardlead.core.routing import OUTCOME_UNKNOWN, SPENT, Happened, KeyRules
from shardlead.core.shardmap import Leader
from shardlead.router.counts import Counts
from shardlead.router.downstream import Downstream
from shardlead.router.exchange import Exchange
from shardlead.router.heads import answer_kinds, request_kinds
from shardlead.router.known import AnswerLooks, Known, RequestFields
from shardlead.router.plans import answer_plans, request_plans
from shardlead.router.pool import Pool
from shardlead.router.upstream import Taker, Upstream
from tests.router.support import SETTINGS, Listener
from tests.support.fuzz import bent_bytes, cut, examples

FUZZED: Final = replace(SETTINGS, keyless="any", body_bytes_max=1_000, head_bytes_max=4_096, headers_max=20)
LEADER: Final = Leader("w1", "s1", 9, "10.0.0.1:80", 9)
KINDS: Final = answer_kinds()
PLANS: Final = answer_plans(KINDS)
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
SWITCHING: Final = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n"


class Wire(asyncio.Transport):
    """A transport that keeps what is written, and knows whether it is read from."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.is_reading_now = True
        self.is_closed = self.is_aborted = self.has_eof = False

    def write(self, data: Any) -> None:
        assert not self.has_eof, "written behind its end"
        self.sent += bytes(data)

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        self.has_eof = True

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = self.is_aborted = True

    def pause_reading(self) -> None:
        assert self.is_reading_now, "paused twice"
        self.is_reading_now = False

    def resume_reading(self) -> None:
        assert not self.is_reading_now, "resumed without a pause"
        self.is_reading_now = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("203.0.113.7", 4_711) if name == "peername" else default


TARGET: Final = re.compile(rb"([A-Z-]+) (/[!-~]*|\*) HTTP/1\.1")
FIELD: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ?([\t -~\x80-\xff]*)")
CHUNK: Final = re.compile(rb"([0-9a-f]+)\r\n")
_TRAILERS: Final = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\t -~\x80-\xff]*\r\n)*\r\n")
_NO_TRAILER: Final = re.compile(
    rb"(?im)^(?:content-length|transfer-encoding|host|connection|shardlead-.*|x-shard-key):"
)


@dataclass
class Worker:
    """Reads requests from one connection, strictly, and answers each with what came; or by a script."""

    script: bytes | None = None
    requests: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    rest: bytes = b""
    was_told: bool = False
    is_tunnel: bool = False

    def feed(self, data: bytes) -> bytes:
        """What it answers to this."""
        self.rest += data
        out = b""
        while self.rest and not self.is_tunnel:
            answer = self._one()
            if answer is None:
                return out
            out += answer
        if self.is_tunnel:
            out, self.rest = out + self.rest, b""
        return out

    def _one(self) -> bytes | None:
        head, end, body = self.rest.partition(b"\r\n\r\n")
        if not end:
            return None
        line, *lines = head.split(b"\r\n")
        start = TARGET.fullmatch(line)
        assert start is not None, line
        fields: dict[bytes, bytes] = {}
        for each in lines:
            found = FIELD.fullmatch(each)
            assert found is not None, each
            name = found[1].lower()
            assert name not in fields or not _is_ours(name), f"{name!r} twice"
            fields[name] = found[2]
        assert fields[b"shardlead-epoch"] == b"9"
        assert fields[b"shardlead-shard"] == b"3"
        assert b"host" in fields
        if b"expect" in fields and not self.was_told and self.script is None:
            self.was_told = True
            return CONTINUE
        if b"transfer-encoding" in fields:
            assert b"content-length" not in fields
            assert fields[b"transfer-encoding"] == b"chunked"
            content, length = b"", 0
            while True:
                size = CHUNK.match(body, length)
                if size is None:
                    assert re.fullmatch(rb"[0-9a-f]*\r?", body[length:])
                    return None
                if not int(size[1], 16):
                    trailers = _TRAILERS.match(body, size.end())
                    if trailers is None:
                        return None
                    assert not re.search(_NO_TRAILER, trailers[0])
                    length = trailers.end()
                    break
                length = size.end() + int(size[1], 16) + 2
                if len(body) < length:
                    return None
                content += body[size.end() : length - 2]
                assert body[length - 2 : length] == b"\r\n"
        else:
            length = int(fields.get(b"content-length", b"0"))
            if len(body) < length:
                return None
            content = body[:length]
        self.rest = body[length:]
        self.was_told = False
        self.requests.append((start[1], start[2], content))
        if self.script is not None:
            return b""
        if b"upgrade" in fields:
            self.is_tunnel = True
            return SWITCHING
        said = b"%b %b %b" % (start[1], start[2], content)
        date = b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n" if len(said) % 2 else b""  # without: the router gives it one
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%b\r\n" % (len(said), date)
        return head + (b"" if start[1] == b"HEAD" else said)


def _is_ours(name: bytes) -> bool:
    return name in (b"host", b"content-length", b"transfer-encoding", b"expect", b"upgrade", b"connection") or (
        name.startswith(b"shardlead-")
    )


class Workers:
    """The connections to the one worker; `pool.Pool`, as exchanges and upstreams need it."""

    worker = "w1"
    now_s = 0.0

    def __init__(self) -> None:
        self.script: bytes | None = None
        self.known: Known[AnswerLooks] = Known()
        self.idle: list[Upstream] = []
        self.busy: set[Upstream] = set()
        self.ends: dict[Upstream, tuple[Wire, Worker]] = {}
        self.requests: list[tuple[bytes, bytes, bytes]] = []

    def take(self, taker: Taker, *, must_be_alive: bool) -> None:
        connection = self.take_idle()
        connection.taker = taker
        if not taker.connected(connection):
            self.give_back(connection)

    def take_idle(self) -> Upstream:
        if self.idle:
            connection = self.idle.pop()
        else:
            connection = Upstream(self, KINDS, PLANS, self.known)
            self.ends[connection] = (Wire(), Worker(self.script, self.requests))
            connection.connection_made(self.ends[connection][0])
        self.busy.add(connection)
        return connection

    def withdraw(self, taker: Taker) -> bool:
        return False

    def give_back(self, connection: Upstream) -> None:
        assert connection in self.busy, "given back twice"
        self.busy.discard(connection)
        if connection.is_reusable and connection.is_sent:
            self.idle.append(connection)
        else:
            connection.close()

    def forget(self, connection: Upstream) -> None:
        self.busy.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)

    def pump(self) -> bool:
        """Let workers read and answer; whether anything moved."""
        moved = False
        for connection, (wire, worker) in tuple(self.ends.items()):
            if wire.sent:
                data, wire.sent = wire.sent, b""
                moved = True
                answer = worker.feed(data)
                if answer and not wire.is_closed:
                    connection.data_received(answer)
            if wire.is_closed and connection.transport is not None:
                moved = True
                connection.connection_lost(None)
        return moved


class Desk:
    """Sends everything to the one worker; `exchange.Desk`."""

    id_prefix = b"id-"

    @property
    def date(self) -> Callable[[], bytes]:
        return lambda: b"Wed, 25 Nov 2026 16:26:02 GMT"

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.open: set[Exchange] = set()
        self.kept_bytes = 0

    def submit(self, exchange: Exchange) -> None:
        exchange.shard = 3
        self.open.add(exchange)
        exchange.send(LEADER, self.workers, must_be_alive=False)  # type: ignore[arg-type]  # a pool to all that is used

    def take_at_once(self, key: bytes, *, is_safe: bool, size: int) -> tuple[Upstream, Pool, Leader, int] | None:
        self.keep(size)
        return self.workers.take_idle(), self.workers, LEADER, 3  # type: ignore[return-value]  # as above

    def answered_at_once(self, since_ns: int, size: int) -> None:
        self.keep(-size)

    def happened(self, exchange: Exchange, what: Happened) -> None:
        exchange.detach()
        if what is Happened.TORN:
            exchange.cut()
        else:
            exchange.fail(OUTCOME_UNKNOWN)

    def turned_down(self, exchange: Exchange, what: Happened, epoch: int, leader: bytes) -> None:
        exchange.detach()
        exchange.fail(SPENT)

    def accepted(self, exchange: Exchange) -> None:
        pass

    def is_current(self, exchange: Exchange) -> bool:
        return True

    def withdraw(self, exchange: Exchange) -> None:
        pass

    def keep(self, size: int) -> bool:
        self.kept_bytes += size
        assert self.kept_bytes >= 0
        return True

    def ended(self, exchange: Exchange, outcome: str) -> None:
        self.open.discard(exchange)


class Front:
    """What a client's connection sees of the router; `downstream.Front`."""

    settings = FUZZED
    rules = KeyRules.parse(FUZZED.key_rules)
    kinds = request_kinds(rules.headers)
    plans = request_plans(kinds, FUZZED.headers_max)
    is_stopping = False
    access = None
    now_s = 0.0

    def __init__(self) -> None:
        self.workers = Workers()
        self.known: Known[RequestFields] = Known()
        self.desk = Desk(self.workers)
        self.counts = Counts()
        self.number = 0

    @staticmethod
    def now_ns() -> int:
        return 0

    def next_number(self) -> int:
        self.number += 1
        return self.number

    def admit(self, connection: Downstream, peer: str) -> str:
        return ""

    def forget(self, connection: Downstream, peer: str) -> None:
        pass

    def tunnelled(self, exchange: Exchange) -> bool:
        return True


@dataclass(frozen=True)
class Verdict:
    """What a client was told in the end, and what its worker was asked."""

    answers: bytes
    is_cut: bool
    is_closed: bool
    requests: tuple[tuple[bytes, bytes, bytes], ...]


@contextmanager
def _no_errors() -> Iterator[None]:
    """Nothing may be logged as an error."""
    heard: list[str] = []
    handler = Listener(heard)
    logging.getLogger("shardlead").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("shardlead").removeHandler(handler)
    assert not heard, heard[0]


def _settle(front: Front) -> None:
    for _ in range(1_000):
        if not front.workers.pump():
            return
    raise AssertionError("it never ends")


def told(chunks: list[bytes]) -> Verdict:
    """What a client hears that sends this, each piece when the one before has been worked on."""
    with _no_errors():
        front = Front()
        connection, wire = Downstream(front), Wire()
        connection.connection_made(wire)
        waiting = deque(chunks)
        while waiting and wire.is_reading_now and not wire.is_closed:
            connection.data_received(waiting.popleft())
            _settle(front)
        verdict = Verdict(
            _plain(wire.sent), wire.is_aborted, wire.is_closed or wire.has_eof, tuple(front.workers.requests)
        )
        connection.connection_lost(None)
        _settle(front)
        assert not front.desk.open
        assert front.desk.kept_bytes == 0
        assert not front.workers.busy, "a connection leaks"
        assert all(wire.is_closed or one in front.workers.idle for one, (wire, _) in front.workers.ends.items())
        return verdict


def assert_agree(one: Verdict, other: Verdict) -> None:
    """The same; but a request refused before its body has come is the last of its connection, and one refused with
    its body read need not be."""
    short, long = sorted((one, other), key=lambda verdict: len(verdict.requests))
    if short != long and b"problem+json" in short.answers and short.is_closed and not short.is_cut:
        assert long.answers.replace(LAST_ONE, b"").startswith(short.answers.replace(LAST_ONE, b""))
        assert long.requests[: len(short.requests)] == short.requests
    else:
        assert one == other


LAST_ONE: Final = b"Connection: close\r\n"
SHARD_TOLD: Final = re.compile(rb',"(?:shard":3|request_id":"id-[0-9a-f]+")')
LENGTH: Final = re.compile(rb"Content-Length: \d+")


def _plain(sent: bytes) -> bytes:
    """Without what may depend on when things came: interim answers, and whether a refusal knew its shard and id."""
    return LENGTH.sub(b"Content-Length: n", SHARD_TOLD.sub(b"", sent.replace(CONTINUE, b"")))


# --- clients -----------------------------------------------------------------------------------------------------

GOOD: Final = (
    b"GET /k/a HTTP/1.1\r\nHost: test\r\n\r\n",
    b"HEAD /k/a?x=1 HTTP/1.1\r\nHost: test\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n",
    b"POST /k/a/b HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\nX-Shard-Key: a\r\n\r\nhello",
    (
        b"PUT /?key=%61 HTTP/1.1\r\nHost: [::1]:80\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\n1;x=y\r\n!\r\n0\r\nT: v\r\n\r\n"
    ),
    b"POST /k/a HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
    b"GET http://test/k/b HTTP/1.1\r\nHost: other\r\nConnection: keep-alive, X-Gone\r\nX-Gone: 1\r\n\r\n",
    (
        b"GET /k/a HTTP/1.1\r\nHost: test\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"Upgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n"
    ),
    b"OPTIONS * HTTP/1.1\r\nHost: test\r\nAccept: */*\r\n\r\n",
    b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"\r\nGET /k/z HTTP/1.1\r\nhost:test\r\n\r\n",
)
LAST: Final = (
    b"GET /k/a HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n",
    b"GET /k/a HTTP/1.0\r\n\r\n",
    b"GET /k/a HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nsome bytes\r\n\r\n of another",
)
PIECES: Final = (
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b"%", b"#", b"\xff", b"0", b"-1", b"{", b"chunked"),
    *(b"\r\nContent-Length: 5", b"\r\nContent-Length: +5", b"\r\nTransfer-Encoding: chunked", b"\r\nHost: x"),
    *(b"\r\nTransfer-Encoding: gzip, chunked", b"\r\nTransfer-Encoding:\x0bchunked", b"\r\nConnection: close"),
    *(b"\r\nUpgrade: websocket\r\nConnection: upgrade", b"\r\nUpgrade: h2c", b"\r\nExpect: 100-continue"),
    *(b"\r\nShardlead-Shard: 0", b"\r\nShardlead-Epoch: 99\r\nshardlead-key: q", b"\r\n folded", b"\r\nX: \r\n\r\n"),
    *(b"\r\nContent-Length: " + b"0" * 30, b"\r\nContent-Length: 18446744073709551615", b"ffffffffffffffff"),
    *(b"1001", b"HTTP/1.1", b"HTTP/2.0", b"http://", b"/k/", b"CONNECT ", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    *(b"\r\nX-Shard-Key: other", b"?key=%zz", b"\r\nConnection: host, content-length, transfer-encoding"),
)


@st.composite
def _streams(draw: st.DrawFn) -> bytes:
    stream = b"".join(draw(st.lists(st.sampled_from(GOOD), max_size=3)))
    return stream + draw(st.sampled_from((*GOOD, *LAST)))


@examples(60)
@given(_streams(), st.data())
def test_good_requests_are_answered_however_they_are_cut(stream: bytes, data: st.DataObject) -> None:
    """Each once, in order, none of them refused, and the one behind a good one is as good."""
    whole = told([stream])
    assert told(data.draw(cut(stream))) == whole
    assert not whole.is_cut
    statuses = re.findall(rb"HTTP/1\.1 (\d+) ", whole.answers)
    assert len(whole.requests) == len(statuses)
    assert set(statuses) <= {b"200", b"101"}


@examples(700)
@given(_streams().flatmap(lambda stream: bent_bytes(stream, PIECES)), st.data())
def test_bent_requests_get_the_same_verdict_however_they_are_cut(stream: bytes, data: st.DataObject) -> None:
    """No exception, nothing left behind, and the worker never sees a request that can be read in two ways."""
    assume(len(stream) < FUZZED.head_bytes_max)  # what is over a limit is found sooner in pieces
    assert_agree(told(data.draw(cut(stream))), told([stream]))


@examples(300)
@given(_streams().flatmap(lambda stream: bent_bytes(stream, PIECES)), st.data())
def test_a_client_that_ends_its_half_anywhere_is_answered_or_let_go(stream: bytes, data: st.DataObject) -> None:
    """Wherever it stops sending, its connection ends as soon as what came whole has been answered; only a tunnel waits
    for the worker's half."""
    with _no_errors():
        front = Front()
        front.now_s = 1.0
        connection, wire = Downstream(front), Wire()
        connection.connection_made(wire)
        for piece in data.draw(cut(stream)):
            if wire.is_reading_now and not wire.is_closed:
                connection.data_received(piece)
                if data.draw(st.booleans()):
                    _settle(front)
        while not wire.is_reading_now and not wire.is_closed and front.workers.pump():
            pass  # the end is heard when what came before it has been read
        is_kept = not wire.is_closed and connection.eof_received()
        _settle(front)
        if is_kept and connection._tunnel is None:
            assert wire.is_closed, "nobody will ever end it"
        connection.connection_lost(None)
        _settle(front)
        assert not front.desk.open
        assert front.desk.kept_bytes == 0
        assert not front.workers.busy, "a connection leaks"


def test_a_refused_head_behind_one_that_is_read_again_is_refused_in_order() -> None:
    """A request for h2c is read again as an ordinary one; what is wrong behind it is the client's, not our failure."""
    verdict = told([GOOD[6] + b"GET /k/a HTTP/1.1\r\nHost: a b\r\n\r\n"])
    assert re.findall(rb"HTTP/1\.1 (\d+) ", verdict.answers) == [b"200", b"400"]
    assert not verdict.is_cut


def test_what_comes_behind_a_request_for_a_tunnel_belongs_to_the_tunnel() -> None:
    """Also where another request was sent along before it, whose answer comes first."""
    verdict = told([GOOD[0] + LAST[2]])
    assert verdict.answers.endswith(b"some bytes\r\n\r\n of another")
    assert len(verdict.requests) == 2


@examples(60)
@given(st.binary(max_size=200), st.data())
def test_any_bytes_get_the_same_verdict_however_they_are_cut(stream: bytes, data: st.DataObject) -> None:
    """Bytes of no shape at all."""
    verdict = told([stream])
    assert told(data.draw(cut(stream))) == verdict
    assert not verdict.requests


@pytest.mark.parametrize("size", [5_000, 20_000])
def test_a_long_number_of_zeros_is_no_length(size: int) -> None:
    """Python converts no number of more than 4,300 digits: a length that long is refused as any other bad one."""
    head = b"POST /k/a HTTP/1.1\r\nHost: test\r\nContent-Length: %b5\r\n\r\nhello"
    front = replace(FUZZED, head_bytes_max=32_768)
    try:
        Front.settings = front
        verdict = told([head % (b"0" * size)])
    finally:
        Front.settings = FUZZED
    assert b"HTTP/1.1 400 " in verdict.answers
    assert not verdict.is_cut


@pytest.mark.parametrize("where", ["name", "value", "extension", "size", "many"])
def test_what_stands_between_chunks_has_a_bound(where: str) -> None:
    """Trailers and chunk extensions are dropped, but their bytes must not come for ever: nothing of a body does."""
    start = b"POST /k/a HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    start += {
        "name": b"0\r\n",
        "value": b"0\r\nX: ",
        "extension": b"5;",
        "size": b"",
        "many": b"0\r\n",
    }[where]
    piece = {"many": b"X: y\r\n" * 100, "size": b"0" * 500}.get(where, b"y" * 500)
    verdict = told([start, *[piece] * 100])
    assert b"HTTP/1.1 431 " in verdict.answers or b"HTTP/1.1 400 " in verdict.answers
    assert verdict.is_closed
    assert not verdict.requests


# --- workers -----------------------------------------------------------------------------------------------------

ANSWERS: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nDate: today\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n3;x\r\nyou\r\n0\r\nT: v\r\n\r\n",
    b"HTTP/1.1 200\r\nConnection: close\r\n\r\nuntil the end",
    b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 204 No Content\r\nX-A: b\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
    (
        b"HTTP/1.1 421 Misdirected\r\nShardlead-Refused: stale\r\nShardlead-Epoch: 12\r\n"
        b"Shardlead-Leader: w2 10.0.0.2:80 12\r\nContent-Length: 2\r\n\r\n{}"
    ),
    b"HTTP/1.1 502 Bad Gateway\r\nShardlead-Outcome: unknown\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi",
    SWITCHING + b"bytes",
)
ANSWER_PIECES: Final = (
    *PIECES,
    *(b" 099 ", b" 000 ", b" 100 ", b" 101 ", b" 199 ", b" 204 ", b" 600 ", b" 999 ", b"HTTP/1.1 100 \r\n\r\n"),
    *(b"\r\nShardlead-Refused: draining", b"\r\nShardlead-Epoch: " + b"9" * 5_000, b"\r\nShardlead-Leader: a b c"),
    *(b"\r\nShardlead-Leader: w h:99999 " + b"1" * 5_000, b"\r\nSet-Cookie: a=b"),
)
ASKING: Final = (
    b"GET /k/a HTTP/1.1\r\nHost: test\r\n\r\n",
    b"HEAD /k/a HTTP/1.1\r\nHost: test\r\n\r\n",
    b"POST /k/a HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi",
    LAST[2].partition(b"some")[0],
)
STATUS_LINE: Final = re.compile(rb"HTTP/1\.1 ([1-9]\d\d) [\t -~\x80-\xff]*")


def heard(asking: bytes, chunks: list[bytes], *, has_end: bool) -> tuple[Any, ...]:
    """What a client hears that asks once, when its worker's bytes come like this (and then end)."""
    with _no_errors():
        front = Front()
        front.workers.script = b""
        client, wire = Downstream(front), Wire()
        client.connection_made(wire)
        client.data_received(asking)
        _settle(front)
        ((upstream, (end, _)),) = front.workers.ends.items()
        for chunk in chunks:
            if not end.is_closed:
                upstream.data_received(chunk)
                _settle(front)
        if has_end and upstream.transport is not None:
            upstream.eof_received()
            _settle(front)
            end.close()
            _settle(front)
        answer = "cut" if wire.is_aborted else _read_answers(wire.sent, is_head=asking.startswith(b"HEAD"))
        is_over = not front.desk.open
        client.connection_lost(None)
        _settle(front)
        assert not front.desk.open
        assert all(one in front.workers.idle or one._is_skipping for one in front.workers.ends if one.transport)
        for one in tuple(front.workers.ends):
            one.close()
            _settle(front)
        assert not front.workers.busy
        return answer, is_over, wire.is_aborted


def _read_answers(sent: bytes, *, is_head: bool) -> Any:
    """Interim heads, the answer's head and its body without framing, and whether it is whole; strictly read."""
    heads: list[tuple[bytes, ...]] = []
    while True:
        head, end, sent = sent.partition(b"\r\n\r\n")
        if not end:
            assert not head
            return heads, b"", False
        line, *lines = head.split(b"\r\n")
        status = STATUS_LINE.fullmatch(line)
        assert status is not None, line
        fields = [FIELD.fullmatch(each) for each in lines]
        assert all(fields), lines
        values = {each[1].lower(): each[2] for each in fields if each is not None}
        assert not [name for name in values if name.startswith(b"shardlead-")]
        heads.append((line, *lines))
        code = int(status[1])
        if code == 101 or code >= 200:
            break
    if code == 101:
        return heads, sent, True
    if is_head or code in (204, 304):
        assert not sent
        return heads, b"", True
    if values.get(b"transfer-encoding") == b"chunked":
        assert b"content-length" not in values
        body = b""
        while found := CHUNK.match(sent):
            size = int(found[1], 16)
            if not size:
                trailers = _TRAILERS.fullmatch(sent, found.end())
                assert trailers is not None
                assert not re.search(_NO_TRAILER, trailers[0])
                return heads, body, True
            body += sent[found.end() : found.end() + size]
            sent = sent[found.end() + size + 2 :]
        assert not sent
        return heads, body, False
    length = values.get(b"content-length")
    assert length is None or len(sent) <= int(length)
    return heads, sent, length is not None and len(sent) == int(length)


@examples(600)
@given(st.sampled_from(ASKING), st.sampled_from(ANSWERS), st.booleans(), st.booleans(), st.data())
def test_bent_answers_get_the_same_verdict_however_they_are_cut(
    asking: bytes, answer: bytes, is_bent: bool, has_end: bool, data: st.DataObject
) -> None:
    """What the client reads is HTTP that no Shardlead-* field is in, or it is cut off; no connection stays busy."""
    stream = data.draw(bent_bytes(answer, ANSWER_PIECES)) if is_bent else answer
    whole = heard(asking, [stream], has_end=has_end)
    assert heard(asking, data.draw(cut(stream)), has_end=has_end) == whole
    assert whole[1] or not has_end or whole[0][2], "the worker has left, and its request has not ended"


def test_two_things_wrong_with_a_request_and_the_first_is_told() -> None:
    """Its target, and then its body's framing: in one packet or byte by byte."""
    stream = (
        b"PUT /?key=%/ HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n\r\n5\r\nhello\r\n1;x=y\r\n!\r\n"
    )
    whole, pieces = told([stream]), told([stream[at : at + 1] for at in range(len(stream))])
    assert whole == pieces
    assert whole.answers.startswith(b"HTTP/1.1 400 ")
    assert b"percent sign" in whole.answers


@pytest.mark.parametrize("status", [b"000", b"001", b"099"])
def test_a_status_below_100_is_none(status: bytes) -> None:
    """It would be taken for an interim answer, and the client for one that still waits."""
    (heads, _, is_whole), is_over, _ = heard(
        ASKING[0], [b"HTTP/1.1 %b Odd\r\nContent-Length: 0\r\n\r\n" % status], has_end=False
    )
    assert heads[0][0].startswith(b"HTTP/1.1 502 ")
    assert is_whole
    assert is_over


def test_a_reason_phrase_has_no_control_characters() -> None:
    """The router's parser lets them pass; the client's may not."""
    (heads, _, _), _, _ = heard(ASKING[0], [b"HTTP/1.1 200 \0OK\r\nContent-Length: 0\r\n\r\n"], has_end=False)
    assert heads[0][0].startswith(b"HTTP/1.1 502 ")


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 ", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\n"])
def test_an_answers_head_has_a_bound(start: bytes) -> None:
    """A head that never ends must not fill the router's memory."""
    (heads, _, _), is_over, _ = heard(ASKING[0], [start, *[b"x" * 65_536] * 40], has_end=False)
    assert heads[0][0].startswith(b"HTTP/1.1 502 ")
    assert is_over
