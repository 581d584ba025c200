"""Clients that people use, against the router: no surprise. Each is left out where it is not installed."""

import asyncio
import http.client
import re
import shutil
from pathlib import Path
from typing import Final

import pytest

from tests.router.support import Request, Stage, run, stage

LIMIT_S: Final = 20.0


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


async def _run(*words: str, stdin: bytes = b"") -> str:
    """What it says on stdout; it must succeed, in time."""
    process = await asyncio.create_subprocess_exec(
        *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            out, err = await process.communicate(stdin)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def _echoing(here: Stage) -> None:
    """A worker that answers with method, target, size of body and whether it was in chunks."""

    async def tell(request: Request) -> None:
        body = await request.read_body()
        chunked = "chunked" if "transfer-encoding" in request.headers else "length"
        said = f"{request.method} {request.target} {len(body)} {chunked}".encode()
        if request.target == "/k/chunks":
            await request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(100):
                await request.send(b"%x\r\n%b\r\n" % (len(said), said))
            await request.send(b"0\r\nX-End: 1\r\n\r\n")
        elif request.target == "/k/last":
            await request.send(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + said)
            await request.close()
        else:
            await request.answer(200, said)

    await here.lead(await here.start("w1", tell))


@needs("curl")
def test_curl(tmp_path: Path) -> None:
    """Uploads with and without Expect and a length, HEAD, several on one connection, chunks, compression asked for, an
    answer that ends with its connection, HTTP/1.0."""
    file = tmp_path / "file"
    file.write_bytes(bytes(3_000_000))

    async def main() -> None:
        async with stage() as here:
            await _echoing(here)
            url = f"http://{here.router.address}/k"
            curl = ("curl", "--silent", "--show-error", "--fail", "--max-time", "15", "--http1.1")
            assert await _run(*curl, f"{url}/a") == "GET /k/a 0 length"
            assert await _run(*curl, "-d", "hello", f"{url}/a") == "POST /k/a 5 length"
            assert await _run(*curl, "-T", str(file), f"{url}/a") == "PUT /k/a 3000000 length"
            expect = ("-H", "Expect: 100-continue")
            assert await _run(*curl, *expect, "-d", "hello", f"{url}/a") == "POST /k/a 5 length"
            assert await _run(*curl, *expect, "--data-binary", f"@{file}", f"{url}/a") == "POST /k/a 3000000 length"
            assert await _run(*curl, "-T", "-", f"{url}/a", stdin=bytes(2_000_000)) == "PUT /k/a 2000000 chunked"
            assert "HTTP/1.1 200" in await _run(*curl, "--head", f"{url}/a")
            ten = await _run(*curl, *(f"{url}/{number}" for number in range(10)))
            assert ten == "".join(f"GET /k/{number} 0 length" for number in range(10))
            mixed = await _run(*curl, "-d", "x", f"{url}/1", "--next", *curl[1:], f"{url}/2")
            assert mixed == "POST /k/1 1 lengthGET /k/2 0 length"
            assert await _run(*curl, "--tr-encoding", "--compressed", f"{url}/chunks") == "GET /k/chunks 0 length" * 100
            assert await _run(*curl, f"{url}/last") == "GET /k/last 0 length"
            assert await _run(*curl, "--http1.0", f"{url}/a") == "GET /k/a 0 length"
            code = await _run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "15", url)
            assert code == "400"
            assert here.router.counts.client_connections <= 1
            await here.true(lambda: here.router.counts.client_connections == 0)

    run(main)


def test_pythons_own_client() -> None:
    """Keep-alive, a body of unknown length, HEAD, and an answer in chunks."""

    def talk(address: str) -> None:
        connection = http.client.HTTPConnection(address, timeout=LIMIT_S)
        try:
            for _ in range(3):
                connection.request("POST", "/k/a", body=b"hello")
                assert connection.getresponse().read() == b"POST /k/a 5 length"
            connection.request("PUT", "/k/a", body=iter([b"a" * 50_000] * 3), encode_chunked=True)
            assert connection.getresponse().read() == b"PUT /k/a 150000 chunked"
            connection.request("HEAD", "/k/a")
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, b"")
            connection.request("GET", "/k/chunks")
            assert connection.getresponse().read() == b"GET /k/chunks 0 length" * 100
            connection.request("GET", "/none")
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Content-Type"]) == (400, "application/problem+json")
            answer.read()
            connection.request("GET", "/k/a")
            assert connection.getresponse().read() == b"GET /k/a 0 length"
        finally:
            connection.close()

    async def main() -> None:
        async with stage() as here:
            await _echoing(here)
            await asyncio.to_thread(talk, here.router.address)

    run(main)


@needs("wrk")
def test_wrk() -> None:
    """A second of it: every answer is a 200, and no error on any socket."""

    async def main() -> None:
        async with stage() as here:
            await _echoing(here)
            said = await _run("wrk", "-t1", "-c16", "-d1s", f"http://{here.router.address}/k/a")
            found = re.search(r"(\d+) requests in", said)
            assert found is not None
            assert int(found[1]) > 10
            assert "Non-2xx" not in said
            assert "Socket errors" not in said

    run(main)


@needs("h2load")
def test_h2load() -> None:
    """In its HTTP/1.1 mode, pipelined four deep."""

    async def main() -> None:
        async with stage() as here:
            await _echoing(here)
            url = f"http://{here.router.address}/k/a"
            said = await _run("h2load", "--h1", "-n400", "-c8", "-m4", "-t1", url)
            assert "400 succeeded, 0 failed, 0 errored, 0 timeout" in said
            assert "400 2xx, 0 3xx, 0 4xx, 0 5xx" in said

    run(main)
