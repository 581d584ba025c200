"""What befalls a fleet: each fault does its harm for a while and undoes it, so that a healed fleet owes us life.

Which faults, to whom, when and for how long comes from the seed. What the processes make of it does not: the same seed
gives the same faults, not the same run.
"""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Final

from shardlead.processes import WorkerProcess
from tests.e2e.faults.fleet import Fleet
from tests.e2e.faults.proxy import Link

Fault = Callable[["Nemesis"], Coroutine[Any, Any, None]]

COMPACT_EVERY_S: Final = 0.7
COMPACT_BEHIND: Final = 3
HELD_WAIT_S: Final = 5.0
GONE_S: Final = 20.0
MARGIN_S: Final = 0.5


class Nemesis:
    """Does rounds of faults to a fleet."""

    def __init__(self, fleet: Fleet, rng: random.Random, say: Callable[[str], object]) -> None:
        self.fleet = fleet
        self.rng = rng
        self.ttl_s = fleet.plan.ttl_s
        self.taken_over_s = fleet.plan.ttl_s if fleet.plan.is_fenced else 2 * fleet.plan.ttl_s + MARGIN_S
        """After so long others serve what a silent worker has led."""
        self.done = Counter[str]()
        self._say = say
        self._began_s = time.monotonic()
        self._busy: set[str] = set()
        self._healed_s = 0.0

    async def round(self, names: list[str]) -> float:
        """These faults, one beginning some time after the other; when the last was undone."""
        self._healed_s = time.monotonic()
        begun: list[asyncio.Task[None]] = []
        for name in names:
            if begun:
                await asyncio.sleep(self.rng.uniform(0.0, 2.5))
            begun.append(asyncio.create_task(self._do(name), name=name))
        for result in await asyncio.gather(*begun, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
        return self._healed_s

    async def _do(self, name: str) -> None:
        await FAULTS[name](self)
        self._healed_s = time.monotonic()

    async def compacting(self) -> None:
        """Compact again and again, close behind the present, until cancelled."""
        while True:
            await asyncio.sleep(COMPACT_EVERY_S)
            if await self.fleet.members.compact(COMPACT_BEHIND):
                self.done["compaction"] += 1

    # --- what faults are made of

    def begin(self, what: str) -> None:
        """Count it and say it."""
        self.done[what.split(" ")[0]] += 1
        self.say(what)

    def say(self, text: str) -> None:
        self._say(f"{time.monotonic() - self._began_s:7.2f}  {text}")

    async def lasts(self, low_s: float, high_s: float) -> None:
        await asyncio.sleep(self.rng.uniform(low_s, high_s))

    @contextlib.contextmanager
    def seize(self, *names: str) -> Iterator[None]:
        """While one fault has these, no other touches them."""
        self._busy.update(names)
        try:
            yield
        finally:
            self._busy.difference_update(names)

    def free(self, names: list[str]) -> list[str]:
        return [name for name in names if name not in self._busy]

    def worker(self) -> WorkerProcess | None:
        """One that runs and that nothing else is done to; the last one that runs is left in peace."""
        running = [name for name, process in self.fleet.workers.items() if process.is_running and process.is_ready]
        free = self.free(sorted(running))
        return self.fleet.workers[self.rng.choice(free)] if len(free) > 1 else None

    def router(self) -> str:
        """One that nothing is done to; "" if another one is in trouble."""
        names = [name for name in self.fleet.to_store if name not in self.fleet.to_worker]
        return self.rng.choice(names) if self.free(names) == names else ""

    def members(self, count: int) -> list[int]:
        """So many members that nothing is done to; none if that would take a majority without being meant to."""
        free = [number for number in range(3) if f"m{number}" not in self._busy]
        return self.rng.sample(free, count) if len(free) == 3 else []

    def store_links(self) -> tuple[str, list[Link]]:
        """All links of one process to the store, or one of them."""
        name = self.rng.choice(sorted(self.fleet.to_store))
        links = self.fleet.to_store[name]
        return name, links if self.rng.random() < 0.7 else [self.rng.choice(links)]


# --- workers ---------------------------------------------------------------------------------------------------------


async def worker_killed(nemesis: Nemesis) -> None:
    """SIGKILL to the worker; its parent revokes."""
    await _ends(nemesis, "worker_killed", lambda process: process.kill())


async def host_lost(nemesis: Nemesis) -> None:
    """SIGKILL to worker and parent: nobody is left to revoke."""
    await _ends(nemesis, "host_lost", lambda process: process.kill_host())


async def parent_killed(nemesis: Nemesis) -> None:
    """SIGKILL to the parent: the worker leaves by itself."""
    await _ends(nemesis, "parent_killed", lambda process: process.kill_parent())


async def worker_restarted(nemesis: Nemesis) -> None:
    """SIGTERM, and a new one."""
    await _ends(nemesis, "worker_restarted", lambda process: process.terminate())


async def _ends(nemesis: Nemesis, what: str, end: Callable[[WorkerProcess], None]) -> None:
    process = nemesis.worker()
    if process is None:
        return
    with nemesis.seize(process.name):
        nemesis.begin(f"{what} {process.name}")
        nemesis.fleet.expect_end(process)
        end(process)
        await process.exited(GONE_S)
        if nemesis.rng.random() < 0.5:
            await nemesis.lasts(0.0, 3.0)
        nemesis.fleet.start_again(process.name)


async def worker_frozen(nemesis: Nemesis) -> None:
    """SIGSTOP for less than a lease, or for more."""
    process = nemesis.worker()
    if process is None:
        return
    with nemesis.seize(process.name):
        is_long = nemesis.rng.random() < 0.6
        nemesis.begin(f"{'worker_frozen_long' if is_long else 'worker_frozen'} {process.name}")
        process.stop()
        await (nemesis.lasts(nemesis.ttl_s + 0.5, nemesis.ttl_s + 4) if is_long else nemesis.lasts(0.2, 3.0))
        process.cont()


async def frozen_in_write(nemesis: Nemesis) -> None:
    """SIGSTOP, longer than its lease, to a worker that has read what it is about to write upon."""
    process = nemesis.worker()
    if process is None:
        return
    with nemesis.seize(process.name):
        async with _held_in_write(nemesis, process.name) as is_writing:
            nemesis.begin(f"{'frozen_in_write' if is_writing else 'worker_frozen_long'} {process.name}")
            process.stop()
            await nemesis.lasts(nemesis.taken_over_s + 1, nemesis.taken_over_s + 4)
        process.cont()


async def write_held(nemesis: Nemesis) -> None:
    """A worker that goes on, with writes that do not end: under drains and losses they outlive their leadership."""
    process = nemesis.worker()
    if process is None:
        return
    with nemesis.seize(process.name):
        async with _held_in_write(nemesis, process.name):
            nemesis.begin(f"write_held {process.name}")
            with contextlib.suppress(TimeoutError):
                await nemesis.fleet.cluster.command("drain", process.name, "--wait", "0")
            await nemesis.lasts(0.5, nemesis.ttl_s + 4)
        with contextlib.suppress(TimeoutError):
            await nemesis.fleet.cluster.command("drain", process.name, "--undo")


@contextlib.asynccontextmanager
async def _held_in_write(nemesis: Nemesis, name: str) -> AsyncIterator[bool]:
    """Hold that worker's writes between what they read and what they write; whether one has come so far."""
    folder = nemesis.fleet.plan.folder
    hold, writing = folder / f"hold-write-{name}", folder / f"writing-{name}"
    writing.unlink(missing_ok=True)
    hold.touch()
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HELD_WAIT_S):
                while not writing.exists():  # noqa: ASYNC110 - another process makes it and sets no event
                    await asyncio.sleep(0.01)
        yield writing.exists()
    finally:
        hold.unlink()


