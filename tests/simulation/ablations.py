"""Each safeguard switched off, one at a time: what the simulation must notice, or it is too kind.

An ablation takes one safeguard away from the shipped code while a run lasts, by replacing a function from outside; the
product has no switches. Where a safeguard only matters in certain surroundings (a store that answers from the past, a
leader that must be replaced while an old write is under way), the ablation brings its scenario with it; without the
ablation the same scenario is clean, which a test holds, too.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final
from unittest import mock

from shardlead.cluster.answers import Claimed, Done, Undecided
from shardlead.cluster.election import Election
from shardlead.cluster.leaders import Leaders
from shardlead.cluster.session import Session
from shardlead.core import contract, ownership, routing
from shardlead.core import lease as lease_rules
from shardlead.core.keyspace import encode
from shardlead.core.lease import Active, Terms
from shardlead.core.model import LeaderRecord
from shardlead.store import gateway
from shardlead.store.base import Compare, Delete, Put, Range, Target, Txn
from shardlead.store.etcd import EtcdStore
from shardlead.store.mirror import Mirror, Picture
from shardlead.worker.claims import Claims
from shardlead.worker.envoy import AskAgain, NotOurs
from shardlead.worker.goals import Goals
from shardlead.worker.host import Host
from shardlead.worker.objects import Objects
from shardlead.worker.proofs import Proofs
from shardlead.worker.runtime import Worker
from shardlead.worker.steward import Steward
from shardlead.worker.tenure import Tenure
from tests.simulation.misbehaviour import Misbehaviour
from tests.simulation.processes import WorkerProcess
from tests.simulation.scenarios import FURTHER, SCENARIOS, Scenario
from tests.simulation.service import Manners
from tests.simulation.storage import StorageFaults
from tests.simulation.transport import LinkFaults
from tests.simulation.world import Setup, World

Patch = Callable[[World], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True)
class Ablation:
    """`caught_by` names the invariants of which one must break, within `seeds` seeds of `scenario`."""

    number: int
    sentence: str
    patch: Patch
    scenario: Scenario
    caught_by: frozenset[str]
    seeds: int = 60
    tolerated: frozenset[str] = field(default_factory=frozenset)  # broken in this scenario without the ablation, too


# --- scenarios that are harsh where one safeguard works --------------------------------------------------------------


def _harsh(deeds: tuple[str, ...], setup: Setup, pause_s: float = 1.0, duration_s: float = 25.0) -> Scenario:
    return Scenario("", deeds, setup, duration_s, pause_s, deeds_at_once=(len(deeds), len(deeds)))


SLOW_LINKS: Final = LinkFaults(slow=0.3, loss=0.02, late=0.05, duplicate=0.05)
LATE_WRITES: Final = StorageFaults(slow=0.2, late=0.1, late_s=4.0, answer_lost=0.05)
THINKING: Final = Manners(slow=0.5, slow_s=1.5)

PAUSES: Final = _harsh(("pause", "stall", "cut_from_etcd"), Setup(link=SLOW_LINKS, manners=THINKING))
STALLS: Final = _harsh(("stall",), Setup(link=SLOW_LINKS, ttl_s=6, try_timeout_s=2.5), 0.4)
CUTS: Final = _harsh(("cut_from_etcd", "compact", "kill"), SCENARIOS["networks"].setup)
DEAF: Final = _harsh(("cut_over_compaction", "lag_member"), Setup())
HANDS: Final = _harsh(("delete_leader", "move"), Setup(tolerated=frozenset({"I3", "I13"})), 3.0)
REVOKED: Final = _harsh(("revoke_lease", "lag_member"), Setup(tolerated=frozenset({"I3"})))
DRIFTS: Final = _harsh(("cut_from_etcd", "kill"), Setup(drift=0.0099, workers=5, ttl_s=6))
MOVES: Final = _harsh(("move", "drain", "restart"), Setup(link=replace(SLOW_LINKS, late=0.15, duplicate=0.15)), 0.7)
ABA: Final = _harsh(
    ("trouble_open", "move", "drain"),
    Setup(workers=2, link=LinkFaults(slow=0.3, late=0.2, duplicate=0.4), storage=LATE_WRITES),
    0.7,
)
QUORUM: Final = _harsh(("lose_quorum",), Setup(storage=LATE_WRITES, clients=6), 4.0)
LATE: Final = _harsh(("cut_from_etcd", "pause", "kill", "move", "drain"), Setup(storage=LATE_WRITES, manners=THINKING))

SLUGGISH: Final = StorageFaults(slow=0.8)  # what was sent takes effect up to a second later
BARE: Final = replace(
    _harsh(
        ("set_wall_clock", "evict"),
        Setup(fenced=False, clients=10, manners=Manners(slow=0.0, background_s=0.5), storage=StorageFaults(slow=0.3)),
        0.4,
    ),
    heals_late_s=6.0,
)
KILLS: Final = _harsh(("kill", "evict", "move"), Setup(clients=8, storage=replace(SLUGGISH, late=0.1)), 0.7)
STUBBORN: Final = replace(
    FURTHER["unfenced"],
    setup=replace(FURTHER["unfenced"].setup, manners=Manners(slow=0.5, slow_s=2.5, stubborn=1.0, stubborn_s=6.0)),
    duration_s=25.0,
    mean_pause_s=1.5,
    deeds_at_once=(6, 6),
)
RESETS: Final = _harsh(("reset_connections", "kill"), Setup(manners=THINKING, clients=6))
OPERATIONS: Final = replace(SCENARIOS["operations"], duration_s=25.0, mean_pause_s=2.5, deeds_at_once=(7, 7))


# --- what is taken away ----------------------------------------------------------------------------------------------


def _t0_at_receipt(_world: World) -> Any:
    shipped = lease_rules.renewed

    def renewed(state: Any, _sent_ns: int, ttl_s: float, now_ns: int, terms: Terms) -> Any:
        return shipped(state, now_ns, ttl_s, now_ns, terms)

    return mock.patch.object(lease_rules, "renewed", renewed)


def _no_delta(_world: World) -> Any:
    return mock.patch.object(Terms, "margin_ns", return_value=0)


@contextlib.contextmanager
def _range_for_t3(_world: World) -> Iterator[None]:
    """The client would notice a revision that went back, and is made to look away."""

    async def confirm(self: Leaders, led: Mapping[int, int]) -> Any:
        answers = {}
        for shard, revision in led.items():
            result = await self._store.read(Range(self._keys.leader(shard)))
            kvs = [kv for kv in result.kvs if kv.mod_revision == revision]
            answers[shard] = Done(revision) if kvs else self.holder(result)
        return answers

    with mock.patch.object(Leaders, "confirm", confirm), mock.patch.object(EtcdStore, "_check_revision"):
        yield


def _header_resume(_world: World) -> Any:
    shipped = Picture.apply

    def apply(self: Picture, batch: Any) -> Any:
        change = shipped(self, batch)
        self.revision = max(self.revision, batch.revision)
        return change

    return mock.patch.object(Picture, "apply", apply)


def _no_removal(_world: World) -> Any:
    shipped = Picture.load

    def load(self: Picture, kvs: Any, revision: int) -> Any:
        kvs = list(kvs)
        known = {kv.key for kv in kvs}
        return shipped(self, [*kvs, *(kv for key, kv in self.kvs.items() if key not in known)], revision)

    return mock.patch.object(Picture, "load", load)


def _tampering(change: Callable[[World, str, Txn], Txn]) -> Patch:
    """Transactions are changed right before they are sent; nested ones by `change` itself."""

    @contextlib.contextmanager
    def patch(world: World) -> Iterator[None]:
        world.tamper = lambda name, txn: change(world, name, txn)
        yield

    return patch


def _unguarded_delete(world: World, _name: str, txn: Txn) -> Txn:
    if any(isinstance(op, Delete) and world.is_leader_key(op.key) for op in txn.success):
        return replace(txn, compares=())
    return txn


def _by_value(world: World, name: str, txn: Txn) -> Txn:
    process = next((each for each in world.processes.values() if each.machine.name == name), None)
    session = process.session if process is not None else None
    if session is None:
        return txn
    own = encode(LeaderRecord(worker=session.name, sid=session.sid))

    def changed(compare: Compare) -> Compare:
        if compare.target is Target.MOD and compare.operand and world.is_leader_key(compare.key):
            return replace(compare, target=Target.VALUE, operand=own)
        return compare

    return replace(txn, compares=tuple(changed(compare) for compare in txn.compares))


def _unguarded_want(world: World, _name: str, txn: Txn) -> Txn:
    if not any(isinstance(op, Put) and world.is_leader_key(op.key) for op in txn.success):
        return txn
    kept = tuple(each for each in txn.compares if b"/wants/" not in each.key)
    return replace(txn, compares=kept)


def _without_meta(world: World, _name: str, txn: Txn) -> Txn:
    return replace(txn, compares=tuple(each for each in txn.compares if each.key != world.keyspace.meta))


@contextlib.contextmanager
def _no_meta_compare(world: World) -> Iterator[None]:
    """The view would notice as well, and is made to look away."""
    shipped = Steward._fleet_changed

    def blind(self: Steward, change: Any) -> None:
        fleet = replace(change.fleet, meta_revision=self.session.meta_revision)
        shipped(self, replace(change, fleet=fleet))

    world.tamper = lambda name, txn: _without_meta(world, name, txn)
    with mock.patch.object(Steward, "_fleet_changed", blind):
        yield


def _create_revision(world: World) -> Any:
    shipped = Claims.receive

    def receive(self: Claims, shard: int, epoch: int, **how: Any) -> None:
        kv = world.etcd.get(world.keyspace.leader(shard))
        shipped(self, shard, kv.create_revision if kv is not None else epoch, **how)

    return mock.patch.object(Claims, "receive", receive)


@contextlib.contextmanager
def _no_barrier(world: World) -> Iterator[None]:
    world.manners.skips_barrier = True
    world.storage.registers_by_write = True
    yield


def _guard_by_timer(_world: World) -> Any:
    def is_valid(self: Session, _need_s: float = 0.0) -> bool:
        return isinstance(self._state, Active)

    return mock.patch.object(Session, "is_valid", is_valid)


def _no_audit(_world: World) -> Any:
    async def audit(_self: Proofs) -> None:
        return

    return mock.patch.object(Proofs, "audit", audit)


def _missing_ttl(_world: World) -> Any:
    shipped = gateway.renewed_ttl_s
    return mock.patch.object(gateway, "renewed_ttl_s", lambda raw: shipped(raw) or 4)


def _before_the_ack(world: World) -> Any:
    shipped = Election.claim

    async def claim(self: Election, shards: Any, reason: str) -> Any:
        answers = await shipped(self, shards, reason)
        return {
            shard: Claimed(world.etcd.model.revision + 1, True, 4.0, 0) if isinstance(answer, Undecided) else answer
            for shard, answer in answers.items()
        }

    return mock.patch.object(Election, "claim", claim)


def _same_epoch(_world: World) -> Any:
    def suspend(self: Host) -> None:
        for shard, entry in tuple(self._entries.items()):
            if entry.tenure is not None:
                entry.tenure.cancel()
            self.feed(shard, ownership.Suspended(is_busy=False))

    return mock.patch.object(Host, "suspend", suspend)


@contextlib.contextmanager
def _unlocked_fence(world: World) -> Iterator[None]:
    world.storage.reads_lock_fence = False
    yield


def _late_refusal(_world: World) -> Any:
    return mock.patch.object(contract, "SAFE_METHODS", contract.SAFE_METHODS | {"POST"})


# --- and of safeguards that protocol.md D.4 does not name ---


def _no_foreign_wait(_world: World) -> Any:
    return mock.patch.object(Claims, "former_wait_s", return_value=0.0)


@contextlib.contextmanager
def _cancelled_is_clean(_world: World) -> Iterator[None]:
    """As if all work had ended by itself."""

    async def ended(self: Objects, _shard: int, tenure: Any) -> bool:
        await tenure.wait_ended(self._settings.cancel_grace_s)
        self._fenced = True  # from here on it is judged as a fenced class is
        return True

    with mock.patch.object(Objects, "_wait_ended", ended):
        yield


def _refusal_is_forgiven(_world: World) -> Any:
    """A handoff that was refused lets the leader go on under its epoch."""
    shipped = ownership.step

    def step(state: Any, event: Any) -> Any:
        if isinstance(state, ownership.Passing) and isinstance(event, ownership.Refused) and event.may_keep:
            return ownership.Opening(state.epoch), (ownership.Open(state.epoch),)
        return shipped(state, event)

    return mock.patch.object(ownership, "step", step)


def _unknown_is_gone(_world: World) -> Any:
    """A resignation or handoff of unknown outcome is taken for done."""
    shipped = Goals.pass_on

    async def pass_on(self: Goals, *args: Any, **options: Any) -> Any:
        passage = await shipped(self, *args, **options)
        return NotOurs("it must have been done") if isinstance(passage, AskAgain) else passage

    return mock.patch.object(Goals, "pass_on", pass_on)


def _epochs_rise_again(_world: World) -> Any:
    """What was given up is not remembered as dead."""
    shipped = ownership.step

    def step(state: Any, event: Any) -> Any:
        after, commands = shipped(state, event)
        return (ownership.Idle() if isinstance(after, ownership.Idle) else after), commands

    return mock.patch.object(ownership, "step", step)


def _sent_twice(_world: World) -> Any:
    """A broken connection counts as a request that was not processed."""
    law = dict(routing.LAW)
    law[routing.Happened.BROKEN] = replace(law[routing.Happened.BROKEN], again=routing.Again.ALWAYS)
    return mock.patch.object(routing, "LAW", law)


@contextlib.contextmanager
def _loads_first(world: World) -> Iterator[None]:
    world.manners.loads_first = True
    yield


def _no_cancel(_world: World) -> Any:
    return mock.patch.object(Tenure, "cancel")


def _no_drain(_world: World) -> Any:
    async def wait_idle(_self: Tenure) -> None:
        return

    return mock.patch.object(Tenure, "wait_idle", wait_idle)


def _revoke_first(_world: World) -> Any:
    """T8 the wrong way round."""
    shipped = Worker._leave

    async def leave(self: Worker, session: Session, steward: Steward, work: Any) -> bool:
        await session.close()
        return await shipped(self, session, steward, work)

    return mock.patch.object(Worker, "_leave", leave)


def _will_at_once(world: World) -> Any:
    """The last will is carried out while the process may live on: at its first pause."""
    shipped = WorkerProcess.pause

    def pause(self: WorkerProcess) -> None:
        shipped(self)
        self.parent.worker_died(False)

    return mock.patch.object(WorkerProcess, "pause", pause)


def _stays(_world: World) -> Any:
    """A process of an unfenced class goes on though its work will not end."""
    return mock.patch.object(Objects, "_leave_behind")


def _no_reload(_world: World) -> Any:
    """A watch that was cancelled is begun again where it was, without a load."""
    shipped = Mirror._load

    async def load(self: Mirror) -> None:
        if self.is_loaded:
            self._picture.revision = max(self._picture.revision, (await self._store.read(Range(b"x"))).revision)
            self._needs_load = False
            return
        await shipped(self)

    return mock.patch.object(Mirror, "_load", load)


def _names(*names: str) -> frozenset[str]:
    return frozenset(names)


ABLATIONS: Final[Mapping[str, Ablation]] = {
    "t0-at-receipt": Ablation(
        1, "The deadline counts from the acknowledgement's arrival.", _t0_at_receipt, STALLS, _names("I4", "I3")
    ),
    "no-delta": Ablation(2, "Nothing is kept off the end of a lease.", _no_delta, DRIFTS, _names("I4", "I3")),
    "range-for-t3": Ablation(
        3,
        "A doubt is settled by a read.",
        _range_for_t3,
        replace(HANDS, setup=replace(HANDS.setup, misbehaviour=Misbehaviour(stale_read=0.9))),
        _names("I7"),
    ),
    "header-resume": Ablation(4, "A watch goes on after its header's revision.", _header_resume, CUTS, _names("I8")),
    "no-removal": Ablation(5, "A load does not remove what is gone.", _no_removal, DEAF, _names("I8")),
    "unguarded-delete": Ablation(
        6, "A resignation deletes whatever stands there.", _tampering(_unguarded_delete), MOVES, _names("I13", "I3")
    ),
    "create-revision": Ablation(
        7, "The epoch is the key's create_revision.", _create_revision, MOVES, _names("I1", "I2")
    ),
    "value-compare": Ablation(
        8, "Leaders are compared by value.", _tampering(_by_value), ABA, _names("I3", "I7", "I13", "I9"), seeds=200
    ),
    "no-barrier": Ablation(
        9, "The token is checked and never registered before a read.", _no_barrier, KILLS, _names("I5")
    ),
    "guard-by-timer": Ablation(
        10, "The guard is a flag that a timer sets.", _guard_by_timer, PAUSES, _names("I3", "I6")
    ),
    "no-audit": Ablation(11, "Nobody asks what stands on the lease.", _no_audit, HANDS, _names("I7", "I9")),
    "missing-ttl": Ablation(
        12, "A renewal without a TTL counts.", _missing_ttl, REVOKED, _names("I4", "I3", "I7", "I9")
    ),
    "before-the-ack": Ablation(
        13, "A claim counts before it is acknowledged.", _before_the_ack, CUTS, _names("I1", "I3", "I7", "I2")
    ),
    "no-meta-compare": Ablation(
        14, "Claims do not compare meta.", _no_meta_compare, _harsh(("raise_generation",), Setup(), 6.0), _names("I2")
    ),
    "same-epoch": Ablation(
        15, "Work that was cancelled does not cost the epoch.", _same_epoch, QUORUM, _names("I5", "I10"), seeds=200
    ),
    "unguarded-want": Ablation(
        16, "A handoff does not compare the want.", _tampering(_unguarded_want), MOVES, _names("I10"), seeds=200
    ),
    "unlocked-fence": Ablation(17, "The fence row is read without a lock.", _unlocked_fence, LATE, _names("I5")),
    "late-refusal": Ablation(
        18, "A refusal is sent after the handler ran.", _late_refusal, PAUSES, _names("I10", "I5")
    ),
    # --- and what protocol.md D.4 does not name
    "no-foreign-wait": Ablation(
        19, "Who follows an unclean end of an unfenced class does not wait.", _no_foreign_wait, BARE, _names("I5")
    ),
    "cancelled-is-clean": Ablation(
        20,
        "Cancelled work of an unfenced class counts as ended cleanly.",
        _cancelled_is_clean,
        BARE,
        _names("I5"),
        seeds=200,
    ),
    "refusal-forgiven": Ablation(
        21, "A leader whose handoff was refused goes on under its epoch.", _refusal_is_forgiven, MOVES, _names("I14")
    ),
    "unknown-is-gone": Ablation(
        22, "What was sent with an unknown outcome is taken for done.", _unknown_is_gone, MOVES, _names("I7", "I9")
    ),
    "epochs-rise": Ablation(
        23, "Nobody remembers which epochs were given up.", _epochs_rise_again, MOVES, _names("I14")
    ),
    "sent-twice": Ablation(
        24, "A request on a broken connection is sent again.", _sent_twice, RESETS, _names("I10", "I5")
    ),
    "loads-first": Ablation(25, "State is loaded before the barrier.", _loads_first, KILLS, _names("I5")),
    "no-cancel": Ablation(26, "A loss cancels nothing.", _no_cancel, PAUSES, _names("I6")),
    "no-drain": Ablation(27, "A drain waits for nobody.", _no_drain, OPERATIONS, _names("I0")),
    "revoke-first": Ablation(
        28, "Who stops revokes its lease before handing over.", _revoke_first, OPERATIONS, _names("I0")
    ),
    "will-at-once": Ablation(29, "The last will does not wait for the death.", _will_at_once, PAUSES, _names("I13")),
    "stuck-stays": Ablation(
        30, "An unfenced class's process lives on with work that will not end.", _stays, STUBBORN, _names("I6")
    ),
    "no-reload": Ablation(31, "A cancelled watch goes on without a load.", _no_reload, DEAF, _names("I8")),
}
