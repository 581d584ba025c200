"""The access log: one JSON line a request, for whoever switches it on.

What it never does: make a request wait. Requests are kept as they are and written in bulk; a thread does the writing,
because a disk or a pipe may block.

Law: at most BYTES_WAITING_MAX wait to be written; lines beyond are dropped and counted. A file that was moved away
(logrotate) is opened anew. A line is written within a sweep (1 s) of its request's end.
"""

import logging
import os
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import orjson

from shardlead.clock import NS_PER_S, Clock
from shardlead.errors import CommandError
from shardlead.router.counts import Counts
from shardlead.router.exchange import Exchange

log = logging.getLogger("shardlead.router")

LINES_MAX: Final = 512  # then they are written, before the sweep
BYTES_WAITING_MAX: Final = 8_388_608
CLOSE_TIMEOUT_S: Final = 2.0
STDOUT: Final = 1


class AccessLog:
    """`where`: a file's path, or "-" for standard output. `close` it. Raises CommandError if it cannot be written."""

    def __init__(self, where: str, *, clock: Clock, counts: Counts) -> None:
        self._clock = clock
        self._counts = counts
        self._lines: list[tuple[Exchange | Mapping[str, Any], str, int]] = []
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._bytes_given = 0
        self._writer = _Writer(where, self._queue)
        self._thread = threading.Thread(target=self._writer.run, name="access log", daemon=True)
        self._thread.start()

    def add(self, exchange: Exchange, outcome: str, ended_ns: int) -> None:
        """It is over. This is the request path."""
        self._lines.append((exchange, outcome, ended_ns))
        if len(self._lines) >= LINES_MAX:
            self.flush()

    def add_refused(self, peer: str, status: int, detail: str) -> None:
        """What could not be read as a request was answered with this."""
        self._lines.append(({"peer": peer, "status": status, "detail": detail}, "bad-request", self._clock.now_ns()))
        if len(self._lines) >= LINES_MAX:
            self.flush()

    def flush(self) -> None:
        """Give what has gathered to the writer."""
        lines, self._lines = self._lines, []
        if not lines:
            return
        if self._bytes_given - self._writer.bytes_done > BYTES_WAITING_MAX:
            self._counts.access_log_dropped += len(lines)
            return
        wall_s = self._clock.wall_s() - self._clock.now_ns() / NS_PER_S
        text = b"".join([_line(what, outcome, ended_ns, wall_s) for what, outcome, ended_ns in lines])
        self._bytes_given += len(text)
        self._queue.put(text)

    def close(self) -> None:
        """Write the rest, bounded in time."""
        self.flush()
        self._queue.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)


def _line(what: Exchange | Mapping[str, Any], outcome: str, ended_ns: int, wall_s: float) -> bytes:
    line: dict[str, Any] = {"t": round(ended_ns / NS_PER_S + wall_s, 3), "outcome": outcome}
    if isinstance(what, Exchange):
        head, leader = what.head, what.leader
        line["peer"] = what.client.peer
        line["method"] = head.method.decode("latin-1")
        line["target"] = head.target.decode("latin-1")
        line["status"] = what.status or None
        line["ms"] = (ended_ns - what.since_ns) // 1_000 / 1_000
        line["received"] = what.body.total_bytes
        line["sent"] = what.answer_bytes
        line["shard"] = what.shard if what.shard >= 0 else None
        line["worker"] = None if leader is None else leader.worker
        line["epoch"] = None if leader is None else leader.epoch
        line["id"] = what.request_id.decode("latin-1")
    else:
        line.update(what)
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


class _Writer:
    """The thread's side. `bytes_done` is written by it alone and read by the loop."""

    def __init__(self, where: str, queue_: "queue.SimpleQueue[bytes | None]") -> None:
        self.bytes_done = 0
        self._path = None if where == "-" else Path(where)
        self._queue = queue_
        self._file = STDOUT if self._path is None else self._open(self._path)
        self._has_failed = False

    def run(self) -> None:
        while (text := self._queue.get()) is not None:
            try:
                if self._path is not None and not self._is_still_there(self._path):
                    os.close(self._file)
                    self._file = self._open(self._path)
                rest = memoryview(text)
                while rest:
                    rest = rest[os.write(self._file, rest) :]
            except (OSError, CommandError) as exc:
                if not self._has_failed:
                    log.warning("the access log cannot be written; said once", extra={"reason": str(exc)})
                self._has_failed = True
            else:
                self._has_failed = False
            self.bytes_done += len(text)
        if self._path is not None:
            os.close(self._file)

    def _is_still_there(self, path: Path) -> bool:
        try:
            return os.path.samestat(path.stat(), os.fstat(self._file))
        except FileNotFoundError:
            return False

    @staticmethod
    def _open(path: Path) -> int:
        try:
            return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except (OSError, ValueError) as exc:
            raise CommandError(f"the access log {path} cannot be written ({exc}): see router.access_log") from exc
