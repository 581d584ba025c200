"""A plain reverse proxy as one writes it with aiohttp's server and client: what the router is compared with.

python -m loadtest.plain_proxy PORT UPSTREAM_PORT…
"""

import asyncio
import sys
import zlib
from typing import Final

import uvloop
from aiohttp import ClientSession, TCPConnector, web

HOP_BY_HOP: Final = frozenset(
    {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "proxy-connection", "content-length"}
)


async def serve(port: int, upstreams: list[str]) -> None:
    """Until cancelled."""
    async with ClientSession(connector=TCPConnector(limit=0), auto_decompress=False) as session:

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            key = request.headers.get("X-Shard-Key", "").encode()
            base = upstreams[zlib.crc32(key) % len(upstreams)]
            headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP]
            body = request.content if request.body_exists else None
            async with session.request(request.method, base + request.path_qs, headers=headers, data=body) as answer:
                kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP]
                if (answer.content_length or 0) <= 65_536:
                    return web.Response(status=answer.status, body=await answer.read(), headers=kept)
                response = web.StreamResponse(status=answer.status, headers=kept)
                response.content_length = answer.content_length
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response

        runner = web.ServerRunner(web.Server(handle, access_log=None))
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=4_096).start()
        await asyncio.Event().wait()  # until the process is told to end


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), [f"http://127.0.0.1:{port}" for port in sys.argv[2:]]))
