"""Storage that refuses a leader who has been replaced: adapters for SQLite and etcd.

    async with SqliteFence("orders.sqlite3", schema=["CREATE TABLE IF NOT EXISTS ..."]) as fence:
        await fence.barrier(lead)                                       # in open(), before anything is read
        rows = await fence.read(lambda tx: tx.execute("SELECT ...").fetchall())
        await fence.write(lead, lambda tx: tx.execute("UPDATE ..."))    # raises Fenced if somebody leads in our place

Law: protocol.md A.4, fence-then-read. The barrier registers the new epoch at the resource *before* state is read;
every write compares its own epoch with the registered one, for equality, in the same atomic step as it writes. A
check without the barrier lets an old leader's late write land between the new leader's read and its first write. A
check outside of the write's own transaction lets it land between check and write.

What no adapter here does: it never asks the clock who leads (the lease only stops a leader early and cheaply), it
never retries a write whose outcome is unknown, and it never lowers a registered epoch.

Other resources follow the same two steps. PostgreSQL: the same fence row, locked by `SELECT .. FOR SHARE`. An object
store with conditional puts protects one object, so the shard's state must be that object (a manifest): the barrier
is a conditional put of the manifest with the new epoch in it, and each write is conditional on the version that this
leader itself wrote last.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self, TypeVar

from shardlead.core.keyspace import SHARD_DIGITS, Keyspace
from shardlead.core.model import epoch_of, generation_of, revision_of
from shardlead.errors import EpochRegressed, Fenced, ResourceUnavailable, WriteUnknown
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
    Target,
    Txn,
    Unknown,
    modified_at,
    prefix_end,
)

T = TypeVar("T")


class Lead(Protocol):
    """What a fence needs to know of a leadership. `check` is called from other threads too: it compares clocks and
    a flag, and awaits nothing."""

    @property
    def shard(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    def check(self, need_s: float = 0.05) -> None:
        """Raises LeadershipLost unless the lease lasts for `need_s` seconds more."""
        ...


class Fence(Protocol):
    """What all adapters share. How data is read and written differs with the resource."""

    async def barrier(self, lead: Lead) -> None:
        """Return once no leader before `lead` can write its shard any more; only then load state. May be repeated.

        Raises EpochRegressed if the resource knows a higher epoch, LeadershipLost, ResourceUnavailable.
        """
        ...


# --- SQLite ----------------------------------------------------------------------------------------------------

BATCH_WRITES_MAX: Final = (
    64  # one commit for so many waiting writes: enough to amortize it, short enough to hold a lock
)
QUEUED_JOBS_MAX: Final = 10_000
OPEN_TRIES_MAX: Final = 10  # switching to WAL while others open the same file answers "locked" without waiting
CLOSE_TIMEOUT_S: Final = 10.0

_FENCE_TABLE: Final = "CREATE TABLE IF NOT EXISTS shard_fence (shard INTEGER PRIMARY KEY, epoch INTEGER NOT NULL)"
_BARRIER: Final = (
    "INSERT INTO shard_fence (shard, epoch) VALUES (?, ?) "
    "ON CONFLICT (shard) DO UPDATE SET epoch = excluded.epoch WHERE shard_fence.epoch <= excluded.epoch"
)
_REGISTERED: Final = "SELECT epoch FROM shard_fence WHERE shard = ?"
_TRANSACTION_CONTROL: Final = (
    "BEGIN",
    "COMMIT",
    "END",
    "ROLLBACK",
    "SAVEPOINT",
    "RELEASE",
    "ATTACH",
    "DETACH",
    "PRAGMA",
)


class Transaction:
    """A transaction as a function given to `read` or `write` sees it. It belongs to the fence's thread and ends when
    the function returns; begin and end are not the function's to say."""

    __slots__ = ("_connection",)

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> sqlite3.Cursor:
        """As sqlite3's. Raises ValueError for a statement that would end the transaction."""
        return self._connection.execute(_checked(sql), parameters)

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> sqlite3.Cursor:
        """As sqlite3's. Raises ValueError for a statement that would end the transaction."""
        return self._connection.executemany(_checked(sql), rows)


