"""The worker's port in TLS: who has no certificate of the fleet's authority is not heard."""

import asyncio
import contextlib
import ssl
from pathlib import Path

from aiohttp import web

from shardlead import Leadership
from shardlead.tls import of_worker, towards_workers
from tests.support.etcd import make_tls
from tests.worker.stage import Peer, staged


def test_only_holders_of_a_certificate_are_served(tmp_path: Path) -> None:
    """The router's context gets an answer; a client without a certificate, and one in plain HTTP, do not."""
    files = make_tls(tmp_path / "files")
    server = of_worker(files.of_server())
    ours = towards_workers(files.of_client())
    assert ours is not None

    async def ask(address: str, context: ssl.SSLContext | None) -> int:
        host, _, port = address.rpartition(":")
        try:
            reader, writer = await asyncio.open_connection(
                host, int(port), ssl=context, server_hostname="localhost" if context else None
            )
        except (ssl.SSLError, ConnectionError):
            return 0
        try:
            async with asyncio.timeout(5):
                return (await Peer(reader, writer).ask("GET", "/any")).status
        except (ssl.SSLError, ConnectionError, asyncio.IncompleteReadError):
            return 0
        finally:
            writer.close()
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                await writer.wait_closed()

    async def main() -> None:
        async with staged(tls=server) as stage:

            @stage.on("/any")
            async def any_(lead: Leadership, request: web.Request) -> web.Response:
                return web.Response(text="ok")

            assert await ask(stage.address, ours.context) == 200
            assert await ask(stage.address, ssl.create_default_context(cafile=str(files.ca_file))) == 0
            assert await ask(stage.address, None) == 0

    asyncio.run(main())
