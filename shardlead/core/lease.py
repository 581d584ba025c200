"""Deadline arithmetic of a session: how long a leader may work on what it last heard from the store.

Law: protocol.md A.4. An acknowledged renewal is necessary and never sufficient. A deadline starts at the clock
reading taken *before* the renewal was sent, uses the time-to-live the server granted, and ends early by drift and
margin. A deadline that was once passed is not revived by a late acknowledgement: the session is suspended until a
renewal *and* a confirming transaction (T3) succeed, in this order.

All times are nanoseconds of the boot-time clock (`shardlead.clock`).
"""

from dataclasses import dataclass, replace

NS_PER_S = 1_000_000_000
MARGIN_SHARE = 0.05  # of the TTL: the least margin whatever the settings say


@dataclass(frozen=True, slots=True)
class Terms:
    """How careful to be. `drift` is rho, `margin_s` delta's floor; both as in protocol.md A.4."""

    drift: float = 0.01
    margin_s: float = 0.5

    def margin_ns(self, ttl_s: float) -> int:
        """delta: what is kept off the end of a lease of `ttl_s` seconds."""
        return int(max(self.margin_s, MARGIN_SHARE * ttl_s) * NS_PER_S)

    def deadline_ns(self, sent_ns: int, ttl_s: float) -> int:
        """t0 + ttl * (1 - rho) - delta: until when a renewal sent at `sent_ns` may be relied upon."""
        return sent_ns + int(ttl_s * NS_PER_S * (1 - self.drift)) - self.margin_ns(ttl_s)

    def foreign_wait_ns(self, ttl_s: float) -> int:
        """TTL + delta: after so long nothing sent under another's ended lease can still be in work there.

        What an unfenced successor waits before it serves (Chubby's lock-delay; protocol.md A.4)."""
        return int(ttl_s * NS_PER_S) + self.margin_ns(ttl_s)


SEEN_STEP_NS = 1_250_000_000  # stores tell whole seconds: an end that seems later by less may be the same
RENEWALS_OF_THE_LIVING = 3


@dataclass(frozen=True, slots=True)
class Foreign:
    """Somebody else's lease, looked at now and then: when it ends at the latest, and how often it was prolonged since
    the first look.

    A store that elects a new leader prolongs every lease once, those of the dead, too; the living go on renewing."""

    ends_ns: int = 0
    renewals: int = -1

    @property
    def is_kept_alive(self) -> bool:
        """Whether somebody renews it."""
        return self.renewals >= RENEWALS_OF_THE_LIVING

    def seen(self, now_ns: int, left_s: int) -> "Foreign":
        """The store says now that it has so many (whole) seconds left."""
        ends_ns = now_ns + (left_s + 1) * NS_PER_S
        return Foreign(ends_ns, self.renewals + 1) if ends_ns > self.ends_ns + SEEN_STEP_NS else self


WALL_JUMP_NS = 250_000_000  # a wall clock that ran ahead by more: this machine may have been held still
SLEEP_JUMP_NS = 50_000_000  # more suspended time: how long it was, the kernel takes from a clock of whole seconds


@dataclass(frozen=True, slots=True)
class Readings:
    """A machine's clocks at one instant: since boot, the same without suspended time, and the wall clock."""

    boot_ns: int
    awake_ns: int
    wall_ns: int


def alarm(before: Readings, after: Readings) -> str:
    """Why elapsed time is not to be trusted since `before`; "" if nothing speaks against it (protocol.md A.4, Clocks).

    Cheap and partial: a machine that was held still as a whole, its wall clock too, is not noticed.
    """
    passed_ns = after.boot_ns - before.boot_ns
    ahead_ns = after.wall_ns - before.wall_ns - passed_ns
    asleep_ns = passed_ns - (after.awake_ns - before.awake_ns)
    if asleep_ns > SLEEP_JUMP_NS:
        return f"this machine was suspended for about {asleep_ns / NS_PER_S:.2f} s"
    if ahead_ns > WALL_JUMP_NS:
        return f"wall clock ran ahead by {ahead_ns / NS_PER_S:.2f} s: this machine may have been held still"
    return ""


@dataclass(frozen=True, slots=True)
class Active:
    """The lease is ours for certain until `deadline_ns`."""

    deadline_ns: int


@dataclass(frozen=True, slots=True)
class Suspended:
    """A deadline passed without a verdict. `renewed_until_ns` is what renewals since then would allow, 0 if none
    has succeeded; a confirming transaction that *began* after such a renewal makes the session active again."""

    since_ns: int
    renewed_until_ns: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """The lease is gone or given up. Nothing revives it; the worker opens another session."""

    reason: str


State = Active | Suspended | Lost


def opened(sent_ns: int, ttl_s: float, terms: Terms) -> State:
    """The state after a grant that was sent at `sent_ns`."""
    return Active(terms.deadline_ns(sent_ns, ttl_s))


def renewed(state: State, sent_ns: int, ttl_s: float, now_ns: int, terms: Terms) -> State:
    """An acknowledgement of a renewal sent at `sent_ns` was read at `now_ns`. The deadline never goes back."""
    if ttl_s <= 0:
        return lost(state, "the store answered a renewal without a time-to-live")
    until_ns = terms.deadline_ns(sent_ns, ttl_s)
    match lapsed(state, now_ns):
        case Active(deadline_ns):
            return Active(max(deadline_ns, until_ns))
        case Suspended(since_ns=since_ns) as suspended if sent_ns < since_ns:
            return suspended  # sent before: it says nothing about what made us stop
        case Suspended(renewed_until_ns=known_ns) as suspended:
            return replace(suspended, renewed_until_ns=max(known_ns, until_ns))
        case Lost() as over:
            return over


def lapsed(state: State, now_ns: int) -> State:
    """Time has come to `now_ns`: an active session whose deadline has passed is suspended."""
    match state:
        case Active(deadline_ns) if now_ns >= deadline_ns:
            return Suspended(since_ns=now_ns)
        case _:
            return state


def doubted(state: State, now_ns: int) -> State:
    """Something contradicts our picture (a clock alarm, a leader key that is not ours): stop until confirmed."""
    match state:
        case Active() | Suspended():
            return Suspended(since_ns=now_ns)  # what was renewed before the doubt proves nothing any more
        case Lost():
            return state


def confirmed(state: State, renewed_until_ns: int, now_ns: int) -> State:
    """A transaction T3 succeeded that was sent when `renewed_until_ns` was already acknowledged."""
    match state:
        case Suspended(renewed_until_ns=known_ns) if now_ns < renewed_until_ns <= known_ns:
            return Active(renewed_until_ns)
        case _:
            return state


def lost(state: State, reason: str) -> State:
    """A verdict: the session is over. The first reason stays."""
    return state if isinstance(state, Lost) else Lost(reason)


def is_valid(state: State, now_ns: int, need_ns: int = 0) -> bool:
    """The guard: may an act that takes effect within `need_ns` begin now?"""
    return isinstance(state, Active) and now_ns + need_ns < state.deadline_ns
