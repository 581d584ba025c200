"""`verify`: audit logs, read and judged. What workers write down, and what it proves: `core.audit`.

    report = verify("logs/")
    assert report.is_good, report

Law: any number of files is read once, a piece at a time; memory grows with leaderships, never with requests. A last
line without its end was torn by a crash: it is counted and passed over. Anything else that is not of a log is refused
with file and line (AuditError), for a verdict on half of a log would be none.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shardlead.core.audit import LINE_BYTES_MAX, SUFFIX, decode
from shardlead.core.testimony import LogReader, Place
from shardlead.core.verdict import Verdict
from shardlead.errors import AuditError

PIECE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Cited:
    """A line of a log, as it stands there."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@dataclass(frozen=True, slots=True)
class Violation:
    """Two lines that cannot both be true (one, where the other is missing), and why. Kinds: `core.verdict`."""

    kind: str
    text: str
    lines: tuple[Cited, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.kind}: {self.text}", *(f"  {line}" for line in self.lines)])


@dataclass(frozen=True, slots=True)
class Report:
    """What the logs prove. `requests` are those whose answer passed the guard, `refused` those that were refused."""

    leaderships: int
    requests: int
    refused: int
    violation_count: int
    violations: tuple[Violation, ...]
    """The first of them; `violation_count` counts all."""
    files: int
    lines: int
    torn: int
    """Last lines without their end."""

    @property
    def is_good(self) -> bool:
        return self.violation_count == 0

    def __str__(self) -> str:
        counts = ((self.leaderships, "leadership"), (self.requests, "request"), (self.violation_count, "violation"))
        first = ", ".join(f"{count} {noun}" if count == 1 else f"{count} {noun}s" for count, noun in counts)
        more = self.violation_count - len(self.violations)
        return "\n".join([first, *map(str, self.violations), *([f"and {more} more"] if more else [])])


def verify(*logs: str | os.PathLike[str]) -> Report:
    """The verdict on the audit logs of one cluster: files, or folders in which every `*.audit.jsonl` is one, at any
    depth. Logs may still be written to. Raises AuditError for what is missing, unreadable, or no audit log.

    Not promised: anything about processes whose log is not given.
    """
    files = list(_files(logs))
    verdict = Verdict()
    lines = torn = 0
    for path in files:
        log = verdict.begin(str(path))
        try:
            count, is_torn = _read(path, log)
        except OSError as exc:
            raise AuditError(str(path), f"cannot be read: {exc.strerror or exc}") from exc
        lines, torn = lines + count, torn + is_torn
        verdict.add(log.end())
    findings = verdict.finish()
    violations = tuple(
        Violation(collision.kind, collision.text, tuple(_cite(files, place) for place in collision.places))
        for collision in findings.collisions
    )
    return Report(
        leaderships=findings.leaderships,
        requests=findings.requests,
        refused=findings.refused,
        violation_count=findings.violations,
        violations=violations,
        files=len(files),
        lines=lines,
        torn=torn,
    )


def _files(logs: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    """Each file once, however often it was named. Raises AuditError."""
    seen: set[tuple[int, int]] = set()
    for name in logs:
        path = Path(name)
        try:
            found = sorted(path.rglob(f"*{SUFFIX}")) if path.is_dir() else [path]
            if not found:
                raise AuditError(str(path), f"there is no audit log in this folder (*{SUFFIX})")
            for file in found:
                status = file.stat()
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    yield file
        except (OSError, ValueError) as exc:  # ValueError: a NUL in its name
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
            raise AuditError(str(path), f"cannot be read: {reason}") from exc


def _read(path: Path, log: LogReader) -> tuple[int, bool]:
    """How many lines it has, and whether the last one is torn. Raises OSError, AuditError."""
    number = offset = 0
    rest = b""
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            lines = (rest + piece).split(b"\n")
            rest = lines.pop()
            for line in lines:
                number += 1
                log.take(number, offset, line)
                offset += len(line) + 1
            if len(rest) > LINE_BYTES_MAX:
                raise AuditError(f"{path}:{number + 1}", f"a line of more than {LINE_BYTES_MAX} bytes: no audit log")
    if not rest:
        return number, False
    if not _is_line(rest):
        return number, True
    log.take(number + 1, offset, rest)  # an editor, perhaps, took its end away
    return number + 1, False


def _is_line(raw: bytes) -> bool:
    try:
        decode(raw)
    except ValueError:
        return False
    return True


def _cite(files: Sequence[Path], place: Place) -> Cited:
    path = files[place.file]
    try:
        with path.open("rb") as file:
            file.seek(place.offset)
            text = file.readline(LINE_BYTES_MAX).decode("utf-8", "backslashreplace").rstrip("\n")
    except OSError as exc:  # it was read a moment ago
        raise AuditError(str(path), f"cannot be read again: {exc.strerror or exc}") from exc
    return Cited(str(path), place.line, text)
