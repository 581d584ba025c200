"""A client's connection: parses requests, gives each its turn, holds the client back when it must.

What it never does: know shards or workers. One request of a connection is in work at a time; others that were sent
along wait parsed, and nothing more is read until their turn comes.

Law: a head that could be read in two ways ends the connection with a 400; nothing after it is looked at. (The parser,
llhttp without any of its leniencies, refuses bare LF, folded fields, spaces before colons, control characters, two
Content-Lengths, Content-Length beside Transfer-Encoding and bad chunks; `heads.read_request` refuses the rest.)
"""

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, cast

import httptools

from shardlead.config import RouterSettings
from shardlead.core.contract import Problem
from shardlead.core.routing import KeyRules
from shardlead.errors import RequestError
from shardlead.router.counts import Counts
from shardlead.router.exchange import ANSWERING, COLLECTING, SENT, WAITING, Desk, Exchange
from shardlead.router.forwarded import Forwarder
from shardlead.router.heads import Kinds, read_request
from shardlead.router.problems import problem_bytes

log = logging.getLogger("shardlead.router")

WRITE_HIGH_BYTES: Final = 262_144
LINGER_S: Final = 2.0  # an answered client that still sends is read for so long, so that it can read the answer
STOPPING_IDLE_S: Final = 0.5  # how long an idle client has to send a request that crosses with our stopping


class Front(Protocol):
    """What a client's connection needs of the router."""

    @property
    def settings(self) -> RouterSettings: ...
    @property
    def rules(self) -> KeyRules: ...
    @property
    def kinds(self) -> Kinds: ...
    @property
    def counts(self) -> Counts: ...
    @property
    def desk(self) -> Desk: ...
    @property
    def is_stopping(self) -> bool: ...
    @property
    def now_s(self) -> float:
        """Seconds on the router's clock, as of its last sweep."""
        ...

    @property
    def now_ns(self) -> Callable[[], int]: ...

    def next_number(self) -> int: ...

    def admit(self, connection: "Downstream", peer: str) -> str:
        """Count a new connection; the reason why it cannot stay, or ""."""
        ...

    def forget(self, connection: "Downstream", peer: str) -> None: ...

    def tunnelled(self, exchange: Exchange) -> None: ...


