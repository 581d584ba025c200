"""The stock `etcd3` package as the independent second client: it reads what shardlead wrote, and lives beside it."""

import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from shardlead.clock import SystemClock
from shardlead.cluster.answers import Claimed
from shardlead.cluster.bootstrap import ensure_shape
from shardlead.cluster.election import Election
from shardlead.cluster.history import Histories
from shardlead.cluster.leaders import Leaders
from shardlead.cluster.session import open_session
from shardlead.config import ClusterSettings, LeaseSettings, StoreSettings
from shardlead.core.keyspace import Keyspace
from shardlead.core.model import WorkerRecord
from shardlead.core.ring import decode_table, slot_of
from shardlead.store.base import Range
from shardlead.store.etcd import EtcdStore
from tests.support.etcd import KINDS, EtcdCluster, etcd_server

ANSWER_TIMEOUT_S = 30.0  # importing etcd3 on a busy machine takes seconds


@pytest.fixture(params=KINDS, scope="module")
def etcd(request: pytest.FixtureRequest) -> Iterator[EtcdCluster]:
    with etcd_server(request.param) as cluster:
        yield cluster


class Peer:
    """The other program, asked a line at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, *command: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            line = await self._process.stdout.readline()
        assert line, f"the peer ended at {command}"
        return json.loads(line)


@asynccontextmanager
async def _peer(etcd: EtcdCluster) -> AsyncIterator[Peer]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("etcd3_peer.py")),
        str(urlsplit(etcd.url).port),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=4 * 1024 * 1024,  # the slot table is one line
        env={**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"},
    )
    try:
        yield Peer(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.etcd
def test_etcd3_reads_the_shard_map_and_holds_a_lock_beside_ours(etcd: EtcdCluster) -> None:
    """Leaders, epochs and slots as any language would read them; its lock and our leases do not touch each other."""

    async def main() -> None:
        clock, rng = SystemClock(), random.Random(1)
        keys = Keyspace("interop")
        settings = StoreSettings(endpoints=etcd.endpoints)
        async with EtcdStore(settings, clock=clock, rng=rng) as store, _peer(etcd) as peer:
            shape = await ensure_shape(store, keys, ClusterSettings(name="interop", shards=4))
            session = await open_session(
                store,
                keys,
                LeaseSettings(ttl_s=30),
                clock=clock,
                rng=rng,
                name="w1",
                record=WorkerRecord(sid="", address="127.0.0.1:1"),
                meta_revision=shape.meta_revision,
            )
            standing, histories = Leaders(store, keys, session), Histories(store, keys, tick=lambda: 0, clock=clock)
            election = Election(store, keys, session, standing, histories, clock=clock)
            claims = await election.claim([0, 1, 2, 3], "interop")

            # it reads who leads, under which epoch, on which lease: plain JSON
            leaders = await peer.ask("read", "/interop/leaders/")
            assert list(leaders) == [f"/interop/leaders/{shard:06d}" for shard in range(4)]
            for shard, found in enumerate(leaders.values()):
                claim = claims[shard]
                assert isinstance(claim, Claimed)
                assert found["mod_revision"] == claim.revision
                assert found["lease"] == session.lease
                record = json.loads(found["value"])
                assert (record["worker"], record["sid"]) == ("w1", session.sid)
            # and what a key's shard is
            (meta,) = (await peer.ask("read", "/interop/meta")).values()
            (ring,) = (await peer.ask("read", "/interop/ring")).values()
            assert json.loads(meta["value"])["shards"] == 4
            table = decode_table(ring["value"].encode("latin-1"), shape.meta)
            assert table == shape.table
            assert table[slot_of(b"alice", shape.meta.slot_count)] in range(4)

            # it has a lock of its own on the same store; neither can take what the other holds
            assert await peer.ask("lock") is True
            assert await peer.ask("create", "/interop/leaders/000000") is False
            assert await store.renew(session.lease) == 30
            assert await peer.ask("holds") is True

            # our end takes our keys and nothing of its own
            await store.revoke(session.lease)
            assert await peer.ask("read", "/interop/leaders/") == {}
            assert await peer.ask("read", "/interop/workers/") == {}
            assert await peer.ask("holds") is True

            # and we see its lock go, as any key
            locks = await store.read(Range(b"/locks/somebody-else's"))
            assert len(locks.kvs) == 1
            async with store.watch(b"/locks/somebody-else's", b"", locks.revision + 1) as batches:
                assert await peer.ask("unlock") is True
                async with asyncio.timeout(10):
                    batch = await anext(batches)
            assert [event.is_delete for event in batch.events] == [True]

    asyncio.run(main())
