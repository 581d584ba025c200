"""A router over a real embedded store whose records are written by hand, and workers that answer by script."""

import asyncio
import contextlib
import logging
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import orjson

from shardlead.clock import SystemClock
from shardlead.cluster.bootstrap import ensure_shape
from shardlead.cluster.view import View
from shardlead.config import ClusterSettings, RouterSettings, StoreSettings, TlsSettings
from shardlead.core.keyspace import Keyspace, encode
from shardlead.core.model import LeaderRecord, WorkerRecord
from shardlead.router.server import Router
from shardlead.store.base import UNGUARDED, Committed, Delete, Put, Txn
from shardlead.store.embedded import serve
from shardlead.store.etcd import EtcdStore

WAIT_S: Final = 5.0
SETTINGS: Final = RouterSettings(
    host="127.0.0.1",
    port=0,
    key_rules=("path:/k/{key}/*", "header:X-Shard-Key", "query:key"),
    hold_timeout_s=4.0,
    shutdown_timeout_s=2.0,
)


@dataclass
class Request:
    """What a worker received."""

    method: str
    target: str
    headers: Mapping[str, str]  # names in lower case
    raw_headers: list[tuple[str, str]]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int  # of the requests of this worker
    body: bytes = b""
    trailers: list[bytes] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        return int(self.headers["shardlead-epoch"])

    @property
    def shard(self) -> int:
        return int(self.headers["shardlead-shard"])

    @property
    def expects_continue(self) -> bool:
        return self.headers.get("expect") == "100-continue"

    async def read_body(self) -> bytes:
        """The body, whole; tells an expecting peer to go on."""
        if self.expects_continue:
            await self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
                parts.append(await self.reader.readexactly(size))
                assert await self.reader.readexactly(2) == b"\r\n"
            while line := (await self.reader.readuntil(b"\r\n")).removesuffix(b"\r\n"):
                self.trailers.append(line)
            self.body = b"".join(parts)
        else:
            self.body = await self.reader.readexactly(int(self.headers.get("content-length", "0")))
        return self.body

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, status: int = 200, body: bytes = b"", **headers: str) -> None:
        lines = [f"HTTP/1.1 {status} Because", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if self.method == "HEAD" else body))

    async def refuse(self, reason: str, *, epoch: int = 0, leader: str = "") -> None:
        headers = {"Shardlead_Refused": reason}
        if epoch:
            headers["Shardlead_Epoch"] = str(epoch)
        if leader:
            headers["Shardlead_Leader"] = leader
        await self.answer(503 if reason == "suspended" else 421, b'{"refused": true}', **headers)

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


Script = Callable[[Request], Awaitable[None]]


async def echo(request: Request) -> None:
    """Answers with what came."""
    body = b"" if request.method == "HEAD" else await request.read_body()
    value = {"method": request.method, "target": request.target, "body": len(body), "shard": request.shard}
    await request.answer(200, orjson.dumps(value), Content_Type="application/json")


class Worker:
    """An upstream that speaks the contract by script."""

    def __init__(self, name: str, script: Script = echo, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.name = name
        self.script = script
        self.requests: list[Request] = []
        self.connections = 0
        self.open: set[asyncio.StreamWriter] = set()
        self.address = ""
        self.failures: list[BaseException] = []
        self._arrived = asyncio.Condition()
        self._server: asyncio.Server | None = None

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port, ssl=self.tls)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in tuple(self.open):
            writer.transport.abort()

    async def received(self, count: int) -> None:
        """Return once this many requests have come in all."""
        async with asyncio.timeout(WAIT_S), self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) >= count)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open.add(writer)
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                line, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
                method, target, _ = line.split(" ")
                raw = [(name, value.strip()) for name, _, value in (each.partition(":") for each in lines)]
                headers = {name.lower(): value for name, value in raw}
                request = Request(method, target, headers, raw, reader, writer, len(self.requests))
                self.requests.append(request)
                async with self._arrived:
                    self._arrived.notify_all()
                await self.script(request)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except RuntimeError as exc:
            if "handler is closed" not in str(exc):  # uvloop's way to say that the connection has ended
                self.failures.append(exc)
        except Exception as exc:
            self.failures.append(exc)
        finally:
            self.open.discard(writer)
            writer.close()


