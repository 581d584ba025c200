"""One watch as the gateway streams it: lines to batches, and the end of the stream to an error.

Law: protocol.md A.7 and C. A cancel is an error at once, since the gateway leaves the connection open and silent after
it; so is a clean end of the stream, and so is silence. Nothing here resumes.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, Self

from shardlead.errors import StoreUnavailable, WatchCanceled, WatchSilent
from shardlead.store import gateway
from shardlead.store.base import WatchBatch
from shardlead.store.faults import Fault, Faulted
from shardlead.store.gateway import Header
from shardlead.store.transport import Stream, TransportError

LINE_BYTES_MAX: Final = 64 * 1024 * 1024  # 5,000 deletions are 0.4 MB; 50,000 were 3.4 MB


class LineSplitter:
    """Cuts a stream of chunks into lines. A newline may come alone, late or (after an error) never."""

    __slots__ = ("_buffer", "_bytes_max")

    def __init__(self, bytes_max: int = LINE_BYTES_MAX) -> None:
        self._buffer = bytearray()
        self._bytes_max = bytes_max

    def feed(self, chunk: bytes) -> Sequence[bytes]:
        """The lines that this chunk completes, without newlines and without empty ones. Raises ValueError for a
        line above the bound."""
        before = len(self._buffer)
        self._buffer += chunk
        if self._buffer.find(b"\n", before) < 0:  # looks at each byte once, however many chunks a line comes in
            if len(self._buffer) > self._bytes_max:
                raise ValueError(f"a line of more than {self._bytes_max} bytes")
            return ()
        *lines, rest = bytes(self._buffer).split(b"\n")
        self._buffer = bytearray(rest)
        return tuple(line for line in lines if line.strip())

    def rest(self) -> bytes:
        """What stands after the last newline: at the end of a stream, its last line."""
        return bytes(self._buffer).strip()


class WatchStream(AsyncIterator[WatchBatch]):
    """The messages of one watch stream."""

    def __init__(
        self,
        stream: Stream,
        endpoint: str,
        silence_s: float,
        on_header: Callable[[Header], None],
        *,
        is_trusted: bool,
    ) -> None:
        self._stream = stream
        self._endpoint = endpoint
        self._silence_s = silence_s
        self._on_header = on_header
        self._is_trusted = is_trusted
        self._lines: deque[bytes] = deque()
        self._splitter = LineSplitter()
        self._is_closed = False

    async def created(self) -> None:
        """Returns when the store has said that the watch stands. Raises Faulted, WatchCanceled."""
        message = self._message(await self._line())
        if not message.is_created:
            raise ValueError("a watch whose first message is not `created`")
        if message.batch.events:
            raise ValueError("a watch that begins with events")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchBatch:
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    line = await self._line()
                batch = self._message(line).batch
            except TimeoutError as exc:
                raise WatchSilent(f"the watch was silent for {self._silence_s:g} s", endpoint=self._endpoint) from exc
            except TransportError as exc:
                raise StoreUnavailable(f"the watch broke: {exc.reason}", endpoint=self._endpoint) from exc
            except Faulted as exc:
                raise StoreUnavailable(f"the watch ended: {exc.fault}", endpoint=self._endpoint) from exc
            except ValueError as exc:
                raise WatchCanceled(f"unreadable message: {exc}") from exc
            if batch.events or self._is_trusted:
                return batch

    def close(self) -> None:
        self._is_closed = True
        self._lines.clear()
        self._stream.close()

    async def _line(self) -> bytes:
        while not self._lines:
            if self._is_closed:
                raise TransportError("closed", is_sent=True)
            chunk = await self._stream.read()
            if chunk:
                self._lines.extend(self._splitter.feed(chunk))
                continue
            rest = self._splitter.rest()
            self._is_closed = True
            if not rest:
                raise TransportError("the server ended the stream", is_sent=True)
            self._lines.append(rest)  # an error comes as a last line without a newline
        return self._lines.popleft()

    def _message(self, line: bytes) -> gateway.WatchMessage:
        item = gateway.stream_item(line)
        if isinstance(item, Fault):
            raise Faulted(item)
        message = gateway.watch_message(item)
        self._on_header(message.header)
        if message.is_canceled:
            raise WatchCanceled(message.reason, message.compact_revision)
        return message
