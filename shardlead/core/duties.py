"""Whose turn it is: what a worker owes the fleet, from its own inbox and from who is there.

Law: protocol.md A.3 "Who claims", "Orphans" and "Wants". Nothing here needs the controller to be alive. A claim of a
shard that has a leader after all just loses, harmlessly; so these rules may be generous, never late.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from shardlead.core.fleet import Fleet
from shardlead.core.model import TICK_S, Assignment, History

RANK_STEP_S: Final = 0.25  # the next in order waits so long for the one before it
EVENNESS: Final = "evenness"  # how the reason of an order begins that only evenness asks for
BRAKE_MAX_S: Final = 60.0
SHORT_TENURE_S: Final = 5.0
BRAKE_FREE: Final = 2  # so many short tenures in a row are nothing yet
HANDED_AT_ONCE: Final = 4
HANDED_SHARE: Final = 16


@dataclass(frozen=True, slots=True)
class Order:
    """An assignment as it stands in this worker's inbox, with the revision it was written at."""

    assignment: Assignment
    mod_revision: int

    @property
    def names(self) -> tuple[str, ...]:
        return self.assignment.order


def handed_at_once(wanted: int) -> int:
    """How many shards a leader lets go at the same time when so many are wanted of it.

    A shard is served until its turn comes, and from then on its requests wait for its own few transactions, not for
    those of all: handed over together, 22 shards waited for up to 100 ms each, a few at a time for 30.
    """
    return max(HANDED_AT_ONCE, wanted // HANDED_SHARE)


def claims_after_end(ended: str, orders: Mapping[int, Order], fleet: Fleet, me: str) -> dict[int, int]:
    """`ended`'s session is over: shard -> this worker's rank among those whose turn it is now.

    Every shard counts in whose order `ended` stands anywhere: it may have led it, or have been about to. `fleet` is
    without the ended session; where its name lives again with a new one, that one does not count.
    """
    ranks: dict[int, int] = {}
    for shard, order in orders.items():
        if ended not in order.names or me not in order.names:
            continue
        candidates = fleet.eligible(name for name in order.names if name != ended)
        if me in candidates:
            ranks[shard] = candidates.index(me)
    return ranks


def claims_after_news(orders: Mapping[int, Order], fleet: Fleet, fleet_revision: int, me: str) -> dict[int, int]:
    """Orders that this worker has read only after the end of a session that they name: shard -> its rank, as if the
    end came now. The two watches keep no order between them, so the end may have been told first.

    An order that is newer than what is known of the fleet (`fleet_revision`) says nothing: it may name somebody who
    has only just come.
    """
    ranks: dict[int, int] = {}
    for shard, order in orders.items():
        if order.mod_revision <= fleet_revision:
            for ended in order.names:
                if ended not in fleet.members:
                    ranks.update(claims_after_end(ended, {shard: order}, fleet, me))
    return ranks


def takeovers(leaving: str, orders: Mapping[int, Order], fleet: Fleet, me: str) -> tuple[int, ...]:
    """`leaving` is stopping: the shards of its orders for which this worker is the first eligible one, and so wants
    them if `leaving` leads them."""
    return tuple(
        shard
        for shard, order in orders.items()
        if leaving in order.names and me in order.names and fleet.eligible(order.names)[:1] == (me,)
    )


def own_orders(orders: Mapping[int, Order], me: str) -> tuple[int, ...]:
    """The shards whose order begins with this worker; tried once when its session starts."""
    return tuple(shard for shard, order in orders.items() if order.names[:1] == (me,))


def wanted(
    orders: Mapping[int, Order], me: str, session_revision: int, held: Collection[int], fleet: Fleet
) -> tuple[int, ...]:
    """The shards that this worker is to lead and does not: its rank-0 orders written after its session began.

    An older order counts as absent, so that a worker that comes back under its name claws nothing back. A freeze
    holds back what was ordered for evenness, never a drain or a pin.
    """
    if not fleet.is_up(me):
        return ()
    return tuple(
        shard
        for shard, order in orders.items()
        if order.names[:1] == (me,)
        and order.mod_revision > session_revision
        and shard not in held
        and not (fleet.is_frozen and order.assignment.reason.startswith(EVENNESS))
    )


def heirs(shard: int, order: Order | None, fleet: Fleet, me: str) -> tuple[str, ...]:
    """Who a shard that this worker gives up is offered to, best first: its order's eligible, else rendezvous."""
    named = fleet.eligible(name for name in (order.names if order else ()) if name != me)
    others = tuple(name for name in fleet.ranked(shard) if name != me and name not in named)
    return named + others


def orphans(missing: Iterable[int], missing_before: Collection[int]) -> tuple[int, ...]:
    """Shards without a leader at this tick and at the one before: nobody is about to claim them."""
    return tuple(shard for shard in missing if shard in missing_before)


def passed_s(ticks: int) -> float:
    """The least time in which the cluster's tick went on by so many. Wall clocks of two machines do not compare; the
    tick is one for all, and stands still while no worker lives, when nobody could fail either."""
    return max(0, ticks - 1) * TICK_S


def short_tenures(history: History, ticks: int) -> int:
    """How many tenures in a row were so short that their shard may be to blame, the last one included, over since that
    history was written and the cluster has ticked so many times.

    One that was given up says it itself. One that nobody closed is short if it ended within SHORT_TENURE_S of its
    start, or a bit more, as ticks are coarse. Who sees its end late, because the shard was braked meanwhile, must not
    take the brake for a long life: so much longer must it have been to be forgiven.
    """
    if history.ended:
        return history.short_tenures
    count = history.short_tenures + 1
    return count if passed_s(ticks) < SHORT_TENURE_S + brake_s(count) else 0


def brake_s(short_tenures: int) -> float:
    """How long a shard stays alone after that many short tenures in a row: one bad shard must not walk through the
    fleet. Nothing for the first two, then one second, doubling up to a minute."""
    if short_tenures <= BRAKE_FREE:
        return 0.0
    return min(BRAKE_MAX_S, float(2 ** min(short_tenures - BRAKE_FREE - 1, 10)))
