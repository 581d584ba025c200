"""What befalls a world: each deed does its harm for a while and then undoes it, so that a healed world owes us life.

Which deeds a run knows is drawn from its scenario's list (a swarm: runs that do a few things often find more than runs
that do everything), and when, to whom and for how long from the seed.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from shardlead.clock import NS_PER_S
from shardlead.cluster import bootstrap
from shardlead.core.keyspace import encode
from shardlead.core.model import Eviction, Wish
from shardlead.errors import ShardleadError
from shardlead.store.base import Delete, Put, Txn
from shardlead.virtual import Machine
from tests.simulation.etcd import LAG_S
from tests.simulation.processes import RouterProcess, WorkerProcess

if TYPE_CHECKING:
    from tests.simulation.world import World

Deed = Callable[["Nemesis"], Coroutine[Any, Any, None]]


@dataclass
class Nemesis:
    """Does deeds, one after the other or several at once, for a time."""

    world: "World"
    rng: random.Random
    deeds: Sequence[str]
    mean_pause_s: float = 3.0
    done: list[str] = field(default_factory=list)
    has_changed_leader: bool = False  # etcd's: then failover may take longer
    _running: "list[asyncio.Task[None]]" = field(default_factory=list)
    busy: set[str] = field(default_factory=set)

    async def run(self, duration_s: float) -> None:
        """Do harm for so long, then wait until everything is undone."""
        world = self.world
        until_ns = world.loop.true_ns() + int(duration_s * NS_PER_S)
        while world.loop.true_ns() < until_ns:
            await asyncio.sleep(self.rng.expovariate(1.0 / self.mean_pause_s))
            name = self.rng.choice(self.deeds)
            self.done.append(name)
            self._running.append(asyncio.create_task(DEEDS[name](self), name=name))
        if self._running:
            await asyncio.wait(self._running)
            for task in self._running:
                task.result()

    # --- what deeds are made of

    def say(self, text: str) -> None:
        self.world.say("NEMESIS", text)

    async def lasts(self, low_s: float, high_s: float) -> None:
        await asyncio.sleep(self.rng.uniform(low_s, high_s))

    def worker(self) -> WorkerProcess | None:
        """One that lives and has nothing else done to it."""
        free = [each for each in self.world.living if each.name not in self.busy and each.has_joined]
        return self.rng.choice(free) if free else None

    def router(self) -> RouterProcess | None:
        free = [each for each in self.world.routers.values() if each.is_alive and each.name not in self.busy]
        return self.rng.choice(free) if free else None

    def caller(self) -> Machine | None:
        """A router's machine, or now and then the smart client's: who asks workers."""
        smart, router = self.world.smart, self.router()
        if smart is not None and self.rng.random() < 0.3:
            return smart.machine
        return router.machine if router is not None else None

    def seize(self, name: str) -> "_Seized":
        return _Seized(self, name)

    def write(self, *ops: Put | Delete) -> None:
        self.world.etcd.write(Txn((), ops))


@dataclass
class _Seized:
    nemesis: Nemesis
    name: str

    def __enter__(self) -> None:
        self.nemesis.busy.add(self.name)  # of one house

    def __exit__(self, *_: object) -> None:
        self.nemesis.busy.discard(self.name)


# --- processes -------------------------------------------------------------------------------------------------------


async def kill(nemesis: Nemesis) -> None:
    """SIGKILL; the parent revokes; a new process comes after a while."""
    process = nemesis.worker()
    if process is None:
        return
    with nemesis.seize(process.name):
        process.crash()
        await nemesis.lasts(0.2, 6.0)
        nemesis.world.start_worker(process.name)


async def lose_machine(nemesis: Nemesis) -> None:
    """Power is gone: nobody revokes, nobody resets connections. A new machine comes."""
    world, process = nemesis.world, nemesis.worker()
    if process is None or len(world.living) < 2:
        return
    with nemesis.seize(process.name):
        process.crash(with_machine=True)
        await nemesis.lasts(0.5, 2.0 * world.setup.ttl_s)
        del world.addresses[process.name]
        world.start_worker(process.name)


async def restart(nemesis: Nemesis) -> None:
    """SIGTERM, and a new process once it has left."""
    world, process = nemesis.world, nemesis.worker()
    if process is None:
        return
    with nemesis.seize(process.name):
        nemesis.say(f"stops {process.machine.name}")
        process.stop()
        await _ended(process, world.settings.worker.shutdown_timeout_s + 10.0)
        await nemesis.lasts(0.0, 2.0)
        world.start_worker(process.name)


async def _ended(process: WorkerProcess, within_s: float) -> None:
    """Until the process has ended; one that does not is a finding of its own."""
    waited_s = 0.0
    while process.is_alive:
        if waited_s > within_s:
            process.world.witness.fail("STOP", f"{process.machine.name} has not ended {within_s} s after SIGTERM")
            process.crash()
            return
        await asyncio.sleep(0.05)
        waited_s += 0.05


async def pause(nemesis: Nemesis) -> None:
    """SIGSTOP, SIGCONT."""
    process = nemesis.worker()
    if process is None:
        return
    with nemesis.seize(process.name):
        nemesis.say(f"pauses {process.machine.name}")
        process.pause()
        await nemesis.lasts(0.1, 2.0 * nemesis.world.setup.ttl_s)
        process.resume()
        nemesis.say(f"resumes {process.machine.name}")


async def stall(nemesis: Nemesis) -> None:
    """A worker's loop is held up for a moment (garbage, a blocking call), again and again."""
    process = nemesis.worker()
    if process is None:
        return
    with nemesis.seize(process.name):
        nemesis.say(f"stalls {process.machine.name}")
        for _ in range(nemesis.rng.randint(1, 6)):
            process.pause()
            await nemesis.lasts(0.02, 1.0)
            process.resume()
            await nemesis.lasts(0.02, 1.0)


