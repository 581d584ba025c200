"""The etcd client under faults: what is asked again, what is not, and what an answer is worth."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shardlead.clock import SystemClock
from shardlead.config import StoreSettings
from shardlead.errors import ConfigError, LeaseGone, StoreRejected, StoreReplaced, StoreUnavailable
from shardlead.store import gateway
from shardlead.store.base import (
    Committed,
    Conflict,
    Delete,
    Put,
    Range,
    RangeResult,
    Store,
    Txn,
    Unknown,
    absent,
    prefix_end,
)
from shardlead.store.etcd import EtcdStore
from shardlead.store.mirror import Change, Mirror
from shardlead.store.transport import CALL_CONNECTIONS_MAX, Channel
from tests.store.fake_gateway import FakeGateway, Reply, Request, Script, header
from tests.support.etcd import KINDS, EtcdCluster, etcd_server, free_ports

PUT = Txn((absent(b"k"),), (Put(b"k", b"v"),))
READ = Range(b"k")


def _settings(*endpoints: str, **fields: Any) -> StoreSettings:
    return StoreSettings(**{"endpoints": endpoints, "try_timeout_s": 0.5, "call_timeout_s": 1.0, **fields})


def _store(*endpoints: str, **fields: Any) -> EtcdStore:
    """A client that begins at the first endpoint, so that a test knows who is asked."""
    store = EtcdStore(_settings(*endpoints, **fields), clock=SystemClock(), rng=random.Random(1))
    for channel in Channel:
        store._cursors[channel].at = 0
    return store


def _dead() -> str:
    """A URL at which nobody listens."""
    return f"http://127.0.0.1:{free_ports(1)[0]}"


@asynccontextmanager
async def _gateways(count: int) -> AsyncIterator[list[FakeGateway]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(FakeGateway()) for _ in range(count)]


def _in_turn(*scripts: Script) -> Script:
    """The first script answers the first request, and so on; the last one all others."""
    left = list(scripts)

    async def script(request: Request, reply: Reply) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(request, reply)

    return script


def _says(raw: object, status: int = 200) -> Script:
    async def script(_request: Request, reply: Reply) -> None:
        await reply.json(raw, status)

    return script


async def _cuts(_request: Request, reply: Reply) -> None:
    reply.abort()


async def _sleeps(_request: Request, reply: Reply) -> None:
    await reply.until_closed()


def _fault(code: int, text: str, status: int = 503) -> Script:
    return _says({"error": text, "message": text, "code": code}, status)


COMMITTED = {"header": header(9), "succeeded": True, "responses": [{"response_put": {"header": {"revision": "9"}}}]}


# --- writes: never twice -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        _cuts,
        _sleeps,
        _says("unreadable"),
        _says({"header": header(9), "responses": 5}),
        _fault(14, "etcdserver: request timed out"),
        _fault(14, "etcdserver: leader changed"),
        _fault(2, "context deadline exceeded", 500),
        _fault(4, "context deadline exceeded", 504),
        _fault(13, "whatever", 500),
    ],
)
def test_a_write_without_a_verdict_is_unknown_and_not_sent_again(script: Script) -> None:
    """Cut, silent, unreadable, or one of etcd's errors that prove nothing: the other endpoint is not asked."""

    async def main() -> None:
        async with _gateways(2) as (first, second), _store(first.url, second.url) as store:
            first.on(gateway.TXN, script)
            second.answer(gateway.TXN, COMMITTED)
            outcome = await store.commit(PUT)
            assert isinstance(outcome, Unknown)
            assert outcome.is_sent
            assert len(first.asked(gateway.TXN)) == 1
            assert not second.requests
            # the next call turns to the next endpoint
            assert isinstance(await store.commit(PUT), Committed)
            assert len(second.asked(gateway.TXN)) == 1

    asyncio.run(main())


def test_a_write_goes_on_where_nothing_was_sent() -> None:
    """A connection that was refused took nothing of it."""

    async def main() -> None:
        async with FakeGateway() as living, _store(_dead(), _dead(), living.url) as store:
            living.answer(gateway.TXN, COMMITTED)
            assert isinstance(await store.commit(PUT), Committed)
            assert len(living.asked(gateway.TXN)) == 1

    asyncio.run(main())


