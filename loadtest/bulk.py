"""The upstream of `python -m loadtest memory`: it answers with so many bytes, and counts what it is sent.

    python -m loadtest.bulk PORT

`GET /<n>` is answered with n bytes; any other method with the length of its body, which needs a Content-Length. It
holds one piece of a body at a time, whatever its size.
"""

import asyncio
import sys
from typing import Final

import uvloop

PIECE_BYTES: Final = 65_536
_PIECE: Final = bytes(PIECE_BYTES)


async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, until its peer closes it."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b" ", 2)
            if method == b"GET":
                await _send(writer, int(target.rpartition(b"/")[2]))
            else:
                if b"100-continue" in head.lower():  # a router asks before it sends a large body (`core.contract`)
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                found = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
                taken = b"%d" % await _take(reader, int(found.partition(b":")[2]))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(taken), taken))
                await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        return
    finally:
        writer.close()


async def _send(writer: asyncio.StreamWriter, count: int) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % count)
    while count > 0:
        piece = min(count, PIECE_BYTES)
        writer.write(_PIECE[:piece])
        await writer.drain()
        count -= piece
    await writer.drain()


async def _take(reader: asyncio.StreamReader, count: int) -> int:
    taken = 0
    while taken < count:
        piece = await reader.read(min(PIECE_BYTES, count - taken))
        if not piece:
            raise ConnectionError("the body ended early")
        taken += len(piece)
    return taken


async def serve(port: int) -> None:
    """Until cancelled."""
    async with await asyncio.start_server(converse, "127.0.0.1", port, backlog=4_096):
        await asyncio.Event().wait()  # until the process is told to end


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
