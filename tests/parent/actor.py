"""Plays a worker under a parent: takes leases, declares its will, and does what its plan says. `python -m ...actor`.

The plan is one JSON line on stdin (not an argument: it may hold a password). Facts go to stdout, a JSON line each.
"""

import asyncio
import json
import os
import random
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace

import msgspec

from shardlead.clock import SystemClock
from shardlead.config import StoreSettings
from shardlead.store.etcd import EtcdStore
from shardlead.worker.will import LastWill

LEASE_TTL_S = 60  # so long that no test can take its end for a revocation
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Plan:
    endpoints: tuple[str, ...] = ()
    """What to take leases from; none: declare nothing."""
    dead_endpoints: tuple[str, ...] = ()
    """Named in the will, before the good ones."""
    username: str = ""
    password: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    fenced: bool = True
    sessions: int = 1
    """How many leases are taken and declared, one after the other."""
    withdraw: bool = False
    fork: bool = False
    """Fork a child that holds every descriptor we have, and lives on."""
    orphan: bool = False
    """Leave a grandchild whose own parent is gone, that ends soon."""
    end: str = "wait"
    """"exit" with 3, "kill" oneself, "signals": tell each signal that comes; "wait": until killed or orphaned."""


@dataclass
class Facts:
    pid: int
    group: int
    leases: list[int] = field(default_factory=list)
    child: int = 0


def say(fact: object) -> None:
    os.write(1, json.dumps(fact).encode() + b"\n")


async def main() -> None:
    plan = msgspec.json.decode(sys.stdin.readline(), type=Plan)
    will = LastWill.from_environment()
    facts = Facts(os.getpid(), os.getpgrp())
    heard: asyncio.Queue[str] = asyncio.Queue()
    if plan.end == "signals":
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, heard.put_nowait, signal.Signals(number).name)
    settings = StoreSettings(
        endpoints=plan.endpoints,
        username=plan.username,
        password=plan.password,
        ca_file=plan.ca_file,
        cert_file=plan.cert_file,
        key_file=plan.key_file,
    )
    async with AsyncExitStack() as stack:
        if plan.endpoints:
            assert will is not None
            store = await stack.enter_async_context(EtcdStore(settings, clock=SystemClock(), rng=random.Random()))
            for _ in range(plan.sessions):
                facts.leases.append((await store.grant(LEASE_TTL_S)).lease)
                in_will = (*plan.dead_endpoints, *plan.endpoints)
                will.declare(facts.leases[-1], replace(settings, endpoints=in_will), fenced=plan.fenced)
            if plan.withdraw:
                will.withdraw()
    if plan.fork:
        facts.child = os.fork()
        if not facts.child:
            signal.pause()
    if plan.orphan:
        between = os.fork()
        if not between:
            os.fork()  # the grandchild; it ends at once, too
            os._exit(0)
        os.waitpid(between, 0)  # noqa: ASYNC222  # at once; from here on the grandchild is PID 1's, before we say facts
    say(asdict(facts))
    match plan.end:
        case "exit":
            sys.exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "signals":
            while True:
                say(await heard.get())
        case _ if will is not None:
            await will.parent_died()
            say("orphaned")
        case _:
            signal.pause()


if __name__ == "__main__":
    asyncio.run(main())
