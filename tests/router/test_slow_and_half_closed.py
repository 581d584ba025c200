"""Clients and workers that are slow, and those that close one half of their connection."""

import asyncio
import contextlib
import socket

import pytest

from shardlead.router.downstream import WRITE_HIGH_BYTES
from tests.router.support import Request, Stage, request_bytes, run, stage

MIB = 1_048_576
UPGRADE = {"Connection": "Upgrade", "Upgrade": "echo"}


async def _is_quiet(here: Stage) -> None:
    counts, desk = here.router.counts, here.router.desk
    await here.true(lambda: counts.client_connections == 0 and counts.held == 0 and counts.kept_bytes == 0)
    await here.true(lambda: not any(pool.busy or pool.waiting for pool in desk.pools.values()))


# --- half closed


@pytest.mark.parametrize("is_uvloop", [True, False], ids=["uvloop", "asyncio"])
def test_a_client_that_sends_no_more_gets_its_answers(is_uvloop: bool) -> None:
    """Requests that came whole before the client closed its half are answered, in order, the last with
    `Connection: close`; then the connection ends."""

    async def main() -> None:
        async with stage() as here:
            go = asyncio.Event()

            async def later(request: Request) -> None:
                await request.read_body()
                await go.wait()
                await request.answer(200, request.target.encode())

            worker = await here.start("w1", later)
            await here.lead(worker)
            client = await here.client()
            await client.send(request_bytes("GET", "/k/1") + request_bytes("POST", "/k/2", b"abc"))
            await client.send(request_bytes("GET", "/k/3") + b"GET /k/4 HTTP/1.1\r\nHo")
            client.writer.write_eof()
            await worker.received(1)
            go.set()
            for number in (1, 2, 3):
                answer = await client.answer()
                assert answer.body == b"/k/%d" % number
            assert await client.closed()
            one = await here.client()
            await one.send(request_bytes("GET", "/k/1"))
            one.writer.write_eof()
            assert (await one.answer()).headers["connection"] == "close"
            assert await one.closed()
            await _is_quiet(here)

    run(main, is_uvloop=is_uvloop)


