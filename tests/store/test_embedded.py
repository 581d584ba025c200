"""The embedded server: etcd's spelling byte for byte, revisions that never go back, bounds, and a clean end."""

import asyncio
import base64
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from shardlead.clock import NS_PER_S, SystemClock
from shardlead.errors import CommandError
from shardlead.store import embedded
from shardlead.store.base import Put
from shardlead.store.embedded import EmbeddedStore, LeaseTime, serve
from shardlead.store.mark import RevisionMark
from shardlead.store.model import Model
from tests.store import recording
from tests.support.embedded import embedded_process, embedded_server

Json = dict[str, Any]
S = NS_PER_S


class HandClock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.ns = 1_000 * S

    def now_ns(self) -> int:
        return self.ns

    def wall_s(self) -> float:
        return self.ns / S


def new_store(*, mark: RevisionMark | None = None, clock: HandClock | None = None, **more: float) -> EmbeddedStore:
    rng = random.Random(1)
    model = Model(rng=rng, revision=mark.reserved if mark else 1)
    return EmbeddedStore(model, clock=clock or SystemClock(), rng=rng, mark=mark, **more)


def b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def ask(store: EmbeddedStore, path: str, **fields: Any) -> tuple[int, Json]:
    status, body = store.answer(path, orjson.dumps(fields))
    answer = orjson.loads(body)
    assert isinstance(answer, dict)
    return status, answer


