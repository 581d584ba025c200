"""The check itself: what it counts, and that under CI a missing etcd is a failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import __main__ as check

CONFTEST = Path(__file__).parent / "conftest.py"

TESTS = """
import pytest

@pytest.mark.etcd
def test_etcd():
    pytest.skip("no etcd here")

@pytest.mark.long
def test_long():
    pass

def test_other():
    pytest.skip("not on this platform")
"""

WHOLE = 'import pytest\npytest.skip("no etcd here", allow_module_level=True)\n'


def run(folder: Path, *words: str, ci: bool) -> tuple[int, str]:
    """pytest with our conftest over a small folder; its exit code and last line."""
    (folder / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"))
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    etcd: x\n    long: x\n")
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words],
        cwd=folder,
        env={**environment, **({"CI": "true"} if ci else {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.strip().splitlines()[-1]


def test_a_skipped_etcd_test_fails_under_ci(tmp_path: Path) -> None:
    """Only there, and only those that are marked so."""
    (tmp_path / "test_some.py").write_text(TESTS)
    assert run(tmp_path, ci=False)[1].startswith("2 skipped, 1 deselected")
    code, line = run(tmp_path, ci=True)
    assert (code, line.split(" in ")[0]) == (1, "1 failed, 1 skipped, 1 deselected")


def test_a_module_that_skips_itself_fails_under_ci(tmp_path: Path) -> None:
    """Nothing that was meant to run is left out in silence."""
    (tmp_path / "test_whole.py").write_text(WHOLE)
    assert "1 skipped" in run(tmp_path, ci=False)[1]
    assert run(tmp_path, ci=True)[0] != 0


def test_long_tests_run_only_when_asked_for(tmp_path: Path) -> None:
    """`--long`, which is what `python -m tests long` gives to pytest."""
    (tmp_path / "test_some.py").write_text(TESTS)
    assert "1 passed" in run(tmp_path, "--long", ci=False)[1]


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("29 failed, 1283 passed in 469.37s (0:07:49)", {"failed": 29, "passed": 1283}),
        ("===== 12 passed, 1 skipped, 3 deselected in 1.20s =====", {"passed": 12, "skipped": 1, "deselected": 3}),
        ("\x1b[32m12 passed\x1b[0m\x1b[32m in 0.10s\x1b[0m", {"passed": 12}),
        ("1 error in 0.10s", {"error": 1}),
        ("tests/test_check.py ....... [ 50%]", {}),
    ],
)
def test_pytests_last_line_is_read(line: str, counts: dict[str, int]) -> None:
    """With or without frame and colours."""
    assert check._counts(line) == counts


def test_the_last_line_counts() -> None:
    """As pytest's own does, with the checks before the tests."""
    good = [check.Step("lint", True, 1.0), check.Step("tests", True, 2.0, {"passed": 3})]
    assert " 2 checks ok, 3 passed in 3.00s " in check.closing_line(good, 3.0)
    bad = [check.Step("lint", False, 1.0), check.Step("tests", True, 2.0, {"passed": 3})]
    assert " 1 of 2 checks failed (lint), 3 passed in 3.00s " in check.closing_line(bad, 3.0)
