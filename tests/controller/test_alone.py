"""A controller without a worker: it waits for its cluster, and outlives its sessions."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from shardlead.clock import SystemClock
from shardlead.cluster.bootstrap import ensure_shape, raise_generation
from shardlead.config import ClusterSettings, Settings
from shardlead.controller.alone import run_alone
from shardlead.core.keyspace import Keyspace, decode
from shardlead.core.model import LeaderRecord
from shardlead.metrics import ControllerMetrics
from shardlead.store.base import KeyValue, Range
from shardlead.store.etcd import EtcdStore
from tests.controller.fleet import CALM, fleet
from tests.support.embedded import embedded_server

WAIT_S = 10.0


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with embedded_server() as address:
        yield address


def settings_of(name: str, url: str) -> Settings:
    base = Settings()
    return replace(
        base,
        cluster=replace(base.cluster, name=name, shards=24),
        store=replace(base.store, endpoints=(url,)),
        controller=CALM,
    )


@contextlib.asynccontextmanager
async def alone(settings: Settings) -> AsyncIterator[EtcdStore]:
    clock, rng = SystemClock(), random.Random(3)
    async with EtcdStore(settings.store, clock=clock, rng=rng) as store:
        work = run_alone(
            store, settings, name="lone", clock=clock, rng=rng, metrics=ControllerMetrics(CollectorRegistry())
        )
        running = asyncio.create_task(work)
        try:
            yield store
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def seat(store: EtcdStore, keyspace: Keyspace, after: int = 0) -> KeyValue:
    """The seat's record once it is newer than `after`: what comes up to now, then what the watch tells."""
    async with asyncio.timeout(WAIT_S):
        found = await store.read(Range(keyspace.seat))
        if found.kvs and found.kvs[0].mod_revision > after:
            return found.kvs[0]
        async with store.watch(keyspace.seat, b"", found.revision + 1) as batches:
            async for batch in batches:
                for event in batch.events:
                    if not event.is_delete:
                        return event.kv
    raise AssertionError("the watch ended")


def test_it_waits_for_its_cluster_and_takes_the_seat(url: str) -> None:
    """Started before anybody has created the cluster, it becomes the controller once somebody has."""

    async def main() -> None:
        settings = settings_of("alone-1", url)
        keyspace = Keyspace("alone-1")
        async with alone(settings) as store:
            await asyncio.sleep(0.1)  # so that it has looked once and found nothing
            await ensure_shape(store, keyspace, ClusterSettings(shards=24))
            kv = await seat(store, keyspace)
            assert decode(LeaderRecord, kv.key, kv.value).worker == "lone"
            assert kv.lease != 0

    asyncio.run(main())


def test_it_leaves_the_seat_when_it_stops(url: str) -> None:
    """Cancelled, it resigns and gives its lease back: nothing of it stays in the store."""

    async def main() -> None:
        settings = settings_of("alone-2", url)
        keyspace = Keyspace("alone-2")
        async with EtcdStore(settings.store, clock=SystemClock(), rng=random.Random()) as store:
            await ensure_shape(store, keyspace, ClusterSettings(shards=24))
            async with alone(settings):
                await seat(store, keyspace)
            assert (await store.read(Range(keyspace.seat))).kvs == ()

    asyncio.run(main())


def test_a_raised_generation_gives_it_a_new_session(url: str) -> None:
    """Its guards named the meta of before: it loses that session, opens another and sits down again."""

    async def main() -> None:
        settings = settings_of("alone-3", url)
        keyspace = Keyspace("alone-3")
        async with EtcdStore(settings.store, clock=SystemClock(), rng=random.Random()) as store:
            await ensure_shape(store, keyspace, ClusterSettings(shards=24))
            async with alone(settings):
                before = await seat(store, keyspace)
                await raise_generation(store, keyspace)
                await store.revoke(before.lease)
                after = await seat(store, keyspace, before.mod_revision)
                assert after.lease != before.lease

    asyncio.run(main())


def test_it_plans_for_workers_that_are_no_candidates(url: str) -> None:
    """Three workers without a controller of their own, and this one beside them."""

    async def main() -> None:
        async with fleet(url) as world, alone(settings_of(world.keyspace.cluster, url)):
            await world.join("a", "b", "c")
            await world.until(lambda: world.is_even() and world.is_in_order())

    asyncio.run(main())
