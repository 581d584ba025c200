"""The election: T1, by which a shard that nobody leads is claimed.

Law: protocol.md A.3. Claims are batched and idempotent (the same session in the key is success), and each shard's
stands or falls for itself. A shard whose leaders keep failing is left alone for longer and longer. When to claim is
decided in `core.duties`; what is done with an answer, by whoever asked.
"""

from collections.abc import Mapping, Sequence
from typing import assert_never

from shardlead.clock import NS_PER_S, Clock
from shardlead.cluster.answers import ClaimAnswer, Claimed, LedBy, Nobody, NotYet, SessionOver, Undecided
from shardlead.cluster.batch import BATCH
from shardlead.cluster.history import Histories
from shardlead.cluster.leaders import Leaders
from shardlead.cluster.session import Session
from shardlead.core import duties
from shardlead.core.keyspace import Keyspace, encode
from shardlead.core.model import History
from shardlead.errors import LeaseGone, StoreError
from shardlead.store.base import (
    Committed,
    Conflict,
    Delete,
    OpResult,
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
)


class Election:
    """One session's elections."""

    def __init__(
        self,
        store: Store,
        keyspace: Keyspace,
        session: Session,
        leaders: Leaders,
        histories: Histories,
        *,
        clock: Clock,
    ) -> None:
        self._store = store
        self._keys = keyspace
        self._session = session
        self._leaders = leaders
        self._histories = histories
        self._clock = clock
        self._brakes: dict[int, tuple[int, int]] = {}  # shard -> revision of its history, and until when it is braked

    async def claim(self, shards: Sequence[int], reason: str) -> dict[int, ClaimAnswer]:
        """Claim these shards (at most BATCH). Repeating a claim whose outcome is unknown is safe."""
        assert len(shards) <= BATCH, f"{len(shards)} shards in one claim"
        keys, session = self._keys, self._session
        answers: dict[int, ClaimAnswer] = {}
        try:
            former = await self._histories.read(shards)
            answers, shards = self._brake(former)
            if not shards:
                return answers
            name, sid, ttl_s = session.name, session.sid, session.ttl_s
            written = {shard: self._histories.next(former[shard], reason, name, sid, ttl_s) for shard in shards}
            nested = tuple(self._claim_one(shard, former[shard][1], written[shard]) for shard in shards)
            outcome = await self._store.commit(
                Txn(
                    (*session.guards(), absent(keys.eviction(session.name))),
                    nested,
                    (Range(keys.worker(session.name)), Range(keys.eviction(session.name)), Range(keys.meta)),
                )
            )
        except LeaseGone:
            return answers | dict.fromkeys(shards, SessionOver("the lease is gone"))
        except StoreError as exc:
            return answers | dict.fromkeys(shards, Undecided(str(exc)))
        match outcome:
            case Committed(revision, results):
                for shard, result in zip(shards, results, strict=True):
                    answers[shard] = self._claim_answer(shard, former[shard][0], written[shard], revision, result)
                return answers
            case Conflict(_, results):
                return answers | dict.fromkeys(shards, SessionOver(self._why_refused(results)))
            case Unknown(why):
                return answers | dict.fromkeys(shards, Undecided(why))
            case _:
                assert_never(outcome)

    async def clear(self, shard: int, revision: int) -> bool:
        """Delete a leader record without a lease: it is no session's, so nobody's right is touched (R1) and no lease's
        end would ever take it away. Whether it is gone. Raises StoreError."""
        key = self._keys.leader(shard)
        guards = (*self._session.guards(), modified_at(key, revision), leased_by(key, 0))
        return isinstance(await self._store.commit(Txn(guards, (Delete(key),))), Committed)

    def _brake(
        self, former: Mapping[int, tuple[History | None, int]]
    ) -> tuple[dict[int, ClaimAnswer], tuple[int, ...]]:
        """Set aside the shards whose leaders keep failing; the others may be claimed now.

        The cluster's tick, which does not count every second, can shorten the brake and never lengthen it, which is
        counted here, from when this history was first seen.
        """
        now_ns = self._clock.now_ns()
        answers: dict[int, ClaimAnswer] = {}
        for shard, (history, revision) in former.items():
            brake_s = duties.brake_s(history.short_tenures) if history is not None else 0.0
            if history is None or not brake_s or history.sid == self._session.sid:
                self._brakes.pop(shard, None)
                continue
            seen_revision, until_ns = self._brakes.get(shard, (0, 0))
            if seen_revision != revision:
                wait_s = brake_s - duties.passed_s(self._histories.ticks_since(history))
                until_ns = now_ns + int(wait_s * NS_PER_S)
                self._brakes[shard] = (revision, until_ns)
            if until_ns > now_ns:
                answers[shard] = NotYet((until_ns - now_ns) / NS_PER_S)
        return answers, tuple(shard for shard in former if shard not in answers)

    def _claim_one(self, shard: int, former_revision: int, history: History) -> Txn:
        keys, session = self._keys, self._session
        return Txn(
            (absent(keys.leader(shard)), modified_at(keys.history(shard), former_revision)),
            (
                Put(keys.leader(shard), self._leaders.own_record(), session.lease),
                Put(keys.history(shard), encode(history)),
                Delete(keys.offer(session.name, shard)),
            ),
            (Range(keys.leader(shard)),),
        )

    def _claim_answer(
        self, shard: int, former: History | None, history: History, revision: int, result: OpResult
    ) -> Claimed | LedBy | Nobody:
        assert isinstance(result, TxnResult), "a nested transaction answers with its own result"
        if not result.succeeded:
            holder = self._leaders.holder(result.results[0])
            if not isinstance(holder, LedBy) or holder.leader.sid != self._session.sid:
                return holder
            revision = holder.revision  # an earlier try of ours was applied; what it knew of the past is in history
            if former is not None and former.sid == self._session.sid:
                history = former
        self._histories.keep(shard, history)
        before = former if former is None or former.sid != self._session.sid else None
        ttl_s = before.ttl_s if before is not None else 0.0
        return Claimed(revision, history.clean, ttl_s or self._session.ttl_s, history.short_tenures)

    def _why_refused(self, results: Sequence[OpResult]) -> str:
        mine, eviction, meta = (result.kvs if isinstance(result, RangeResult) else () for result in results)
        if not mine or mine[0].lease != self._session.lease:
            return "the worker's record is gone or another's"
        if eviction:
            return "evicted"
        if not meta or meta[0].mod_revision != self._session.meta_revision:
            return "the cluster's meta has changed"
        return "refused by the store"
