"""Who leads, by the store's own word: look-ups, the proof T3, and the audit of what stands on our lease.

Law: protocol.md A.3, A.7.8. The epoch of a leadership is the mod_revision of `leaders/<shard>`; here it is called
`revision`, without the operator's generation. Nothing here changes who leads. A record that cannot be read is led by
nobody we know, and is not ours.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from shardlead.cluster.answers import Done, LedBy, Nobody, SessionOver, Undecided
from shardlead.cluster.batch import BATCH, read_many
from shardlead.cluster.session import Session
from shardlead.core.keyspace import Keyspace, decode, encode
from shardlead.core.model import LeaderRecord
from shardlead.errors import KeyspaceError, LeaseGone, StoreError
from shardlead.store.base import (
    Committed,
    Conflict,
    Op,
    OpResult,
    Put,
    Range,
    RangeResult,
    Store,
    Txn,
    TxnResult,
    Unknown,
    leased_by,
    modified_at,
)

log = logging.getLogger("shardlead.leaders")

LOGGED_MAX: Final = 1_000  # damaged records remembered as already logged


class Leaders:
    """The leaders of a cluster's shards, as one session asks for them."""

    def __init__(self, store: Store, keyspace: Keyspace, session: Session) -> None:
        self._store = store
        self._keys = keyspace
        self._session = session
        self._logged: set[tuple[bytes, int]] = set()

    # --- look-ups ---

    async def read(self, shards: Iterable[int]) -> dict[int, LedBy | Nobody]:
        """Who leads these shards now. Raises StoreError."""
        wanted = sorted(set(shards))
        found: dict[int, LedBy | Nobody] = {}
        for start in range(0, len(wanted), BATCH):
            part = wanted[start : start + BATCH]
            results = await read_many(self._store, [self._keys.leader(shard) for shard in part])
            found.update({shard: self.holder(result) for shard, result in zip(part, results, strict=True)})
        return found

    async def look_up(self, shards: Sequence[int]) -> tuple[int, dict[int, LedBy | Nobody]]:
        """Who leads these shards (at most BATCH), and the revision at which that was so. Raises StoreError."""
        results = await read_many(self._store, [self._keys.leader(shard) for shard in shards])
        revision = min(result.revision for result in results)
        return revision, {shard: self.holder(result) for shard, result in zip(shards, results, strict=True)}

    def holder(self, result: OpResult) -> LedBy | Nobody:
        """What a Range over one leader's key has found."""
        assert isinstance(result, RangeResult), "a Range answers with a RangeResult"
        if not result.kvs:
            return Nobody()
        kv = result.kvs[0]
        try:
            return LedBy(decode(LeaderRecord, kv.key, kv.value), kv.mod_revision)
        except KeyspaceError as exc:
            if len(self._logged) < LOGGED_MAX and (kv.key, kv.mod_revision) not in self._logged:
                self._logged.add((kv.key, kv.mod_revision))
                facts = {"key": kv.key.decode("ascii"), "reason": exc.reason}
                log.warning("leader record cannot be read: nobody leads this shard until it is deleted", extra=facts)
            return LedBy(LeaderRecord(worker="", sid=""), kv.mod_revision)

    def own_record(self) -> bytes:
        """What this session writes under the keys of its shards."""
        return encode(LeaderRecord(worker=self._session.name, sid=self._session.sid))

    # --- T3 ---

    async def confirm(self, led: Mapping[int, int]) -> dict[int, Done | LedBy | Nobody] | SessionOver | Undecided:
        """Prove that our record and these leaderships (shard -> revision) stand, with a write through the log.

        Done for those that are ours as believed; the others are answered with who has them. One answer for all
        where the record itself is not ours, or where any part stayed undecided.
        """
        keys, session = self._keys, self._session
        assert session.record is not None, "T3 is for workers"
        answers: dict[int, Done | LedBy | Nobody] = {}
        shards = sorted(led)
        for start in range(0, max(len(shards), 1), BATCH):
            part = shards[start : start + BATCH]
            checks: tuple[Op, ...] = tuple(
                Txn(
                    (modified_at(keys.leader(shard), led[shard]), leased_by(keys.leader(shard), session.lease)),
                    (),
                    (Range(keys.leader(shard)),),
                )
                for shard in part
            )
            own = keys.worker(session.name)
            txn = Txn((leased_by(own, session.lease),), (Put(own, encode(session.record), session.lease), *checks))
            try:
                outcome = await self._store.commit(txn)
            except LeaseGone:
                return SessionOver("the lease is gone")
            except StoreError as exc:
                return Undecided(str(exc))
            match outcome:
                case Conflict():
                    return SessionOver("the worker's record is gone or another's")
                case Unknown(reason):
                    return Undecided(reason)
                case Committed(_, (_, *results)):
                    for shard, result in zip(part, results, strict=True):
                        assert isinstance(result, TxnResult), "a nested transaction answers with its own result"
                        answers[shard] = Done(led[shard]) if result.succeeded else self.holder(result.results[0])
                case _:
                    raise AssertionError(f"a committed T3 answers its put first: {outcome}")
        return answers

    # --- audit ---

    async def audit(self) -> dict[int, int] | SessionOver | Undecided:
        """What stands on our lease: shard -> revision. Costs the store no write (protocol.md A.7.8)."""
        try:
            lease_keys = await self._store.lease_keys(self._session.lease)
            shards = [
                place.shard for key in lease_keys.keys if (place := self._keys.parse(key)) and place.kind == "leaders"
            ]
            found: dict[int, int] = {}
            for shard, holder in (await self.read(shards)).items():
                if isinstance(holder, LedBy) and holder.leader.sid == self._session.sid:
                    found[shard] = holder.revision
        except LeaseGone:
            return SessionOver("the lease is gone")
        except StoreError as exc:
            return Undecided(str(exc))
        return found
