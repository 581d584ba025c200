"""Bodies too large to be kept, and connections that change their protocol."""

import asyncio
import hashlib
import os

import pytest

from shardlead.router.exchange import ANSWERING, Exchange
from tests.router.support import WAIT_S, Request, Stage, request_bytes, run, stage

MIB = 1_048_576


async def post_slowly(here: Stage, body: bytes, piece: int = 262_144) -> tuple[int, bytes]:
    """POST a body as fast as the router takes it; status and answer."""
    client = await here.client()

    async def send() -> None:
        await client.send(
            request_bytes("POST", "/k/a", Content_Length=str(len(body))).replace(b"Content-Length: 0\r\n", b"")
        )
        for at in range(0, len(body), piece):
            await client.send(body[at : at + piece])

    sending = asyncio.create_task(send())
    answer = await client.answer()
    await sending
    return answer.status, answer.body


def test_a_10_mb_post_that_meets_a_drain_arrives_whole_at_the_next_leader() -> None:
    """The draining leader refuses without a 100, so not a byte of the body was lost on it; the client is held back
    until another leads, and never notices."""

    async def main() -> None:
        async with stage() as here:
            old = await here.start("w1", lambda request: request.refuse("draining"))
            new = await here.start("w2", _digest)
            await here.lead(old)
            body = os.urandom(10 * MIB)
            asking = asyncio.create_task(post_slowly(here, body))
            await old.received(1)
            await here.held(1)
            assert old.requests[0].expects_continue
            assert old.requests[0].headers["content-length"] == str(len(body))
            assert here.router.counts.kept_bytes < MIB, "the rest is held back at the client"
            await here.lead(new)
            assert await asking == (200, hashlib.sha256(body).hexdigest().encode())
            assert here.router.counts.kept_bytes == 0
            await here.true(lambda: not old.open)  # closed: the refused request was never finished there

    run(main)


async def _digest(request: Request) -> None:
    body = await request.read_body()
    await request.answer(200, hashlib.sha256(body).hexdigest().encode())


