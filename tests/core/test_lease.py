"""Deadline arithmetic: all TTLs, drifts and orders of events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlead.core import lease
from shardlead.core.lease import NS_PER_S, Active, Foreign, Lost, Readings, State, Suspended, Terms

TERMS = Terms(drift=0.01, margin_s=0.5)
times_ns = st.integers(min_value=0, max_value=10**15)
ttls_s = st.integers(min_value=0, max_value=600)


def test_a_deadline_is_counted_from_the_sending() -> None:
    """t0 + ttl * (1 - rho) - delta, whenever the answer comes."""
    sent_ns = 100 * NS_PER_S
    assert TERMS.deadline_ns(sent_ns, 10) == sent_ns + int(9.9 * NS_PER_S) - NS_PER_S // 2


@given(ttl_s=st.integers(min_value=2, max_value=600), sent_ns=times_ns)
def test_a_deadline_is_before_the_servers(ttl_s: int, sent_ns: int) -> None:
    """Even a clock that runs slow by rho against the server's stops the worker half a margin before the lease ends."""
    deadline_ns = TERMS.deadline_ns(sent_ns, ttl_s)
    server_elapsed_ns = (deadline_ns - sent_ns) / (1 - TERMS.drift)
    assert server_elapsed_ns < ttl_s * NS_PER_S - TERMS.margin_ns(ttl_s) / 2


def test_a_late_acknowledgement_does_not_revive() -> None:
    """An ack that lay in a socket's buffer while the process was frozen (protocol B, row 2): suspended, not active."""
    state = lease.opened(0, 10, TERMS)
    thawed_ns = 60 * NS_PER_S
    after = lease.renewed(state, 1 * NS_PER_S, 10, thawed_ns, TERMS)
    assert isinstance(after, Suspended)
    assert not lease.is_valid(after, thawed_ns)


def test_the_guard_is_false_to_the_nanosecond() -> None:
    """At the deadline itself, without any timer having run (protocol B, row 3)."""
    state = lease.opened(0, 10, TERMS)
    assert isinstance(state, Active)
    assert lease.is_valid(state, state.deadline_ns - 1)
    assert not lease.is_valid(state, state.deadline_ns)
    assert not lease.is_valid(state, state.deadline_ns - 5, need_ns=5)


def test_an_answer_without_a_ttl_is_the_end() -> None:
    """TTL 0 or absent means the lease is gone (protocol B, rows 14 and 15)."""
    assert isinstance(lease.renewed(lease.opened(0, 10, TERMS), 1, 0, 2, TERMS), Lost)


def test_a_suspension_ends_by_renewal_and_then_confirmation() -> None:
    """Neither of the two alone is enough, nor the two in the other order."""
    now_ns = 20 * NS_PER_S
    suspended = lease.lapsed(lease.opened(0, 10, TERMS), now_ns)
    assert isinstance(lease.confirmed(suspended, 0, now_ns), Suspended)
    renewed = lease.renewed(suspended, now_ns, 10, now_ns + 1, TERMS)
    assert isinstance(renewed, Suspended)
    assert isinstance(lease.confirmed(renewed, 0, now_ns + 2), Suspended)
    active = lease.confirmed(renewed, renewed.renewed_until_ns, now_ns + 2)
    assert active == Active(renewed.renewed_until_ns)


def test_what_was_sent_before_a_doubt_does_not_end_it() -> None:
    """The machine may have been held still between the sending and the alarm, and its clock with it: only a renewal
    sent after the doubt counts, and only a confirmation after that."""
    state = lease.opened(0, 10, TERMS)
    doubted = lease.doubted(state, 2 * NS_PER_S)
    late = lease.renewed(doubted, 1 * NS_PER_S, 10, 3 * NS_PER_S, TERMS)
    assert late == doubted
    renewed = lease.renewed(late, 3 * NS_PER_S, 10, 4 * NS_PER_S, TERMS)
    assert isinstance(renewed, Suspended)
    again = lease.doubted(renewed, 5 * NS_PER_S)
    assert isinstance(lease.confirmed(again, renewed.renewed_until_ns, 6 * NS_PER_S), Suspended)