async def freeze_machine(nemesis: Nemesis) -> None:
    """A hypervisor holds the machine: its clock stands still, too."""
    process = nemesis.worker()
    if process is None:
        return
    with nemesis.seize(process.name):
        nemesis.say(f"freezes {process.machine.name}")
        process.machine.freeze()
        await nemesis.lasts(0.5, 3.0 * nemesis.world.setup.ttl_s)
        process.machine.thaw()
        nemesis.say(f"thaws {process.machine.name}")


async def set_wall_clock(nemesis: Nemesis) -> None:
    """Somebody sets a machine's wall clock, forward or back, as after a machine was held still."""
    process = nemesis.worker()
    if process is None:
        return
    ahead_s = nemesis.rng.uniform(-5.0, 20.0)
    nemesis.say(f"sets the wall clock of {process.machine.name} by {ahead_s:.1f} s")
    process.machine.clock.wall_ahead_s += ahead_s


async def kill_router(nemesis: Nemesis) -> None:
    router = nemesis.router()
    if router is None:
        return
    with nemesis.seize(router.name):
        router.crash()
        await nemesis.lasts(0.1, 3.0)
        nemesis.world.start_router(router.name)


async def pause_router(nemesis: Nemesis) -> None:
    caller = nemesis.caller()
    if caller is None or caller.is_paused:
        return
    with nemesis.seize(caller.name.partition("#")[0]):
        nemesis.say(f"pauses {caller.name}")
        caller.pause()
        await nemesis.lasts(0.1, 2.0 * nemesis.world.setup.ttl_s)
        caller.resume()


# --- networks --------------------------------------------------------------------------------------------------------


