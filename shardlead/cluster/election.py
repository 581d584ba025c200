"""The election: T1, by which a shard that nobody leads is claimed.

Law: protocol.md A.3. Claims are batched and idempotent (the same session in the key is success), and each shard's
stands or falls for itself. A shard whose leaders keep failing is left alone for longer and longer. When to claim is
decided in `core.duties`; what is done with an answer, by whoever asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class _End:
    """How a tenure ended, as it was first seen, and until when its shard is left alone."""

    revision: int  # of its history
    short_tenures: int  # in a row, this one included
    until_ns: int


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
        self._ends: dict[int, _End] = {}  # as they were first seen
        self._sent_ttl_s: dict[int, float] = {}  # of claims whose outcome is not known: as their histories have it

    async def claim(self, shards: Sequence[int], reason: str) -> dict[int, ClaimAnswer]:
        """Claim these shards (at most BATCH). Repeating a claim whose outcome is unknown is safe."""
        assert len(shards) <= BATCH, f"{len(shards)} shards in one claim"
        keys, session = self._keys, self._session
        answers: dict[int, ClaimAnswer] = {}
        try:
            former = await self._histories.read(shards)
            answers = self._braked(former)
            shards = tuple(shard for shard in shards if shard not in answers)
            if not shards:
                return answers
            written = {shard: self._written(shard, former[shard], reason) for shard in shards}
            self._sent_ttl_s.update({shard: history.ttl_s for shard, history in written.items()})
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

    def former_ttl_s(self, shard: int) -> float:
        """What the lease of the former tenure could still allow, by our last claim if nobody knows what became of it;
        else 0."""
        return self._sent_ttl_s.get(shard, 0.0)

    async def clear(self, shard: int, revision: int) -> bool:
        """Delete a leader record without a lease: it is no session's, so nobody's right is touched (R1) and no lease's
        end would ever take it away. Whether it is gone. Raises StoreError."""
        key = self._keys.leader(shard)
        guards = (*self._session.guards(), modified_at(key, revision), leased_by(key, 0))
        return isinstance(await self._store.commit(Txn(guards, (Delete(key),))), Committed)

    def _braked(self, former: Mapping[int, tuple[History | None, int]]) -> dict[int, ClaimAnswer]:
        """The shards that are left alone since their leaders keep failing; the others may be claimed now.

        How short a tenure was is told by the cluster's tick when its end is first seen, as a brake makes no tenure
        longer. The brake itself is counted here from then on; no clock of another machine plays a part.
        """
        now_ns = self._clock.now_ns()
        for shard, (history, revision) in former.items():
            if history is None:
                self._ends.pop(shard, None)
            elif shard not in self._ends or self._ends[shard].revision != revision:
                count = duties.short_tenures(history, self._histories.ticks_since(history))
                brake_s = duties.brake_s(count) if history.sid != self._session.sid else 0.0  # the host backs off
                self._ends[shard] = _End(revision, count, now_ns + int(brake_s * NS_PER_S))
        ends = {shard: self._ends[shard] for shard in former if shard in self._ends}
        return {
            shard: NotYet((end.until_ns - now_ns) / NS_PER_S) for shard, end in ends.items() if end.until_ns > now_ns
        }

    def _written(self, shard: int, former: tuple[History | None, int], reason: str) -> History:
        name, sid, ttl_s = self._session.name, self._session.sid, self._session.ttl_s
        end = self._ends.get(shard)
        count = end.short_tenures if end is not None else 0
        return self._histories.next(former, reason, name, sid, ttl_s, short_tenures=count)

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
        self._sent_ttl_s.pop(shard, None)
        if not result.succeeded:
            holder = self._leaders.holder(result.results[0])
            if not isinstance(holder, LedBy) or holder.leader.sid != self._session.sid:
                self._ends.pop(shard, None)  # it had not ended
                return holder
            revision = holder.revision  # an earlier try of ours was applied; what it knew of the past is in history
            if former is not None and former.sid == self._session.sid:
                history = former
        self._histories.keep(shard, history)
        return Claimed(revision, history.clean, history.ttl_s or self._session.ttl_s, history.short_tenures)

    def _why_refused(self, results: Sequence[OpResult]) -> str:
        mine, eviction, meta = (result.kvs if isinstance(result, RangeResult) else () for result in results)
        if not mine or mine[0].lease != self._session.lease:
            return "the worker's record is gone or another's"
        if eviction:
            return "evicted"
        if not meta or meta[0].mod_revision != self._session.meta_revision:
            return "the cluster's meta has changed"
        return "refused by the store"
