"""The worker's end of its parent's socket: what the parent is to do when this process is dead, and news of its death.

    will = LastWill.from_environment()         # None: nobody started us who would revoke our lease
    will.declare(lease, settings, fenced=True)     # right after the grant, before anything is put on the lease
    will.withdraw()                                # after we have revoked it ourselves
    await will.parent_died()

Law: protocol in shardlead/parent.py. A parent that is dead, frozen or slow never holds up or fails the worker; the
last line declared counts, so a line that could not be sent yet is replaced, never queued behind. What is declared
holds credentials: it goes through this socket only, never through an argument, the environment, a file or a log.
"""

import asyncio
import logging
import os
import socket
import stat
from collections.abc import MutableMapping
from typing import Final

import orjson

from shardlead.config import StoreSettings

FD_VARIABLE: Final = "SHARDLEAD_PARENT_FD"  # as in shardlead/parent.py, which imports nothing and is not imported

logger = logging.getLogger("shardlead.worker.will")


class LastWill:
    """What the parent knows. All methods but `parent_died` return at once; all belong to one event loop's thread."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.set_inheritable(False)
        self._connection = connection
        self._unsent = b""  # the rest of a line that was begun, and must be ended
        self._next = b""  # the newest whole line behind it
        self._writing_in: asyncio.AbstractEventLoop | None = None
        self._reading_in: asyncio.AbstractEventLoop | None = None
        self._death = asyncio.Event()

    def __repr__(self) -> str:
        state = "parent died" if self._death.is_set() else "unsent" if self._unsent or self._next else "told"
        return f"<LastWill fd {self._connection.fileno()}, {state}>"

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] | None = None) -> "LastWill | None":
        """The will of a process that a parent has started; None without one. Takes the variable out of the
        environment, so that programs started from here do not take our parent for theirs."""
        text = (os.environ if environment is None else environment).pop(FD_VARIABLE, "")
        if not text:
            return None
        try:
            fd = int(text)
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                raise ValueError(f"file descriptor {fd} is not a socket")
            return cls(socket.socket(fileno=fd))
        except (ValueError, OSError) as exc:
            logger.warning("no last will: %s is not usable", FD_VARIABLE, extra={"value": text, "reason": str(exc)})
            return None

    def declare(self, lease: int, settings: StoreSettings, *, fenced: bool) -> None:
        """From now on the parent revokes `lease` once this process is dead (never, if not `fenced`). The endpoints
        are tried in the order of the settings."""
        self._tell(
            {
                "lease": str(lease),
                "fenced": fenced,
                "endpoints": list(settings.endpoints),
                "username": settings.username,
                "password": settings.password,
                "ca_file": _absolute(settings.ca_file),
                "cert_file": _absolute(settings.cert_file),
                "key_file": _absolute(settings.key_file),
            }
        )

    def withdraw(self) -> None:
        """Nothing is left to revoke."""
        self._tell({"lease": None})

    async def parent_died(self) -> None:
        """Return once the parent is dead. Bounded by nothing: parents live as long as their workers."""
        if not self._death.is_set() and self._reading_in is None:
            self._reading_in = asyncio.get_running_loop()
            self._reading_in.add_reader(self._connection.fileno(), self._read)
        await self._death.wait()

    def close(self) -> None:
        """Stop listening and close the socket; what was declared still holds. Idempotent."""
        self._stop_reading()
        self._stop_writing()
        self._connection.close()

    # --- inside --------------------------------------------------------------------------------------------------

    def _tell(self, will: dict[str, object]) -> None:
        if self._death.is_set() or self._connection.fileno() < 0:
            return
        self._next = orjson.dumps(will) + b"\n"
        self._send()

    def _send(self) -> None:
        """Send as much as the socket takes now; ask to be called again for the rest."""
        while self._unsent or self._next:
            if not self._unsent:
                self._unsent, self._next = self._next, b""
            try:
                sent = self._connection.send(self._unsent, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                if self._writing_in is None:
                    self._writing_in = asyncio.get_running_loop()
                    self._writing_in.add_writer(self._connection.fileno(), self._send)
                return
            except OSError as exc:
                self._bury(str(exc))
                return
            self._unsent = self._unsent[sent:]
        self._stop_writing()

    def _read(self) -> None:
        try:
            if self._connection.recv(1_024):
                return  # a parent says nothing; a newer one may
            reason = "its end of the socket is closed"
        except BlockingIOError:
            return
        except OSError as exc:
            reason = str(exc)
        self._bury(reason)

    def _bury(self, reason: str) -> None:
        if not self._death.is_set():
            logger.warning("parent process died", extra={"reason": reason})
        self._death.set()
        self._unsent = self._next = b""
        self._stop_reading()
        self._stop_writing()

    def _stop_reading(self) -> None:
        if self._reading_in is not None:
            self._reading_in.remove_reader(self._connection.fileno())
            self._reading_in = None

    def _stop_writing(self) -> None:
        if self._writing_in is not None:
            self._writing_in.remove_writer(self._connection.fileno())
            self._writing_in = None


def _absolute(path: str) -> str:
    return os.path.abspath(path) if path else ""  # noqa: PTH100  # "" must stay ""; the parent keeps strings
