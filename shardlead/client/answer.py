"""A worker's answer as the caller reads it, whole or piece by piece.

Law: what breaks off is never taken for whole: it raises AnswerBroken, whatever the framing. An answer that is being
read may not stand still for longer than the request's time-out.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import aiohttp
import orjson
from multidict import CIMultiDict, CIMultiDictProxy

from shardlead.client.call import DONE, NEVER_NS, Call
from shardlead.clock import Clock
from shardlead.core.contract import RESERVED_PREFIX
from shardlead.errors import AnswerBroken

_RESERVED: Final = len(RESERVED_PREFIX)
_UNTOLD: Final = "the connection to the shard's leader ended before the answer was whole"


class Answer:
    """What the shard's leader has answered. `headers` has no `Shardlead-*`; `shard`, `epoch` and `worker` say whose."""

    __slots__ = ("_body", "_call", "_clock", "_headers", "_response", "status")

    def __init__(self, call: Call, response: aiohttp.ClientResponse, clock: Clock) -> None:
        self.status = response.status
        self._call = call
        self._response = response
        self._clock = clock
        self._body: bytes | None = None
        self._headers: CIMultiDictProxy[str] | None = None

    def __repr__(self) -> str:
        return f"<Answer {self.status} of {self.worker} for shard {self.shard} under epoch {self.epoch}>"

    @property
    def headers(self) -> CIMultiDictProxy[str]:
        if self._headers is None:
            self._headers = _stripped(self._response.headers)
        return self._headers

    @property
    def shard(self) -> int:
        return self._call.shard

    @property
    def reason(self) -> str:
        return self._response.reason or ""

    @property
    def worker(self) -> str:
        leader = self._call.leader
        return "" if leader is None else leader.worker

    @property
    def epoch(self) -> int:
        leader = self._call.leader
        return 0 if leader is None else leader.epoch

    @property
    def content(self) -> "Content":
        """The body as a stream."""
        return Content(self._response.content, self._progress)

    async def read(self) -> bytes:
        """The whole body. Raises AnswerBroken."""
        if self._body is None:
            stream = self._response.content
            if self._call.state == DONE and stream.is_eof() and not self._call.broken:  # nothing to wait for
                self._body = stream.read_nowait()
                self._check_end()
                return self._body
            pieces = []
            while piece := await self._progress(stream.readany()):
                pieces.append(piece)
            self._body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return self._body

    async def text(self, encoding: str = "") -> str:
        """The whole body as text: of the encoding given, else the one that the answer names, else UTF-8."""
        return (await self.read()).decode(encoding or self._response.charset or "utf-8")

    async def json(self) -> Any:
        """The whole body, which is JSON. Raises ValueError if it is not."""
        return orjson.loads(await self.read())

    def release(self) -> None:
        """No more of it is read: its connection is used again if the answer has come whole, else closed."""
        if not self._response.closed:
            self._response.release()

    async def _progress(self, reading: Awaitable[bytes]) -> bytes:
        """Await a piece, bounded and translated."""
        call = self._call
        call.deadline_ns = self._clock.now_ns() + call.timeout_ns
        try:
            piece = await reading
        except (aiohttp.ClientError, OSError) as exc:
            self._response.close()
            raise AnswerBroken(call.shard, call.broken or f"{_UNTOLD}: {exc}") from exc
        finally:
            call.deadline_ns = NEVER_NS
        if not piece:
            self._check_end()
        return piece

    def _check_end(self) -> None:
        """An answer that only the connection's end ends may have been reset instead."""
        protocol = self._call.protocol
        failure = None if protocol is None else protocol.exception()
        if isinstance(failure, aiohttp.ClientOSError) and not (
            "Content-Length" in self._response.headers or "Transfer-Encoding" in self._response.headers
        ):
            raise AnswerBroken(self.shard, _UNTOLD) from failure


class Content:
    """The answer's body as a stream, with the names of aiohttp's. All raise AnswerBroken where it breaks off."""

    __slots__ = ("_progress", "_stream")

    def __init__(self, stream: aiohttp.StreamReader, progress: Callable[[Awaitable[bytes]], Awaitable[bytes]]) -> None:
        self._stream = stream
        self._progress = progress

    async def read(self, n: int = -1) -> bytes:
        """Up to `n` bytes, as soon as some are there; b"": the end. Without `n`: all that is left."""
        if n < 0:
            return b"".join([piece async for piece in self.iter_any()])
        return await self._progress(self._stream.read(n))

    async def readany(self) -> bytes:
        """What is there, as soon as something is; b"": the end."""
        return await self._progress(self._stream.readany())

    async def readline(self) -> bytes:
        """One line with its end, or what is left; b"": the end."""
        return await self._progress(self._stream.readline())

    async def readexactly(self, n: int) -> bytes:
        """So many bytes. Raises asyncio.IncompleteReadError if the answer ends in order before."""
        return await self._progress(self._stream.readexactly(n))

    async def iter_any(self) -> AsyncIterator[bytes]:
        """Pieces as they come."""
        while piece := await self.readany():
            yield piece

    async def iter_chunked(self, n: int) -> AsyncIterator[bytes]:
        """Pieces of at most `n` bytes."""
        while piece := await self.read(n):
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Lines."""
        while line := await self.readline():
            yield line

    def at_eof(self) -> bool:
        """Whether everything has been read."""
        return self._stream.at_eof()


def _stripped(headers: CIMultiDictProxy[str]) -> CIMultiDictProxy[str]:
    """Without what only the runtimes say to each other. Nearly always there is nothing of it, and no copy."""
    for name in headers:
        if name[:_RESERVED].lower() == RESERVED_PREFIX:
            break
    else:
        return headers
    copy = CIMultiDict((name, value) for name, value in headers.items() if name[:_RESERVED].lower() != RESERVED_PREFIX)
    return CIMultiDictProxy(copy)
