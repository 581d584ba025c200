"""What must hold, whatever happens: one function for each invariant, with its sentence.

Those of the first part are asked in the moment, by the witness; those of the second at the end of a run. An invariant
that is broken is told by `witness.fail`, with the time and all that is known; a run with misbehaviour of the store or
frozen clocks may break I3, I4 and what hangs on them (the run's `tolerated`), never I1, I2 or I5.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Final

from shardlead.clock import NS_PER_S
from shardlead.core.keyspace import decode
from shardlead.core.model import LeaderRecord, revision_of
from shardlead.errors import KeyspaceError
from tests.simulation.clients import Operation
from tests.support import linearizable

if TYPE_CHECKING:
    from tests.simulation.etcd import Applied
    from tests.simulation.processes import WorkerProcess
    from tests.simulation.witness import Tenant, Witness

GRACE_SLACK_S: Final = 0.3
AUDIT_ROUNDS: Final = 1.1  # of the TTL, at most, from one audit to the next
BELIEF_EXTRA_S: Final = 4.0  # a call of the audit, a proof by T3, each of which may have to be repeated


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken invariant, at one instant of true time."""

    name: str
    true_ns: int
    text: str

    def __str__(self) -> str:
        return f"{self.name} at {self.true_ns / NS_PER_S:.6f} s: {self.text}"


# --- in the moment ---------------------------------------------------------------------------------------------------


def one_sid_per_epoch(witness: "Witness", tenant: "Tenant") -> None:
    """I1: at most one session leads under a (shard, epoch), ever."""
    lead = tenant.lead
    known = witness.sids.setdefault((lead.shard, lead.epoch), tenant.sid)
    if known != tenant.sid:
        witness.fail("I1", f"{tenant}, under which {known} has led")


def generation_is_the_stored_one(witness: "Witness", tenant: "Tenant") -> None:
    """I2, in the moment: whoever leads does so under the generation that was raised, not under an earlier one."""
    generation = tenant.lead.epoch >> 48
    stored = witness.world.stored_generation
    if generation != stored:
        witness.fail("I2", f"{tenant} is of generation {generation}, after {stored} was raised")


def guards_never_overlap(witness: "Witness", shard: int) -> None:
    """I3: in omniscient time, intervals in which the guard says yes never overlap for two sessions of a shard."""
    valid = [tenant for tenant in witness.tenants.get(shard, ()) if tenant.is_valid]
    if len({tenant.sid for tenant in valid}) > 1:
        witness.fail("I3", " and ".join(str(tenant) for tenant in valid))


def deadline_within_lease(witness: "Witness", process: "WorkerProcess") -> None:
    """I4: a session's deadline, in true time, is not after its lease's expiry at the server."""
    session = process.session
    if session is None or not process.guard_ns:
        return
    expiry_ns = witness.world.etcd.lease_expiry_ns(session.lease)
    until_ns = process.machine.true_ns_of(process.guard_ns)
    if expiry_ns is None:
        witness.fail("I4", f"{process.machine.name} renewed the deadline of lease {session.lease:x}, which is gone")
    elif until_ns > expiry_ns:
        ahead_s = (until_ns - expiry_ns) / NS_PER_S
        witness.fail(
            "I4", f"{process.machine.name} trusts its lease for {ahead_s:.6f} s longer than the store keeps it"
        )


def no_handler_after_the_end(witness: "Witness", tenant: "Tenant") -> None:
    """I6, first half: once a leadership is lost or its guard says no, no handler of it starts."""
    if not tenant.is_valid:
        witness.fail("I6", f"a handler starts for {tenant}, which is over")
    if not tenant.is_open:
        witness.fail("I6", f"a handler starts for {tenant}, which is not open")


def handlers_end_in_time(witness: "Witness", tenant: "Tenant") -> None:
    """I6, second half: of a lost leadership no handler still runs after the grace (or the process has exited)."""
    process = tenant.process
    if not tenant.lead.is_lost:
        return
    now_ns = process.lived_ns()
    if tenant.lost_local_ns < 0:
        tenant.lost_local_ns = now_ns
    over_s = (now_ns - tenant.lost_local_ns) / NS_PER_S
    if over_s > process.settings.worker.cancel_grace_s + GRACE_SLACK_S:
        witness.fail("I6", f"a handler of {tenant} runs {over_s:.3f} s after its loss")


