"""Every known way in which a watch misleads, and the mirror that is right in spite of it.

Where a real etcd does it, a real etcd does it here; where it cannot be made to, a scripted gateway does.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from shardlead.clock import SystemClock
from shardlead.config import StoreSettings
from shardlead.errors import StoreUnavailable, WatchCanceled, WatchSilent
from shardlead.store import gateway
from shardlead.store.base import (
    Committed,
    Delete,
    Event,
    KeyValue,
    Put,
    Range,
    Store,
    Txn,
    WatchBatch,
    absent,
    prefix_end,
)
from shardlead.store.etcd import EtcdStore
from shardlead.store.mirror import Change, Mirror
from shardlead.store.transport import Answer, Channel, HttpTransport, Stream, TransportError
from shardlead.store.watchstream import LineSplitter
from tests.store.fake_gateway import FakeGateway, Reply, Request, Script, header
from tests.support.etcd import KINDS, EtcdCluster, etcd_server

PREFIX = b"/trap/"
END = prefix_end(PREFIX)


def _settings(url: str, **fields: Any) -> StoreSettings:
    return StoreSettings(**{"endpoints": (url,), "try_timeout_s": 2.0, "call_timeout_s": 10.0, **fields})


def _store(url: str, **fields: Any) -> EtcdStore:
    return EtcdStore(_settings(url, **fields), clock=SystemClock(), rng=random.Random(1))


# --- scripted: what a stream can do ------------------------------------------------------------------------------

CREATED = {"result": {"header": header(5), "created": True}}


def _message(revision: int, *events: dict[str, Any], ahead: int = 0, **fields: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {"header": header(revision + ahead), **fields}
    if events:
        raw["events"] = list(events)
    return {"result": raw}


def _put_event(key: bytes, revision: int) -> dict[str, Any]:
    number = str(revision)
    return {"kv": {"key": gateway.b64(key), "create_revision": number, "mod_revision": number, "version": "1"}}


def _put_batch(key: bytes, revision: int, header_revision: int) -> WatchBatch:
    event_kv = KeyValue(key, b"", revision, revision, 1)
    return WatchBatch(header_revision, (Event(is_delete=False, kv=event_kv),))


def _streams(*lines: object, then: str) -> Script:
    """Send these lines, then "end" the answer, "cut" the connection, or "hold" it open in silence."""

    async def script(_request: Request, reply: Reply) -> None:
        await reply.start()
        for line in lines:
            await reply.line(line)
        match then:
            case "end":
                await reply.end()
            case "cut":
                reply.abort()
            case _:
                await reply.until_closed()

    return script


async def _watch_all(script: Script, *, version: str = "3.5.28", silence_s: float = 5.0) -> list[WatchBatch]:
    """Everything a watch brings before it raises."""
    batches: list[WatchBatch] = []
    async with FakeGateway(version) as server, _store(server.url, watch_silence_s=silence_s) as store:
        server.on(gateway.WATCH, script)
        async with asyncio.timeout(10), store.watch(PREFIX, END, 5) as stream:
            try:
                async for batch in stream:
                    batches.append(batch)  # noqa: PERF401 - what came before the error is wanted too
            except Exception as exc:
                exc.args = (*exc.args, batches)
                raise
    raise AssertionError("a watch ended without an error")


@pytest.mark.parametrize("then", ["end", "cut"])
def test_no_end_of_a_stream_is_a_good_one(then: str) -> None:
    """A clean one neither: clients that look for exceptions alone go deaf there."""
    with pytest.raises(StoreUnavailable) as caught:
        asyncio.run(_watch_all(_streams(CREATED, _message(6, _put_event(b"a", 6)), then=then)))
    assert caught.value.args[-1] == [_put_batch(b"a", 6, 6)]


@pytest.mark.parametrize("compact_revision", [0, 9])
def test_a_cancel_is_heard_though_the_connection_stays_open(compact_revision: int) -> None:
    """The gateway then says nothing for ever; nine lines in ten of client code wait for it."""
    canceled: dict[str, Any] = {"canceled": True, "cancel_reason": "because"}
    if compact_revision:
        canceled["compact_revision"] = str(compact_revision)
    with pytest.raises(WatchCanceled, match="because") as caught:
        asyncio.run(_watch_all(_streams(CREATED, _message(9, **canceled), then="hold")))
    assert caught.value.compact_revision == compact_revision


def test_silence_ends_a_watch() -> None:
    """As its own kind of error, since a quiet range does that too."""
    with pytest.raises(WatchSilent):
        asyncio.run(_watch_all(_streams(CREATED, then="hold"), silence_s=0.1))


def test_an_error_is_a_last_line_without_a_newline() -> None:
    """And what came before it is delivered first."""

    async def script(_request: Request, reply: Reply) -> None:
        await reply.start()
        await reply.line(CREATED)
        await reply.line(_message(6, _put_event(b"a", 6)))
        await reply.chunk(b'{"error":{"grpc_code":14,"http_code":503,"message":"etcdserver: no leader"}}')
        await reply.end()

    with pytest.raises(StoreUnavailable, match="no leader") as caught:
        asyncio.run(_watch_all(script))
    assert len(caught.value.args[-1]) == 1


def test_chunks_are_not_lines() -> None:
    """A newline in a chunk of its own, half a line, two lines at once."""
    first, second = orjson.dumps(_message(6, _put_event(b"a", 6))), orjson.dumps(_message(7, _put_event(b"b", 7)))
    pieces = [orjson.dumps(CREATED), b"\n", first[:20], first[20:] + b"\n" + second, b"\n"]

    async def script(_request: Request, reply: Reply) -> None:
        await reply.start()
        for piece in pieces:
            await reply.chunk(piece)
        await reply.end()

    with pytest.raises(StoreUnavailable) as caught:
        asyncio.run(_watch_all(script))
    assert caught.value.args[-1] == [_put_batch(b"a", 6, 6), _put_batch(b"b", 7, 7)]


@pytest.mark.parametrize(("version", "expected"), [("3.5.28", 1), ("3.4.25", 1), ("3.5.1", 0), ("3.4.23", 0)])
def test_progress_counts_only_where_it_tells_the_truth(version: str, expected: int) -> None:
    """Before 3.4.25 and 3.5.8 it overtakes events (#15220)."""
    with pytest.raises(StoreUnavailable) as caught:
        asyncio.run(_watch_all(_streams(CREATED, _message(40), then="end"), version=version))
    assert caught.value.args[-1] == [WatchBatch(40, ())] * expected


@pytest.mark.parametrize("line", [b"no JSON", b'{"result":{"events":[{"type":"RENAME"}]}}', b'{"result":5}'])
def test_a_message_that_cannot_be_read_means_reading_all_again(line: bytes) -> None:
    """Resuming would only bring it once more."""

    async def script(_request: Request, reply: Reply) -> None:
        await reply.start()
        await reply.line(CREATED)
        await reply.chunk(line + b"\n")
        await reply.until_closed()

    with pytest.raises(WatchCanceled, match="unreadable"):
        asyncio.run(_watch_all(script))


def test_a_watch_is_entered_when_it_stands_and_hangs_up_when_left() -> None:
    """Not before `created`, with the header that makes a member without a leader end it; and at once."""

    async def main() -> None:
        may_create, entered = asyncio.Event(), asyncio.Event()

        async def script(_request: Request, reply: Reply) -> None:
            await reply.start()
            await may_create.wait()
            await reply.line(CREATED)
            await reply.until_closed()

        async with FakeGateway() as server, _store(server.url) as store, asyncio.timeout(10):
            server.on(gateway.WATCH, script)

            async def enter() -> None:
                async with store.watch(PREFIX, END, 5):
                    entered.set()

            task = asyncio.create_task(enter())
            await server.has_been_asked(gateway.WATCH, 1)
            assert not entered.is_set()
            assert server.asked(gateway.WATCH)[0].headers["grpc-metadata-hasleader"] == "true"
            may_create.set()
            await task
            await server.closed_by_client.wait()

    asyncio.run(main())


@pytest.mark.parametrize(
    "script",
    [
        _streams(then="hold"),
        _streams({"error": {"grpc_code": 14, "message": "etcdserver: no leader"}}, then="end"),
        _streams(then="cut"),
    ],
    ids=["silent", "no leader", "cut"],
)
def test_a_watch_that_does_not_come_to_stand_is_opened_elsewhere(script: Script) -> None:
    """Within the try's time-out."""

    async def main() -> None:
        async with FakeGateway() as bad, FakeGateway() as good:
            bad.on(gateway.WATCH, script)
            good.on(gateway.WATCH, _streams(CREATED, _message(6, _put_event(b"a", 6)), then="hold"))
            settings = StoreSettings(endpoints=(bad.url, good.url), try_timeout_s=0.3)
            async with EtcdStore(settings, clock=SystemClock(), rng=random.Random(1)) as store, asyncio.timeout(10):
                store._cursors[Channel.WATCH].at = 0
                async with store.watch(PREFIX, END, 5) as stream:
                    assert await anext(stream) == _put_batch(b"a", 6, 6)
                assert len(bad.asked(gateway.WATCH)) == 1

    asyncio.run(main())


def test_a_token_that_was_forgotten_is_replaced_for_a_watch() -> None:
    """The member says only that the watch is canceled."""

    async def main() -> None:
        async def watch(request: Request, reply: Reply) -> None:
            if request.headers["authorization"] == "t2":
                await _streams(CREATED, then="hold")(request, reply)
            else:
                denied = _message(5, created=True, canceled=True, cancel_reason="permission denied")
                await _streams(denied, then="hold")(request, reply)

        tokens = iter(("t1", "t2", "t3"))

        async def authenticate(_request: Request, reply: Reply) -> None:
            await reply.json({"header": header(1), "token": next(tokens)})

        async with FakeGateway() as server, _store(server.url, username="u") as store, asyncio.timeout(10):
            server.on(gateway.WATCH, watch)
            server.on(gateway.AUTHENTICATE, authenticate)
            async with store.watch(PREFIX, END, 5):
                pass
            assert len(server.asked(gateway.AUTHENTICATE)) == 2
            server.on(gateway.WATCH, _streams(_message(5, canceled=True, cancel_reason="no"), then="hold"))
            with pytest.raises(WatchCanceled):
                async with store.watch(PREFIX, END, 5):
                    pytest.fail("a watch that was refused twice")

    asyncio.run(main())


# --- real: a mirror over a connection that a test can cut --------------------------------------------------------


class CutTransport:
    """HTTP as ever, but streams may be held off, and cut after so many lines."""

    def __init__(self, settings: StoreSettings) -> None:
        self._http = HttpTransport(settings)
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.lines_max: int | None = None
        self.bodies: list[dict[str, Any]] = []  # of the watches asked for
        self.batches: list[gateway.WatchMessage] = []  # what the streams brought, before any cut
        self._streams: list[_CutStream] = []

    async def post(
        self, channel: Channel, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Answer:
        return await self._http.post(channel, endpoint, path, body, headers, timeout_s)

    async def stream(
        self, endpoint: str, path: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Stream:
        await self.is_open.wait()
        self.bodies.append(orjson.loads(body)["create_request"])
        inner = await self._http.stream(endpoint, path, body, headers, timeout_s)
        stream = _CutStream(inner, self, self.lines_max)
        self.lines_max = None
        self._streams.append(stream)
        return stream

    async def close(self) -> None:
        await self._http.close()

    def cut(self) -> None:
        """Break the streams that stand and hold off new ones until `is_open` is set."""
        self.is_open.clear()
        for stream in self._streams:
            stream.close()
        self._streams.clear()


class _CutStream:
    def __init__(self, inner: Stream, owner: CutTransport, lines_max: int | None) -> None:
        self._inner = inner
        self._owner = owner
        self._lines_max = lines_max
        self._splitter = LineSplitter()
        self._pending: list[bytes] = []

    @property
    def status(self) -> int:
        return self._inner.status

    async def read(self) -> bytes:
        while not self._pending:
            if self._lines_max == 0:
                raise TransportError("cut by the test", is_sent=True)
            chunk = await self._inner.read()
            if not chunk:
                raise TransportError("cut by the test", is_sent=True)
            self._pending.extend(self._splitter.feed(chunk))
        line = self._pending.pop(0)
        if self._lines_max is not None:
            self._lines_max -= 1
            if self._lines_max == 0:
                self._pending.clear()
        item = gateway.stream_item(line)
        if isinstance(item, dict):
            self._owner.batches.append(gateway.watch_message(item))
        return line + b"\n"

    def close(self) -> None:
        self._inner.close()


class Followed:
    """A mirror of the prefix that keeps every change, with its store and the transport below it."""

    def __init__(self, store: Store, transport: CutTransport) -> None:
        self.store = store
        self.transport = transport
        self.changes: list[Change] = []
        self.kvs: dict[bytes, KeyValue] = {}
        self._news = asyncio.Event()
        self.mirror = Mirror(
            store, PREFIX, END, self._on_change, name="trap", clock=SystemClock(), rng=random.Random(1)
        )

    def _on_change(self, change: Change) -> None:
        for kv in change.deletes:
            assert self.kvs.pop(kv.key) == kv
        self.kvs.update((kv.key, kv) for kv in change.puts)
        self.changes.append(change)
        self._news.set()

    async def is_at(self, revision: int) -> None:
        """Return once the mirror has applied that revision."""
        while self.mirror.revision < revision:
            self._news.clear()
            await self._news.wait()

    async def is_exact(self) -> None:
        """The picture, the sum of the changes and the store's range are the same."""
        standing = await self.store.read(Range(PREFIX, END))
        assert dict(self.mirror.kvs) == self.kvs == {kv.key: kv for kv in standing.kvs}


@asynccontextmanager
async def _followed(url: str) -> AsyncIterator[Followed]:
    settings = _settings(url)
    transport = CutTransport(settings)
    async with (
        asyncio.timeout(60),
        EtcdStore(settings, clock=SystemClock(), rng=random.Random(1), transport=transport) as store,
    ):
        await _write(store, Delete(PREFIX, END), Put(b"/unrelated", b""))
        followed = Followed(store, transport)
        task = asyncio.create_task(followed.mirror.run())
        await followed.mirror.wait_loaded(10)
        yield followed
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _write(store: Store, *ops: Put | Delete) -> int:
    """Apply these and return the revision. Each test has the prefix for itself, so no guard is needed."""
    outcome = await store.commit(Txn((absent(b"/never"),), ops))
    assert isinstance(outcome, Committed)
    return outcome.revision


@pytest.fixture(params=KINDS, scope="module")
def etcd(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    with etcd_server(request.param) as cluster:
        yield cluster


PUTS = 2_600
WRITERS = 26


@pytest.mark.etcd
def test_catching_up_skips_nothing(etcd: EtcdCluster) -> None:
    """2,600 puts behind, the stream cut after the first batch, whose header already says the present: whoever resumes
    from the header skips what lies between."""

    async def main() -> None:
        async with _followed(etcd.url) as followed:
            begun = await _write(followed.store, Put(PREFIX + b"begin", b""))
            await followed.is_at(begun)
            followed.transport.cut()

            async def writer(number: int) -> None:
                for count in range(PUTS // WRITERS):
                    await _write(followed.store, Put(PREFIX + b"%d" % (number + count % 50), b"%d" % count))

            await asyncio.gather(*(writer(number) for number in range(WRITERS)))
            present = (await followed.store.read(Range(PREFIX))).revision
            followed.transport.batches.clear()
            followed.transport.lines_max = 2  # `created`, and one batch
            followed.transport.is_open.set()
            await followed.is_at(present)
            first = followed.transport.batches[1]
            last_event = first.batch.events[-1].kv.mod_revision
            assert first.header.revision > last_event, "the trap has not sprung: the header is not ahead"
            assert followed.transport.bodies[-1]["start_revision"] == str(last_event)
            assert not any(change.is_load for change in followed.changes[1:])
            await followed.is_exact()

    asyncio.run(main())


@pytest.mark.etcd
def test_a_compaction_while_disconnected_loses_nothing(etcd: EtcdCluster) -> None:
    """The events are gone; the difference is told all the same, removals included."""

    async def main() -> None:
        async with _followed(etcd.url) as followed:
            await followed.is_at(await _write(followed.store, Put(PREFIX + b"dies", b""), Put(PREFIX + b"stays", b"")))
            followed.transport.cut()
            await _write(followed.store, Delete(PREFIX + b"dies"))
            revision = await _write(followed.store, Put(PREFIX + b"new", b""))
            await asyncio.to_thread(etcd.call, "/v3/kv/compaction", {"revision": str(revision), "physical": True})
            followed.transport.is_open.set()
            await followed.is_at(revision)
            change = followed.changes[-1]
            assert change.is_load
            assert [kv.key for kv in change.deletes] == [PREFIX + b"dies"]
            assert [kv.key for kv in change.puts] == [PREFIX + b"new"]
            await followed.is_exact()

    asyncio.run(main())


@pytest.mark.etcd
def test_a_deletion_while_disconnected_is_told(etcd: EtcdCluster) -> None:
    """By the resumed watch: the mirror reads nothing again, and drops what died."""

    async def main() -> None:
        async with _followed(etcd.url) as followed:
            await followed.is_at(await _write(followed.store, Put(PREFIX + b"dies", b"")))
            followed.transport.cut()
            revision = await _write(followed.store, Delete(PREFIX + b"dies"))
            followed.transport.is_open.set()
            await followed.is_at(revision)
            change = followed.changes[-1]
            assert not change.is_load
            assert [kv.key for kv in change.deletes] == [PREFIX + b"dies"]
            await followed.is_exact()

    asyncio.run(main())


@pytest.mark.etcd
def test_a_lease_s_end_is_one_change(etcd: EtcdCluster) -> None:
    """All its keys go in one revision, one message, one change."""

    async def main() -> None:
        async with _followed(etcd.url) as followed:
            lease = (await followed.store.grant(60)).lease
            keys = [PREFIX + b"%03d" % number for number in range(120)]
            written = await _write(followed.store, *(Put(key, b"", lease) for key in keys))
            await followed.is_at(written)
            await followed.store.revoke(lease)
            await followed.is_at(written + 1)
            assert [kv.key for kv in followed.changes[-1].deletes] == keys
            await followed.is_exact()

    asyncio.run(main())


@pytest.mark.etcd
def test_a_restarted_store_is_followed_again(etcd: EtcdCluster) -> None:
    """Killed and started with its data: the mirror goes on where it was."""

    async def main() -> None:
        async with _followed(etcd.url) as followed:
            await followed.is_at(await _write(followed.store, Put(PREFIX + b"before", b"")))
            await asyncio.to_thread(etcd.kill)
            await asyncio.to_thread(etcd.start)
            await followed.is_at(await _write(followed.store, Put(PREFIX + b"after", b"")))
            await followed.is_exact()

    asyncio.run(main())


OPERATIONS = 240


@pytest.mark.etcd
@pytest.mark.parametrize("seed", range(3))
def test_a_mirror_is_right_at_every_revision(etcd: EtcdCluster, seed: int) -> None:
    """Whatever is written and however often the watch breaks meanwhile: what it shows at a revision is the range at
    that revision, a compaction in between included."""

    async def main() -> None:
        dice = random.Random(seed)
        async with _followed(etcd.url) as followed:
            store, transport = followed.store, followed.transport
            shown: dict[int, dict[bytes, KeyValue]] = {}
            take = followed.mirror._on_change

            def note(change: Change) -> None:
                take(change)
                shown[change.revision] = dict(followed.kvs)

            followed.mirror._on_change = note
            compacted = revision = 0
            for number in range(OPERATIONS):
                keys = [PREFIX + b"%d" % at for at in dice.sample(range(12), dice.randint(1, 3))]
                revision = await _write(
                    store, *(Put(key, b"%d" % number) if dice.random() < 0.7 else Delete(key) for key in keys)
                )
                match dice.randrange(24):
                    case 0 | 1:
                        transport.cut()
                    case 2 | 3:
                        transport.is_open.set()
                    case 4:
                        transport.lines_max = dice.randint(1, 4)  # of the next stream
                    case 5:
                        followed.mirror.distrust("a throw of the dice")
                    case 6 if number > OPERATIONS / 2 and not compacted:
                        compacted = revision - 5
                        await asyncio.to_thread(etcd.call, "/v3/kv/compaction", {"revision": str(compacted)})
                    case _:
                        pass
            transport.is_open.set()
            revision = await _write(store, Put(PREFIX + b"end", b""))
            await followed.is_at(revision)
            await followed.is_exact()
            checked = [at for at in shown if at > compacted]
            for at in checked:
                standing = await store.read(Range(PREFIX, END, revision=at))
                assert shown[at] == {kv.key: kv for kv in standing.kvs}
            assert checked

    asyncio.run(main())


@pytest.mark.etcd
def test_a_member_without_a_leader_ends_its_watches() -> None:
    """Of three members two freeze: the third ends the watch by itself (that is what the header is for), long before
    the silence would."""

    async def main(cluster: EtcdCluster) -> None:
        alone = cluster.members[0]
        settings = StoreSettings(endpoints=(alone.url,), watch_silence_s=60.0)
        async with (
            asyncio.timeout(20),
            EtcdStore(settings, clock=SystemClock(), rng=random.Random(1)) as store,
            store.watch(PREFIX, END, 1) as stream,
        ):
            for member in cluster.members[1:]:
                member.freeze()
            try:
                with pytest.raises(StoreUnavailable, match="no leader"):
                    async for _batch in stream:
                        pass
            finally:
                for member in cluster.members[1:]:
                    member.thaw()

    with etcd_server("3.5", members=3) as cluster:
        asyncio.run(main(cluster))
