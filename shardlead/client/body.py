"""What a request carries: whole bytes that are kept, or a stream that is sent once.

Law: design.md, the contract between router and worker. Up to 64 KiB the body is kept until the answer has come. A
longer one, or one of unknown length, is announced with `Expect: 100-continue`, so that nothing of it is consumed before
a worker has admitted the request; from then on it can be sent again only if it is made of bytes in memory.
"""

from collections.abc import AsyncIterable, Callable, Mapping
from typing import Any, Final, cast

import aiohttp
import orjson
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import LookupError as UnknownBody
from aiohttp.payload import Payload

from shardlead.core.contract import RESEND_BODY_BYTES_MAX, Problem
from shardlead.errors import RequestError

PIECE_BYTES: Final = 65_536
Bytes = bytes | bytearray | memoryview


def _nothing() -> None:
    return None


class Body:
    """`kept`: the whole of a short body; None: there is none. `stream`: what aiohttp is given of a large one, for each
    sending. `content_type` is its own, unless the caller names one."""

    __slots__ = ("_source", "content_type", "error", "has_begun", "kept", "on_begin", "on_progress", "stream")

    def __init__(self, content_type: str, *, kept: bytes | None = None, source: bytes | Payload | None = None) -> None:
        self.kept = kept
        self.content_type = content_type
        self.has_begun = False
        self.error: BaseException | None = None  # what the caller's own source has raised
        self.on_begin: Callable[[], None] = _nothing
        self.on_progress: Callable[[], None] = _nothing
        self._source = source
        self.stream = None if source is None else _Watched(self, source)

    def __repr__(self) -> str:
        return f"<Body {'large' if self.is_large else 'short'}{', begun' if self.has_begun else ''}>"

    @property
    def is_large(self) -> bool:
        return self.stream is not None

    @property
    def is_kept(self) -> bool:
        """Whether all that was sent of it can be sent again."""
        return not self.has_begun or isinstance(self._source, bytes)


NO_BODY: Final = Body("")


async def body_of(data: Any, json: Any) -> Body:
    """The body of a request. Raises RequestError for something that is none, and for both at once."""
    if json is not None:
        if data is not None:
            raise RequestError(Problem.BAD_REQUEST, "give data or json, not both")
        try:
            return _whole(orjson.dumps(json), "application/json")
        except TypeError as exc:
            raise RequestError(Problem.BAD_REQUEST, f"json cannot be written: {exc}") from exc
    if data is None:
        return NO_BODY
    if isinstance(data, Bytes):
        return _whole(bytes(data), "application/octet-stream")
    if isinstance(data, str):
        return _whole(data.encode(), "text/plain; charset=utf-8")
    payload = _payload_of(data)
    if payload.size is None or payload.size > RESEND_BODY_BYTES_MAX:
        return Body(payload.content_type, source=payload)
    whole = _Whole()
    await payload.write(cast(AbstractStreamWriter, whole))
    return Body(payload.content_type, kept=bytes(whole.data))


def _whole(data: bytes, content_type: str) -> Body:
    if len(data) > RESEND_BODY_BYTES_MAX:
        return Body(content_type, source=data)
    return Body(content_type, kept=data)


def _payload_of(data: Any) -> Payload:
    try:
        if isinstance(data, Mapping | tuple | list):
            data = aiohttp.FormData(data)
        if isinstance(data, aiohttp.FormData):
            data = data()
        return data if isinstance(data, Payload) else aiohttp.get_payload(data)
    except (TypeError, ValueError, UnknownBody) as exc:
        allowed = f"bytes, str, a form, a file or an {AsyncIterable.__name__} of bytes"
        raise RequestError(
            Problem.BAD_REQUEST, f"a body cannot be a {type(data).__name__}; it can be {allowed}"
        ) from exc


class _Watched(Payload):
    """A large body, which says when it begins and goes on, and keeps what its source raises for its owner."""

    def __init__(self, body: Body, source: bytes | Payload) -> None:
        super().__init__(source, content_type=body.content_type)
        self._body = body
        self._size = len(source) if isinstance(source, bytes) else source.size

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:  # noqa: ARG002  # aiohttp's signature
        raise TypeError("a streamed body is sent once")

    async def write(self, writer: AbstractStreamWriter) -> None:
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        body, source = self._body, self._value
        body.has_begun = True
        body.on_begin()
        if isinstance(source, bytes):
            whole = memoryview(source)
            for start in range(0, len(whole), PIECE_BYTES):
                await writer.write(whole[start : start + PIECE_BYTES])
                body.on_progress()
            return
        watched = _Progress(writer, body.on_progress)
        try:
            await source.write_with_length(watched, content_length)
        except (ConnectionError, aiohttp.ClientError):
            raise  # the connection's
        except Exception as exc:
            body.error = exc
            raise


class _Whole:
    """A writer that keeps what it is given."""

    __slots__ = ("data",)

    def __init__(self) -> None:
        self.data = bytearray()

    async def write(self, chunk: Bytes) -> None:
        self.data += chunk

    async def drain(self) -> None:
        pass


class _Progress:
    """A writer that tells of each piece."""

    __slots__ = ("_tell", "_writer")

    def __init__(self, writer: AbstractStreamWriter, tell: Callable[[], None]) -> None:
        self._writer = writer
        self._tell = tell

    async def write(self, chunk: Bytes) -> None:
        await self._writer.write(chunk)
        self._tell()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)