def never_after_given_up(witness: "Witness", tenant: "Tenant", what: str) -> None:
    """I14: after a T4, T5 or T5s was sent, that epoch is never served again by that worker."""
    lead = tenant.lead
    sent_ns = witness.given_up.get((tenant.process.machine.name, lead.shard, revision_of(lead.epoch)))
    if sent_ns is not None:
        witness.fail("I14", f"{tenant} {what}, though it was given up at {sent_ns / NS_PER_S:.6f} s")


def belief_ends(witness: "Witness", tenant: "Tenant") -> None:
    """I7, the other way round: nobody's guard goes on saying yes for longer than an audit takes to come round after
    its key is gone or another's, whatever the store acknowledges."""
    world = witness.world
    kv = world.etcd.get(world.keyspace.leader(tenant.lead.shard)) if tenant.is_valid else None
    if not tenant.is_valid or (kv is not None and kv.mod_revision == revision_of(tenant.lead.epoch)):
        tenant.doubtful_ns = -1
        return
    now_ns = tenant.process.lived_ns()
    if tenant.doubtful_ns < 0:
        tenant.doubtful_ns = now_ns
    over_s = (now_ns - tenant.doubtful_ns) / NS_PER_S
    if over_s > AUDIT_ROUNDS * world.setup.ttl_s + BELIEF_EXTRA_S:
        witness.fail("I7", f"{tenant} has been believed in for {over_s:.1f} s after its key was gone")


def router_never_goes_back(witness: "Witness", router: str, shard: int, epoch: int) -> None:
    """I11: a router never sends with an epoch below the largest that it has seen for that shard."""
    seen = witness.router_epochs.get((router, shard), 0)
    if epoch < seen:
        witness.fail("I11", f"{router} sends for shard {shard} under epoch {epoch} after it has seen {seen}")


def mirror_is_snapshot(witness: "Witness", name: str, revision: int, wrong: Sequence[str]) -> None:
    """I8: a mirror at a revision is what the store was at that revision."""
    if wrong:
        witness.fail("I8", f"{name} at revision {revision} differs from the store: {', '.join(wrong[:3])}")


# --- at the end ------------------------------------------------------------------------------------------------------


def epochs_grow(witness: "Witness") -> None:
    """I2: the epochs of a shard strictly increase in the order in which they were granted, over restarts and
    generations."""
    granted: dict[int, list[tuple[int, int]]] = {}
    last: dict[int, int] = {}
    for change in witness.world.etcd.history:  # in the order in which the store granted them
        place = witness.world.keyspace.parse(change.key)
        if place is not None and place.kind == "leaders" and change.value is not None:
            granted.setdefault(place.shard, []).append((change.true_ns, change.revision))
    led: dict[tuple[int, int], int] = {}  # what leaders made of it: their epoch, generation included
    for shard, epoch in witness.sids:
        led[shard, revision_of(epoch)] = epoch
    for shard, grants in granted.items():
        for _, revision in grants:
            known = led.get((shard, revision))
            if known is None:
                continue
            if known <= last.get(shard, 0):
                witness.fail("I2", f"shard {shard} was led under epoch {known} after {last[shard]}")
            last[shard] = max(known, last.get(shard, 0))


def nobody_else_touches(witness: "Witness") -> None:
    """I13: while a session lives, nobody but its own process changes or deletes its `leaders/` keys (R1)."""
    world = witness.world
    holders: dict[int, str] = {}  # shard -> worker named
    for change in world.etcd.history:
        place = world.keyspace.parse(change.key)
        if place is None or place.kind != "leaders":
            continue
        holder = holders.get(place.shard)
        by = change.writer.partition("#")[0]
        if change.value is None:
            # a lease's end deletes without a writer of its own; a revocation is judged by whoever sent it
            if holder is not None and by and not change.is_lease_end and by != holder:
                witness.fail("I13", f"{change.writer} deleted leaders/{place.shard} of {holder}")
            holders.pop(place.shard, None)
            continue
        if holder is not None and by != holder:
            witness.fail("I13", f"{change.writer} overwrote leaders/{place.shard} of {holder}")
        holders[place.shard] = _worker_of(change)