async def router_frozen(nemesis: Nemesis) -> None:
    """SIGSTOP to a router, which then has an old view."""
    name = nemesis.router()
    if name:
        with nemesis.seize(name):
            nemesis.begin(f"router_frozen {name}")
            process = nemesis.fleet.router(name)
            process.stop()
            await nemesis.lasts(0.5, nemesis.ttl_s + 2)
            process.cont()


async def router_killed(nemesis: Nemesis) -> None:
    """SIGKILL to a router; a new one at its address."""
    name = nemesis.router()
    if name:
        with nemesis.seize(name):
            nemesis.begin(f"router_killed {name}")
            process = nemesis.fleet.router(name)
            nemesis.fleet.expect_end(process)
            process.kill()
            await process.exited(GONE_S)
            nemesis.fleet.start_again(name)
            await nemesis.fleet.started(name)


# --- etcd ------------------------------------------------------------------------------------------------------------


async def member_killed(nemesis: Nemesis) -> None:
    """SIGKILL to one member, started again with its data."""
    await _kill_members(nemesis, "member_killed", 1)


async def quorum_killed(nemesis: Nemesis) -> None:
    """SIGKILL to two members at once, started again with their data."""
    await _kill_members(nemesis, "quorum_killed", 2)


async def _kill_members(nemesis: Nemesis, what: str, count: int) -> None:
    numbers = nemesis.members(count)
    if not numbers:
        return
    members = [nemesis.fleet.members[number] for number in numbers]
    with nemesis.seize(*(f"m{number}" for number in numbers)):
        nemesis.begin(f"{what} {numbers}")
        await asyncio.gather(*(asyncio.to_thread(member.kill) for member in members))
        await nemesis.lasts(0.2, nemesis.ttl_s + 2)
        for member in members:
            await asyncio.to_thread(member.spawn)
        for member in members:
            await asyncio.to_thread(member.wait_ready, 60.0)


