"""The router's stage (tests/router/support) with the smart client in the router's place."""

import asyncio
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

import orjson

from shardlead.client import Client
from shardlead.config import RouterSettings, Settings
from shardlead.core.keyspace import encode
from shardlead.errors import RequestFailed, Unserved
from shardlead.store.base import Put
from tests.router.support import SETTINGS, Answer, Stage, Worker, stage


@dataclass
class Desk:
    client: Client

    @property
    def gates(self) -> dict[int, Any]:
        return dict(self.client._traffic.gates)


@dataclass
class Figures:
    """What tests of the router look at, of the client."""

    client: Client

    @property
    def counts(self) -> Any:
        return self.client.counts

    @property
    def desk(self) -> Desk:
        return Desk(self.client)

    @property
    def is_ready(self) -> bool:
        return self.client._view.is_ready


@dataclass
class Asker:
    """As the router's test client, as far as it asks."""

    here: "ClientStage"

    async def ask(self, method: str = "GET", target: str = "/k/a", body: bytes = b"", **headers: str) -> Answer:
        return await self.here.ask(method, target, body, **headers)


@dataclass
class ClientStage(Stage):
    """A stage whose requests go by the smart client. What it raises is told as the router would tell it."""

    direct: Client = field(kw_only=True)

    async def start_again(self, worker: Worker, **record: Any) -> None:
        """Write its record anew."""
        await self.write(Put(self.keyspace.worker(worker.name), encode(self.record(worker, **record))))

    async def client(self, tls: ssl.SSLContext | None = None) -> Any:
        return Asker(self)

    async def ask(self, method: str = "GET", target: str = "/k/a", body: Any = b"", **headers: str) -> Answer:
        key = unquote(target.partition("?")[0].split("/")[2])
        named = {"Host": "test", **{name.replace("_", "-"): value for name, value in headers.items()}}
        data = body if body or method in ("POST", "PUT") else None
        try:
            async with self.direct.request(method, target, key=key, data=data, headers=named) as answer:
                lowered = {name.lower(): value for name, value in answer.headers.items()}
                return Answer(answer.status, lowered, await answer.read())
        except RequestFailed as exc:
            return told(exc)


def drop(writer: asyncio.StreamWriter) -> None:
    """Close a worker's end, in the kernel and now: no event loop has heard of it when this returns."""
    with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a worker's guard does: with a reset, not with an end."""
    lingering = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, lingering)
    writer.transport.abort()


def told(exc: RequestFailed) -> Answer:
    """The answer that a router would give."""
    status = 503 if isinstance(exc, Unserved) else 504 if exc.kind == "timed-out" else 502
    assert exc.is_retryable == (status == 503)
    value = {"type": f"https://shardlead.dev/problems/{exc.kind}", "status": status, "shard": exc.shard}
    headers = {"content-type": "application/problem+json", **({"retry-after": "1"} if status == 503 else {})}
    return Answer(status, headers, orjson.dumps(value))


@asynccontextmanager
async def client_stage(settings: RouterSettings = SETTINGS, **changes: Any) -> AsyncIterator[ClientStage]:
    """A smart client, with a view of an empty cluster of 16 shards."""
    async with stage() as here:
        client = Client(
            here.store, cluster="test", settings=Settings(router=replace(settings, **changes)), clock=here.clock
        )
        async with client:
            figures: Any = Figures(client)
            mine = ClientStage(
                here.clock, here.store, here.keyspace, client._view, figures, here.workers, direct=client
            )
            yield mine
            assert client.counts.held == 0 or client._calls, "held by nobody"
        assert not client._calls
