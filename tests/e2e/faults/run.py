"""One run: a fleet, clients, rounds of faults, and what it all came to.

    python -m tests faults --seconds 600 --seed 7 [--etcd 3.4] [--case auth] [--app Unfenced]

The folder with logs, etcd's data and the history of every operation is kept where something is wrong, and named.
"""

import argparse
import asyncio
import contextlib
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.e2e.faults.fleet import CASES, Fleet, Plan, Store
from tests.e2e.faults.judge import judge_audit, judge_history, troubles
from tests.e2e.faults.nemesis import FAULTS, MARGIN_S, OFTEN, Nemesis
from tests.e2e.faults.workload import Workload
from tests.support.etcd import KINDS

WHOLE_MAX_S: Final = 60.0
CALM_S: Final = 1.0
FAULTS_AT_ONCE_MAX: Final = 4
BOUND_EXTRA_S: Final = 1.0
BOUND_EXTRA_ELECTION_S: Final = 5.0
LISTS, COUNTS = 6, 4


@dataclass
class Outcome:
    """What a run came to. `wrong` lists what counts as ours."""

    plan: Plan
    seed: int
    seconds: float
    only: Sequence[str] = ()
    operations: dict[str, int] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    slowest_s: float = 0.0
    """The longest that it took, after the last fault of a round, until all was led and served; against its bound."""
    slowest_bound_s: float = 0.0
    keys: int = 0
    late: list[str] = field(default_factory=list)
    histories: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    verdict: str = ""
    """The first line of what `shardlead verify` says, and its violations."""
    audit: list[str] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    store: list[str] = field(default_factory=list)
    """What hashkv and etcd's logs say: not ours."""

    @property
    def wrong(self) -> list[str]:
        return [*self.late, *self.histories, *self.lost, *self.audit, *self.surprises, *self.troubles]

    @property
    def command(self) -> str:
        """Runs the same faults again."""
        plan = self.plan
        return (
            f"python -m tests faults --seconds {self.seconds:g} --seed {self.seed} --etcd {plan.etcd} "
            f"--case {plan.case} --app {plan.app.rpartition(':')[2]} --ttl {plan.ttl_s} --workers {plan.workers}"
            + (f" --only {','.join(self.only)}" if self.only else "")
        )

    def __str__(self) -> str:
        counts = self.operations
        history = f"histories not linearizable: {len(self.histories)}; acknowledged writes lost: {len(self.lost)}"
        rest = f"processes that ended by themselves: {len(self.surprises)}; errors in logs: {len(self.troubles)}"
        asked = f"{counts.get('ok', 0)} ok, {counts.get('fail', 0)} failed, {counts.get('info', 0)} unknown"
        after = f"at worst {self.slowest_s:.2f} s after the last fault (bound there {self.slowest_bound_s:g} s)"
        lines = [
            f"seed {self.seed}: {self.seconds:g} s on three etcd {self.plan.etcd} ({self.plan.case}), {self.plan.app}",
            f"operations: {asked}, on {self.keys} keys",
            "faults: " + ", ".join(f"{count} {name}" for name, count in sorted(self.faults.items())),
            f"led and served again after {self.rounds} rounds, {after}, {len(self.late)} late",
            f"{history}; {rest}",
            f"verify: {self.verdict}",
            f"the store: {'; '.join(self.store) or 'all members hold the same (etcdctl endpoint hashkv)'}",
            *self.wrong,
        ]
        if self.wrong or self.store:
            lines += [f"kept in {self.plan.folder}", f"again: {self.command}"]
        return "\n".join(lines)


def run(
    plan: Plan, seed: int, seconds: float, *, only: Sequence[str] = (), say: Callable[[str], object] = print
) -> Outcome:
    """Play it, with all faults or these only. The folder stays."""
    outcome = Outcome(plan, seed, seconds, only)
    asyncio.run(_play(outcome, say))
    outcome.troubles = troubles(plan.folder / "cluster" / "logs")
    judged = judge_audit(plan.folder / "audit")
    outcome.verdict, outcome.audit = judged.summary, judged.violations
    (plan.folder / "outcome.txt").write_text(f"{outcome}\n", encoding="utf-8")
    return outcome


