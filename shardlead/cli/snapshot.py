"""One look at a cluster: everything that stands in the store about it, at one revision.

Law: one pinned read, page by page; nothing is written. A record that cannot be read counts as absent and is counted.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from shardlead import devfile, log
from shardlead.cli.options import find_cluster
from shardlead.clock import SystemClock
from shardlead.core.fleet import Fleet, fleet_of
from shardlead.core.keyspace import Keyspace
from shardlead.core.model import Assignment
from shardlead.core.shardmap import Fact, ShardMap, read_fact
from shardlead.errors import ClusterMissing, CommandError, KeyspaceError, StoreRejected, StoreUnavailable
from shardlead.loading import Loaded
from shardlead.store.base import KeyValue, Range, Store, prefix_end
from shardlead.store.etcd import EtcdStore

PAGE: Final = 5_000
PATIENCE_S: Final = 3.0  # a command says within 5 s that the store does not answer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Look:
    """A cluster at one revision."""

    cluster: str
    endpoints: tuple[str, ...]
    map: ShardMap
    fleet: Fleet
    orders: Mapping[int, tuple[str, ...]]
    """Each shard's assignment: leader-to-be, then successors."""
    unreadable: int
    """Records under the cluster's prefix that could not be read."""

    @property
    def shards(self) -> int:
        return 0 if self.map.meta is None else self.map.meta.shards


def look(
    dev: int | None, config: tuple[Path, ...], set_: tuple[str, ...], store: str | None, cluster: str | None
) -> Look:
    """The cluster that these options name. Raises ConfigError, CommandError, StoreError, ClusterMissing."""
    return run_on(find_cluster(dev, config, set_, store, cluster), read_look)


def run_on(loaded: Loaded, action: Callable[[Loaded, Store, Keyspace], Awaitable[T]]) -> T:
    """Do `action` with a store of its own, then close it. Raises what it raises; StoreUnavailable soon."""
    log.configure("critical", "text")  # what went wrong is said once, by the error

    async def main() -> T:
        async with reaching(loaded) as store:
            return await action(loaded, store, Keyspace(loaded.settings.cluster.name))

    return asyncio.run(main())


@asynccontextmanager
async def reaching(loaded: Loaded) -> AsyncIterator[Store]:
    """The store of these settings, once it has answered. Raises StoreUnavailable within PATIENCE_S."""
    settings = loaded.settings.store
    patience_s = min(PATIENCE_S, settings.call_timeout_s)
    settings = replace(settings, call_timeout_s=patience_s, try_timeout_s=min(settings.try_timeout_s, patience_s))
    async with EtcdStore(settings, clock=SystemClock(), rng=random.Random()) as store:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await store.status()
        except (StoreUnavailable, TimeoutError) as exc:
            reason = str(exc) or f"no answer in {PATIENCE_S:g} s"
            raise CommandError(
                f"the store does not answer ({reason}); it was looked for at {', '.join(settings.endpoints)}"
                + ("" if "store.endpoints" in loaded.explicit else f", the default, as {_why_default()}")
            ) from exc
        except StoreRejected as exc:
            raise CommandError(f"what answers at {', '.join(settings.endpoints)} is no etcd for us: {exc}") from exc
        yield store


def _why_default() -> str:
    """Why the default store was taken: `init` makes a cluster of one's own and never takes a dev cluster's store."""
    return "--store names no other" if devfile.alive() else "no `shardlead dev` is running here"


async def read_look(loaded: Loaded, store: Store, keyspace: Keyspace, *, has_orders: bool = True) -> Look:
    """Everything about the cluster, at one revision; without `has_orders` all but the assignments, which are three
    records a shard. Raises StoreError, ClusterMissing."""
    facts: list[Fact] = []
    unreadable = 0
    revision = 0
    ranges = [(keyspace.leaders, prefix_end(keyspace.workers)), (keyspace.inboxes, prefix_end(keyspace.inboxes))]
    for start, end in ranges if has_orders else ranges[:1]:
        async for kv, at in read_all(store, start, end, revision):
            revision = at
            try:
                fact = read_fact(keyspace, kv.key, kv.value, kv.lease, kv.create_revision, kv.mod_revision)
            except KeyspaceError:
                fact = None
            if fact is None:
                unreadable += 1
            else:
                facts.append(fact)
    shard_map, _ = ShardMap().apply(facts, (), revision)
    if shard_map.meta is None:
        raise ClusterMissing(keyspace.cluster)
    return Look(
        cluster=keyspace.cluster,
        endpoints=loaded.settings.store.endpoints,
        map=shard_map,
        fleet=fleet_of(facts),
        orders=_orders(facts),
        unreadable=unreadable,
    )


async def read_all(store: Store, start: bytes, end: bytes, revision: int = 0) -> AsyncIterator[tuple[KeyValue, int]]:
    """Every key-value of [start, end) with the revision that all of them were read at (`revision`, 0: the present)."""
    while True:
        page = await store.read(Range(start, end, limit=PAGE, revision=revision))
        revision = revision or page.revision
        for kv in page.kvs:
            yield kv, revision
        if not page.more:
            return
        start = page.kvs[-1].key + b"\0"


def require_shard(seen: Look, shard: int) -> None:
    """Raises CommandError if the cluster has no such shard."""
    if not 0 <= shard < seen.shards:
        raise CommandError(f"there is no shard {shard}: cluster {seen.cluster!r} has shards 0 to {seen.shards - 1}")


def require_worker(seen: Look, worker: str) -> None:
    """Raises CommandError if no such worker lives."""
    if worker not in seen.map.workers:
        living = ", ".join(sorted(seen.map.workers))
        raise CommandError(
            f"no worker {worker!r} is alive in cluster {seen.cluster!r}: "
            + (f"alive are {living}" if living else "none is")
        )


def _orders(facts: list[Fact]) -> dict[int, tuple[str, ...]]:
    """Of each shard's copies the last one written: a controller writes them one after another."""
    latest: dict[int, tuple[int, tuple[str, ...]]] = {}
    for fact in facts:
        if isinstance(fact.value, Assignment):
            known = latest.get(fact.place.shard)
            if known is None or known[0] < fact.mod_revision:
                latest[fact.place.shard] = (fact.mod_revision, fact.value.order)
    return {shard: order for shard, (_, order) in latest.items()}
