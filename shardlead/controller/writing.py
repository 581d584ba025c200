"""From a plan to guarded transactions.

Law: every transaction compares the seat, so that a controller that was replaced writes nothing; and for each shard
the leader key that its wish was planned from, so that a wish never rests on a fact that has passed.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from shardlead.cluster.seat import seat_guard
from shardlead.core.keyspace import Keyspace, encode
from shardlead.core.model import Assignment
from shardlead.core.planner import Move, Plan, Write
from shardlead.store.base import Delete, Op, Put, Txn, modified_at

OPS_MAX: Final = 126  # of one transaction, over all its shards (protocol.md A.3)
_DELETES_MAX: Final = 100  # of one shard; what is left goes in the next round


def transactions(plan: Plan, keyspace: Keyspace, seat_revision: int) -> Iterator[tuple[Txn, tuple[Write, ...]]]:
    """The plan's writes in their order, as few transactions as the bound on operations allows."""
    moves = {move.shard: move for move in plan.moves}
    for batch in _batches(plan.writes):
        nested = tuple(_nested(write, moves.get(write.shard), keyspace) for write in batch)
        yield Txn((seat_guard(keyspace, seat_revision),), nested), tuple(batch)


def _batches(writes: Iterable[Write]) -> Iterator[list[Write]]:
    batch: list[Write] = []
    ops = 0
    for write in writes:
        size = 1 + len(write.puts) + min(len(write.deletes), _DELETES_MAX)
        if batch and ops + size > OPS_MAX:
            yield batch
            batch, ops = [], 0
        batch.append(write)
        ops += size
    if batch:
        yield batch


def _nested(write: Write, move: Move | None, keyspace: Keyspace) -> Txn:
    record = encode(Assignment(order=write.order, reason=_reason(write, move)))
    puts: list[Op] = [Put(keyspace.assignment(name, write.shard), record) for name in write.puts]
    deletes: list[Op] = [Delete(keyspace.assignment(name, write.shard)) for name in write.deletes[:_DELETES_MAX]]
    guard = modified_at(keyspace.leader(write.shard), write.leader_revision)
    return Txn((guard,), (*puts, *deletes))


def _reason(write: Write, move: Move | None) -> str:
    """For people; its first word is the planner's reason."""
    if move is None:
        return str(write.reason)
    return f"{write.reason}: {move.source or 'nobody'} to {move.target}"