def test_a_write_that_nobody_took_says_so() -> None:
    """Unknown, after the call's time-out, and certain that nothing was sent."""

    async def main() -> None:
        async with _store(_dead(), _dead(), call_timeout_s=0.3) as store:
            outcome = await store.commit(PUT)
            assert isinstance(outcome, Unknown)
            assert not outcome.is_sent

    asyncio.run(main())


def test_a_write_refused_before_it_was_proposed_is_sent_again() -> None:
    """etcd says "too many requests" before it does anything."""

    async def main() -> None:
        async with FakeGateway() as only, _store(only.url) as store:
            only.on(gateway.TXN, _in_turn(_fault(8, "etcdserver: too many requests", 429), _says(COMMITTED)))
            assert isinstance(await store.commit(PUT), Committed)

    asyncio.run(main())


def test_a_transaction_that_only_reads_is_no_write() -> None:
    """It is sent again like any read; one that may write in either branch, however deep, is not."""

    async def main() -> None:
        reads = Txn((absent(b"k"),), (READ, Txn((), (READ,))), (READ,))
        deep = Txn((absent(b"k"),), (READ,), (Txn((), (), (Delete(b"k"),)),))
        async with _gateways(2) as (first, second), _store(first.url, second.url) as store:
            first.on(gateway.TXN, _cuts)
            second.answer(gateway.TXN, COMMITTED)
            assert isinstance(await store.commit(reads), Committed)
            store.rotate("test")
            assert isinstance(await store.commit(deep), Unknown)

    asyncio.run(main())


def test_a_refused_write_raises_what_was_refused() -> None:
    """A lease that is not there is named, also from within a nested transaction."""

    async def main() -> None:
        async with FakeGateway() as only, _store(only.url) as store:
            only.on(gateway.TXN, _fault(3, "etcdserver: duplicate key given in txn request", 400))
            with pytest.raises(StoreRejected, match="duplicate key"):
                await store.commit(PUT)
            only.on(gateway.TXN, _fault(5, "etcdserver: requested lease not found", 404))
            with pytest.raises(LeaseGone) as caught:
                await store.commit(Txn((), (Delete(b"a"), Txn((), (Put(b"k", b"v", lease=77),)))))
            assert caught.value.lease == 77

    asyncio.run(main())


# --- reads: from whoever answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", [_cuts, _sleeps, _says("unreadable"), _fault(14, "no leader"), _fault(2, "deadline", 500)]
)
def test_a_read_is_asked_of_the_next_endpoint(script: Script) -> None:
    """Whatever the first one's trouble is."""

    async def main() -> None:
        async with _gateways(2) as (first, second), _store(first.url, second.url) as store:
            first.on(gateway.RANGE, script)
            second.answer(gateway.RANGE, {"header": header(4)})
            assert await store.read(READ) == RangeResult(4, (), 0)

    asyncio.run(main())


def test_a_read_gives_up_in_time() -> None:
    """After `call_timeout_s`, though each try has longer."""

    async def main() -> None:
        async with FakeGateway() as only, _store(only.url, try_timeout_s=30.0, call_timeout_s=0.2) as store:
            only.on(gateway.RANGE, _sleeps)
            async with asyncio.timeout(5):
                with pytest.raises(StoreUnavailable, match="no answer within"):
                    await store.read(READ)

    asyncio.run(main())


def test_a_gateway_that_is_none_is_refused_at_once() -> None:
    """The wrong port, or an etcd too old for /v3: no use asking again."""

    async def main() -> None:
        async with FakeGateway() as only, _store(only.url) as store:
            with pytest.raises(StoreRejected, match="404"):
                await store.read(READ)

    asyncio.run(main())


# --- revisions and clusters --------------------------------------------------------------------------------------


