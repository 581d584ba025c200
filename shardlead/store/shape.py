"""What etcd checks of a request before it looks at any data, and what a guard means for one key.

Pure functions for `store.model`. Refusals are raised as StoreRejected with etcd's code and message.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Never

from shardlead.errors import StoreRejected
from shardlead.store.base import Compare, Delete, KeyValue, Op, Put, Target, Txn

FROM_KEY: Final = b"\0"  # as a range_end: everything from the key on
INVALID_ARGUMENT: Final = 3


def check_key(key: bytes) -> None:
    if not key:
        _refuse("key is not provided")


def _refuse(message: str) -> Never:
    raise StoreRejected(INVALID_ARGUMENT, f"etcdserver: {message}")


def check_shape(txn: Txn, ops_max: int) -> None:
    """Compares, success and failure may have `ops_max` each; the longest of the three is taken off for what is
    nested inside, so 127 transactions of one operation fit into one, and 128 do not."""
    longest = max(len(txn.compares), len(txn.success), len(txn.failure))
    if longest > ops_max:
        _refuse("too many operations in txn request")
    for compare in txn.compares:
        check_key(compare.key)
    for op in (*txn.success, *txn.failure):
        if isinstance(op, Txn):
            check_shape(op, ops_max - longest)
        else:
            check_key(op.key)


@dataclass(slots=True)
class _Written:
    """Keys put and ranges deleted by some operations, whichever branches are taken."""

    puts: set[bytes] = field(default_factory=set)
    deletes: list[tuple[bytes, bytes]] = field(default_factory=list)

    def has_deleted(self, key: bytes) -> bool:
        # etcd takes the end of a delete "from this key on" for a key here, and so does not see what it deletes
        return any(key == start if not end else start <= key < end for start, end in self.deletes)

    def add(self, keys: set[bytes], harmless: set[bytes] | None = None) -> None:
        """Put these keys as well. Raises StoreRejected if one is written already and is not among the harmless."""
        for key in keys:
            if (key in self.puts and (harmless is None or key not in harmless)) or self.has_deleted(key):
                _refuse("duplicate key given in txn request")
        self.puts |= keys


def check_keys_written(ops: Sequence[Op]) -> _Written:
    """No key may be put twice, or put and deleted; the two branches of a nested transaction may share keys, since
    only one of them is taken. (etcd's own order of checks is kept: a put in one nested transaction and a delete of
    the same key in a *later* one pass.)"""
    written = _Written(deletes=[(op.key, op.range_end) for op in ops if isinstance(op, Delete)])
    for op in ops:
        if isinstance(op, Txn):
            success, failure = check_keys_written(op.success), check_keys_written(op.failure)
            written.add(success.puts)
            written.add(failure.puts, harmless=success.puts)
            written.deletes += success.deletes
            written.deletes += failure.deletes
    for op in ops:
        if isinstance(op, Put):
            written.add({op.key})
    return written


def is_within(key: bytes, start: bytes, end: bytes) -> bool:
    if not end:
        return key == start
    return start <= key and (end == FROM_KEY or key < end)


def is_met(compare: Compare, kv: KeyValue) -> bool:
    if compare.target is Target.VALUE:
        assert isinstance(compare.operand, bytes)
        return _is_related(compare.relation, (kv.value > compare.operand) - (kv.value < compare.operand))
    assert isinstance(compare.operand, int)
    have = _number(compare.target, kv)
    return _is_related(compare.relation, (have > compare.operand) - (have < compare.operand))


def _number(target: Target, kv: KeyValue) -> int:
    match target:
        case Target.VERSION:
            return kv.version
        case Target.CREATE:
            return kv.create_revision
        case Target.MOD:
            return kv.mod_revision
        case Target.LEASE:
            return kv.lease
        case Target.VALUE:
            raise AssertionError("a value is no number")


def _is_related(relation: str, sign: int) -> bool:
    match relation:
        case "EQUAL":
            return sign == 0
        case "NOT_EQUAL":
            return sign != 0
        case "GREATER":
            return sign > 0
        case "LESS":
            return sign < 0
        case _:
            raise AssertionError(f"no such relation: {relation}")
