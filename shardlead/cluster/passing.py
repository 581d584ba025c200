"""The transactions by which a leadership is passed on or given up: T4 resigns, T5 hands off, T5s re-mints.

Law: protocol.md A.3. Deletes are guarded, a handoff names the exact want and the exact record of its target, and
each of them may be sent again: what an earlier try has done is read off the key. When to send which is decided in
`core.ownership`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

from shardlead.clock import Clock
from shardlead.cluster.answers import Done, HandOffAnswer, LedBy, PassAnswer, SessionOver, TargetGone, Undecided
from shardlead.cluster.history import Histories
from shardlead.cluster.leaders import Leaders
from shardlead.cluster.session import Session
from shardlead.core.keyspace import Keyspace, decode, encode
from shardlead.core.model import LeaderRecord, Offer, Want, WorkerRecord
from shardlead.core.shardmap import Member
from shardlead.errors import KeyspaceError, LeaseGone, StoreError
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
    Txn,
    Unknown,
    leased_by,
    modified_at,
)


class Passing:
    """How one session's leaderships end, or go on under a new epoch."""

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

    async def resign(
        self,
        shard: int,
        revision: int,
        heirs: Sequence[tuple[str, Member]],
        *,
        is_clean: bool,
        is_failure: bool,
        why: str,
    ) -> PassAnswer:
        """T4: delete our key, with an offer to the first of `heirs` whose lease stands.

        Done, Nobody, and LedBy another session all mean that it is over; Undecided must be repeated. LedBy our own: a
        re-mint was applied late, and that larger epoch has to be given up, too; nothing was sent for it.
        """
        keys, session = self._keys, self._session
        try:
            history = await self._histories.last(shard)
            ended = replace(
                history or self._histories.next((None, 0), why, session.name, session.sid, session.ttl_s),
                since=self._clock.wall_s(),
                reason=why,
                clean=is_clean,
                ended=True,
                tick=self._histories.tick,
                short_tenures=(history.short_tenures + 1 if history else 1) if is_failure else 0,
                ttl_s=max(session.ttl_s, history.ttl_s if history else 0.0),
            )
            writes: tuple[Op, ...] = (Delete(keys.leader(shard)), Put(keys.history(shard), encode(ended)))
            if heirs:
                name, member = heirs[0]
                offer = Offer(sid=member.record.sid, by=session.name, reason=why)
                writes = (*writes, Put(keys.offer(name, shard), encode(offer), member.lease))
            outcome = await self._store.commit(
                Txn((modified_at(keys.leader(shard), revision),), writes, (Range(keys.leader(shard)),))
            )
        except LeaseGone:  # the heir has died meanwhile; nothing was applied
            if not heirs:
                return Undecided("the store reports a missing lease where none was named")
            return await self.resign(shard, revision, heirs[1:], is_clean=is_clean, is_failure=is_failure, why=why)
        except StoreError as exc:
            return Undecided(str(exc))
        match outcome:
            case Committed(done):
                self._histories.forget(shard)
                return Done(done)
            case Unknown(reason):
                return Undecided(reason)
            case Conflict(_, results):
                holder = self._leaders.holder(results[0])
                if (  # the store's revisions have gone back
                    isinstance(holder, LedBy) and holder.leader.sid == session.sid and holder.revision < revision
                ):
                    return await self.resign(
                        shard, holder.revision, heirs, is_clean=is_clean, is_failure=is_failure, why=why
                    )
                return holder
            case _:
                assert_never(outcome)

    async def hand_off(
        self, shard: int, revision: int, want: Want, want_revision: int, target: Member, *, is_clean: bool
    ) -> HandOffAnswer:
        """T5: move leader, epoch, offer and history in one transaction, if the want and its target still stand."""
        keys, session = self._keys, self._session
        want_key, target_key = keys.want(session.name, shard), keys.worker(want.target)
        if target.lease != want.target_lease or target.record.sid != want.target_sid or target.record.state != "up":
            return TargetGone(f"worker {want.target} is gone or leaving")
        try:
            history = await self._histories.last(shard)
            former_ttl_s = max(session.ttl_s, history.ttl_s if history else 0.0)
            ttl_s = want.ttl_s or session.ttl_s  # the new tenure stands on the target's lease
            moved = self._histories.next(
                (history, revision),
                want.reason,
                want.target,
                want.target_sid,
                ttl_s if is_clean else max(ttl_s, former_ttl_s),
                is_clean=is_clean,
            )
            leader = LeaderRecord(worker=want.target, sid=want.target_sid)
            offer = Offer(
                sid=want.target_sid,
                by=session.name,
                reason=want.reason,
                handoff=True,
                clean=is_clean,
                ttl_s=former_ttl_s,
            )
            outcome = await self._store.commit(
                Txn(
                    (
                        modified_at(keys.leader(shard), revision),
                        modified_at(want_key, want_revision),
                        modified_at(target_key, target.mod_revision),
                    ),
                    (
                        Put(keys.leader(shard), encode(leader), want.target_lease),
                        Put(keys.offer(want.target, shard), encode(offer), want.target_lease),
                        Delete(want_key),
                        Put(keys.history(shard), encode(moved)),
                    ),
                    (Range(keys.leader(shard)), Range(want_key), Range(target_key)),
                )
            )
        except LeaseGone:
            return TargetGone(f"the lease of worker {want.target} is gone")
        except StoreError as exc:
            return Undecided(str(exc))
        match outcome:
            case Committed(done):
                self._histories.forget(shard)
                return Done(done)
            case Unknown(reason):
                return Undecided(reason)
            case Conflict(_, results):
                return await self._after_refusal(shard, revision, want, want_revision, target, results, is_clean)
            case _:
                assert_never(outcome)

    async def _after_refusal(
        self,
        shard: int,
        revision: int,
        want: Want,
        want_revision: int,
        target: Member,
        results: Sequence[OpResult],
        is_clean: bool,
    ) -> HandOffAnswer:
        holder = self._leaders.holder(results[0])
        if not isinstance(holder, LedBy):
            return holder
        if holder.leader.sid == want.target_sid:  # an earlier try was applied
            self._histories.forget(shard)
            return Done(holder.revision)
        if holder.revision != revision:
            return holder
        wants, targets = (result.kvs if isinstance(result, RangeResult) else () for result in results[1:])
        if not wants or wants[0].mod_revision != want_revision:
            return TargetGone("the want was withdrawn or replaced")
        if not targets or targets[0].mod_revision == target.mod_revision:
            return TargetGone(f"worker {want.target} is gone")
        fresh = _member(targets[0])
        if fresh is None:
            return TargetGone(f"the record of worker {want.target} cannot be read")
        return await self.hand_off(shard, revision, want, want_revision, fresh, is_clean=is_clean)

    async def remint(self, shard: int, revision: int) -> PassAnswer | SessionOver:
        """T5s: put our own key again, which gives the leadership a new epoch. Done carries it."""
        keys, session = self._keys, self._session
        guards: tuple[Compare, ...] = (
            modified_at(keys.leader(shard), revision),
            leased_by(keys.worker(session.name), session.lease),
        )
        txn = Txn(
            guards, (Put(keys.leader(shard), self._leaders.own_record(), session.lease),), (Range(keys.leader(shard)),)
        )
        try:
            outcome = await self._store.commit(txn)
        except LeaseGone:
            return SessionOver("the lease is gone")
        except StoreError as exc:
            return Undecided(str(exc))
        match outcome:
            case Committed(done):
                return Done(done)
            case Unknown(reason):
                return Undecided(reason)
            case Conflict(_, results):
                holder = self._leaders.holder(results[0])
                if isinstance(holder, LedBy) and holder.leader.sid == session.sid:
                    if holder.revision > revision:
                        return Done(holder.revision)  # an earlier try was applied
                    return SessionOver("the worker's record is gone or another's")
                return holder
            case _:
                assert_never(outcome)


def _member(kv: KeyValue) -> Member | None:
    try:
        record = decode(WorkerRecord, kv.key, kv.value)
    except KeyspaceError:
        return None
    return Member(record, kv.lease, kv.create_revision, kv.mod_revision)
