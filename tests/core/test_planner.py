"""The planner's promises: even, with the fewest moves, still when nothing changes, ready for any death.

The stories (test_planner_stories.py) tell single cases; here stand the properties and the figures.
"""

import random
from collections import Counter
from dataclasses import dataclass, replace
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardlead.core.planner import Copy, Hold, Limits, Reason, plan
from shardlead.core.shares import Claim, level_of, shares
from tests.core.world import QUIET_S, World

UNBOUNDED = Limits(moves_in_flight_max=10_000, moves_per_worker_max=10_000)


def fleet(count: int, shards: int, limits: Limits | None = None, *, zones: str = "") -> World:
    world = World(shards, limits)
    for number in range(count):
        world.join(f"w{number:03}", zone=zones[number % len(zones)] if zones else "")
    world.settle()
    world.moved.clear()
    return world


def spread(counts: dict[str, int]) -> int:
    return max(counts.values()) - min(counts.values())


# --- evenness --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(workers=st.integers(1, 12), shards=st.integers(1, 120))
def test_equal_workers_lead_equally(workers: int, shards: int) -> None:
    """With equal capacities counts differ by at most one, and a first start moves nothing twice."""
    world = fleet(workers, shards)

    assert spread(world.counts()) <= 1
    assert not world.moved


@settings(max_examples=40, deadline=None)
@given(before=st.integers(1, 12), joining=st.integers(1, 4), shards=st.integers(1, 150))
def test_growth_moves_exactly_what_newcomers_lack(before: int, joining: int, shards: int) -> None:
    """Each newcomer gets floor or ceil of a fair share, nobody else gets anything, no shard moves twice."""
    world = fleet(before, shards)
    newcomers = {f"x{number}" for number in range(joining)}
    for name in newcomers:
        world.join(name)
    world.settle()

    assert sum(world.moved.values()) == sum(world.counts()[name] for name in newcomers)
    assert spread(world.counts()) <= 1
    assert max(world.moved.values(), default=0) <= 1


def test_from_10_to_11_workers_with_1024_shards_exactly_93_move() -> None:
    """The figure that the design promises, within the default bounds."""
    world = fleet(10, 1_024)
    world.join("x")
    world.settle()

    assert sum(world.moved.values()) == 93
    assert world.counts()["x"] == 93


@settings(max_examples=60, deadline=None)
@given(capacities=st.lists(st.sampled_from((0.5, 1.0, 2.0, 3.0)), min_size=1, max_size=8), shards=st.integers(1, 120))
def test_shares_follow_capacity(capacities: list[float], shards: int) -> None:
    """Every count is floor or ceil of the exact share."""
    world = World(shards)
    for number, capacity in enumerate(capacities):
        world.join(f"w{number}", capacity=capacity)
    world.settle()

    for number, capacity in enumerate(capacities):
        exact = shards * capacity / sum(capacities)
        assert abs(world.counts()[f"w{number}"] - exact) < 1


@given(
    total=st.integers(0, 1_000),
    claims=st.lists(
        st.tuples(st.floats(1e-6, 100), st.integers(0, 200), st.integers(0, 50), st.integers(50, 300)),
        min_size=1,
        max_size=12,
    ),
)
def test_shares_keep_their_bounds_and_add_up(total: int, claims: list[tuple[float, int, int, int]]) -> None:
    """Whole numbers within low and high, and together the total wherever the bounds allow it."""
    given_claims = [
        Claim(f"w{index}", capacity, have, low, high) for index, (capacity, have, low, high) in enumerate(claims)
    ]
    result = shares(total, given_claims)

    low, high = sum(claim.low for claim in given_claims), sum(claim.high for claim in given_claims)
    assert all(claim.low <= result[claim.name] <= claim.high for claim in given_claims)
    assert sum(result.values()) == min(max(total, low), high)


def test_water_finds_its_level() -> None:
    """Vessels above the level take none; the others fill up to it, by width."""
    assert level_of(6, [(0, 1), (2, 1), (10, 1)]) == 4
    assert level_of(6, [(0, 2), (0, 1)]) == 2
    assert level_of(0, [(3, 1)]) == 3
    assert level_of(30, [(0, 1), (2, 1), (10, 1)]) == 14


def test_nonsense_in_a_record_is_survived() -> None:
    """Capacities that are no numbers, and names that nobody knows, never stop the planner."""
    world = World(12, Limits(successors=3))
    world.join("a")
    world.join("b", capacity=float("nan"))
    world.join("c", capacity=-3.0)
    world.join("d", capacity=float("inf"))
    world.copies[3] = {"zed": Copy(("zed", "a", "zed", ""), 5)}
    world.copies[900] = {"a": Copy(("a",), 5)}
    world.copies[6] = {"a": Copy(("a", "b", "b", "b"), 5)}
    world.copies[4] = {"a": Copy((), 5)}
    world.pins = {900: "a", 5: ""}
    world.settle()

    assert world.counts() == {"a": 12, "b": 0, "c": 0, "d": 0}
    assert all(sorted(world.order(shard)) == ["a", "b", "c", "d"] for shard in range(12))
    assert set(world.copies[3]) == set(world.order(3))


