"""A simulated etcd of three members: one truth (`store.model`), seen by each member a little later.

It speaks the JSON of etcd's gateway, so that the shipped client is its client. A request arrives at a member at some
instant, is decided there and then, or waits (no leader, a member that stands still) and may be applied long after its
sender has given up. Writes and linearizable reads are decided on the newest state, whichever member they come to;
watches see what their member has applied.

Faults begin when they are called and stay until healed. Everything that was ever applied stands in `history`.
"""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson

from shardlead.clock import NS_PER_S
from shardlead.errors import Compacted, StoreRejected
from shardlead.store import answers, requests
from shardlead.store.base import KeyValue, Range, Txn, TxnResult
from shardlead.store.embedded import KEEPALIVE, VERSION, EmbeddedStore
from shardlead.store.gateway import REVOKE, STATUS
from shardlead.store.model import Lease, Model
from shardlead.virtual import Machine, VirtualLoop
from tests.simulation.misbehaviour import Misbehaviour

MEMBERS: Final = 3
TICK_S: Final = 0.5  # etcd looks for leases that have ended so often
ELECTION_S: Final = (1.0, 2.0)  # how long there is no leader
ELECTION_TIMEOUT_S: Final = 1.0
STALE_MAX: Final = 60  # revisions
REQUEST_TIMEOUT_S: Final = 7.0  # what etcd itself waits for before it says that it does not know
PROGRESS_S: Final = 10.0
LAG_S: Final = (0.0002, 0.004)  # how much later a member applies what the leader has
REVISIONS_MAX: Final = 3  # in one message of a watch; etcd's own 1,000 would hardly ever be reached here
UNAVAILABLE: Final = 14
READS: Final = frozenset({"/v3/kv/range", "/v3/lease/timetolive", "/v3/kv/lease/timetolive"})

Reply = Callable[[int, bytes], object]


@dataclass(frozen=True, slots=True)
class Applied:
    """One change of one key."""

    true_ns: int
    revision: int
    key: bytes
    value: bytes | None  # None: deleted
    lease: int
    writer: str  # which process's request it was; "" for a lease that ended by itself
    is_lease_end: bool
    create_revision: int