def test_a_revision_that_goes_back_is_a_bad_endpoint() -> None:
    """A read is asked elsewhere; a write has no known outcome."""

    async def main() -> None:
        async with _gateways(2) as (good, behind), _store(good.url, behind.url) as store:
            good.answer(gateway.RANGE, {"header": header(10)})
            behind.answer(gateway.RANGE, {"header": header(5)})
            behind.answer(gateway.TXN, {**COMMITTED, "header": header(9)})
            assert (await store.read(READ)).revision == 10
            store.rotate("test")
            assert (await store.read(READ)).revision == 10
            assert len(behind.asked(gateway.RANGE)) == 1
            store.rotate("test")
            outcome = await store.commit(PUT)
            assert isinstance(outcome, Unknown)
            assert "went back from 10 to 9" in outcome.reason

    asyncio.run(main())


def test_answers_may_overtake_each_other() -> None:
    """A smaller revision that was on its way first is no regress."""

    async def main() -> None:
        release = asyncio.Event()

        async def slow(_request: Request, reply: Reply) -> None:
            await release.wait()
            await reply.json({"header": header(10)})

        async with FakeGateway() as only, _store(only.url) as store:
            only.on(gateway.RANGE, _in_turn(slow, _says({"header": header(11)})))
            early = asyncio.create_task(store.read(READ))
            await only.has_been_asked(gateway.RANGE, 1)
            assert (await store.read(READ)).revision == 11
            release.set()
            assert (await early).revision == 10

    asyncio.run(main())


def test_another_cluster_is_an_error() -> None:
    """For reads, writes and renewals alike; none of its answers counts."""

    async def main() -> None:
        async with _gateways(2) as (ours, other), _store(ours.url, other.url) as store:
            ours.answer(gateway.RANGE, {"header": header(10)})
            other.answer(gateway.RANGE, {"header": header(10, cluster_id=78)})
            other.answer(gateway.TXN, {**COMMITTED, "header": header(11, cluster_id=78)})
            other.answer(gateway.RENEW, {"result": {"header": header(11, cluster_id=78), "ID": "5"}})
            await store.read(READ)
            for call in (lambda: store.read(READ), lambda: store.commit(PUT), lambda: store.renew(5)):
                for channel in Channel:
                    store._cursors[channel].at = 1
                with pytest.raises(StoreReplaced):
                    await call()

    asyncio.run(main())


# --- leases ------------------------------------------------------------------------------------------------------


def test_a_renewal_is_one_attempt_and_leaves_a_bad_endpoint() -> None:
    """The next one goes to the next endpoint; other calls stay where they are."""

    async def main() -> None:
        async with _gateways(2) as (first, second), _store(first.url, second.url) as store:
            first.on(gateway.RENEW, _cuts)
            first.answer(gateway.RANGE, {"header": header(4)})
            second.answer(gateway.RENEW, {"result": {"header": header(4), "ID": "5", "TTL": "10"}})
            with pytest.raises(StoreUnavailable):
                await store.renew(5)
            assert await store.renew(5) == 10
            await store.read(READ)
            assert len(first.asked(gateway.RANGE)) == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    "raw", [{"result": {"header": header(4), "ID": "5"}}, {"error": {"grpc_code": 5, "message": "lease not found"}}]
)
def test_a_renewal_without_a_ttl_is_a_lost_lease(raw: object) -> None:
    """The gateway leaves out a TTL of zero, and answers 200."""

    async def main() -> None:
        async with FakeGateway() as only, _store(only.url) as store:
            only.answer(gateway.RENEW, raw)
            with pytest.raises(LeaseGone):
                await store.renew(5)

    asyncio.run(main())


@pytest.mark.parametrize(
    "script",
    [
        _says({"error": {"grpc_code": 14, "message": "etcdserver: no leader"}}),
        _fault(16, "etcdserver: invalid auth token", 401),
        _fault(7, "etcdserver: permission denied", 403),
        _fault(3, "anything refused", 400),
        _says("unreadable"),
        _sleeps,
    ],
)
def test_nothing_else_is_a_lost_lease(script: Script) -> None:
    """Refused credentials least of all."""

    async def main() -> None:
        async with FakeGateway() as only, _store(only.url) as store:
            only.on(gateway.RENEW, script)
            with pytest.raises(StoreUnavailable):
                await store.renew(5)

    asyncio.run(main())


