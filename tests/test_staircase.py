"""Imports go down one staircase; clocks and chance come in by argument; core never awaits."""

from pathlib import Path

import pytest

from tests.support import staircase

PACKAGE = Path(__file__).parents[1] / "shardlead"


def test_every_import_goes_down() -> None:
    """No module of the package imports upwards or sideways, reads a clock of its own, or awaits in core."""
    assert staircase.offences(PACKAGE) == []


def test_every_room_has_one_floor() -> None:
    """No module is missing from the staircase, and none stands on two floors."""
    floors = [room for floor in staircase.FLOORS for room in floor]
    assert sorted(set(floors)) == sorted(floors)
    assert staircase.rooms(PACKAGE) - set(floors) == set()


@pytest.mark.parametrize(
    ("module", "source", "offence"),
    [
        ("core/ring.py", "import asyncio", "core is pure"),
        ("core/ring.py", "async def f() -> None: ...", "core never awaits"),
        ("core/ring.py", "import shardlead.store.base", "not below core"),
        ("store/etcd.py", "from shardlead.core import model", "not below store"),
        ("worker/host.py", "from shardlead.router import pool", "not below worker"),
        ("dev.py", "def f() -> None:\n    import shardlead.store.etcd", "not below dev"),
        ("cluster/view.py", "from shardlead import cli", "not below cluster"),
        ("cluster/view.py", "from . import session", "not below cluster"),
        ("parent.py", "from shardlead import errors", "not below parent"),
        ("parent.py", "import aiohttp", "standard library only"),
        ("cluster/view.py", "import time\nx = time.monotonic()", "reads a clock"),
        ("cluster/view.py", "from time import monotonic", "reads a clock"),
        ("cluster/view.py", "from datetime import datetime\nx = datetime.now()", "reads a clock"),
        ("cluster/view.py", "import random\nx = random.random()", "draws a number"),
        ("attic.py", "", "has no floor"),
    ],
)
def test_each_offence_is_named(tmp_path: Path, module: str, source: str, offence: str) -> None:
    """The check itself sees each kind of offence, and nothing else in the same file."""
    path = tmp_path / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    found = staircase.offences(tmp_path)
    assert [offence in line for line in found] == [True], found


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    """A clean module has no offence."""
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "view.py").write_text(
        "import random\nfrom shardlead.core.model import Meta\nfrom shardlead.store import base\n"
        "def f(rng: random.Random) -> float:\n    return rng.random()\n"
    )
    assert staircase.offences(tmp_path) == []
