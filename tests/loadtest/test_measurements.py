"""The measurements without scenarios: they say what they measured, and what does not hold."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest import memory
from loadtest.route import Row, broken
from shardlead.errors import CommandError

ROOT = Path(__file__).parents[2]


def measure(*arguments: str, what: str = "route", **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "loadtest", what, *arguments],
        cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_it_measures_every_way_at_every_size(tmp_path: Path) -> None:
    """A line and a row for each; the exit code is about the promises, which a busy machine may break."""
    file = tmp_path / "route.json"
    done = measure("--shards", "4,64", "--rounds", "3", "--json", str(file))
    assert done.returncode in (0, 1), done.stderr
    assert (done.returncode == 1) == ("BROKEN" in done.stdout)
    value = json.loads(file.read_text())
    ways = [(row["target"], row["shards"], row["key"]) for row in value["rows"]]
    assert ways == [
        (target, shards, key)
        for shards in (4, 64)
        for target, key in (("shardlead", "str"), ("shardlead", "bytes"), ("uhashring", "str"))
    ]
    assert all(row["ns"] > 0 and row["memory_kib"] > 0 for row in value["rows"])
    assert value["machine"]["python"]


def test_a_wrong_command_line_is_told() -> None:
    """Exit code 2, without a traceback."""
    for what, *arguments in (
        ("route", "--shards", "0"),
        ("route", "--shards", "x"),
        ("route", "--rounds", "0"),
        ("route", "--json", "/nowhere/at/all"),
        ("client", "--connections", "0"),
        ("client", "--seconds", "nan"),
        ("client", "--targets", "aiohttp,squid"),
        ("cost", "--rounds", "-1"),
        ("cost", "--json", "/"),
        ("memory", "--idle", "0"),
        ("memory", "--bytes", "1e9"),
    ):
        done = measure(*arguments, what=what)
        assert done.returncode == 2
        assert arguments[0].removeprefix("--") in done.stderr
        assert "Traceback" not in done.stderr


def test_the_smart_client_is_held_against_others(tmp_path: Path) -> None:
    """A row for each way and kind of request; the smart client's own ratio is 1."""
    file = tmp_path / "client.json"
    done = measure(
        *("--targets", "aiohttp", "--seconds", "0.05", "--rounds", "1", "--connections", "2", "--json", str(file)),
        what="client",
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["method"], row["body_bytes"], row["target"]) for row in rows] == [
        (method, size, target)
        for method, size in (("GET", 0), ("POST", 0), ("POST", 1_024))
        for target in ("client", "aiohttp")
    ]
    assert all(row["rps"] > 0 and row["requests_per_cpu_s"] > 0 for row in rows)
    assert all(row["ratio_rps"] == row["ratio_cpu"] == 1 for row in rows if row["target"] == "client")


def test_the_routers_memory_is_measured(tmp_path: Path) -> None:
    """A row for each; the exit code is about the promises."""
    file = tmp_path / "memory.json"
    done = measure("--seconds", "0.5", "--bytes", "2000000", "--idle", "50", "--json", str(file), what="memory")
    assert done.returncode in (0, 1), done.stderr
    assert (done.returncode == 1) == ("BROKEN" in done.stdout)
    rows = json.loads(file.read_text())["rows"]
    assert [(row["target"], row["connections"], row["body_bytes"]) for row in rows] == [
        ("download", 1, 2_000_000),
        ("upload", 1, 2_000_000),
        ("idle", 50, 0),
        ("busy", 512, 0),
    ]
    assert all(row["before_kib"] > 10_000 for row in rows), "the router itself, at least"


@pytest.mark.skipif(not (shutil.which("wrk") and shutil.which("nginx")), reason="wrk or nginx is not installed")
@pytest.mark.parametrize("is_traced", [False, True], ids=["plain", "traced"])
def test_a_requests_cost_is_measured(tmp_path: Path, *, is_traced: bool) -> None:
    """A row for each proxy, the router's own ratio 1; also where others may not read the temporary files."""
    file = tmp_path / "cost.json"
    tmp_path.chmod(0o700)
    done = measure(
        *("--quick", "--targets", "router,aiohttp", "--rounds", "1", "--round-s", "0.2", "--json", str(file)),
        *(("--traced",) if is_traced else ()),
        what="cost",
        TMPDIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["target"], row["body_bytes"], row["connections"]) for row in rows] == [
        ("router", 0, 32),
        ("aiohttp", 0, 32),
    ]
    assert all(row["requests_per_cpu_s"] > 0 and row["rps"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1


def test_a_router_that_is_gone_is_told() -> None:
    """Its connections fail by the hundred; one message says so."""
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]

        async def idle() -> None:
            async with contextlib.AsyncExitStack() as opened:
                await memory._open(port, 3, opened)

        for measured in (idle(), memory._busy(port, os.getpid(), 0.6)):
            with pytest.raises(CommandError, match=r"connections to the router: .*Connect call failed"):
                asyncio.run(measured)


def test_broken_promises_are_found() -> None:
    """Too slow, or not so much faster than the ring as promised at that size."""
    fine = Row("shardlead", 1_024, "str", 400.0, 390.0, 8.5, 700)
    slow = Row("shardlead", 10_000, "str", 700.0, 390.0, 8.5, 700)
    near = Row("shardlead", 64, "str", 400.0, 390.0, 3.9, 700)
    assert broken([fine]) == []
    assert [text.partition(":")[0] for text in broken([fine, slow, near])] == ["10000 shards", "64 shards"]
