"""What the controller wants: from a snapshot of facts and wishes to the assignments that should stand in the store.

It never waits, reads a clock or remembers: the same snapshot gives the same plan, and a plan that was carried out
gives an empty one, for ever. It plans from *facts* (who leads), not from its earlier wishes: a wish counts only as a
move under way, which is kept while it still helps.

Law, in order of precedence (design.md "Controller", protocol.md A.3):

1. A shard without a leader goes to the first eligible worker of its order, who is claiming it already; if its order
   has none, to the worker that lacks most. Only a cold start that still waits for its fleet holds this back.
2. A worker that stops hands its shards to the first eligible of their orders, by itself. The plan leaves those orders
   alone and steps in only where nobody in them is eligible.
3. A worker that an operator drains gives its shards to their first eligible successors, within the bounds.
4. A pinned shard goes to its worker, within the bounds, and stays.
5. Freeze, brake, unrest and a worker that is expected back hold back moves for evenness; those under way go on.
6. Evenness: every worker leads its share (`core.shares`); as few shards as possible move.

An order is (leader-to-be, successor, ...) and always contains the present leader, because only who stands in an order
together with a leader claims the shard when that one dies. Successors: `core.successors`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import heapify, heappop, heappush
from typing import Final

from shardlead.core.fleet import Fleet
from shardlead.core.model import SHARDS_PER_LEASE_MAX, PastLeader
from shardlead.core.shares import Claim, capacity_of, shares
from shardlead.core.successors import Home, Pool, orders_of

# --- what goes in ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Led:
    """The fact of a leadership: who, and the leader key's mod_revision. `worker` is "" if the session that the record
    names is not known to live."""

    worker: str
    revision: int


@dataclass(frozen=True, slots=True)
class Copy:
    """One stored copy of a shard's assignment, in one worker's inbox."""

    order: tuple[str, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cluster at one revision, and what the controller has observed of time.

    - `fleet`: members and operators' wishes; `leaders`: the facts; `copies`: the assignments as they stand, by shard
      and inbox.
    - `known`: the shards that have a history; `previous`: who led before the present leader, and under which epoch
      (missing: nobody known); `troubled`: shards whose last tenures were short, which move for evenness only if there
      is no other.
    - `still_for_s`: how long membership has not changed; `waited_s`: how long ago this controller first saw the cold
      start that the cluster is in, or was in last.
    - `return_in_s`: how much longer a worker that has stopped, and said so, is expected back (0: none is).
    - `departed`: workers that vanished lately without having said so; `shunned`: those that lately gave up shards
      they had got, one after the other: they get no more, nor succeed, while there are others.
    """

    fleet: Fleet
    shards: int
    leaders: Mapping[int, Led] = field(default_factory=dict)
    copies: Mapping[int, Mapping[str, Copy]] = field(default_factory=dict)
    known: frozenset[int] = frozenset()
    previous: Mapping[int, PastLeader] = field(default_factory=dict)
    still_for_s: float = 1e9
    waited_s: float = 1e9
    return_in_s: float = 0.0
    departed: frozenset[str] = frozenset()
    shunned: frozenset[str] = frozenset()
    troubled: frozenset[int] = frozenset()

    @property
    def is_cold(self) -> bool:
        """Whether most shards have no leader: a first start, or one after everything had stopped."""
        return 2 * sum(bool(led.worker) for led in self.leaders.values()) < self.shards


@dataclass(frozen=True, slots=True)
class Limits:
    """How much at once, and how patient: the controller's settings."""

    moves_in_flight_max: int = 16
    moves_per_worker_max: int = 4
    settle_s: float = 1.0
    first_wait_max_s: float = 5.0
    brake_share: float = 0.5
    successors: int = 2
    shards_per_worker_max: int = SHARDS_PER_LEASE_MAX

    def stillness_s(self, waited_s: float) -> float:
        """How long membership must be still before shards move for evenness: twice as long right after a cold start,
        when workers still come one by one and a shard could move with each."""
        return 2 * self.settle_s if waited_s < self.first_wait_max_s else self.settle_s