def test_no_more_than_one_lease_can_carry_is_placed_on_a_worker() -> None:
    """What has no room waits and says so."""
    world = World(20, Limits(shards_per_worker_max=6))
    for name in "abc":
        world.join(name)
    world.settle()

    assert world.counts() == {"a": 6, "b": 6, "c": 6}
    assert [(held.hold, held.count) for held in world.last.held] == [(Hold.NO_WORKER, 2)]


# --- stillness -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    what: str
    number: int
    shard: int


STEPS = st.builds(
    Step,
    st.sampled_from(
        ("join", "join", "die", "die", "stop", "cordon", "drain", "release", "pin", "unpin", "freeze", "thaw", "partly")
    ),
    st.integers(0, 6),
    st.integers(0, 39),
)


def take(world: World, step: Step) -> None:
    name = f"w{step.number}"
    match step.what:
        case "join" if name not in world.members:
            world.join(name, zone="xyz"[step.number % 3], capacity=(1.0, 2.0)[step.number == 5])
        case "die" if name in world.members:
            world.die(name)
        case "stop" if name in world.members:
            world.stop(name)
        case "cordon":
            world.cordoned.add(name)
        case "drain":
            world.drained.add(name)
        case "release":
            world.cordoned.discard(name)
            world.drained.discard(name)
        case "pin":
            world.pins[step.shard] = name
        case "unpin":
            world.pins.pop(step.shard, None)
        case "freeze":
            world.is_frozen = True
        case "thaw":
            world.is_frozen = False
        case "partly":
            world.look()
            world.obey(most=3)
        case _:
            pass


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=25), st.integers(0, 3))
def test_whatever_happens_plans_come_to_rest_and_stay_there(steps: list[Step], successors: int) -> None:
    """After any life, half-done moves included: plans converge, then nothing is written or moved, for ever; every
    shard is led by a worker that may lead it, in reach of a successor, and the counts are what was planned."""
    world = World(40, Limits(successors=successors))
    world.join("w0")
    world.settle()
    for step in steps:
        take(world, step)
    world.settle()

    for _ in range(3):
        planned = world.look()
        assert planned.writes == ()
        assert not [move for move in planned.moves if move.is_new]
    if not world.members:
        return
    assert set(world.leaders) == set(range(40))
    takers = set(world.members) - world.cordoned - world.drained
    for shard in range(40):
        order = world.order(shard)
        assert order[0] == world.leaders[shard].worker
        assert set(order) <= set(world.members)
        assert len(set(order)) == len(order)
        assert len(order) == min(1 + successors, 1 + len(set(takers or world.members) - {order[0]})) or len(takers) <= 1
        assert {name: copy.order for name, copy in world.copies[shard].items()} == dict.fromkeys(order, order)
        pin = world.pins.get(shard)
        if pin in takers and order[0] not in world.drained:
            assert order[0] == pin
    if takers:
        assert not {fact.worker for fact in world.leaders.values()} & world.drained
    if takers and not world.is_frozen:
        assert {name: count for name, count in world.counts().items() if name in takers} == {
            name: count for name, count in world.last.shares.items() if name in takers
        }
    if takers and takers == set(world.members) and not world.is_frozen and not world.pins and "w5" not in takers:
        assert spread(world.counts()) <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=12), st.randoms(use_true_random=False))
def test_a_plan_depends_on_nothing_but_its_snapshot(steps: list[Step], rng: random.Random) -> None:
    """The order in which records are listed changes nothing: two controllers make one plan."""
    world = World(40)
    world.join("w0")
    for step in steps:
        take(world, step)
    snapshot = world.snapshot()
    members = list(snapshot.fleet.members.items())
    leaders = list(snapshot.leaders.items())
    rng.shuffle(members)
    rng.shuffle(leaders)
    shuffled = replace(snapshot, fleet=replace(snapshot.fleet, members=dict(members)), leaders=dict(leaders))

    assert plan(snapshot, world.limits) == plan(shuffled, world.limits)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=15))
def test_moves_never_exceed_the_bounds(steps: list[Step]) -> None:
    """In all and per worker, at every look, whatever is under way."""
    world = World(40, Limits(moves_in_flight_max=5, moves_per_worker_max=2))
    for number in range(4):
        world.join(f"w{number}")
    world.settle()
    for step in steps:
        take(world, step)
        planned = world.look()
        bounded = [move for move in planned.moves if move.reason in (Reason.DRAIN, Reason.PIN, Reason.EVENNESS)]
        begun = [move for move in bounded if move.is_new]
        ends = Counter(name for move in bounded for name in (move.source, move.target))
        assert planned.in_flight == len(bounded)
        if begun:
            assert len(bounded) <= 5
            assert all(ends[name] <= 2 for move in begun for name in (move.source, move.target))
        world.obey(most=1)