class _LeaseClock:
    """The time by which leases age: the etcd machines' own."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def now_ns(self) -> int:
        return self._machine.now_ns()

    def wall_s(self) -> float:
        return 0.0


class WatchSide:
    """A watch as its member has it. `send` takes lines; `end` says that the connection is gone."""

    def __init__(
        self,
        etcd: "Etcd",
        member: "Member",
        client: str,
        asked: requests.Watch,
        send: Callable[[bytes], object],
        end: Callable[[], object],
    ) -> None:
        self.client = client
        self.asked = asked
        self.following = asked.start_revision
        self.is_open = True
        self.is_canceled = False
        self.is_silent = False
        self.loses_a_delete = False
        self._etcd = etcd
        self._member = member
        self._send = send
        self._end = end

    def begin(self) -> None:
        self._tell({"created": True})
        self.pump()

    def pump(self) -> None:
        """Tell what the member has applied and this watch has not told."""
        etcd, model = self._etcd, self._etcd.model
        while self.is_open and not self.is_canceled and self.following <= self._member.applied:
            try:
                batch, self.following = model.events_since(
                    self.following,
                    self.asked.key,
                    self.asked.range_end,
                    until=self._member.applied,
                    revisions_max=REVISIONS_MAX,
                )
            except Compacted as exc:
                self.is_canceled = True
                self._tell({"canceled": True, "compact_revision": str(exc.compact_revision)}, has_revision=False)
                return
            events = batch.events
            if self.loses_a_delete and any(event.is_delete for event in events):
                self.loses_a_delete = False
                lost = next(event for event in events if event.is_delete)
                events = tuple(event for event in events if event is not lost)
                etcd.note_misbehaviour(f"a watch does not tell that {lost.kv.key.decode()} was deleted")
            if not events:
                continue
            if etcd.strikes(etcd.misbehaviour.progress_overtakes):
                etcd.note_misbehaviour(f"a watch announces revision {self._member.applied} before its events")
                self._tell({})
            if etcd.strikes(etcd.misbehaviour.silent_watch):
                etcd.note_misbehaviour("a watch falls silent")
                self.is_silent = True
            self._tell({"events": [answers.encode_event(event) for event in events]})

    def progress(self) -> None:
        if self.is_open and not self.is_canceled and self.following > self._member.applied and self.asked.has_progress:
            self._tell({})

    def break_off(self) -> None:
        """The connection is reset."""
        if self.is_open:
            self.close()
            self._end()

    def close(self) -> None:
        self.is_open = False
        self._member.watches.pop(self, None)

    def _tell(self, fields: dict[str, Any], *, has_revision: bool = True) -> None:
        if self.is_silent or not self.is_open:
            return
        header = {"cluster_id": self._etcd.cluster_id, "member_id": "1", "raft_term": "1"}
        if has_revision:
            header["revision"] = str(self._member.applied)
        self._send(orjson.dumps({"result": {"header": header, **fields}}, option=orjson.OPT_APPEND_NEWLINE))


class Member:
    """One of the three: what it has applied, its watches, and the requests that wait for it."""

    def __init__(self, etcd: "Etcd", index: int) -> None:
        self.index = index
        self.applied = 1
        self.watches: dict[WatchSide, None] = {}
        self.is_down = False
        self.is_paused = False
        self.lag_s = LAG_S
        self.acks_until_ns = 0  # a deposed leader that does not know it yet
        self.waiting: deque[Callable[[], object]] = deque()
        self._etcd = etcd
        self._advances_ns = 0

    def hear(self, revision: int) -> None:
        """Of a new revision, some time later."""
        etcd = self._etcd
        due_ns = etcd.machine.now_ns() + int(etcd.rng.uniform(*self.lag_s) * NS_PER_S)
        self._advances_ns = max(self._advances_ns, due_ns)
        etcd.machine.call_later((self._advances_ns - etcd.machine.now_ns()) / NS_PER_S, self._advance, revision)

    def _advance(self, revision: int) -> None:
        if self.is_down or self.is_paused:
            return
        self.applied = max(self.applied, revision)
        for watch in tuple(self.watches):
            watch.pump()

    def reset_watches(self, client: str) -> None:
        """Break off the watches of that client."""
        for watch in tuple(self.watches):
            if watch.client == client:
                watch.break_off()

    def go_on(self) -> None:
        """It runs again: it catches up, and what waited for it is done."""
        self.applied = self._etcd.model.revision
        waiting, self.waiting = self.waiting, deque()
        for act in waiting:
            act()
        for watch in tuple(self.watches):
            watch.pump()


class Etcd:
    """The cluster. See the module."""

    def __init__(
        self,
        loop: VirtualLoop,
        rng: random.Random,
        *,
        rate: float = 1.0,
        misbehaviour: Misbehaviour | None = None,
        version: str = VERSION,
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        self.loop = loop
        self.rng = rng
        self.machine = loop.machine("etcd", rate=rate)
        self.misbehaviour = misbehaviour if misbehaviour is not None else Misbehaviour()
        self.has_misbehaved = False
        self.has_regressed = False  # its revisions went back
        self._version = version
        self.endpoints = tuple(f"http://etcd{index}:2379" for index in range(MEMBERS))
        self.history: list[Applied] = []
        self.cuts: dict[tuple[str, int], list[str]] = {}  # (address, member) -> ways
        self.on_heal: list[Callable[[], object]] = []
        self.cluster_id = str(rng.getrandbits(62) | 1)
        self._say = say
        self.model = Model(rng=rng)
        self._front = EmbeddedStore(self.model, clock=_LeaseClock(self.machine), rng=rng)
        self._front._time = _LeaseClock(self.machine)  # type: ignore[assignment]  # leases age here
        self._front._cluster = self.cluster_id
        self.members = [Member(self, index) for index in range(MEMBERS)]
        self._noted = 1
        self._leaderless = 0  # reasons for there being none
        self._undecided: list[Callable[[], object]] = []
        self._ghosts: dict[int, tuple[int, int]] = {}  # leases that are over and still acknowledged: (ttl, until)
        self._past: deque[Model] = deque(maxlen=4)
        self.machine.call_later(TICK_S, self._tick)
        self.machine.call_later(PROGRESS_S, self._progress)

    # --- for the witness and the nemesis

    def get(self, key: bytes) -> KeyValue | None:
        """What stands there now."""
        found = self.model.range(Range(key)).kvs
        return found[0] if found else None

    def write(self, txn: Txn, writer: str = "operator") -> TxnResult:
        """Apply it at once."""
        result = self.model.txn(txn)
        self._note(writer)
        return result

    def revoke(self, lease: int) -> None:
        """By somebody's hand."""
        found = self._leases.get(lease)
        if found is not None:
            self.model.revoke(lease)
            self._note("operator", is_lease_end=True)
            self._lease_ended(found)

    def lease_expiry_ns(self, lease: int) -> int | None:
        """True time at which that lease may end at the earliest, if it is not renewed; None if there is none."""
        found = self._leases.get(lease)
        return None if found is None else self.machine.true_ns_of(found.expiry_ns)

    def strikes(self, chance: float) -> bool:
        """Whether a misbehaviour of that chance happens now. Draws nothing for what is switched off."""
        return chance > 0 and self.rng.random() < chance

    def note_misbehaviour(self, text: str) -> None:
        self.has_misbehaved = True
        self._say(f"misbehaves: {text}")

    # --- faults

    def change_leader(self) -> None:
        """No leader for a while; then every lease has its TTL and an election time-out before it."""
        deposed = self.rng.choice(self.members)
        if self.strikes(self.misbehaviour.stale_ack):
            ttl_s = max((lease.ttl_s for lease in self._leases.values()), default=2)
            deposed.acks_until_ns = self.machine.now_ns() + int(self.rng.uniform(ttl_s, 3.0 * ttl_s) * NS_PER_S)
            self.note_misbehaviour(f"member {deposed.index}, deposed, goes on acknowledging renewals")
        self._leaderless += 1
        self.machine.call_later(self.rng.uniform(*ELECTION_S), self._elected)

    def lose_quorum(self) -> None:
        """Nothing is decided, and no lease ends, until `heal_quorum`."""
        self._leaderless += 1

    def heal_quorum(self) -> None:
        self.machine.call_later(self.rng.uniform(*ELECTION_S), self._elected)

    def restart(self) -> None:
        """All members at once. Leases begin anew."""
        for member in self.members:
            for watch in tuple(member.watches):
                watch.break_off()
            member.is_paused = False
            member.is_down = True
            member.waiting.clear()
        self._undecided.clear()
        self._leaderless += 1
        if self._past and self.strikes(self.misbehaviour.revision_regress):
            self._regress(self.rng.choice(list(self._past)))
        self.machine.call_later(self.rng.uniform(0.5, 1.5), self._restarted)

    def stop_member(self, index: int, *, is_paused: bool) -> None:
        """It is down, or stands still with its connections open."""
        member = self.members[index]
        if is_paused:
            member.is_paused = True
            return
        member.is_down = True
        for watch in tuple(member.watches):
            watch.break_off()

    def start_member(self, index: int) -> None:
        member = self.members[index]
        member.is_paused = member.is_down = False
        member.go_on()

    def lag(self, index: int, low_s: float, high_s: float) -> None:
        """That member applies so much later than the others."""
        self.members[index].lag_s = (low_s, high_s)

    def compact(self, *, to_the_last: bool = False) -> None:
        """Forget everything before the last revision, or one of the last few."""
        back = 0 if to_the_last else self.rng.randrange(0, 8)
        revision = max(self.model.compacted + 1, self.model.revision - back, 2)
        if revision <= self.model.revision:
            self.model.compact(revision)
        for member in self.members:
            for watch in member.watches:
                if self.strikes(self.misbehaviour.lost_delete_at_compaction):
                    watch.loses_a_delete = True

    def cut(self, address: str, index: int, way: str) -> None:
        """What goes "there", comes "back", or "both" between that address and that member is held up."""
        self.cuts.setdefault((address, index), []).append(way)

    def heal(self, address: str, index: int, way: str) -> None:
        ways = self.cuts[address, index]
        ways.remove(way)
        if not ways:
            del self.cuts[address, index]
        for act in tuple(self.on_heal):
            act()

    def is_cut(self, address: str, index: int, way: str) -> bool:
        ways = self.cuts.get((address, index), ())
        return way in ways or "both" in ways

    # --- requests

    def arrive(self, index: int, path: str, body: bytes, writer: str, reply: Reply) -> None:
        """A request reaches a member now. `reply` is called when it has been decided, if ever."""
        member = self.members[index]
        if member.is_down:
            return  # its connection is gone with it
        if member.is_paused:
            member.waiting.append(lambda: self.arrive(index, path, body, writer, reply))
            return
        if path == KEEPALIVE and self._is_acked_falsely(member, body, reply):
            return
        if self._leaderless and path != STATUS:
            self._wait_for_leader(index, path, body, writer, reply)
            return
        if path in READS:
            if path == "/v3/kv/range" and self.strikes(self.misbehaviour.stale_read):
                self._answer_from_the_past(body, reply)
                return
            wait_s = self.rng.uniform(*member.lag_s)  # it first catches up
            self.machine.call_later(wait_s, self._decide, path, body, writer, reply)
            return
        self._decide(path, body, writer, reply)

    def watch(
        self,
        index: int,
        client: str,
        asked: requests.Watch,
        send: Callable[[bytes], object],
        end: Callable[[], object],
    ) -> WatchSide | None:
        """A watch reaches a member now; None if that member is down."""
        member = self.members[index]
        if member.is_down:
            return None
        side = WatchSide(self, member, client, asked, send, end)
        member.watches[side] = None
        if member.is_paused:
            member.waiting.append(side.begin)
        else:
            side.begin()
        return side

    def _decide(self, path: str, body: bytes, writer: str, reply: Reply) -> None:
        before = dict(self._leases) if path == REVOKE else {}
        status, answer = self._front.answer(path, body)
        if path == STATUS:
            answer = answer.replace(VERSION.encode(), self._version.encode())
        self._note(writer, is_lease_end=path == REVOKE)
        for lease, ended in before.items():
            if lease not in self._leases:
                self._lease_ended(ended)
        reply(status, answer)

    def _wait_for_leader(self, index: int, path: str, body: bytes, writer: str, reply: Reply) -> None:
        """Proposed to nobody in particular: it may be decided when there is a leader again, or never."""
        decided = False

        def decide() -> None:
            nonlocal decided
            if decided:
                return
            decided = True
            if path in READS or self.rng.random() < 0.5:
                self._decide(path, body, writer, reply)
            else:
                reply(*answers.encode_refusal(StoreRejected(UNAVAILABLE, "etcdserver: leader changed")))

        def give_up() -> None:
            if not decided:
                reply(*answers.encode_refusal(StoreRejected(UNAVAILABLE, "etcdserver: request timed out")))

        self._undecided.append(decide)
        self.machine.call_later(REQUEST_TIMEOUT_S, give_up)

    # --- misbehaviour

    def _is_acked_falsely(self, member: Member, body: bytes, reply: Reply) -> bool:
        lease = int(orjson.loads(body)["ID"])
        now_ns = self.machine.now_ns()
        found = self._leases.get(lease)
        if found is not None and member.acks_until_ns > now_ns:
            ttl_s = found.ttl_s
        elif lease in self._ghosts and self._ghosts[lease][1] > now_ns:
            ttl_s = self._ghosts[lease][0]
        else:
            return False
        header = {"cluster_id": self.cluster_id, "member_id": "1", "revision": str(member.applied), "raft_term": "1"}
        line = {"result": {"header": header, "ID": str(lease), "TTL": str(ttl_s)}}
        reply(200, orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        return True

    def _answer_from_the_past(self, body: bytes, reply: Reply) -> None:
        op = requests.parse_range(orjson.loads(body))
        revision = max(2, self.model.compacted, self.model.revision - self.rng.randrange(1, STALE_MAX))
        revision = min(revision, self.model.revision)
        if not op.revision:
            op = replace(op, revision=revision)
        try:
            result = self.model.range(op)
        except StoreRejected as refusal:
            reply(*answers.encode_refusal(refusal))
            return
        self.note_misbehaviour(f"a read is answered as of revision {revision}")
        header = {"cluster_id": self.cluster_id, "member_id": "1", "revision": str(revision), "raft_term": "1"}
        reply(200, orjson.dumps(answers.encode_range(result, header)))

    def _lease_ended(self, ended: Lease) -> None:
        if self.strikes(self.misbehaviour.renew_after_revoke):
            self._haunt(ended)

    def _haunt(self, lease: Lease) -> None:
        until_ns = self.machine.now_ns() + int(self.rng.uniform(0.5, 2.0 * lease.ttl_s) * NS_PER_S)
        self._ghosts[lease.lease] = (lease.ttl_s, until_ns)
        self.note_misbehaviour(f"lease {lease.lease:x} is over and is acknowledged for a while yet")

    def _regress(self, past: Model) -> None:
        self.has_regressed = True
        self.note_misbehaviour(f"revisions go back from {self.model.revision} to {past.revision}")
        self.model = self._front.model = past
        self._past.clear()
        self._noted = past.revision
        for member in self.members:
            member.applied = past.revision

    # --- time

    @property
    def _leases(self) -> dict[int, Lease]:
        return self.model._leases  # of one house: this is etcd's inside

    def _tick(self) -> None:
        self.machine.call_later(TICK_S, self._tick)
        if self._leaderless:
            return
        now_ns = self.machine.now_ns()
        before = dict(self._leases)
        self.model.expire(now_ns)
        if self._leases and self.strikes(self.misbehaviour.early_revoke):
            lease = self.rng.choice(sorted(self._leases))
            self.note_misbehaviour(f"lease {lease:x} ends before its time")
            self.model.revoke(lease)
        self._note("", is_lease_end=True)
        for lease, ended in before.items():
            if lease not in self._leases:
                self._lease_ended(ended)
        if self._leases and self.strikes(self.misbehaviour.key_gone_lease_alive):
            found = self._leases[self.rng.choice(sorted(self._leases))]
            self.model.revoke(found.lease)
            self._note("", is_lease_end=True)
            self._haunt(found)
        if self.misbehaviour.revision_regress and self.rng.random() < 0.5:
            self._past.append(self.model.copy())

    def _progress(self) -> None:
        self.machine.call_later(PROGRESS_S, self._progress)
        for member in self.members:
            if not (member.is_paused or self._leaderless):
                for watch in tuple(member.watches):
                    watch.progress()

    def _restarted(self) -> None:
        for member in self.members:
            member.is_down = False
            member.applied = self.model.revision
        self._elected()

    def _elected(self) -> None:
        self._leaderless -= 1
        if self._leaderless:
            return
        now_ns = self.machine.now_ns()
        for lease in self._leases.values():
            lease.expiry_ns = max(lease.expiry_ns, now_ns + int((lease.ttl_s + ELECTION_TIMEOUT_S) * NS_PER_S))
        undecided, self._undecided = self._undecided, []
        for decide in undecided:
            decide()

    def _note(self, writer: str, *, is_lease_end: bool = False) -> None:
        """Take what was applied into the history, and let the members hear of it."""
        model = self.model
        if self._noted == model.revision:
            return
        for revision, events in model.log_since(self._noted + 1):
            for event in events:
                kv = event.kv
                self.history.append(
                    Applied(
                        self.loop.true_ns(),
                        revision,
                        kv.key,
                        None if event.is_delete else kv.value,
                        kv.lease,
                        writer,
                        is_lease_end,
                        kv.create_revision,
                    )
                )
        self._noted = model.revision
        for member in self.members:
            member.hear(model.revision)
