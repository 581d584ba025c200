"""The fence of data in etcd: each transaction compares the leadership's own key.

Law: protocol.md A.3, T7.
"""

import asyncio
from typing import Final

from shardlead.core.keyspace import SHARD_DIGITS, Keyspace
from shardlead.core.model import epoch_of, generation_of, revision_of
from shardlead.errors import EpochRegressed, Fenced, WriteUnknown
from shardlead.fencing.base import Lead
from shardlead.store.base import (
    Committed,
    Compare,
    Conflict,
    Delete,
    KeyValue,
    Op,
    OpResult,
    Put,
    Range,
    RangeResult,
    Store,
    Target,
    Txn,
    Unknown,
    modified_at,
    prefix_end,
)

BARRIER_TRIES_MAX: Final = 5


class EtcdFence:
    """Data that lives in the same etcd as the leaderships: protocol.md's T7, the strongest fence there is.

    Every transaction compares the mod_revision of `leaders/<shard>`, which *is* the epoch, and a record
    `<prefix>fence/<shard>` with the whole epoch, generation included, which the barrier writes. A leader that was
    replaced or whose lease ended is refused by etcd itself, in the same step.

    All data stands below `prefix`, which lies outside of the cluster's own keys.
    """

    def __init__(self, store: Store, keyspace: Keyspace, prefix: bytes) -> None:
        if not prefix or keyspace.prefix.startswith(prefix) or prefix.startswith(keyspace.prefix):
            raise ValueError(f"data prefix {prefix!r} overlaps the cluster's own keys {keyspace.prefix!r}")
        self._store = store
        self._keyspace = keyspace
        self._prefix = prefix

    def __repr__(self) -> str:
        return f"<EtcdFence {self._prefix.decode(errors='backslashreplace')}>"

    def record(self, shard: int) -> bytes:
        """The key that holds the registered epoch."""
        return self._prefix + b"fence/%0*d" % (SHARD_DIGITS, shard)

    async def barrier(self, lead: Lead) -> None:
        """Register `lead`'s epoch, through etcd's log, so that what is read afterwards is not older than this.

        Raises Fenced, EpochRegressed, LeadershipLost, WriteUnknown, and what the store raises.
        """
        reason = ""
        for _ in range(BARRIER_TRIES_MAX):
            lead.check()
            found = await self._store.read(Range(self.record(lead.shard)))
            registered = int(found.kvs[0].value) if found.kvs else 0
            if registered > lead.epoch:
                raise EpochRegressed(lead.shard, lead.epoch, registered)
            seen = modified_at(self.record(lead.shard), found.kvs[0].mod_revision if found.kvs else 0)
            leads = modified_at(self._keyspace.leader(lead.shard), revision_of(lead.epoch))
            register = Put(self.record(lead.shard), b"%d" % lead.epoch)
            again = Range(self._keyspace.leader(lead.shard))
            match await self._store.commit(Txn((leads, seen), (register,), (again,))):
                case Committed():
                    lead.note_barrier()
                    return
                case Conflict(results=(RangeResult(kvs=kvs),)):
                    if not kvs or kvs[0].mod_revision != revision_of(lead.epoch):
                        raise Fenced(lead.shard, lead.epoch, _epoch_found(lead.epoch, kvs, ()))
                    reason = "the fence's record changes all the time"
                case Conflict():
                    raise AssertionError("a conflict answers its failure branch")
                case Unknown(reason):
                    pass  # repeatable: the record either is what was read or already what we wrote
        raise WriteUnknown(lead.shard, lead.epoch, reason)

    async def write(self, lead: Lead, *ops: Put | Delete | Range) -> tuple[OpResult, ...]:
        """Apply `ops` in one transaction if `lead`'s epoch still holds; their results.

        Raises Fenced, LeadershipLost, WriteUnknown (it may be applied later, but never after the next leader's
        claim), and what the store raises.
        """
        return await self._commit(lead, tuple(self._own(op) for op in ops))

    async def read(self, lead: Lead, *ranges: Range) -> tuple[RangeResult, ...]:
        """Read below the prefix in a transaction that also writes, so that it goes through etcd's log: a plain
        "linearizable" read may be stale (etcd #20418). One writing transaction a call: for loading, not for serving.

        Raises as `write` does.
        """
        touch = Put(self.record(lead.shard), b"%d" % lead.epoch)
        results = await self._commit(lead, (touch, *(self._own(op) for op in ranges)))
        return tuple(result for result in results if isinstance(result, RangeResult))

    async def _commit(self, lead: Lead, ops: tuple[Op, ...]) -> tuple[OpResult, ...]:
        lead.check()
        guard = (
            modified_at(self._keyspace.leader(lead.shard), revision_of(lead.epoch)),
            Compare(self.record(lead.shard), Target.VALUE, b"%d" % lead.epoch),
        )
        why = (Range(self._keyspace.leader(lead.shard)), Range(self.record(lead.shard)))
        try:
            answer = await self._store.commit(Txn(guard, ops, why))
        except asyncio.CancelledError:  # it may have been sent, and be applied when nobody asks for it any more
            lead.note_unknown("cancelled while it was under way")
            raise
        match answer:
            case Committed(results=results):
                return results
            case Conflict(results=(RangeResult(kvs=leaders), RangeResult(kvs=records))):
                raise Fenced(lead.shard, lead.epoch, _epoch_found(lead.epoch, leaders, records))
            case Conflict():
                raise AssertionError("a conflict answers its failure branch")
            case Unknown(reason):
                lead.note_unknown(reason)
                raise WriteUnknown(lead.shard, lead.epoch, reason)

    def _own(self, op: Put | Delete | Range) -> Put | Delete | Range:
        """`op`, if it touches nothing but data below the prefix."""
        end = op.key + b"\x00" if isinstance(op, Put) or not op.range_end else op.range_end
        fence = self._prefix + b"fence/"
        is_open = end == b"\x00"  # etcd's way to say "and all keys behind it"
        is_inside = op.key.startswith(self._prefix) and end <= prefix_end(self._prefix) and not is_open
        if not is_inside or (op.key < prefix_end(fence) and end > fence):
            raise ValueError(f"[{op.key!r}, {end!r}) is not data below {self._prefix!r} and outside of {fence!r}")
        return op


def _epoch_found(epoch: int, leaders: tuple[KeyValue, ...], records: tuple[KeyValue, ...]) -> int | None:
    """The epoch that stood in the way of a write: that of another leader, else another registered one."""
    if not leaders:
        return None
    if leaders[0].mod_revision != revision_of(epoch):
        return epoch_of(generation_of(epoch), leaders[0].mod_revision)
    return int(records[0].value) if records else None
