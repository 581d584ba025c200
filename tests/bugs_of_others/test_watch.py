"""Rows about watches: what a watch does not say, or says too early, and who notices."""

import asyncio
import gc
import random
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import orjson
import pytest

from shardlead.clock import SystemClock
from shardlead.cluster.session import open_session
from shardlead.config import StoreSettings
from shardlead.core.model import WorkerRecord
from shardlead.store import gateway
from shardlead.store.base import UNGUARDED, Committed, Delete, Put, Range, Txn, prefix_end
from shardlead.store.etcd import EtcdStore
from shardlead.store.mirror import TOMBSTONES_MAX, Change, Mirror
from shardlead.store.transport import Answer, Channel
from tests.cluster.stage import LEASE, Stage, play
from tests.store.fake_gateway import FakeGateway, Reply, Request, header
from tests.support.between import Between, Sent
from tests.support.etcd import KINDS, EtcdCluster, etcd_server

PREFIX: Final = b"/watched/"
END: Final = prefix_end(PREFIX)
BOUND_S: Final = 60.0
SOON_S: Final = 3.0
COMPACTION: Final = "/v3/kv/compaction"


class Followed:
    """A mirror of the prefix that a test may part from its store for a while."""

    def __init__(self, store: EtcdStore) -> None:
        self.store = store
        self.claims: list[tuple[int, dict[bytes, int]]] = []  # each revision that it has shown, with what it showed
        self.loads = 0
        self.mirror = Mirror(store, PREFIX, END, self._apply, name="test", clock=SystemClock(), rng=random.Random(1))
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def _apply(self, change: Change) -> None:
        self.loads += change.is_load
        shown = {key: kv.mod_revision for key, kv in self.mirror.kvs.items()} if len(self.mirror.kvs) < 100 else {}
        self.claims.append((change.revision, shown))
        del self.claims[:-1_000]
        self._news.set()

    async def follow(self) -> None:
        """Begin, or go on."""
        self._task = asyncio.create_task(self.mirror.run())
        await self.mirror.wait_loaded(BOUND_S)

    async def part(self) -> None:
        """The connection is gone, and no other comes before `follow`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def is_at(self, revision: int, within_s: float = SOON_S) -> None:
        async with asyncio.timeout(within_s):
            while self.mirror.revision < revision:
                self._news.clear()
                await self._news.wait()

    async def is_exact(self, within_s: float = SOON_S) -> None:
        """Return once it shows what the store's range says."""
        standing = {kv.key: kv for kv in (await self.store.read(Range(PREFIX, END))).kvs}
        async with asyncio.timeout(within_s):
            while dict(self.mirror.kvs) != standing:
                self._news.clear()
                await self._news.wait()

    async def write(self, *ops: Put | Delete) -> int:
        """UNGUARDED: the test is alone with this store."""
        outcome = await self.store.commit(Txn(UNGUARDED, ops))
        assert isinstance(outcome, Committed)
        return outcome.revision


@asynccontextmanager
async def followed(url: str, **fields: Any) -> AsyncIterator[Followed]:
    own = StoreSettings(endpoints=(url,), **fields)
    async with asyncio.timeout(BOUND_S), EtcdStore(own, clock=SystemClock(), rng=random.Random(1)) as store:
        following = Followed(store)
        try:
            yield following
        finally:
            await following.part()


