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
from shardlead.core import contract, ownership
from shardlead.core import lease as lease_rules
from shardlead.core.keyspace import encode
from shardlead.core.lease import Active, Terms
from shardlead.core.model import LeaderRecord
from shardlead.store import gateway
from shardlead.store.base import Compare, Delete, Put, Range, Target, Txn
from shardlead.store.etcd import EtcdStore
from shardlead.store.mirror import Picture
from shardlead.worker.claims import Claims
from shardlead.worker.host import Host
from shardlead.worker.proofs import Proofs
from shardlead.worker.steward import Steward
from tests.simulation.misbehaviour import Misbehaviour
from tests.simulation.scenarios import SCENARIOS, Scenario
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

    def receive(self: Claims, shard: int, epoch: int, *, is_clean: bool) -> None:
        kv = world.etcd.get(world.keyspace.leader(shard))
        shipped(self, shard, kv.create_revision if kv is not None else epoch, is_clean=is_clean)

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
        9, "The token is checked and never registered before a read.", _no_barrier, LATE, _names("I5"), seeds=200
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
}