async def member_frozen(nemesis: Nemesis) -> None:
    """SIGSTOP to one member, by preference the one that leads."""
    numbers = nemesis.members(1)
    leader = await nemesis.fleet.members.leader()
    if not numbers or leader is None:
        return
    number = leader if nemesis.rng.random() < 0.6 else numbers[0]
    await _freeze_members(nemesis, "member_frozen", [number])


async def quorum_frozen(nemesis: Nemesis) -> None:
    """SIGSTOP to two members."""
    numbers = nemesis.members(2)
    if numbers:
        await _freeze_members(nemesis, "quorum_frozen", numbers)


async def _freeze_members(nemesis: Nemesis, what: str, numbers: list[int]) -> None:
    if nemesis.free([f"m{number}" for number in range(3)]) != ["m0", "m1", "m2"]:
        return
    members = [nemesis.fleet.members[number] for number in numbers]
    with nemesis.seize(*(f"m{number}" for number in numbers)):
        nemesis.begin(f"{what} {numbers}")
        for member in members:
            member.freeze()
        await nemesis.lasts(0.3, nemesis.ttl_s + 2)
        for member in members:
            member.thaw()


async def member_cut_off(nemesis: Nemesis) -> None:
    """Between one member and the others: silence, or one way only; by preference the one that leads."""
    numbers = nemesis.members(1)
    leader = await nemesis.fleet.members.leader()
    ids = await nemesis.fleet.members.ids()
    if not numbers or leader is None or not all(ids) or len(nemesis.members(1)) == 0:
        return
    number = leader if nemesis.rng.random() < 0.6 else numbers[0]
    with nemesis.seize(*(f"m{each}" for each in range(3))):
        hears, speaks = nemesis.rng.choice(((False, False), (True, False), (False, True)))
        what = "both" if hears == speaks else "mute" if hears else "deaf"
        nemesis.begin(f"member_cut_off_{what} m{number}{' which leads' if number == leader else ''}")
        nemesis.fleet.peers.cut(number, ids, hears=hears, speaks=speaks)
        await nemesis.lasts(0.5, nemesis.ttl_s + 3)
        nemesis.fleet.peers.heal()


async def leader_moved(nemesis: Nemesis) -> None:
    """etcd's leader passes its place on."""
    if len(nemesis.members(1)) == 1:
        came = await nemesis.fleet.members.move_leader(nemesis.rng.choice)
        nemesis.begin(f"leader_moved {came}")


# --- links -----------------------------------------------------------------------------------------------------------


async def store_cut(nemesis: Nemesis) -> None:
    """Silence between one process and the store, both ways or one."""
    name, links = nemesis.store_links()
    await _cut(nemesis, f"store_cut {name}", links, nemesis.ttl_s + 3)


async def worker_cut(nemesis: Nemesis) -> None:
    """Silence between the routers and one worker, both ways or one."""
    name = nemesis.rng.choice(sorted(nemesis.fleet.to_worker))
    await _cut(nemesis, f"worker_cut {name}", [nemesis.fleet.to_worker[name]], 4.0)


