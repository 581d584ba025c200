"""TLS towards clients, and mutual TLS towards workers."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest

from shardlead.errors import CommandError
from shardlead.tls import of_worker, towards_workers
from tests.router.support import request_bytes, run, stage
from tests.support.etcd import Tls, make_tls


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return make_tls(tmp_path_factory.mktemp("tls") / "files")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return make_tls(tmp_path_factory.mktemp("strangers") / "files")


def _facing_clients(tls: Tls) -> dict[str, Any]:
    return {"tls_cert_file": str(tls.server_cert_file), "tls_key_file": str(tls.server_key_file)}


def test_clients_and_workers_are_spoken_to_in_tls(certificates: Tls) -> None:
    """Keep-alive, a large body and a tunnel's worth of pipelining pass; the worker is told that it was https."""
    trusting = ssl.create_default_context(cafile=str(certificates.ca_file))

    async def main() -> None:
        async with stage(tls=certificates.of_client(worker_name="localhost"), **_facing_clients(certificates)) as here:
            worker = await here.start("w1", tls=of_worker(certificates.of_server()))
            await here.lead(worker)
            client = await here.client(trusting)
            for body in (b"", b"hello", bytes(1_000_000)):
                answer = await client.ask("POST", "/k/a", body)
                assert (answer.status, answer.json["body"]) == (200, len(body))
            await client.send(request_bytes("GET", "/k/a") * 20)
            for _ in range(20):
                assert (await client.answer()).status == 200
            assert worker.requests[0].headers["x-forwarded-proto"] == "https"
            assert "proto=https" in worker.requests[0].headers["forwarded"]
            await client.send(b"GET / HTTP/1.1\r\nHost : a\r\n\r\n")
            assert (await client.answer()).status == 400
            assert await client.closed()

    run(main)


def test_plain_and_broken_clients_do_not_disturb_a_tls_port(certificates: Tls) -> None:
    """Whatever a stranger sends instead of a handshake, and whoever does not trust us: nothing is logged as an error,
    nothing stays, and the next client is served."""
    trusting = ssl.create_default_context(cafile=str(certificates.ca_file))

    async def main() -> None:
        async with stage(head_timeout_s=1.0, **_facing_clients(certificates)) as here:
            await here.lead(await here.start("w1"))
            for raw in (b"GET /k/a HTTP/1.1\r\nHost: t\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(100), b"\0", b""):
                client = await here.client()
                await client.send(raw)
                async with asyncio.timeout(5):
                    try:
                        while await client.reader.read(100):
                            pass
                    except ConnectionError:
                        pass
            with pytest.raises(ssl.SSLError):
                await here.client(ssl.create_default_context())
            client = await here.client(trusting)
            assert (await client.ask()).status == 200
            client.leave()
            await here.true(lambda: here.router.counts.client_connections == 0)

    run(main)


def test_a_worker_that_shows_no_certificate_of_the_authority_gets_nothing(certificates: Tls, strangers: Tls) -> None:
    """Plain ones, those of another authority and those of another name: not a byte of a request reaches them."""

    async def main() -> None:
        plain = of_worker(certificates.of_server())
        stranger = of_worker(strangers.of_server())
        for tls, name in ((None, ""), (stranger, ""), (plain, "another.example")):
            async with stage(tls=certificates.of_client(worker_name=name), hold_timeout_s=0.3) as here:
                worker = await here.start("w1", tls=tls, drain_timeout_s=0.0)
                await here.lead(worker)
                answer = await here.ask("POST", "/k/a", b"secret")
                assert (answer.status, answer.problem) == (503, "upstream-failed")
                assert not worker.requests
                await worker.stop()

    run(main)


def test_files_that_are_no_certificates_are_said(certificates: Tls, tmp_path: Path) -> None:
    """With the fields to look at, and no traceback."""
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    with pytest.raises(CommandError, match=r"tls\.cert_file"):
        of_worker(certificates.of_server(cert_file=str(nonsense)))
    with pytest.raises(CommandError, match=r"tls\.ca_file"):
        towards_workers(certificates.of_client(ca_file=str(nonsense)))
    with pytest.raises(CommandError, match="fit together"):
        of_worker(certificates.of_server(key_file=str(certificates.client_key_file)))
