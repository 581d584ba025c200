"""Many runs, on all cores: `python -m tests simulate`.

    python -m tests simulate                                     200 seeds of each scenario
    python -m tests simulate --seeds 20000 --first-seed 5000     the long form
    python -m tests simulate --scenario store --first-seed 17 --seeds 1 --trace

A seed that fails is told with the command that runs it alone. The exit code is 1 if any did. Ctrl-C ends it with the
sum so far, and exit code 130.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from tests.simulation.run import Outcome, simulate
from tests.simulation.scenarios import ALL, SCENARIOS

SEEDS = 200
SHOW_EVERY_S = 10.0
FAILURES_SHOWN = 20


def main(arguments: Sequence[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests simulate", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many of each scenario ({SEEDS})")
    parser.add_argument("--first-seed", type=int, default=1, help="the first one (1)")
    parser.add_argument("--scenario", choices=sorted(ALL), action="append", help="only this one; may be repeated")
    parser.add_argument("--all", action="store_true", help="all scenarios, not only the five of every check")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="how many processes")
    parser.add_argument("--trace", action="store_true", help="print what happened, in full")
    asked = parser.parse_args(arguments)
    names = asked.scenario or list(ALL if asked.all else SCENARIOS)
    jobs = [(name, seed) for seed in range(asked.first_seed, asked.first_seed + asked.seeds) for name in names]
    if asked.trace:
        try:
            return _traced(jobs)
        except KeyboardInterrupt:
            return 130
    return report(runs(jobs, asked.processes), len(jobs))


def _traced(jobs: Sequence[tuple[str, int]]) -> int:
    is_clean = True
    for name, seed in jobs:
        outcome = simulate(name, seed, is_tracing=True)
        print("\n".join(outcome.trace))
        print(f"{outcome}\n{outcome.digest} {', '.join(outcome.deeds)}")
        is_clean &= not outcome.violations
    return 0 if is_clean else 1


def _run(job: tuple[str, int]) -> Outcome:
    outcome = simulate(*job)
    if not outcome.violations:
        outcome.trace = []
    return outcome


def runs(jobs: Sequence[tuple[str, int]], processes: int) -> Iterator[Outcome]:
    """The outcomes, as they come. Processes are started afresh and their hashes are fixed: a run depends on its seed
    alone."""
    os.environ["PYTHONHASHSEED"] = "0"
    context = multiprocessing.get_context("spawn")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is for this process, not for these
    try:
        pool = context.Pool(processes, maxtasksperchild=200)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with pool:
        yield from pool.imap_unordered(_run, jobs, chunksize=4)


def report(outcomes: Iterator[Outcome], total: int) -> int:
    """Print progress and what failed, at Ctrl-C too; the exit code."""
    began = shown = time.monotonic()
    done, failed, virtual_s, requests, leaderships = 0, [], 0.0, 0, 0
    names = Counter[str]()
    is_cut = False
    try:
        for outcome in outcomes:
            done += 1
            virtual_s += outcome.virtual_s
            requests += outcome.requests
            leaderships += outcome.leaderships
            if outcome.violations:
                failed.append(outcome)
                names.update({violation.name for violation in outcome.violations})
                if len(failed) <= FAILURES_SHOWN:
                    print(f"FAILED {outcome.scenario} seed {outcome.seed}")
                    for violation in outcome.violations[:5]:
                        print(f"    {violation}")
                    print(f"    {outcome.command}", flush=True)
            if time.monotonic() - shown > SHOW_EVERY_S:
                shown = time.monotonic()
                rate = done / (shown - began)
                print(f"{done} of {total} runs, {len(failed)} failed, {rate:.1f} runs/s", flush=True)
    except KeyboardInterrupt:
        is_cut = True
    seconds = time.monotonic() - began
    counted = f"stopped: {done} of {total} runs" if is_cut else f"{done} runs"
    broken = f" ({', '.join(f'{name} {count}' for name, count in sorted(names.items()))})" if names else ""
    print(
        f"{counted}, {len(failed)} failed{broken}; {virtual_s / 3600:.1f} h of virtual time, "
        f"{leaderships} leaderships, {requests} requests, in {seconds:.1f} s",
        file=sys.stdout,
        flush=True,
    )
    return 1 if failed else 130 if is_cut else 0
