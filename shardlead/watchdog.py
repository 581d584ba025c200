"""Ends what a process has started if that process is gone, even by SIGKILL. Run by file path; standard library only.

Its standard input is a pipe that the starter holds: `+ <pid>` and `- <pid>` lines tell it whose descendants to keep
in mind; the end of the pipe means that the starter has ended, and then all that is left of them is killed.

Law: it kills nothing while the pipe stands, and afterwards only processes of sessions and pids it was told of.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROUNDS = 5  # a process may fork while it is being killed
ROUND_S = 0.05


class Row(NamedTuple):
    """One process of this machine."""

    pid: int
    parent: int
    group: int
    session: int  # 0: the system does not tell
    state: str  # "Z": ended, not yet collected


def table() -> list[Row]:
    """Every process of this machine that we may see."""
    proc = Path("/proc")
    if (proc / "self" / "stat").exists():
        return [row for path in proc.iterdir() if path.name.isdigit() and (row := _row(path)) is not None]
    listed = subprocess.run(  # macOS
        ["/bin/ps", "-A", "-o", "pid=,ppid=,pgid=,state="], capture_output=True, text=True, check=True, timeout=10
    )
    rows = (line.split() for line in listed.stdout.splitlines())
    return [Row(int(row[0]), int(row[1]), int(row[2]), 0, row[3][0]) for row in rows]


def members(leaders: Iterable[int]) -> set[int]:
    """The living processes of the sessions, groups and descendants of `leaders`, themselves included."""
    wanted = set(leaders)
    rows = [row for row in table() if row.state not in "ZX"]
    found = {row.pid for row in rows if row.pid in wanted or row.group in wanted or row.session in wanted}
    while more := {row.pid for row in rows if row.parent in found and row.pid not in found}:
        found |= more
    return found


def end(leaders: Iterable[int]) -> None:
    """Kill them all, at once, and whatever they fork meanwhile."""
    wanted = set(leaders)
    for _ in range(ROUNDS):
        living = members(wanted) - {os.getpid()}
        if not living:
            return
        wanted |= living  # a killed process's children belong to init and would be lost to sight
        for pid in living:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(ROUND_S)


def _row(path: Path) -> Row | None:
    try:
        _, _, rest = (path / "stat").read_text().rpartition(")")
    except (OSError, UnicodeDecodeError):
        return None  # it ended while we looked
    fields = rest.split()
    return Row(int(path.name), int(fields[1]), int(fields[2]), int(fields[3]), fields[0])


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # it ends with its pipe, not with a terminal
    leaders: set[int] = set()
    for line in sys.stdin:
        sign, _, pid = line.partition(" ")
        if sign == "+":
            leaders.add(int(pid))
        else:
            leaders.discard(int(pid))
    end(leaders)


if __name__ == "__main__":
    main()
