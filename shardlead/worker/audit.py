"""The audit log of one worker process: writes down what `shardlead verify` checks. Law: `core.audit`.

Every line goes to the kernel at once, in one write, by the loop that does the work: no line is behind what it proves,
and a killed process takes none with it. It is not synced to the disk: what a lost machine loses are its last seconds.
The folder should be on a local disk, because a write that hangs would hang the worker (and cost it its lease).

A write that fails ends the log for good, with one line in the worker's own log, and never the work: a log with a gap
would let a leadership seem to go on whose `stop` is missing; one that ends early is true as far as it goes.
"""

import errno
import logging
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import SubprocessError, run
from typing import Final, Protocol

from shardlead.clock import Clock
from shardlead.core.audit import (
    FORMAT,
    SUFFIX,
    WHY_CHARS_MAX,
    Accept,
    AnyLine,
    Begin,
    Deadline,
    Lead,
    Reject,
    Serve,
    Stop,
    encode,
)
from shardlead.errors import ConfigError, Problem

log = logging.getLogger("shardlead.audit")

_BOOT_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
_TIME_NAMESPACE: Final = Path("/proc/self/ns/time")
_FIRST_TIME_NAMESPACE: Final = 0xEFFFFFFA  # Linux's PROC_TIME_INIT_INO: the machine's own, not a container's
_SYSCTL_TIMEOUT_S: Final = 2.0
_NAMES_MAX: Final = 1_000


class AuditedSession(Protocol):
    """What is asked of a session: `cluster.session.Session` has it."""

    sid: str
    on_deadline: Callable[[int], object]

    @property
    def deadline_ns(self) -> int: ...


