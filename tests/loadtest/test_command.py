"""The command line: wrong words are answered with a clear line and exit code 2; a short run end to end."""

import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from loadtest.__main__ import main
from loadtest.scenarios import SCENARIOS
from tests.loadtest.test_report import read


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
