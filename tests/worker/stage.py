"""A worker's HTTP door on a real socket, with the real host behind it and the session's part played by a switch."""

import asyncio
import random
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

import uvloop
from aiohttp import web
from prometheus_client import CollectorRegistry

from shardlead.clock import NS_PER_S, SystemClock
from shardlead.config import WorkerSettings
from shardlead.core.model import Want
from shardlead.core.ownership import Gone, HandOver, Opening, Remint, Resign, Serving, Wanted, Won
from shardlead.metrics import WorkerMetrics
from shardlead.worker.application import Application
from shardlead.worker.audit import AuditLog
from shardlead.worker.envoy import NotOurs, Passage, PassedOn
from shardlead.worker.host import Host
from shardlead.worker.http import Front
from shardlead.worker.leadership import Leadership

CLOCK = SystemClock()
SHARDS = 8
EPOCH = 1182
KEY = "alice"
BOUND_S = 10.0  # no test waits longer for anything

LOOPS: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}

Handler = Callable[[Leadership, web.Request], Awaitable[web.StreamResponse]]


def shard_of(key: bytes) -> int:
    return zlib.crc32(key) % SHARDS


SHARD = shard_of(KEY.encode())


def play(loop: str, main: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine on the named loop, bounded."""

    async def bounded() -> None:
        async with asyncio.timeout(BOUND_S):
            await main

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(bounded())


class Switch:
    """The session's guard: valid until a test turns it off."""

    def __init__(self) -> None:
        self.is_on = True
        self.asked = 0
        self.off_after: int | None = None  # turns itself off once it was asked so often
        self.deadline_ns: int | None = None  # turns itself off then

    def is_valid(self, need_s: float) -> bool:
        self.asked += 1
        if self.off_after is not None and self.asked > self.off_after:
            self.is_on = False
        if self.deadline_ns is not None and CLOCK.now_ns() + int(need_s * NS_PER_S) >= self.deadline_ns:
            self.is_on = False
        return self.is_on


@dataclass
class Speaker:
    """An envoy whose store always agrees; `envoy.Envoy`."""

    guard: Switch = field(default_factory=Switch)
    doubts: list[tuple[int, int]] = field(default_factory=list)
    looked_up: list[int] = field(default_factory=list)
    passed: list[object] = field(default_factory=list)

    def queue_claim(self, shard: int) -> None:
        raise AssertionError("tests win their shards by hand")

    def former_wait_s(self, shard: int) -> float:
        return 0.0

    def doubt(self, shard: int, epoch: int) -> None:
        self.doubts.append((shard, epoch))

    def look_up(self, shard: int) -> None:
        self.looked_up.append(shard)

    async def pass_on(self, shard: int, epoch: int, goal: HandOver | Resign | Remint, *, is_clean: bool) -> Passage:
        self.passed.append(goal)
        match goal:
            case HandOver(want):
                return PassedOn(leader=f"{want.target} 10.0.0.2:9000 {epoch + 1}")
            case Remint():
                return PassedOn(new_epoch=epoch + 1)
            case _:
                return NotOurs("resigned")


class Script:
    """The application's object of a shard: does what the test has written for a path."""

    def __init__(self, stage: "Stage", lead: Leadership) -> None:
        self.stage, self.lead = stage, lead

    async def open(self) -> None:
        self.lead.note_barrier()
        await self.stage.may_open.wait()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.stage.handled.append(f"{request.method} {request.path}")
        return await self.stage.script[request.path](self.lead, request)

    async def close(self) -> None:
        self.stage.closed.append(self.lead.epoch)


@dataclass
class Stage:
    """All that a test touches."""

    settings: WorkerSettings
    speaker: Speaker = field(default_factory=Speaker)
    script: dict[str, Handler] = field(default_factory=dict)
    handled: list[str] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)
    may_open: asyncio.Event = field(default_factory=asyncio.Event)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    address: str = ""

    host: Host = field(init=False)
    front: Front = field(init=False)

    @property
    def switch(self) -> Switch:
        return self.speaker.guard

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def on(self, path: str) -> Callable[[Handler], Handler]:
        """Write what the application does for `path`."""

        def keep(handler: Handler) -> Handler:
            self.script[path] = handler
            return handler

        return keep

    async def lead(self, shard: int = SHARD, epoch: int = EPOCH) -> None:
        """Win the shard and wait until it serves."""
        self.may_open.set()
        self.host.feed(shard, Won(epoch))
        await self.until(shard, Serving)

    async def until(self, shard: int, kind: type) -> None:
        while not isinstance(self.host.state(shard), kind):
            await self.host.changed(shard)

    def hand_over(self, shard: int = SHARD, epoch: int = EPOCH) -> None:
        """Another worker wants the shard: drain."""
        self.host.feed(shard, Wanted(Want("w2", "sid-2", 2, epoch), 7))

    def lose(self, shard: int = SHARD) -> None:
        """The leadership is known to be gone."""
        self.host.feed(shard, Gone("its key is another's"))

    def count(self, outcome: str) -> float:
        """Requests that ended so."""
        return self.registry.get_sample_value("shardlead_worker_requests_total", {"outcome": outcome}) or 0.0