@pytest.mark.parametrize(
    ("boot_ms", "awake_ms", "wall_ms", "says"),
    [
        (500, 500, 500, ""),
        (500, 451, 500, ""),
        (500, 449, 500, "suspended"),
        (60_000, 500, 60_000, "suspended"),
        (500, 500, 749, ""),
        (500, 500, 751, "wall clock ran ahead by 0.25 s"),
        (500, 500, -60_000, ""),  # somebody set it back
        (60_000, 60_000, 60_000, ""),  # a pause of the process alone: every clock has gone on
    ],
)
def test_clocks_that_disagree_are_an_alarm(boot_ms: int, awake_ms: int, wall_ms: int, says: str) -> None:
    """More than 50 ms of suspended time, and a wall clock that ran ahead by more than 250 ms; nothing else."""
    before = Readings(7_000_000, 5_000_000, 10**18)
    ms = 1_000_000
    after = Readings(before.boot_ns + boot_ms * ms, before.awake_ns + awake_ms * ms, before.wall_ns + wall_ms * ms)
    said = lease.alarm(before, after)
    assert says in said
    assert bool(says) == bool(said)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("renew"), st.integers(0, 5 * NS_PER_S), ttls_s),
        st.tuples(st.just("pass"), st.integers(0, 30 * NS_PER_S), st.just(0)),
        st.tuples(st.just("confirm"), st.just(0), st.just(0)),
        st.tuples(st.just("doubt"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(steps)
def test_no_history_makes_the_guard_true_beyond_what_was_acknowledged(history: list[tuple[str, int, int]]) -> None:
    """Whatever is renewed, delayed, doubted and confirmed: the guard is true only before the largest deadline of an
    acknowledged renewal, an active deadline never goes back, and nothing revives a lost session."""
    now_ns = 0
    state: State = lease.opened(0, 10, TERMS)
    best_ns = TERMS.deadline_ns(0, 10)
    for kind, amount_ns, ttl_s in history:
        before = state
        match kind:
            case "renew":
                sent_ns, now_ns = now_ns, now_ns + amount_ns
                state = lease.renewed(state, sent_ns, ttl_s, now_ns, TERMS)
                best_ns = max(best_ns, TERMS.deadline_ns(sent_ns, ttl_s))
            case "pass":
                now_ns += amount_ns
                state = lease.lapsed(state, now_ns)
            case "confirm":
                until_ns = state.renewed_until_ns if isinstance(state, Suspended) else 0
                state = lease.confirmed(state, until_ns, now_ns)
            case _:
                state = lease.doubted(state, now_ns)
        if isinstance(before, Lost):
            assert state == before
        if isinstance(before, Active) and isinstance(state, Active):
            assert state.deadline_ns >= before.deadline_ns
        if lease.is_valid(state, now_ns):
            assert now_ns < best_ns


@given(
    ttl_s=st.integers(2, 60),
    share=st.floats(0.1, 1 / 3),
    looks=st.lists(st.floats(0.05, 0.25), min_size=1, max_size=60),
    elections=st.lists(st.floats(0.0, 1.0), max_size=2),
)
def test_the_dead_are_told_from_the_living(
    ttl_s: int, share: float, looks: list[float], elections: list[float]
) -> None:
    """Whoever renews at least thrice a TTL is seen to live within TTL + 5 s; a lease that nobody renews never is,
    though the store prolongs it at two elections."""

    def looked(renewals_s: list[float]) -> Foreign:
        now_s, foreign = 0.0, Foreign()
        for pause in [*looks, *[0.25] * 40]:
            now_s += pause * ttl_s
            if now_s > ttl_s + 5:
                break
            renewed_s = max(each for each in renewals_s if each <= now_s)
            left_s = renewed_s + ttl_s - now_s
            if left_s > 0:
                foreign = foreign.seen(int(now_s * NS_PER_S), int(left_s))
        return foreign

    assert not looked([0.0, *(each * ttl_s for each in elections)]).is_kept_alive
    every_s = max(0.2, share * ttl_s)
    living = looked([number * every_s for number in range(int((ttl_s + 5) / every_s) + 2)])
    assert living.is_kept_alive or ttl_s + 5 < 5 * max(every_s, 1.25, 0.25 * ttl_s)
