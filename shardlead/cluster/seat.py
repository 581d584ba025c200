"""The controller's seat: an election of one, with the same rules as a shard's.

Law: protocol.md A.2 (`seat`) and A.3. The seat's mod_revision is the controller's epoch; every write of a controller
compares it, so that a controller that has been replaced writes nothing.
"""

from dataclasses import dataclass

from shardlead.cluster.session import Session
from shardlead.core.keyspace import Keyspace, decode, encode
from shardlead.core.model import LeaderRecord
from shardlead.errors import KeyspaceError, LeaseGone, StoreError
from shardlead.store.base import (
    Committed,
    Compare,
    Conflict,
    Delete,
    Put,
    Range,
    RangeResult,
    Store,
    Txn,
    Unknown,
    absent,
    modified_at,
)


@dataclass(frozen=True, slots=True)
class Seated:
    """The seat is ours under `revision`."""

    revision: int


@dataclass(frozen=True, slots=True)
class SeatTaken:
    """Another holds it, "" if that cannot be told; or our session is over."""

    worker: str


@dataclass(frozen=True, slots=True)
class SeatUnknown:
    """The store gave no answer that decides: claim again."""

    reason: str


async def claim_seat(store: Store, keyspace: Keyspace, session: Session) -> Seated | SeatTaken | SeatUnknown:
    """Take the seat if nobody holds it. Repeating a claim whose outcome is unknown is safe."""
    record = encode(LeaderRecord(worker=session.name, sid=session.sid))
    txn = Txn(
        (*session.guards(), absent(keyspace.seat)),
        (Put(keyspace.seat, record, session.lease),),
        (Range(keyspace.seat),),
    )
    try:
        outcome = await store.commit(txn)
    except LeaseGone:
        return SeatTaken("")
    except StoreError as exc:
        return SeatUnknown(str(exc))
    match outcome:
        case Committed(revision):
            return Seated(revision)
        case Unknown(reason):
            return SeatUnknown(reason)
        case Conflict(_, results):
            (result,) = results
            if not isinstance(result, RangeResult) or not result.kvs:
                return SeatTaken("")
            kv = result.kvs[0]
            try:
                holder = decode(LeaderRecord, kv.key, kv.value)
            except KeyspaceError:
                return SeatTaken("")
            return Seated(kv.mod_revision) if holder.sid == session.sid else SeatTaken(holder.worker)


def seat_guard(keyspace: Keyspace, revision: int) -> Compare:
    """What every write of the controller seated under `revision` compares."""
    return modified_at(keyspace.seat, revision)


async def resign_seat(store: Store, keyspace: Keyspace, revision: int) -> None:
    """Leave the seat, if it is still ours. Raises StoreError; the lease's end leaves it anyway."""
    await store.commit(Txn((modified_at(keyspace.seat, revision),), (Delete(keyspace.seat),)))