async def _cut(nemesis: Nemesis, what: str, links: list[Link], longest_s: float) -> None:
    names = [link.name for link in links]
    if nemesis.free(names) != names:
        return
    with nemesis.seize(*names):
        which = nemesis.rng.choice(("both", "forward", "backward"))
        resets = nemesis.rng.random() < 0.5
        kind, _, rest = what.partition(" ")
        nemesis.begin(f"{kind}_{which} {rest} {len(links)} links{', reset' if resets else ''}")
        for link in links:
            link.cut(forward=which != "backward", backward=which != "forward")
        await nemesis.lasts(0.3, longest_s)
        for link in links:
            await link.heal(resets=resets)


async def store_refused(nemesis: Nemesis) -> None:
    """Nobody listens where one process looks for the store."""
    name, links = nemesis.store_links()
    await _spoil(nemesis, f"store_refused {name}", links, lambda link: link.refuse(), nemesis.ttl_s + 2)


async def store_late(nemesis: Nemesis) -> None:
    """All that one process and the store say to each other takes long."""
    name, links = nemesis.store_links()
    there_s, back_s = nemesis.rng.uniform(0.0, 0.7), nemesis.rng.uniform(0.0, 0.7)
    await _spoil(nemesis, f"store_late {name}", links, lambda link: link.delay(there_s, back_s), nemesis.ttl_s + 2)


async def worker_late(nemesis: Nemesis) -> None:
    """All that the routers and one worker say to each other takes long."""
    name = nemesis.rng.choice(sorted(nemesis.fleet.to_worker))
    there_s, back_s = nemesis.rng.uniform(0.0, 0.5), nemesis.rng.uniform(0.0, 0.5)
    links = [nemesis.fleet.to_worker[name]]
    await _spoil(nemesis, f"worker_late {name}", links, lambda link: link.delay(there_s, back_s), 4.0)


async def _spoil(nemesis: Nemesis, what: str, links: list[Link], act: Callable[[Link], None], longest_s: float) -> None:
    names = [link.name for link in links]
    if nemesis.free(names) != names:
        return
    with nemesis.seize(*names):
        nemesis.begin(f"{what} {len(links)} links")
        for link in links:
            act(link)
        await nemesis.lasts(0.3, longest_s)
        for link in links:
            await link.heal(resets=False)


async def resets(nemesis: Nemesis) -> None:
    """RST on the connections of some links, again and again."""
    links = nemesis.fleet.links()
    nemesis.begin("resets")
    for _ in range(nemesis.rng.randint(1, 8)):
        for link in nemesis.rng.sample(links, 4):
            link.reset()
        await nemesis.lasts(0.0, 0.5)


async def moves(nemesis: Nemesis) -> None:
    """An operator moves a shard, or empties a worker for a while: handoffs under whatever else goes on."""
    cluster, rng = nemesis.fleet.cluster, nemesis.rng
    name = rng.choice(sorted(nemesis.fleet.workers))
    with contextlib.suppress(TimeoutError):
        if rng.random() < 0.5:
            shard = rng.randrange(nemesis.fleet.plan.shards)
            nemesis.begin(f"moves shard {shard} to {name}")
            await cluster.command("move", str(shard), name, "--wait", "0")
            await nemesis.lasts(0.5, 3.0)
            await cluster.command("unpin", str(shard))
        else:
            nemesis.begin(f"moves all off {name}")
            await cluster.command("drain", name, "--wait", "0")
            await nemesis.lasts(0.5, 3.0)
            await cluster.command("drain", name, "--undo")


FAULTS: Final[dict[str, Fault]] = {
    each.__name__: each
    for each in (
        *(worker_killed, host_lost, parent_killed, worker_restarted, worker_frozen, frozen_in_write, write_held),
        *(router_frozen, router_killed),
        *(member_killed, quorum_killed, member_frozen, quorum_frozen, member_cut_off, leader_moved),
        *(store_cut, worker_cut, store_refused, store_late, worker_late, resets, moves),
    )
}

OFTEN: Final = ("frozen_in_write", "worker_frozen", "store_cut", "member_killed", "worker_killed", "member_cut_off")
"""Drawn twice as often as the others."""