async def cut_from_routers(nemesis: Nemesis) -> None:
    """One worker and one router, or the smart client, do not reach each other, or only one way."""
    network, process, caller = nemesis.world.loop.network, nemesis.worker(), nemesis.caller()
    if process is None or caller is None:
        return
    here, there = process.machine.address, caller.address
    ways = nemesis.rng.choice((((here, there),), ((there, here),), ((here, there), (there, here))))
    nemesis.say(f"cuts {' and '.join('->'.join(way) for way in ways)}")
    for way in ways:
        network.cut(*way)
    await nemesis.lasts(0.2, 2.0 * nemesis.world.setup.ttl_s)
    for way in ways:
        network.heal(*way)


async def reset_connections(nemesis: Nemesis) -> None:
    network, process, caller = nemesis.world.loop.network, nemesis.worker(), nemesis.caller()
    if process is None or caller is None:
        return
    count = network.reset(process.machine.address, caller.address)
    nemesis.say(f"resets {count} connections of {process.machine.name} and {caller.name}")


async def slow_network(nemesis: Nemesis) -> None:
    """Between one router, or the smart client, and one worker everything takes long."""
    network, process, caller = nemesis.world.loop.network, nemesis.worker(), nemesis.caller()
    if process is None or caller is None:
        return
    pairs = [(process.machine.address, caller.address), (caller.address, process.machine.address)]
    nemesis.say(f"slows {process.machine.name} and {caller.name}")
    for pair in pairs:
        network.delays[pair] = (0.05, 0.4)
    await nemesis.lasts(1.0, 6.0)
    for pair in pairs:
        network.delays.pop(pair, None)


async def trouble_storage(nemesis: Nemesis) -> None:
    """The resource is slow, loses requests and answers, and gets writes long after their senders gave up."""
    storage, rng = nemesis.world.storage, nemesis.rng
    if "storage" in nemesis.busy:
        return
    with nemesis.seize("storage"):
        before = storage.faults
        nemesis.say("troubles the storage")
        storage.faults = replace(
            before, slow=rng.uniform(0, 0.3), late=rng.uniform(0, 0.2), lost=rng.uniform(0, 0.1), answer_lost=0.1
        )
        await nemesis.lasts(1.0, 8.0)
        storage.faults = before


async def trouble_open(nemesis: Nemesis) -> None:
    manners = nemesis.world.manners
    nemesis.say("lets open() fail")
    manners.fails_to_open = 0.3
    await nemesis.lasts(0.5, 4.0)
    manners.fails_to_open = 0.0


# --- operators -------------------------------------------------------------------------------------------------------


async def move(nemesis: Nemesis) -> None:
    """`shardlead move`: a pin, for a while."""
    world, process = nemesis.world, nemesis.worker()
    if process is None:
        return
    shard = nemesis.rng.randrange(world.shards)
    nemesis.say(f"moves shard {shard} to {process.name}")
    nemesis.write(Put(world.keyspace.pin(shard), encode(Wish(by="nemesis", reason="move", worker=process.name))))
    await nemesis.lasts(1.0, 8.0)
    nemesis.write(Delete(world.keyspace.pin(shard)))


async def drain(nemesis: Nemesis) -> None:
    """`shardlead drain`, and its undoing."""
    world, process = nemesis.world, nemesis.worker()
    if process is None:
        return
    nemesis.say(f"drains {process.name}")
    nemesis.write(Put(world.keyspace.drain(process.name), encode(Wish(by="nemesis", reason="drain"))))
    await nemesis.lasts(1.0, 8.0)
    nemesis.write(Delete(world.keyspace.drain(process.name)))


async def cordon(nemesis: Nemesis) -> None:
    world, process = nemesis.world, nemesis.worker()
    if process is None:
        return
    nemesis.say(f"cordons {process.name}")
    nemesis.write(Put(world.keyspace.cordon(process.name), encode(Wish(by="nemesis", reason="cordon"))))
    await nemesis.lasts(1.0, 8.0)
    nemesis.write(Delete(world.keyspace.cordon(process.name)))


