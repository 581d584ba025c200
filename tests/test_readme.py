"""The README's promises to a newcomer: its tutorial runs, its commands exist, its files are there."""

import asyncio
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shardlead.cli import shardlead as group
from shardlead.testing import LocalCluster

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
LINES_MAX = 40


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.e2e
def test_the_tutorial_runs_as_printed(tmp_path: Path) -> None:
    """A worker of one's own and its test, copied from the page, pass; together they have fewer than 40 lines."""
    worker, test, *_ = blocks("python")
    lines = [line for line in (worker + test).splitlines() if line.strip()]
    assert len(lines) < LINES_MAX
    (tmp_path / "seats.py").write_text(worker)
    (tmp_path / "test_seats.py").write_text(test)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_seats.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    left = list(tmp_path.glob("*.sqlite3*"))
    assert left == [], "a fenced file that is left behind refuses the leaders of the next `dev` and the next test"


@pytest.mark.e2e
def test_the_hosted_application_and_both_clients_run_as_printed(tmp_path: Path) -> None:
    """The aiohttp application serves, the smart client asks it, and so does code that blocks, from several threads."""
    _, _, who, asking, blocking = blocks("python")
    (tmp_path / "who.py").write_text(who)
    (tmp_path / "blocking.py").write_text(blocking)
    assert len([line for line in blocking.splitlines() if line.strip()]) <= 25

    async def story() -> tuple[str, list[tuple[int, bytes]]]:
        async with LocalCluster(
            "who:worker", workers=2, routers=1, environment={"PYTHONPATH": str(tmp_path)}
        ) as cluster:
            text = asking.replace('"http://etcd-1:2379"', repr(cluster.store_url)).replace(
                '"shows"', repr(cluster.name)
            )
            (tmp_path / "asking.py").write_text(text)
            command = [sys.executable, "asking.py"]
            printed = await asyncio.to_thread(
                subprocess.run, command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
            )
            answers = await asyncio.to_thread(ask_from_threads, cluster.store_url, cluster.name)
        return printed.stdout + printed.stderr, answers

    def ask_from_threads(store: str, cluster: str) -> list[tuple[int, bytes]]:
        names: dict[str, Any] = {}
        exec(blocking, names)
        client = names["BlockingClient"](store, cluster)
        with ThreadPoolExecutor(4) as threads:
            answers = list(
                threads.map(lambda number: client.request("GET", f"/who/{number}", key=str(number)), range(40))
            )
        client.close()
        return answers

    printed, answers = asyncio.run(story())
    assert re.fullmatch(r"200 \{'shard': .*'asked': 1\}\nLed\(worker='w.', address='.*', shard=.*\)\n", printed), (
        printed
    )
    assert {status for status, _ in answers} == {200}
    assert len({json.loads(body)["by"] for _, body in answers}) == 2


def test_every_command_that_it_names_exists() -> None:
    """What stands after `shardlead` in code is a command."""
    named = set(re.findall(r"`shardlead ([a-z]+)", TEXT)) | set(re.findall(r"bin/shardlead ([a-z]+)", TEXT))
    assert named
    assert named <= set(group.commands)


def test_every_file_that_it_links_to_is_there() -> None:
    """No link into the tree is broken."""
    linked = [target for target in re.findall(r"\]\(([^)]+)\)", TEXT) if not target.startswith("http")]
    assert linked
    assert [target for target in linked if not (ROOT / target).exists()] == []


def test_every_dependency_has_its_reason() -> None:
    """Each package that pyproject.toml asks for stands in the table, and each setting that the page names exists."""
    project = (ROOT / "pyproject.toml").read_text()
    asked = set(re.findall(r'^    "([a-z0-9-]+)[>=]', project, flags=re.MULTILINE))
    table = TEXT.partition("## Dependencies")[2].partition("## Inside")[0]
    assert {name for name in asked if name not in table} == set()


def test_every_setting_that_it_names_exists() -> None:
    """A field that was renamed is renamed here, too."""
    known = (ROOT / "config" / "production.toml").read_text()
    sections = re.findall(r"`(cluster|store|lease|worker|router|controller|admin|log)\.([a-z_]+)`", TEXT)
    assert sections
    assert [field for _, field in sections if not re.search(rf"^#?{field} = ", known, flags=re.MULTILINE)] == []
