"""A gateway that misbehaves on order: a bare HTTP/1.1 server whose every answer is a test's script.

For what a real etcd cannot be made to do at a chosen moment. It understands just enough HTTP for an HTTP client, and
nothing of etcd: whatever it says was written down by the test.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import orjson

from shardlead.store import gateway


@dataclass(frozen=True, slots=True)
class Request:
    path: str
    headers: Mapping[str, str]
    body: Any


class Reply:
    """What a script answers with: one JSON object, or a stream piece by piece."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def json(self, raw: object, status: int = 200) -> None:
        await self.whole(orjson.dumps(raw), status)

    async def whole(self, body: bytes, status: int = 200) -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        await self._send(head.encode() + b"Connection: close\r\n\r\n" + body)

    async def start(self, status: int = 200) -> None:
        await self._send(f"HTTP/1.1 {status} X\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n".encode())

    async def chunk(self, body: bytes) -> None:
        await self._send(b"%x\r\n%s\r\n" % (len(body), body))

    async def line(self, raw: object) -> None:
        await self.chunk(orjson.dumps(raw) + b"\n")

    async def end(self) -> None:
        await self._send(b"0\r\n\r\n")

    def abort(self) -> None:
        """Cut the connection in the middle of whatever it is."""
        self._writer.transport.abort()

    async def until_closed(self) -> None:
        """Hold the answer open until the client or the test's end closes it."""
        await asyncio.Event().wait()

    async def _send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()


Script = Callable[[Request, Reply], Awaitable[None]]


def header(revision: int, cluster_id: int = 77) -> dict[str, str]:
    return {"cluster_id": str(cluster_id), "member_id": "1", "revision": str(revision), "raft_term": "2"}


class FakeGateway:
    """Listens on a free port of 127.0.0.1. `on` sets the script of a path; `requests` keeps what was asked."""

    def __init__(self, version: str = "3.5.28") -> None:
        self.requests: list[Request] = []
        self._news = asyncio.Event()  # set at each request, cleared by who waits
        self.closed_by_client = asyncio.Event()  # set when a client hangs up while a script still answers
        self.url = ""
        self._scripts: dict[str, Script] = {}
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

        async def status(_request: Request, reply: Reply) -> None:
            await reply.json({"header": header(1), "version": version})

        self.on(gateway.STATUS, status)

    def on(self, path: str, script: Script) -> None:
        self._scripts[path] = script

    def answer(self, path: str, raw: object, status: int = 200) -> None:
        """Always this, to that path."""

        async def script(_request: Request, reply: Reply) -> None:
            await reply.json(raw, status)

        self.on(path, script)

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    async def has_been_asked(self, path: str, count: int) -> None:
        """Return once that path was asked so often."""
        while len(self.asked(path)) < count:
            self._news.clear()
            await self._news.wait()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._connections.discard(task)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection: what stays of it after an answer is never the matter here."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        path = head[0].split(" ")[1]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        request = Request(path, headers, orjson.loads(body) if body else None)
        self.requests.append(request)
        self._news.set()
        script = self._scripts.get(path)
        if script is None:
            await Reply(writer).whole(b"Not Found\n", 404)
            return
        answering = asyncio.ensure_future(script(request, Reply(writer)))
        hung_up = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({answering, hung_up}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self.closed_by_client.set()
                return
            await answering
        finally:
            answering.cancel()
            hung_up.cancel()