class Downstream(asyncio.Protocol):
    """One client's connection."""

    __slots__ = (
        "_after_upgrade",
        "_current",
        "_fatal",
        "_fields",
        "_filling",
        "_forwarder",
        "_front",
        "_has_parsed_head",
        "_head_bytes",
        "_head_pieces",
        "_head_since_s",
        "_is_advancing",
        "_is_deaf",
        "_is_in_head",
        "_is_lingering",
        "_is_reading",
        "_mark_s",
        "_packet_bytes",
        "_parser",
        "_peer",
        "_queue",
        "_reparse",
        "_transport",
        "_tunnel",
        "_url",
        "is_full",
    )

    def __init__(self, front: Front) -> None:
        self._front = front
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._peer = ""
        self._forwarder: Forwarder | None = None
        self._url = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._filling: Exchange | None = None  # the exchange whose body is being parsed
        self._current: Exchange | None = None
        self._queue: deque[Exchange] = deque()
        self._tunnel: Exchange | None = None
        self._fatal: RequestError | None = None
        self._after_upgrade: bytes | None = None
        self._reparse: bytes | None = None
        self._head_bytes = 0  # at most so many have come of an unfinished head
        self._packet_bytes = 0
        self._head_pieces: list[bytes] = []
        self._head_since_s = 0.0
        self._is_in_head = False
        self._has_parsed_head = False
        self._is_advancing = False
        self._is_deaf = False  # nothing that comes is parsed any more
        self._is_lingering = False
        self._is_reading = True
        self._mark_s = front.now_s  # of the last progress
        self.is_full = False

    def __repr__(self) -> str:
        return f"<Downstream from {self._peer}: {self._current!r}, {len(self._queue)} behind it>"

    # --- asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is none by class
        name = transport.get_extra_info("peername")
        self._peer = str(name[0]) if isinstance(name, tuple) and name else ""
        raw: socket.socket | None = transport.get_extra_info("socket")
        if raw is not None and raw.family != socket.AF_UNIX:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        front = self._front
        self._forwarder = Forwarder(front.settings.forwarded, self._peer)
        refusal = front.admit(self, self._peer)
        if refusal:
            self._refuse(RequestError(Problem.OVERLOADED, refusal, status=503))

    def data_received(self, data: bytes) -> None:
        if self._tunnel is not None:
            self._mark_s = self._front.now_s
            self._tunnel.client_tunnelled(data)
            return
        if self._is_deaf:
            return
        self._packet_bytes = len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._upgrade(data[exc.args[0] :])
        except httptools.HttpParserError as exc:
            self._is_deaf_or_fatal(exc)
        if not self._is_in_head:
            if self._head_pieces:
                self._head_bytes = 0
                self._head_pieces.clear()
        elif not self._is_deaf:
            self._head_bytes += len(data)
            self._head_pieces.append(data)
            if self._head_bytes > self._front.settings.head_bytes_max:
                self._measure_head()
        self._advance()

    def eof_received(self) -> bool:
        return False  # a client that sends no more is taken to have gone, as nginx and HAProxy take it

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        self._transport = None
        self._is_deaf = True
        self._front.forget(self, self._peer)
        tunnel, self._tunnel = self._tunnel, None
        for exchange in (self._current, tunnel, *self._queue):
            if exchange is not None:
                exchange.client_left()
        self._current = None
        self._queue.clear()
        self._filling = None

    def pause_writing(self) -> None:
        self.is_full = True
        exchange = self._tunnel or self._current
        if exchange is not None:
            exchange.client_full()

    def resume_writing(self) -> None:
        self.is_full = False
        self._mark_s = self._front.now_s
        exchange = self._tunnel or self._current
        if exchange is not None:
            exchange.client_drained()

    # --- parser

    def on_message_begin(self) -> None:
        self._is_in_head = True
        self._head_since_s = self._front.now_s
        self._url = b""
        self._fields = []
        self._filling = None
        self._has_parsed_head = False

    def on_url(self, url: bytes) -> None:
        self._url = self._url + url if self._url else url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_parsed_head:  # else: a trailer, which is not passed on
            self._fields.append((name, value))

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._has_parsed_head = True
        front = self._front
        parser = self._parser
        settings = front.settings
        fields = self._fields
        if len(fields) > settings.headers_max:
            raise RequestError(Problem.TOO_LARGE, f"over {settings.headers_max} header fields", status=431)
        if self._head_pieces or self._packet_bytes > settings.head_bytes_max:  # else it cannot be too large
            size = len(self._url) + sum(len(name) + len(value) + 4 for name, value in fields)
            if size > settings.head_bytes_max:
                raise self._too_large()
        assert self._forwarder is not None
        method = parser.get_method()
        head = read_request(method, self._url, parser.get_http_version(), fields, front.kinds, self._forwarder)
        if head.has_upgrade:
            if parser.should_upgrade() != bool(head.upgrade):
                raise RequestError(Problem.BAD_REQUEST, "an Upgrade that can be read in two ways")
            if head.upgrade and (head.has_body or head.upgrade.lower() == b"h2c"):
                self._reparse = _without_upgrade(method, self._url, fields)
                return
        exchange = Exchange(front.desk, self, head, front.next_number(), front.now_ns())
        if not head.is_keep_alive:
            self._is_deaf = True  # for what follows this request
        try:
            exchange.key = front.rules.find(head.target, head.key_values)
            if exchange.key is None and settings.keyless == "refuse":
                exchange.error = RequestError(Problem.KEY_MISSING, _no_key(front.rules))
            elif head.length > settings.body_bytes_max:
                exchange.error = RequestError(
                    Problem.TOO_LARGE, f"a body may have {settings.body_bytes_max} bytes", status=413
                )
        except RequestError as exc:
            exchange.error = exc
        self._filling = exchange
        self._queue.append(exchange)

    def on_body(self, data: bytes) -> None:
        exchange = self._filling
        if exchange is not None:
            self._mark_s = self._front.now_s
            if not exchange.body_came(data, self._front.settings.body_bytes_max):
                exchange.refuse_body(
                    RequestError(
                        Problem.TOO_LARGE,
                        f"a body may have {self._front.settings.body_bytes_max} bytes",
                        status=413,
                    )
                )

    def on_message_complete(self) -> None:
        exchange = self._filling
        if exchange is not None:
            self._filling = None
            exchange.body_ended()
        self._mark_s = self._front.now_s

    # --- turns

    def _advance(self) -> None:
        """Give the next request its turn, for as long as they can be answered at once."""
        if self._is_advancing:
            return
        self._is_advancing = True
        try:
            while True:
                exchange = self._current
                if exchange is None:
                    if self._transport is None:
                        break
                    if not self._queue:
                        if self._fatal is not None:
                            self._refuse(self._fatal)
                        break
                    exchange = self._current = self._queue.popleft()
                    exchange.settle()
                    exchange.prompt()
                elif exchange.state == COLLECTING:
                    exchange.settle()
                if exchange.state != COLLECTING or not exchange.can_start:
                    break
                exchange.start()
                if self._current is exchange:
                    break
        finally:
            self._is_advancing = False
        self.set_reading()

    def exchange_ended(self, exchange: Exchange, *, is_last: bool) -> None:
        if self._tunnel is exchange:
            self._tunnel = None
            self._close()
            return
        if self._current is not exchange:
            return
        self._current = None
        self._mark_s = self._head_since_s = self._front.now_s
        if is_last or self._transport is None:
            self._queue.clear()
            self._fatal = None
            self._linger(is_read_out=exchange.is_body_whole)
            return
        rest = self._after_upgrade
        if rest is not None:  # it stayed HTTP
            self._after_upgrade = None
            self._parser = httptools.HttpRequestParser(self)
            self.set_reading()
            if rest:
                self.data_received(rest)
                return
        self._advance()

    def set_reading(self) -> None:
        transport = self._transport
        if transport is None:
            return
        current = self._tunnel or self._current
        should_read = self._is_lingering or not (
            self._queue or self._after_upgrade is not None or (current is not None and current.is_blocked)
        )
        if should_read != self._is_reading:
            self._is_reading = should_read
            if should_read:
                transport.resume_reading()
            else:
                transport.pause_reading()

    # --- `exchange.Client`

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def write_two(self, head: bytes, data: bytes) -> None:
        if self._transport is not None:
            self._transport.writelines((head, data))

    def is_last(self, exchange: Exchange) -> bool:
        return not exchange.head.is_keep_alive or self._front.is_stopping

    def touch(self) -> None:
        self._mark_s = self._front.now_s

    def open_tunnel(self, exchange: Exchange) -> None:
        rest, self._after_upgrade = self._after_upgrade, None
        self._tunnel = exchange
        self._current = None
        self._front.tunnelled(exchange)
        self.set_reading()
        if rest:
            exchange.client_tunnelled(rest)

    def cut(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- ends

    def _upgrade(self, rest: bytes) -> None:
        """The parser has stopped behind a request that asks for another protocol."""
        if self._reparse is not None:  # asked for nothing we do: it is read again as an ordinary request
            head, self._reparse = self._reparse, None
            self._parser = httptools.HttpRequestParser(self)
            self.data_received(head + rest)
            return
        self._after_upgrade = rest

    def _is_deaf_or_fatal(self, exc: httptools.HttpParserError) -> None:
        if isinstance(exc, httptools.HttpParserCallbackError):
            cause = exc.__context__
            if isinstance(cause, RequestError):
                self._fail_after(cause)
                return
            log.error("failed on a request", exc_info=exc, extra={"peer": self._peer})
            self.cut()
        elif self._is_deaf and self._filling is None:
            pass  # bytes after the last request of the connection
        else:
            self._fail_after(RequestError(Problem.BAD_REQUEST, str(exc)))

    def _fail_after(self, error: RequestError) -> None:
        """The connection cannot be read any more. Whole requests before this are answered first."""
        self._is_deaf = True
        self._is_in_head = False
        broken, self._filling = self._filling, None
        if broken is None:
            self._fatal = error
        elif broken in self._queue or broken.state == COLLECTING:
            if broken in self._queue:
                self._queue.remove(broken)
            else:
                self._current = None
            broken.client_left()
            self._fatal = error
        else:
            broken.refuse_body(error)

    def _measure_head(self) -> None:
        """The unfinished head may be too large; or the packet in which it began had other requests before it."""
        begun = b"".join(self._head_pieces).rpartition(b"\r\n")[2]
        self._head_pieces = [begun]
        self._head_bytes = len(begun)
        if self._fields:
            self._head_bytes += len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._fields)
        if self._head_bytes > self._front.settings.head_bytes_max:
            self._fail_after(self._too_large(*begun.partition(b":")[::2]))

    def _too_large(self, name: bytes = b"", value: bytes = b"") -> RequestError:
        """Why the head is too large: its key is, if a key can be seen. `name` and `value`: the field that was cut."""
        key_headers = self._front.rules.headers
        values = [each for field, each in (*self._fields, (name, value)) if field.lower() in key_headers]
        try:
            self._front.rules.find(self._url, values)
        except RequestError as exc:
            if exc.kind == Problem.KEY_TOO_LONG:
                return exc
        limit = self._front.settings.head_bytes_max
        return RequestError(Problem.TOO_LARGE, f"a request's head may have {limit} bytes", status=431)

    def _refuse(self, error: RequestError) -> None:
        self._fatal = None
        self._front.counts.others[_OUTCOMES.get(error.kind, "bad-request")] += 1
        self.write(problem_bytes(error.kind, error.status, error.detail, is_last=True))
        self._linger(is_read_out=False)

    def _linger(self, *, is_read_out: bool) -> None:
        """The last answer is written. A connection closed while bytes are unread is reset, and the answer with it."""
        self._is_deaf = True
        if is_read_out or self._transport is None or not self._transport.can_write_eof():
            self._close()
            return
        self._is_lingering = True
        self._mark_s = self._front.now_s
        self._transport.write_eof()
        self.set_reading()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def stop(self) -> None:
        """The router is stopping; a connection without a request goes soon (`check`)."""
        if self._tunnel is not None:
            self._close()

    def check(self, now_s: float) -> None:
        """Called about once a second: end what has taken too long."""
        settings = self._front.settings
        still_s = now_s - self._mark_s
        if self._is_lingering:
            if still_s > LINGER_S:
                self.cut()
            return
        exchange = self._current
        if self._tunnel is not None:
            return
        if exchange is None and self._is_in_head:
            if now_s - self._head_since_s > settings.head_timeout_s:
                self._is_in_head = False
                self._refuse(RequestError(Problem.TIMED_OUT, "the request's head did not arrive in time", status=408))
        elif exchange is None:
            limit_s = settings.idle_timeout_s
            if still_s > (min(STOPPING_IDLE_S, limit_s) if self._front.is_stopping else limit_s):
                self._close()
        elif exchange.state == WAITING:
            if not exchange.is_held and still_s > settings.hold_timeout_s:
                exchange.crowded_out()
        elif exchange.state == COLLECTING or (exchange.state == SENT and not exchange.is_body_whole):
            if exchange.state == SENT and exchange.is_waiting_for_100:
                if still_s > settings.answer_timeout_s:
                    exchange.silent()
            elif still_s > settings.body_progress_timeout_s:
                exchange.stalled()
        elif exchange.state == SENT:
            if still_s > settings.answer_timeout_s:
                exchange.silent()
        elif exchange.state == ANSWERING and still_s > settings.body_progress_timeout_s:
            exchange.cut()

    def abort(self) -> None:
        """The router's time for stopping is over."""
        self.cut()


_OUTCOMES: Final[dict[str, str]] = {
    Problem.TOO_LARGE: "too-large",
    Problem.OVERLOADED: "overloaded",
    Problem.TIMED_OUT: "timed-out",
}


def _no_key(rules: KeyRules) -> str:
    return f"the request has no key; it is looked for in {', '.join(rules.texts) or 'no place at all'}"


def _without_upgrade(method: bytes, target: bytes, fields: list[tuple[bytes, bytes]]) -> bytes:
    """The head as if the client had not asked for another protocol (RFC 9110, 7.8: a server may ignore it)."""
    lines = [b"%b %b HTTP/1.1\r\n" % (method, target)]
    for name, value in fields:
        lower = name.lower()
        if lower == b"connection":
            options = [
                item for item in value.split(b",") if item.strip().lower() not in (b"upgrade", b"http2-settings")
            ]
            value = b",".join(options)
        if lower not in (b"upgrade", b"http2-settings") and (value or lower != b"connection"):
            lines.append(b"%b: %b\r\n" % (name, value))
    return b"".join((*lines, b"\r\n"))
