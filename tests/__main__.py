"""The whole check in one command.

    python -m tests            format, lint, strict types, imports, all tests but the long ones
    python -m tests long       the same with the long lists
    python -m tests simulate   the simulation alone: seeds, scenarios, traces (see --help)
    python -m tests faults     random faults to real processes on three real etcd members (see --help)
    python -m tests PATH ...   pytest alone, with these arguments

Every step runs, whatever the ones before it said; the last line counts, and the exit code is 0 only if all passed.
Tests of parts mostly wait (for leases to end, for sockets), so they run in three lanes side by side; those of whole
clusters (tests/e2e) measure times and run alone, afterwards; random faults (tests/e2e/faults) come last. The
simulation, which has a time of its own, takes what the others leave of the cores, and stands still while times are
measured.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.support import staircase

ROOT: Final = Path(__file__).parents[1]
TREES: Final = ("shardlead", "tests", "loadtest")
SLOWEST: Final = 10
SHOW_EVERY_S: Final = 1.0
LANES: Final = (
    ("bugs_of_others", "cluster", "controller", "loadtest", "support"),
    ("client", "core", "interop", "parent", "store", "worker"),
)
"""The folders of the first lanes, each about a third of the time; the last lane has all others."""
HALF: Final = "etcd or test_dev_command"
"""The whole clusters of one lane: about half of the time, too."""
FAULTS_LATER: Final = "--ignore=tests/e2e/faults"
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
    if arguments[:1] == ["simulate"]:
        from tests.simulation import many  # what it imports takes longer than the other checks need to begin

        return many.main(arguments[1:])
    if arguments[:1] == ["faults"]:
        from tests.e2e.faults import run as faults

        return faults.main(arguments[1:])
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
    """pytest over everything, lanes side by side: the parts, then whole clusters. They mostly wait."""
    headline("tests")
    began = time.monotonic()
    named = [name for lane in LANES for name in lane]
    others = ["tests", *(f"--ignore=tests/{name}" for name in (*named, "e2e", "simulation"))]
    with tempfile.TemporaryDirectory(prefix="shardlead-check-") as name:
        folder = Path(name)
        lanes = [
            *(Lane(" ".join(lane), [*arguments, *(f"tests/{name}" for name in lane)], folder) for lane in LANES),
            Lane("all others", [*arguments, *others], folder),
        ]
        simulation = Lane("simulation", [*arguments, "tests/simulation"], folder, is_patient=True)
        try:
            codes = [lane.finish() for lane in lanes]
            simulation.signal(signal.SIGSTOP)
            clusters = [
                Lane("whole clusters on etcd", [*arguments, "tests/e2e", FAULTS_LATER, "-k", HALF], folder),
                Lane(
                    "whole clusters, the rest", [*arguments, "tests/e2e", FAULTS_LATER, "-k", f"not ({HALF})"], folder
                ),
            ]
            codes += [lane.finish() for lane in clusters]
            simulation.signal(signal.SIGCONT)
            faults = Lane("random faults", [*arguments, "tests/e2e/faults"], folder)
            codes += [faults.finish(), simulation.finish()]
        finally:
            simulation.signal(signal.SIGKILL)
        lanes += [*clusters, faults, simulation]
    counts = Counter[str]()
    for lane in lanes:
        counts.update(lane.counts)
    return Step("tests", not any(codes), time.monotonic() - began, dict(counts))


class Lane:
    """One pytest, begun at once; `finish` passes its output through and reads the counts from its last line."""

    def __init__(self, name: str, arguments: list[str], folder: Path, *, is_patient: bool = False) -> None:
        self.name = name
        self.counts: dict[str, int] = {}
        self._output = folder / f"{name}.txt"  # not a pipe, which would fill up while the other lane is read
        words = ["--quiet", f"--durations={SLOWEST}", "--durations-min=0.5", "-p", "no:cacheprovider", *arguments]
        with self._output.open("wb") as output:
            first = ["nice", "-n", "10"] if is_patient else []  # it has no clock but its own: others go first
            self._process = subprocess.Popen(
                [*first, sys.executable, "-m", "pytest", *words],
                stdout=output,
                process_group=0 if is_patient else None,
            )

    def signal(self, number: signal.Signals) -> None:
        """To a patient lane and whatever it has started, unless it has ended."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def finish(self) -> int:
        """Wait for its end and show what it prints meanwhile; the exit code."""
        headline(self.name)
        with self._process, self._output.open("rb") as output:
            code = None
            while code is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = self._process.wait(timeout=SHOW_EVERY_S)
                sys.stdout.buffer.write(output.read())
                sys.stdout.flush()
        for line in self._output.read_text(encoding="utf-8", errors="replace").splitlines():
            self.counts = _counts(line) or self.counts
        return code


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
