"""The README's promises to a newcomer: its tutorial runs, its commands exist, its files are there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shardlead.cli import shardlead as group

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
LINES_MAX = 40


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.e2e
def test_the_tutorial_runs_as_printed(tmp_path: Path) -> None:
    """A worker of one's own and its test, copied from the page, pass; together they have fewer than 40 lines."""
    worker, test = blocks("python")
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