class AuditLog:
    """One process's log, from its first line on. Not thread-safe: it belongs to the worker's loop."""

    def __init__(self, fd: int, where: str, worker: str, clock: Clock, boot_id: str) -> None:
        """`fd` is open for appending, and is owned from here on. Raises OSError if it does not take the first line."""
        self.where = where
        self.now_ns = clock.now_ns
        self.worker = worker
        self.boot_id = boot_id
        self._fd = fd
        self._sid = ""
        begin = encode(Begin(boot_id=boot_id, at_ns=clock.now_ns(), worker=worker, format=FORMAT, pid=os.getpid()))
        if os.write(fd, begin) != len(begin):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __repr__(self) -> str:
        return f"<AuditLog {self.where}{'' if self.is_open else ', ended'}>"

    @classmethod
    def open(cls, folder: str, worker: str, clock: Clock, *, source: str = "settings") -> "AuditLog":
        """A new file in `folder`, which is made if it is missing. Raises ConfigError, with `source` for the place of
        the setting, if it cannot be written."""
        try:
            path = Path(folder).expanduser()
            path.mkdir(parents=True, exist_ok=True)
            fd, file = _create(path, f"{worker}-{os.getpid()}-{int(clock.wall_s())}")
            try:
                return cls(fd, str(file), worker, clock, boot_id_of_this_machine())
            except OSError:
                os.close(fd)
                with suppress(OSError):
                    file.unlink()
                raise
        except (OSError, RuntimeError, ValueError) as exc:  # "~nobody", a NUL in it
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
            allowed = f"must be a folder that can be written ({reason}), or empty for no audit log"
            raise ConfigError([Problem(source, "worker.audit_dir", folder, allowed)]) from exc

    @classmethod
    def check(cls, folder: str, clock: Clock, source: str) -> None:
        """Raise ConfigError if no log could be written there. Leaves no file."""
        log_file = cls.open(folder, "check", clock, source=source)
        log_file.close()
        with suppress(OSError):
            Path(log_file.where).unlink()

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def begin_session(self, session: AuditedSession) -> None:
        """Leaderships from here on are this session's; each move of its deadline is written before it counts."""
        self._sid = session.sid
        self._deadline(session.sid, session.deadline_ns)
        session.on_deadline = partial(self._deadline, session.sid)

    def lead(self, shard: int, epoch: int) -> "Trail":
        """A leadership begins, under the session that was begun last: to be said before anybody can ask its guard."""
        line = Lead(
            boot_id=self.boot_id, at_ns=self.now_ns(), worker=self.worker, sid=self._sid, shard=shard, epoch=epoch
        )
        self.write(line)
        return Trail(self, line)

    def reject(self, shard: int, epoch: int, why: str) -> None:
        """A request was refused."""
        self.write(
            Reject(
                boot_id=self.boot_id,
                at_ns=self.now_ns(),
                worker=self.worker,
                sid=self._sid,
                shard=shard,
                epoch=epoch,
                why=why,
            )
        )

    def close(self) -> None:
        """The process has nothing to say any more. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # --- for its trails

    def write(self, line: AnyLine) -> None:
        """One line, now. Never raises, whatever the disk does."""
        if self._fd < 0:
            return
        data = encode(line)
        try:
            is_whole = os.write(self._fd, data) == len(data)
        except OSError as exc:
            self._give_up(exc.strerror or str(exc))
        else:
            if not is_whole:
                self._give_up("the disk took a part of a line only")

    def _deadline(self, sid: str, deadline_ns: int) -> None:
        self.write(
            Deadline(
                boot_id=self.boot_id, at_ns=self.now_ns(), worker=self.worker, sid=sid, deadline_ns=max(0, deadline_ns)
            )
        )

    def _give_up(self, reason: str) -> None:
        facts = {"file": self.where, "reason": reason}
        log.error("the audit log cannot be written and ends here; the work goes on", extra=facts)
        with suppress(OSError):
            self.close()


class Trail:
    """One leadership's lines after its `lead`."""

    __slots__ = ("_audit", "_is_stopped", "_lead", "now_ns")

    def __init__(self, audit: AuditLog, lead: Lead) -> None:
        self.now_ns = audit.now_ns
        self._audit = audit
        self._lead = lead
        self._is_stopped = False

    def serve(self) -> None:
        """Its object is open; said before the first request is admitted."""
        lead = self._lead
        self._audit.write(
            Serve(
                boot_id=lead.boot_id,
                at_ns=self.now_ns(),
                worker=lead.worker,
                sid=lead.sid,
                shard=lead.shard,
                epoch=lead.epoch,
            )
        )

    def accept(self, admitted_ns: int, at_ns: int) -> None:
        """A request that was admitted then has passed the guard, which was asked right after `at_ns` was read; said
        before anything of the answer leaves."""
        lead = self._lead
        self._audit.write(
            Accept(
                boot_id=lead.boot_id,
                at_ns=at_ns,
                worker=lead.worker,
                sid=lead.sid,
                shard=lead.shard,
                epoch=lead.epoch,
                admitted_ns=admitted_ns,
            )
        )

    def reject(self, why: str) -> None:
        """A request that was admitted has met the guard, which said no."""
        self._audit.reject(self._lead.shard, self._lead.epoch, why)

    def stop(self, why: str) -> None:
        """No guard says yes from here on; said before it is so, once."""
        if self._is_stopped:
            return
        self._is_stopped = True
        lead = self._lead
        self._audit.write(
            Stop(
                boot_id=lead.boot_id,
                at_ns=self.now_ns(),
                worker=lead.worker,
                sid=lead.sid,
                shard=lead.shard,
                epoch=lead.epoch,
                why=_printable(why),
            )
        )


def boot_id_of_this_machine() -> str:
    """Equal for processes whose boot-time clocks can be compared, and for no others. Where the system gives none it is
    this process's alone: then only what holds everywhere is checked."""
    with suppress(OSError):
        boot_id = _BOOT_FILE.read_text().strip()
        with suppress(OSError):  # a kernel without time namespaces
            namespace = _TIME_NAMESPACE.stat().st_ino
            if namespace != _FIRST_TIME_NAMESPACE:
                boot_id += f"+{namespace:x}"
        return boot_id
    with suppress(OSError, SubprocessError):
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
            said = run(command, capture_output=True, text=True, timeout=_SYSCTL_TIMEOUT_S, check=True).stdout.strip()
            if said:
                return said
    return f"process-{secrets.token_hex(8)}"


def _create(folder: Path, name: str) -> tuple[int, Path]:
    """A file that was not there before, open for appending. Raises OSError."""
    for number in range(_NAMES_MAX):
        path = folder / (name + (f"-{number}" if number else "") + SUFFIX)
        with suppress(FileExistsError):  # a process that was started in the same second
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o640), path
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))


def _printable(text: str) -> str:
    return text[:WHY_CHARS_MAX].encode("utf-8", "backslashreplace").decode()
