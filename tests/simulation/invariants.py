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
from shardlead.core.model import LeaderRecord, Want, revision_of
from shardlead.errors import KeyspaceError
from tests.simulation.clients import Operation
from tests.support import linearizable

if TYPE_CHECKING:
    from tests.simulation.processes import WorkerProcess
    from tests.simulation.witness import Tenant, Witness

GRACE_SLACK_S: Final = 0.3
CLAIMS_PER_SHARD_MAX: Final = 4  # in one second
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


def never_both_serving(witness: "Witness", tenant: "Tenant") -> None:
    """I10, first part: never two serve one shard, in a handoff or otherwise. Of an unfenced class this holds even where
    leases end before their time, since its next leader waits."""
    if "I3" in witness.world.tolerated and witness.world.is_fenced:
        return
    for other in witness.tenants.get(tenant.lead.shard, ()):
        if other is not tenant and other.is_valid and other.is_open and not other.is_closed:
            witness.fail("I10", f"{tenant} serves, and so does {other}")


def no_key_unserved(witness: "Witness", shard: int) -> None:
    """I7: no leader's key of a living session stays unserved for longer than audit + TTL (orphans are adopted or
    freed). Time counts while that session is active, so that it may serve; and what an application may take for
    opening, draining and closing is its own."""
    world = witness.world
    kv = world.etcd.get(world.keyspace.leader(shard))
    process = world.process_of_sid(_sid_in(kv.key, kv.value)) if kv is not None else None
    if kv is None or process is None or process.session is None or not process.machine.runs:
        witness.unserved.pop(shard, None)
        return
    is_served = any(
        tenant.is_open and revision_of(tenant.lead.epoch) == kv.mod_revision
        for tenant in witness.tenants.get(shard, ())
    )
    if is_served or not process.session.is_active:
        witness.unserved.pop(shard, None)
        return
    revision, since_ns = witness.unserved.get(shard, (0, 0))
    now_ns = process.lived_ns()
    if revision != kv.mod_revision:
        witness.unserved[shard] = (kv.mod_revision, now_ns)
        return
    over_s = (now_ns - since_ns) / NS_PER_S
    if over_s > world.unserved_max_s:
        witness.fail("I7", f"leaders/{shard} of {process.machine.name} at {revision} unserved for {over_s:.1f} s")


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
    """I13: while a session lives, nobody but the process that holds it changes or deletes its `leaders/` keys (R1), nor
    ends its lease; a parent does so once its process is dead. Checked on the store's log."""
    world = witness.world
    held: dict[bytes, str] = {}  # leader key -> the sid in it
    for change in world.etcd.history:
        if not world.is_leader_key(change.key):
            continue
        sid = held.pop(change.key, "")
        if change.value is not None:
            held[change.key] = _sid_in(change.key, change.value)
        process = world.process_of_sid(sid)
        if process is None or change.writer == process.machine.name:
            continue
        if change.is_lease_end:
            is_by_rule = change.writer in ("", "operator") or (
                change.writer == f"{process.machine.name}'s parent" and 0 <= process.died_ns <= change.true_ns
            )
            if not is_by_rule:
                witness.fail("I13", f"{change.writer} ended the lease of {process.machine.name}")
            continue
        what = "deleted" if change.value is None else "overwrote"
        witness.fail("I13", f"{change.writer} {what} {change.key.decode()} of {process.machine.name}")