# --- what comes out --------------------------------------------------------------------------------------------


class Reason(StrEnum):
    """Why an assignment is written; in order of precedence, which is the order of writing."""

    NO_LEADER = "no leader"
    SHUTDOWN = "shutdown"
    DRAIN = "drain"
    PIN = "pin"
    FACT = "fact"  # the shard is led by another worker than the assignment said
    EVENNESS = "evenness"
    SUCCESSORS = "successors"
    TIDY = "tidy"  # a copy is missing, is too old to count, or stands where it should not


class Hold(StrEnum):
    """Why something that is wanted is not done now."""

    COLD_START = "a cold start waits for its fleet"
    NO_WORKER = "no worker may take it"
    PIN_WAITS = "the worker it is pinned to may not take it"
    FREEZE = "frozen"
    BRAKE = "too much of the fleet has vanished"
    UNREST = "membership has just changed"
    RETURN = "a worker that has stopped is expected back"
    BOUNDS = "enough moves are under way"


@dataclass(frozen=True, slots=True)
class Move:
    """A shard that is to change its leader; `source` is "" for one without. `is_new`: this plan begins it."""

    shard: int
    source: str
    target: str
    reason: Reason
    is_new: bool


@dataclass(frozen=True, slots=True)
class Write:
    """An assignment to write: `order` into the inboxes `puts`, its copies out of the inboxes `deletes`.

    `leader_revision` is the mod_revision of the leader key that this was planned from (0: no key); the write is
    guarded by it.
    """

    shard: int
    order: tuple[str, ...]
    reason: Reason
    puts: tuple[str, ...]
    deletes: tuple[str, ...]
    leader_revision: int


@dataclass(frozen=True, slots=True)
class Held:
    """Something that is not done now: why, how many shards it is about, and one of them (-1: none in particular)."""

    hold: Hold
    count: int
    shard: int = -1


@dataclass(frozen=True, slots=True)
class Plan:
    """What to write, in this order; the moves this amounts to, those under way included; what is held back and why;
    and how many shards each worker should lead in the end."""

    writes: tuple[Write, ...] = ()
    moves: tuple[Move, ...] = ()
    held: tuple[Held, ...] = ()
    shares: Mapping[str, int] = field(default_factory=dict)

    @property
    def in_flight(self) -> int:
        """The moves that the bounds count: not those of shards without leader, nor of workers that stop."""
        return sum(move.reason in _BOUNDED for move in self.moves)


_BOUNDED: Final = frozenset((Reason.DRAIN, Reason.PIN, Reason.EVENNESS))
_PRIORITY: Final = {reason: number for number, reason in enumerate(Reason)}


# --- the plan --------------------------------------------------------------------------------------------------


def plan(snapshot: Snapshot, limits: Limits) -> Plan:
    """The plan for this snapshot. Its cost follows the number of shards, plus that of workers squared."""
    return _Planning(snapshot, limits).run()


