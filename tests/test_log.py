"""Log lines: the message, then the facts; one line each, for people or for machines."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from shardlead import log


@pytest.fixture(autouse=True)
def untouched_root() -> Iterator[None]:
    """Whatever a test configures, the next one finds logging as it was."""
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    yield
    root.handlers[:], root.level = before


def written(level: str, style: str, **extra: object) -> str:
    """What one info record becomes."""
    stream = io.StringIO()
    log.configure(level, style, role="worker", name="w1", stream=stream)
    logging.getLogger("shardlead.host").info("serving %s", "now", extra=extra)
    return stream.getvalue()


def test_facts_follow_the_message() -> None:
    """In the order given; a value with spaces is quoted."""
    line = written("info", "text", shard=7, epoch=12, reason="the worker stops", note="")
    assert line.endswith(" info    shardlead.host  serving now  shard=7 epoch=12 reason='the worker stops' note=''\n")


def test_json_is_one_object_a_line() -> None:
    """With the process's role and name; values that JSON does not know become text."""
    line = json.loads(written("info", "json", shard=7, path=Ellipsis))
    del line["t"]
    assert line == {
        "level": "info",
        "logger": "shardlead.host",
        "message": "serving now",
        "role": "worker",
        "name": "w1",
        "shard": 7,
        "path": "Ellipsis",
    }


def test_below_the_level_nothing_is_written() -> None:
    """And configuring again replaces what was there."""
    assert written("warning", "text", shard=7) == ""
    assert written("debug", "text", shard=7).count("\n") == 1


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_traceback_is_kept(style: str) -> None:
    """For people below the line, for machines in a field."""
    stream = io.StringIO()
    log.configure("info", style, stream=stream)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("shardlead.host").exception("failed", extra={"shard": 1})
    assert "ValueError: broken" in stream.getvalue()
    assert stream.getvalue().count("\n") == (1 if style == "json" else stream.getvalue().count("\n"))