def handed_to_a_want(witness: "Witness") -> None:
    """I10, second part: a leadership is passed on only to the session whose want for it stands."""
    world = witness.world
    held: dict[bytes, str] = {}
    wants: dict[tuple[str, int], str] = {}  # (addressee, shard) -> the sid that wants it
    for _, changes in groupby(world.etcd.history, key=lambda change: (change.revision, change.true_ns)):
        together = [(change, world.keyspace.parse(change.key)) for change in changes]
        for change, place in together:
            if place is None or place.kind != "leaders":
                continue
            before = held.pop(change.key, "")
            if change.value is None:
                continue
            sid = held[change.key] = _sid_in(change.key, change.value)
            giver = world.process_of_sid(before)
            if giver is None or giver.machine.name != change.writer or sid == before:
                continue
            if wants.get((giver.name, place.shard)) != sid:
                witness.fail("I10", f"{change.writer} handed shard {place.shard} to {sid}, whose want did not stand")
        for change, place in together:
            if place is not None and place.kind == "wants":
                wants.pop((place.worker, place.shard), None)
                if change.value is not None:
                    wants[place.worker, place.shard] = decode(Want, change.key, change.value).target_sid


def claims_are_paced(witness: "Witness") -> None:
    """I12: claims/s <= limit: a shard is claimed a few times in a second at most, whoever fails with it. (That a shard
    which kills its owner takes down few workers an hour is shown by `test_poison.py`.)"""
    world = witness.world
    claims = Counter[tuple[bytes, int]]()
    standing: set[bytes] = set()
    for change in world.etcd.history:
        if world.is_leader_key(change.key):
            if change.value is None:
                standing.discard(change.key)
            elif change.key not in standing:
                standing.add(change.key)
                claims[change.key, change.true_ns // NS_PER_S] += 1
    for (key, second), count in claims.items():
        if count > CLAIMS_PER_SHARD_MAX:
            witness.fail("I12", f"{key.decode()} was claimed {count} times in second {second}")


def _sid_in(key: bytes, value: bytes) -> str:
    try:
        return decode(LeaderRecord, key, value).sid
    except KeyspaceError:
        return ""


def fence_holds(witness: "Witness") -> None:
    """I5, first part: accepted writes of a shard have epochs that never go down, and none is below the registered
    one."""
    last: dict[int, int] = {}
    if not witness.world.is_fenced:
        return
    for done in witness.world.storage.journal:
        if done.epoch < last.get(done.shard, 0):
            what = f"a write to {done.key}" if done.key else "a registration"
            witness.fail("I5", f"{what} of shard {done.shard} under epoch {done.epoch} after {last[done.shard]}")
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


def mirror_is_current(witness: "Witness", name: str, wrong: Sequence[str]) -> None:
    """I8, second half: after everything was healed a mirror is equal to the range within one tick's time-out."""
    if wrong:
        witness.fail("I8", f"{name} is not the store's range: {', '.join(wrong[:3])}")


def whole_in_time(witness: "Witness", limit_s: float, after_s: float | None, missing: str) -> None:
    """I9: within TTL + 1 s + claim time after the last fault heals (TTL + 5 s if etcd changed its leader meanwhile)
    each shard has exactly one serving owner and all routers agree."""
    if missing:
        text = "never whole again within a minute" if after_s is None else f"whole only after {after_s:.1f} s"
        witness.fail("I9", f"not whole {limit_s} s after everything was healed ({text}): {missing}")


def no_request_fails(witness: "Witness") -> None:
    """I0: in planned operations alone, not one request fails."""
    for operation in witness.world.history:
        if operation.outcome != "ok" and not operation.is_background:
            witness.fail("I0", f"a request failed in planned operations: {operation}")


def quiet_is_kept(witness: "Witness", counts: Sequence[int], changes: int) -> None:
    """I15: with nothing going on, workers of equal capacity lead equal numbers of shards, one more or less, and then
    no leadership moves. (Where workers had to give up shards that they could not serve, evenness may wait for longer.)
    """
    if max(counts) - min(counts) > 1:
        witness.fail("I15", f"leaderships are uneven though nothing goes on: {list(counts)}")
    if changes:
        witness.fail("I15", f"{changes} leaderships changed though nothing goes on")


def executed_once(witness: "Witness") -> None:
    """I10, third part: a request is executed at most once, and never after its client was told that it was not done."""
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
    claims_are_paced,
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