async def freeze_moves(nemesis: Nemesis) -> None:
    world = nemesis.world
    nemesis.say("freezes the cluster")
    nemesis.write(Put(world.keyspace.freeze, encode(Wish(by="nemesis", reason="freeze"))))
    await nemesis.lasts(1.0, 8.0)
    nemesis.write(Delete(world.keyspace.freeze))


async def scale_out(nemesis: Nemesis) -> None:
    """One worker more, which leaves gracefully after a while."""
    world = nemesis.world
    if len(world.living) > world.setup.workers:
        return
    name = f"w{len(world.workers) + 1}"
    with nemesis.seize(name):
        process = world.start_worker(name)
        await nemesis.lasts(2.0, 12.0)
        process.stop()
        await _ended(process, world.settings.worker.shutdown_timeout_s + 10.0)


async def evict(nemesis: Nemesis) -> None:
    """T6: the order to give up a session; its worker opens another one."""
    world, process = nemesis.world, nemesis.worker()
    session = process.session if process is not None else None
    if session is None:
        return
    nemesis.say(f"evicts {session.name}")
    order = Eviction(sid=session.sid, by="nemesis", reason="eviction")
    nemesis.write(Put(world.keyspace.eviction(session.name), encode(order)))


async def delete_leader(nemesis: Nemesis) -> None:
    """Somebody's hand deletes a leader key, against every rule."""
    world = nemesis.world
    shard = nemesis.rng.randrange(world.shards)
    nemesis.say(f"deletes leaders/{shard} by hand")
    nemesis.write(Delete(world.keyspace.leader(shard)))


async def raise_generation(nemesis: Nemesis) -> None:
    """As after a restore: all workers stop, the generation is raised, workers start; one of them began too early,
    with the old generation, and stood still meanwhile."""
    world = nemesis.world
    if "fleet" in nemesis.busy or any(process.name in nemesis.busy for process in world.living):
        return
    with contextlib.ExitStack() as stack:
        for name in ("fleet", *world.workers):
            stack.enter_context(nemesis.seize(name))
        for process in world.living:
            process.stop()
        for process in tuple(world.workers.values()):
            await _ended(process, world.settings.worker.shutdown_timeout_s + 10.0)
        early = world.start_worker(world.founders[0])
        await nemesis.lasts(0.0, 0.01)
        early.pause()
        async with world.store(world.operator) as store:
            try:
                meta = await world.operator.spawn(bootstrap.raise_generation(store, world.keyspace))
                nemesis.say(f"raises the generation to {meta.generation}")
            except ShardleadError as exc:
                nemesis.say(f"cannot raise the generation: {exc}")
        for name in world.founders[1:]:
            world.start_worker(name)
        await nemesis.lasts(0.0, 6.0)
        early.resume()
        await nemesis.lasts(1.0, 3.0)


# --- etcd ------------------------------------------------------------------------------------------------------------


async def change_etcd_leader(nemesis: Nemesis) -> None:
    nemesis.say("etcd elects a leader")
    nemesis.has_changed_leader = True
    nemesis.world.etcd.change_leader()


async def lose_quorum(nemesis: Nemesis) -> None:
    etcd = nemesis.world.etcd
    if "etcd" in nemesis.busy:
        return
    with nemesis.seize("etcd"):
        nemesis.say("etcd loses its quorum")
        nemesis.has_changed_leader = True
        etcd.lose_quorum()
        await nemesis.lasts(0.5, 3.0 * nemesis.world.setup.ttl_s)
        etcd.heal_quorum()
        nemesis.say("etcd has its quorum again")


async def restart_etcd(nemesis: Nemesis) -> None:
    if "etcd" in nemesis.busy:
        return
    nemesis.say("etcd restarts")
    nemesis.has_changed_leader = True
    nemesis.world.etcd.restart()


