"""The terminal of `shardlead dev`: plain lines, and words for numbers."""

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Final, TextIO


class Console:
    """Plain lines; colours only on a terminal, and not if NO_COLOR is set."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._is_coloured = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def line(self, text: str = "") -> None:
        """One line; a terminal that is gone is no reason to fail."""
        with contextlib.suppress(OSError, ValueError):
            print(text, file=self._out, flush=True)

    def event(self, wall_s: float, text: str, *, colour: str = "") -> None:
        """One line with the time of day before it, in UTC as in the log lines that stand between."""
        at = time.strftime("%H:%M:%S", time.gmtime(wall_s))
        self.line(f"{self.dim(at)}  {self._paint(colour, text) if colour else text}")

    def bold(self, text: str) -> str:
        return self._paint("1", text)

    def dim(self, text: str) -> str:
        return self._paint("2", text)

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._is_coloured else text


RED: Final = "31"


def counted(number: int, noun: str) -> str:
    """A number and what it counts, as people write it."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def balance(counts: Mapping[str, int], total: int) -> str:
    """Who leads how much, on one line."""
    led = sum(counts.values())
    missing = f"   {total - led} without a leader" if led < total else ""
    return "   ".join(f"{name} {count}" for name, count in counts.items()) + missing
