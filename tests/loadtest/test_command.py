"""The command line: wrong words are answered with a clear line and exit code 2; short runs end to end."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import orjson
import pytest

from loadtest.__main__ import main
from loadtest.scenarios import SCENARIOS
from shardlead.testing import LocalCluster
from tests.loadtest.test_report import read

RULES: Final = {"router.key_rules": "path:/counters/{key}"}


def run(*words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadtest", *words], capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Missing argument 'SCENARIO'"),
        (["stedy"], "'stedy' is not one of"),
        (["steady", "--rate", "fast"], "'fast': must be numbers from 1 to 200,000"),
        (["steady", "--rate", "0"], "'0': must be numbers"),
        (["steady", "--rate", "100,"], "'100,': must be numbers"),
        (["steady", "--duration", "1"], "1.0 is not in the range 3.0<=x<=3600.0"),
        (["steady", "--shards", "0"], "0 is not in the range"),
        (["steady", "--store", "redis"], "'redis': must be embedded, etcd, or the URL"),
        (["steady", "--keys", "zipfy"], "'zipfy': must be uniform, zipf"),
        (["steady", "--payload", "1k"], "'1k': must be sizes up to 16,777,216 bytes"),
        (["steady", "--path", "/nothing"], "must begin with / and have {key} in it once"),
        (["steady", "--set", "lease"], "'lease': must be SECTION.FIELD=VALUE"),
        (["steady", "--url", "http://127.0.0.1:1"], "give --store URL, too"),
        (["kill-leader", "--workers", "1"], "kill-leader needs at least 2"),
        (["steady", "--rate", "200000", "--duration", "3600"], "at most 20,000,000"),
        (["steady", "--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["steady", "--through", "teleport"], "'teleport' is not one of"),
        (["steady", "--nonsense"], "No such option"),
    ],
)
def test_a_wrong_command_line_is_said_and_ends_with_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was wrong and what is allowed."""
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_wrong_command_line_shows_no_traceback() -> None:
    """The same from outside: the exit code is the process's own."""
    done = run("steady", "--rate", "fast")
    assert done.returncode == 2
    assert "'fast': must be numbers" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["steady", "--url", "http://127.0.0.1:1", "--store", "http://127.0.0.1:1"], "no router answers at"),
        (["steady", "--app", "no.such:thing", "--duration", "3"], "there is no module 'no'"),
        (["steady", "--set", "router.no_such=1", "--duration", "3"], "no_such"),
        (["kill-host", "--url", "http://127.0.0.1:1", "--store", "http://127.0.0.1:1"], "--do"),
    ],
)
def test_what_cannot_begin_says_why(words: list[str], said: str) -> None:
    """Nobody there, an application or a setting that is not: one clear text, exit code 2, no traceback of ours."""
    done = run(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "loadtest/run.py" not in done.stderr


def test_help_names_each_scenario_with_its_promises() -> None:
    """What will be held against the cluster can be read before."""
    done = run("--help")
    assert done.returncode == 0
    words = " ".join(done.stdout.split())
    for scenario in SCENARIOS.values():
        assert f"{scenario.name} {scenario.summary}" in words
        for promise in scenario.promises(scenario.ttl_s):
            assert promise.text in words


@pytest.mark.e2e
def test_a_short_run_end_to_end(tmp_path: Path) -> None:
    """Five seconds of load on a cluster of real processes: no request fails, the JSON and the report are written, the
    exit code is 0 and nothing is left running."""
    done = run(
        *("steady", "--duration", "5", "--rate", "200", "--shards", "16", "--workers", "2"),
        *("--json", str(tmp_path / "out.json"), "--report", str(tmp_path / "out.html")),
        timeout_s=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = orjson.loads((tmp_path / "out.json").read_bytes())
    assert found["failed"] == 0
    assert 980 <= found["sent"] <= 1040
    assert found["seen"]["violations"] == []
    assert found["verify"]["violations"] == 0
    assert found["verify"]["requests"] >= found["sent"]
    assert sum(row["requests"] for row in found["per_shard"]) == found["sent"]
    assert {row["leader"] for row in found["per_shard"]} == {"w1", "w2"}
    page = (tmp_path / "out.html").read_text()
    assert read(page).wrong == []
    assert "kept" in done.stdout


@pytest.mark.e2e
def test_a_broken_promise_ends_with_1(tmp_path: Path) -> None:
    """An application that now and then answers for another shard: its 2xx is no good answer, and the run says so."""
    done = run(
        *("steady", "--duration", "3", "--rate", "100", "--shards", "8", "--workers", "1"),
        *("--app", "tests.loadtest.apps:Liar", "--json", str(tmp_path / "out.json")),
        timeout_s=110,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN      no request fails" in done.stdout
    found = orjson.loads((tmp_path / "out.json").read_bytes())
    assert 0 < found["failed"] < found["sent"] / 4
    assert set(found["failures"]) == {"GET: 200 of the wrong shard", "POST: 200 of the wrong shard"}
    assert not found["is_kept"]


@pytest.mark.e2e
def test_a_running_cluster_is_only_looked_at(tmp_path: Path) -> None:
    """--url and --store: load on a cluster that was started elsewhere, and with --do a fault that its operator makes;
    its moves and failovers are found in the store, and it runs on afterwards."""

    async def story() -> tuple[int, str]:
        async with LocalCluster("loadtest.app:memory", workers=2, shards=8, folder=tmp_path, settings=RULES) as cluster:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "loadtest", "kill-leader", "--duration", "5", "--rate", "100"),
                *("--url", cluster.url, "--store", cluster.store_url, "--cluster", cluster.name),
                *("--do", f"kill -9 {cluster.workers['w1'].pid}", "--json", str(tmp_path / "out.json")),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            async with asyncio.timeout(60):
                out, _ = await process.communicate()
            assert process.returncode is not None
            assert (await cluster.map()).counts() == {"w2": 8}
            return process.returncode, out.decode()

    code, said = asyncio.run(story())
    assert code in (0, 1), said  # a busy machine may take more than 300 ms
    found = orjson.loads((tmp_path / "out.json").read_bytes())
    assert len(found["failover_ms"]) == 4
    assert {(move["source"], move["target"]) for move in found["moves"]} == {("w1", "w2")}
    assert found["verify"] is None
    assert set(found["failures"]) <= {"POST: 502 outcome-unknown"}, said


@pytest.mark.e2e
def test_ctrl_c_ends_everything() -> None:
    """Under load: exit code 130, no traceback, and no process of it is left."""
    with subprocess.Popen(
        [sys.executable, "-m", "loadtest", "steady", "--duration", "60", "--rate", "50", "--shards", "8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "failed   0" in line:
                break
        children = descendants(process.pid)
        assert len(children) > 5
        process.send_signal(signal.SIGINT)
        lines += process.stdout.readlines()
        code = process.wait(timeout=30)
    said = "".join(lines)
    assert code == 130, said
    assert "interrupted" in said
    assert "Traceback" not in said
    assert [pid for pid in children if is_alive(pid)] == []


def descendants(pid: int) -> list[int]:
    """The processes that it started, and theirs."""
    rows = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split("\n")
    parents = {int(row.split()[0]): int(row.split()[1]) for row in rows if row.strip()}
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def is_alive(pid: int) -> bool:
    """Whether there is such a process, a zombie not counted."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return not state.strip().startswith("Z") and bool(state.strip())
