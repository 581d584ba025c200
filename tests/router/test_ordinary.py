"""Ordinary requests pass whole, both ways, and nothing passes that must not."""

import asyncio
import os

import pytest

from tests.router.support import Request, request_bytes, run, stage


@pytest.mark.parametrize("is_uvloop", [True, False], ids=["uvloop", "asyncio"])
def test_every_method_passes_on_one_connection_each_way(is_uvloop: bool) -> None:
    """A client's connection and a worker's are both used again; method, target and body arrive as sent."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1")
            epoch = await here.lead(worker)
            client = await here.client()
            for method, target, body in (
                ("GET", "/k/a?x=1&x=%20", b""),
                ("POST", "/k/a", b"hello"),
                ("POST", "/k/a", b""),
                ("PUT", "/k/b/x", b"\0\r\n\xff"),
                ("DELETE", "/k/c", b""),
                ("HEAD", "/k/a", b""),
                ("PATCH", "/k/a", b"{}"),
                ("OPTIONS", "/k/a", b""),
                ("GET", "/k/a", b""),
            ):
                answer = await client.ask(method, target, body)
                assert answer.status == 200
                received = worker.requests[-1]
                assert (received.method, received.target, received.body) == (method, target, body)
                assert received.epoch == epoch
                if method != "HEAD":
                    assert answer.json["shard"] == received.shard == here.shard_of(target[3])
            assert worker.connections == 1

    run(main, is_uvloop=is_uvloop)


def test_chunked_bodies_pass_both_ways() -> None:
    """A chunked request of unknown length and a chunked answer arrive whole; so does a short one in one packet."""

    async def chunked(request: Request) -> None:
        body = await request.read_body()
        await request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for at in range(0, len(body), 1000):
            piece = body[at : at + 1000]
            await request.send(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece))
        await request.send(b"0\r\nX-Sum: 1\r\nTrailer: dropped\r\nShardlead-Epoch: 7\r\nSet-Cookie: a=b\r\n\r\n")

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", chunked)
            await here.lead(worker)
            client = await here.client()
            body = os.urandom(4500)
            head = request_bytes("POST", "/k/a", Transfer_Encoding="chunked")
            await client.send(head + b"1194\r\n" + body + b"\r\n0\r\n\r\n")
            assert (await client.answer()).body == body
            assert worker.requests[0].headers["content-length"] == "4500", "it was all there, so its length is known"
            await client.send(head)
            await worker.received(2)
            for at in range(0, 4500, 1500):
                await client.send(b"5DC\r\n" + body[at : at + 1500] + b"\r\n")
            await client.send(b"0\r\nX: trailer\r\nX-Shard-Key: b\r\nHost: b\r\nShardlead_Epoch: 7\r\nY:\r\n\r\n")
            answer = await client.answer()
            assert (answer.body, answer.trailers) == (body, [b"X-Sum: 1"])
            assert worker.requests[1].trailers == [b"X: trailer", b"Y: "]
            assert worker.requests[1].headers["transfer-encoding"] == "chunked"
            assert worker.requests[1].expects_continue
            await client.send(head + b"3\r\nabc\r\n0\r\nX: trailer\r\n\r\n")
            assert (await client.answer()).body == b"abc"
            assert "content-length" not in worker.requests[2].headers, "a short body goes in chunks for its trailers"
            assert worker.requests[2].trailers == [b"X: trailer"]
            await client.send(request_bytes("GET", "/k/a", TE="deflate;q=0.5, Trailers", Connection="TE"))
            assert not (await client.answer()).trailers or worker.requests[3].headers["te"] == "trailers"
            assert worker.requests[3].headers["connection"] == "TE"
            assert worker.connections == 1

    run(main)


def test_pipelined_requests_are_answered_in_order_one_at_a_time() -> None:
    """The second request reaches the worker after the first was answered, though both came in one packet."""

    async def main() -> None:
        gates = [asyncio.Event(), asyncio.Event(), asyncio.Event()]

        async def slow(request: Request) -> None:
            body = await request.read_body()
            await gates[request.number].wait()
            await request.answer(200, request.target.encode() + body)

        async with stage() as here:
            worker = await here.start("w1", slow)
            await here.lead(worker)
            client = await here.client()
            await client.send(
                request_bytes("GET", "/k/a/1")
                + request_bytes("POST", "/k/b/2", b"two")
                + request_bytes("GET", "/k/a/3")
            )
            for number, expected in enumerate((b"/k/a/1", b"/k/b/2two", b"/k/a/3")):
                await worker.received(number + 1)
                assert len(worker.requests) == number + 1
                gates[number].set()
                assert (await client.answer()).body == expected

    run(main)


def test_thousands_of_bad_pipelined_requests_do_not_recurse() -> None:
    """Requests that are answered at once, one behind the other, are answered in a loop."""

    async def main() -> None:
        async with stage() as here:
            client = await here.client()
            sending = asyncio.create_task(client.send(request_bytes("GET", "/nowhere") * 3000))
            for _ in range(3000):
                assert (await client.answer()).problem == "key-missing"
            await sending

    run(main)


def test_hop_by_hop_and_contract_fields_stay_where_they_are() -> None:
    """Nobody but the runtimes can speak the contract, and what belongs to one connection stays on it."""

    async def tells(request: Request) -> None:
        await request.answer(
            200,
            b"ok",
            Shardlead_Anything="x",
            Shardlead_Epoch="1",
            Connection="x-private",
            X_Private="secret",
            Keep_Alive="timeout=5",
            X_Public="seen",
            Set_Cookie="a=b",
        )

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", tells)
            epoch = await here.lead(worker)
            answer = await here.ask(
                "GET",
                "/k/a",
                Shardlead_Epoch="99999999",
                shardlead_refused="stale",
                SHARDLEAD_KEY="evil",
                Connection="keep-alive, X-Mine, Host, X-Shard-Key",
                X_Mine="hop",
                X_Shard_Key="a",
                TE="gzip",
                Keep_Alive="1",
                Proxy_Connection="keep-alive",
                Proxy_Authorization="secret",
                X_End="to end",
            )
            received = worker.requests[0]
            names = [name.lower() for name, _ in received.raw_headers]
            assert set(names) == {
                "host",
                "x-end",
                "x-shard-key",  # Connection cannot name away what we need ourselves
                "x-forwarded-for",
                "x-forwarded-proto",
                "x-forwarded-host",
                "forwarded",
                "x-request-id",
                "shardlead-key",
                "shardlead-shard",
                "shardlead-epoch",
            }
            assert len(names) == len(set(names))
            assert received.epoch == epoch
            assert received.headers["shardlead-key"] == "a"
            assert received.headers["host"] == "test"
            assert answer.headers.pop("date")
            assert answer.headers == {"content-length": "2", "x-public": "seen", "set-cookie": "a=b"}

    run(main)


@pytest.mark.parametrize(
    ("policy", "came", "expected"),
    [
        ("append", {}, ["127.0.0.1", "http", "test", 'for=127.0.0.1;host="test";proto=http']),
        (
            "append",
            {"X_Forwarded_For": "1.2.3.4", "X_Forwarded_Proto": "https", "Forwarded": "for=1.2.3.4"},
            ["1.2.3.4, 127.0.0.1", "https", "test", 'for=1.2.3.4, for=127.0.0.1;host="test";proto=http'],
        ),
        (
            "replace",
            {"X_Forwarded_For": "1.2.3.4", "X_Forwarded_Proto": "https", "Forwarded": "for=1.2.3.4"},
            ["127.0.0.1", "http", "test", 'for=127.0.0.1;host="test";proto=http'],
        ),
        ("off", {}, [None, None, None, None]),
        ("off", {"X_Forwarded_For": "1.2.3.4"}, ["1.2.3.4", None, None, None]),
    ],
)
def test_forwarded_fields_follow_the_policy(policy: str, came: dict[str, str], expected: list[str | None]) -> None:
    """append adds the peer, replace trusts nothing, off leaves all as it is."""

    async def main() -> None:
        async with stage(forwarded=policy) as here:
            worker = await here.start("w1")
            await here.lead(worker)
            await here.ask("GET", "/k/a", b"", **came)
            headers = worker.requests[0].headers
            names = ("x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "forwarded")
            assert [headers.get(name) for name in names] == expected

    run(main)


@pytest.mark.parametrize(
    ("raw", "is_head", "status", "body", "length"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", False, 204, b"", None),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\nETag: x\r\n\r\n", False, 304, b"", "7"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", True, 200, b"", "7"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", True, 200, b"", None),
        (
            b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            False,
            200,
            b"ok",
            "2",
        ),
        (b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", False, 200, b"", "0"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno", False, 500, b"no", "2"),
        (b"HTTP/1.1 421 Misdirected\r\nContent-Length: 2\r\n\r\nno", False, 421, b"no", "2"),
        (b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\nno", False, 503, b"no", "2"),
    ],
)
def test_answers_of_every_shape_pass_and_leave_the_connection_usable(
    raw: bytes, is_head: bool, status: int, body: bytes, length: str | None
) -> None:
    """An application's own 421 and 503 pass too: only the runtime's header makes a refusal."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", lambda request: request.send(raw))
            await here.lead(worker)
            client = await here.client()
            for _ in range(2):
                answer = await client.ask("HEAD" if is_head else "GET", "/k/a")
                assert (answer.status, answer.body, answer.headers.get("content-length")) == (status, body, length)
            assert worker.connections == 1

    run(main)


