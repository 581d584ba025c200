"""Generator processes against servers that misbehave: the load stays open, and every failure has its reason."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from loadtest.generators import Generators, Harvest
from loadtest.histogram import fine, percentiles_ms, record
from loadtest.messages import Task
from loadtest.samples import OK

SLOTS = 16_384
Answer = Callable[[bytes], Awaitable[bytes]]


def json_answer(body: str, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


GOOD = json_answer('{"shard":0,"epoch":5,"worker":"w1"}')


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    """host:port of an HTTP server that answers each head as it is told."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                data = await answer(head)
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.CancelledError:  # a streams server reports the task of a connection that was cancelled
            pass
        finally:
            writer.transport.abort()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = listening.sockets[0].getsockname()[1]
        yield f"127.0.0.1:{port}"
    finally:
        listening.close()


def task(router: str, **fields: Any) -> Task:
    given: dict[str, Any] = {
        "share": 0,
        "shares": 1,
        "rates": (200.0,),
        "step_s": 10.0,
        "keys": 100,
        "choice": "uniform",
        "path": "/counters/{key}",
        "payload_bytes": (0,),
        "posts": 0.5,
        "idempotent": 0.0,
        "timeout_s": 5.0,
        "seed": 1,
        "through": "router",
        "routers": (router,),
        "store": "",
        "cluster": "",
        "table": bytes(2 * SLOTS),
        "shards": 1,
        "hash_tags": False,
        "connections_max": 500,
    }
    return Task(**{**given, **fields})


async def load(tasks: list[Task], for_s: float) -> Harvest:
    async with Generators(tasks, lambda _tick: None) as generators:
        await generators.begin()
        await asyncio.sleep(for_s)
        return await generators.stop(20)


def test_a_stall_is_in_the_latencies_of_all_that_were_due_meanwhile() -> None:
    """No coordinated omission: a server that stands still for a second makes every request that was due in that second
    wait, as users would have waited. A closed loop would have sent one request in that second and called p99 good."""

    async def story() -> Harvest:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        is_open = asyncio.Event()
        is_open.set()
        loop.call_later(1.5, is_open.clear)
        loop.call_later(2.5, is_open.set)

        async def answer(_head: bytes) -> bytes:
            await is_open.wait()
            return GOOD

        async with server(answer) as router:
            harvest = await load([task(router)], 4.0)
        assert loop.time() - began_s < 15
        return harvest

    harvest = asyncio.run(story())
    latencies = fine()
    for latency_us in harvest.samples.latency_us:
        record(latencies, latency_us)
    p50, p99 = percentiles_ms(latencies, [50, 99])
    assert not harvest.reasons
    assert 780 <= harvest.sent <= 830, "requests left on schedule, whatever the answers did"
    assert p99 > 900
    assert p50 < 300
    waited = sorted(us for us in harvest.samples.latency_us if us > 100_000)
    assert 150 <= len(waited) <= 200, "all that were due in the second but the last tenth of it"


def test_each_failure_has_its_reason() -> None:
    """A wrong shard, an error page, a broken answer, a lost connection, silence: each is a failure of its own kind, and
    none is sent again."""
    kinds = {
        "200 of the wrong shard": json_answer('{"shard":7,"epoch":5,"worker":"w1"}'),
        "503 not-led": json_answer('{"type":"https://x/not-led","detail":"nobody"}', "503 Service Unavailable"),
        "404": json_answer("nothing", "404 Not Found"),
        "not an answer": b"SSH-2.0-x\r\n",
        "connection closed without an answer": b"",
        "no answer within 0.5 s": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
    }

    async def story(data: bytes) -> tuple[Harvest, int]:
        heads = 0

        async def answer(_head: bytes) -> bytes:
            nonlocal heads
            heads += 1
            return data

        async with server(answer) as router:
            harvest = await load([task(router, timeout_s=0.5, rates=(50.0,), posts=0.0)], 0.5)
        return harvest, heads

    for reason, data in kinds.items():
        harvest, heads = asyncio.run(story(data))
        assert harvest.sent == heads == len(harvest.samples), reason
        assert harvest.reasons
        assert all(text.startswith(f"GET: {reason}") for text in harvest.reasons), harvest.reasons
        assert sum(harvest.reasons.values()) == harvest.sent
        assert not any(flags & OK for flags in harvest.samples.flags)


def test_nobody_listens() -> None:
    """A port that refuses: each request fails with that reason, and the run goes on."""

    async def story() -> Harvest:
        async with server(lambda _head: asyncio.sleep(0, GOOD)) as router:
            pass
        return await load([task(router, rates=(50.0,), posts=0.0)], 0.5)

    harvest = asyncio.run(story())
    assert harvest.sent == sum(harvest.reasons.values()) > 10
    assert all("cannot connect" in reason for reason in harvest.reasons)


def test_answers_are_held_against_each_other() -> None:
    """Two workers under one epoch, and an old epoch after a newer one has answered, are violations that no log is
    needed for."""

    async def story(epochs: list[tuple[int, str]]) -> Harvest:
        at = 0

        async def answer(_head: bytes) -> bytes:
            nonlocal at
            epoch, worker = epochs[min(at, len(epochs) - 1)]
            at += 1
            return json_answer(f'{{"shard":0,"epoch":{epoch},"worker":"{worker}"}}')

        async with server(answer) as router:
            return await load([task(router, rates=(50.0,))], 0.6)

    good = asyncio.run(story([(5, "w1")] * 5 + [(6, "w2")]))
    assert good.violations == []
    assert good.leaderships == {(0, 5): "w1", (0, 6): "w2"}
    two = asyncio.run(story([(5, "w1")] * 5 + [(5, "w2")]))
    assert two.violations == ["shard 0, epoch 5: both w1 and w2 answered"]
    stale = asyncio.run(story([(6, "w2")] * 5 + [(5, "w1")]))
    assert len(stale.violations) == 1
    assert "epoch 5 of w1 answered a request that was sent after epoch 6" in stale.violations[0]


def test_two_generators_share_one_schedule() -> None:
    """Together they send the schedule's requests once each, and what they found is put together."""

    async def story() -> Harvest:
        async with server(lambda _head: asyncio.sleep(0, GOOD)) as router:
            return await load([task(router, share=share, shares=2) for share in range(2)], 1.0)

    harvest = asyncio.run(story())
    due = sorted(harvest.samples.due_us)
    assert [round(us / 5000) for us in due] == list(range(len(due))), "each request of 200/s once"
    assert harvest.leaderships == {(0, 5): "w1"}


def test_posts_carry_what_was_asked_for() -> None:
    """Bodies of the sizes that were given, an Idempotency-Key on each where all shall have one, no two alike."""
    heads: list[str] = []

    async def story() -> Harvest:
        async def answer(head: bytes) -> bytes:
            heads.append(head.decode())
            return GOOD

        async with server(answer) as router:
            return await load([task(router, rates=(100.0,), posts=1.0, idempotent=1.0)], 0.5)

    harvest = asyncio.run(story())
    assert not harvest.reasons
    keys = [line for head in heads for line in head.splitlines() if line.startswith("Idempotency-Key: ")]
    assert len(keys) == len(set(keys)) == harvest.sent
    assert all(head.startswith("POST /counters/key-") and "Content-Length: 0" in head for head in heads)
