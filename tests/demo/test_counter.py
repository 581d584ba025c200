"""The example service keeps its word: an acknowledged increment counts once, under one leader."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from yarl import URL

from shardlead import demo
from shardlead.demo import Counter, CounterShard
from shardlead.errors import EpochRegressed, Fenced
from shardlead.worker.application import load
from tests.fencing.rivals import lead_of

WAIT_S: Final = 20.0
SHARD: Final = 3
Client = TestClient[web.Request, web.Application]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that all counters of a test share."""
    path = tmp_path / "counters.sqlite3"
    monkeypatch.setenv(demo.DATABASE_VARIABLE, str(path))
    return path


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(WAIT_S):
            await main()

    asyncio.run(bounded())


@asynccontextmanager
async def opened(epoch: int, shard: int = SHARD) -> AsyncIterator[CounterShard]:
    """A shard's object as a worker would hold it, in a process of its own as far as the file can tell."""
    async with Counter() as make:
        counter = make(lead_of(shard, epoch))
        await counter.open()
        try:
            yield counter
        finally:
            await counter.close()


@asynccontextmanager
async def served(counter: CounterShard) -> AsyncIterator[Client]:
    application = web.Application(client_max_size=2**30)
    application.router.add_route("*", "/{tail:.*}", counter.handle)
    async with TestClient(TestServer(application)) as client:
        yield client


async def ask(client: Client, method: str, path: str, key: str = "", body: bytes = b"") -> Any:
    headers = {"Idempotency-Key": key} if key else {}
    async with client.request(method, URL(path, encoded=True), headers=headers, data=body) as answer:
        assert answer.status == 200, await answer.text()
        assert (await answer.read()).endswith(b"}\n"), "for whoever reads it in a terminal"
        return await answer.json()


def test_it_is_an_application() -> None:
    """`shardlead worker shardlead.demo:Counter` finds it, and what it says of itself."""

    async def main() -> None:
        async with load("shardlead.demo:Counter").factory() as make:
            assert (make.fenced, make.idempotent) == (True, True)
            hosted = make(lead_of(SHARD, 10))
            await hosted.open()
            assert hosted.healthy()
            await hosted.close()

    run(main)


def test_post_adds_and_get_looks() -> None:
    """Both say name, value, shard, epoch and worker."""

    async def main() -> None:
        async with opened(10) as counter, served(counter) as client:
            expected = {"name": "alice", "value": 0, "shard": SHARD, "epoch": 10, "worker": "worker-10"}
            assert await ask(client, "GET", "/counters/alice") == expected
            for value in (1, 2):
                assert await ask(client, "POST", "/counters/alice") == {**expected, "value": value}
                assert await ask(client, "GET", "/counters/alice") == {**expected, "value": value}
            assert await ask(client, "POST", "/counters/bob", body=b"x" * 2**20) == {
                **expected,
                "name": "bob",
                "value": 1,
            }

    run(main)


@pytest.mark.parametrize(
    ("path", "name"),
    [("a%2Fb", "a/b"), ("a+b", "a+b"), ("a%2Bb", "a+b"), ("a%20b", "a b"), ("%C3%A9t%C3%A9", "été"), ("%2525", "%25")],
)
def test_a_name_is_decoded_once(path: str, name: str) -> None:
    """As the router decodes the key."""

    async def main() -> None:
        async with opened(10) as counter, served(counter) as client:
            assert (await ask(client, "POST", f"/counters/{path}?x=/y"))["name"] == name

    run(main)


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {}, 404),
        ("GET", "/counters", {}, 404),
        ("POST", "/counters/", {}, 404),
        ("POST", "/counters/a/b", {}, 404),
        ("POST", "/other/a", {}, 404),
        ("GET", "/counters/%FF", {}, 400),
        ("GET", "/counters/" + "a" * 2_049, {}, 400),
        ("DELETE", "/counters/a", {}, 405),
        ("PUT", "/counters/a", {}, 405),
        ("POST", "/counters/a", {"Idempotency-Key": "k" * 256}, 400),
    ],
)
def test_what_is_wrong_is_said(method: str, path: str, headers: dict[str, str], status: int) -> None:
    """And nothing is added."""

    async def main() -> None:
        async with opened(10) as counter, served(counter) as client:
            async with client.request(method, URL(path, encoded=True), headers=headers) as answer:
                assert (answer.status, list(await answer.json())) == (status, ["error"])
                assert ("Allow" in answer.headers) == (status == 405)
            assert (await ask(client, "GET", "/counters/a"))["value"] == 0

    run(main)