def test_a_renewal_never_queues_behind_other_calls() -> None:
    """All connections for calls are busy, and more wait for one; the renewal has its own."""

    async def main() -> None:
        async with FakeGateway() as only, _store(only.url, try_timeout_s=30.0, call_timeout_s=30.0) as store:
            only.on(gateway.RANGE, _sleeps)
            only.answer(gateway.RENEW, {"result": {"header": header(4), "ID": "5", "TTL": "10"}})
            reads = [asyncio.create_task(store.read(READ)) for _ in range(CALL_CONNECTIONS_MAX + 8)]
            await only.has_been_asked(gateway.RANGE, CALL_CONNECTIONS_MAX)
            async with asyncio.timeout(5):
                assert await store.renew(5) == 10
            for read in reads:
                read.cancel()
            await asyncio.gather(*reads, return_exceptions=True)

    asyncio.run(main())


def test_a_revocation_that_was_lost_on_the_way_back_is_no_error() -> None:
    """The first try revoked the lease, the second does not find it; but a lease that never was is LeaseGone."""

    async def main() -> None:
        gone = _fault(5, "etcdserver: requested lease not found", 404)
        async with FakeGateway() as only, _store(only.url) as store:
            only.on(gateway.REVOKE, _in_turn(_cuts, gone))
            await store.revoke(5)
            with pytest.raises(LeaseGone):
                await store.revoke(5)

    asyncio.run(main())


# --- credentials -------------------------------------------------------------------------------------------------


def test_of_many_refused_calls_one_gets_a_new_token() -> None:
    """And all of them are then answered."""

    async def main() -> None:
        tokens = iter(f"t{number}" for number in range(100))
        valid = "t0"

        async def authenticate(_request: Request, reply: Reply) -> None:
            await reply.json({"header": header(1), "token": next(tokens)})

        async def read(request: Request, reply: Reply) -> None:
            if request.headers.get("authorization") == valid:
                await reply.json({"header": header(4)})
            else:
                await _fault(16, "etcdserver: invalid auth token", 401)(request, reply)

        async with FakeGateway() as only, _store(only.url, username="u", password="p") as store:
            only.on(gateway.AUTHENTICATE, authenticate)
            only.on(gateway.RANGE, read)
            await store.read(READ)
            valid = "t1"
            await asyncio.gather(*(store.read(READ) for _ in range(20)))
            assert len(only.asked(gateway.AUTHENTICATE)) == 2
            assert only.asked(gateway.AUTHENTICATE)[0].body == {"name": "u", "password": "p"}

    asyncio.run(main())


def test_a_token_that_comes_late_is_asked_for_once() -> None:
    """A member checks passwords slowly, and goes on with what nobody waits for any more: calls that lose patience join
    the same question instead of asking again, and its answer serves those that come later."""

    async def main() -> None:
        let = asyncio.Event()

        async def authenticate(_request: Request, reply: Reply) -> None:
            await let.wait()
            await reply.json({"header": header(1), "token": "t"})

        async with FakeGateway() as only, _store(only.url, username="u", password="p", try_timeout_s=0.05) as store:
            only.on(gateway.AUTHENTICATE, authenticate)
            only.answer(gateway.RANGE, {"header": header(4)})
            for answer in await asyncio.gather(*(store.read(READ) for _ in range(5)), return_exceptions=True):
                assert isinstance(answer, StoreUnavailable)
            let.set()
            await store.read(READ)
            assert len(only.asked(gateway.AUTHENTICATE)) == 1

    asyncio.run(main())


def test_the_wait_for_a_token_takes_nothing_from_the_request() -> None:
    """A token that comes at the very end of a try is used in a whole one, not in what is left of it."""

    async def main() -> None:
        async def authenticate(_request: Request, reply: Reply) -> None:
            await asyncio.sleep(0.35)  # of a try's 0.4 s
            await reply.json({"header": header(1), "token": "t"})

        async def read(_request: Request, reply: Reply) -> None:
            await asyncio.sleep(0.2)
            await reply.json({"header": header(4)})

        async with FakeGateway() as only, _store(only.url, username="u", password="p", try_timeout_s=0.4) as store:
            only.on(gateway.AUTHENTICATE, authenticate)
            only.on(gateway.RANGE, read)
            await store.read(READ)
            assert len(only.asked(gateway.RANGE)) == 1

    asyncio.run(main())


