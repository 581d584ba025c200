"""What a run is judged by: histories, lost acknowledgements, audit logs, the processes' logs."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shardlead import audit
from shardlead.errors import AuditError
from tests.e2e.faults.workload import Record
from tests.support import linearizable

_TROUBLE: Final = re.compile(r"Traceback|\bERROR\b|\berror\s+shardlead|never retrieved|never awaited|AssertionError")
_EXPECTED: Final = ("the store does not answer; trying on", "work goes on after it was cancelled")
"""Errors that a fault explains: who is started while its links are cut, and whose writes are held, says so."""
_SHOWN: Final = 20


@dataclass
class History:
    """What the histories of all keys say."""

    keys: int = 0
    wrong: list[str] = field(default_factory=list)
    """Keys whose history is not linearizable, with why."""
    lost: list[str] = field(default_factory=list)
    """Acknowledged appends that are not in the list in the end."""


def judge_history(records: Sequence[Record], final: Mapping[str, Any]) -> History:
    """Every key by itself; what the file holds in the end is one read more, after all others."""
    by_name: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_name[record.name].append(record)
    found = History(len(by_name))
    for name, mine in sorted(by_name.items()):
        history = [each.operation() for each in mine if each.outcome != "fail"]
        end_ns = 1 + max((max(each.began_ns, each.ended_ns) for each in mine), default=0)
        is_list = name.startswith("lists/")
        kept = final.get(name, [] if is_list else 0)
        seen = tuple(kept) if is_list else kept
        history.append(linearizable.Operation("read", end_ns, end_ns, seen=seen, name="the file in the end"))
        if is_list:
            why = linearizable.faults(history, linearizable.Lists())
        else:
            why = linearizable.faults(history, linearizable.Counts())
        if why:
            found.wrong.append(f"{name}: " + "\n    ".join(why))
        if is_list:
            found.lost += [f"{name} {word}" for word in linearizable.lost_words(history, seen)]
    return found


@dataclass(frozen=True)
class Audit:
    """What `shardlead verify` says."""

    summary: str
    violations: list[str]


def judge_audit(folder: Path) -> Audit:
    """Two leaders at once, or epochs that interleave, by the workers' audit logs; a log that cannot be read is wrong,
    too."""
    try:
        report = audit.verify(folder)
    except AuditError as exc:
        return Audit("no verdict", [f"verify: {exc}"])
    return Audit(str(report).splitlines()[0], [str(violation) for violation in report.violations])


def troubles(logs: Path) -> list[str]:
    """Lines of the processes' logs that no fault explains: tracebacks, errors."""
    found = []
    for file in sorted(logs.glob("*.log")):
        for number, line in _lines(file):
            if _TROUBLE.search(line) and not any(text in line for text in _EXPECTED):
                found.append(f"{file.name}:{number}: {line[:300]}")
                if len(found) >= _SHOWN:
                    return found
    return found


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        yield from enumerate((line.rstrip() for line in lines), 1)