def test_a_large_post_waits_for_a_leader_at_the_client() -> None:
    """On hold a large body costs the router no more than the part that is kept anyway; many do not either."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", _digest)
            body = os.urandom(3 * MIB)
            asking = [asyncio.create_task(post_slowly(here, body)) for _ in range(5)]
            await here.held(5)
            assert here.router.counts.kept_bytes <= 5 * 512 * 1024
            await here.lead(worker)
            expected = (200, hashlib.sha256(body).hexdigest().encode())
            assert await asyncio.gather(*asking) == [expected] * 5
            assert worker.connections <= 5

    run(main)


def test_a_large_body_flows_only_as_fast_as_the_worker_reads() -> None:
    """Back-pressure upwards: the client stands still while the worker does."""

    async def main() -> None:
        async with stage() as here:
            go = asyncio.Event()

            async def slow(request: Request) -> None:
                await request.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                await go.wait()
                size = int(request.headers["content-length"])
                got = 0
                while got < size:
                    got += len(await request.reader.read(MIB))
                await request.answer(200, b"%d" % got)

            await here.lead(await here.start("w1", slow))
            client = await here.client()
            size = 64 * MIB
            sent = 0

            async def send() -> None:
                nonlocal sent
                await client.send(b"POST /k/a HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size)
                while sent < size:
                    await client.send(bytes(MIB))
                    sent += MIB

            sending = asyncio.create_task(send())
            before = -1
            while sent != before or not sent:
                before = sent
                await asyncio.sleep(0.1)
            assert sent < size // 2
            go.set()
            assert (await client.answer()).body == b"%d" % size
            await sending

    run(main)


def test_a_client_that_asks_first_is_told_to_go_on_by_the_worker() -> None:
    """Expect: 100-continue of a large body is answered when the worker has admitted the request, of a short one at
    once."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1")
            for size in (100, 100_000):
                client = await here.client()
                head = request_bytes("POST", "/k/a", Expect="100-continue", Content_Length=str(size))
                await client.send(head.replace(b"Content-Length: 0\r\n", b""))
                if size > 65_536:
                    await here.held(1)
                    await here.lead(worker)
                assert (await client.head()).status == 100
                await client.send(bytes(size))
                if size < 65_536:
                    await here.held(1)
                    await here.lead(worker)
                assert (await client.answer()).json["body"] == size
                await here.gone(worker)
                worker = await here.start(f"w{size}")

    run(main)


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_worker_that_answers_without_asking_for_the_body_is_passed_on(size: int) -> None:
    """413 without a 100: the client gets it, the rest of its body is thrown away and its connection closed, the
    worker's too."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", lambda request: request.answer(413, b"too much"))
            await here.lead(worker)
            client = await here.client()
            head = request_bytes("POST", "/k/a", Content_Length=str(size)).replace(b"Content-Length: 0\r\n", b"")
            await client.send(head + bytes(size if size < 65_536 else 70_000))
            answer = await client.answer()
            assert (answer.status, answer.body) == (413, b"too much")
            if size > 65_536:
                assert answer.headers["connection"] == "close"
                assert await client.closed()
                await here.true(lambda: not worker.open)

    run(main)


def test_a_body_of_which_some_was_thrown_away_is_not_sent_again() -> None:
    """The first worker began to answer without having asked for the body, and was lost before anything had left for
    the client: the next one would get a body with a hole in it."""

    async def main() -> None:
        async with stage() as here:
            lost = asyncio.Event()

            async def script(request: Request) -> None:
                await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
                await lost.wait()
                await request.close()

            worker = await here.start("w1", script, idempotent=True)
            await here.lead(worker)
            client = await here.client()
            head = b"POST /k/a HTTP/1.1\r\nHost: t\r\nIdempotency-Key: q\r\nTransfer-Encoding: chunked\r\n\r\n"
            await client.send(head + b"3\r\naaa\r\n")
            exchange = await _answering(here)
            await client.send(b"3\r\nbbb\r\n")
            await here.true(lambda: exchange.body.total_bytes == 6)
            lost.set()
            assert (await client.answer()).problem == "outcome-unknown"
            await client.send(b"3\r\nccc\r\n0\r\n\r\n")
            assert len(worker.requests) == 1

    run(main)


async def _answering(here: Stage) -> Exchange:
    """The one request under way, once its answer has begun."""
    connection = next(iter(here.router._connections))
    await here.true(lambda: connection._current is not None and connection._current.state == ANSWERING)
    assert connection._current is not None
    return connection._current


def test_nothing_behind_the_last_answer_is_processed() -> None:
    """A body is too long while it is streamed: the client is told that the connection ends, and a whole request that
    came in the same packet was not heard."""

    async def main() -> None:
        async with stage(body_bytes_max=1_000) as here:

            async def script(request: Request) -> None:
                if request.expects_continue:
                    await request.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                    await request.reader.read()
                else:
                    await request.answer(200)

            worker = await here.start("w1", script)
            await here.lead(worker)
            client = await here.client()
            await client.send(b"POST /k/a HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
            await worker.received(1)
            await client.send(b"3e9\r\n%b\r\n0\r\n\r\n" % bytes(1_001) + request_bytes("POST", "/k/second", b"x"))
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (413, "close")
            assert await client.closed()
            assert (await here.ask("GET", "/k/a")).status == 200
            assert [request.target for request in worker.requests] == ["/k/a", "/k/a"]

    run(main)


def test_requests_behind_an_answer_that_has_to_close_the_connection_are_forgotten() -> None:
    """An HTTP/1.0 client gets an answer without a length: what came behind that request is nobody's, and not kept."""

    async def main() -> None:
        async with stage() as here:
            go = asyncio.Event()

            async def script(request: Request) -> None:
                await go.wait()
                await request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")

            worker = await here.start("w1", script)
            await here.lead(worker)
            client = await here.client()
            keep = b"HTTP/1.0\r\nConnection: keep-alive\r\n"
            post = b"POST /k/a %bContent-Length: 30000\r\n\r\n%b" % (keep, bytes(30_000))
            await client.send(b"GET /k/a %b\r\n" % keep + post * 3)
            await worker.received(1)
            await here.true(lambda: here.router.counts.kept_bytes == 90_000)
            go.set()
            answer = await client.answer()
            assert (answer.body, answer.headers["connection"]) == (b"abc", "close")
            await here.true(lambda: not here.router.counts.kept_bytes)
            assert len(worker.requests) == 1

    run(main)