async def _play(outcome: Outcome, say: Callable[[str], object]) -> None:
    plan, seed = outcome.plan, outcome.seed
    rng = random.Random(seed)
    drawn = outcome.only or [*FAULTS, *OFTEN]
    async with Store(plan) as store, Fleet(plan, store) as fleet:
        workload = Workload([fleet.address("r1"), fleet.address("r2")], seed, clients=8, pause_s=0.05)
        nemesis = Nemesis(fleet, rng, say)
        compacting = asyncio.create_task(nemesis.compacting())
        until_s = time.monotonic() + outcome.seconds
        try:
            while time.monotonic() < until_s:
                outcome.rounds += 1
                workload.set_keys(f"r{outcome.rounds}", LISTS, COUNTS)
                names = rng.choices(drawn, k=rng.randint(1, FAULTS_AT_ONCE_MAX))
                await _round(fleet, nemesis, outcome, names)
        finally:
            compacting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await compacting
        await workload.finish()
        outcome.operations, outcome.faults = workload.counts(), nemesis.done
        workload.write(plan.folder / "history.jsonl")
        final = fleet.stored()
        spoiled = await fleet.members.spoiled()
        outcome.store = [*([spoiled] if spoiled else []), *fleet.members.log_findings()[:5]]
        outcome.surprises = fleet.surprises
    judged = judge_history(workload.records, final)
    outcome.keys, outcome.histories, outcome.lost = judged.keys, judged.wrong, judged.lost


async def _round(fleet: Fleet, nemesis: Nemesis, outcome: Outcome, names: list[str]) -> None:
    """Some faults, and then whole again in time."""
    term = await fleet.members.term()
    nemesis.say(f"round {outcome.rounds}: {' '.join(names)}")
    healed_s = await nemesis.round(names)
    try:
        await fleet.wait_whole(WHOLE_MAX_S)
    except TimeoutError as exc:
        outcome.late.append(f"round {outcome.rounds} ({' '.join(names)}): {exc}")
        nemesis.say(outcome.late[-1])
    took_s = time.monotonic() - healed_s
    has_elected = await fleet.members.term() > term
    bound_s = fleet.plan.ttl_s + (BOUND_EXTRA_ELECTION_S if has_elected else BOUND_EXTRA_S)
    if not fleet.plan.is_fenced:
        bound_s += fleet.plan.ttl_s + MARGIN_S  # so much longer an unclean successor waits before it serves
    nemesis.say(f"whole {took_s:.2f} s after the last fault{', etcd has elected' if has_elected else ''}")
    if took_s > bound_s and not (outcome.late and outcome.late[-1].startswith(f"round {outcome.rounds} ")):
        outcome.late.append(
            f"round {outcome.rounds} ({' '.join(names)}): whole after {took_s:.2f} s instead of {bound_s:g} s"
        )
    if not outcome.slowest_bound_s or took_s - bound_s > outcome.slowest_s - outcome.slowest_bound_s:
        outcome.slowest_s, outcome.slowest_bound_s = took_s, bound_s
    await fleet.started()
    for surprise in fleet.note_surprises():
        nemesis.say(f"SURPRISE: {surprise}")
    await fleet.started()
    await asyncio.sleep(CALM_S)


def main(arguments: Sequence[str]) -> int:
    """`python -m tests faults`: runs of random faults against real processes. The exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests faults", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="how long faults go on (120)")
    parser.add_argument("--seed", type=int, default=1, help="the first seed (1)")
    parser.add_argument("--runs", type=int, default=1, help="so many seeds, one after the other (1)")
    parser.add_argument("--etcd", choices=KINDS, default="3.5", help="the wheel's 3.5.1 or Debian's 3.4.23 (3.5)")
    parser.add_argument("--case", choices=CASES, default="plain", help="how the store is reached (plain)")
    parser.add_argument("--app", choices=("Fenced", "Unfenced"), default="Fenced", help="whose writes (Fenced)")
    parser.add_argument("--ttl", type=int, default=5, help="the lease, in seconds (5)")
    parser.add_argument("--workers", type=int, default=4, help="how many workers (4)")
    parser.add_argument("--only", default="", help=f"these faults alone, by commas: {', '.join(FAULTS)}")
    parser.add_argument("--keep", action="store_true", help="keep logs and history of a clean run, too")
    parser.add_argument("--folder", type=Path, help="where everything is written; default: a temporary folder")
    chosen = parser.parse_args(arguments)
    only = [name for name in chosen.only.split(",") if name]
    if unknown := [name for name in only if name not in FAULTS]:
        parser.error(f"no such fault: {', '.join(unknown)}")
    bad = 0
    for seed in range(chosen.seed, chosen.seed + chosen.runs):
        root = chosen.folder or Path(tempfile.mkdtemp(prefix="shardlead-faults-"))
        plan = Plan(
            folder=root / f"seed-{seed}",
            app=f"tests.e2e.faults.apps:{chosen.app}",
            etcd=chosen.etcd,
            case=chosen.case,
            ttl_s=chosen.ttl,
            workers=chosen.workers,
        )
        plan.folder.mkdir(parents=True)
        outcome = run(plan, seed, chosen.seconds, only=only)
        print(f"\n{outcome}\n", flush=True)
        if outcome.wrong:
            bad += 1
        elif not outcome.store and not chosen.keep:
            shutil.rmtree(plan.folder if chosen.folder else root)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
