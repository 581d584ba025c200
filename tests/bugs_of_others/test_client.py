"""Rows about the client of the store: what it believes, leaks, and asks of one lease and one connection."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import orjson
import pytest

from shardlead.clock import SystemClock
from shardlead.cluster.session import open_session
from shardlead.config import StoreSettings
from shardlead.core.model import SHARDS_PER_LEASE_MAX, WorkerRecord
from shardlead.errors import StoreError, StoreUnavailable
from shardlead.store import gateway
from shardlead.store.base import TXN_OPS_MAX, UNGUARDED, Committed, Put, Txn
from shardlead.store.etcd import EtcdStore
from shardlead.store.transport import Answer, Channel
from shardlead.worker import claims
from tests.cluster import stage as stages
from tests.cluster.stage import LEASE, SHARDS, Stage
from tests.support.between import Between, Sent
from tests.support.etcd import KINDS, EtcdCluster, etcd_server
from tests.worker.scene import Scene, play

# --- reads -----------------------------------------------------------------------------------------------------------


def test_07_a_doubt_is_settled_by_a_write_and_not_by_a_read_that_may_be_stale() -> None:
    """etcd 3.4.20 to 3.4.41, 3.5.0 to 3.5.27, 3.6.0 to 3.6.8 (#20418) answer linearizable reads from the past after a
    member was paused. A suspended worker that asked so would find itself the leader still. Here it is a transaction
    that writes, and reads that show the former leader convince nobody."""

    async def act(scene: Scene) -> None:
        one = await scene.start("w1")
        await scene.assign({0: ("w1",)})
        await scene.until_serving("w1", 0)
        key, epoch, lead = scene.keys.leader(0), scene.epoch(0), scene.lead(0)
        remembered = await scene.stage.get(key)
        assert remembered is not None
        past = {
            "key": gateway.b64(key),
            "value": gateway.b64(remembered.value),
            "create_revision": str(remembered.create_revision),
            "mod_revision": str(remembered.mod_revision),
            "version": "1",
            "lease": str(remembered.lease),
        }

        async def stale(sent: Sent) -> Answer:
            answer = await one.transport.forward(sent)
            if not sent.is_about(key):
                return answer
            raw = orjson.loads(answer.body)
            return Answer(200, orjson.dumps({**raw, "kvs": [past], "count": "1"}))

        one.transport.by[gateway.RANGE] = stale
        one.transport.mute(scene.keys.meta, scene.keys.inbox("w1"))
        await scene.delete(key)
        asked_before = len(one.transport.sent)
        one.clock.jump(60.0)
        assert not lead.is_valid(0.0)
        await scene.until(lambda: one.worker.is_ready, within_s=4.0)
        assert not lead.is_valid(0.0)
        assert one.epoch(0) != epoch
        own = scene.keys.worker("w1")
        proofs = [sent for sent in one.transport.sent[asked_before:] if sent.path == gateway.TXN and sent.is_about(own)]
        assert any("request_put" in str(orjson.loads(sent.body)["success"]) and sent.is_about(key) for sent in proofs)

    play("embedded", act)


LONG: Final = replace(LEASE, ttl_s=60)  # does not end by itself while a test lasts


# --- leases ----------------------------------------------------------------------------------------------------------


async def leases(stage: Stage) -> set[int]:
    """All that the store has."""
    between = Between(stage.settings)
    try:
        answer = await between.post(Channel.CALL, stage.settings.endpoints[0], "/v3/lease/leases", b"{}", {}, 5.0)
    finally:
        await between.close()
    return {int(lease["ID"]) for lease in orjson.loads(answer.body).get("leases", ())}


@pytest.mark.parametrize("kind", ["embedded", pytest.param("3.5", marks=pytest.mark.etcd)])
def test_19_a_hundred_starts_that_fail_leave_no_lease_behind(kind: str) -> None:
    """python-etcd3 and aetcd leak the lease of each attempt at a lock that fails, and name their owners by uuid1, which
    two machines can have in common. Here what could not register gives its lease back, however it failed, and a
    session's name is its lease and a random number."""

    async def scene(stage: Stage) -> None:
        sids: set[str] = set()

        async def start(name: str, meta_revision: int = 0) -> None:
            session = await open_session(
                stage.store,
                stage.keys,
                LONG,
                clock=stage.clock,
                rng=stage.rng,
                name=name,
                record=WorkerRecord(sid="", address=f"{name}.test:1", pid=1),
                meta_revision=meta_revision or stage.shape.meta_revision,
            )
            sids.add(session.sid)

        async def refused(number: int) -> None:
            with pytest.raises(StoreError, match="meta has changed"):
                await start(f"refused{number}", stage.shape.meta_revision + 1)

        await asyncio.gather(*(refused(number) for number in range(50)))
        rivals = [asyncio.create_task(start("w1")) for _ in range(51)]  # all find the name free, one gets it
        await asyncio.wait(rivals, return_when=asyncio.FIRST_COMPLETED)
        async with asyncio.timeout(15):
            while len(await leases(stage)) > 1:  # noqa: ASYNC110  # the others give theirs back as they lose
                await asyncio.sleep(0.02)
        for rival in rivals:
            rival.cancel()
        ends = await asyncio.gather(*rivals, return_exceptions=True)
        assert sum(end is None for end in ends) == 1
        kv = await stage.get(stage.keys.worker("w1"))
        assert kv is not None
        assert await leases(stage) == {kv.lease}
        assert sids == {orjson.loads(kv.value)["sid"]}
        assert all(sid.startswith(f"{kv.lease:x}-") for sid in sids)

    stages.play(kind, scene)


def test_31_a_worker_takes_no_more_shards_than_one_lease_may_carry(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Kubernetes (#96836) put very many keys on one lease: its end stalls etcd. Here a lease carries 5,000 at most, and
    what would be more is refused with a clear word. (The bound is set to 5 for this.)"""
    assert SHARDS_PER_LEASE_MAX == 5_000
    monkeypatch.setattr(claims, "SHARDS_PER_LEASE_MAX", 5)

    async def act(scene: Scene) -> None:
        await scene.start("w1")
        await scene.assign(dict.fromkeys(range(SHARDS), ("w1",)))
        await scene.until(lambda: len(scene.leaders()) == 5)
        await scene.until(lambda: sum("claim refused" in record.msg for record in caplog.records) == SHARDS - 5)
        await scene.settle()
        assert len(scene.leaders()) == 5

    with caplog.at_level(logging.ERROR, "shardlead"):
        play("embedded", act)


STALL_S_MAX: Final = 2.0
"""Two tries of a renewal, which every lease can spare. On a quiet machine it was 69 ms for 5,000 keys, 679 ms for
50,000."""


@pytest.mark.etcd
def test_31_the_end_of_a_full_lease_stalls_nobody_for_long() -> None:
    """With a real etcd: a lease that carries as many shards as it may is revoked, and a write that comes at that moment
    is answered soon."""

    async def scene(stage: Stage) -> None:
        one = await stage.actor("w1", LONG)
        record, lease = one.leaders.own_record(), one.session.lease
        for start in range(0, SHARDS_PER_LEASE_MAX, TXN_OPS_MAX):
            shards = range(start, min(start + TXN_OPS_MAX, SHARDS_PER_LEASE_MAX))
            claim = Txn(UNGUARDED, tuple(Put(stage.keys.leader(shard), record, lease) for shard in shards))
            assert isinstance(await stage.store.commit(claim), Committed)  # the test is alone here
        assert await stage.count(stage.keys.leaders) == SHARDS_PER_LEASE_MAX
        loop = asyncio.get_running_loop()
        revoking = asyncio.create_task(stage.store.revoke(lease))
        longest_s = 0.0
        while not revoking.done():
            began_s = loop.time()
            outcome = await stage.store.commit(Txn(UNGUARDED, (Put(b"/meanwhile", b""),)))
            assert isinstance(outcome, Committed)
            longest_s = max(longest_s, loop.time() - began_s)
        await revoking
        assert await stage.count(stage.keys.leaders) == 0
        assert 0 < longest_s < STALL_S_MAX

    stages.play("3.5", scene)


# --- connections -----------------------------------------------------------------------------------------------------

WATCHES: Final = 300
STREAMS_MAX: Final = 250
"""Of the one connection of HTTP/2 that a gateway over TLS has to its own etcd; before 3.4.20 and 3.5.5."""
OPENING_AT_ONCE: Final = 20  # handshakes take their time


@pytest.fixture(params=KINDS, scope="module")
def etcd_over_tls(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    with etcd_server(request.param, tls=True) as cluster:
        yield cluster


@pytest.mark.etcd
def test_32_more_watches_than_a_gateway_over_tls_has_streams_hold_up_no_renewal(etcd_over_tls: EtcdCluster) -> None:
    """etcd's gateway over TLS sends everything through one loopback connection with 250 streams (#14077, #11826,
    #14185; mended in 3.4.20 and 3.5.5): more watches than that freeze all other calls. Where it is mended, a renewal
    beside 300 watches is answered. Where it is not, nothing here hangs for longer than its time-out, the version is
    warned of by name at the start, and all is well again when the watches have gone."""
    tls = etcd_over_tls.tls
    assert tls is not None
    own = StoreSettings(
        endpoints=etcd_over_tls.endpoints,
        ca_file=str(tls.ca_file),
        cert_file=str(tls.client_cert_file),
        key_file=str(tls.client_key_file),
        try_timeout_s=1.0,
        call_timeout_s=2.0,
    )

    async def main() -> None:
        async with asyncio.timeout(25), EtcdStore(own, clock=SystemClock(), rng=random.Random(1)) as store:
            is_mended = not any("#14077" in warning for warning in (await store.status()).warnings)
            lease = (await store.grant(60)).lease
            standing = 0
            enough, may_go = asyncio.Event(), asyncio.Event()
            opening = asyncio.Semaphore(OPENING_AT_ONCE)

            async def watch() -> None:
                nonlocal standing
                async with contextlib.AsyncExitStack() as stack:
                    try:
                        async with opening:
                            await stack.enter_async_context(store.watch(b"/a", b"/b", 1))
                    except StoreUnavailable:
                        return
                    standing += 1
                    if standing == (WATCHES if is_mended else STREAMS_MAX):
                        enough.set()
                    await may_go.wait()

            watches = [asyncio.create_task(watch()) for _ in range(WATCHES)]
            await enough.wait()
            if is_mended:
                assert await store.renew(lease) == 60
            else:
                began_s = asyncio.get_running_loop().time()
                with pytest.raises(StoreUnavailable):
                    await store.renew(lease)
                assert asyncio.get_running_loop().time() - began_s < 2 * own.try_timeout_s
            may_go.set()
            await asyncio.gather(*watches)
            while True:
                with contextlib.suppress(StoreUnavailable):
                    assert await store.renew(lease) == 60
                    break

    asyncio.run(main())
