"""A cluster for the planner's tests: workers that obey assignments as protocol.md A.3 has them do, without time,
store or processes. Every step is a revision."""

from collections import Counter
from dataclasses import replace

from shardlead.core import duties
from shardlead.core.fleet import Fleet
from shardlead.core.model import Assignment, PastLeader, WorkerRecord
from shardlead.core.planner import Copy, Led, Limits, Plan, Snapshot, plan
from shardlead.core.shardmap import Member

QUIET_S = 1e9
ROUNDS_MAX = 10_000


class World:
    """What stands in the store, and what has happened. `moved` counts each shard's changes of leader but the first."""

    def __init__(self, shards: int, limits: Limits | None = None) -> None:
        self.shards = shards
        self.limits = limits or Limits()
        self.revision = 100
        self.members: dict[str, Member] = {}
        self.leaders: dict[int, Led] = {}
        self.copies: dict[int, dict[str, Copy]] = {}
        self.known: set[int] = set()
        self.previous: dict[int, PastLeader] = {}
        self.cordoned: set[str] = set()
        self.drained: set[str] = set()
        self.pins: dict[int, str] = {}
        self.is_frozen = False
        self.departed: set[str] = set()
        self.shunned: set[str] = set()
        self.troubled: set[int] = set()
        self.still_for_s = self.waited_s = QUIET_S
        self.return_in_s = 0.0
        self.moved: Counter[int] = Counter()
        self.last = Plan()
        self._tenure: dict[int, PastLeader] = {}

    # --- what is there

    def fleet(self) -> Fleet:
        return Fleet(
            members=dict(self.members),
            cordoned=frozenset(self.cordoned),
            drained=frozenset(self.drained),
            is_frozen=self.is_frozen,
            pins=dict(self.pins),
        )

    def snapshot(self) -> Snapshot:
        return Snapshot(
            fleet=self.fleet(),
            shards=self.shards,
            leaders=dict(self.leaders),
            copies={shard: dict(copies) for shard, copies in self.copies.items()},
            known=frozenset(self.known),
            previous=dict(self.previous),
            still_for_s=self.still_for_s,
            waited_s=self.waited_s,
            return_in_s=self.return_in_s,
            departed=frozenset(self.departed),
            shunned=frozenset(self.shunned),
            troubled=frozenset(self.troubled),
        )

    def order(self, shard: int) -> tuple[str, ...]:
        copies = self.copies.get(shard)
        return max(copies.values(), key=lambda copy: copy.revision).order if copies else ()

    def counts(self) -> dict[str, int]:
        led = Counter(fact.worker for fact in self.leaders.values())
        return {name: led[name] for name in sorted(self.members)}

    def led_by(self, name: str) -> list[int]:
        return [shard for shard in range(self.shards) if shard in self.leaders and self.leaders[shard].worker == name]

    def counts_after_death(self, name: str) -> dict[str, int]:
        """Who would lead how much once `name`'s successors have claimed; "" for what nobody claims."""
        counts = Counter(self.counts())
        del counts[name]
        fleet = replace(self.fleet(), members={other: self.members[other] for other in self.members if other != name})
        for shard in self.led_by(name):
            heirs = fleet.eligible(other for other in self.order(shard) if other != name)
            counts[heirs[0] if heirs else ""] += 1
        return dict(counts)

    # --- what happens

    def join(self, name: str, *, zone: str = "", capacity: float = 1.0) -> None:
        self.revision += 1
        record = WorkerRecord(f"sid-{self.revision}", f"{name}:80", zone=zone, capacity=capacity)
        self.members[name] = Member(record, self.revision, self.revision, self.revision)

    def die(self, name: str) -> None:
        """Its session ends; who has it in an order claims at once, in order."""
        del self.members[name]
        for shard in self.led_by(name):
            del self.leaders[shard]
        fleet = self.fleet()
        for other in fleet.members:
            for shard, rank in duties.claims_after_end(name, self._orders(other), fleet, other).items():
                if rank == 0 and shard not in self.leaders:
                    self.lead(shard, other)

    def die_at_once(self, *names: str) -> None:
        """Several sessions end before anybody can claim."""
        for name in names:
            del self.members[name]
            for shard in self.led_by(name):
                del self.leaders[shard]
        fleet = self.fleet()
        for name in names:
            for other in fleet.members:
                for shard, rank in duties.claims_after_end(name, self._orders(other), fleet, other).items():
                    if rank == 0 and shard not in self.leaders:
                        self.lead(shard, other)

    def begin_stop(self, name: str) -> None:
        member = self.members[name]
        self.revision += 1
        self.members[name] = replace(
            member, record=replace(member.record, state="draining"), mod_revision=self.revision
        )

    def finish_stop(self, name: str) -> None:
        """Its successors want its shards, it hands them over, and leaves."""
        fleet = self.fleet()
        for other in fleet.members:
            for shard in duties.takeovers(name, self._orders(other), fleet, other):
                if shard in self.leaders and self.leaders[shard].worker == name:
                    self.lead(shard, other)
        del self.members[name]
        for shard in self.led_by(name):
            del self.leaders[shard]

    def stop(self, name: str) -> None:
        self.begin_stop(name)
        self.look()
        self.finish_stop(name)

    def _orders(self, name: str) -> dict[int, duties.Order]:
        return {
            shard: duties.Order(Assignment(copies[name].order, ""), copies[name].revision)
            for shard, copies in self.copies.items()
            if name in copies
        }

    def lead(self, shard: int, name: str) -> None:
        before = self.leaders.get(shard)
        self.revision += 1
        if shard in self.known:
            self.moved[shard] += 1
            self.previous[shard] = self._tenure[shard]
        self._tenure[shard] = PastLeader(name, self.revision, 0.0)
        assert before is None or before.worker != name
        self.known.add(shard)
        self.leaders[shard] = Led(name, self.revision)

    # --- the controller and the workers

    def look(self) -> Plan:
        """One round of the controller."""
        self.last = planned = plan(self.snapshot(), self.limits)
        for write in planned.writes:
            self.revision += 1
            copies = self.copies.setdefault(write.shard, {})
            assert write.leader_revision == (self.leaders[write.shard].revision if write.shard in self.leaders else 0)
            for name in write.puts:
                copies[name] = Copy(write.order, self.revision)
            for name in write.deletes:
                del copies[name]
        return planned

    def obey(self, most: int = ROUNDS_MAX) -> int:
        """Workers lead what their fresh first-rank records say, at most so many of them; how many did."""
        done = 0
        fleet = self.fleet()
        for name in sorted(self.members):
            held = self.led_by(name)
            for shard in duties.wanted(
                self._orders(name), name, self.members[name].create_revision, frozenset(held), fleet
            ):
                leader = self.leaders.get(shard)
                if done < most and (leader is None or leader.worker in self.members):
                    self.lead(shard, name)
                    done += 1
        return done

    def settle(self) -> int:
        """Look and obey until nothing changes; the number of rounds. Fails if that never comes."""
        for round_ in range(ROUNDS_MAX):
            planned = self.look()
            if not self.obey() and not planned.writes:
                return round_
        raise AssertionError(f"not quiet after {ROUNDS_MAX} rounds: {self.last}")
