"""The high-water mark of revisions: what a store without a memory keeps, so that no epoch is handed out twice.

Law: the number on disk is synced before any revision up to it is used; a start goes on above it. What cannot be read
is never guessed. It blocks for the time of an fsync, once in a million revisions.
"""

import fcntl
import os
import re
from pathlib import Path
from typing import Final

from shardlead.errors import CommandError

REVISION_END: Final = 1 << 48  # an epoch has 48 bits for the revision
_REVISION: Final = re.compile(r"[0-9]{1,15}")


class RevisionMark:
    """The high-water mark of revisions in a data directory, held by one process at a time.

    `reserved` is on disk, synced, before any revision up to it is used; the next start goes on above it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "revision"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise CommandError(f"the embedded store cannot use {folder}: {exc.strerror}") from exc
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(self._lock)
            raise CommandError(f"another embedded store uses {folder}: stop it or give another --data") from exc
        try:
            self.reserved = self._read()
        except CommandError:
            self.close()
            raise

    def _read(self) -> int:
        try:
            text = self._path.read_text("ascii").strip()
        except FileNotFoundError:
            return 1
        except (OSError, UnicodeDecodeError) as exc:
            raise CommandError(f"{self._path} cannot be read: {exc}") from exc
        revision = int(text) if _REVISION.fullmatch(text) else 0
        if not 0 < revision < REVISION_END:
            # guessing here could hand out an epoch a second time
            raise CommandError(f"{self._path} is damaged: write a number above every revision used so far into it")
        return revision

    def reserve(self, revision: int) -> None:
        """Make `revision` and all below it safe to use. Raises OSError; then nothing was reserved."""
        fresh = self._path.with_suffix(".new")
        with fresh.open("w", encoding="ascii") as file:
            file.write(f"{revision}\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.reserved = revision

    def close(self) -> None:
        """Let another process use the directory."""
        os.close(self._lock)