class _Planning:
    """One planning. `home` says where each shard is to be led once this plan has been carried out ("": undecided)."""

    def __init__(self, snapshot: Snapshot, limits: Limits) -> None:
        self.snapshot = snapshot
        self.limits = limits
        self.fleet = fleet = snapshot.fleet
        self.up = tuple(name for name in sorted(fleet.members) if fleet.is_up(name))
        eligible = fleet.eligible(self.up)
        # `open` may get a shard that has no leader or whose leader goes, and succeed; `takers` may get one by a move
        self.open = tuple(name for name in eligible if name not in snapshot.shunned) or eligible
        self.takers = frozenset(self.up) - fleet.cordoned - fleet.drained - snapshot.shunned
        self.leader = [self._living_leader(shard) for shard in range(snapshot.shards)]
        self.order = [self._stored_order(shard) for shard in range(snapshot.shards)]
        self.home = [""] * snapshot.shards
        self.counts = dict.fromkeys(fleet.members, 0)  # of homes
        self.untouched: set[int] = set()  # shards whose orders stay as they stand
        self.moves: dict[int, Move] = {}
        self.held: dict[Hold, list[int]] = {}
        self.flights = 0
        self.flights_of = dict.fromkeys(fleet.members, 0)
        self.is_patient = snapshot.still_for_s < limits.settle_s and snapshot.waited_s < limits.first_wait_max_s
        self.is_cold = snapshot.is_cold

    def run(self) -> Plan:
        if not self.up:
            return Plan()
        homeless = self.look()
        under_way = self.settle_moves()
        wanted = self.wanted_shares(under_way)
        self.place(homeless, wanted)
        self.review(under_way, wanted)
        self.even(wanted)
        return Plan(
            writes=self.compare(self.orders()),
            moves=tuple(sorted(self.moves.values(), key=lambda move: (_PRIORITY[move.reason], move.shard))),
            held=tuple(Held(hold, len(found), found[0]) for hold in Hold if (found := self.held.get(hold))),
            shares=wanted,
        )

    # --- facts

    def _living_leader(self, shard: int) -> str:
        led = self.snapshot.leaders.get(shard)
        return led.worker if led is not None and led.worker in self.fleet.members else ""

    def _stored_order(self, shard: int) -> tuple[str, ...]:
        """The order of the latest copy. Copies of a shard are written together and differ only by accident."""
        copies = self.snapshot.copies.get(shard)
        return max(copies.values(), key=lambda copy: copy.revision).order if copies else ()

    def _is_fresh(self, shard: int, name: str) -> bool:
        """Whether `name` has a copy that was written after its session began; an older one counts as absent."""
        copy = self.snapshot.copies.get(shard, {}).get(name)
        return copy is not None and copy.revision > self.fleet.members[name].create_revision

    # --- what is decided

    def _go(self, shard: int, home: str) -> None:
        self.home[shard] = home
        self.counts[home] += 1

    def _stay(self, shard: int, hold: Hold) -> None:
        self.held.setdefault(hold, []).append(shard)

    def _move(self, shard: int, target: str, reason: Reason, *, is_new: bool) -> None:
        source = self.leader[shard]
        self.moves[shard] = Move(shard, source, target, reason, is_new)
        if reason in _BOUNDED:
            self._fly(source, target, 1)

    def _fly(self, source: str, target: str, change: int) -> None:
        self.flights += change
        self.flights_of[source] += change
        self.flights_of[target] += change

    def _may_fly(self, source: str, target: str) -> bool:
        most = self.limits.moves_per_worker_max
        return (
            self.flights < self.limits.moves_in_flight_max
            and self.flights_of[source] < most
            and self.flights_of[target] < most
        )

    # --- step 1: shards without leader, and with a leader that stops

    def look(self) -> list[int]:
        """Homes for shards whose leader is missing or stops, where their orders say who is next; the others."""
        homeless: list[int] = []
        open_set = frozenset(self.open)
        for shard, leader in enumerate(self.leader):
            order = self.order[shard]
            if not leader:
                heir = next((name for name in order if name in open_set), "")
                if heir:
                    is_new = heir not in self.snapshot.copies.get(shard, {})
                    self._move(shard, heir, Reason.NO_LEADER, is_new=is_new)
                    self._go(shard, heir)
                    if self.is_cold and self.is_patient:
                        self.untouched.add(shard)
                        self._stay(shard, Hold.COLD_START)
                    elif self.snapshot.still_for_s < self.limits.settle_s and not is_new:
                        self.untouched.add(shard)  # it is being claimed this moment; no write helps that
                else:
                    homeless.append(shard)
            elif self.fleet.members[leader].record.state != "up":
                heir = next((name for name in order if name in open_set), "")
                copy = self.snapshot.copies.get(shard, {}).get(heir)
                if copy is not None and copy.order == order and leader in order:
                    self._move(shard, heir, Reason.SHUTDOWN, is_new=False)
                    self._go(shard, heir)
                    self.untouched.add(shard)
                else:
                    homeless.append(shard)
        return homeless

    # --- step 2: operators' drains and pins

    def settle_moves(self) -> list[int]:
        """Homes for all shards whose leader goes on living: drains and pins as the bounds allow, the others where
        they are. Returns the shards that an earlier plan began to move for evenness."""
        under_way: list[int] = []
        waiting: list[tuple[Reason, int, str]] = []
        for shard, leader in enumerate(self.leader):
            if not leader or self.fleet.members[leader].record.state != "up":
                continue
            target = self._target_under_way(shard)
            want, reason = self._called_for(shard, target)
            if want == leader:
                if target and self.fleet.pins.get(shard) != leader:
                    under_way.append(shard)
                    self._fly(leader, target, 1)
                self._go(shard, leader)
            elif want and want == target:
                self._move(shard, want, reason, is_new=False)
                self._go(shard, want)
            else:
                waiting.append((reason, shard, want))
        waiting.sort(key=lambda item: (_PRIORITY[item[0]], item[1]))
        fair = self._fair_shares() if waiting else {}
        for reason, shard, want in waiting:
            leader = self.leader[shard]
            target = want or self._heir_of_drained(shard, fair)
            if not target:
                self._stay(shard, Hold.NO_WORKER)
                self._go(shard, leader)
            elif not self._may_fly(leader, target):
                self._stay(shard, Hold.BOUNDS)
                self._go(shard, leader)
            else:
                self._move(shard, target, reason, is_new=True)
                self._go(shard, target)
        return under_way

    def _target_under_way(self, shard: int) -> str:
        """Where an earlier plan sends this led shard, if that still can be."""
        order = self.order[shard]
        if order and order[0] != self.leader[shard] and order[0] in self.takers and self._is_fresh(shard, order[0]):
            return order[0]
        return ""

    def _called_for(self, shard: int, target: str) -> tuple[str, Reason]:
        """Where drain and pin call a led shard ("": anywhere else); its leader if they do not call."""
        leader = self.leader[shard]
        pin = self.fleet.pins.get(shard, "")
        if pin and pin not in self.takers and (pin != leader or leader in self.fleet.drained):
            self._stay(shard, Hold.PIN_WAITS)
            pin = ""
        if leader in self.fleet.drained:
            return pin or target, Reason.DRAIN
        return pin or leader, Reason.PIN

    def _heir_of_drained(self, shard: int, fair: Mapping[str, int]) -> str:
        """Its first successor; if that one has its share already, the next that has not, so that none moves twice."""
        heirs = [name for name in self.order[shard] if name in self.takers]
        hungry = (name for name in heirs if self.counts[name] < fair[name])
        return next(
            hungry, heirs[0] if heirs else max(fair, key=lambda name: fair[name] - self.counts[name], default="")
        )

    def _fair_shares(self) -> dict[str, int]:
        """The shares of those who may get shards by a move, as if nobody else had any."""
        members = self.fleet.members
        claims = [
            Claim(name, capacity_of(members[name].record.capacity), self.counts[name], 0, self.snapshot.shards)
            for name in sorted(self.takers)
        ]
        return shares(self.snapshot.shards, claims)

    # --- step 3: shares, and homes for those without

    def wanted_shares(self, under_way: list[int]) -> dict[str, int]:
        """How many shards each worker should lead in the end."""
        pinned = dict.fromkeys(self.fleet.members, 0)
        for shard, name in self.fleet.pins.items():
            if name in pinned and 0 <= shard < self.snapshot.shards and self.home[shard] == name:
                pinned[name] += 1
        have = dict(self.counts)  # as it will be after the moves under way: who has its rest of a division keeps it
        for shard in under_way:
            have[self.leader[shard]] -= 1
            have[self.order[shard][0]] += 1
        claims: list[Claim] = []
        givers = frozenset(self.up) - self.fleet.drained
        for name, member in self.fleet.members.items():
            count = self.counts[name]
            if name in self.takers or (not self.takers and name in self.open):
                low, high = pinned[name], max(self.limits.shards_per_worker_max, pinned[name])
            elif name in givers:  # cordoned or shunned: it may give, and never gets
                low, high = pinned[name], count
            else:
                low = high = count
            claims.append(Claim(name, capacity_of(member.record.capacity), have[name], low, high))
        return shares(self.snapshot.shards, claims)

    def place(self, homeless: list[int], wanted: Mapping[str, int]) -> None:
        """Homes for shards in whose orders nobody is eligible: where most is lacking."""
        heap = [(self.counts[name] - wanted[name], name) for name in self.open]
        heapify(heap)
        most = self.limits.shards_per_worker_max
        for shard in homeless:
            leader = self.leader[shard]
            if not leader and self.is_patient and (self.is_cold or shard not in self.snapshot.known):
                self._stay(shard, Hold.COLD_START)
                continue
            while heap and self.counts[heap[0][1]] >= most:
                heappop(heap)
            if not heap:
                self._stay(shard, Hold.NO_WORKER)
                continue
            pin = self.fleet.pins.get(shard, "")
            if pin in self.takers and self.counts[pin] < most:
                target = pin  # its entry in the heap is one too low from now on, which only makes it look emptier
            else:
                lack, target = heappop(heap)
                heappush(heap, (lack + 1, target))
            self._move(shard, target, Reason.SHUTDOWN if leader else Reason.NO_LEADER, is_new=True)
            self._go(shard, target)

    # --- step 4: evenness

    def review(self, under_way: list[int], wanted: Mapping[str, int]) -> None:
        """Keep the moves for evenness that are under way, but for those that would take a worker past its share."""
        for shard in under_way:
            self._rehome(shard, self.order[shard][0])
        for shard in reversed(under_way):
            source, target = self.leader[shard], self.order[shard][0]
            if self.counts[target] > wanted[target] or self.counts[source] < wanted[source]:
                self._rehome(shard, source)
                self._fly(source, target, -1)
            else:
                self.moves[shard] = Move(shard, source, target, Reason.EVENNESS, is_new=False)

    def _rehome(self, shard: int, home: str) -> None:
        self.counts[self.home[shard]] -= 1
        self._go(shard, home)

    def even(self, wanted: Mapping[str, int]) -> None:
        """Begin moves for evenness, from who has most too many to who lacks most, as holds and bounds allow."""
        sources = [(wanted[name] - self.counts[name], name) for name in self.up if self.counts[name] > wanted[name]]
        targets = [(self.counts[name] - wanted[name], name) for name in self.takers if self.counts[name] < wanted[name]]
        missing = min(-sum(lack for lack, _ in sources), -sum(lack for lack, _ in targets))
        if not missing:
            return
        hold = self._evenness_hold()
        if hold is not None:
            self.held[hold] = [-1] * missing
            return
        movable = _Movable(self, frozenset(name for _, name in sources))
        heapify(sources)
        heapify(targets)
        most = self.limits.moves_per_worker_max
        while sources and targets and self.flights < self.limits.moves_in_flight_max:
            excess, source = heappop(sources)
            if self.flights_of[source] >= most:
                continue
            lack, target = heappop(targets)
            if self.flights_of[target] >= most:
                heappush(sources, (excess, source))
                continue
            shard = movable.take(source, target)
            if shard is None:
                heappush(targets, (lack, target))
                continue
            self._move(shard, target, Reason.EVENNESS, is_new=True)
            self._rehome(shard, target)
            missing -= 1
            if excess + 1 < 0:
                heappush(sources, (excess + 1, source))
            if lack + 1 < 0:
                heappush(targets, (lack + 1, target))
        if missing:
            self.held.setdefault(Hold.BOUNDS, []).extend([-1] * missing)

    def _evenness_hold(self) -> Hold | None:
        if self.fleet.is_frozen:
            return Hold.FREEZE
        gone = len(self.snapshot.departed - self.fleet.members.keys())
        if gone > self.limits.brake_share * (gone + len(self.fleet.members)):
            return Hold.BRAKE
        if self.snapshot.still_for_s < self.limits.stillness_s(self.snapshot.waited_s):
            return Hold.UNREST
        return Hold.RETURN if self.snapshot.return_in_s > 0 else None

    # --- step 5: what should stand, against what does

    def orders(self) -> dict[int, tuple[str, ...]]:
        """The order that should stand for each shard that has a home, unless its order is to be left alone."""
        homes = [
            Home(shard, home, self.leader[shard], self.order[shard])
            for shard, home in enumerate(self.home)
            if home and shard not in self.untouched
        ]
        pool = Pool(self.fleet, self.open, self.counts)
        return orders_of(homes, pool, self.limits.successors)

    def compare(self, orders: Mapping[int, tuple[str, ...]]) -> tuple[Write, ...]:
        """The writes that make the stored copies so, most urgent first."""
        writes: list[Write] = []
        for shard, order in orders.items():
            copies = self.snapshot.copies.get(shard, {})
            puts = [name for name in order if name not in copies or copies[name].order != order]
            target = order[0]
            if target != self.leader[shard] and target not in puts and not self._is_fresh(shard, target):
                puts.append(target)
            deletes = [name for name in copies if name not in order]
            if puts or deletes:
                led = self.snapshot.leaders.get(shard)
                revision = 0 if led is None else led.revision
                reason = self._reason(shard, order)
                writes.append(Write(shard, order, reason, tuple(puts), tuple(sorted(deletes)), revision))
        writes.sort(key=lambda write: (_PRIORITY[write.reason], write.shard))
        return tuple(writes)

    def _reason(self, shard: int, order: tuple[str, ...]) -> Reason:
        if shard in self.moves:
            return self.moves[shard].reason
        stored = self.order[shard]
        if stored == order:
            return Reason.TIDY
        return Reason.SUCCESSORS if stored[:1] == order[:1] else Reason.FACT