@pytest.fixture(params=KINDS, scope="module")
def etcd(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    with etcd_server(request.param) as cluster:
        yield cluster


# --- what a scripted gateway says ------------------------------------------------------------------------------------

CREATED: Final = {"result": {"header": header(5), "created": True}}


def put_line(number: int, revision: int) -> dict[str, Any]:
    at = str(revision)
    kv = {"key": gateway.b64(PREFIX + b"%d" % number), "create_revision": at, "mod_revision": at, "version": "1"}
    return {"result": {"header": header(revision), "events": [{"kv": kv}]}}


def start_revisions(server: FakeGateway) -> list[int]:
    """From which revision each watch was asked for."""
    return [int(request.body["create_request"]["start_revision"]) for request in server.asked(gateway.WATCH)]


@pytest.mark.parametrize("version", ["3.4.23", "3.5.1"])
def test_09_progress_that_overtakes_events_is_not_believed(version: str) -> None:
    """etcd before 3.4.25 and 3.5.8 (#15220) says that all up to a revision was told before it tells the events of it.
    Whoever resumes from there skips them. Here such a version's word on progress is passed over: the picture at each
    revision that the mirror claims is the store's at that revision."""

    async def main() -> None:
        async def watch(_request: Request, reply: Reply) -> None:
            await reply.start()
            await reply.line(CREATED)
            if len(server.asked(gateway.WATCH)) == 1:
                await reply.line({"result": {"header": header(40)}})  # and then it breaks
                await reply.end()
            else:
                await reply.line(put_line(1, 39))
                await reply.until_closed()

        async with FakeGateway(version) as server, followed(server.url) as following:
            server.on(gateway.WATCH, watch)
            server.answer(gateway.RANGE, {"header": header(5)})
            await following.follow()
            await following.is_at(39)
            assert start_revisions(server) == [5, 5]
            assert following.claims == [(5, {}), (39, {PREFIX + b"1": 39})]

    asyncio.run(main())


def test_11_a_cancel_without_a_compaction_on_a_connection_that_stays_open_is_heard() -> None:
    """aetcd, python-etcd3 and etcd3gw do not look at `canceled`, or only where something was compacted; the gateway
    leaves the connection open and silent after it, so that their watch is dead and nobody is told. Here it is the end,
    and everything is read again."""

    async def main() -> None:
        async def watch(_request: Request, reply: Reply) -> None:
            await reply.start()
            await reply.line(CREATED)
            if len(server.asked(gateway.WATCH)) == 1:
                await reply.line({"result": {"header": header(6), "canceled": True, "cancel_reason": "because"}})
            else:
                await reply.line(put_line(1, 7))
            await reply.until_closed()

        async def read(_request: Request, reply: Reply) -> None:
            await reply.json({"header": header(4 + len(server.asked(gateway.RANGE)))})

        async with FakeGateway() as server, followed(server.url, watch_silence_s=60.0) as following:
            server.on(gateway.WATCH, watch)
            server.on(gateway.RANGE, read)
            await following.follow()
            await following.is_at(7)
            assert following.loads == 2

    asyncio.run(main())


def test_12_a_stream_that_ends_well_is_not_taken_for_the_end_of_the_news() -> None:
    """aetcd and etcetra look for exceptions alone: a stream that the server closes with OK leaves them waiting for
    ever. Here each such end is followed by another watch, and nothing is missed."""

    async def main() -> None:
        async def watch(request: Request, reply: Reply) -> None:
            revision = int(request.body["create_request"]["start_revision"])
            await reply.start()
            await reply.line(CREATED)
            await reply.line(put_line(revision, revision + 1))
            await reply.end()

        async with FakeGateway() as server, followed(server.url) as following:
            server.on(gateway.WATCH, watch)
            server.answer(gateway.RANGE, {"header": header(5)})
            await following.follow()
            await following.is_at(10)
            assert [revision for revision, _ in following.claims[:6]] == [5, 6, 7, 8, 9, 10]
            assert following.loads == 1

    asyncio.run(main())


MESSAGES: Final = 400
PUTS: Final = 125  # in one message, and as many deletions
MEASURED_FROM: Final = MESSAGES * 2 // 5
GROWTH_BLOCKS_MAX: Final = 20_000
"""Of memory, by 60,000 events more."""


def test_18_a_hundred_thousand_events_leave_nothing_behind() -> None:
    """etcd-client-py keeps every event in a list for ever, and a message without events ends its iteration or is out of
    range. Here a watch over keys that come and go, with progress messages in between, holds no more in the end than
    after its first part."""
    assert 2 * MESSAGES * PUTS == 100_000
    assert MEASURED_FROM * PUTS > TOMBSTONES_MAX

    def churn(number: int) -> bytes:
        """New keys, and the deletion of those of the message before; then a message without any event."""
        revision = 10 + number
        events: list[dict[str, Any]] = []
        for key in range(PUTS):
            new = gateway.b64(PREFIX + b"%d" % (number * PUTS + key))
            old = gateway.b64(PREFIX + b"%d" % ((number - 1) * PUTS + key))
            at = str(revision)
            events.append({"kv": {"key": new, "create_revision": at, "mod_revision": at, "version": "1"}})
            events.append({"type": "DELETE", "kv": {"key": old, "mod_revision": at}})
        lines = ({"result": {"header": header(revision), **more}} for more in ({"events": events}, {}))
        return b"".join(orjson.dumps(line) + b"\n" for line in lines)

    async def main() -> int:
        async def watch(_request: Request, reply: Reply) -> None:
            await reply.start()
            await reply.line(CREATED)
            for number in range(MESSAGES):
                await reply.chunk(churn(number))
            await reply.until_closed()

        async with FakeGateway() as server, followed(server.url) as following:
            server.on(gateway.WATCH, watch)
            server.answer(gateway.RANGE, {"header": header(5)})
            await following.follow()
            await following.is_at(10 + MEASURED_FROM, BOUND_S)
            gc.collect()
            before = sys.getallocatedblocks()
            await following.is_at(9 + MESSAGES, BOUND_S)
            gc.collect()
            grown = sys.getallocatedblocks() - before
            assert len(following.mirror.kvs) == PUTS
            assert len(start_revisions(server)) == 1
            return grown

    assert asyncio.run(main()) < GROWTH_BLOCKS_MAX


# --- what a real etcd does -------------------------------------------------------------------------------------------


@pytest.mark.etcd
@pytest.mark.parametrize("is_followed", [False, True], ids=["after a load", "after an event"])
def test_10_a_deletion_at_the_revision_of_a_compaction_is_noticed(etcd: EtcdCluster, is_followed: bool) -> None:
    """etcd before 3.4.34, 3.4.36, 3.5.16 and 3.5.18 (#18089, #19179) forgets a deletion when it compacts at just its
    revision, and opens a watch from there without a word: the key lives on with whoever resumed there. Here a watch
    begins at the revision that is known already, and then every etcd says that it was compacted."""

    async def main() -> None:
        async with followed(etcd.url) as following:
            await following.write(Put(PREFIX + b"leader", b"w1"))
            await following.follow()
            if is_followed:
                await following.is_at(await following.write(Put(PREFIX + b"another", b"")))
            await following.is_exact()
            await following.part()
            deleted = await following.write(Delete(PREFIX + b"leader"))
            await asyncio.to_thread(etcd.call, COMPACTION, {"revision": str(deleted)})
            await following.follow()
            await following.is_exact()
            await following.write(Delete(PREFIX, END))

    asyncio.run(main())


@pytest.mark.etcd
@pytest.mark.parametrize("kind", KINDS)
def test_10_who_waits_for_a_key_to_go_is_not_left_waiting_by_a_compaction(kind: str) -> None:
    """The same for the wait for a worker's name that is taken: its holder goes, and etcd is compacted there, between
    our look and our watch. The name is ours then, long before the time is up for which it would be waited."""

    async def scene(stage: Stage) -> None:
        first = await stage.actor("w1")
        between = Between(stage.settings)
        has_gone: list[int] = []

        async def goes_first(sent: Sent) -> Answer:
            """The version is asked for before each watch."""
            if not has_gone:
                has_gone.append(first.session.lease)
                await stage.store.revoke(first.session.lease)
                revision = (await stage.store.read(Range(stage.keys.meta))).revision
                body = orjson.dumps({"revision": str(revision)})
                await between.post(Channel.CALL, sent.endpoint, COMPACTION, body, sent.headers, sent.timeout_s)
            return await between.forward(sent)

        between.by[gateway.STATUS] = goes_first
        async with EtcdStore(stage.settings, clock=stage.clock, rng=stage.rng, transport=between) as store:
            async with asyncio.timeout(SOON_S):
                second = await open_session(
                    store,
                    stage.keys,
                    LEASE,
                    clock=stage.clock,
                    rng=stage.rng,
                    name="w1",
                    record=WorkerRecord(sid="", address="w1.test:2", pid=2),
                    meta_revision=stage.shape.meta_revision,
                )
            assert has_gone
            assert second.is_valid()

    play(kind, scene)


@pytest.mark.etcd
def test_11_a_permission_that_comes_back_brings_the_picture_back() -> None:
    """A real etcd cancels a watch without any compaction when its user may not read the range (any more). Here that is
    no silence: the mirror goes on asking, and is right again soon after the permission is."""

    async def main(cluster: EtcdCluster, token: str) -> None:
        def admin(path: str, body: dict[str, Any]) -> None:
            answer = cluster.call(path, body, token)
            assert "error" not in answer, answer

        role = {"user": "reader", "role": "reads"}
        span = {"permType": "READWRITE", "key": gateway.b64(PREFIX), "range_end": gateway.b64(END)}
        admin("/v3/auth/role/add", {"name": "reads"})
        admin("/v3/auth/role/grant", {"name": "reads", "perm": span})
        admin("/v3/auth/user/add", {"name": "reader", "password": "secret"})
        admin("/v3/auth/user/grant", role)
        async with followed(cluster.url, username="reader", password="secret") as following:
            await following.write(Put(PREFIX + b"a", b""))
            await following.follow()
            await following.is_exact()
            await following.part()
            await following.write(Put(PREFIX + b"b", b""), Delete(PREFIX + b"a"))
            await asyncio.to_thread(admin, "/v3/auth/user/revoke", {"name": "reader", "role": "reads"})
            await following.follow()
            async with asyncio.timeout(SOON_S):
                while following.mirror._failures < 2:  # noqa: ASYNC110  # refused, and refused again; nobody is told
                    await asyncio.sleep(0.01)
            assert not following.mirror.is_connected
            await asyncio.to_thread(admin, "/v3/auth/user/grant", role)
            await following.is_exact()

    with etcd_server("3.5") as cluster:
        asyncio.run(main(cluster, cluster.enable_auth("secret")))


@pytest.mark.etcd
def test_20_a_watch_after_its_token_has_run_out_is_let_in_again() -> None:
    """python-etcd3 (#1227) hangs for ever where its token has expired. Here the store's refusal costs one new token,
    and the news of meanwhile come."""

    async def main(cluster: EtcdCluster) -> None:
        async with followed(cluster.url, username="root", password="secret") as following:
            await following.write(Put(PREFIX + b"a", b""))
            await following.follow()
            await following.part()
            token = following.store._credentials.token
            revision = await following.write(Put(PREFIX + b"b", b""))
            await asyncio.sleep(2.2)  # etcd forgets a token that was not used for its TTL, by the second
            await following.follow()
            await following.is_at(revision)
            assert following.store._credentials.token != token
            assert following.loads == 1
            await following.is_exact()

    with etcd_server("3.5", extra_args=("--auth-token-ttl=1",)) as cluster:
        cluster.enable_auth("secret")
        asyncio.run(main(cluster))
