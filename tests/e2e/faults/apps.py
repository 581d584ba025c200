"""What the workers of these tests host: lists and counts, written whole.

    POST /lists/{key}   appends the body, a word      GET /lists/{key}   the list
    POST /counts/{key}  adds one                      GET /counts/{key}  the count
    answers {"value", "shard", "epoch", "worker"}; `?think=0.2` lets a POST wait between what it reads and writes, and
    `?stored` lets a GET read the file instead of the memory

A leader that works on after another has taken over writes its stale list over the other's: what a fence is for.
`Fenced` has one, and keeps in memory what it has written: memory and file must say the same, as guard and epochs
promise. `Unfenced` has the guard alone, and reads the file before each write, so that what is lost stays lost. A write
that has begun goes on though its handler is cancelled, as it does in a thread or on a socket.

Steered by files in the folder that SHARDLEAD_TEST_FOLDER names: while `hold-write-<worker>` exists, a write of that
worker that has read what it will write upon waits, and says so by `writing-<worker>`; what had to wait and has come
to an end says how by `written-<worker>`. The waiting is a thread's, which nobody can cancel: so that a process that is
stopped there goes on writing where it was, like one that lost its processor between check and use.
"""

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, ClassVar, Final

import orjson
from aiohttp import web

from shardlead.core.contract import IDEMPOTENCY_KEY
from shardlead.errors import ResourceUnavailable, ShardleadError
from shardlead.fencing import SqliteFence, Transaction
from shardlead.worker.leadership import Leadership

FOLDER_VARIABLE: Final = "SHARDLEAD_TEST_FOLDER"
FILE: Final = "kept.sqlite3"
HOLD_MAX_S: Final = 60.0
_POLL_S: Final = 0.005

SCHEMA: Final = (
    """CREATE TABLE IF NOT EXISTS kept
       (shard INTEGER, name TEXT, value TEXT NOT NULL, PRIMARY KEY (shard, name)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS answers
       (shard INTEGER, key TEXT, value TEXT NOT NULL, PRIMARY KEY (shard, key)) WITHOUT ROWID""",
)
_LOAD: Final = "SELECT name, value FROM kept WHERE shard = ?"
_LOOK: Final = "SELECT value FROM kept WHERE shard = ? AND name = ?"
_STORE: Final = "INSERT OR REPLACE INTO kept (shard, name, value) VALUES (?, ?, ?)"
_ANSWERED: Final = "SELECT value FROM answers WHERE shard = ? AND key = ?"
_ANSWER: Final = "INSERT INTO answers (shard, key, value) VALUES (?, ?, ?)"


def folder() -> Path:
    return Path(os.environ[FOLDER_VARIABLE])


def stored(file: Path) -> dict[str, Any]:
    """What the file holds in the end: name -> list or count."""
    if not file.exists():
        return {}
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        return {name: orjson.loads(value) for name, value in database.execute("SELECT name, value FROM kept")}


class Kept:
    """One shard's lists and counts; subclasses say how they are loaded and written."""

    idempotent: ClassVar[bool] = True  # what carries an Idempotency-Key is done once
    has_memory: ClassVar[bool] = True

    def __init__(self, lead: Leadership) -> None:
        self.lead = lead
        self.values: dict[str, Any] = {}
        self._turn = asyncio.Lock()
        self._writes: set[asyncio.Task[Any]] = set()

    async def read(self, name: str) -> str | None:
        """What the file holds."""
        raise NotImplementedError

    async def store(self, name: str, value: Any, key: str) -> str | None:
        """Write it whole, with the answer to `key` if there is one; the answer that stands there already, if one
        does."""
        raise NotImplementedError

    async def _read(self, name: str, empty: Any) -> Any:
        found = await self.read(name)
        return empty if found is None else orjson.loads(found)

    async def _store(self, name: str, value: Any, key: str) -> Any:
        """Store it, whoever waits for it or not; what is answered: the value, or an older one."""
        write = asyncio.create_task(self.store(name, value, key))
        self._writes.add(write)
        write.add_done_callback(self._end)
        answered = await asyncio.shield(write)
        return value if answered is None else orjson.loads(answered)

    def _end(self, write: asyncio.Task[Any]) -> None:
        self._writes.discard(write)
        if not write.cancelled():
            write.exception()  # its handler may be gone

    async def handle(self, request: web.Request) -> web.StreamResponse:
        name = request.path.strip("/")
        empty: Any = [] if name.startswith("lists/") else 0
        if request.method == "GET":
            if self.has_memory and "stored" not in request.query:
                return self._answer(self.values.get(name, empty))
            async with self._turn:  # a write under way may be in the file before it is in the memory
                return self._answer(await self._read(name, empty))
        word = await request.text()
        async with self._turn:
            before = self.values.get(name, empty) if self.has_memory else await self._read(name, empty)
            value = [*before, word] if isinstance(before, list) else before + 1
            await asyncio.sleep(float(request.query.get("think", "0")))
            try:
                told = await self._store(name, value, request.headers.get(IDEMPOTENCY_KEY, ""))
            except ResourceUnavailable:  # another process, frozen perhaps, holds the file's one write lock
                return web.Response(status=503, text="the file is busy; nothing was written")
            if told is value:
                self.values[name] = value
        return self._answer(told)

    def hold(self) -> bool:
        """Wait, in a thread, for as long as the test holds this worker's writes; whether it did."""
        hold = folder() / f"hold-write-{self.lead.worker}"
        if not hold.exists():
            return False
        (folder() / f"writing-{self.lead.worker}").touch()
        until_s = time.monotonic() + HOLD_MAX_S
        while hold.exists() and time.monotonic() < until_s:
            time.sleep(_POLL_S)
        return True

    def note_written(self, how: str) -> None:
        """What had to wait has come to an end."""
        (folder() / f"written-{self.lead.worker}").write_text(how, encoding="utf-8")

    def _answer(self, value: Any) -> web.Response:
        lead = self.lead
        body = {"value": value, "shard": lead.shard, "epoch": lead.epoch, "worker": lead.worker}
        return web.Response(body=orjson.dumps(body), content_type="application/json")