class _Movable:
    """The shards that may leave each source for evenness, in the order in which they had best.

    First come those that the target led before: a worker that comes back gets its own again, rather than others that
    will move once more when their turn to restart comes. Then those whose last move is longest ago. So a shard moves
    at most twice in a rolling restart. Troubled ones come last.
    """

    def __init__(self, planning: _Planning, sources: frozenset[str]) -> None:
        self._home = planning.home
        self._shards: dict[str, list[int]] = {name: [] for name in sources}
        previous, pins = planning.snapshot.previous, planning.snapshot.fleet.pins
        troubled = planning.snapshot.troubled
        for shard, home in enumerate(planning.home):
            if home in self._shards and planning.leader[shard] == home and pins.get(shard) != home:
                self._shards[home].append(shard)
        self._returning: dict[tuple[str, str], list[int]] = {}
        for name, shards_ in self._shards.items():
            shards_.sort(
                key=lambda shard: (shard not in troubled, -previous[shard].epoch if shard in previous else 0, -shard)
            )
            for shard in shards_:
                if shard in previous and shard not in troubled:
                    self._returning.setdefault((name, previous[shard].worker), []).append(shard)

    def take(self, source: str, target: str) -> int | None:
        """The next shard to go from source to target; None if the source has none left that may go."""
        for found in (self._returning.get((source, target), []), self._shards[source]):
            while found:
                shard = found.pop()
                if self._home[shard] == source:
                    return shard
        return None
