"""Counting what is asked of a store: nothing is changed, everything is counted."""

import asyncio
import random
import socket
from collections.abc import Mapping

import pytest
from prometheus_client import CollectorRegistry

from shardlead.clock import SystemClock
from shardlead.config import StoreSettings
from shardlead.errors import LeaseGone, StoreUnavailable
from shardlead.metrics import StoreMetrics
from shardlead.store.base import Committed, Put, Range, Txn, Unknown, absent
from shardlead.store.embedded import serve
from shardlead.store.etcd import EtcdStore
from shardlead.store.metered import MeteredStore


def counted(registry: CollectorRegistry) -> Mapping[tuple[str, str], float]:
    """Calls by kind and result."""
    return {
        (sample.labels["call"], sample.labels["result"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "shardlead_store_calls_total"
    }


def test_answers_pass_and_are_counted() -> None:
    """Reads, writes, leases and their refusals; the time of each call is kept."""
    registry = CollectorRegistry()

    async def main() -> None:
        url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        server = asyncio.create_task(serve("127.0.0.1", 0, data=None, on_ready=url.set_result))
        settings = StoreSettings(endpoints=(await url,))
        clock = SystemClock()
        async with EtcdStore(settings, clock=clock, rng=random.Random(1)) as inner:
            store = MeteredStore(inner, StoreMetrics(registry), clock=clock)
            assert isinstance(await store.commit(Txn((absent(b"a"),), (Put(b"a", b"1"),))), Committed)
            assert (await store.read(Range(b"a"))).kvs[0].value == b"1"
            lease = (await store.grant(5)).lease
            assert await store.renew(lease) == 5
            assert (await store.lease_keys(lease)).keys == ()
            await store.revoke(lease)
            with pytest.raises(LeaseGone):
                await store.renew(lease)
            async with store.watch(b"a", b"", 1) as batches:
                async for batch in batches:
                    assert batch.events[0].kv.key == b"a"
                    break
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)

    asyncio.run(main())
    assert counted(registry) == {
        ("commit", "ok"): 1,
        ("read", "ok"): 1,
        ("grant", "ok"): 1,
        ("renew", "ok"): 1,
        ("lease-keys", "ok"): 1,
        ("revoke", "ok"): 1,
        ("renew", "gone"): 1,
    }
    assert registry.get_sample_value("shardlead_store_call_duration_seconds_count", {"call": "renew"}) == 2


def test_silence_is_counted() -> None:
    """A store that does not answer: unavailable for a read; a write that was surely not sent is no success either."""
    registry = CollectorRegistry()

    async def main() -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        settings = StoreSettings(endpoints=(url,), try_timeout_s=0.2, call_timeout_s=0.2)
        clock = SystemClock()
        async with EtcdStore(settings, clock=clock, rng=random.Random(1)) as inner:
            store = MeteredStore(inner, StoreMetrics(registry), clock=clock)
            with pytest.raises(StoreUnavailable):
                await store.read(Range(b"a"))
            assert isinstance(await store.commit(Txn((absent(b"a"),), (Put(b"a", b"1"),))), Unknown)
            with pytest.raises(StoreUnavailable):
                async with store.watch(b"a", b"", 1):
                    pass

    asyncio.run(main())
    assert counted(registry) == {("read", "unavailable"): 1, ("commit", "unknown"): 1}
    assert registry.get_sample_value("shardlead_store_watch_breaks_total") == 1