class FencedKept(Kept):
    """Behind SqliteFence."""

    fenced: ClassVar[bool] = True

    def __init__(self, lead: Leadership, fence: SqliteFence) -> None:
        super().__init__(lead)
        self._fence = fence

    async def open(self) -> None:
        await self._fence.barrier(self.lead)
        rows = await self._fence.read(lambda tx: tx.execute(_LOAD, (self.lead.shard,)).fetchall())
        self.values = {name: orjson.loads(value) for name, value in rows}

    async def read(self, name: str) -> str | None:
        row = await self._fence.read(lambda tx: tx.execute(_LOOK, (self.lead.shard, name)).fetchone())
        return str(row[0]) if row else None

    async def store(self, name: str, value: Any, key: str) -> str | None:
        has_held = await self.lead.run_blocking(self.hold)
        how = "written"
        try:
            return await self._fence.write(self.lead, lambda tx: self._write(tx, name, value, key))
        except ShardleadError as exc:
            how = type(exc).__name__
            raise
        finally:
            if has_held:
                self.note_written(how)

    def _write(self, tx: Transaction, name: str, value: Any, key: str) -> str | None:
        shard, text = self.lead.shard, orjson.dumps(value).decode()
        if key and (row := tx.execute(_ANSWERED, (shard, key)).fetchone()):
            answer: str = row[0]
            return answer
        tx.execute(_STORE, (shard, name, text))
        if key:
            tx.execute(_ANSWER, (shard, key, text))
        return None


@asynccontextmanager
async def Fenced() -> AsyncIterator[Any]:  # noqa: N802  # it is named to `shardlead worker` like a class
    """All shards of this process on one fence."""
    async with SqliteFence(folder() / FILE, schema=SCHEMA, synchronous="NORMAL") as fence:

        def make(lead: Leadership) -> FencedKept:
            return FencedKept(lead, fence)

        make.fenced, make.idempotent = True, True  # type: ignore[attr-defined]  # a factory says what its class says
        yield make


class Unfenced(Kept):
    """The guard is asked, and then the file is written by whoever comes."""

    fenced: ClassVar[bool] = False
    idempotent: ClassVar[bool] = False
    has_memory: ClassVar[bool] = False

    async def read(self, name: str) -> str | None:
        return await self.lead.run_blocking(self._look, name)

    def _look(self, name: str) -> str | None:
        with closing(_connect()) as database:
            row = database.execute(_LOOK, (self.lead.shard, name)).fetchone()
        return str(row[0]) if row else None

    async def store(self, name: str, value: Any, key: str) -> str | None:
        await self.lead.run_blocking(self._write, name, value)
        return None

    def _write(self, name: str, value: Any) -> None:
        self.lead.check()
        has_held = self.hold()  # between check and use
        shard, text = self.lead.shard, orjson.dumps(value).decode()
        try:
            with closing(_connect()) as database, database:
                database.execute(_STORE, (shard, name, text))
        except sqlite3.OperationalError as exc:
            raise ResourceUnavailable(FILE, str(exc)) from exc
        if has_held:
            self.note_written("written")


def _connect() -> sqlite3.Connection:
    database = sqlite3.connect(folder() / FILE, timeout=5.0, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    for statement in SCHEMA:
        database.execute(statement)
    return database
