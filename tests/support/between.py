"""A transport between a client and its real store: a test may hold, lose, answer or repeat each single request, and
make watches fall silent. What it does not touch goes through as ever.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from shardlead.config import StoreSettings
from shardlead.store.gateway import b64
from shardlead.store.transport import Answer, Channel, HttpTransport, Stream, TransportError


@dataclass(frozen=True, slots=True)
class Sent:
    """A request on its way."""

    channel: Channel
    endpoint: str
    path: str
    body: bytes
    headers: Mapping[str, str]
    timeout_s: float

    def is_about(self, *keys: bytes) -> bool:
        """Whether each of these keys stands in it."""
        return all(b64(key).encode() in self.body for key in keys)


Meddler = Callable[[Sent], Awaitable[Answer]]


class Between(HttpTransport):
    """HTTP, with a test in between. `by` has what is done with the requests of a path, one function a path."""

    def __init__(self, settings: StoreSettings) -> None:
        super().__init__(settings)
        self.by: dict[str, Meddler] = {}
        self.sent: list[Sent] = []
        self._under_way: dict[str, set[asyncio.Future[None]]] = {}  # that nobody has meddled with
        self._muted: set[bytes] = set()
        self._unmuted = asyncio.Event()

    async def post(
        self, channel: Channel, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Answer:
        sent = Sent(channel, endpoint, path, body, headers, timeout_s)
        self.sent.append(sent)
        meddler = self.by.get(path)
        if meddler is not None:
            return await meddler(sent)
        under_way = self._under_way.setdefault(path, set())
        done = asyncio.get_running_loop().create_future()
        under_way.add(done)
        try:
            return await self.forward(sent)
        finally:
            under_way.discard(done)
            done.set_result(None)

    async def meddle(self, path: str, meddler: Meddler) -> None:
        """Do this with the requests of a path from now on, and return once those of before have been answered."""
        self.by[path] = meddler
        if under_way := self._under_way.get(path):
            await asyncio.wait(tuple(under_way))

    async def forward(self, sent: Sent) -> Answer:
        """What would have happened to it, now; as often as it is called."""
        return await super().post(sent.channel, sent.endpoint, sent.path, sent.body, sent.headers, sent.timeout_s)

    async def stream(
        self, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Stream:
        return _Tapped(self, await super().stream(endpoint, path, body, headers, timeout_s), body)

    def mute(self, *keys: bytes) -> None:
        """From now on watches that begin at these keys tell nothing, neither those that stand nor new ones."""
        self._muted.update(keys)

    def unmute(self) -> None:
        """What they have to tell comes after all."""
        self._muted.clear()
        event, self._unmuted = self._unmuted, asyncio.Event()
        event.set()

    def is_muted(self, body: bytes) -> bool:
        return any(b64(key).encode() in body for key in self._muted)

    async def until_unmuted(self) -> None:
        await self._unmuted.wait()


class _Tapped:
    """A watch's answer. Muted, it still tells that the watch was created, as a silent one does."""

    def __init__(self, between: Between, inner: Stream, body: bytes) -> None:
        self._between = between
        self._inner = inner
        self._body = body
        self._rest = b""
        self._is_created = False
        self.status = inner.status

    async def read(self) -> bytes:
        data, self._rest = self._rest, b""
        if not data:
            data = await self._inner.read()
        if not self._is_created:
            self._is_created = True
            first, newline, self._rest = data.partition(b"\n")
            return first + newline
        while self._between.is_muted(self._body):
            await self._between.until_unmuted()
        return data

    def close(self) -> None:
        self._inner.close()


def lost(sent: Sent) -> TransportError:
    """Nobody will know what became of it."""
    return TransportError(f"the test has lost a request to {sent.path}", is_sent=True)


async def held_for_ever(sent: Sent) -> Answer:
    """It gets nowhere, whoever waits for it."""
    await asyncio.Event().wait()
    raise lost(sent)