def test_a_client_that_leaves_within_a_request_has_gone() -> None:
    """Half a body, half a head, no request at all: nothing is to be answered, and nothing stays."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1")
            await here.lead(worker)
            large = b"POST /k/a HTTP/1.1\r\nHost: t\r\nContent-Length: 100000\r\n\r\n" + bytes(1_000)
            for raw in (b"", b"GET /k/a HT", request_bytes("POST", "/k/a", b"abc")[:-1], large):
                client = await here.client()
                await client.send(raw)
                if raw is large:
                    await worker.received(1)
                client.writer.write_eof()
                assert await client.closed()
            assert len(worker.requests) == 1
            await _is_quiet(here)

    run(main)


def test_a_half_closed_client_is_not_waited_for_longer_than_said() -> None:
    """It may have gone: after the time for it, its request is given up, on hold or sent."""

    async def never(request: Request) -> None:
        await request.reader.read()

    async def main() -> None:
        async with stage(half_closed_timeout_s=0.2) as here:
            worker = await here.start("w1", never)
            for _ in range(2):
                client = await here.client()
                await client.send(request_bytes("GET", "/k/a"))
                client.writer.write_eof()
                assert await client.closed()
                await _is_quiet(here)
                await here.lead(worker)
            assert len(worker.requests) == 1

    run(main)


def test_both_halves_of_a_tunnel_end_by_themselves() -> None:
    """Whoever has ended its half still hears the other, to its end; then both connections end."""

    async def counts(request: Request) -> None:
        await request.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
        if request.target == "/k/worker":
            request.writer.write_eof()
        size = len(await request.reader.read())
        if request.target == "/k/client":
            await request.send(b"%d" % size)
        else:
            request.body = b"%d" % size
        await request.close()

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", counts)
            await here.lead(worker)
            client = await here.client()
            await client.send(request_bytes("GET", "/k/client", b"", **UPGRADE))
            assert (await client.answer()).status == 101
            await client.send(bytes(100_000))
            client.writer.write_eof()
            assert await asyncio.wait_for(client.reader.read(), 5) == b"100000"
            client = await here.client()
            await client.send(request_bytes("GET", "/k/worker", b"", **UPGRADE))
            assert (await client.answer()).status == 101
            assert await asyncio.wait_for(client.reader.read(), 5) == b""
            await client.send(bytes(200_000))
            client.writer.close()
            await here.true(lambda: worker.requests[1].body == b"200000")
            await _is_quiet(here)

    run(main)


def test_a_tunnel_in_which_nothing_moves_is_closed() -> None:
    """An idle one after its own time-out, one of which a half has ended after that for half-closed ones; what moves
    stays."""

    async def switch(request: Request) -> None:
        await request.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
        while data := await request.reader.read(1_000):
            await request.send(data)
        await request.reader.read()
        await asyncio.sleep(60)

    async def main() -> None:
        async with stage(tunnel_idle_timeout_s=1.5, half_closed_timeout_s=0.1) as here:
            await here.lead(await here.start("w1", switch))
            clients = []
            for _ in range(3):
                client = await here.client()
                await client.send(request_bytes("GET", "/k/a", b"", **UPGRADE))
                assert (await client.answer()).status == 101
                clients.append(client)
            clients[2].writer.write_eof()
            assert await clients[2].closed()
            for _ in range(15):
                await clients[1].send(b"x")
                assert await clients[1].reader.readexactly(1) == b"x"
                await asyncio.sleep(0.2)
            assert await asyncio.wait_for(clients[0].reader.read(1), 0.1) == b""
            for worker in here.workers.values():
                await worker.stop()
            clients[1].leave()
            await _is_quiet(here)

    run(main)


# --- slow


def test_a_body_that_only_pretends_to_arrive_is_given_up() -> None:
    """A byte now and then is no progress: below the rate it is a 408, short or long; above it it is served."""

    async def main() -> None:
        async with stage(body_progress_timeout_s=1.0, body_rate_min=1_000) as here:
            worker = await here.start("w1")
            await here.lead(worker)

            async def post(size: int, piece: int) -> int:
                client = await here.client()
                head = b"POST /k/a HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % size
                await client.send(head)
                answer = asyncio.create_task(client.answer())
                for _ in range(0, size, piece):
                    if answer.done():
                        break
                    with contextlib.suppress(ConnectionError):
                        await client.send(bytes(piece))
                    await asyncio.sleep(0.05)
                return (await answer).status

            posts = [post(1_000, 1), post(100_000, 1), post(10_000, 200), post(70_000, 1_000)]
            assert await asyncio.gather(*posts) == [408, 408, 200, 200]
            for client in here.clients:
                client.leave()
            await _is_quiet(here)

    run(main)


async def _slow_client(here: Stage, target: str) -> socket.socket:
    host, _, port = here.router.address.rpartition(":")
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
    raw.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(raw, (host, int(port)))
    await loop.sock_sendall(raw, request_bytes("GET", target, Connection="close"))
    return raw


def test_a_client_that_takes_its_answer_slowly_gets_it_whole() -> None:
    """It takes far longer than the time-out to empty what is buffered for it, but it moves: it is let be, also while
    the worker has long said everything. One that takes nothing is cut, and so is one that takes next to nothing."""
    size = 12 * MIB

    async def main() -> None:
        async with stage(body_progress_timeout_s=1.0, body_rate_min=2_000) as here:

            async def large(request: Request) -> None:
                await request.answer(200, bytes(size))

            await here.lead(await here.start("w1", large))
            loop = asyncio.get_running_loop()

            async def take(piece: int) -> int:
                raw = await _slow_client(here, "/k/a")
                got = 0
                try:
                    for _ in range(60):
                        got += len(await loop.sock_recv(raw, piece))
                        await asyncio.sleep(0.1)
                    while data := await loop.sock_recv(raw, 262_144):
                        got += len(data)
                except ConnectionError:
                    pass
                finally:
                    raw.close()
                return got

            whole, little = await asyncio.gather(take(10_000), take(10))
            assert whole > size
            assert little < size
            raw = await _slow_client(here, "/k/a")
            await here.true(lambda: here.router.counts.client_connections == 1)
            await asyncio.sleep(3)  # a second each for: a mark that may be old, being looked at, a window of 1 s
            await here.true(lambda: here.router.counts.client_connections == 0)
            raw.close()
            await _is_quiet(here)

    run(main)


@pytest.mark.parametrize("target", ["/k/a", "/no-key"])
def test_a_client_that_sends_on_and_reads_nothing_is_read_no_further(target: str) -> None:
    """What is kept of its answers has a bound, however many it asks for; if it reads, it gets them all."""

    async def main() -> None:
        async with stage(head_timeout_s=1.0, body_progress_timeout_s=30.0) as here:
            answers = 0

            async def script(request: Request) -> None:
                nonlocal answers
                answers += 1
                await request.answer(200, bytes(60_000), Date="today")

            worker = await here.start("w1", script)
            await here.lead(worker)
            client = await here.client()
            count = 40_000
            packet = request_bytes("GET", target)
            sending = asyncio.create_task(client.send(packet * count))
            connection = next(iter(here.router._connections))
            await here.true(lambda: connection.is_full)
            for _ in range(20):  # it stays so, while the client would send more
                await asyncio.sleep(0.1)
                assert connection._transport is not None
                assert connection._transport.get_write_buffer_size() < WRITE_HIGH_BYTES + 70_000
            assert answers < 200
            for _ in range(500):
                answer = await client.answer()
                assert answer.status == (200 if target == "/k/a" else 400)
            sending.cancel()

    run(main)


def test_a_client_that_takes_none_of_its_answers_is_cut() -> None:
    """It has asked for more than the router keeps, and reads nothing."""

    async def main() -> None:
        async with stage(body_progress_timeout_s=1.0) as here:
            worker = await here.start("w1", lambda request: request.answer(200, bytes(60_000)))
            await here.lead(worker)
            client = await here.client()
            sending = asyncio.create_task(client.send(request_bytes("GET", "/k/a") * 40_000))
            await here.true(lambda: not here.router._connections)
            sending.cancel()
            await _is_quiet(here)

    run(main)


def test_a_worker_that_does_not_take_a_body_times_out() -> None:
    """It is no fault of the client's: 504, not 408."""

    async def main() -> None:
        async with stage(body_progress_timeout_s=0.5) as here:

            async def never(request: Request) -> None:
                await request.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                await asyncio.sleep(20)

            await here.lead(await here.start("w1", never))
            client = await here.client()
            size = 64 * MIB
            await client.send(b"POST /k/a HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
            sending = asyncio.create_task(client.send(bytes(size)))
            answer = await client.answer()
            assert (answer.status, answer.problem) == (504, "timed-out")
            client.leave()
            with contextlib.suppress(ConnectionError):
                await sending
            for worker in here.workers.values():
                await worker.stop()
            await _is_quiet(here)

    run(main)
