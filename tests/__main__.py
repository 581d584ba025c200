"""The whole check in one command.

    python -m tests            format, lint, strict types, imports, all tests but the long ones
    python -m tests long       the same with the long lists
    python -m tests PATH ...   pytest alone, with these arguments

Every step runs, whatever the ones before it said; the last line counts, and the exit code is 0 only if all passed.
"""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support import staircase

ROOT: Final = Path(__file__).parents[1]
TREES: Final = ("shardlead", "tests", "loadtest")
SLOWEST: Final = 15
_LAST_LINE: Final = re.compile(r"=+ (?P<counts>.*) in [0-9.]+s.* =+$")
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Step:
    """What one step found. `counts` is pytest's own summing up."""

    name: str
    is_good: bool
    seconds: float
    counts: dict[str, int] = field(default_factory=dict)


def main(arguments: list[str]) -> int:
    """Run the check and print its outcome. The exit code."""
    os.chdir(ROOT)
    began = time.monotonic()
    is_long = arguments == ["long"]
    if arguments and not is_long:
        return subprocess.run([sys.executable, "-m", "pytest", *arguments], check=False).returncode
    steps = [
        run("format", "ruff", "format", "--check", "--diff", "--quiet", *TREES),
        run("lint", "ruff", "check", "--quiet", *TREES),
        run("types", "mypy"),
        imports(),
        tests(["--long"] if is_long else []),
    ]
    print(
        "\n"
        + "\n".join(f"{'ok' if step.is_good else 'FAILED':<7} {step.name:<8} {step.seconds:6.1f} s" for step in steps)
    )
    print(closing_line(steps, time.monotonic() - began))
    return 0 if all(step.is_good for step in steps) else 1


def run(name: str, module: str, *arguments: str) -> Step:
    """One tool of this environment, its output as it comes."""
    headline(name)
    began = time.monotonic()
    code = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
    return Step(name, code == 0, time.monotonic() - began)


def imports() -> Step:
    """The staircase, before the tests, so that its offences are not lost among theirs."""
    headline("imports")
    began = time.monotonic()
    found = staircase.offences(ROOT / "shardlead")
    print("\n".join(found) or "all go down")
    return Step("imports", not found, time.monotonic() - began)


def tests(arguments: list[str]) -> Step:
    """pytest, passed through line by line; its last line is read for the counts."""
    headline("tests")
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "--quiet", f"--durations={SLOWEST}", "--durations-min=0.5", *arguments]
    counts: dict[str, int] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            counts = _counts(line) or counts
    return Step("tests", process.returncode == 0, time.monotonic() - began, counts)


def closing_line(steps: list[Step], seconds: float) -> str:
    """As pytest closes: what failed, what passed, how long it took."""
    counts = dict(next((step.counts for step in steps if step.counts), {}))
    failed = [step.name for step in steps if not step.is_good]
    checks = (
        f"{len(failed)} of {len(steps)} checks failed ({', '.join(failed)})" if failed else f"{len(steps)} checks ok"
    )
    found = [checks, *(f"{number} {what}" for what, number in counts.items())]
    return f" {', '.join(found)} in {seconds:.2f}s ".center(100, "=")


def headline(name: str) -> None:
    print(f" {name} ".center(100, "-"), flush=True)


def _counts(line: str) -> dict[str, int]:
    plain = _COLOUR.sub("", line).strip()
    match = _LAST_LINE.match(plain) or re.match(r"(?P<counts>\d+ \w+(, \d+ \w+)*) in [0-9.]+s", plain)
    if not match:
        return {}
    return {what: int(number) for number, what in re.findall(r"(\d+) (\w+)", match["counts"])}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