def test_a_renewal_does_not_wait_for_a_token() -> None:
    """etcd renews without looking at the token, so one that is lost must not cost the lease: the last one is shown, and
    only if that is refused is there a new one to wait for."""

    async def main() -> None:
        tokens = iter(("t0",))

        async def authenticate(_request: Request, reply: Reply) -> None:
            token = next(tokens, "")
            if not token:
                await reply.until_closed()
            await reply.json({"header": header(1), "token": token})

        async with FakeGateway() as only, _store(only.url, username="u", password="p", try_timeout_s=0.2) as store:
            only.on(gateway.AUTHENTICATE, authenticate)
            only.on(gateway.RANGE, _fault(16, "etcdserver: invalid auth token", 401))
            only.answer(gateway.RENEW, {"result": {"header": header(5), "ID": "7", "TTL": "9"}})
            for _ in range(2):
                with pytest.raises(StoreUnavailable):
                    await store.read(READ)
            assert await store.renew(7) == 9
            assert only.asked(gateway.RENEW)[0].headers["authorization"] == "t0"

    asyncio.run(main())


def test_a_store_without_authentication_needs_none() -> None:
    """User and password are then left aside."""

    async def main() -> None:
        async with FakeGateway() as only, _store(only.url, username="u", password="p") as store:
            only.on(gateway.AUTHENTICATE, _fault(9, "etcdserver: authentication is not enabled", 400))
            only.answer(gateway.RANGE, {"header": header(4)})
            await store.read(READ)
            await store.read(READ)
            assert len(only.asked(gateway.AUTHENTICATE)) == 1

    asyncio.run(main())


def test_a_write_whose_token_could_not_be_got_was_not_sent() -> None:
    """Another endpoint may still take it."""

    async def main() -> None:
        async with (
            _gateways(2) as (first, second),
            _store(first.url, second.url, username="u", password="p") as store,
        ):
            first.on(gateway.AUTHENTICATE, _cuts)
            second.answer(gateway.AUTHENTICATE, {"header": header(1), "token": "t"})
            second.answer(gateway.TXN, COMMITTED)
            assert isinstance(await store.commit(PUT), Committed)
            assert not first.asked(gateway.TXN)

    asyncio.run(main())


# --- status ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "is_trusted", "warned"),
    [
        ("3.4.23", False, 8),
        ("3.4.25", True, 7),
        ("3.4.45", True, 1),
        ("3.5.1", False, 8),
        ("3.5.8", True, 6),
        ("3.5.28", True, 0),
        ("3.6.0-rc.1", True, 2),
        ("3.6.9", True, 0),
        ("3.7.0", True, 0),
        ("3.3.27", False, 1),
        ("banana", False, 0),
    ],
)
def test_status_tells_what_is_wrong_with_a_version(version: str, is_trusted: bool, warned: int) -> None:
    """One line for each known fault; protocol.md A.9."""

    async def main() -> None:
        async with FakeGateway(version) as only, _store(only.url) as store:
            status = await store.status()
            assert (status.endpoint, status.version, status.cluster_id) == (only.url, version, 77)
            assert status.is_progress_trusted is is_trusted
            assert len(status.warnings) == warned

    asyncio.run(main())


def test_files_that_cannot_be_read_are_named() -> None:
    """At once, not at the first call."""
    settings = StoreSettings(endpoints=("https://127.0.0.1:1",), ca_file="/nowhere.pem")
    with pytest.raises(ConfigError, match=r"store\.ca_file.*nowhere"):
        EtcdStore(settings, clock=SystemClock(), rng=random.Random(1))