class SteppedClock(SystemClock):
    """The machine's clock, which a test may push forward as a stop of the process would."""

    __slots__ = ("ahead_ns",)

    def __init__(self) -> None:
        self.ahead_ns = 0

    def now_ns(self) -> int:
        return super().now_ns() + self.ahead_ns


@dataclass
class Stage:
    """Store, view and router of one test."""

    clock: SteppedClock

    store: EtcdStore
    keyspace: Keyspace
    view: View
    router: Router
    workers: dict[str, Worker] = field(default_factory=dict)
    clients: list["Client"] = field(default_factory=list)

    async def write(self, *ops: Put | Delete) -> int:
        """Write records, and return when the view shows them; the revision."""
        outcome = await self.store.commit(Txn(UNGUARDED, ops))  # the tests are alone with this store
        assert isinstance(outcome, Committed)
        await self.true(lambda: self.view.map.revision >= outcome.revision)
        return outcome.revision

    async def start(
        self, name: str, script: Script = echo, *, tls: ssl.SSLContext | None = None, **record: Any
    ) -> Worker:
        """A worker, alive."""
        worker = Worker(name, script, tls)
        await worker.start()
        self.workers[name] = worker
        await self.write(Put(self.keyspace.worker(name), encode(self.record(worker, **record))))
        return worker

    def record(self, worker: Worker, **changes: Any) -> WorkerRecord:
        return replace(WorkerRecord(sid=f"sid-{worker.name}", address=worker.address), **changes)

    async def lead(self, worker: Worker, *shards: int) -> int:
        """It leads these (default: all) from now on; the epoch."""
        record = encode(LeaderRecord(worker.name, f"sid-{worker.name}"))
        numbers = shards or range(SHARDS)
        return await self.write(*(Put(self.keyspace.leader(shard), record) for shard in numbers))

    async def gone(self, worker: Worker) -> None:
        """Its session ends: the record and all its shards go in one revision."""
        shards = self.view.map.shards_of(worker.name)
        await self.write(
            Delete(self.keyspace.worker(worker.name)), *(Delete(self.keyspace.leader(shard)) for shard in shards)
        )

    def shard_of(self, key: str) -> int:
        return self.view.map.shard_of(key)

    async def client(self, tls: ssl.SSLContext | None = None) -> "Client":
        host, _, port = self.router.address.rpartition(":")
        client = Client(*await asyncio.open_connection(host, int(port), ssl=tls))
        self.clients.append(client)
        return client

    async def ask(self, method: str = "GET", target: str = "/k/a", body: bytes = b"", **headers: str) -> "Answer":
        """One request on a connection of its own."""
        client = await self.client()
        return await client.ask(method, target, body, **headers)

    async def held(self, count: int) -> None:
        """Return once so many requests are held."""
        await self.true(lambda: self.router.counts.held == count)

    async def true(self, holds: Callable[[], bool]) -> None:
        """Return once it holds. For what is a plain integer, which tells nobody that it has changed."""
        async with asyncio.timeout(WAIT_S):
            while not holds():  # noqa: ASYNC110  # as said
                await asyncio.sleep(0.005)


SHARDS: Final = 16


