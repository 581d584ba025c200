"""The small interface to the store, in etcd's terms, and the values that cross it.

Law: every write is a transaction with a guard; its outcome is Committed, Conflict or Unknown. A time-out is
Unknown, never Conflict: the transaction may have been applied, or may still be. A caller reads back; it does not
assume. A write without a guard must be spelled `UNGUARDED` and defended where it stands.
"""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal, Protocol

TXN_OPS_MAX: Final = 128  # etcd's --max-txn-ops, for compares, success and failure each; nested: minus the outer's
REQUEST_BYTES_MAX: Final = 1_572_864  # etcd's --max-request-bytes


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as it stood at a revision. `lease` is 0 for a key without one."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int = 0


# --- what a transaction is made of -----------------------------------------------------------------------------


class Target(StrEnum):
    """What of a key is compared. An absent key has 0 for each number; of an absent VALUE nothing is true."""

    VERSION = "VERSION"
    CREATE = "CREATE"
    MOD = "MOD"
    VALUE = "VALUE"
    LEASE = "LEASE"


@dataclass(frozen=True, slots=True)
class Compare:
    """`target` of `key` stands in `relation` to `operand`. With `range_end`: true if it holds for *every* key
    of the range (so CREATE == 0 over a range means "the range is empty")."""

    key: bytes
    target: Target
    operand: int | bytes
    relation: Literal["EQUAL", "NOT_EQUAL", "GREATER", "LESS"] = "EQUAL"
    range_end: bytes = b""


def created_at(key: bytes, revision: int) -> Compare:
    """Guard: the key was created at this revision; 0 means it is absent."""
    return Compare(key, Target.CREATE, revision)


def absent(key: bytes, range_end: bytes = b"") -> Compare:
    """Guard: the key does not exist; over a range: no key of it does."""
    return Compare(key, Target.CREATE, 0, range_end=range_end)


def modified_at(key: bytes, revision: int) -> Compare:
    """Guard: the key's last change was this revision; 0 means it is absent."""
    return Compare(key, Target.MOD, revision)


def leased_by(key: bytes, lease: int) -> Compare:
    """Guard: the key exists and is attached to this lease."""
    return Compare(key, Target.LEASE, lease)


@dataclass(frozen=True, slots=True)
class Put:
    """Write a key. Without a lease it *detaches* the key from the lease it had."""

    key: bytes
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key, or all of [key, range_end)."""

    key: bytes
    range_end: bytes = b""


@dataclass(frozen=True, slots=True)
class Range:
    """Read a key, or [key, range_end) in key order. `limit` 0: all. `revision` 0: the present."""

    key: bytes
    range_end: bytes = b""
    limit: int = 0
    revision: int = 0
    keys_only: bool = False
    count_only: bool = False


@dataclass(frozen=True, slots=True)
class Txn:
    """If all `compares` hold do `success`, else `failure`; atomically, in one revision. May be nested."""

    compares: tuple[Compare, ...]
    success: tuple["Op", ...] = ()
    failure: tuple["Op", ...] = ()


Op = Put | Delete | Range | Txn

UNGUARDED: Final[tuple[Compare, ...]] = ()
"""Spell this in place of a guard where a write needs none, and say why there."""


# --- what comes back -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PutResult:
    revision: int


@dataclass(frozen=True, slots=True)
class DeleteResult:
    revision: int
    deleted: int


@dataclass(frozen=True, slots=True)
class RangeResult:
    """`revision` is the store's when it answered (the largest so far for a single read); `count` is the whole
    range's, whatever `limit` was; `more` tells that `limit` cut it short."""

    revision: int
    kvs: tuple[KeyValue, ...]
    count: int
    more: bool = False


@dataclass(frozen=True, slots=True)
class TxnResult:
    """One result per operation of the branch that was taken."""

    revision: int
    succeeded: bool
    results: tuple["OpResult", ...]


OpResult = PutResult | DeleteResult | RangeResult | TxnResult


@dataclass(frozen=True, slots=True)
class Committed:
    """The outer guard held; `results` are those of `success`. `revision` is the transaction's own if it wrote."""

    revision: int
    results: tuple[OpResult, ...]


