"""The example service: counters, sharded by name, in one fenced SQLite file.

    POST /counters/{name}   adds one          GET /counters/{name}   only looks
    both answer {"name", "value", "shard", "epoch", "worker"}

`shardlead worker shardlead.demo:Counter` serves it; all workers of the machine share the file that the environment
variable SHARDLEAD_DEMO_DB names.

Law: `open` registers the epoch before it loads, so that the counts it keeps in memory cannot be overtaken by an old
leader's late write. An increment is acknowledged once its transaction is committed under the registered epoch; the
answer to an Idempotency-Key is stored in that same transaction, so a repeated request gets the first one's answer and
adds nothing.

What "acknowledged" means here: the increment survives kill -9 of every process, for the write-ahead log is in the
kernel's hands before the answer leaves. It may not survive a power cut: that takes an fsync for each commit
(`synchronous="FULL"`, the default of `SqliteFence`), which a demo on a laptop spares.

Not promised: answers are kept for the last ANSWERS_KEPT keys of a shard; a key that comes back after that counts
again. All counters of a led shard are held in memory.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import ClassVar, Final
from urllib.parse import unquote_to_bytes

import orjson
from aiohttp import web

from shardlead.core.contract import IDEMPOTENCY_KEY
from shardlead.errors import ResourceUnavailable
from shardlead.fencing import SqliteFence, Transaction
from shardlead.worker.leadership import Leadership

DATABASE_VARIABLE: Final = "SHARDLEAD_DEMO_DB"
DATABASE_DEFAULT: Final = "./counters.sqlite3"
ANSWERS_KEPT: Final = 10_000  # per shard
PRUNE_EVERY: Final = 256  # so many stored answers between two clean-ups of a shard
IDEMPOTENCY_KEY_MAX: Final = 255  # characters
NAME_BYTES_MAX: Final = 2_048

_PATH: Final = "/counters/"
_ANSWER_TYPE: Final = "application/json"

SCHEMA: Final = (
    """CREATE TABLE IF NOT EXISTS counters
       (shard INTEGER, name TEXT, value INTEGER NOT NULL, PRIMARY KEY (shard, name)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS answers
       (number INTEGER PRIMARY KEY AUTOINCREMENT, shard INTEGER NOT NULL, name TEXT NOT NULL, key TEXT NOT NULL,
        body BLOB NOT NULL)""",
    "CREATE UNIQUE INDEX IF NOT EXISTS answers_by_key ON answers (shard, name, key)",
    "CREATE INDEX IF NOT EXISTS answers_by_age ON answers (shard, number)",
)
_LOAD: Final = "SELECT name, value FROM counters WHERE shard = ?"
_ADD: Final = (
    "INSERT INTO counters (shard, name, value) VALUES (?, ?, 1) "
    "ON CONFLICT (shard, name) DO UPDATE SET value = value + 1 RETURNING value"
)
_ANSWERED: Final = "SELECT body FROM answers WHERE shard = ? AND name = ? AND key = ?"
_STORE_ANSWER: Final = "INSERT INTO answers (shard, name, key, body) VALUES (?, ?, ?, ?)"
_PRUNE: Final = (
    "DELETE FROM answers WHERE shard = ?1 AND number <= "
    "(SELECT number FROM answers WHERE shard = ?1 ORDER BY number DESC LIMIT 1 OFFSET ?2)"
)


@dataclass(frozen=True, slots=True)
class Added:
    """What a POST came to: the answer's body, the counter's value in it, and whether an earlier call had added it."""

    body: bytes
    value: int
    is_replay: bool = False


class CounterShard:
    """The counters of one led shard."""

    fenced: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True

    def __init__(self, lead: Leadership, fence: SqliteFence) -> None:
        self._lead = lead
        self._fence = fence
        self._values: dict[str, int] = {}
        self._stored = 0

    def __repr__(self) -> str:
        return f"<CounterShard {self._lead.shard} epoch {self._lead.epoch}, {len(self._values)} counters>"

    async def open(self) -> None:
        """Register the epoch, then load."""
        await self._fence.barrier(self._lead)
        shard = self._lead.shard
        self._values = dict(await self._fence.read(lambda tx: tx.execute(_LOAD, (shard,)).fetchall()))

    async def close(self) -> None:
        """Nothing is held that is not in the file already."""
        self._values.clear()

    def healthy(self) -> bool:
        return self._fence.is_healthy

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request; what is wrong with it is said with 400, 404 or 405."""
        name = _name_of(request)
        if isinstance(name, web.Response):
            return name
        match request.method:
            case "GET" | "HEAD":
                return _answer(self._body(name, self._values.get(name, 0)))
            case "POST":
                key = request.headers.get(IDEMPOTENCY_KEY, "")
                if len(key) > IDEMPOTENCY_KEY_MAX:
                    return _refusal(400, f"an {IDEMPOTENCY_KEY} has at most {IDEMPOTENCY_KEY_MAX} characters")
                async for _ in request.content.iter_any():
                    pass  # an upload that breaks off does not count; what it says does not matter
                return await self._post(name, key)
            case _:
                return _refusal(405, "a counter knows GET and POST", Allow="GET, HEAD, POST")

    async def _post(self, name: str, key: str) -> web.Response:
        try:
            added = await self._fence.write(self._lead, lambda tx: self._add(tx, name, key))
        except ResourceUnavailable:  # another process, frozen perhaps, holds the file's one write lock
            return _refusal(503, "the counters' file is busy; nothing was added", **{"Retry-After": "1"})
        # The largest: a replay may be old, or the first news of a call that was cancelled after its commit.
        self._values[name] = max(added.value, self._values.get(name, 0))
        if added.is_replay:
            return _answer(added.body, **{"Idempotency-Replayed": "true"})
        if key:
            self._stored += 1
        return _answer(added.body)

    def _add(self, tx: Transaction, name: str, key: str) -> Added:
        """In the fence's transaction: look for the answer to `key`, else add one and store the answer."""
        shard = self._lead.shard
        if key and (row := tx.execute(_ANSWERED, (shard, name, key)).fetchone()):
            return Added(row[0], orjson.loads(row[0])["value"], is_replay=True)
        value: int = tx.execute(_ADD, (shard, name)).fetchone()[0]
        body = self._body(name, value)
        if key:
            tx.execute(_STORE_ANSWER, (shard, name, key, body))
            if self._stored % PRUNE_EVERY == 0:
                tx.execute(_PRUNE, (shard, ANSWERS_KEPT))
        return Added(body, value)

    def _body(self, name: str, value: int) -> bytes:
        lead = self._lead
        return _json({"name": name, "value": value, "shard": lead.shard, "epoch": lead.epoch, "worker": lead.worker})


@dataclass(frozen=True, slots=True)
class CounterFactory:
    """Makes one `CounterShard` for each led shard, all on one fence."""

    fence: SqliteFence
    fenced: ClassVar[bool] = CounterShard.fenced
    idempotent: ClassVar[bool] = CounterShard.idempotent

    def __call__(self, lead: Leadership) -> CounterShard:
        return CounterShard(lead, self.fence)


@asynccontextmanager
async def Counter() -> AsyncIterator[CounterFactory]:  # noqa: N802  # it is named to `shardlead worker` like a class
    """Open the file that SHARDLEAD_DEMO_DB names, shared by all shards of this process."""
    path = os.environ.get(DATABASE_VARIABLE) or DATABASE_DEFAULT
    async with SqliteFence(path, schema=SCHEMA, synchronous="NORMAL") as fence:
        yield CounterFactory(fence)


def _name_of(request: web.Request) -> str | web.Response:
    """The counter's name: the one segment after /counters/, percent-decoded once, or the refusal."""
    path = request.rel_url.raw_path
    segment = path.removeprefix(_PATH)
    if not path.startswith(_PATH) or not segment or "/" in segment:
        return _refusal(404, "there is only /counters/{name}")
    raw = unquote_to_bytes(segment)
    if len(raw) > NAME_BYTES_MAX:
        return _refusal(400, f"a counter's name has at most {NAME_BYTES_MAX} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _refusal(400, "a counter's name is UTF-8")


def _json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)  # so that a shell's prompt begins a line after curl's


def _answer(body: bytes, **headers: str) -> web.Response:
    return web.Response(body=body, content_type=_ANSWER_TYPE, headers=headers)


def _refusal(status: int, reason: str, **headers: str) -> web.Response:
    return web.Response(status=status, body=_json({"error": reason}), content_type=_ANSWER_TYPE, headers=headers)
