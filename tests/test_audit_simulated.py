"""Audit logs of simulated fleets, in omniscient time: the shipped workers write them, each by its machine's own clock,
and the test puts all times upon one, which no fleet has. So guard intervals of different machines are compared, too.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shardlead import verify
from shardlead.audit import Report
from shardlead.core.audit import Accept, AnyLine, Deadline, decode, encode
from shardlead.virtual import Machine
from tests.simulation.ablations import ABLATIONS
from tests.simulation.run import Outcome, simulate
from tests.simulation.scenarios import MISBEHAVIOURS, SCENARIOS
from tests.simulation.world import World

SEEDS = 2
SEEDS_MAX = 6
Patch = Callable[[World], contextlib.AbstractContextManager[object]]


@dataclass
class Auditor:
    """Has a world's workers write audit logs, and reads them at its end."""

    folder: Path
    logs: list[tuple[Machine, list[AnyLine]]] = field(default_factory=list)
    inner: Patch = contextlib.nullcontext

    @contextlib.contextmanager
    def patch(self, world: World) -> Iterator[None]:
        worker = replace(world.settings.worker, audit_dir=str(self.folder))
        world.settings = replace(world.settings, worker=worker)
        try:
            with self.inner(world):
                yield
        finally:  # before the world is abandoned, in which the dead come to their ends
            for client in world.clients:
                client._drop()  # they have read once more since they ended, and are collected with a warning else
            for machine, process in world.processes.items():
                begun: Any = getattr(process, "worker", None)  # none, if it was killed at once
                audit = begun._audit if begun is not None else None
                if audit is not None:
                    audit.close()
                    raw = Path(audit.where).read_bytes().splitlines()
                    self.logs.append((machine, [decode(line) for line in raw]))

    def verdict(self) -> Report:
        """With every time in true time, as if all machines were one."""
        folder = self.folder / "true"
        folder.mkdir()
        for number, (machine, lines) in enumerate(self.logs):
            text = b"".join(encode(in_true_time(machine, line)) for line in lines)
            (folder / f"{number}.audit.jsonl").write_bytes(text)
        return verify(folder)


def in_true_time(machine: Machine, line: AnyLine) -> AnyLine:
    times: dict[str, Any] = {"at_ns": machine.true_ns_of(line.at_ns), "boot_id": "true"}
    match line:
        case Accept(admitted_ns=admitted_ns):
            times["admitted_ns"] = machine.true_ns_of(admitted_ns)
        case Deadline(deadline_ns=deadline_ns) if deadline_ns:
            times["deadline_ns"] = machine.true_ns_of(deadline_ns)
        case _:
            pass
    return msgspec.structs.replace(line, **times)


def audited(name: str, seed: int, inner: Patch = contextlib.nullcontext, **options: Any) -> tuple[Outcome, Report]:
    """One run, and the verdict on its logs."""
    with tempfile.TemporaryDirectory() as folder:
        auditor = Auditor(Path(folder), inner=inner)
        outcome = simulate(name, seed, patch=auditor.patch, **options)
        return outcome, auditor.verdict()


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_scenario_leaves_a_violation(name: str) -> None:
    """Kills, pauses, lost machines, cuts, elections of the store: what the witness finds clean, the logs show clean,
    and they have every leadership that the witness saw."""
    for seed in range(1, SEEDS + 1):
        outcome, report = audited(name, seed)
        assert outcome.violations == [], str(outcome)
        assert report.is_good, f"{outcome.command}\n{report}"
        assert report.leaderships == outcome.leaderships, outcome.command
        assert report.requests > 0, outcome.command


def test_to_write_them_changes_nothing() -> None:
    """The same seed with and without an audit is the same run, event for event."""
    outcome, _ = audited("crashes", 5)
    assert outcome.digest == simulate("crashes", 5).digest


LIES = ("early-revoke", "key-gone-lease-alive", "renew-after-revoke")
ABLATED = ("before-the-ack", "missing-ttl")


@pytest.mark.parametrize("name", [*LIES, *ABLATED])
def test_two_leaders_show_in_the_logs(name: str) -> None:
    """With a store that ends leases early, or a safeguard taken away, two guards say yes at once. The logs say so, and
    never of a run in which the omniscient witness saw it nowhere."""
    scenario, inner = (
        (MISBEHAVIOURS[name].scenario, contextlib.nullcontext)
        if name in LIES
        else (ABLATIONS[name].scenario, ABLATIONS[name].patch)
    )
    for seed in range(1, SEEDS_MAX + 1):
        outcome, report = audited(name, seed, inner, scenario=scenario)
        was_seen = "I3" in {violation.name for violation in (*outcome.violations, *outcome.tolerated)}
        was_found = "overlap" in {violation.kind for violation in report.violations}
        assert was_seen or not was_found, f"{name} {seed}: a false alarm\n{report}"
        if was_found:
            return
    raise AssertionError(f"{name}: nothing was found in {SEEDS_MAX} seeds")


def test_an_epoch_of_two_leaderships_shows_in_the_logs() -> None:
    """Epochs that are no revisions of their own come twice."""
    ablation = ABLATIONS["create-revision"]
    _, report = audited("create-revision", 1, ablation.patch, scenario=ablation.scenario)
    assert "shared-epoch" in {violation.kind for violation in report.violations}