def test_a_refusal_after_a_100_is_the_end_of_a_large_body() -> None:
    """What was let through is gone: 503 that says it was not processed; a broken connection: 502 outcome-unknown, GET
    or not."""

    async def main() -> None:
        async with stage() as here:

            async def script(request: Request) -> None:
                await request.read_body()
                if request.number == 0:
                    await request.refuse("stale")
                else:
                    await request.close()

            worker = await here.start("w1", script)
            await here.lead(worker)
            answer = await here.ask("POST", "/k/a", bytes(100_000))
            assert (answer.status, answer.problem) == (503, "not-led")
            await here.lead(worker)
            answer = await here.ask("POST", "/k/a", bytes(100_000))
            assert (answer.status, answer.problem) == (502, "outcome-unknown")
            assert len(worker.requests) == 2

    run(main)


def test_a_body_that_stands_still_is_given_up() -> None:
    """A short body that stops arriving is a 408; of a long one under way, too; the worker's connection ends."""

    async def main() -> None:
        async with stage(body_progress_timeout_s=0.3) as here:
            worker = await here.start("w1")
            await here.lead(worker)
            for size in (100, 100_000):
                client = await here.client()
                head = request_bytes("POST", "/k/a", Content_Length=str(size)).replace(b"Content-Length: 0\r\n", b"")
                await client.send(head + b"begun")
                answer = await client.answer()
                assert (answer.status, answer.problem) == (408, "timed-out")
            await here.true(lambda: not worker.open)

    run(main)


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("is_sent", [True, False])
def test_a_body_without_room_is_not_said_to_be_unprocessed_once_it_was_announced(method: str, is_sent: bool) -> None:
    """The worker may have admitted the request before its 100 is here. While it is held, nothing was done."""

    async def main() -> None:
        async with stage(held_bytes_max=1_000) as here:
            admitted = asyncio.Event()

            async def script(_request: Request) -> None:
                admitted.set()  # and works on it
                await asyncio.Event().wait()

            worker = await here.start("w1", script)
            client = await here.client()
            if is_sent:
                await here.lead(worker)
            head = request_bytes(method, "/k/a", Transfer_Encoding="chunked").replace(b"Content-Length: 0\r\n", b"")
            await client.send(head + b"5\r\nbegun\r\n")
            await (admitted.wait() if is_sent else here.held(1))
            await client.send(b"7d0\r\n" + bytes(2_000) + b"\r\n")
            answer = await client.answer()
            is_unknown = is_sent and method == "POST"
            expected = (502, "outcome-unknown") if is_unknown else (503, "overloaded")
            assert (answer.status, answer.problem) == expected

    run(main)


# --- tunnels

UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Key": "k"}


async def _switch(request: Request) -> None:
    if request.headers.get("upgrade") != "websocket":
        await request.read_body()
        await request.answer(200, b"plain")
        return
    assert request.headers["connection"].lower() == "upgrade"
    await request.send(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Accept: v\r\n\r\nhello"
    )
    while data := await request.reader.read(65_536):
        await request.send(data.upper())
    raise ConnectionError


def test_an_upgraded_connection_is_a_tunnel() -> None:
    """After 101 bytes pass both ways as they are; what was sent along with either head is not lost."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", _switch)
            await here.lead(worker)
            client = await here.client()
            await client.send(request_bytes("GET", "/k/a", b"", **UPGRADE) + b"early")
            answer = await client.answer()
            assert answer.status == 101
            assert answer.headers == {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-accept": "v"}
            assert await client.reader.readexactly(10) == b"helloEARLY"
            big = b"x" * (4 * MIB)
            sending = asyncio.create_task(client.send(big))
            assert await client.reader.readexactly(len(big)) == big.upper()
            await sending
            assert here.router.counts.tunnels == 1
            client.leave()
            await here.true(lambda: here.router.counts.tunnels == 0 and not worker.open)

    run(main)


def test_a_tunnel_closes_when_its_shard_moves() -> None:
    """Whoever speaks to an old leader must come again to find the new one; tunnels of other shards stay."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", _switch)
            await here.lead(worker)
            shard = here.shard_of("a")
            other = next(key for key in "bcdefghij" if here.shard_of(key) != shard)
            clients = []
            for key in ("a", other):
                client = await here.client()
                await client.send(request_bytes("GET", f"/k/{key}", b"", **UPGRADE))
                assert (await client.answer()).status == 101
                assert await client.reader.readexactly(5) == b"hello"
                clients.append(client)
            await here.lead(await here.start("w2"), shard)
            assert await clients[0].closed()
            await clients[1].send(b"still here")
            assert await clients[1].reader.readexactly(10) == b"STILL HERE"

    run(main)


