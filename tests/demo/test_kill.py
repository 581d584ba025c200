"""kill -9 takes back no acknowledged increment."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

from shardlead import demo

REPOSITORY = Path(__file__).parents[2]
LINES, DEATHS = 200, 3


def test_a_killed_process_leaves_every_acknowledged_increment(tmp_path: Path) -> None:
    """Killed in full swing, several times over: the file holds what was acknowledged, and at most the one increment
    more whose answer was under way."""
    path = tmp_path / "counters.sqlite3"
    environment = {**os.environ, demo.DATABASE_VARIABLE: str(path)}
    last = 0
    for epoch in range(1, DEATHS + 1):
        command = [sys.executable, "-m", "tests.demo.poster", str(epoch)]
        with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE) as poster:
            assert poster.stdout is not None
            told = [poster.stdout.readline() for _ in range(LINES)]
            poster.kill()
            told += poster.stdout.readlines()
        values = [json.loads(line)["value"] for line in told if line.endswith(b"\n")]
        assert values[0] in (last + 1, last + 2)
        assert values == list(range(values[0], values[0] + len(values)))
        last = values[-1]
        with contextlib.closing(sqlite3.connect(path)) as db:
            stored = db.execute("SELECT value FROM counters WHERE name = 'a'").fetchone()[0]
        assert stored in (last, last + 1)