@dataclass
class Answer:
    """What a client received."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes
    trailers: list[bytes] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def problem(self) -> str:
        assert self.headers["content-type"] == "application/problem+json"
        value = self.json
        assert value["status"] == self.status
        return str(value["type"]).rpartition("/")[2]


class Client:
    """A client that writes what it is told and reads answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def ask(self, method: str = "GET", target: str = "/k/a", body: bytes = b"", **headers: str) -> Answer:
        await self.send(request_bytes(method, target, body, **headers))
        return await self.answer(is_head=method == "HEAD")

    async def head(self) -> Answer:
        """The head of the next answer, interim ones included."""
        async with asyncio.timeout(WAIT_S):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        line, *lines = raw.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        headers: dict[str, str] = {}
        for each in lines:
            name, _, value = each.partition(":")
            assert name.lower() not in headers or name.lower() == "set-cookie", f"{name} twice"
            headers[name.lower()] = value.strip()
        return Answer(int(line.split(" ")[1]), headers, b"")

    async def answer(self, *, is_head: bool = False) -> Answer:
        """The next answer, whole; interim ones are skipped."""
        answer = await self.head()
        while answer.status < 200 and answer.status != 101:
            answer = await self.head()
        if is_head or answer.status in (101, 204, 304):
            return answer
        async with asyncio.timeout(WAIT_S):
            if answer.headers.get("transfer-encoding") == "chunked":
                parts = []
                while chunk := await self.chunk(answer.trailers):
                    parts.append(chunk)
                answer.body = b"".join(parts)
            elif "content-length" in answer.headers:
                answer.body = await self.reader.readexactly(int(answer.headers["content-length"]))
            else:
                answer.body = await self.reader.read()
        return answer

    async def chunk(self, trailers: list[bytes] | None = None) -> bytes:
        """The next chunk of an answer; empty: its end."""
        async with asyncio.timeout(WAIT_S):
            size = int(await self.reader.readline(), 16)
            if not size and trailers is not None:
                while line := (await self.reader.readuntil(b"\r\n")).removesuffix(b"\r\n"):
                    trailers.append(line)
                return b""
            data = await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
            return data

    async def within(self, seconds: float) -> bytes:
        """All that comes in this time, or until the router closes."""
        got = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(seconds):
                while more := await self.reader.read(65_536):
                    got += more
        return got

    async def rest(self) -> bytes:
        """Send no more, take all that still comes, and leave."""
        with contextlib.suppress(OSError, RuntimeError):  # the router may have closed
            self.writer.write_eof()
        got = b""
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(ConnectionError):
                while more := await self.reader.read(65_536):
                    got += more
        self.leave()
        return got

    async def closed(self) -> bool:
        """Whether the router ends the connection (in order or not) without sending more."""
        async with asyncio.timeout(WAIT_S):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True

    def leave(self) -> None:
        """Be gone, as seen from the other side too: with a reset. (A FIN alone says only that nothing more is sent.)"""
        raw = self.writer.get_extra_info("socket")
        if not self.writer.transport.is_closing():
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


def request_bytes(method: str, target: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: test"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if (body or method in ("POST", "PUT")) and "Transfer_Encoding" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


class Listener(logging.Handler):
    """Collects what is logged as an error."""

    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.ERROR)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(logging.Formatter().format(record))


@asynccontextmanager
async def stage(
    settings: RouterSettings = SETTINGS, *, tls: TlsSettings | None = None, **changes: Any
) -> AsyncIterator[Stage]:
    """A router that listens, with a view of an empty cluster of 16 shards."""
    mishaps: list[str] = []  # what was logged as an error, or nobody caught: none of the stages here has any
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: mishaps.append(f"{context}"))
    handler = Listener(mishaps)
    logging.getLogger("shardlead").addHandler(handler)
    clock = SteppedClock()
    keyspace = Keyspace("test")
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        server = tasks.create_task(serve("127.0.0.1", 0, data=None, on_ready=url.set_result))
        store_settings = StoreSettings(endpoints=(await url,))
        async with EtcdStore(store_settings, clock=clock, rng=random.Random(1)) as store:
            await ensure_shape(store, keyspace, ClusterSettings(name="test", shards=SHARDS))
            view = View(store, keyspace, clock=clock, rng=random.Random(2))
            following = tasks.create_task(view.run())
            await view.wait_ready(WAIT_S)
            async with Router(replace(settings, **changes), view, clock=clock, tls=tls) as router:
                here = Stage(clock, store, keyspace, view, router)
                try:
                    yield here
                finally:
                    for client in here.clients:
                        client.leave()
                    for worker in here.workers.values():
                        await worker.stop()
            following.cancel()
        server.cancel()
    logging.getLogger("shardlead").removeHandler(handler)
    assert not mishaps
    for worker in here.workers.values():
        assert not worker.failures, worker.failures


def run(main: Callable[[], Awaitable[None]], *, is_uvloop: bool = True) -> None:
    """Run a test's main on the loop that routers run on."""
    import uvloop

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop if is_uvloop else None) as runner:
        runner.run(bounded())
