"""What a request must not be: without a key, with two, or readable in two ways."""

import asyncio

import pytest

from tests.router.support import SHARDS, Request, request_bytes, run, stage


@pytest.mark.parametrize(
    ("target", "headers", "status", "problem"),
    [
        ("/x", {}, 400, "key-missing"),
        ("/k/", {}, 400, "key-missing"),
        ("/x", {"X_Shard_Key": ""}, 400, "key-missing"),
        ("/k/a", {"X_Shard_Key": "b"}, 400, "key-ambiguous"),
        ("/k/a?key=b", {}, 400, "key-ambiguous"),
        ("/k/" + "a" * 2049, {}, 400, "key-too-long"),
        ("/x", {"X_Shard_Key": "a" * 65_536}, 400, "key-too-long"),
        ("/k/" + "a" * 65_536, {}, 400, "key-too-long"),
        ("/x?key=" + "a" * 65_536, {}, 400, "key-too-long"),
        ("/x", {"X_Other": "a" * 65_536}, 431, "too-large"),
        ("/k/%zz", {}, 400, "bad-request"),
    ],
)
def test_a_bad_key_is_refused_with_its_own_problem(
    target: str, headers: dict[str, str], status: int, problem: str
) -> None:
    """The answer names what is wrong; no worker sees the request."""

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1")
            await here.lead(worker)
            for method, body in (("GET", b""), ("POST", b"body")):
                answer = await here.ask(method, target, body, **headers)
                assert (answer.status, answer.problem) == (status, problem)
            assert not worker.requests

    run(main)


def test_a_refused_request_leaves_its_connection_usable() -> None:
    """A bad key is no reason to close: the framing was good."""

    async def main() -> None:
        async with stage() as here:
            await here.lead(await here.start("w1"))
            client = await here.client()
            for _ in range(2):
                assert (await client.ask("POST", "/x", b"body")).problem == "key-missing"
                assert (await client.ask("POST", "/k/a", b"body")).status == 200

    run(main)


@pytest.mark.parametrize("text", ["a/b", "a+b", "é", "日本", "a%2Fb", "a b", "a&b=c"])
def test_a_key_is_the_same_in_path_query_and_header(text: str) -> None:
    """Whatever the spelling, the worker is told one key and one shard: that of the client's str."""
    from urllib.parse import quote

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1")
            await here.lead(worker)
            quoted = quote(text, safe="")
            client = await here.client()
            await client.send(b"GET /x HTTP/1.1\r\nHost: a\r\nX-Shard-Key: %b\r\n\r\n" % text.encode())
            assert (await client.answer()).status == 200
            assert (await client.ask("GET", f"/k/{quoted}")).status == 200
            assert (await client.ask("GET", f"/x?key={quoted}")).status == 200
            assert {request.headers["shardlead-key"] for request in worker.requests} == {quoted}
            assert {request.shard for request in worker.requests} == {here.shard_of(text)}

    run(main)


def test_an_answer_nobody_asked_for_is_given_to_nobody() -> None:
    """Two answers to one request: the first passes, the second is thrown away with its connection."""

    async def twice(request: Request) -> None:
        await request.send(
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n2"
        )

    async def main() -> None:
        async with stage() as here:
            worker = await here.start("w1", twice)
            await here.lead(worker)
            client = await here.client()
            for count in range(1, 4):
                assert (await client.ask("POST")).body == b"1"
                assert worker.connections == count

    run(main)


def test_limits_have_answers() -> None:
    """Fields, body and connections beyond their limits are refused, each with its status."""

    async def main() -> None:
        async with stage(headers_max=10, body_bytes_max=100_000, connections_per_peer_max=3) as here:
            worker = await here.start("w1")
            await here.lead(worker)
            answer = await here.ask("GET", "/k/a", b"", **{f"X_{number}": "y" for number in range(10)})
            assert (answer.status, answer.problem) == (431, "too-large")
            answer = await here.ask("POST", "/k/a", bytes(100_001))
            assert (answer.status, answer.problem) == (413, "too-large")
            assert not worker.requests
            client = await here.client()
            await client.send(
                request_bytes("POST", "/k/a", Transfer_Encoding="chunked") + b"186A1\r\n" + bytes(100_001)
            )
            answer = await client.answer()
            assert (answer.status, answer.problem) == (413, "too-large")
            for each in here.clients:
                each.leave()
            await here.true(lambda: here.router.counts.client_connections == 0)
            clients = [await here.client() for _ in range(4)]
            answer = await clients[3].answer()
            assert (answer.status, answer.problem) == (503, "overloaded")
            assert answer.headers["retry-after"]
            assert await clients[3].closed()
            assert (await clients[0].ask()).status == 200

    run(main)


def test_a_head_that_does_not_come_is_answered_and_idle_connections_close() -> None:
    """Slow heads get a 408; a connection without a request is closed in order."""

    async def main() -> None:
        async with stage(head_timeout_s=0.2, idle_timeout_s=0.2) as here:
            client = await here.client()
            await client.send(b"GET / HTTP/1.1\r\nHost")
            answer = await client.answer()
            assert (answer.status, answer.problem) == (408, "timed-out")
            client = await here.client()
            assert await client.closed()

    run(main)


def test_a_head_in_many_packets_is_measured_alone() -> None:
    """Requests that came along in the same packets do not count against an unfinished head; a head of many small
    fields does, and a key that is the reason is named, however the packets fall."""

    async def main() -> None:
        async with stage(head_bytes_max=3_000, headers_max=1_000) as here:
            await here.lead(await here.start("w1"))
            client = await here.client()
            one = request_bytes("GET", "/k/a", X="y" * 900)
            data = one * 60
            cut = len(one) * 7 // 2
            for at in range(0, len(data), cut):
                await client.send(data[at : at + cut])
                await asyncio.sleep(0.002)
            for _ in range(60):
                assert (await client.answer()).status == 200
            for field, status in ((b"X: %b\r\n" % (b"y" * 80), 431), (b"X-Shard-Key: %b" % (b"k" * 4_000), 400)):
                client = await here.client()
                await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n")
                for at in range(0, 4_000, 50):
                    client.writer.write(field[at : at + 50] if status == 400 else field)
                    await asyncio.sleep(0)
                assert (await client.answer()).status == status

    run(main)


def test_requests_without_a_key_take_turns_where_they_are_allowed() -> None:
    """`keyless = "any"`: each goes to the leader of some shard, under its epoch and without a key, on every worker."""

    async def main() -> None:
        async with stage(keyless="any") as here:
            workers = [await here.start("w1"), await here.start("w2")]
            await here.lead(workers[0], *range(0, SHARDS, 2))
            await here.lead(workers[1], *range(1, SHARDS, 2))
            for _ in range(40):
                assert (await here.ask("GET", "/about")).status == 200
            for worker in workers:
                assert worker.requests
                for request in worker.requests:
                    assert "shardlead-key" not in request.headers
                    assert int(request.headers["shardlead-shard"]) % 2 == workers.index(worker)
                    assert int(request.headers["shardlead-epoch"]) > 0

    run(main)
