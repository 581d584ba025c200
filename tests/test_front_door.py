"""The front door: every public name is there, and asking for none of them is cheap."""

import subprocess
import sys

import pytest

import shardlead


@pytest.mark.parametrize("name", shardlead.__all__)
def test_every_public_name_is_there(name: str) -> None:
    """Each name of `__all__` can be imported, and is listed by `dir`."""
    assert getattr(shardlead, name).__name__ == name
    assert name in dir(shardlead)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As with any module."""
    with pytest.raises(AttributeError, match="no attribute 'Leader'"):
        _ = shardlead.Leader


def test_the_door_alone_is_light() -> None:
    """`import shardlead` brings in neither an event loop nor an HTTP library, nor anything else of ours."""
    code = (
        "import sys, shardlead; heavy = {'aiohttp', 'asyncio', 'uvloop', 'msgspec', 'shardlead.errors'}; "
        "print(sorted(heavy & set(sys.modules))); shardlead.errors.Fenced"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"
