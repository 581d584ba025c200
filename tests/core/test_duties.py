"""Whose turn it is, told on small fleets."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlead.core import duties
from shardlead.core.duties import Order
from shardlead.core.fleet import Fleet
from shardlead.core.model import Assignment, History, WorkerRecord
from shardlead.core.shardmap import Member


def member(state: str = "up") -> Member:
    record = WorkerRecord(sid="s", address="a:1", state="up" if state == "up" else "draining")
    return Member(record, 1, 1, 1)


def fleet(*up: str, leaving: Iterable[str] = (), cordoned: Iterable[str] = (), drained: Iterable[str] = ()) -> Fleet:
    members = {name: member() for name in up} | {name: member("draining") for name in leaving}
    return Fleet(members=members, cordoned=frozenset(cordoned), drained=frozenset(drained))


def order(*names: str, revision: int = 50) -> Order:
    return Order(Assignment(order=names, reason="test"), revision)


ORDERS = {7: order("a", "b", "c"), 8: order("b", "a", "c"), 9: order("c", "b", "d"), 10: order("d", "e", "f")}


def test_the_first_living_successor_claims_at_once_and_the_next_waits() -> None:
    """a is dead: of shard 7 b is the first, c the second; of 8 b leads already and would lose, c is second."""
    living = fleet("b", "c", "d")
    assert duties.claims_after_end("a", ORDERS, living, "b") == {7: 0, 8: 0}
    assert duties.claims_after_end("a", ORDERS, living, "c") == {7: 1, 8: 1}
    assert duties.claims_after_end("a", ORDERS, living, "d") == {}


def test_two_deaths_at_once_leave_the_third_in_order() -> None:
    """a and b are dead: c is first for both of their shards."""
    assert duties.claims_after_end("b", ORDERS, fleet("c", "d"), "c") == {7: 0, 8: 0, 9: 0}


def test_a_name_that_lives_again_does_not_count_for_its_dead_session() -> None:
    """a's session ended and a lives with a new one: b is still first."""
    assert duties.claims_after_end("a", ORDERS, fleet("a", "b", "c"), "b") == {7: 0, 8: 0}
    assert duties.claims_after_end("a", ORDERS, fleet("a", "b", "c"), "a") == {}


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (fleet("a", "b", "c"), ("a", "b", "c")),
        (fleet("a", "b", cordoned=["a"]), ("b",)),
        (fleet("a", "b", cordoned=["a", "b"]), ("a", "b")),
        (fleet("a", "b", "c", cordoned=["a"], drained=["b", "c"]), ("a",)),
        (fleet("a", "b", drained=["a", "b"]), ("a", "b")),
        (fleet("b", leaving=["a"]), ("b",)),
        (fleet(leaving=["a", "b"]), ()),
    ],
)
def test_who_is_eligible(there: Fleet, expected: tuple[str, ...]) -> None:
    """Living and up; cordoned ones only if nobody else is there, drained ones after those, stopping ones never."""
    assert there.eligible(["a", "b", "c"]) == expected


def test_an_order_that_is_read_after_the_end_it_was_made_for_counts_as_if_the_end_came_now() -> None:
    """a is dead, and the order that names it comes only now; one that is newer than the fleet we know says nothing:
    its a may be somebody who has only just come."""
    living = fleet("b", "c", "d")
    assert duties.claims_after_news({7: order("a", "b", "c", revision=50)}, living, 50, "b") == {7: 0}
    assert duties.claims_after_news({7: order("a", "b", "c", revision=50)}, living, 50, "c") == {7: 1}
    assert duties.claims_after_news({7: order("a", "b", "c", revision=51)}, living, 50, "b") == {}
    assert duties.claims_after_news({7: order("b", "c", "d", revision=50)}, living, 50, "c") == {}


def test_a_stopping_workers_shards_are_wanted_by_its_first_successors() -> None:
    """Exactly one worker wants each."""
    there = fleet("b", "c", "d", leaving=["a"])
    assert {name: duties.takeovers("a", ORDERS, there, name) for name in ("b", "c", "d")} == {
        "b": (7, 8),
        "c": (),
        "d": (),
    }


