"""What the measurements without scenarios have in common: their command lines, and the file of their figures.

Law: a wrong command line is told before anything is measured, and what was measured is printed before it is written.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

import orjson

from loadtest.machine import describe

COUNT_MAX: Final = 10_000
SECONDS_MAX: Final = 600.0
Number = TypeVar("Number", int, float)


def number(low: int, high: int) -> Callable[[str], int]:
    """For argparse: a whole number within these."""

    def parse(text: str) -> int:
        return _within(int(text), low, high)

    return parse


def count(text: str) -> int:
    """For argparse: a number of rounds or connections."""
    return _within(int(text), 1, COUNT_MAX)


def seconds(text: str) -> float:
    """For argparse: how long a round takes."""
    return _within(float(text), 0.01, SECONDS_MAX)


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: some of these, with commas between."""

    def parse(text: str) -> list[str]:
        found = text.split(",")
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)!r} is unknown; there are {', '.join(known)}")
        return found

    return parse


def file(text: str) -> Path:
    """For argparse: where to write."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.absolute().parent}, or it is one itself")
    return path


def write(path: Path | None, rows: Sequence[Any]) -> bool:
    """Write the machine and the rows (dataclasses) there, if anywhere; False, and why on stderr, if it cannot be."""
    if path is None:
        return True
    found = {"machine": describe(), "rows": [asdict(row) for row in rows]}
    try:
        path.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    except OSError as exc:
        print(f"loadtest: --json {path}: {exc.strerror}", file=sys.stderr)
        return False
    return True


def _within(value: Number, low: Number, high: Number) -> Number:
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{value} is not within {low} to {high:,}")
    return value
