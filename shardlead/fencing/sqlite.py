"""The fence of a SQLite file: one row per shard, compared and locked in the transaction that writes.

Law: protocol.md A.4, the SQL fence. `BEGIN IMMEDIATE` first, then the comparison for equality, then the application's
function, then the lease, then the commit; nothing is awaited in between, for all of it happens in one thread.
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
from typing import Any, Final, Literal, Self, TypeVar

from shardlead.errors import EpochRegressed, Fenced, ResourceUnavailable, WriteUnknown
from shardlead.fencing.base import Lead

T = TypeVar("T")

BATCH_WRITES_MAX: Final = 64  # enough to spread the cost of a commit, few enough to hold the file's lock briefly
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
        try:
            await opened  # bounded by the thread: OPEN_TRIES_MAX busy time-outs
        except BaseException:  # cancelled, too: then the thread closes the file that it may still open
            self._is_closing = True
            self._jobs.put(None)
            raise
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
        lead.note_barrier()

    async def write(self, lead: Lead, work: Callable[[Transaction], T]) -> T:
        """Run `work` in a transaction that commits only if `lead`'s epoch is the registered one, and return its result.

        `work` runs in the fence's thread and should touch the shard's own rows only. It may be called a second time
        (a neighbour in the batch failed) with the effects of the first undone, so it changes nothing but the
        database. Its exception undoes the transaction and is raised here. A caller that is cancelled does not know
        whether the write was committed.

        Raises Fenced, LeadershipLost, ResourceUnavailable, WriteUnknown.
        """
        try:
            result: T = await self._ask(lead, work)
        except WriteUnknown as exc:
            lead.note_unknown(exc.reason)
            raise
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
        except Exception as exc:  # also what is no SQL in the user's schema: who enters must not wait for ever
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
        except BaseException:  # whatever `schema` raises; it is raised on, without the open file
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
