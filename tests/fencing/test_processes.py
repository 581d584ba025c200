"""Two real processes on one SQLite file, each of which believes to lead most of the time."""

import contextlib
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

ROUNDS = 300
REPOSITORY = Path(__file__).parents[2]


def test_rival_processes_lose_no_acknowledged_write(tmp_path: Path) -> None:
    """Accepted epochs never decrease, and every value in the log is the one before plus one: no write was computed
    from a state that had changed meanwhile. What was acknowledged is what is stored."""
    path = tmp_path / "log.sqlite3"
    command = [sys.executable, "-m", "tests.fencing.usurper", str(path), str(ROUNDS)]
    pipe = subprocess.PIPE
    rivals = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY) for _ in range(2)]
    try:
        for rival in rivals:
            assert rival.stdout is not None
            assert rival.stdout.readline() == "ready\n"
        for rival in rivals:
            assert rival.stdin is not None
            rival.stdin.write("go\n")
            rival.stdin.flush()
        told = [json.loads(rival.communicate(timeout=60)[0]) for rival in rivals]
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()
    assert [rival.returncode for rival in rivals] == [0, 0]

    with contextlib.closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT epoch, value FROM log ORDER BY number").fetchall()
    epochs, values = [row[0] for row in rows], [row[1] for row in rows]
    assert all(each["acknowledged"] for each in told), "both got something done"
    assert sum(each["refused"] for each in told) > 0, "they got in each other's way"
    assert epochs == sorted(epochs)
    assert values == list(range(1, len(values) + 1))
    assert sorted(value for each in told for value in each["acknowledged"]) == values