async def stop_member(nemesis: Nemesis) -> None:
    """One member is down or stands still; the other two go on."""
    etcd, rng = nemesis.world.etcd, nemesis.rng
    if "etcd" in nemesis.busy:
        return
    with nemesis.seize("etcd"):
        index, is_paused = rng.randrange(3), rng.random() < 0.5
        nemesis.say(f"etcd's member {index} {'stands still' if is_paused else 'is down'}")
        etcd.stop_member(index, is_paused=is_paused)
        await nemesis.lasts(0.5, 2.5 * nemesis.world.setup.ttl_s)
        etcd.start_member(index)


async def compact(nemesis: Nemesis) -> None:
    nemesis.say("etcd is compacted")
    nemesis.world.etcd.compact()


async def lag_member(nemesis: Nemesis) -> None:
    """One member applies late what the others have long applied: its watches tell old news."""
    etcd, rng = nemesis.world.etcd, nemesis.rng
    index = rng.randrange(len(etcd.members))
    nemesis.say(f"etcd's member {index} lags")
    etcd.lag(index, 0.1, rng.uniform(0.2, 2.0))
    await nemesis.lasts(1.0, 8.0)
    etcd.lag(index, *LAG_S)


async def cut_over_compaction(nemesis: Nemesis) -> None:
    """A router or worker hears nothing while keys go and the history of their going is compacted away."""
    world, rng = nemesis.world, nemesis.rng
    deaf, other = (nemesis.router() if rng.random() < 0.5 else nemesis.worker()), nemesis.worker()
    if deaf is None or other is None or deaf is other:
        return
    with nemesis.seize(deaf.name), nemesis.seize(other.name):
        nemesis.say(f"cuts {deaf.machine.name} from etcd over a compaction")
        for member in range(len(world.etcd.members)):
            world.etcd.cut(deaf.machine.address, member, "both")
        other.crash()
        await nemesis.lasts(1.0, 2.0)
        for each in world.etcd.members:  # a connection that is cut for long is reset, so that its watch begins anew
            each.reset_watches(deaf.machine.name)
        world.start_worker(other.name)
        await nemesis.lasts(5.0, 7.0)
        world.etcd.compact(to_the_last=True)
        for member in range(len(world.etcd.members)):
            world.etcd.heal(deaf.machine.address, member, "both")


async def revoke_lease(nemesis: Nemesis) -> None:
    """Somebody's hand revokes a living worker's lease."""
    world, process = nemesis.world, nemesis.worker()
    session = process.session if process is not None else None
    if session is None:
        return
    nemesis.say(f"revokes the lease of {session.name} by hand")
    world.etcd.revoke(session.lease)


async def cut_from_etcd(nemesis: Nemesis) -> None:
    """One process and one or all members do not reach each other, or only one way."""
    world, rng = nemesis.world, nemesis.rng
    victim = nemesis.worker() if rng.random() < 0.75 else nemesis.router()
    if victim is None:
        return
    members = range(3) if rng.random() < 0.6 else (rng.randrange(3),)
    way = rng.choice(("there", "back", "both"))
    nemesis.say(f"cuts {victim.machine.name} from etcd's {len(members)} members, {way}")
    cuts = [(victim.machine.address, member, way) for member in members]
    for cut in cuts:
        world.etcd.cut(*cut)
    await nemesis.lasts(0.3, 2.5 * world.setup.ttl_s)
    for cut in cuts:
        world.etcd.heal(*cut)


DEEDS: Final[Mapping[str, Deed]] = {
    deed.__name__: deed
    for deed in (
        kill,
        lose_machine,
        restart,
        pause,
        stall,
        freeze_machine,
        set_wall_clock,
        kill_router,
        pause_router,
        cut_from_routers,
        reset_connections,
        slow_network,
        trouble_storage,
        trouble_open,
        move,
        drain,
        cordon,
        freeze_moves,
        scale_out,
        evict,
        delete_leader,
        raise_generation,
        change_etcd_leader,
        lose_quorum,
        restart_etcd,
        stop_member,
        compact,
        lag_member,
        cut_over_compaction,
        revoke_lease,
        cut_from_etcd,
    )
}