# --- successors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "shards"), [(2, 30), (3, 64), (5, 256), (10, 1_024), (30, 1_000), (11, 97)])
@pytest.mark.parametrize("zones", ["", "xyz"])
def test_after_any_single_death_the_counts_are_even_within_two(workers: int, shards: int, zones: str) -> None:
    """From a level fleet, whoever dies: its successors claim, and the rest is level within two. With zones, too."""
    world = fleet(workers, shards, zones=zones)
    for name in world.members:
        after = world.counts_after_death(name)
        assert "" not in after
        assert spread(after) <= 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(("join", "die", "stop")), st.sampled_from((0, 1, 2, 3, 6))), max_size=12))
def test_successors_are_level_after_any_changes_too(changes: list[tuple[str, int]]) -> None:
    """Joins, deaths and stops later the promise still holds."""
    world = fleet(4, 60, UNBOUNDED)
    for what, number in changes:
        if what == "join" or len(world.members) > 2:
            take(world, Step(what, number, 0))
        world.settle()
        for name in world.members:
            assert spread(world.counts_after_death(name)) <= 2


def test_successors_stay_where_they_are() -> None:
    """One death in ten touches the orders in which the dead stood, and few others."""
    world = fleet(10, 1_000)
    before = {shard: world.order(shard) for shard in range(1_000)}
    world.die("w003")
    world.settle()

    untouched = [shard for shard, order in before.items() if "w003" not in order]
    changed = [shard for shard in untouched if world.order(shard) != before[shard]]
    assert len(changed) <= len(untouched) // 10


def test_every_shard_has_a_successor_in_another_zone_while_there_is_one() -> None:
    """Over three zones, and still when one of them is lost as a whole."""
    world = fleet(9, 180, zones="xyz")
    for _ in range(2):
        zone = {name: member.record.zone for name, member in world.members.items()}
        for shard in range(180):
            first, *others = world.order(shard)
            assert any(zone[other] != zone[first] for other in others)
        for name in [name for name in world.members if zone[name] == "x"]:
            world.die(name)
        world.settle()
    assert set(world.leaders) == set(range(180))


def test_a_whole_zone_may_die_at_once() -> None:
    """Successors in other zones claim everything, without the controller."""
    world = fleet(9, 180, zones="xyz")
    world.die_at_once(*(name for name, member in world.members.items() if member.record.zone == "y"))

    assert set(world.leaders) == set(range(180))


# --- restarts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "shards"), [(3, 256), (5, 256), (10, 1_024)])
def test_a_rolling_restart_moves_a_shard_little(workers: int, shards: int) -> None:
    """Restarts that follow each other within the settling time: 1 + 2/N moves a shard on average, at most two."""
    world = fleet(workers, shards, UNBOUNDED)
    world.still_for_s = 0.0
    for name in sorted(world.members):
        world.stop(name)
        world.settle()
        world.join(name)
        world.settle()
    world.still_for_s = QUIET_S
    world.settle()

    assert sum(world.moved.values()) / shards <= 1 + 2 / workers + 0.02
    assert max(world.moved.values()) <= 2
    assert spread(world.counts()) <= 1


@pytest.mark.parametrize(("workers", "shards"), [(3, 256), (10, 1_024)])
def test_a_slow_rolling_restart_moves_a_shard_twice(workers: int, shards: int) -> None:
    """With evenness restored after each restart a shard moves away and back: twice on average."""
    world = fleet(workers, shards, UNBOUNDED)
    for name in sorted(world.members):
        world.stop(name)
        world.settle()
        world.join(name)
        world.settle()

    assert sum(world.moved.values()) / shards <= 2.05
    assert spread(world.counts()) <= 1


# --- cost ------------------------------------------------------------------------------------------------------


def test_a_large_cluster_is_planned_fast() -> None:
    """10,000 shards on 100 workers: about 0.1 s from nothing and 0.06 s at rest; the bound is for busy machines."""
    world = World(10_000, UNBOUNDED)
    for number in range(100):
        world.join(f"w{number:03}", zone="xyz"[number % 3])
    snapshot = world.snapshot()
    begin = perf_counter()
    plan(snapshot, world.limits)
    first_s = perf_counter() - begin
    world.settle()
    snapshot = world.snapshot()
    begin = perf_counter()
    planned = plan(snapshot, world.limits)

    assert planned.writes == ()
    assert max(first_s, perf_counter() - begin) < 1.0
