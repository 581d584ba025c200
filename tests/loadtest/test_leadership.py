"""Moves, pauses and failovers from events and requests."""

from loadtest.leadership import Change, Loss, Story, failovers_ms, moves
from loadtest.samples import OK, ByShard, Samples
from tests.loadtest.made import ZERO_S, leader


def requests(*rows: tuple[float, float, int]) -> ByShard:
    """Requests as (due in s, latency in ms, shard)."""
    samples = Samples()
    for due_s, latency_ms, shard in rows:
        samples.add(int(due_s * 1e6), int(latency_ms * 1000), shard, OK)
    return ByShard(samples)


def test_a_handoff_is_one_event_and_a_claim_two() -> None:
    """A leader that is replaced in place leaves no time without one; a lease that ends does, until the claim."""
    story = Story(
        {0: "w1", 1: "w1"},
        [leader(1.0, 0, "w2", 5), leader(2.0, 1, None, 6), leader(2.3, 1, "w3", 7)],
        ZERO_S,
    )
    handoff, claim = story.changes(9.0)
    assert (handoff.shard, handoff.source, handoff.target, handoff.leaderless_ms) == (0, "w1", "w2", 0.0)
    assert (claim.shard, claim.source, claim.target, round(claim.leaderless_ms)) == (1, "w1", "w3", 300)
    assert story.leaders_at(1.5) == {0: "w2", 1: "w1"}
    assert story.leaders_at(2.1) == {0: "w2"}
    assert [counts for _, counts in story.counts()] == [
        {"w1": 2},
        {"w1": 1, "w2": 1},
        {"w1": 0, "w2": 1},
        {"w1": 0, "w2": 1, "w3": 1},
    ]


def test_a_new_epoch_of_the_same_leader_is_no_move() -> None:
    """A re-mint changes the epoch and nobody's leader."""
    story = Story({0: "w1"}, [leader(1.0, 0, "w1", 5)], ZERO_S)
    assert [change.is_move for change in story.changes(9.0)] == [False]
    assert moves(story.changes(9.0), requests()) == []


def test_a_shard_that_nobody_leads_again_is_told() -> None:
    """It has been without a leader to the end."""
    (change,) = Story({0: "w1"}, [leader(1.0, 0, None, 5)], ZERO_S).changes(9.0)
    assert (change.source, change.target, round(change.leaderless_ms)) == ("w1", None, 8000)


def test_a_pause_is_the_longest_wait_around_the_move() -> None:
    """Only requests of that shard that were under way around the change count; the longest of them is the pause."""
    change = Change(shard=3, source="w1", target="w2", lost_s=None, led_s=10.0)
    by_shard = requests(
        (9.970, 45.0, 3),  # held while it moved
        (9.990, 30.0, 3),
        (9.990, 500.0, 4),  # another shard's
        (8.000, 900.0, 3),  # over before it began
        (10.200, 20.0, 3),  # the new leader opens
        (10.300, 700.0, 3),  # later than that
    )
    (move,) = moves([change], by_shard)
    assert (move.pause_ms, move.requests, move.leaderless_ms, move.is_handoff) == (45.0, 3, 0.0, True)


def test_a_pause_is_at_least_the_time_without_a_leader() -> None:
    """Where no request came meanwhile, what the router saw counts."""
    (move,) = moves([Change(3, "w1", "w2", 10.0, 10.25)], requests())
    assert (move.pause_ms, move.requests, move.is_handoff) == (250.0, 0, False)


def test_a_failover_counts_from_the_fault() -> None:
    """From the signal, not from the moment at which the router learned of it, to the new leader or to the end of the
    longest wait, whichever is later; one figure for each shard that was lost."""
    changes = [Change(0, "w1", "w2", 5.4, 5.6), Change(1, "w1", "w3", 5.4, 5.5), Change(2, "w2", "w3", None, 5.5)]
    loss = Loss(5.0, "w1", frozenset({0, 1}))
    by_shard = requests((5.1, 700.0, 1))
    assert failovers_ms(changes, [loss], by_shard, 20.0) == [600.0, 700.0]


def test_a_lost_shard_that_is_never_led_again_counts_to_the_end() -> None:
    """It must not fall out of the figures."""
    changes = [Change(0, "w1", None, 5.4, 20.0)]
    assert failovers_ms(changes, [Loss(5.0, "w1", frozenset({0}))], requests(), 20.0) == [15_000.0]
