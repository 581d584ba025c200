"""Requests over HTTP/1.1 on kept-alive connections, each sent exactly once.

A library's client hides what a load test looks for: it sends again by itself after a lost connection, and costs more
CPU than the router it measures. Here a connection carries one request at a time; a request that finds none idle gets
a new one, up to `connections_max`, and waits beyond (its latency counts on).

Law: whatever is not an answer (a lost connection, a refused one, bytes that are no HTTP) is a failure with its reason.
The connection used last is used next; one that nobody used for IDLE_S is closed from this side, well before a router
closes it from its own, for a request that crosses such a close is lost through nobody's fault.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, cast

import httptools

IDLE_S: Final = 20.0
CONNECT_TIMEOUT_S: Final = 5.0
ANSWER_BYTES_MAX: Final = 16 * 1_048_576
WAITING_MAX: Final = 100_000


class Request:
    """One request on its way."""

    __slots__ = ("connection", "due_ns", "idempotency_key", "is_over", "is_post", "key", "least_epoch", "number",
                 "payload_bytes", "shard")  # fmt: skip

    def __init__(self, number: int, due_ns: int, key: str, shard: int, least_epoch: int) -> None:
        self.number, self.due_ns, self.key, self.shard, self.least_epoch = number, due_ns, key, shard, least_epoch
        self.is_post = False
        self.payload_bytes = 0
        self.idempotency_key = ""
        self.is_over = False
        self.connection: Connection | None = None

    def __repr__(self) -> str:
        return f"<{'POST' if self.is_post else 'GET'} #{self.number} of {self.key}>"


class Ending(Protocol):
    """Who is told what became of requests."""

    def answered(self, request: Request, status: int, body: bytes) -> None: ...

    def failed(self, request: Request, reason: str) -> None: ...


class Route(Protocol):
    """A way to the cluster: through a router, or the smart client."""

    @property
    def connections(self) -> int:
        """How many are open."""
        ...

    async def open(self) -> None: ...

    def send(self, request: Request) -> None:
        """Send it, now. Its end is told to the `Ending`, later, exactly once."""
        ...

    def give_up(self, request: Request) -> None:
        """It has taken too long: let go of what it holds, and tell nothing any more."""
        ...

    def sweep(self) -> None:
        """Called now and then: close what has been idle for long."""
        ...

    async def close(self) -> None: ...


class Connection(asyncio.Protocol):
    """One connection to a router."""

    def __init__(self, route: "RouterRoute", clock: Callable[[], float]) -> None:
        self._route, self._clock = route, clock
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._request: Request | None = None
        self._body = b""
        self.idle_since_s = 0.0

    def send(self, request: Request, data: bytes) -> None:
        """Send it. The connection must be idle."""
        assert self._request is None
        assert self._transport is not None
        self._request, request.connection = request, self
        self._transport.write(data)

    def abort(self) -> None:
        """Close without a word; nothing is told of the request on it."""
        self._request = None
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods alone

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._lose(f"not an answer: {exc}"[:120])

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose("connection closed without an answer" if exc is None else f"connection lost: {exc}")

    # --- httptools'

    def on_body(self, body: bytes) -> None:
        self._body = self._body + body if self._body else body
        if len(self._body) > ANSWER_BYTES_MAX:
            self._lose(f"an answer of more than {ANSWER_BYTES_MAX} bytes")

    def on_message_complete(self) -> None:
        status, body = self._parser.get_status_code(), self._body
        self._body = b""
        if status < 200:  # an interim answer
            return
        request, self._request = self._request, None
        if request is None:
            self._lose("an answer that nobody asked for")
            return
        request.connection = None
        if self._parser.should_keep_alive():
            self.idle_since_s = self._clock()
            self._route.is_free(self)
        else:
            self._lose("")
        self._route.ending.answered(request, status, body)

    def _lose(self, reason: str) -> None:
        request, self._request = self._request, None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
            self._route.is_lost(self)
        if request is not None:
            request.connection = None
            self._route.ending.failed(request, reason)


class RouterRoute:
    """Through routers, in turn, on as many connections as requests are under way."""

    def __init__(self, routers: tuple[str, ...], path: str, ending: Ending, *, connections_max: int) -> None:
        self.ending = ending
        self._addresses = [_address(router) for router in routers]
        self._before, self._after = (part.encode() for part in path.split("{key}"))
        self._fixed = f" HTTP/1.1\r\nHost: {routers[0]}\r\n".encode()
        self._bodies: dict[int, bytes] = {}
        self._connections_max = connections_max
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._connecting: set[asyncio.Task[None]] = set()
        self._waiting: deque[Request] = deque()
        self._turn = 0

    def __repr__(self) -> str:
        return f"<RouterRoute, {len(self._all)} connections, {len(self._waiting)} requests wait for one>"

    @property
    def connections(self) -> int:
        return len(self._all)

    async def open(self) -> None:
        """Nothing to do before the first request."""

    def send(self, request: Request) -> None:
        if self._idle:
            self._idle.pop().send(request, self._data(request))
            return
        if len(self._waiting) >= WAITING_MAX:
            self.ending.failed(request, "the generator has too many requests waiting for a connection")
            return
        self._waiting.append(request)
        if len(self._all) + len(self._connecting) < self._connections_max:
            self._turn += 1
            task = asyncio.get_running_loop().create_task(
                self._connect(*self._addresses[self._turn % len(self._addresses)])
            )
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    def give_up(self, request: Request) -> None:
        if request.connection is not None:
            request.connection.abort()

    def is_free(self, connection: Connection) -> None:
        """A connection can be used (again)."""
        while self._waiting:
            request = self._waiting.popleft()
            if not request.is_over:
                connection.send(request, self._data(request))
                return
        self._idle.append(connection)

    def is_lost(self, connection: Connection) -> None:
        """A connection is gone."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def sweep(self) -> None:
        now_s = asyncio.get_running_loop().time()
        old = [connection for connection in self._idle if now_s - connection.idle_since_s > IDLE_S]
        for connection in old:
            connection.abort()

    async def close(self) -> None:
        for task in list(self._connecting):
            task.cancel()
        for connection in list(self._all):
            connection.abort()
        await asyncio.sleep(0)  # lets the transports go

    async def _connect(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(lambda: Connection(self, loop.time), host, port)
        except (OSError, TimeoutError) as exc:
            reason = f"cannot connect to {host}:{port}: {str(exc) or type(exc).__name__}"
            with contextlib.suppress(IndexError):
                while (request := self._waiting.popleft()).is_over:
                    pass
                self.ending.failed(request, reason)
            return
        self._all.add(connection)
        connection.idle_since_s = loop.time()
        self.is_free(connection)

    def _data(self, request: Request) -> bytes:
        head = self._before + request.key.encode() + self._after + self._fixed
        if not request.is_post:
            return b"GET " + head + b"\r\n"
        size = request.payload_bytes
        if request.idempotency_key:
            head += b"Idempotency-Key: " + request.idempotency_key.encode() + b"\r\n"
        body = self._bodies.get(size)
        if body is None:
            body = self._bodies[size] = b"Content-Length: %d\r\n\r\n" % size + bytes(size)
        return b"POST " + head + body


def _address(router: str) -> tuple[str, int]:
    name, _, port = router.rpartition(":")
    return name.strip("[]"), int(port)
