"""etcd's behaviour as a pure state machine: keys with revisions, transactions, leases, compaction, what a watch sees.

For the embedded server and the simulator, which give it the time as an argument. It never awaits, never reads a
clock, never touches a disk. Its judge is a real etcd: tests feed both the same operations and compare the answers.

Law (etcd 3.4 and 3.5, measured):
    A transaction's guards, nested ones too, are all decided before anything of it is written.
    It is refused whole, before any effect: for its shape (operations, keys given twice), or because the branch that
    was taken names a lease that does not exist or reads a revision that is not there.
    All that one transaction, one revocation or one expiry changes is one revision, and one message of a watch.
    A lease never ends before its time; it may end up to `expiry_lag_ns` later.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Final

from shardlead.clock import NS_PER_S
from shardlead.errors import Compacted, StoreRejected
from shardlead.store.base import (
    TXN_OPS_MAX,
    Compare,
    Delete,
    DeleteResult,
    Event,
    Grant,
    KeyValue,
    LeaseKeys,
    OpResult,
    Put,
    PutResult,
    Range,
    RangeResult,
    Target,
    Txn,
    TxnResult,
    WatchBatch,
)
from shardlead.store.shape import FROM_KEY, check_key, check_keys_written, check_shape, is_met, is_within

MIN_TTL_S: Final = 2  # ceil(1.5 x election time-out), etcd's default
MAX_TTL_S: Final = 9_000_000_000  # etcd's own
HISTORY_EVENTS_MAX: Final = 100_000  # beyond either the older half is compacted
HISTORY_BYTES_MAX: Final = 64 * 1_048_576  # keys and values that were overwritten or deleted
WATCH_REVISIONS_MAX: Final = 1_000  # in one message, as etcd has it
WATCH_BYTES_MAX: Final = 4 * 1_048_576  # a message ends with the revision that passes it

NOT_FOUND: Final = 5
RESOURCE_EXHAUSTED: Final = 8
FAILED_PRECONDITION: Final = 9
OUT_OF_RANGE: Final = 11

FUTURE_REVISION: Final = "etcdserver: mvcc: required revision is a future revision"
LEASE_NOT_FOUND: Final = "etcdserver: requested lease not found"


@dataclass(slots=True)
class Lease:
    """A living lease. Its keys are those whose present version names it."""

    lease: int
    ttl_s: int
    expiry_ns: int
    keys: set[bytes] = field(default_factory=set)


class Model:
    """One etcd, in memory.

    Refusals are raised as StoreRejected with etcd's gRPC code and message (Compacted for a lost revision); whatever
    was refused had no effect. `revision` is the last one used; a new store stands at 1, as etcd does.
    """

    def __init__(
        self,
        *,
        rng: Random,
        revision: int = 1,
        min_ttl_s: int = MIN_TTL_S,
        expiry_lag_ns: int = 0,
        history_events_max: int = HISTORY_EVENTS_MAX,
    ) -> None:
        assert revision >= 1
        self.revision = revision
        self.compacted = -1 if revision == 1 else revision  # what another process wrote before is not here
        self.min_ttl_s = min_ttl_s
        self.expiry_lag_ns = expiry_lag_ns
        self._history_events_max = history_events_max
        self._rng = rng
        self._versions: dict[bytes, list[KeyValue]] = {}  # oldest first; a deletion is a version 0
        self._keys: list[bytes] = []  # those of _versions, sorted
        self._log: list[tuple[Event, ...]] = []  # one entry a revision, without gaps, the last is self.revision's
        self._events = 0
        self._bytes = 0
        self._present_bytes = 0
        self._leases: dict[int, Lease] = {}

    def __repr__(self) -> str:
        return (
            f"Model(revision={self.revision}, compacted={self.compacted}, keys={len(self._keys)}, "
            f"leases={len(self._leases)}, events={self._events})"
        )

    @property
    def size_bytes(self) -> int:
        """Keys and values, in all the versions that are kept."""
        return self._bytes

    def copy(self) -> "Model":
        """An independent twin, its random numbers included."""
        rng = Random()
        rng.setstate(self._rng.getstate())
        twin = Model(
            rng=rng,
            revision=self.revision,
            min_ttl_s=self.min_ttl_s,
            expiry_lag_ns=self.expiry_lag_ns,
            history_events_max=self._history_events_max,
        )
        twin.compacted = self.compacted
        twin._versions = {key: list(versions) for key, versions in self._versions.items()}
        twin._keys = list(self._keys)
        twin._log = list(self._log)
        twin._events = self._events
        twin._bytes, twin._present_bytes = self._bytes, self._present_bytes
        twin._leases = {lease: replace(each, keys=set(each.keys)) for lease, each in self._leases.items()}
        return twin

    # --- reading and writing ---------------------------------------------------------------------------------

    def range(self, op: Range) -> RangeResult:
        """Read. Raises StoreRejected for an empty key or a future revision, Compacted."""
        check_key(op.key)
        if op.revision > self.revision:
            raise StoreRejected(OUT_OF_RANGE, FUTURE_REVISION)
        if 0 < op.revision < self.compacted:
            raise Compacted(self.compacted)
        return self._read(op, self.revision)

    def put(self, op: Put) -> PutResult:
        """Write one key. Raises StoreRejected for an empty key or an unknown lease."""
        result = self.txn(Txn((), (op,))).results[0]
        assert isinstance(result, PutResult)
        return result

    def delete(self, op: Delete) -> DeleteResult:
        """Delete. A revision is used only if a key was there. Raises StoreRejected for an empty key."""
        result = self.txn(Txn((), (op,))).results[0]
        assert isinstance(result, DeleteResult)
        return result

    def txn(self, txn: Txn) -> TxnResult:
        """Decide all guards, check the branch that is taken, then do it. Raises StoreRejected before any effect."""
        check_shape(txn, TXN_OPS_MAX)
        check_keys_written(txn.success)
        check_keys_written(txn.failure)
        taken = self._decide(txn)
        self._check_taken(taken)
        changes: list[Event] = []
        result = self._apply(taken, changes)
        self._commit(changes)
        return _stamped(result, self.revision)

    def compact(self, revision: int) -> None:
        """Forget what was overwritten or deleted before or at `revision`. Raises StoreRejected, Compacted."""
        if revision <= max(self.compacted, 0):
            raise Compacted(max(self.compacted, 0))
        if revision > self.revision:
            raise StoreRejected(OUT_OF_RANGE, FUTURE_REVISION)
        self._forget(revision)

    # --- leases ----------------------------------------------------------------------------------------------

    @property
    def leases(self) -> tuple[int, ...]:
        """All living leases, the first to end first."""
        return tuple(sorted(self._leases, key=lambda lease: (self._leases[lease].expiry_ns, lease)))

    def grant(self, ttl_s: int, now_ns: int, lease: int = 0) -> Grant:
        """A new lease of at least `min_ttl_s`; with `lease` 0 under an id of our choice. Raises StoreRejected."""
        if lease in self._leases:
            raise StoreRejected(FAILED_PRECONDITION, "etcdserver: lease already exists")
        if ttl_s > MAX_TTL_S:
            raise StoreRejected(OUT_OF_RANGE, "etcdserver: too large lease TTL")
        while lease == 0 or lease in self._leases:
            lease = self._rng.getrandbits(63)
        granted_s = max(ttl_s, self.min_ttl_s)
        self._leases[lease] = Lease(lease, granted_s, now_ns + granted_s * NS_PER_S)
        return Grant(lease, granted_s)

    def renew(self, lease: int, now_ns: int) -> int:
        """The TTL granted anew, in seconds; 0 if there is no such lease. One that is overdue ends right here: etcd
        lets such a renewal wait for the end, too."""
        found = self._leases.get(lease)
        if found is None:
            return 0
        if found.expiry_ns <= now_ns:
            self.revoke(lease)
            return 0
        found.expiry_ns = now_ns + found.ttl_s * NS_PER_S
        return found.ttl_s

    def revoke(self, lease: int) -> None:
        """End a lease and delete its keys, in one revision. Raises StoreRejected if there is none."""
        found = self._leases.get(lease)
        if found is None:
            raise StoreRejected(NOT_FOUND, LEASE_NOT_FOUND)
        changes: list[Event] = []
        for key in sorted(found.keys):
            self._write_deletion(key, changes)
        del self._leases[lease]
        self._commit(changes)

    def time_to_live(self, lease: int, now_ns: int) -> LeaseKeys | None:
        """What is left of a lease (whole seconds, rounded down) and its keys; None if there is none."""
        found = self._leases.get(lease)
        if found is None:
            return None
        left_s = max(0, found.expiry_ns - now_ns) // NS_PER_S
        return LeaseKeys(lease, left_s, found.ttl_s, tuple(sorted(found.keys)))

    def expire(self, now_ns: int) -> tuple[int, ...]:
        """End every lease whose time and the server's lag are over, each in a revision of its own, the longest
        overdue first. The leases that ended."""
        due = [each for each in self._leases.values() if each.expiry_ns + self.expiry_lag_ns <= now_ns]
        due.sort(key=lambda each: (each.expiry_ns, each.lease))
        for each in due:
            self.revoke(each.lease)
        return tuple(each.lease for each in due)

    def next_expiry_ns(self) -> int | None:
        """When `expire` will next have something to do if nothing is renewed."""
        if not self._leases:
            return None
        return min(each.expiry_ns for each in self._leases.values()) + self.expiry_lag_ns

    # --- watching --------------------------------------------------------------------------------------------

    def events_since(
        self,
        revision: int,
        key: bytes,
        range_end: bytes = b"",
        *,
        until: int | None = None,
        revisions_max: int = WATCH_REVISIONS_MAX,
    ) -> tuple[WatchBatch, int]:
        """What a watch of [key, range_end) gets next, from `revision` on: one message of at most `revisions_max`
        revisions and about WATCH_BYTES_MAX, and the revision to go on from. No revision is split over messages, and
        like etcd's the header runs ahead of the events. With `until`, as a member sees it that has applied only so
        far. Raises Compacted."""
        last = self.revision if until is None else min(until, self.revision)
        if revision < self.compacted:
            raise Compacted(self.compacted)
        first = self.revision - len(self._log) + 1
        start = max(revision, first)
        found: list[Event] = []
        taken = size = 0
        following = start
        for events in self._log[start - first : last - first + 1] if start <= last else ():
            following += 1
            matching = [event for event in events if is_within(event.kv.key, key, range_end)]
            if matching:
                found += matching
                taken += 1
                size += sum(_size(event.kv) for event in matching)
                if taken == revisions_max or size > WATCH_BYTES_MAX:
                    break
        return WatchBatch(last, tuple(found)), following

    def log_since(self, revision: int) -> Iterator[tuple[int, tuple[Event, ...]]]:
        """Every revision from `revision` on that is still known, and what it changed."""
        first = self.revision - len(self._log) + 1
        for number in range(max(revision, first), self.revision + 1):
            yield number, self._log[number - first]

    # --- inside ----------------------------------------------------------------------------------------------

    def _read(self, op: Range, revision: int) -> RangeResult:
        """`revision` is what "the present" means here: within a transaction that has written, its own."""
        at = op.revision if op.revision > 0 else revision
        found = [kv for key in self._keys_within(op.key, op.range_end) if (kv := self._at(key, at)) is not None]
        if op.count_only:
            return RangeResult(revision, (), len(found))
        more = 0 < op.limit < len(found)
        kvs = found[: op.limit] if more else found
        if op.keys_only:
            kvs = [replace(kv, value=b"") for kv in kvs]
        return RangeResult(revision, tuple(kvs), len(found), more)

    def _keys_within(self, key: bytes, range_end: bytes) -> Sequence[bytes]:
        if not range_end:
            return (key,) if key in self._versions else ()
        start = bisect_left(self._keys, key)
        if range_end == FROM_KEY:
            return self._keys[start:]
        return self._keys[start : bisect_left(self._keys, range_end)]

    def _at(self, key: bytes, revision: int) -> KeyValue | None:
        for kv in reversed(self._versions.get(key, ())):
            if kv.mod_revision <= revision:
                return kv if kv.version else None
        return None

    def _now(self, key: bytes) -> KeyValue | None:
        versions = self._versions.get(key)
        return versions[-1] if versions and versions[-1].version else None

    def _decide(self, txn: Txn) -> "_Taken":
        succeeded = all(self._is_true(compare) for compare in txn.compares)
        branch = txn.success if succeeded else txn.failure
        return _Taken(succeeded, tuple(self._decide(op) if isinstance(op, Txn) else op for op in branch))

    def _is_true(self, compare: Compare) -> bool:
        present = [kv for key in self._keys_within(compare.key, compare.range_end) if (kv := self._now(key))]
        if not present:
            # etcd: an absent key is compared as zeros, except that nothing is true of an absent value
            absent = KeyValue(compare.key, b"", 0, 0, 0)
            return compare.target is not Target.VALUE and is_met(compare, absent)
        return all(is_met(compare, kv) for kv in present)

    def _check_taken(self, taken: "_Taken") -> None:
        ops = list(taken.flat())
        for op in ops:  # etcd looks at all leases before the first read
            if isinstance(op, Put) and op.lease and op.lease not in self._leases:
                raise StoreRejected(NOT_FOUND, LEASE_NOT_FOUND)
        for op in ops:
            if isinstance(op, Range) and op.revision:
                if op.revision > self.revision:
                    raise StoreRejected(OUT_OF_RANGE, FUTURE_REVISION)
                if op.revision < self.compacted:
                    raise Compacted(self.compacted)

    def _apply(self, taken: "_Taken", changes: list[Event]) -> TxnResult:
        results: list[OpResult] = []
        for op in taken.ops:
            match op:
                case Put():
                    self._write(op, changes)
                    results.append(PutResult(self.revision + 1))
                case Delete():
                    doomed = [key for key in self._keys_within(op.key, op.range_end) if self._now(key)]
                    for key in doomed:
                        self._write_deletion(key, changes)
                    results.append(DeleteResult(self.revision + bool(changes), len(doomed)))
                case Range():
                    results.append(self._read(op, self.revision + bool(changes)))
                case _Taken():
                    results.append(self._apply(op, changes))
        return TxnResult(0, taken.succeeded, tuple(results))

    def _write(self, op: Put, changes: list[Event]) -> None:
        before = self._now(op.key)
        revision = self.revision + 1
        if before is None:
            kv = KeyValue(op.key, op.value, revision, revision, 1, op.lease)
        else:
            self._leave(before)
            kv = KeyValue(op.key, op.value, before.create_revision, revision, before.version + 1, op.lease)
        if op.lease:
            self._leases[op.lease].keys.add(op.key)
        self._present_bytes += _size(kv)
        self._append(kv)
        changes.append(Event(is_delete=False, kv=kv))

    def _write_deletion(self, key: bytes, changes: list[Event]) -> None:
        before = self._now(key)
        assert before is not None, "only what is there is deleted"
        self._leave(before)
        tombstone = KeyValue(key, b"", 0, self.revision + 1, 0)
        self._append(tombstone)
        changes.append(Event(is_delete=True, kv=tombstone))

    def _append(self, kv: KeyValue) -> None:
        self._bytes += _size(kv)
        versions = self._versions.get(kv.key)
        if versions is None:
            self._versions[kv.key] = [kv]
            insort(self._keys, kv.key)
        else:
            versions.append(kv)

    def _leave(self, kv: KeyValue) -> None:
        self._present_bytes -= _size(kv)
        if kv.lease:
            self._leases[kv.lease].keys.discard(kv.key)

    def _commit(self, changes: list[Event]) -> None:
        if not changes:
            return
        self.revision += 1
        self._log.append(tuple(changes))
        self._events += len(changes)
        if self._events > self._history_events_max or self._bytes - self._present_bytes > HISTORY_BYTES_MAX:
            self._forget_older_half()

    def _forget_older_half(self) -> None:
        kept, half = 0, self._events // 2
        for back, events in enumerate(reversed(self._log)):
            kept += len(events)
            if kept > half:
                self._forget(self.revision - back)
                return

    def _forget(self, revision: int) -> None:
        first = self.revision - len(self._log) + 1
        dropped = self._log[: max(0, revision - first)]  # that of `revision` itself stays: a watch may begin there
        touched = {event.kv.key for events in self._log[: max(0, revision - first + 1)] for event in events}
        self._log = self._log[len(dropped) :]
        self._events -= sum(len(events) for events in dropped)
        self.compacted = revision
        gone: set[bytes] = set()
        for key in touched:
            versions = self._versions.get(key)
            if versions is None:
                continue
            last = max((at for at, kv in enumerate(versions) if kv.mod_revision <= revision), default=0)
            kept = versions[last:]
            self._bytes -= sum(_size(kv) for kv in versions[:last])
            if not kept[0].version and kept[0].mod_revision <= revision:
                self._bytes -= _size(kept[0])
                kept = kept[1:]
            if kept:
                self._versions[key] = kept
            else:
                del self._versions[key]
                gone.add(key)
        if gone:
            self._keys = [key for key in self._keys if key not in gone]


@dataclass(frozen=True, slots=True)
class _Taken:
    """A transaction after its guards were decided: the branch taken, nested ones likewise."""

    succeeded: bool
    ops: tuple["Put | Delete | Range | _Taken", ...]

    def flat(self) -> Iterator[Put | Delete | Range]:
        """All its operations, nested ones in place."""
        for op in self.ops:
            if isinstance(op, _Taken):
                yield from op.flat()
            else:
                yield op


def _stamped(result: TxnResult, revision: int) -> TxnResult:
    """With the transaction's revision, which is known only when all of it is done, in the nested ones too."""
    results = tuple(_stamped(each, revision) if isinstance(each, TxnResult) else each for each in result.results)
    return TxnResult(revision, result.succeeded, results)


def _size(kv: KeyValue) -> int:
    return len(kv.key) + len(kv.value)
