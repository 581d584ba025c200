"""A gate in a TCP path on loopback that can be shut without a word, as a network that swallows packets.

Law: shut, nothing passes either way and nobody is told: connections stay open, new ones are taken and lead nowhere.
Opened again, the connections of before are reset, as a machine answers packets of a connection that it has forgotten.
"""

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Final, Self

_PIECE_BYTES: Final = 65_536
_LOOPBACK: Final = "127.0.0.1"
CONNECT_TIMEOUT_S: Final = 5.0


class Gate:
    """Forwards connections to `target` (host:port) while it is open; use `async with`, then `url`."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._is_open = asyncio.Event()
        self._is_open.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, _LOOPBACK, 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def url(self) -> str:
        """Where to connect instead of the target."""
        assert self._server is not None, "use `async with`"
        return f"http://{_LOOPBACK}:{self._server.sockets[0].getsockname()[1]}"

    def shut(self) -> None:
        """Swallow everything from now on."""
        self._is_open.clear()

    def open(self) -> None:
        """Let everything pass again; what was open is reset."""
        for writer in list(self._writers):
            _reset(writer)
        self._is_open.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            await self._is_open.wait()
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except (OSError, TimeoutError):
            writer.transport.abort()
            return
        except asyncio.CancelledError:  # the gate is gone; a server's task that raises it is reported as an error
            writer.transport.abort()
            return
        else:
            self._writers.add(far_writer)
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
            far_writer.transport.abort()
            self._writers.discard(far_writer)
        finally:
            writer.transport.abort()
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(_PIECE_BYTES):
                await self._is_open.wait()
                target.write(piece)
                await target.drain()
        with contextlib.suppress(OSError, RuntimeError):
            target.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a RST: the other side learns that this connection is unknown here."""
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):  # closed already
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
