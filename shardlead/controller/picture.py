"""The controller's picture of the whole cluster, kept current by the changes of a mirror.

What it never does: wait, write or plan. It turns key-values into the planner's nouns, in time proportional to the
change, and notes when membership changed: settling, the brake and a cold start are told by those times. It also
notes who gives up shards while it lives and is not stopping: an application that cannot open them. Such a worker is
shunned for a while, or evenness would feed it shard after shard.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from shardlead.clock import NS_PER_S
from shardlead.cluster.mail import Facts
from shardlead.controller.returning import Returning
from shardlead.core.fleet import Fleet, fleet_of
from shardlead.core.keyspace import Keyspace, Place
from shardlead.core.model import Assignment, History, LeaderRecord, PastLeader, Tick
from shardlead.core.planner import Copy, Led, Snapshot
from shardlead.core.shardmap import Fact
from shardlead.store.mirror import Change

SHUN_SHARDS: Final = 2  # a worker that gave up so many different shards is shunned; a single one may be a bad shard
SHUN_S: Final = 30.0  # for each shard it gave up, after the last of them
SHUN_MAX_S: Final = 900.0

_OF_FLEET: Final = frozenset(("meta", "seat", "freeze", "cordon", "drain", "pin", "workers"))


class Picture:
    """Everything that the planner looks at. `apply` takes a change, `snapshot` gives what stands now."""

    def __init__(self, keyspace: Keyspace, brake_window_s: float, return_wait_s: float) -> None:
        self.fleet = Fleet()
        self.seat_revision = 0
        self._keyspace = keyspace
        self._facts = Facts(keyspace)
        self._of_fleet: dict[bytes, Fact] = {}
        self._records: dict[int, tuple[LeaderRecord, int]] = {}
        self._led: dict[int, Led] = {}
        self._copies: dict[int, dict[str, Copy]] = {}  # inner ones are replaced, never changed: snapshots share them
        self._known: set[int] = set()
        self._previous: dict[int, PastLeader] = {}
        self._troubled: set[int] = set()
        self._departed_ns: dict[str, int] = {}
        self._given_up_ns: dict[tuple[str, str], dict[int, int]] = {}  # worker and sid -> shard -> when
        self._returning = Returning(return_wait_s)
        self._is_loaded = False
        self._tick = 0
        self._brake_window_ns = int(brake_window_s * NS_PER_S)
        self._changed_ns = 0
        self._was_cold = False
        self._cold_since_ns: int | None = None

    def apply(self, change: Change, now_ns: int) -> bool:
        """Take a change; whether the planner could see a difference."""
        is_of_fleet = is_seen = False
        histories: list[History] = []
        for kv in change.deletes:
            place = self._keyspace.parse(kv.key)
            if place is None:
                continue
            if place.kind in _OF_FLEET:
                self._of_fleet.pop(kv.key, None)
                is_of_fleet = True
            else:
                if place.kind == "leaders" and place.shard in self._records:
                    record, _ = self._records[place.shard]
                    self._given_up_ns.setdefault((record.worker, record.sid), {})[place.shard] = now_ns
                is_seen |= self._take(place, None)
        for kv in change.puts:
            fact = self._facts.read(kv)
            place = self._keyspace.parse(kv.key)
            if place is None:
                continue
            match fact.value if fact is not None else None:
                case History() as history:
                    histories.append(history)
                case Tick(n):
                    self._tick = n
                case _:
                    pass
            if place.kind not in _OF_FLEET:
                is_seen |= self._take(place, fact)
            elif fact is None:
                self._of_fleet.pop(kv.key, None)
                is_of_fleet = True
            else:
                self._of_fleet[kv.key] = fact
                is_of_fleet = True
        if is_of_fleet or change.is_load:
            self._take_fleet(now_ns, is_load=change.is_load)
        if change.is_load and not self._is_loaded:
            self._is_loaded = True
            self._returning.recall(histories, self.fleet, self._tick, now_ns)
        return is_seen or is_of_fleet or change.is_load

    def _take(self, place: Place, fact: Fact | None) -> bool:
        shard = place.shard
        match place.kind:
            case "leaders":
                if fact is None:
                    self._records.pop(shard, None)
                    self._led.pop(shard, None)
                else:
                    assert isinstance(fact.value, LeaderRecord)
                    self._records[shard] = (fact.value, fact.mod_revision)
                    self._led[shard] = self._understand(fact.value, fact.mod_revision)
            case "assignments":
                copies = {name: copy for name, copy in self._copies.get(shard, {}).items() if name != place.worker}
                if fact is not None:
                    assert isinstance(fact.value, Assignment)
                    copies[place.worker] = Copy(fact.value.order, fact.mod_revision)
                if copies:
                    self._copies[shard] = copies
                else:
                    self._copies.pop(shard, None)
            case "history":
                self._known.discard(shard)
                self._troubled.discard(shard)
                self._previous.pop(shard, None)
                if fact is not None:
                    assert isinstance(fact.value, History)
                    self._known.add(shard)
                    if fact.value.short_tenures:
                        self._troubled.add(shard)
                    if fact.value.previous:
                        self._previous[shard] = fact.value.previous[0]
            case _:
                return False
        return place.kind != "history"  # it comes with a change of leader, in one transaction

    def _understand(self, record: LeaderRecord, revision: int) -> Led:
        member = self.fleet.members.get(record.worker)
        is_living = member is not None and member.record.sid == record.sid
        return Led(record.worker if is_living else "", revision)

    def _take_fleet(self, now_ns: int, *, is_load: bool) -> None:
        before, self.fleet = self.fleet, fleet_of(self._of_fleet.values())
        seat = self._of_fleet.get(self._keyspace.seat)
        self.seat_revision = seat.mod_revision if seat is not None else 0
        sessions = _sessions(self.fleet)
        if _sessions(before) == sessions and not is_load:
            return
        self._changed_ns = now_ns
        for name, member in before.members.items():
            if name not in sessions and member.record.state == "up":
                self._departed_ns[name] = now_ns
        self._returning.note(before, self.fleet, now_ns)
        self._led = {shard: self._understand(*record) for shard, record in self._records.items()}

    def snapshot(self, now_ns: int) -> Snapshot:
        """What stands now, for the planner; shares nothing that changes."""
        self._departed_ns = {
            name: at_ns for name, at_ns in self._departed_ns.items() if now_ns - at_ns < self._brake_window_ns
        }
        meta = self.fleet.meta
        snapshot = Snapshot(
            fleet=self.fleet,
            shards=meta.shards if meta is not None else 0,
            leaders=dict(self._led),
            copies=dict(self._copies),
            known=frozenset(self._known),
            previous=dict(self._previous),
            still_for_s=(now_ns - self._changed_ns) / NS_PER_S,
            return_in_s=self._returning.left_s(now_ns),
            departed=frozenset(self._departed_ns),
            shunned=self._shunned(now_ns),
            troubled=frozenset(self._troubled),
        )
        is_cold = snapshot.is_cold and bool(self.fleet.members)
        if is_cold and not self._was_cold:
            self._cold_since_ns = now_ns
        self._was_cold = is_cold
        if self._cold_since_ns is None:
            return snapshot
        return replace(snapshot, waited_s=(now_ns - self._cold_since_ns) / NS_PER_S)

    def _shunned(self, now_ns: int) -> frozenset[str]:
        """Who gave up several shards lately, in a session that still lives. Whoever ends or stops gives up all, and
        that is no failure."""
        shunned: set[str] = set()
        for (name, sid), shards in tuple(self._given_up_ns.items()):
            member = self.fleet.members.get(name)
            if member is None or member.record.sid != sid or member.record.state != "up":
                del self._given_up_ns[name, sid]
            elif len(shards) >= SHUN_SHARDS:
                hold_s = min(SHUN_MAX_S, SHUN_S * len(shards))
                if now_ns - max(shards.values()) < hold_s * NS_PER_S:
                    shunned.add(name)
        return frozenset(shunned)


def _sessions(fleet: Fleet) -> Mapping[str, tuple[str, str]]:
    return {name: (member.record.sid, member.record.state) for name, member in fleet.members.items()}