@dataclass(frozen=True, slots=True)
class Conflict:
    """The outer guard did not hold; `results` are those of `failure`. Nothing of `success` happened."""

    revision: int
    results: tuple[OpResult, ...]


@dataclass(frozen=True, slots=True)
class Unknown:
    """No answer that decides: the transaction was applied, was not, or is still on its way. Only with `is_sent`
    false is it certain that it was not and will not be: nothing of it left, or each endpoint refused it unapplied."""

    reason: str
    is_sent: bool = True


Outcome = Committed | Conflict | Unknown


@dataclass(frozen=True, slots=True)
class Grant:
    """A new lease. `ttl_s` is what the server gives, which may be more than was asked."""

    lease: int
    ttl_s: int


@dataclass(frozen=True, slots=True)
class LeaseKeys:
    """What the server knows of a lease: seconds left (whole), seconds granted, and the keys on it."""

    lease: int
    ttl_s: int
    granted_ttl_s: int
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """One change. For a deletion `kv` has only `key` and `mod_revision` (that of the deletion)."""

    is_delete: bool
    kv: KeyValue


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """One message of a watch: all of it is applied, or none.

    `revision` is the header's. While a watch catches up it runs *ahead* of the events, so a resume never uses it.
    A batch without events is a progress message: everything up to `revision` was sent. A store hands on only those
    of servers that do not let them overtake events (3.4.25, 3.5.8 and later; see `StoreStatus.is_progress_trusted`).
    """

    revision: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """Who answered, and what is known of its faults."""

    endpoint: str
    version: str
    cluster_id: int
    revision: int
    is_progress_trusted: bool = False
    warnings: tuple[str, ...] = field(default=())


class Store(Protocol):
    """What the rest of shardlead asks of a store. Implementations: `store.etcd.EtcdStore`.

    Every call is bounded in time by the implementation's settings. All of them raise StoreUnavailable if no
    endpoint answers in time and StoreRejected if the store refuses for good (so does `commit`, but only where the
    refusal proves that nothing was applied; a lease id that does not exist raises LeaseGone).
    """

    async def read(self, op: Range) -> RangeResult:
        """A linearizable read as far as the server keeps that promise (etcd #20418). Raises Compacted."""
        ...

    async def commit(self, txn: Txn) -> Outcome:
        """Send a transaction once it is known which endpoint answers; never twice after it may have arrived."""
        ...

    async def grant(self, ttl_s: int) -> Grant:
        """A fresh lease with an id of the server's choice. An answer that was lost leaves a lease to expire."""
        ...

    async def renew(self, lease: int) -> int:
        """ONE attempt, on the renewals' own connection, bounded by the try time-out. The TTL in seconds that the
        server granted anew, always > 0. The caller has read its clock *before* calling; a next attempt goes to
        the next endpoint. Raises LeaseGone if the answer has no TTL; StoreUnavailable says nothing either way."""
        ...

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys, in one revision. Raises LeaseGone if there was none."""
        ...

    async def lease_keys(self, lease: int) -> LeaseKeys:
        """The keys on a lease. Costs the store no write. Raises LeaseGone."""
        ...

    def watch(
        self, key: bytes, range_end: bytes, start_revision: int
    ) -> AbstractAsyncContextManager[AsyncIterator[WatchBatch]]:
        """Every change of [key, range_end) from `start_revision` (> 0) on, in order, until left.

        Raises WatchCanceled if the store cancels it, StoreUnavailable if the stream ends, breaks or stays silent
        for longer than the settings allow. It does not resume by itself: `store.mirror.Mirror` does.
        """
        ...

    async def status(self) -> StoreStatus:
        """Who is there. Raises StoreUnavailable."""
        ...

    def rotate(self, reason: str) -> None:
        """Take the next endpoint for what comes (a watch found stale, say)."""
        ...

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        ...


def prefix_end(prefix: bytes) -> bytes:
    """The end of the range of all keys that begin with `prefix` (which must not be all 0xff)."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1])
