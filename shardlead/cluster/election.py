"""The transactions by which leadership is taken, proved, passed on and given up: T1, T3, T4, T5, T5s and the audit.

Law: protocol.md A.3. The epoch of a leadership is the mod_revision of `leaders/<shard>`; here it is called
`revision`, without the operator's generation. Claims are idempotent (the same session in the key is success),
deletes are guarded, a handoff names the exact want and the exact record of its target. Every answer is one of a few
plain values; `Undecided` means: ask again, do not assume. What is done with an answer is decided elsewhere.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, assert_never

from shardlead.clock import NS_PER_S, Clock
from shardlead.cluster.session import Session
from shardlead.core import duties
from shardlead.core.keyspace import Keyspace, decode, encode
from shardlead.core.model import (
    PREVIOUS_MAX,
    History,
    LeaderRecord,
    Offer,
    PastLeader,
    Want,
    WorkerRecord,
)
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
    TxnResult,
    Unknown,
    absent,
    leased_by,
    modified_at,
)

log = logging.getLogger("shardlead.election")

BATCH: Final = 64  # shards in one transaction; 126 would fit (protocol.md A.3), 64 keeps each under a few ms
LOGGED_MAX: Final = 1_000  # damaged records remembered as already logged
SHORT_TENURE_S: Final = 10.0  # a tenure that ends without a clean close sooner than this counts as short


@dataclass(frozen=True, slots=True)
class Claimed:
    """Ours under `revision`. `is_clean`: the former tenure closed its object and its work had ended; if not,
    `former_ttl_s` is what its lease could still allow."""

    revision: int
    is_clean: bool
    former_ttl_s: float
    short_tenures: int


@dataclass(frozen=True, slots=True)
class LedBy:
    """Another session leads it."""

    leader: LeaderRecord
    revision: int


@dataclass(frozen=True, slots=True)
class Nobody:
    """Nobody leads it (any more)."""


@dataclass(frozen=True, slots=True)
class NotYet:
    """Nobody leads it, and nobody should for `wait_s` more seconds: its last tenures were all short."""

    wait_s: float


@dataclass(frozen=True, slots=True)
class Undecided:
    """The store gave no answer that decides."""

    reason: str


@dataclass(frozen=True, slots=True)
class SessionOver:
    """The transaction was refused because our record is gone, evicted, or the cluster changed its shape."""

    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """Applied, under this revision."""

    revision: int


@dataclass(frozen=True, slots=True)
class TargetGone:
    """The leadership is still ours; the target of the handoff is gone or wants it no more."""

    reason: str


ClaimAnswer = Claimed | LedBy | Nobody | NotYet | Undecided | SessionOver
PassAnswer = Done | LedBy | Nobody | Undecided
HandOffAnswer = PassAnswer | TargetGone


class Election:
    """One session's elections."""

    def __init__(self, store: Store, keyspace: Keyspace, session: Session, *, clock: Clock) -> None:
        self._store = store
        self._keys = keyspace
        self._session = session
        self._clock = clock
        self._histories: dict[int, History] = {}
        self._brakes: dict[int, tuple[int, int]] = {}  # shard -> revision of its history, and until when it is braked
        self._logged: set[tuple[bytes, int]] = set()

    # --- T1 ---

    async def claim(self, shards: Sequence[int], reason: str) -> dict[int, ClaimAnswer]:
        """Claim these shards (at most BATCH). Repeating a claim whose outcome is unknown is safe."""
        assert len(shards) <= BATCH, f"{len(shards)} shards in one claim"
        keys, session = self._keys, self._session
        answers: dict[int, ClaimAnswer] = {}
        try:
            former = await self._read_histories(shards)
            answers, shards = self._brake(former)
            if not shards:
                return answers
            name, sid, ttl_s = session.name, session.sid, session.ttl_s
            written = {shard: self._next_history(former[shard], reason, name, sid, ttl_s) for shard in shards}
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

    def _brake(
        self, former: Mapping[int, tuple[History | None, int]]
    ) -> tuple[dict[int, ClaimAnswer], tuple[int, ...]]:
        """Set aside the shards whose leaders keep failing; the others may be claimed now.

        `since` is another machine's wall clock: it can shorten the brake and never lengthen it, which is counted
        here, from when this history was first seen.
        """
        now_s, now_ns = self._clock.wall_s(), self._clock.now_ns()
        answers: dict[int, ClaimAnswer] = {}
        for shard, (history, revision) in former.items():
            brake_s = duties.brake_s(history.short_tenures) if history is not None else 0.0
            if history is None or not brake_s or history.sid == self._session.sid:
                self._brakes.pop(shard, None)
                continue
            seen_revision, until_ns = self._brakes.get(shard, (0, 0))
            if seen_revision != revision:
                wait_s = min(brake_s, history.since + brake_s - now_s)
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
                Put(keys.leader(shard), self._record(), session.lease),
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
            holder = self._holder(result.results[0])
            if not isinstance(holder, LedBy) or holder.leader.sid != self._session.sid:
                return holder
            revision = holder.revision  # an earlier try of ours was applied; what it knew of the past is in history
            if former is not None and former.sid == self._session.sid:
                history = former
        self._histories[shard] = history
        before = former if former is None or former.sid != self._session.sid else None
        ttl_s = before.ttl_s if before is not None else 0.0
        return Claimed(revision, history.clean, ttl_s or self._session.ttl_s, history.short_tenures)

    def _next_history(
        self, former: tuple[History | None, int], reason: str, worker: str, sid: str, ttl_s: float
    ) -> History:
        """What is remembered from now on: the present tenure and how the former one ended."""
        before, revision = former
        now_s = self._clock.wall_s()
        if before is None:
            return History(worker=worker, sid=sid, since=now_s, reason=reason, clean=True, ttl_s=ttl_s)
        is_short = not before.ended and now_s - before.since < SHORT_TENURE_S
        past = PastLeader(before.worker, revision, before.since)
        return replace(
            before,
            worker=worker,
            sid=sid,
            since=now_s,
            reason=reason,
            clean=before.ended and before.clean,
            short_tenures=before.short_tenures + 1 if is_short else before.short_tenures if before.ended else 0,
            ended=False,
            ttl_s=ttl_s,
            previous=(past, *before.previous)[:PREVIOUS_MAX],
        )

    def _why_refused(self, results: Sequence[OpResult]) -> str:
        mine, eviction, meta = (result.kvs if isinstance(result, RangeResult) else () for result in results)
        if not mine or mine[0].lease != self._session.lease:
            return "the worker's record is gone or another's"
        if eviction:
            return "evicted"
        if not meta or meta[0].mod_revision != self._session.meta_revision:
            return "the cluster's meta has changed"
        return "refused by the store"

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
                        answers[shard] = Done(led[shard]) if result.succeeded else self._holder(result.results[0])
                case _:
                    raise AssertionError(f"a committed T3 answers its put first: {outcome}")
        return answers

    # --- T4, T5, T5s ---

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
        """T4: delete our key, with an offer to the first of `heirs` whose lease stands. A newer key of our own
        session is deleted as well.

        Done, LedBy and Nobody all mean that it is over; only Undecided must be repeated.
        """
        keys, session = self._keys, self._session
        try:
            history = self._histories.get(shard)  # written by our own claim, and by nobody else since
            if history is None:
                history = (await self._read_histories((shard,)))[shard][0]
            ended = replace(
                history or self._next_history((None, 0), why, session.name, session.sid, session.ttl_s),
                since=self._clock.wall_s(),
                reason=why,
                clean=is_clean,
                ended=True,
                short_tenures=(history.short_tenures + 1 if history else 1) if is_failure else 0,
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
                self._histories.pop(shard, None)
                return Done(done)
            case Unknown(reason):
                return Undecided(reason)
            case Conflict(_, results):
                holder = self._holder(results[0])
                if isinstance(holder, LedBy) and holder.leader.sid == session.sid:
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
            history = self._histories.get(shard)
            if history is None:
                history = (await self._read_histories((shard,)))[shard][0]
            moved = replace(
                self._next_history((history, revision), want.reason, want.target, want.target_sid, session.ttl_s),
                clean=is_clean,
                short_tenures=0,
            )
            leader = LeaderRecord(worker=want.target, sid=want.target_sid)
            offer = Offer(sid=want.target_sid, by=session.name, reason=want.reason, handoff=True, clean=is_clean)
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
                self._histories.pop(shard, None)
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
        holder = self._holder(results[0])
        if not isinstance(holder, LedBy):
            return holder
        if holder.leader.sid == want.target_sid:
            return Done(holder.revision)  # an earlier try was applied
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
        txn = Txn(guards, (Put(keys.leader(shard), self._record(), session.lease),), (Range(keys.leader(shard)),))
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
                holder = self._holder(results[0])
                if isinstance(holder, LedBy) and holder.leader.sid == session.sid:
                    if holder.revision > revision:
                        return Done(holder.revision)  # an earlier try was applied
                    return SessionOver("the worker's record is gone or another's")
                return holder
            case _:
                assert_never(outcome)

    # --- audit ---

    async def audit(self) -> dict[int, int] | SessionOver | Undecided:
        """What stands on our lease: shard -> revision. Costs the store no write (protocol.md A.7.8)."""
        try:
            lease_keys = await self._store.lease_keys(self._session.lease)
            shards = [
                place.shard for key in lease_keys.keys if (place := self._keys.parse(key)) and place.kind == "leaders"
            ]
            found: dict[int, int] = {}
            for shard, holder in (await self.read_leaders(shards)).items():
                if isinstance(holder, LedBy) and holder.leader.sid == self._session.sid:
                    found[shard] = holder.revision
        except LeaseGone:
            return SessionOver("the lease is gone")
        except StoreError as exc:
            return Undecided(str(exc))
        return found

    async def read_leaders(self, shards: Iterable[int]) -> dict[int, LedBy | Nobody]:
        """Who leads these shards now. Raises StoreError."""
        wanted = sorted(set(shards))
        found: dict[int, LedBy | Nobody] = {}
        for start in range(0, len(wanted), BATCH):
            part = wanted[start : start + BATCH]
            results = await read_many(self._store, [self._keys.leader(shard) for shard in part])
            found.update({shard: self._holder(result) for shard, result in zip(part, results, strict=True)})
        return found

    async def look_up(self, shards: Sequence[int]) -> tuple[int, dict[int, LedBy | Nobody]]:
        """Who leads these shards (at most BATCH), and the revision at which that was so. Raises StoreError."""
        results = await read_many(self._store, [self._keys.leader(shard) for shard in shards])
        revision = min(result.revision for result in results)
        return revision, {shard: self._holder(result) for shard, result in zip(shards, results, strict=True)}

    async def history(self, shard: int) -> History | None:
        """What is remembered of a shard. Raises StoreError."""
        return (await self._read_histories((shard,)))[shard][0]

    async def _read_histories(self, shards: Sequence[int]) -> dict[int, tuple[History | None, int]]:
        results = await read_many(self._store, [self._keys.history(shard) for shard in shards])
        found: dict[int, tuple[History | None, int]] = {}
        for shard, result in zip(shards, results, strict=True):
            if not result.kvs:
                found[shard] = (None, 0)
                continue
            kv = result.kvs[0]
            try:
                found[shard] = (decode(History, kv.key, kv.value), kv.mod_revision)
            except KeyspaceError as exc:
                log.warning("history ignored", extra={"shard": shard, "reason": exc.reason})
                found[shard] = (None, kv.mod_revision)
        return found

    def _record(self) -> bytes:
        return encode(LeaderRecord(worker=self._session.name, sid=self._session.sid))

    def _holder(self, result: OpResult) -> LedBy | Nobody:
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


async def read_many(store: Store, keys: Sequence[bytes]) -> list[RangeResult]:
    """Single keys, in one transaction of reads (at most BATCH). Raises StoreError."""
    if not keys:
        return []
    outcome = await store.commit(Txn((), tuple(Range(key) for key in keys)))
    if isinstance(outcome, Unknown):  # nothing was to be written, so nothing is in doubt: read one by one
        return [await store.read(Range(key)) for key in keys]
    return [result for result in outcome.results if isinstance(result, RangeResult)]


def _member(kv: KeyValue) -> Member | None:
    try:
        record = decode(WorkerRecord, kv.key, kv.value)
    except KeyspaceError:
        return None
    return Member(record, kv.lease, kv.create_revision, kv.mod_revision)
