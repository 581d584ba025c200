"""What a client sends, read into exchanges; the parser's end of a connection.

What it never does: write to the client, or give a request its turn (`downstream` does).

Law: a head that could be read in two ways is the end: nothing after it is looked at. The parser, llhttp without any of
its leniencies, refuses bare LF, folded fields, spaces before colons, control characters, two Content-Lengths,
Content-Length beside Transfer-Encoding and bad chunks; `heads.read_request` refuses the rest.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

import httptools

from shardlead.config import RouterSettings
from shardlead.core.contract import Problem
from shardlead.core.routing import KeyRules
from shardlead.errors import RequestError
from shardlead.router.exchange import COLLECTING, Client, Desk, Exchange
from shardlead.router.express import Express
from shardlead.router.forwarded import Forwarder
from shardlead.router.heads import Kinds, read_request, trailer_lines
from shardlead.router.plans import Plans, RequestPlan

log = logging.getLogger("shardlead.router")


class Readings(Protocol):
    """What is needed of the router to understand a request."""

    @property
    def settings(self) -> RouterSettings: ...
    @property
    def rules(self) -> KeyRules: ...
    @property
    def kinds(self) -> Kinds: ...
    @property
    def plans(self) -> Plans[RequestPlan]: ...
    @property
    def desk(self) -> Desk: ...
    @property
    def now_s(self) -> float:
        """Seconds on the router's clock, as of its last sweep."""
        ...

    @property
    def now_ns(self) -> Callable[[], int]: ...

    def next_number(self) -> int: ...


