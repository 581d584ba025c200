"""The cluster's birth: `meta` and `ring`, written once, and the check of a starting process against them.

Law: protocol.md A.2. Created by a worker, `shardlead dev` or `shardlead init`, never by a router or client. A start
compares the protocol, the ring's checksum and the fields that its settings name explicitly, and adopts the others.
"""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Final

from shardlead.config import ClusterSettings
from shardlead.core.keyspace import Keyspace, decode, encode
from shardlead.core.model import GENERATION_MAX, PROTOCOL, Meta
from shardlead.core.ring import SlotTable, build_table, decode_table, encode_table, slot_count_for, table_crc
from shardlead.errors import ClusterMissing, CommandError, MetaMismatch
from shardlead.store.base import (
    Committed,
    Conflict,
    Put,
    Range,
    RangeResult,
    Store,
    Txn,
    Unknown,
    absent,
    modified_at,
    prefix_end,
)

CREATE_TRIES_MAX: Final = 3
CREATE_PAUSE_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Shape:
    """A cluster as its creator wrote it: meta, the revision that transactions compare, and the slot table."""

    meta: Meta
    meta_revision: int
    table: SlotTable


async def read_shape(store: Store, keyspace: Keyspace) -> Shape | None:
    """The cluster's shape, None if nobody has created it. Raises KeyspaceError or RingError if it is damaged."""
    txn = Txn((), (Range(keyspace.meta), Range(keyspace.ring)))
    outcome = await store.commit(txn)
    if isinstance(outcome, Unknown):  # a read through a transaction has no effect, so nothing is in doubt but time
        meta_range = await store.read(Range(keyspace.meta))
        ring_range = await store.read(Range(keyspace.ring))
    else:
        meta_range, ring_range = outcome.results  # type: ignore[assignment]  # two Ranges give two RangeResults
    assert isinstance(meta_range, RangeResult)
    assert isinstance(ring_range, RangeResult)
    if not meta_range.kvs or not ring_range.kvs:
        return None
    kv = meta_range.kvs[0]
    meta = decode(Meta, kv.key, kv.value)
    return Shape(meta, kv.mod_revision, decode_table(ring_range.kvs[0].value, meta))


async def ensure_shape(
    store: Store, keyspace: Keyspace, settings: ClusterSettings, explicit: Collection[str] = ()
) -> Shape:
    """The cluster's shape, created from `settings` if there is none.

    `explicit` names the fields of the section `cluster` that somebody set on purpose; where the stored cluster
    differs in one of them, MetaMismatch is raised.
    """
    for _ in range(CREATE_TRIES_MAX):
        shape = await read_shape(store, keyspace)
        if shape is not None:
            check_shape(shape, keyspace, settings, explicit)
            return shape
        slot_count = slot_count_for(settings.shards)
        table = build_table(settings.shards, slot_count, settings.seed)
        meta = Meta(
            cluster=keyspace.cluster,
            shards=settings.shards,
            slot_count=slot_count,
            seed=settings.seed,
            ring_crc=table_crc(table),
            hash_tags=settings.hash_tags,
        )
        outcome = await store.commit(
            Txn(
                (absent(keyspace.meta), absent(keyspace.ring)),
                (Put(keyspace.meta, encode(meta)), Put(keyspace.ring, encode_table(table))),
            )
        )
        if isinstance(outcome, Unknown):
            await asyncio.sleep(CREATE_PAUSE_S)
    raise ClusterMissing(keyspace.cluster)


def check_shape(shape: Shape, keyspace: Keyspace, settings: ClusterSettings, explicit: Collection[str]) -> None:
    """Raises MetaMismatch where the stored cluster is not the one that this process was told to join."""
    meta = shape.meta
    if meta.protocol != PROTOCOL:
        raise MetaMismatch(keyspace.cluster, "protocol", meta.protocol, PROTOCOL)
    if meta.cluster != keyspace.cluster:
        raise MetaMismatch(keyspace.cluster, "cluster", meta.cluster, keyspace.cluster)
    for field, stored, wanted in (
        ("shards", meta.shards, settings.shards),
        ("seed", meta.seed, settings.seed),
        ("hash_tags", meta.hash_tags, settings.hash_tags),
    ):
        if field in explicit and stored != wanted:
            raise MetaMismatch(keyspace.cluster, field, stored, wanted)


async def raise_generation(store: Store, keyspace: Keyspace) -> Meta:
    """One more in every epoch to come; only while no worker lives. Raises CommandError, ClusterMissing, StoreError.

    The step of a restore after which epochs are again above everything that storage has registered.
    """
    shape = await read_shape(store, keyspace)
    if shape is None:
        raise ClusterMissing(keyspace.cluster)
    if shape.meta.generation >= GENERATION_MAX:
        raise CommandError(f"generation is {GENERATION_MAX}, the highest there is")
    meta = replace(shape.meta, generation=shape.meta.generation + 1)
    txn = Txn(
        (modified_at(keyspace.meta, shape.meta_revision), absent(keyspace.workers, prefix_end(keyspace.workers))),
        (Put(keyspace.meta, encode(meta)),),
        (Range(keyspace.workers, prefix_end(keyspace.workers), count_only=True),),
    )
    match await store.commit(txn):
        case Committed():
            return meta
        case Conflict(results=(RangeResult(count=0),)):
            raise CommandError("meta changed meanwhile: look at `shardlead status` and try again")
        case Conflict():
            raise CommandError("workers are alive: stop all of them first, then raise the generation")
        case Unknown(reason):
            raise CommandError(f"outcome unknown ({reason}): look at `shardlead status` before trying again")