def scripted(stage: Stage) -> Callable[[Leadership], Script]:
    """The application as a factory."""
    return lambda lead: Script(stage, lead)


@asynccontextmanager
async def staged(
    *,
    is_led: bool = True,
    subject: Callable[[Stage], object] = scripted,
    audit: AuditLog | None = None,
    tls: ssl.SSLContext | None = None,
    **changes: Any,
) -> AsyncIterator[Stage]:
    """A front that listens; shard SHARD is led under EPOCH unless `is_led` is False. `changes` are settings."""
    settings = replace(WorkerSettings(drain_timeout_s=5.0, park_timeout_s=5.0), **changes)
    stage = Stage(settings)
    metrics = WorkerMetrics(stage.registry)
    application = Application(subject(stage), name="stage")
    async with application.factory() as make:
        stage.host = Host(
            settings,
            "w1",
            make,
            shard_of,
            fenced=True,
            clock=CLOCK,
            rng=random.Random(7),
            metrics=metrics,
            audit=audit,
        )
        stage.front = Front(settings, stage.host, make.description, clock=CLOCK, metrics=metrics, tls=tls)
        async with stage.host:
            stage.host.envoy = stage.speaker
            stage.address = await stage.front.start()
            try:
                if is_led:
                    await stage.lead()
                yield stage
            finally:
                await stage.front.close()


# --- a client that hides nothing ---------------------------------------------------------------------------------


def words(key: str = KEY, *, shard: int | None = None, epoch: int = EPOCH) -> dict[str, str]:
    """The router's headers for a key."""
    shard = shard_of(key.encode()) if shard is None else shard
    return {"Shardlead-Shard": str(shard), "Shardlead-Epoch": str(epoch), "Shardlead-Key": quote(key, safe="")}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Peer:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b"", *, line: str = "1.1"
    ) -> None:
        """Write a request; without `headers`, those a router would send."""
        head = {"Host": "w1", **(words() if headers is None else headers)}
        if body and "Content-Length" not in head:
            head["Content-Length"] = str(len(body))
        text = f"{method} {path} HTTP/{line}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in head.items())
        self.writer.write(text.encode() + b"\r\n" + body)

    async def head(self) -> Answer:
        """The next head, of an answer or an interim one."""
        text = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        status_line, *lines = text.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return Answer(int(status_line.split(" ")[1]), headers, b"")

    async def answer(self) -> Answer:
        """The next answer, with its body."""
        answer = await self.head()
        if answer.headers.get("transfer-encoding") == "chunked":
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                answer.body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        else:
            answer.body = await self.reader.readexactly(int(answer.headers.get("content-length", "0")))
        return answer

    async def ask(self, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Answer:
        self.send(method, path, headers, body)
        return await self.answer()


@asynccontextmanager
async def peer(stage: Stage) -> AsyncIterator[Peer]:
    """A raw connection to the stage's front."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.port)
    try:
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()


def is_opening(stage: Stage, shard: int = SHARD) -> bool:
    return isinstance(stage.host.state(shard), Opening)


async def until(is_so: Callable[[], object]) -> None:
    """Let the loop turn until a condition of the other side of a socket holds; `play` bounds it."""
    while not is_so():  # noqa: ASYNC110 what is waited for has no event: the peer's bytes, a connection's end
        await asyncio.sleep(0.001)