def test_an_early_hint_reaches_the_client_before_the_answer() -> None:
    """Interim answers are passed on as they come."""

    async def main() -> None:
        go = asyncio.Event()

        async def hints(request: Request) -> None:
            await request.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n")
            await go.wait()
            await request.answer(200, b"ok")

        async with stage() as here:
            await here.lead(await here.start("w1", hints))
            client = await here.client()
            await client.send(request_bytes("GET", "/k/a"))
            hint = await client.head()
            assert (hint.status, hint.headers) == (103, {"link": "</a.css>"})
            go.set()
            assert (await client.answer()).body == b"ok"

    run(main)


def test_every_request_has_an_id_and_every_answer_a_date() -> None:
    """A client's X-Request-Id passes if it can be written anywhere; else one is made, told to the worker, and named in
    a problem. `traceparent` passes as it came. An answer without a Date gets one; a worker's own stays."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1")
            await here.lead(worker)
            trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
            await here.ask("GET", "/k/a", X_Request_Id="abc-1", traceparent=trace)
            assert worker.requests[0].headers["x-request-id"] == "abc-1"
            assert worker.requests[0].headers["traceparent"] == trace
            for bad in ("", "a b", 'a"b', "a" * 129, "{}"):
                await here.ask("GET", "/k/a", X_Request_Id=bad)
            client = await here.client()
            twice = b"X-Request-Id: a\r\nx-request-id: a\r\nX_Request_Id: a\r\n"
            await client.send(b"GET /k/a HTTP/1.1\r\nHost: t\r\n%b\r\n" % twice)
            answer = await client.answer()
            assert answer.headers["date"].endswith(" GMT")
            made = [request.headers["x-request-id"] for request in worker.requests[1:]]
            assert len(set(made)) == 6
            assert all(len(each) > 16 for each in made)
            refused = await here.ask("GET", "/none", X_Request_Id="abc-2")
            assert refused.json["request_id"] == "abc-2"
            assert refused.headers["date"].endswith(" GMT")
            worker.script = lambda request: request.answer(200, b"ok", Date="Sun, 06 Nov 1994 08:49:37 GMT")
            assert (await here.ask()).headers["date"] == "Sun, 06 Nov 1994 08:49:37 GMT"
            await client.send(b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n")
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (501, "close")
            assert "CONNECT" in answer.json["detail"]

    run(main)


def test_an_old_client_gets_an_old_answer() -> None:
    """HTTP/1.0: no chunks, the connection closes unless keep-alive was asked for."""

    async def chunked(request: Request) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", chunked)
            await here.lead(worker)
            client = await here.client()
            await client.send(b"GET /k/a HTTP/1.0\r\n\r\n")
            answer = await client.answer()
            assert answer.headers.keys() == {"connection", "date"}
            assert answer.body == b"ok"
            worker.script = lambda request: request.answer(200, b"ok")
            client = await here.client()
            for _ in range(2):
                await client.send(b"GET /k/a HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")
                answer = await client.answer()
                assert answer.headers["connection"] == "keep-alive"
            await client.send(b"GET /k/a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\ngarbage that nobody reads")
            answer = await client.answer()
            assert answer.headers["connection"] == "close"
            assert await client.closed()

    run(main)


def test_the_last_request_of_a_connection_may_have_a_body_in_many_packets() -> None:
    """Connection: close ends what is read behind the request, not its body."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1")
            await here.lead(worker)
            client = await here.client()
            await client.send(request_bytes("POST", "/k/a", bytes(10), Connection="close")[:-5])
            await here.true(lambda: here.router.next_number() > 1)
            await client.send(bytes(5) + request_bytes("GET", "/k/never"))
            answer = await client.answer()
            assert (answer.json["body"], answer.headers["connection"]) == (10, "close")
            assert await client.closed()
            assert len(worker.requests) == 1

    run(main)