def test_an_assignment_older_than_the_session_claws_nothing_back() -> None:
    """It serves for claims of leaderless shards only; a newer one is a wish to act upon."""
    orders = {7: order("a", "b", revision=50), 8: order("a", "b", revision=99), 9: order("b", "a", revision=99)}
    there = fleet("a", "b")
    assert duties.own_orders(orders, "a") == (7, 8)
    assert duties.wanted(orders, "a", 60, set(), there) == (8,)
    assert duties.wanted(orders, "a", 60, {8}, there) == ()
    assert duties.wanted(orders, "a", 60, set(), fleet("b", leaving=["a"])) == ()


def test_a_freeze_holds_back_evenness_and_nothing_else() -> None:
    """Drain > pin > freeze > evenness."""
    frozen = Fleet(members=fleet("a", "b").members, is_frozen=True)
    orders = {
        shard: Order(Assignment(order=("a", "b"), reason=reason), 99)
        for shard, reason in enumerate(["evenness: 3 instead of 5", "drain of b", "pin", "no leader"])
    }
    assert duties.wanted(orders, "a", 60, set(), frozen) == (1, 2, 3)


def test_heirs_are_the_orders_living_then_everybody_else() -> None:
    """Best first; a shard without an order has heirs too, and the last worker has none."""
    there = fleet("a", "b", "d", "e")
    assert duties.heirs(7, ORDERS[7], there, "a")[0] == "b"
    assert sorted(duties.heirs(7, ORDERS[7], there, "a")) == ["b", "d", "e"]
    assert sorted(duties.heirs(7, None, there, "a")) == ["b", "d", "e"]
    assert duties.heirs(7, ORDERS[7], fleet("a"), "a") == ()


def test_only_a_shard_that_was_alone_before_is_an_orphan() -> None:
    """One that has lost its leader since the last tick is about to be claimed."""
    assert duties.orphans([1, 2, 3], {2, 3, 4}) == (2, 3)


def test_a_tenure_is_short_while_few_ticks_tell_so() -> None:
    """Ticks tell the least time that has passed; one that goes back tells nothing. What was given up is told by who
    gave it up."""
    assert [duties.passed_s(ticks) for ticks in (-5, 0, 1, 2, 31)] == [0, 0, 0, 2, 60]
    died = History("w1", "s", 0.0, "test", short_tenures=1)
    assert [duties.short_tenures(died, ticks) for ticks in (-1, 0, 3, 4)] == [2, 2, 2, 0]
    often = replace(died, short_tenures=9)
    assert [duties.short_tenures(often, ticks) for ticks in (31, 33, 34)] == [10, 10, 0]
    resigned = replace(died, ended=True)
    assert [duties.short_tenures(resigned, ticks) for ticks in (0, 1_000)] == [1, 1]


def test_the_brake_doubles_to_a_minute() -> None:
    """Two short tenures are nothing yet."""
    assert [duties.brake_s(count) for count in (0, 2, 3, 4, 5, 9, 1_000)] == [0, 0, 1, 2, 4, 60, 60]


names = st.sampled_from("abcdefgh")


@given(
    st.lists(names, min_size=1, max_size=3, unique=True), st.sets(names), st.sets(names), st.sets(names), st.sets(names)
)
def test_a_shard_whose_order_lives_is_claimed_by_exactly_one_first(
    chosen: list[str], up: set[str], leaving: set[str], cordoned: set[str], drained: set[str]
) -> None:
    """Whoever has died: if anybody of the order may lead, the ranks among the living are 0, 1, ... without gaps."""
    dead = chosen[0]
    there = fleet(*(up - {dead} - leaving), leaving=leaving - {dead}, cordoned=cordoned, drained=drained)
    orders = {1: order(*chosen)}
    ranks = sorted(
        rank for name in sorted(there.members) for rank in duties.claims_after_end(dead, orders, there, name).values()
    )
    assert ranks == list(range(len(ranks)))
    if any(there.is_up(name) for name in chosen[1:]):
        assert ranks


@given(st.sets(names, min_size=1), st.integers(0, 9_999))
def test_rendezvous_order_stays_when_another_leaves(up: set[str], shard: int) -> None:
    """The order of those who stay does not change, so offers of different workers agree."""
    whole = fleet(*up).ranked(shard)
    assert sorted(whole) == sorted(up)
    gone = whole[0]
    assert fleet(*(up - {gone})).ranked(shard) == tuple(name for name in whole if name != gone)


def test_of_many_wanted_shards_a_share_is_handed_over_at_once() -> None:
    """Of a few, always four; of thousands, so many that the last does not wait for long."""
    assert [duties.handed_at_once(wanted) for wanted in (1, 64, 80, 320, 5_000)] == [4, 4, 5, 20, 312]