def _checked(sql: str) -> str:
    if sql.lstrip()[:9].upper().startswith(_TRANSACTION_CONTROL):
        raise ValueError(f"the fence begins and ends the transaction, not its function: {sql!r}")
    return sql


Work = Callable[[Transaction], Any]


@dataclass(slots=True, eq=False)
class _Job:
    """One call that waits for the thread. `lead` None: a read. `work` None: a barrier."""

    lead: Lead | None
    work: Work | None
    future: "asyncio.Future[Any]"


@dataclass(frozen=True, slots=True)
class _Done:
    job: _Job
    value: Any = None
    error: BaseException | None = None


class _Abandoned(Exception):  # never leaves this module: its caller has been cancelled
    """Nobody waits for this write any more and it has not been committed: leave it."""


class _TransactionEnded(Exception):  # never leaves this module: becomes WriteUnknown
    """A function ended the fence's transaction behind its back."""


class SqliteFence:
    """One SQLite file, shared by the shards of this process and by other processes of the same machine.

    A thread of its own holds the one connection, so the event loop never waits for the disk. Writes that wait while
    the thread is busy share one transaction; each still locks and compares its own shard's row, and checks its own
    lease right before the commit. SQLite lets one writer in at a time: `BEGIN IMMEDIATE` is the lock on the fence
    row, waited for at most `busy_timeout_s`.

    `synchronous`: with "FULL" (the default) an acknowledged write survives a power cut. With "NORMAL", which spares an
    fsync per commit, it survives the death of any process, kill -9 too, because the log lies in the kernel's page
    cache by then; a power cut or kernel crash may take back the last writes, always to an earlier consistent state.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        schema: Sequence[str] = (),
        busy_timeout_s: float = 2.0,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
    ) -> None:
        self._path = path
        self._schema = tuple(schema)
        self._busy_timeout_s = busy_timeout_s
        self._synchronous = synchronous
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None
        self._is_closing = False

    def __repr__(self) -> str:
        state = "closed" if self._is_closing else "open" if self._thread else "new"
        return f"<SqliteFence {self._path} {state}, {self._jobs.qsize()} waiting>"

    # --- for the application -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Open the file, in WAL mode, and make the fence's table and `schema` where they are missing.

        Raises ResourceUnavailable if that cannot be done.
        """
        assert self._thread is None, "a fence is opened once"
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        opened: asyncio.Future[None] = self._loop.create_future()
        # A daemon, so that a disk which hangs cannot keep a process alive that has to end.
        self._thread = threading.Thread(target=self._main, args=(opened,), name="sqlite-fence", daemon=True)
        self._thread.start()
        await opened  # bounded by the thread: OPEN_TRIES_MAX busy time-outs
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Finish the writes that wait, then close the file. Idempotent; gives up waiting after CLOSE_TIMEOUT_S."""
        if self._ended is None:
            return
        if not self._is_closing:
            self._is_closing = True
            self._jobs.put(None)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._ended), CLOSE_TIMEOUT_S)

    @property
    def is_healthy(self) -> bool:
        """Whether the thread that serves this file lives."""
        return not self._is_closing and self._thread is not None and self._thread.is_alive()

    async def barrier(self, lead: Lead) -> None:
        """Register `lead`'s epoch: from here on every write of its shard under an older one is refused.

        Raises EpochRegressed, LeadershipLost, ResourceUnavailable, WriteUnknown.
        """
        await self._ask(lead, None)

    async def write(self, lead: Lead, work: Callable[[Transaction], T]) -> T:
        """Run `work` in a transaction that commits only if `lead`'s epoch is the registered one, and return its result.

        `work` runs in the fence's thread and should touch the shard's own rows only. It may be called a second time
        (a neighbour in the batch failed) with the effects of the first undone, so it changes nothing but the
        database. Its exception undoes the transaction and is raised here. A caller that is cancelled does not know
        whether the write was committed.

        Raises Fenced, LeadershipLost, ResourceUnavailable, WriteUnknown.
        """
        result: T = await self._ask(lead, work)
        return result

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """Run `work` on a consistent snapshot that holds every write committed before this call, and return its
        result. Writing in it fails. Raises ResourceUnavailable."""
        result: T = await self._ask(None, work)
        return result

    async def _ask(self, lead: Lead | None, work: Work | None) -> Any:
        assert self._loop is not None, "open the fence first: async with SqliteFence(..)"
        if not self.is_healthy:
            raise ResourceUnavailable(str(self._path), "the fence is closed")
        if self._jobs.qsize() >= QUEUED_JOBS_MAX:
            raise ResourceUnavailable(str(self._path), f"{QUEUED_JOBS_MAX} calls wait already")
        future: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put(_Job(lead, work, future))
        return await future  # bounded by the thread: a busy time-out for each batch in front

    # --- the thread ----------------------------------------------------------------------------------------------

    def _main(self, opened: "asyncio.Future[None]") -> None:
        assert self._loop is not None
        assert self._ended is not None
        try:
            with contextlib.closing(self._open()) as connection:
                self._call(_settle, opened, None)
                while (job := self._jobs.get()) is not None:
                    if not self._serve(connection, job):
                        break
        except sqlite3.Error as exc:
            self._call(_settle, opened, ResourceUnavailable(str(self._path), f"cannot be opened: {exc}"))
        finally:
            self._is_closing = True
            self._call(self._finish)

    def _finish(self) -> None:
        """In the loop, after the thread: whoever still waits is told, and nobody can come after."""
        assert self._ended is not None
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    _settle(job.future, ResourceUnavailable(str(self._path), "the fence is closed"))
        _settle(self._ended, None)

    def _serve(self, connection: sqlite3.Connection, first: _Job) -> bool:
        """Serve `first` and, in one transaction, the writes that wait right behind it. False: asked to close."""
        batch: list[_Job] = [first]
        after: _Job | None = None
        is_last = False
        while first.lead is not None and len(batch) < BATCH_WRITES_MAX:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                is_last = True
                break
            if job.lead is None:
                after = job
                break
            batch.append(job)
        done = [self._read(connection, first)] if first.lead is None else self._write(connection, batch)
        if after is not None:
            done.append(self._read(connection, after))
        self._call(_deliver, done)
        return not is_last

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=self._busy_timeout_s, isolation_level=None)
        try:
            for tries_left in reversed(range(OPEN_TRIES_MAX)):
                try:
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.execute(f"PRAGMA synchronous = {self._synchronous}")
                    connection.execute("BEGIN IMMEDIATE")
                    break
                except sqlite3.OperationalError as exc:
                    if not tries_left or exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                        raise
                    threading.Event().wait(0.02)
            for statement in (_FENCE_TABLE, *self._schema):
                connection.execute(statement)
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        return connection

    def _read(self, connection: sqlite3.Connection, job: _Job) -> _Done:
        assert job.work is not None
        try:
            connection.execute("PRAGMA query_only = ON")
            connection.execute("BEGIN")
            try:
                return _Done(job, value=job.work(Transaction(connection)))
            finally:
                _undo(connection)
                connection.execute("PRAGMA query_only = OFF")
        except BaseException as exc:  # whatever it is, it belongs to the caller
            return _Done(job, error=exc)

    def _write(self, connection: sqlite3.Connection, jobs: list[_Job]) -> list[_Done]:
        """All of `jobs` in one transaction; if any of them fails, each in one of its own."""
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as exc:
            return [_Done(job, error=ResourceUnavailable(str(self._path), str(exc))) for job in jobs]
        is_committing = False
        try:
            done = [_Done(job, value=_apply(connection, job)) for job in jobs]
            for job in jobs:
                _confirm(job)
            is_committing = True
            connection.execute("COMMIT")
        except BaseException as exc:  # whatever it is, it belongs to the caller
            _undo(connection)
            if is_committing or isinstance(exc, _TransactionEnded):
                return [_Done(job, error=_unknown(job, exc)) for job in jobs]
            if len(jobs) == 1:
                return [_Done(jobs[0], error=exc)]
            return [single for job in jobs for single in self._write(connection, [job])]
        return done

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for an answer
            self._loop.call_soon_threadsafe(function, *arguments)


def _apply(connection: sqlite3.Connection, job: _Job) -> Any:
    """One write or barrier inside of the open transaction, the fence first."""
    assert job.lead is not None
    shard, epoch = job.lead.shard, job.lead.epoch
    if job.future.cancelled():
        raise _Abandoned
    if job.work is None:
        if connection.execute(_BARRIER, (shard, epoch)).rowcount == 0:
            raise EpochRegressed(shard, epoch, connection.execute(_REGISTERED, (shard,)).fetchone()[0])
        return None
    row = connection.execute(_REGISTERED, (shard,)).fetchone()
    if row is None or row[0] != epoch:
        raise Fenced(shard, epoch, row[0] if row else None)
    value = job.work(Transaction(connection))
    if not connection.in_transaction:
        raise _TransactionEnded(f"{job.work!r} ended the fence's transaction")
    return value


def _confirm(job: _Job) -> None:
    """The last look before the commit."""
    assert job.lead is not None
    if job.future.cancelled():
        raise _Abandoned
    job.lead.check()


def _unknown(job: _Job, error: BaseException) -> WriteUnknown:
    assert job.lead is not None
    return WriteUnknown(job.lead.shard, job.lead.epoch, str(error))


def _undo(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        with contextlib.suppress(sqlite3.Error):  # then SQLite has undone it already
            connection.execute("ROLLBACK")


def _settle(future: "asyncio.Future[Any]", error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _deliver(done: Sequence[_Done]) -> None:
    for item in done:
        if item.job.future.done():
            continue
        if item.error is None:
            item.job.future.set_result(item.value)
        elif isinstance(item.error, StopIteration):  # a future cannot carry it
            item.job.future.set_exception(RuntimeError(f"{item.job.work!r} raised StopIteration"))
        else:
            item.job.future.set_exception(item.error)


# --- etcd ------------------------------------------------------------------------------------------------------

BARRIER_TRIES_MAX: Final = 5


class EtcdFence:
    """Data that lives in the same etcd as the leaderships: protocol.md's T7, the strongest fence there is.

    Every transaction compares the mod_revision of `leaders/<shard>`, which *is* the epoch, and a record
    `<prefix>fence/<shard>` with the whole epoch, generation included, which the barrier writes. A leader that was
    replaced or whose lease ended is refused by etcd itself, in the same step.

    All data stands below `prefix`, which lies outside of the cluster's own keys.
    """

    def __init__(self, store: Store, keyspace: Keyspace, prefix: bytes) -> None:
        if not prefix or keyspace.prefix.startswith(prefix) or prefix.startswith(keyspace.prefix):
            raise ValueError(f"data prefix {prefix!r} overlaps the cluster's own keys {keyspace.prefix!r}")
        self._store = store
        self._keyspace = keyspace
        self._prefix = prefix

    def __repr__(self) -> str:
        return f"<EtcdFence {self._prefix.decode(errors='backslashreplace')}>"

    def record(self, shard: int) -> bytes:
        """The key that holds the registered epoch."""
        return self._prefix + b"fence/%0*d" % (SHARD_DIGITS, shard)

    async def barrier(self, lead: Lead) -> None:
        """Register `lead`'s epoch, through etcd's log, so that what is read afterwards is not older than this.

        Raises Fenced, EpochRegressed, LeadershipLost, WriteUnknown, and what the store raises.
        """
        reason = ""
        for _ in range(BARRIER_TRIES_MAX):
            lead.check()
            found = await self._store.read(Range(self.record(lead.shard)))
            registered = int(found.kvs[0].value) if found.kvs else 0
            if registered > lead.epoch:
                raise EpochRegressed(lead.shard, lead.epoch, registered)
            seen = modified_at(self.record(lead.shard), found.kvs[0].mod_revision if found.kvs else 0)
            leads = modified_at(self._keyspace.leader(lead.shard), revision_of(lead.epoch))
            register = Put(self.record(lead.shard), b"%d" % lead.epoch)
            again = Range(self._keyspace.leader(lead.shard))
            match await self._store.commit(Txn((leads, seen), (register,), (again,))):
                case Committed():
                    return
                case Conflict(results=(RangeResult(kvs=kvs),)):
                    if not kvs or kvs[0].mod_revision != revision_of(lead.epoch):
                        raise Fenced(lead.shard, lead.epoch, _epoch_found(lead.epoch, kvs, ()))
                    reason = "the fence's record changes all the time"
                case Conflict():
                    raise AssertionError("a conflict answers its failure branch")
                case Unknown(reason):
                    pass  # repeatable: the record either is what was read or already what we wrote
        raise WriteUnknown(lead.shard, lead.epoch, reason)

    async def write(self, lead: Lead, *ops: Put | Delete | Range) -> tuple[OpResult, ...]:
        """Apply `ops` in one transaction if `lead`'s epoch still holds; their results.

        Raises Fenced, LeadershipLost, WriteUnknown (it may be applied later, but never after the next leader's
        claim), and what the store raises.
        """
        return await self._commit(lead, tuple(self._own(op) for op in ops))

    async def read(self, lead: Lead, *ranges: Range) -> tuple[RangeResult, ...]:
        """Read below the prefix in a transaction that also writes, so that it goes through etcd's log: a plain
        "linearizable" read may be stale (etcd #20418). One writing transaction a call: for loading, not for serving.

        Raises as `write` does.
        """
        touch = Put(self.record(lead.shard), b"%d" % lead.epoch)
        results = await self._commit(lead, (touch, *(self._own(op) for op in ranges)))
        return tuple(result for result in results if isinstance(result, RangeResult))

    async def _commit(self, lead: Lead, ops: tuple[Op, ...]) -> tuple[OpResult, ...]:
        lead.check()
        guard = (
            modified_at(self._keyspace.leader(lead.shard), revision_of(lead.epoch)),
            Compare(self.record(lead.shard), Target.VALUE, b"%d" % lead.epoch),
        )
        why = (Range(self._keyspace.leader(lead.shard)), Range(self.record(lead.shard)))
        match await self._store.commit(Txn(guard, ops, why)):
            case Committed(results=results):
                return results
            case Conflict(results=(RangeResult(kvs=leaders), RangeResult(kvs=records))):
                raise Fenced(lead.shard, lead.epoch, _epoch_found(lead.epoch, leaders, records))
            case Conflict():
                raise AssertionError("a conflict answers its failure branch")
            case Unknown(reason):
                raise WriteUnknown(lead.shard, lead.epoch, reason)

    def _own(self, op: Put | Delete | Range) -> Put | Delete | Range:
        """`op`, if it touches nothing but data below the prefix."""
        end = op.key + b"\x00" if isinstance(op, Put) or not op.range_end else op.range_end
        fence = self._prefix + b"fence/"
        is_open = end == b"\x00"  # etcd's way to say "and all keys behind it"
        is_inside = op.key.startswith(self._prefix) and end <= prefix_end(self._prefix) and not is_open
        if not is_inside or (op.key < prefix_end(fence) and end > fence):
            raise ValueError(f"[{op.key!r}, {end!r}) is not data below {self._prefix!r} and outside of {fence!r}")
        return op


def _epoch_found(epoch: int, leaders: tuple[KeyValue, ...], records: tuple[KeyValue, ...]) -> int | None:
    """The epoch that stood in the way of a write: that of another leader, else another registered one."""
    if not leaders:
        return None
    if leaders[0].mod_revision != revision_of(epoch):
        return epoch_of(generation_of(epoch), leaders[0].mod_revision)
    return int(records[0].value) if records else None
