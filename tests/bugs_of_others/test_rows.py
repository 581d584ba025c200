"""The table of README.md and the tests are the same: no row without a test, no test that is not there."""

import ast
import functools
import re
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]
ROWS: Final = range(1, 36)
_NUMBERED: Final = re.compile(r"test_(\d\d)_\w+")


def rows() -> dict[int, list[str]]:
    """Each row of the table, with what it is tested by: a module of this folder, or a test's id."""
    found = {}
    for line in (HERE / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].isdigit():
            assert int(cells[0]) not in found, f"row {cells[0]} stands twice"
            found[int(cells[0])] = re.findall(r"`([^`]+)`", cells[3])
    return found


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """The names of a module's test functions."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    functions = (node for node in module.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(function.name for function in functions if function.name.startswith("test_"))


def numbered() -> dict[int, set[str]]:
    """Each row's own tests: row -> the modules of this folder that have one."""
    found: dict[int, set[str]] = {}
    for path in sorted(HERE.glob("test_*.py")):
        for name in names_in(path):
            if match := _NUMBERED.fullmatch(name):
                found.setdefault(int(match[1]), set()).add(path.name)
    return found


def test_every_row_has_a_test_that_exists() -> None:
    """One here that has its number, in the module that the row names, or one elsewhere by its id; all 35, in order."""
    table, own = rows(), numbered()
    assert list(table) == list(ROWS)
    for row, places in table.items():
        assert places, f"row {row} has no test"
        for place in places:
            path, _, name = place.partition("::")
            if name:
                assert name in names_in(ROOT / path), f"row {row}: there is no {place}"
            else:
                assert path in own.get(row, ()), f"row {row}: {path} has no test_{row:02}_…"


def test_every_numbered_test_is_in_the_table() -> None:
    """So that a reader of the table finds it."""
    table = rows()
    for row, modules in numbered().items():
        assert modules <= set(table[row]), f"row {row} does not name {modules}"


def test_every_test_of_a_bug_has_its_number_and_tells_of_it() -> None:
    """In this folder, but for this module."""
    for path in sorted(HERE.glob("test_*.py")):
        if path == Path(__file__):
            continue
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                assert _NUMBERED.fullmatch(function.name), function.name
                assert ast.get_docstring(function), f"{function.name} says nothing"
