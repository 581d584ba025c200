"""One simulated cluster: an etcd, workers, routers, clients and a storage, on a loop in virtual time, from one seed.

A world is lived in four parts: it starts and comes to rest, things befall it, everything is healed, and it has to be
whole again in the time that is promised. Then what was acknowledged is compared with what is stored.
"""

import asyncio
import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from shardlead.clock import NS_PER_S
from shardlead.config import (
    ClusterSettings,
    ControllerSettings,
    LeaseSettings,
    RouterSettings,
    Settings,
    StoreSettings,
    WorkerSettings,
)
from shardlead.core import duties
from shardlead.core.keyspace import Keyspace, decode, encode
from shardlead.core.model import History, LeaderRecord, Meta, WorkerRecord
from shardlead.core.ring import SlotTable, build_table, encode_table, slot_count_for, slot_of, table_crc
from shardlead.store.base import Compare, Delete, Put, Range, Txn
from shardlead.store.embedded import VERSION
from shardlead.store.mirror import Change, Mirror
from shardlead.virtual import Machine, VirtualLoop
from tests.simulation import invariants
from tests.simulation.clients import ANSWER_TIMEOUT_S, Client, Operation, SmartClient
from tests.simulation.etcd import Etcd
from tests.simulation.misbehaviour import Misbehaviour
from tests.simulation.processes import ClientProcess, NotingStore, RouterProcess, WorkerProcess
from tests.simulation.service import Manners, background_key
from tests.simulation.storage import Storage, StorageFaults
from tests.simulation.transport import LinkFaults, SimTransport
from tests.simulation.witness import Tenant, Witness

CLUSTER: Final = "sim"
KEYS: Final = 12
START_WITHIN_S: Final = 20.0
LOOK_S: Final = 0.1
WITNESS_S: Final = 0.5
TICK_TIMEOUT_S: Final = 8.0  # three ticks that do not come, and the question to the store
STEPS_MAX: Final = 300_000  # ordinary runs take 15,000
_TABLES: dict[int, SlotTable] = {}


@dataclass(frozen=True)
class Setup:
    """What a world consists of, before anything befalls it."""

    shards: int = 8
    workers: int = 3
    routers: int = 2
    clients: int = 3
    ttl_s: int = 4
    try_timeout_s: float = 0.7
    drift: float = 0.0  # the machines' clocks run so much faster or slower, at most
    fenced: bool = True
    idempotent: float = 0.0  # share of the worlds that have an application that removes duplicates
    link: LinkFaults = field(default_factory=LinkFaults)
    storage: StorageFaults = field(default_factory=StorageFaults)
    manners: Manners = field(default_factory=Manners)
    tolerated: frozenset[str] = frozenset()
    misbehaviour: Misbehaviour = field(default_factory=Misbehaviour)
    etcd_version: str = VERSION  # what it says of itself


def settings_of(setup: Setup, endpoints: Sequence[str]) -> Settings:
    """The fleet's settings: production's, but shorter."""
    return Settings(
        cluster=ClusterSettings(name=CLUSTER, shards=setup.shards),
        store=StoreSettings(
            endpoints=tuple(endpoints), try_timeout_s=setup.try_timeout_s, call_timeout_s=3.0, watch_silence_s=6.0
        ),
        lease=LeaseSettings(ttl_s=setup.ttl_s, renew_interval_s=setup.ttl_s * 0.28, margin_s=0.5),
        worker=WorkerSettings(
            drain_timeout_s=2.0,
            open_timeout_s=5.0,
            close_timeout_s=1.0,
            cancel_grace_s=1.0,
            park_timeout_s=3.0,
            shutdown_timeout_s=10.0,
            linger_s=2.0,
            backoff_s=0.5,
        ),
        router=RouterSettings(hold_timeout_s=12.0, key_rules=("path:/lists/{key}",), answer_timeout_s=15.0),
        controller=ControllerSettings(interval_s=2.0),
    )


def table_of(shards: int) -> SlotTable:
    """Made once for all runs: looking up 16,384 slots takes longer than a run may."""
    if shards not in _TABLES:
        _TABLES[shards] = build_table(shards, slot_count_for(shards), 0)
    return _TABLES[shards]