@contextlib.asynccontextmanager
async def served(store: EmbeddedStore) -> AsyncIterator[str]:
    """A store on a free port, without the ticking of `serve`."""
    runner = web.AppRunner(store.application(), handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        store.stop_watches()
        await runner.cleanup()


@pytest.fixture(name="recorded", scope="module")
def _recorded() -> Json:
    record = orjson.loads(recording.FILE.read_bytes())
    assert isinstance(record, dict)
    return record


# --- spelling ----------------------------------------------------------------------------------------------------


def test_answers_are_spelled_as_etcd_spells_them(recorded: Json) -> None:
    """Byte for byte but for who answered, errors and HTTP statuses too."""
    actual = recording.answers(new_store().answer)
    for (path, asked), expected, answer in zip(recording.REQUESTS, recorded["answers"], actual, strict=True):
        assert expected == answer, f"{path} {asked}"


def test_watches_are_spelled_as_etcd_spells_them(recorded: Json) -> None:
    """Line for line, over a socket: created, events, a lost past, an empty range, a progress request."""
    with embedded_server() as url:
        assert recorded["answers"] == recording.answers(recording.over_http(url))
        assert recorded["watches"] == recording.watch_lines(url)


@pytest.mark.etcd
def test_the_record_is_still_true(recorded: Json) -> None:
    """A real etcd 3.5.1 answers what the record says."""
    assert recorded == recording.record()


def test_both_spellings_of_a_field_are_understood() -> None:
    """Protobuf's and JSON's names, numbers as text or not, names of an enum or their numbers."""
    store = new_store()
    ask(store, "/v3/kv/put", key=b64("a"))
    guard = {"key": b64("a"), "target": 2, "result": 0, "modRevision": 2}
    read = {"requestRange": {"key": b64("a"), "rangeEnd": b64("b"), "countOnly": True}}
    status, answer = ask(store, "/v3/kv/txn", compare=[guard], success=[read])
    assert (status, answer["succeeded"]) == (200, True)
    assert answer["responses"][0]["response_range"]["count"] == "1"


@pytest.mark.parametrize(
    "body",
    [
        b"{nope",
        b"[]",
        b'"text"',
        b'{"key": 5}',
        b'{"key": "***"}',
        b'{"key": "YQ"}',
        b'{"key": "YQ==", "limit": "x"}',
        b'{"key": "YQ==", "limit": 1.5}',
        b'{"key": "YQ==", "limit": true}',
        b'{"key": "YQ==", "limit": "9223372036854775808"}',
        b'{"key": "YQ==", "keys_only": "true"}',
        b"\xff\xfe",
    ],
)
def test_nonsense_is_a_bad_request(body: bytes) -> None:
    """400 with code 3 and a message, never a 500."""
    status, answer = new_store().answer("/v3/kv/range", body)
    refusal = orjson.loads(answer)
    assert (status, refusal["code"]) == (400, 3)
    assert refusal["message"] == refusal["error"]


def test_deep_nesting_is_refused() -> None:
    """However deep it goes: no recursion without an end."""
    body = '{"success":[{"request_txn":' * 200 + "{}" + "}]}" * 200
    status, answer = new_store().answer("/v3/kv/txn", body.encode())
    assert (status, orjson.loads(answer)["code"]) == (400, 3)
    json.loads(body)  # it is good JSON


@pytest.mark.parametrize("option", ["prev_kv", "ignore_value", "ignore_lease"])
def test_what_it_does_not_have_is_refused_and_not_ignored(option: str) -> None:
    """Code 12; switched off it is no offence."""
    store = new_store()
    assert ask(store, "/v3/kv/put", key=b64("a"), **{option: False})[0] == 200
    status, answer = ask(store, "/v3/kv/put", key=b64("a"), **{option: True})
    assert (status, answer["code"]) == (501, 12)


# --- time --------------------------------------------------------------------------------------------------------


def test_lease_time_stands_still_while_the_server_does() -> None:
    """Time passes as the clock does, but a stretch in which nobody could be heard counts nothing."""
    clock = HandClock()
    leases = LeaseTime(clock)
    before = leases.now_ns()
    clock.ns += S // 10
    assert leases.now_ns() == before + S // 10
    clock.ns += 3_600 * S
    assert leases.now_ns() == before + S // 10
    clock.ns += S // 10
    assert leases.now_ns() == before + S // 5


def test_after_a_stall_a_renewal_still_finds_its_lease() -> None:
    """Whichever is handled first, the renewal that waited in a socket or the tick that ends leases."""
    clock = HandClock()
    store = new_store(clock=clock)
    lease = int(ask(store, "/v3/lease/grant", TTL=2)[1]["ID"])
    clock.ns += 10 * S

    async def tick_once() -> None:
        ticking = asyncio.create_task(store.tick())
        await asyncio.sleep(0)
        ticking.cancel()

    asyncio.run(tick_once())
    status, answer = ask(store, "/v3/lease/keepalive", ID=lease)
    assert (status, answer["result"]["TTL"]) == (200, "2")


@pytest.mark.e2e
def test_a_frozen_server_ends_no_lease_whose_renewal_is_waiting() -> None:
    """SIGSTOP for longer than the TTL, a renewal sent meanwhile, SIGCONT: the lease and its key live on. Without
    renewals they end after what they had left."""
    with embedded_process() as process:
        renew = recording.over_http(process.url)

        async def story() -> None:
            async with aiohttp.ClientSession(process.url, timeout=aiohttp.ClientTimeout(10)) as http:

                async def post(path: str, **fields: Any) -> Json:
                    async with http.post(path, json=fields) as response:
                        answer = orjson.loads(await response.read())
                        assert isinstance(answer, dict)
                        return answer

                lease = (await post("/v3/lease/grant", TTL=2))["ID"]
                await post("/v3/kv/put", key=b64("k"), lease=lease)
                process.freeze()
                try:
                    waiting = asyncio.to_thread(renew, "/v3/lease/keepalive", orjson.dumps({"ID": lease}))
                    renewal = asyncio.create_task(waiting)
                    await asyncio.sleep(2.5)  # time itself is what is tested
                finally:
                    thawed_s = time.monotonic()
                    process.thaw()
                assert b'"TTL":"2"' in (await renewal)[1]
                create = {"key": b64("k"), "start_revision": "3"}
                async with http.post("/v3/watch", json={"create_request": create}) as watch:
                    await watch.content.readline()
                    assert b'"DELETE"' in await watch.content.readline()
                assert 2.0 <= time.monotonic() - thawed_s < 6

        asyncio.run(story())


# --- revisions over restarts -------------------------------------------------------------------------------------


def test_two_starts_with_the_same_data_never_go_back(tmp_path: Path) -> None:
    """Nor does a start after SIGKILL; keys and leases are not kept, and the cluster has another id."""
    revisions: list[int] = []
    clusters: set[str] = set()

    def write(url: str) -> None:
        call = recording.over_http(url)
        assert b'"kvs"' not in call("/v3/kv/range", orjson.dumps({"key": b64("k")}))[1]
        for _ in range(3):
            header = orjson.loads(call("/v3/kv/put", orjson.dumps({"key": b64("k")}))[1])["header"]
            revisions.append(int(header["revision"]))
            clusters.add(header["cluster_id"])

    with embedded_server(tmp_path) as url:
        write(url)
    with embedded_process(tmp_path) as process:
        write(process.url)
        process.kill()
    with embedded_process(tmp_path) as process:
        write(process.url)
    assert revisions == sorted(set(revisions))
    assert len(clusters) == 3


def test_revisions_are_reserved_before_they_are_used(tmp_path: Path) -> None:
    """The file is ahead of every revision that was ever answered."""
    mark = RevisionMark(tmp_path)
    with contextlib.closing(mark):
        store = new_store(mark=mark)
        for _ in range(3):
            store.model.revision = mark.reserved - 2  # as if so many had been used; only the number matters here
            _, answer = ask(store, "/v3/kv/put", key=b64("k"))
            assert int((tmp_path / "revision").read_text()) > int(answer["header"]["revision"])


def test_without_a_reservation_nothing_is_written(tmp_path: Path) -> None:
    """A disk that refuses the mark makes writes unavailable (code 14, "not now"), reads go on."""
    mark = RevisionMark(tmp_path)
    with contextlib.closing(mark):
        store = new_store(mark=mark)
        (tmp_path / "revision.new").mkdir()
        status, answer = ask(store, "/v3/kv/put", key=b64("k"))
        assert (status, answer["code"]) == (503, 14)
        assert ask(store, "/v3/kv/range", key=b64("k"))[0] == 200
        assert store.model.revision == 1
        (tmp_path / "revision.new").rmdir()
        assert ask(store, "/v3/kv/put", key=b64("k"))[0] == 200


def test_a_damaged_mark_stops_the_start(tmp_path: Path) -> None:
    """Guessing could hand out an epoch twice. The error names the file, and the directory is free again after it."""
    mark = tmp_path / "revision"
    for text in ("", "12x", "-5"):
        mark.write_text(text)
        with pytest.raises(CommandError, match="revision"):
            RevisionMark(tmp_path)
    mark.write_text("77\n")
    with contextlib.closing(RevisionMark(tmp_path)) as good:
        assert good.reserved == 77


def test_one_directory_serves_one_store(tmp_path: Path) -> None:
    """A second one is refused while the first lives."""
    with embedded_server(tmp_path), pytest.raises(CommandError, match="another embedded store"):
        RevisionMark(tmp_path)
    RevisionMark(tmp_path).close()


def test_a_directory_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    """A file in its place."""
    place = tmp_path / "data"
    place.write_text("")
    with pytest.raises(CommandError, match="data"):
        RevisionMark(place)


def test_a_taken_port_is_named() -> None:
    """With a clear error."""
    with embedded_server() as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(CommandError, match=str(port)):
            asyncio.run(serve("127.0.0.1", port, data=None, on_ready=lambda _: None))


# --- bounds ------------------------------------------------------------------------------------------------------


def test_leases_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused with code 8."""
    monkeypatch.setattr(embedded, "LEASES_MAX", 3)
    store = new_store()
    answers = [ask(store, "/v3/lease/grant", TTL=60)[1].get("code") for _ in range(4)]
    assert answers == [None, None, None, 8]


def test_space_is_bounded_and_deleting_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The past goes first; then puts are refused as etcd does it, until something is deleted."""
    monkeypatch.setattr(embedded, "SPACE_BYTES_MAX", 10_000)
    store = new_store()
    value = b64("x" * 4_000)
    for _ in range(20):
        assert ask(store, "/v3/kv/put", key=b64("a"), value=value)[0] == 200
    for key in ("b", "c"):
        assert ask(store, "/v3/kv/put", key=b64(key), value=value)[0] == 200
    status, answer = ask(store, "/v3/kv/put", key=b64("d"), value=value)
    assert (status, answer["code"]) == (429, 8)
    assert ask(store, "/v3/kv/deleterange", key=b64("a"))[0] == 200
    assert ask(store, "/v3/kv/put", key=b64("d"), value=value)[0] == 200


def test_bodies_are_bounded() -> None:
    """Over the wire's limit and over etcd's own: both are a request that is too large."""

    async def story() -> None:
        async with served(new_store()) as url, aiohttp.ClientSession(url) as http:
            for size in (1_700_000, 5_000_000):
                body = (piece for piece in [orjson.dumps({"key": b64("a"), "value": b64("x" * size)})])

                async def pieces(body: Iterator[bytes] = body) -> AsyncIterator[bytes]:
                    for piece in body:
                        yield piece

                async with http.post("/v3/kv/put", data=pieces()) as response:
                    answer = orjson.loads(await response.read())
                assert (response.status, answer["message"]) == (400, "etcdserver: request is too large")

    asyncio.run(story())


def test_watchers_are_bounded_and_forgotten_when_they_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused with code 8; when one has left there is room again."""
    monkeypatch.setattr(embedded, "WATCHERS_MAX", 2)
    store = new_store()
    create = {"create_request": {"key": b64("a")}}

    async def story() -> None:
        async with served(store) as url, aiohttp.ClientSession(url) as http:
            first, second = [await http.post("/v3/watch", json=create) for _ in range(2)]
            async with http.post("/v3/watch", json=create) as third:
                assert (third.status, orjson.loads(await third.read())["code"]) == (429, 8)
            first.close()
            async with asyncio.timeout(5):
                while store.watchers == 2:  # noqa: ASYNC110  nobody is told that a watcher has left
                    await asyncio.sleep(0.01)
            async with http.post("/v3/watch", json=create) as fourth:
                assert fourth.status == 200
            second.close()

    asyncio.run(story())


def test_a_watcher_that_does_not_read_holds_up_nobody() -> None:
    """Others write and watch on; when it reads at last, everything is there in order."""
    store = new_store()
    value, count = "x" * 100_000, 200

    async def story() -> None:
        async with served(store) as url, aiohttp.ClientSession(url, read_bufsize=2**16) as http:
            create = {"create_request": {"key": b64("a"), "start_revision": "2"}}
            async with http.post("/v3/watch", json=create) as lazy:
                async with asyncio.timeout(30):
                    for _ in range(count):
                        async with http.post("/v3/kv/put", json={"key": b64("a"), "value": b64(value)}) as response:
                            assert response.status == 200
                seen: list[int] = []
                rest = b""
                while len(seen) < count:
                    *lines, rest = (rest + await lazy.content.readany()).split(b"\n")
                    for line in lines:
                        events = orjson.loads(line)["result"].get("events", ())
                        seen += [int(event["kv"]["mod_revision"]) for event in events]
                assert seen == list(range(2, count + 2))

    asyncio.run(story())


# --- streams and the end -----------------------------------------------------------------------------------------


def test_a_quiet_watch_with_progress_notify_tells_how_far_it_is() -> None:
    """And one without it stays silent: the first line that the other gets is the event."""
    store = new_store(progress_interval_s=0.05)

    async def story() -> None:
        async with served(store) as url, aiohttp.ClientSession(url) as http:
            noisy = {"create_request": {"key": b64("a"), "progress_notify": True}}
            silent = {"create_request": {"key": b64("a")}}
            async with http.post("/v3/watch", json=noisy) as one, http.post("/v3/watch", json=silent) as other:
                for watch in (one, other):
                    assert b'"created":true' in await watch.content.readline()
                store.model.put(Put(b"elsewhere", b""))
                progress = orjson.loads(await one.content.readline())["result"]
                assert progress.keys() == {"header"}
                assert progress["header"]["revision"] == "2"
                async with http.post("/v3/kv/put", json={"key": b64("a")}):
                    pass
                assert b'"events"' in await other.content.readline()

    asyncio.run(story())


def test_watches_do_not_hold_up_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open ones, cancelled ones: none keeps the server from ending, and each ends as a stream should."""
    monkeypatch.setattr(embedded, "STOP_TIMEOUT_S", 60.0)  # whoever had to be waited for would show

    async def story() -> None:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(serve("127.0.0.1", 0, data=None, on_ready=ready.set_result))
        async with aiohttp.ClientSession(await ready) as http:
            asked = [raw for raw, _ in recording.WATCHES]
            watches = [await http.post("/v3/watch", json=raw) for raw in asked]
            serving.cancel()
            async with asyncio.timeout(20):
                with pytest.raises(asyncio.CancelledError):
                    await serving
            for watch in watches:
                await watch.read()

    asyncio.run(story())


def test_it_says_that_it_is_not_for_production(caplog: pytest.LogCaptureFixture) -> None:
    """At each start, as a warning."""
    with embedded_server():
        pass
    assert any(each.levelname == "WARNING" and "not for production" in each.message for each in caplog.records)


def test_who_asks_for_health_and_version_is_answered() -> None:
    """As etcd answers probes."""

    async def story() -> None:
        async with served(new_store()) as url, aiohttp.ClientSession(url) as http:
            async with http.get("/health") as response:
                assert orjson.loads(await response.read()) == {"health": "true", "reason": ""}
            async with http.get("/version") as response:
                assert orjson.loads(await response.read())["etcdserver"] == embedded.VERSION
            async with http.get("/v3/kv/range") as response:
                assert response.status == 405
            async with http.post("/v3/nothing") as response:
                assert response.status == 404

    asyncio.run(story())