@pytest.mark.parametrize("is_stopping", [False, True], ids=["moved", "stopping"])
def test_a_tunnel_that_is_granted_too_late_is_closed(is_stopping: bool) -> None:
    """Its shard has moved since the request was sent, or the router is stopping."""

    async def main() -> None:
        async with stage(shutdown_timeout_s=60.0) as here:
            go = asyncio.Event()

            async def later(request: Request) -> None:
                await go.wait()
                await _switch(request)

            worker = await here.start("w1", later)
            await here.lead(worker)
            client = await here.client()
            await client.send(request_bytes("GET", "/k/a", b"", **UPGRADE))
            await worker.received(1)
            if is_stopping:
                here.router.stop()
                await here.true(lambda: not here.router.is_ready)
            else:
                await here.lead(await here.start("w2"))
            go.set()
            assert (await client.answer()).status == 101
            async with asyncio.timeout(WAIT_S):
                assert await client.reader.read() in (b"", b"hello")
            await here.true(lambda: not here.router.counts.tunnels and not here.router.counts.client_connections)

    run(main)


ECHO = b"GET /k/a HTTP/1.1\r\nHost: t\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n"
H2C = b"GET /x HTTP/1.1\r\nHost: t\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"


def test_a_thousand_requests_for_another_protocol_in_one_packet_are_answered() -> None:
    """They are read as ordinary ones, one after the other; behind a request whose upgrade is not granted, too, when the
    connection to the worker has already passed to another client."""

    async def main() -> None:
        async with stage(upstream_connections_max=1) as here:
            go = asyncio.Event()

            async def script(request: Request) -> None:
                await request.read_body()
                if request.number == 0:
                    await go.wait()
                await request.answer(200)

            worker = await here.start("w1", script)
            await here.lead(worker)
            client, other = await here.client(), await here.client()
            await client.send(ECHO + H2C * 1_000)
            await worker.received(1)
            await other.send(request_bytes("POST", "/k/a", b"abc"))
            pool = next(iter(here.router.desk.pools.values()))
            await here.true(lambda: len(pool.waiting) == 1)
            go.set()
            assert (await client.answer()).status == 200
            assert (await other.answer()).status == 200
            for _ in range(1_000):
                assert (await client.answer()).problem == "key-missing"

    run(main)


def test_an_upgrade_that_is_not_granted_stays_http() -> None:
    """Another answer than 101 leaves the connection what it was, requests sent behind it included; h2c, and an
    Upgrade with a body, are never asked of the worker."""

    async def main() -> None:
        async with stage() as here:

            async def plain(request: Request) -> None:
                body = await request.read_body()
                await request.answer(200, b"%b %b" % (request.headers.get("upgrade", "-").encode(), body))

            worker = await here.start("w1", plain)
            await here.lead(worker)
            client = await here.client()
            await client.send(request_bytes("GET", "/k/a", b"", **UPGRADE) + request_bytes("POST", "/k/a", b"next"))
            assert (await client.answer()).body == b"websocket "
            assert (await client.answer()).body == b"- next"
            h2c = {"Connection": "keep-alive, Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2_Settings": "AAMAAABk"}
            await client.send(request_bytes("POST", "/k/a", b"body", **h2c) + request_bytes("GET", "/k/a"))
            assert (await client.answer()).body == b"- body"
            assert (await client.answer()).body == b"- "
            await client.send(request_bytes("POST", "/k/a", b"body", **UPGRADE))
            assert (await client.answer()).body == b"- body"
            assert (await client.ask()).status == 200
            assert worker.connections == 1
            assert "http2-settings" not in worker.requests[2].headers

    run(main)


def test_a_switch_that_nobody_asked_for_is_no_answer() -> None:
    """101 to an ordinary request counts as a broken connection."""

    async def main() -> None:
        async with stage() as here:
            raw = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nraw"
            await here.lead(await here.start("w1", lambda request: request.send(raw)))
            assert (await here.ask("POST", "/k/a")).problem == "outcome-unknown"

    run(main)