# --- real etcds --------------------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS, scope="module")
def etcd(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    with etcd_server(request.param) as cluster:
        yield cluster


PATIENT = {"try_timeout_s": 3.0, "call_timeout_s": 15.0}  # for real servers on busy machines, where time is no matter


async def _use_all(store: Store) -> None:
    """Every call once."""
    grant = await store.grant(10)
    key = b"/use/%x" % grant.lease
    committed = await store.commit(Txn((absent(key),), (Put(key, b"v", grant.lease),), (Range(key),)))
    assert isinstance(committed, Committed)
    async with store.watch(key, b"", committed.revision) as batches:
        batch = await anext(batches)
    assert [event.kv.key for event in batch.events] == [key]
    assert isinstance(await store.commit(Txn((absent(key),), (), (Range(key),))), Conflict)
    assert (await store.read(Range(key))).kvs[0].lease == grant.lease
    assert (await store.lease_keys(grant.lease)).keys == (key,)
    for _ in range(3):  # an attempt each; two endpoints may be dead
        with contextlib.suppress(StoreUnavailable):
            assert await store.renew(grant.lease) == 10
            break
    else:
        pytest.fail("no renewal")
    await store.revoke(grant.lease)
    assert (await store.read(Range(key))).kvs == ()
    assert (await store.status()).version.startswith("3.")


@pytest.mark.etcd
def test_one_living_endpoint_of_three_is_enough(etcd: EtcdCluster) -> None:
    """Wherever it stands in the list."""

    async def main(endpoints: Sequence[str]) -> None:
        async with _store(*endpoints, **PATIENT) as store:
            await _use_all(store)

    living = etcd.url
    for at in range(3):
        endpoints = [_dead(), _dead()]
        endpoints.insert(at, living)
        asyncio.run(main(endpoints))


@pytest.mark.etcd
def test_a_stuck_store_is_given_up_in_time() -> None:
    """Each call within its time-out; the outcome of a write is then unknown: it may still be applied."""

    async def main(cluster: EtcdCluster) -> None:
        loop = asyncio.get_running_loop()
        async with _store(cluster.url, try_timeout_s=0.5, call_timeout_s=1.2, watch_silence_s=0.6) as store:
            grant = await store.grant(60)
            async with store.watch(b"/stuck/", prefix_end(b"/stuck/"), 1) as batches:
                cluster.freeze()
                try:
                    begun = loop.time()
                    with pytest.raises(StoreUnavailable):
                        await anext(batches)
                    assert 0.5 < loop.time() - begun < 3.0
                    for call, least_s in ((store.read(READ), 1.0), (store.renew(grant.lease), 0.45)):
                        begun = loop.time()
                        with pytest.raises(StoreUnavailable):
                            await call
                        assert least_s < loop.time() - begun < least_s + 3.0
                    begun = loop.time()
                    outcome = await store.commit(Txn((), (Put(b"/stuck/late", b"v"),)))
                    assert isinstance(outcome, Unknown)
                    assert outcome.is_sent
                    assert loop.time() - begun < 3.0
                    with pytest.raises(StoreUnavailable):
                        async with store.watch(b"k", b"", 1):
                            pytest.fail("a watch that nobody confirmed")
                finally:
                    cluster.thaw()

    with etcd_server("3.5") as cluster:
        asyncio.run(main(cluster))


@pytest.mark.etcd
@pytest.mark.parametrize("is_leader", [False, True], ids=["follower", "leader"])
def test_a_frozen_member_of_three_is_left(is_leader: bool) -> None:
    """The one that calls, renewals and the watch go to: all three turn elsewhere, each by itself."""

    async def main(cluster: EtcdCluster) -> None:
        leader = cluster.leader()
        frozen = leader if is_leader else next(member for member in cluster.members if member is not leader)
        endpoints = [frozen.url, *(member.url for member in cluster.members if member is not frozen)]
        async with asyncio.timeout(60), _store(*endpoints, call_timeout_s=15.0, watch_silence_s=2.0) as store:
            grant = await store.grant(30)
            seen: list[bytes] = []
            news = asyncio.Event()

            def on_change(change: Change) -> None:
                if change.puts:
                    seen.extend(kv.key for kv in change.puts)
                    news.set()

            mirror = Mirror(
                store, b"/f/", prefix_end(b"/f/"), on_change, name="f", clock=SystemClock(), rng=random.Random(1)
            )
            following = asyncio.create_task(mirror.run())
            await mirror.wait_loaded(10)
            frozen.freeze()
            try:
                while isinstance(await store.commit(Txn((absent(b"/f/a"),), (Put(b"/f/a", b""),))), Unknown):
                    pass
                assert [kv.key for kv in (await store.read(Range(b"/f/a"))).kvs] == [b"/f/a"]
                while True:
                    with contextlib.suppress(StoreUnavailable):
                        assert await store.renew(grant.lease) == 30
                        break
                await news.wait()
                assert seen == [b"/f/a"]
            finally:
                frozen.thaw()
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    with etcd_server("3.5", members=3) as cluster:
        asyncio.run(main(cluster))


@pytest.mark.etcd
@pytest.mark.parametrize("kind", KINDS)
def test_a_forgotten_token_costs_nothing(kind: str) -> None:
    """In place of a token that the store does not know any more every call gets a new one by itself, a watch too
    (python-etcd3's hung for ever), and no lease is lost by it."""
    forgotten = "AbCdEfGhIjKlMnOp.1"

    async def main(cluster: EtcdCluster) -> None:
        async with _store(cluster.url, username="root", password="secret", **PATIENT) as store:
            await _use_all(store)
            grant = await store.grant(60)
            store._credentials.token = forgotten
            assert await store.renew(grant.lease) == 60
            store._credentials.token = forgotten
            async with store.watch(b"/use/", prefix_end(b"/use/"), 1) as _batches:
                assert store._credentials.token != forgotten
            store._credentials.token = forgotten
            assert isinstance(await store.commit(Txn((absent(b"/none"),), (Put(b"/use", b""),))), Committed)
            assert store._credentials.token != forgotten
            store._credentials.token = forgotten
            await _use_all(store)
            assert (await store.lease_keys(grant.lease)).granted_ttl_s == 60
        async with _store(cluster.url, username="root", password="wrong", **PATIENT) as store:
            with pytest.raises(StoreRejected, match="authentication failed"):
                await store.read(READ)
        async with _store(cluster.url, **PATIENT) as store:
            with pytest.raises(StoreRejected):
                await store.read(READ)

    with etcd_server(kind) as cluster:
        cluster.enable_auth("secret")
        asyncio.run(main(cluster))


@pytest.mark.long
@pytest.mark.etcd
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_may_run_out(kind: str) -> None:
    """Tokens that live for 1 s unused: a watch and a renewal after a longer silence are let in again."""

    async def main(cluster: EtcdCluster) -> None:
        async with _store(cluster.url, username="root", password="secret", **PATIENT) as store:
            grant = await store.grant(60)
            for call in ("watch", "renew", "read"):
                token = store._credentials.token
                await asyncio.sleep(2.5)  # etcd forgets tokens by the second, and tells nobody
                match call:
                    case "watch":
                        async with store.watch(b"k", b"", 1):
                            pass
                    case "renew":
                        assert await store.renew(grant.lease) == 60
                        continue  # etcd lets a renewal pass without looking at the token
                    case _:
                        await store.read(READ)
                assert store._credentials.token != token

    with etcd_server(kind, extra_args=("--auth-token-ttl=1",)) as cluster:
        cluster.enable_auth("secret")
        asyncio.run(main(cluster))


@pytest.mark.etcd
@pytest.mark.parametrize("kind", KINDS)
def test_certificates_on_both_sides(kind: str) -> None:
    """A server whose authority is known, a client whose certificate it asks for; without one there is no way in."""

    async def main(cluster: EtcdCluster) -> None:
        tls = cluster.tls
        assert tls is not None
        files = {
            "ca_file": str(tls.ca_file),
            "cert_file": str(tls.client_cert_file),
            "key_file": str(tls.client_key_file),
        }
        async with _store(cluster.url, **files, **PATIENT) as store:
            await _use_all(store)
        for fewer in ({"ca_file": str(tls.ca_file)}, {}):
            async with _store(cluster.url, call_timeout_s=0.5, **fewer) as store:
                with pytest.raises(StoreUnavailable):
                    await store.read(READ)

    with etcd_server(kind, tls=True) as cluster:
        asyncio.run(main(cluster))
