"""When requests are due: arithmetic that nothing can move."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from loadtest.schedule import Schedule


def test_a_constant_rate_is_evenly_spaced() -> None:
    """At 1,000 per second request n is due n ms after the begin, for ever."""
    schedule = Schedule((1000.0,), 30.0)
    assert [schedule.due_s(number) for number in (0, 1, 999, 1000, 90_000)] == [0.0, 0.001, 0.999, 1.0, 90.0]


def test_steps_follow_each_other_without_a_gap() -> None:
    """500/s, then 1,000/s, then 2,000/s, ten seconds each: as many requests in each step as its rate says, and the
    last rate goes on where a scenario takes longer."""
    schedule = Schedule((500.0, 1000.0, 2000.0), 10.0)
    assert schedule.firsts == (0.0, 5000.0, 15_000.0)
    assert (schedule.due_s(4999), schedule.due_s(5000), schedule.due_s(5001)) == (9.998, 10.0, 10.001)
    assert schedule.due_s(15_000) == 20.0
    assert schedule.due_s(15_000 + 2000 * 30) == 50.0
    assert [schedule.rate_at(at_s) for at_s in (0, 9.9, 10, 25, 99)] == [500, 500, 1000, 2000, 2000]
    assert [schedule.due_by(at_s) for at_s in (0, 10, 15, 40)] == [0, 5000, 10_000, 55_000]


@given(
    rates=st.lists(st.floats(1, 5000), min_size=1, max_size=5),
    step_s=st.floats(0.1, 100),
    shares=st.integers(1, 8),
)
def test_the_shares_of_several_generators_are_the_whole(rates: list[float], step_s: float, shares: int) -> None:
    """Generators take turns: together they send each request of the schedule once, in an order that never goes back."""
    schedule = Schedule(tuple(rates), step_s)
    count = 300
    taken = sorted(number for share in range(shares) for number in range(share, count, shares))
    assert taken == list(range(count))
    dues = [schedule.due_s(number) for number in taken]
    assert all(before < after for before, after in pairwise(dues))


@given(
    rates=st.lists(st.floats(1, 5000), min_size=1, max_size=5), step_s=st.floats(0.1, 100), at=st.integers(0, 10_000)
)
def test_what_is_due_by_a_time_is_what_was_due_before_it(rates: list[float], step_s: float, at: int) -> None:
    """`due_by` and `due_s` are each other's inverse."""
    schedule = Schedule(tuple(rates), step_s)
    assert abs(schedule.due_by(schedule.due_s(at)) - at) < 1e-3