def handed_to_a_want(witness: "Witness") -> None:
    """I10, first half: a leadership is passed on only to a worker whose want for it stands."""
    world = witness.world
    holders: dict[int, str] = {}
    wants: set[tuple[str, int]] = set()  # (addressee, shard)
    for _, changes in groupby(world.etcd.history, key=lambda change: (change.revision, change.true_ns)):
        together = [(change, world.keyspace.parse(change.key)) for change in changes]
        for change, place in together:
            if place is None or place.kind != "leaders":
                continue
            if change.value is None:
                holders.pop(place.shard, None)
                continue
            worker = _worker_of(change)
            by = change.writer.partition("#")[0]
            before = holders.get(place.shard)
            if before == by and worker not in ("", by) and (by, place.shard) not in wants:
                witness.fail("I10", f"{change.writer} handed shard {place.shard} to {worker}, whose want did not stand")
            holders[place.shard] = worker
        for change, place in together:
            if place is not None and place.kind == "wants":
                if change.value is None:
                    wants.discard((place.worker, place.shard))
                else:
                    wants.add((place.worker, place.shard))


def _worker_of(change: "Applied") -> str:
    try:
        return decode(LeaderRecord, change.key, change.value or b"").worker
    except KeyspaceError:
        return ""


def fence_holds(witness: "Witness") -> None:
    """I5, first part: accepted writes of a shard have epochs that never go down."""
    last: dict[int, int] = {}
    for done in witness.world.storage.accepted:
        if done.epoch < last.get(done.shard, 0):
            witness.fail("I5", f"a write of shard {done.shard} under epoch {done.epoch} after {last[done.shard]}")
        last[done.shard] = max(done.epoch, last.get(done.shard, 0))


def nothing_acknowledged_is_lost(witness: "Witness") -> None:
    """I5, second part: no acknowledged write is lost, and each key's history is linearizable."""
    storage = witness.world.storage
    by_key: defaultdict[str, list[Operation]] = defaultdict(list)
    are_memories_good = "I3" not in witness.world.tolerated
    for operation in witness.world.history:
        if are_memories_good or not operation.is_cached:
            by_key[operation.key].append(operation)
    for key, operations in sorted(by_key.items()):
        for text in list_history_faults(operations, storage.values.get(key, ())):
            witness.fail("I5", f"key {key}: {text}")


def executed_once(witness: "Witness") -> None:
    """I10: a request is executed at most once, and never after its client was told that it was not done."""
    executed = Counter[str](done.value[-1] for done in witness.world.storage.accepted)
    for operation in witness.world.history:
        if not operation.word:
            continue
        times = executed[operation.word]
        if times > 1:
            witness.fail("I10", f"{operation} was executed {times} times")
        if times and operation.outcome == "fail":
            witness.fail("I10", f"{operation} was executed")


AT_THE_END: Final = (
    epochs_grow,
    nobody_else_touches,
    handed_to_a_want,
    fence_holds,
    nothing_acknowledged_is_lost,
    executed_once,
)


def list_history_faults(operations: Sequence[Operation], final: Sequence[str]) -> list[str]:
    """Why this history of appends of unique words and reads of the whole list is not linearizable; [] if it is.

    What stands in the storage in the end is one read more, after all the others. What was refused is left out; an
    operation whose outcome nobody knows stays open to the end.
    """
    history = [
        linearizable.Operation(
            what="append" if each.word else "read",
            began_ns=each.began_ns,
            ended_ns=each.ended_ns if each.outcome == "ok" else None,
            word=each.word,
            seen=each.seen if each.outcome == "ok" else None,
            name=each.client,
        )
        for each in operations
        if each.outcome != "fail"
    ]
    end_ns = 1 + max((max(each.began_ns, each.ended_ns or 0) for each in history), default=0)
    history.append(linearizable.Operation("read", end_ns, end_ns, seen=tuple(final), name="the storage"))
    return linearizable.faults(history, linearizable.Lists())