def test_an_answer_that_ends_with_its_connection_ends_in_order() -> None:
    """A worker's answer without a length is re-framed, and its connection is not used again."""

    async def unframed(request: Request) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        await request.close()

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", unframed)
            await here.lead(worker)
            client = await here.client()
            for _ in range(2):
                assert (await client.ask()).body == b"all of it"
            assert worker.connections == 2

    run(main)


def test_a_torn_answer_is_a_reset_not_a_clean_end() -> None:
    """A client never takes half an answer for a whole one."""

    async def torn(request: Request) -> None:
        await request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        await request.close()

    async def main() -> None:
        async with stage() as here:
            await here.lead(await here.start("w1", torn))
            client = await here.client()
            await client.send(request_bytes("GET", "/k/a"))
            assert (await client.head()).status == 200
            assert await client.chunk() == b"half"
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError, ValueError)):
                await client.chunk()

    run(main)


def test_a_slow_client_holds_its_worker_back() -> None:
    """An answer is not collected in the router: the worker stops when the client does not read."""

    async def main() -> None:
        written = 0
        total = 64 * 1024 * 1024
        piece = bytes(65_536)

        async def large(request: Request) -> None:
            nonlocal written
            await request.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
            while written < total:
                await request.send(piece)
                written += len(piece)

        async with stage() as here:
            await here.lead(await here.start("w1", large))
            client = await here.client()
            await client.send(request_bytes("GET", "/k/a"))
            before = -1
            async with asyncio.timeout(5):
                while written != before or not written:  # it has stood still for a while
                    before = written
                    await asyncio.sleep(0.1)
            assert written < total // 2
            answer = await client.answer()
            assert len(answer.body) == total

    run(main)


def test_a_client_that_leaves_frees_its_worker() -> None:
    """The worker's connection ends when the client has gone, so that nobody computes for nobody."""

    async def main() -> None:
        gone = asyncio.Event()

        async def waits(request: Request) -> None:
            try:
                await request.reader.readexactly(1)
            except asyncio.IncompleteReadError:
                gone.set()
                raise

        async with stage() as here:
            worker = await here.start("w1", waits)
            await here.lead(worker)
            client = await here.client()
            await client.send(request_bytes("GET", "/k/a"))
            await worker.received(1)
            client.leave()
            async with asyncio.timeout(5):
                await gone.wait()
            assert here.router.counts.others["client-gone"] == 1

    run(main)