def test_an_upload_that_breaks_off_does_not_count() -> None:
    """The request was never whole."""

    async def main() -> None:
        async with opened(10) as counter, served(counter) as client:
            reader, writer = await asyncio.open_connection(client.host, client.port)
            writer.write(b"POST /counters/a HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
            await writer.drain()
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            assert (await ask(client, "GET", "/counters/a"))["value"] == 0

    run(main)


# --- idempotency --------------------------------------------------------------------------------------------------


def test_a_repeated_key_is_answered_and_not_executed() -> None:
    """The first answer, byte for byte, also if the repetitions come all at once; other counters have other keys."""

    async def main() -> None:
        async with opened(10) as counter, served(counter) as client:
            answers = await asyncio.gather(*(ask(client, "POST", "/counters/a", "k1") for _ in range(20)))
            assert [answer["value"] for answer in answers] == [1] * 20
            assert (await ask(client, "POST", "/counters/a"))["value"] == 2
            assert (await ask(client, "POST", "/counters/a", "k1"))["value"] == 1
            assert (await ask(client, "POST", "/counters/a", "k2"))["value"] == 3
            assert (await ask(client, "POST", "/counters/b", "k1"))["value"] == 1
            assert (await ask(client, "GET", "/counters/a"))["value"] == 3

    run(main)


def test_the_next_leader_knows_the_answers_given() -> None:
    """A POST whose answer was lost with its worker is repeated to the next one, and still counts once."""

    async def main() -> None:
        async with opened(10) as before, served(before) as client:
            first = await ask(client, "POST", "/counters/a", "k1")
        async with opened(20) as after, served(after) as client:
            assert await ask(client, "POST", "/counters/a", "k1") == first
            assert (await ask(client, "GET", "/counters/a"))["value"] == 1

    run(main)


def test_a_call_cancelled_after_its_commit_is_known_by_its_replay() -> None:
    """Whatever was acknowledged, be it by a replay, a GET shows."""

    async def main() -> None:
        async with opened(10) as counter, served(counter) as client:
            calling = asyncio.create_task(ask(client, "POST", "/counters/a", "k1"))
            inner = asyncio.create_task(counter._post("a", "k1"))
            await asyncio.sleep(0)
            inner.cancel()
            await asyncio.gather(calling, inner, return_exceptions=True)
            counter._values.clear()  # as if the answer had never come back from the file
            assert (await ask(client, "POST", "/counters/a", "k1"))["value"] == 1
            assert (await ask(client, "GET", "/counters/a"))["value"] == 1

    run(main)


def test_answers_are_kept_within_bounds(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest ANSWERS_KEPT of each shard, and at most PRUNE_EVERY more."""
    monkeypatch.setattr(demo, "ANSWERS_KEPT", 5)
    monkeypatch.setattr(demo, "PRUNE_EVERY", 2)

    async def main() -> None:
        async with opened(10) as counter, opened(10, shard=4) as other:
            await other._post("a", "theirs")
            for number in range(20):
                await counter._post("a", f"k{number}")
            replayed = await counter._post("a", "k19")
            forgotten = await counter._post("a", "k0")
        assert "Idempotency-Replayed" in replayed.headers
        assert "Idempotency-Replayed" not in forgotten.headers

    run(main)
    with contextlib.closing(sqlite3.connect(file)) as db:
        kept = dict(db.execute("SELECT shard, count(*) FROM answers GROUP BY shard").fetchall())
    assert kept[4] == 1
    assert 5 <= kept[SHARD] <= 7


# --- leaders ------------------------------------------------------------------------------------------------------


def test_an_old_leader_adds_nothing_any_more() -> None:
    """Once the next one is open its POST raises Fenced; what it had acknowledged, the next one has loaded."""

    async def main() -> None:
        async with opened(10) as old:
            await old._post("a", "")
            async with opened(20) as new:
                with pytest.raises(Fenced):
                    await old._post("a", "")
                with pytest.raises(EpochRegressed):
                    await old.open()
                added = await new._post("a", "")
        assert isinstance(added.body, bytes)
        assert b'"value":2' in added.body

    run(main)


def test_what_is_acknowledged_is_stored(file: Path) -> None:
    """1,000 POSTs over 50 counters on three shards, each of which changes its leader in between; those that are
    fenced are sent again, with their key."""

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            make = [await stack.enter_async_context(Counter()) for _ in range(2)]
            leaders = {shard: make[0](lead_of(shard, 10)) for shard in range(3)}
            for leader in leaders.values():
                await leader.open()

            async def post(number: int) -> None:
                name = f"c{number % 50}"
                while True:
                    try:
                        await leaders[number % 50 % 3]._post(name, f"k{number}")
                    except Fenced:
                        await asyncio.sleep(0)
                    else:
                        return

            async def change(shard: int) -> None:
                after = make[1](lead_of(shard, 20))
                await after.open()
                leaders[shard] = after

            await asyncio.gather(*map(post, range(500)), *map(change, range(3)), *map(post, range(500, 1_000)))

    run(main)
    with contextlib.closing(sqlite3.connect(file)) as db:
        values = db.execute("SELECT value FROM counters").fetchall()
    assert values == [(20,)] * 50


def test_a_broken_connection_leaves_the_counter_exact(file: Path) -> None:
    """Clients that give up at any moment: whatever the counter shows is what the file holds."""

    async def main() -> None:
        async with opened(10) as counter, served(counter) as client:
            for pause_s in (0, 0.0005, 0.001, 0.002, 0.004):
                with contextlib.suppress(TimeoutError, aiohttp.ClientError):
                    async with asyncio.timeout(pause_s):
                        await ask(client, "POST", "/counters/a")
            shown = await ask(client, "POST", "/counters/a")
            await counter.close()
            await counter.open()
            assert (await ask(client, "GET", "/counters/a"))["value"] == shown["value"]

    run(main)