class World:
    """See the module. `begin`, then let things befall it, then `heal` and `finish`."""

    def __init__(self, seed: int, setup: Setup, *, is_tracing: bool = False) -> None:
        self.seed = seed
        self.setup = setup
        self.is_tracing = is_tracing
        self.rng = random.Random(seed)
        self.loop = VirtualLoop(self.rng.getrandbits(64))
        self.loop.steps_max = STEPS_MAX
        self.trace: list[str] = []
        self.shards = setup.shards
        self.tolerated = setup.tolerated
        self.is_fenced = setup.fenced
        self.is_idempotent = self.rng.random() < setup.idempotent
        self.keyspace = Keyspace(CLUSTER)
        self.manners = replace(setup.manners)
        self.history: list[Operation] = []
        self.table = table_of(setup.shards)
        self.keys = tuple(f"k{number}" for number in range(KEYS))
        self.etcd = Etcd(
            self.loop,
            random.Random(self.rng.getrandbits(64)),
            rate=1.0 + self.rng.uniform(-setup.drift, setup.drift),
            misbehaviour=setup.misbehaviour,
            version=setup.etcd_version,
            say=lambda text: self.say("etcd", text),
        )
        self.settings = settings_of(setup, self.etcd.endpoints)
        storage_machine = self.loop.machine("storage")
        self.storage = Storage(self.loop, storage_machine, random.Random(self.rng.getrandbits(64)), setup.fenced)
        self.link = LinkFaults()
        if is_tracing:
            self.storage.say = self.say
        self.witness = Witness(self)
        self.workers: dict[str, WorkerProcess] = {}
        self.processes: dict[Machine, WorkerProcess] = {}
        self.routers: dict[str, RouterProcess] = {}
        self.clients: list[Client] = []
        self._client_tasks: list[asyncio.Task[None]] = []
        self.transports: list[SimTransport] = []
        self.addresses: dict[str, str] = {}  # of each worker's machine, over restarts
        self._clocks: dict[str, tuple[float, float]] = {}
        self._numbers: dict[str, int] = {}
        self._mirrors: list[MirrorWatch] = []
        self._sids: dict[str, WorkerProcess] = {}
        self._registered = 0  # of the store's log: so far it was searched for sessions
        self.founders = tuple(f"w{number + 1}" for number in range(setup.workers))
        self.is_over = False
        self.tamper: Callable[[str, Txn], Txn] = lambda _, txn: txn  # what an ablation does to a process's transactions
        self.client_machine = self.loop.machine("clients")
        self.operator = self.loop.machine("operator")
        self.smart: ClientProcess | None = None  # the last of the clients has it
        if setup.clients:
            self.smart = ClientProcess(self, self.loop.machine("smart", offset_s=self.rng.uniform(10.0, 1e5)))

    # --- notes

    def say(self, who: str, what: str) -> None:
        """A line of the trace."""
        if self.is_over:
            return
        self.trace.append(f"{self.loop.true_ns() / NS_PER_S:12.6f} {who:<12} {what}")

    def shown(self, txn: Txn) -> str:
        """A transaction, short."""
        keys = [op.key.decode(errors="replace").removeprefix(f"/{CLUSTER}/") for op in _written(txn)]
        return f"{len(txn.compares)} guards, writes {' '.join(keys) or 'nothing'}"

    # --- what it consists of

    def keys_of(self, shard: int) -> tuple[str, ...]:
        """The clients' keys of that shard."""
        return (*(key for key in self.keys if self.shard_of(key) == shard), background_key(shard))

    def process_of_sid(self, sid: str) -> WorkerProcess | None:
        """Whose session that is or was, by who put its record."""
        history, workers = self.etcd.history, self.keyspace.workers
        for change in history[self._registered :]:
            if change.value is not None and change.key.startswith(workers):
                record = decode(WorkerRecord, change.key, change.value)
                for process in self.processes.values():
                    if process.machine.name == change.writer:
                        self._sids.setdefault(record.sid, process)
        self._registered = len(history)
        return self._sids.get(sid)

    @property
    def unserved_max_s(self) -> float:
        """For how long the key of a session that is active may stand unserved: audit + TTL, and what the application
        and an unfenced class's wait take."""
        worker, ttl_s = self.settings.worker, self.setup.ttl_s
        application_s = worker.open_timeout_s + worker.drain_timeout_s + worker.close_timeout_s
        wait_s = 0.0 if self.is_fenced else ttl_s + 0.5
        return invariants.AUDIT_ROUNDS * ttl_s + ttl_s + application_s + wait_s + invariants.BELIEF_EXTRA_S

    @property
    def stored_generation(self) -> int:
        """What an operator has raised it to."""
        kv = self.etcd.get(self.keyspace.meta)
        assert kv is not None
        return decode(Meta, kv.key, kv.value).generation

    def is_leader_key(self, key: bytes) -> bool:
        return key.startswith(self.keyspace.leaders)

    def shard_of(self, key: str) -> int:
        return self.table[slot_of(key.encode(), len(self.table), False)]

    def store(self, machine: Machine) -> NotingStore:
        """The shipped client of the store, for a process on that machine."""
        transport = SimTransport(machine, self.etcd, random.Random(self.rng.getrandbits(64)), self.link)
        self.transports.append(transport)
        store = NotingStore(
            self.settings.store, clock=machine.clock, rng=random.Random(self.rng.getrandbits(64)), transport=transport
        )
        return store.note_to(self, machine.name)

    def start_worker(self, name: str) -> WorkerProcess:
        """A new process under that name, on its machine."""
        number = self._numbers[name] = self._numbers.get(name, 0) + 1
        if name not in self._clocks:
            drift = self.setup.drift
            self._clocks[name] = (self.rng.uniform(10.0, 1e5), 1.0 + self.rng.uniform(-drift, drift))
        offset_s, rate = self._clocks[name]
        machine = self.loop.machine(
            f"{name}#{number}",
            address=self.addresses.get(name, ""),
            offset_s=offset_s + self.loop.true_ns() / NS_PER_S * rate,
            rate=rate,
        )
        self.addresses[name] = machine.address
        process = WorkerProcess(self, name, machine)
        self.workers[name] = self.processes[machine] = process
        self.say(machine.name, "starts")
        process.start()
        return process

    def start_router(self, name: str) -> RouterProcess:
        number = self._numbers[name] = self._numbers.get(name, 0) + 1
        machine = self.loop.machine(f"{name}#{number}", offset_s=self.rng.uniform(10.0, 1e5))
        process = self.routers[name] = RouterProcess(self, name, machine)
        process.start()
        return process

    @property
    def living(self) -> list[WorkerProcess]:
        return [process for process in self.workers.values() if process.is_alive]

    # --- its life

    def create_cluster(self) -> None:
        """meta and ring, as `shardlead init` writes them."""
        meta = Meta(
            cluster=CLUSTER,
            shards=self.shards,
            slot_count=len(self.table),
            seed=0,
            hash_tags=False,
            ring_crc=table_crc(self.table),
        )
        self.etcd.write(
            Txn((), (Put(self.keyspace.meta, encode(meta)), Put(self.keyspace.ring, encode_table(self.table))))
        )

    async def begin(self) -> None:
        """Start everything, and wait until every shard is served and the routers know."""
        self.loop.observer.spawn(self._look(), "witness")
        self.create_cluster()
        for name in self.founders:
            self.start_worker(name)
        for number in range(self.setup.routers):
            self.start_router(f"r{number + 1}")
        if self.smart is not None:
            self.smart.start()
        if not await self.until_whole(START_WITHIN_S):
            self.witness.fail("I9", f"not whole {START_WITHIN_S} s after the start: {self.what_is_missing()}")
        self._set_faults(self.setup.storage, self.setup.link)
        for number in range(self.setup.clients):
            smart = self.smart if number == self.setup.clients - 1 else None
            client = (SmartClient if smart else Client)(
                self.loop,
                f"c{number + 1}",
                random.Random(self.rng.getrandbits(64)),
                self._router_addresses,
                self.keys,
                self.history,
                lambda text: self.say("client", text),
                has_idempotency_keys=self.is_idempotent,
            )
            if smart is not None and isinstance(client, SmartClient):
                client.ask, client.machine = smart.ask, smart.machine
            self.clients.append(client)
            self._client_tasks.append((client.machine or self.client_machine).spawn(client.run(), client.name))

    def _set_faults(self, storage: StorageFaults, link: LinkFaults) -> None:
        self.storage.faults, self.link = storage, link
        for transport in self.transports:
            transport.faults = link

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(WITNESS_S)
            self.witness.look()

    def _router_addresses(self) -> list[tuple[str, int]]:
        return [address for router in self.routers.values() if (address := router.address) is not None]

    async def until_whole(self, within_s: float) -> bool:
        """Look until it is, at most so long."""
        until_ns = self.loop.true_ns() + int(within_s * NS_PER_S)
        while not self.is_whole():
            if self.loop.true_ns() >= until_ns:
                return False
            await asyncio.sleep(LOOK_S)
        return True

    def is_whole(self) -> bool:
        return not self.what_is_missing()

    def what_is_missing(self) -> str:
        """Why not every shard has exactly one serving leader, the store's, that all routers know; "" if so."""
        for shard in range(self.shards):
            kv = self.etcd.get(self.keyspace.leader(shard))
            if kv is None:
                return f"shard {shard} has no leader"
            serving = self._serving(shard)
            if len(serving) != 1:
                return f"shard {shard} is served by {len(serving)}; leaders/ says {kv.value.decode()}"
            if serving[0].lead.epoch & (2**48 - 1) != kv.mod_revision:
                return f"shard {shard} is served under {serving[0].lead.epoch}, the store says {kv.mod_revision}"
            for router in self.routers.values():
                if not router.is_alive:
                    continue
                if router.leaders().get(shard, ("", 0))[1] != serving[0].lead.epoch:
                    return f"{router.name} does not know the leader of shard {shard}"
            if self.smart is not None and self.smart.leaders().get(shard, ("", 0))[1] != serving[0].lead.epoch:
                return f"the smart client does not know the leader of shard {shard}"
        return ""

    def brake_s(self) -> float:
        """For how long at most a shard that is not served may be, or have been, left alone since its last leaders died
        at once, which faults that strike within seconds of each other look like."""
        counts = [0]
        for shard in range(self.shards):
            kv = self.etcd.get(self.keyspace.history(shard))
            if kv is None or self._serving(shard):
                continue
            history = decode(History, kv.key, kv.value)
            is_led = self.etcd.get(self.keyspace.leader(shard)) is not None  # and about to serve: its wait is behind it
            counts.append(history.short_tenures if is_led else duties.short_tenures(history, 0))
        return max(map(duties.brake_s, counts))

    def _serving(self, shard: int) -> list[Tenant]:
        """Whose guard is valid and whose object is open."""
        return [
            tenant
            for tenant in self.witness.tenants.get(shard, ())
            if tenant.is_valid and tenant.is_open and not tenant.is_closed
        ]

    def heal(self) -> None:
        """Nothing is lost or late any more. What deeds have done is undone by themselves."""
        self._set_faults(StorageFaults(), LinkFaults())
        self.etcd.misbehaviour = Misbehaviour()
        for name in self.founders:
            if not self.workers[name].is_alive:
                self.start_worker(name)
        self.say("NEMESIS", "everything is healed")

    async def finish(self) -> None:
        """Let the clients end; then hold everything against the invariants."""
        for client in self.clients:
            client.is_over = True
        await asyncio.wait(self._client_tasks, timeout=2 * ANSWER_TIMEOUT_S)
        for number, key in enumerate(self.keys):
            client = self.clients[number % len(self.clients)]
            machine = client.machine or self.client_machine
            operation = await machine.spawn(client.act(key, is_read=True))
            if operation.outcome != "ok":
                self.witness.fail("I9", f"the last read of {key} failed: {operation}")
        for client in self.clients:
            client.leave()
        if self.smart is not None:
            await self.smart.leave()
        await self._mirrors_become_current()
        for check in invariants.AT_THE_END:
            check(self.witness)
        for error in self.loop.errors:
            self.witness.fail("ERROR", f"{error.get('message')}: {_where(error.get('exception'))}")

    async def be_quiet(self, settle_s: float, quiet_s: float) -> None:
        """Nothing goes on: leaderships become even, and then stay where they are (I15)."""
        await asyncio.sleep(settle_s)

        def leaders() -> list[tuple[int, bytes]]:
            kvs = (self.etcd.get(self.keyspace.leader(shard)) for shard in range(self.shards))
            return [(kv.mod_revision, kv.value) for kv in kvs if kv is not None]

        before = leaders()
        await asyncio.sleep(quiet_s)
        names = [decode(LeaderRecord, b"", value).worker for _, value in leaders()]
        counts = [names.count(process.name) for process in self.living]
        invariants.quiet_is_kept(self.witness, counts, len(set(leaders()) ^ set(before)) // 2)

    def abandon(self) -> None:
        """Let every task come to its end, those of crashed machines too, so that nothing of this world is left over.
        What happens from here on is nobody's business."""
        self.is_over = True
        self.loop.abandon()

    # --- mirrors

    def watch_mirror(self, machine: Machine, mirror: Mirror) -> "MirrorWatch":
        """Compare it with the store's past at each change, and with its present at the end (I8)."""
        watch = MirrorWatch(self, machine, mirror)
        self._mirrors.append(watch)
        return watch

    async def _mirrors_become_current(self) -> None:
        """Each mirror that lives has been equal to its range at some instant of the next seconds."""
        left = [watch for watch in self._mirrors if watch.is_alive]
        for _ in range(int(TICK_TIMEOUT_S / LOOK_S)):
            left = [watch for watch in left if watch.is_alive and watch.differs()]
            if not left:
                return
            await asyncio.sleep(LOOK_S)
        for watch in left:
            invariants.mirror_is_current(self.witness, watch.name, watch.differs())


class MirrorWatch:
    """One mirror, and what it should show: the store's log, as far as the mirror says that it has come."""

    def __init__(self, world: World, machine: Machine, mirror: Mirror) -> None:
        self.name = f"{machine.name}'s {mirror._name}"
        self.is_over = False
        self._world = world
        self._machine = machine
        self._mirror = mirror
        self._expected: dict[bytes, int] = {}  # key -> mod_revision
        self._seen = 0  # of the store's log
        self._passed_on = mirror._on_change  # the witness sees everything
        mirror._on_change = self._look

    @property
    def is_alive(self) -> bool:
        return not self.is_over and not self._machine.is_crashed

    def _look(self, change: Change) -> None:
        if not self._world.etcd.has_regressed:  # then there is no one past to compare with
            touched = self._advance(change.revision)
            touched.update(kv.key for kv in (*change.puts, *change.deletes))
            if change.is_load:
                touched.update(self._expected, self._mirror.kvs)
            invariants.mirror_is_snapshot(
                self._world.witness, self.name, change.revision, self._wrong(touched, self._expected)
            )
        self._passed_on(change)

    def differs(self) -> list[str]:
        """From what stands in the store now."""
        kvs = self._world.etcd.model.range(Range(self._mirror._key, self._mirror._range_end)).kvs
        now = {kv.key: kv.mod_revision for kv in kvs}
        return self._wrong({*now, *self._mirror.kvs}, now)

    def _advance(self, revision: int) -> set[bytes]:
        history, low, high = self._world.etcd.history, self._mirror._key, self._mirror._range_end
        touched: set[bytes] = set()
        while self._seen < len(history) and history[self._seen].revision <= revision:
            change = history[self._seen]
            self._seen += 1
            if low <= change.key < high:
                touched.add(change.key)
                if change.value is None:
                    self._expected.pop(change.key, None)
                else:
                    self._expected[change.key] = change.revision
        return touched

    def _wrong(self, keys: set[bytes], expected: Mapping[bytes, int]) -> list[str]:
        kvs, wrong = self._mirror.kvs, []
        for key in keys:
            kv, then = kvs.get(key), expected.get(key, 0)
            if (kv.mod_revision if kv is not None else 0) != then:
                wrong.append(f"{key.decode()} is {kv and kv.mod_revision}, was {then or None}")
        return sorted(wrong)


def _where(error: BaseException | None) -> str:
    """An error and the lines where it came from."""
    if error is None:
        return "no exception"
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return f"{error!r} at {' < '.join(f'{Path(frame.filename).name}:{frame.lineno}' for frame in reversed(frames))}"


def _written(txn: Txn) -> list[Put | Delete]:
    found: list[Put | Delete] = []
    for op in txn.success:
        if isinstance(op, Txn):
            found += _written(op)
        elif isinstance(op, Put | Delete):
            found.append(op)
    return found


__all__ = ["Compare", "Setup", "World"]
