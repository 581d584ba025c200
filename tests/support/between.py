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
        self._muted: set[bytes] = set()
        self._unmuted = asyncio.Event()

    async def post(
        self, channel: Channel, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Answer:
        sent = Sent(channel, endpoint, path, body, headers, timeout_s)
        self.sent.append(sent)
        meddler = self.by.get(path)
        return await (meddler(sent) if meddler is not None else self.forward(sent))

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


__all__ = ["Answer", "Between", "Meddler", "Sent", "lost"]
