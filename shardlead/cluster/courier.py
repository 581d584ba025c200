"""Letters between workers: wants and offers, and the tick by which everybody knows that news still arrive.

Law: protocol.md A.3 "Orphans" and "Wants", A.7.7. Every letter stands on its addressee's or its writer's lease, so
none outlives the one it is about. The winner of a tick looks for shards that nobody leads and offers them around.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shardlead.cluster.answers import LedBy, Undecided
from shardlead.cluster.batch import BATCH
from shardlead.cluster.session import Session
from shardlead.core.keyspace import Keyspace, decode, encode
from shardlead.core.model import Offer, Tick, Want
from shardlead.core.shardmap import Member
from shardlead.errors import KeyspaceError, LeaseGone, StoreError
from shardlead.store.base import (
    Committed,
    Conflict,
    Delete,
    Put,
    Range,
    RangeResult,
    Store,
    Txn,
    TxnResult,
    Unknown,
    absent,
    leased_by,
    modified_at,
    prefix_end,
)

log = logging.getLogger("shardlead.courier")

PAGE: Final = 5_000


@dataclass(frozen=True, slots=True)
class Ticked:
    """Our tick was written, under this revision."""

    revision: int


@dataclass(frozen=True, slots=True)
class TickLost:
    """Somebody ticked since the one we have seen: our watch may be behind."""


class Courier:
    """One session's letters."""

    def __init__(self, store: Store, keyspace: Keyspace, session: Session) -> None:
        self._store = store
        self._keys = keyspace
        self._session = session

    async def want(self, leaders: Mapping[int, LedBy], generation_epoch: int, reason: str) -> set[int]:
        """Ask the leaders of these shards for them; the shards whose want stands now. Raises StoreError.

        `generation_epoch` is what the cluster's generation adds to a revision to make an epoch.
        """
        standing: set[int] = set()
        for part in _parts(sorted(leaders)):
            standing |= await self._want_part({shard: leaders[shard] for shard in part}, generation_epoch, reason)
        return standing

    async def _want_part(self, leaders: Mapping[int, LedBy], generation_epoch: int, reason: str) -> set[int]:
        keys, session = self._keys, self._session
        records: dict[int, tuple[bytes, bytes]] = {}
        for shard, holder in leaders.items():
            want = Want(
                target=session.name,
                target_sid=session.sid,
                target_lease=session.lease,
                epoch_seen=generation_epoch + holder.revision,
                reason=reason,
                ttl_s=session.ttl_s,
            )
            records[shard] = (keys.want(holder.leader.worker, shard), encode(want))
        nested = tuple(
            Txn(
                (modified_at(keys.leader(shard), leaders[shard].revision), absent(key)),
                (Put(key, value, session.lease),),
                (Range(key),),
            )
            for shard, (key, value) in records.items()
        )
        outcome = await self._store.commit(Txn(session.guards(), nested))
        if not isinstance(outcome, Committed):
            return set()
        standing: set[int] = set()
        for shard, result in zip(records, outcome.results, strict=True):
            assert isinstance(result, TxnResult), "a nested transaction answers with its own result"
            if result.succeeded or await self._overwrite(shard, leaders[shard], *records[shard], result):
                standing.add(shard)
        return standing

    async def _overwrite(self, shard: int, holder: LedBy, key: bytes, value: bytes, found: TxnResult) -> bool:
        """Another want is there already: ours from before, or of a target that the assignment names no more."""
        (standing,) = found.results
        assert isinstance(standing, RangeResult), "a Range answers with a RangeResult"
        if not standing.kvs:
            return False  # the leader has changed: look again
        kv = standing.kvs[0]
        try:
            other = decode(Want, kv.key, kv.value)
        except KeyspaceError:
            other = None
        if other is not None and other.target_sid == self._session.sid and kv.value == value:
            return True
        txn = Txn(
            (
                *self._session.guards(),
                modified_at(self._keys.leader(shard), holder.revision),
                modified_at(key, kv.mod_revision),
            ),
            (Put(key, value, self._session.lease),),
        )
        return isinstance(await self._store.commit(txn), Committed)

    async def withdraw(self, shard: int, leader: str) -> None:
        """Take back our want of a shard, if it is ours. Raises StoreError."""
        key = self._keys.want(leader, shard)
        await self._store.commit(Txn((leased_by(key, self._session.lease),), (Delete(key),)))

    async def drop_offers(self, offers: Mapping[int, int]) -> None:
        """Delete our own offers (shard -> mod_revision of the offer) that are done with. Raises StoreError."""
        keys, name = self._keys, self._session.name
        for part in _parts(sorted(offers)):
            deletes = tuple(
                Txn((modified_at(keys.offer(name, shard), offers[shard]),), (Delete(keys.offer(name, shard)),))
                for shard in part
            )
            await self._store.commit(Txn(self._session.guards(), deletes))

    async def offer(self, shards: Sequence[int], name: str, member: Member, tick_revision: int, reason: str) -> int:
        """Offer leaderless shards, on the addressee's lease, while our tick is the last; those that have a leader by
        then are passed over. How many offers stand; fewer than `shards` also where the tick or the lease is gone."""
        keys, record = self._keys, encode(Offer(sid=member.record.sid, by=self._session.name, reason=reason))
        standing = 0
        for part in _parts(shards):
            nested = tuple(
                Txn((absent(keys.leader(shard)),), (Put(keys.offer(name, shard), record, member.lease),))
                for shard in part
            )
            try:
                outcome = await self._store.commit(Txn((modified_at(keys.tick, tick_revision),), nested))
            except LeaseGone:
                return standing
            if not isinstance(outcome, Committed):
                return standing
            standing += sum(isinstance(result, TxnResult) and result.succeeded for result in outcome.results)
        return standing

    async def tick(self, seen_revision: int, n: int) -> Ticked | TickLost | Undecided:
        """Write the tick after the one we have seen; exactly one worker wins."""
        txn = Txn((modified_at(self._keys.tick, seen_revision),), (Put(self._keys.tick, encode(Tick(n=n))),))
        try:
            outcome = await self._store.commit(txn)
        except StoreError as exc:
            return Undecided(str(exc))
        match outcome:
            case Committed(revision):
                return Ticked(revision)
            case Conflict():
                return TickLost()
            case Unknown(reason):
                return Undecided(reason)

    async def leaders_count(self) -> int:
        """How many keys stand under `leaders/`. Raises StoreError."""
        start = self._keys.leaders
        return (await self._store.read(Range(start, prefix_end(start), count_only=True))).count

    async def led_shards(self, revision: int) -> set[int]:
        """Which shards have a leader at `revision`. Raises StoreError (Compacted too)."""
        start, end = self._keys.leaders, prefix_end(self._keys.leaders)
        led: set[int] = set()
        while True:
            page = await self._store.read(Range(start, end, limit=PAGE, revision=revision, keys_only=True))
            for kv in page.kvs:
                place = self._keys.parse(kv.key)
                if place is not None:
                    led.add(place.shard)
            if not page.more:
                return led
            start = page.kvs[-1].key + b"\x00"


def _parts(shards: Sequence[int]) -> Iterable[Sequence[int]]:
    for start in range(0, len(shards), BATCH):
        yield shards[start : start + BATCH]