class Intake:
    """Feed it; it appends to `came`. `error`: nothing more can be read, for this reason."""

    __slots__ = (
        "_bare_bytes",
        "_client",
        "_fields",
        "_filling",
        "_forwarder",
        "_front",
        "_has_parsed_head",
        "_head_bytes",
        "_head_pieces",
        "_is_lazy_whole",
        "_lazy_body",
        "_lazy_plan",
        "_may_be_lazy",
        "_packet_bytes",
        "_parser",
        "_refusal",
        "_reparse",
        "_trailer_bytes",
        "_trailers",
        "_url",
        "came",
        "error",
        "head_since_s",
        "is_deaf",
        "is_in_head",
        "rest",
    )

    def __init__(self, front: Readings, client: Client, forwarder: Forwarder) -> None:
        self.came: deque[Exchange] = deque()
        self.error: RequestError | None = None
        self.rest: bytes | None = None  # what came behind a request for another protocol, until its answer is known
        self.is_deaf = False  # nothing that comes is parsed any more
        self.is_in_head = False
        self.head_since_s = 0.0
        self._front = front
        self._client = client
        self._forwarder = forwarder
        self._may_be_lazy = False  # a request that begins in this packet may wait to be understood until its end
        self._lazy_plan: RequestPlan | None = None  # such a one has begun
        self._lazy_body: list[bytes] = []
        self._is_lazy_whole = False
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._fields: list[tuple[bytes, bytes]] = []
        self._trailer_bytes = 0
        self._trailers: list[tuple[bytes, bytes]] = []
        self._filling: Exchange | None = None  # the exchange whose body is being parsed
        self._reparse: bytes | None = None
        self._refusal: RequestError | None = None  # why the parser was stopped from within
        self._has_parsed_head = False
        self._packet_bytes = 0
        self._bare_bytes = 0  # that have come of a body since the last byte of its content: chunk sizes, trailers
        self._head_bytes = 0  # at most so many have come of an unfinished head
        self._head_pieces: list[bytes] = []

    def feed(self, data: bytes, express: Express | None = None) -> None:
        """Read a packet. An ordinary request that is this packet goes off by `express`, if there is one."""
        if self.is_deaf:
            return
        if self.rest is not None:
            self.rest += data
            return
        again = self._read(data, express)
        while again:
            again = self._read(again)

    def _read(self, data: bytes, express: Express | None = None) -> bytes:
        """Read it; what is to be read next instead of its end."""
        self._packet_bytes = len(data)
        if self._filling is not None:
            self._bare_bytes += len(data)
        elif express is not None:
            if not self.is_in_head and express.send_known(data):
                return b""
            self._may_be_lazy = not self.is_in_head
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._catch_up()
            self._may_be_lazy = False
            return self._stop_for_upgrade(data[exc.args[0] :])
        except httptools.HttpParserError as exc:
            self._catch_up()
            self._stop_for(exc)
        if self._lazy_plan is not None:
            if express is not None and self._is_lazy_whole and self._send_at_once(data, express, self._lazy_plan):
                return b""
            self._catch_up()
        self._may_be_lazy = False
        if not self.is_in_head:
            if self._head_pieces:
                self._head_bytes = 0
                self._head_pieces.clear()
            if self._filling is not None and self._bare_bytes > self._front.settings.head_bytes_max:
                limit = self._front.settings.head_bytes_max
                self._fail_after(RequestError(Problem.TOO_LARGE, f"over {limit} bytes between chunks", status=431))
        elif not self.is_deaf:
            self._head_bytes += len(data)
            self._head_pieces.append(data)
            if self._head_bytes > self._front.settings.head_bytes_max:
                self._measure_head()
        return b""

    def stay_http(self) -> None:
        """The other protocol was not granted: what came behind the request is read as requests."""
        rest, self.rest = self.rest, None
        if rest is not None:
            self._parser = httptools.HttpRequestParser(self)
            if rest:
                self.feed(rest)

    def switch(self) -> bytes:
        """The other protocol was granted: what came behind the request belongs to it."""
        rest, self.rest = self.rest, None
        self.is_deaf = True
        return rest or b""

    def ended(self) -> None:
        """The client sends no more: a request that is not whole by now never will be, and is nobody's."""
        self.is_deaf = True
        self.is_in_head = False
        filling, self._filling = self._filling, None
        if filling is not None and filling in self.came:
            self.came.remove(filling)
            filling.client_left()

    def stop(self) -> None:
        """Nothing is read any more, and what came is nobody's."""
        self.is_deaf = True
        self.is_in_head = False
        self.error = None
        self._filling = None
        came, self.came = self.came, deque()
        for exchange in came:
            exchange.client_left()

    # --- parser

    def on_message_begin(self) -> None:
        if self._lazy_plan is not None:  # there is more than one in this packet
            self._understand()
        if self.is_deaf:
            self._refusal = RequestError(Problem.BAD_REQUEST, "a request behind the connection's last one")
            raise self._refusal
        self.is_in_head = True
        self.head_since_s = self._front.now_s
        self._url = b""
        self._fields = []
        self._filling = None
        self._has_parsed_head = False

    def on_url(self, url: bytes) -> None:
        self._url = self._url + url if self._url else url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_parsed_head:
            self._fields.append((name, value))
            return
        self._trailers.append((name, value))
        self._trailer_bytes += len(name) + len(value) + 4
        settings = self._front.settings
        if len(self._trailers) > settings.headers_max or self._trailer_bytes > settings.head_bytes_max:
            limits = f"{settings.headers_max} trailer fields or {settings.head_bytes_max} bytes of them"
            self._refusal = RequestError(Problem.TOO_LARGE, f"over {limits}", status=431)
            raise self._refusal

    def on_headers_complete(self) -> None:
        if self._may_be_lazy:
            self._may_be_lazy = False
            self._lazy_plan = self._front.plans.of(tuple([name for name, _ in self._fields]))
            if self._lazy_plan is not None:
                self.is_in_head = False
                self._has_parsed_head = True
                return
        self._understand_head()

    def _understand_head(self) -> None:
        try:
            self._take_head()
        except RequestError as exc:
            self._refusal = exc  # what the parser then raises may have another context: it is fed within handlers, too
            raise

    def _take_head(self) -> None:
        self.is_in_head = False
        self._has_parsed_head = True
        self._bare_bytes = 0
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
        method = parser.get_method()
        head = read_request(method, self._url, parser.get_http_version(), fields, front.kinds, self._forwarder)
        if head.has_upgrade:
            if parser.should_upgrade() != bool(head.upgrade):
                raise RequestError(Problem.BAD_REQUEST, "an Upgrade that can be read in two ways")
            if head.upgrade and (head.has_body or head.upgrade.lower() == b"h2c"):
                self._reparse = _without_upgrade(method, self._url, fields)
                return
        exchange = Exchange(front.desk, self._client, head, front.next_number(), front.now_ns())
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
        self.came.append(exchange)

    def on_body(self, data: bytes) -> None:
        if self._lazy_plan is not None:
            self._lazy_body.append(data)
            return
        exchange = self._filling
        if exchange is not None:
            self._client.touch()
            self._bare_bytes = 0
            if not exchange.body_came(data, self._front.settings.body_bytes_max):
                exchange.refuse_body(
                    RequestError(
                        Problem.TOO_LARGE,
                        f"a body may have {self._front.settings.body_bytes_max} bytes",
                        status=413,
                    )
                )

    def on_message_complete(self) -> None:
        if self._lazy_plan is not None:
            self._is_lazy_whole = True
            return
        exchange = self._filling
        if exchange is not None:
            self._filling = None
            if self._trailers:
                exchange.body.trailers = trailer_lines(self._trailers, self._front.kinds)
            if not exchange.head.is_keep_alive:
                self.is_deaf = True
            exchange.body_ended()
        if self._trailers:
            self._trailers = []
            self._trailer_bytes = 0
        self._client.touch()

    # --- ordinary requests

    def _send_at_once(self, data: bytes, express: Express, plan: RequestPlan) -> bool:
        """Whether the packet was an ordinary request and is on its way."""
        body = self._lazy_body
        size = 0 if not body else len(body[0]) if len(body) == 1 else sum(map(len, body))
        if not express.send(data, self._parser.get_method(), self._url, self._fields, plan, size):
            return False
        self._lazy_plan = None
        self._is_lazy_whole = False
        if body:
            body.clear()
        return True

    def _catch_up(self) -> None:
        """The packet is more, or less, than one ordinary request: understand the one that it began with."""
        if self._lazy_plan is not None:
            try:
                self._understand()
            except RequestError as exc:
                self._refusal = None
                self._fail_after(exc)

    def _understand(self) -> None:
        """What was put off since `on_headers_complete`. Raises RequestError."""
        self._lazy_plan = None
        is_whole, self._is_lazy_whole = self._is_lazy_whole, False
        body, self._lazy_body = self._lazy_body, []
        self._understand_head()
        for data in body:
            self.on_body(data)
        if is_whole:
            self.on_message_complete()

    # --- ends

    def _stop_for_upgrade(self, rest: bytes) -> bytes:
        """The parser has stopped behind a request that asks for another protocol; what is to be read next."""
        self._head_bytes = 0
        self._head_pieces.clear()
        if self._reparse is not None:  # asked for nothing we do: it is read again as an ordinary request
            head, self._reparse = self._reparse, None
            self._parser = httptools.HttpRequestParser(self)
            return head + rest
        self.rest = rest
        return b""

    def _stop_for(self, exc: httptools.HttpParserError) -> None:
        refusal, self._refusal = self._refusal, None
        if isinstance(exc, httptools.HttpParserCallbackError) and refusal is None:
            log.error("failed on a request", exc_info=exc)
            self._client.cut()
        elif not self.is_deaf or self._filling is not None:  # else these are bytes behind the connection's last request
            self._fail_after(refusal or RequestError(Problem.BAD_REQUEST, str(exc)))

    def _fail_after(self, error: RequestError) -> None:
        """The connection cannot be read any more. Whole requests before this are answered first."""
        self.is_deaf = True
        self.is_in_head = False
        broken, self._filling = self._filling, None
        if broken is None:
            self.error = error
        elif broken.state == COLLECTING:
            if broken in self.came:
                self.came.remove(broken)
            self.error = broken.error or error  # what was wrong first, however the packets fell
            broken.client_left()
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
