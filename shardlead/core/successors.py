"""Who follows whom: the successors of every shard, spread so that no death makes the fleet uneven.

Law: after any single death the workers that take over are level within two, whatever the level was before (capacity
weighted); an empty worker is so the first successor of nearly all. At least one successor stands in another zone than
the leader, where there is one. Successors stand still: as long as the law holds none is exchanged, and where it does
not, as few as possible are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import floor
from typing import Final

from shardlead.core.fleet import Fleet
from shardlead.core.shares import EPSILON, capacity_of, level_of

SLACK: Final = 2  # "level within two": so much above the level a worker may come before a successor is exchanged


@dataclass(frozen=True, slots=True)
class Home:
    """A shard that is, or is to be, led by `home`; by `leader` now ("": nobody); and its order as stored."""

    shard: int
    home: str
    leader: str
    stored: tuple[str, ...]


class Pool:
    """Who may succeed whom, and how many shards each is to lead itself."""

    def __init__(self, fleet: Fleet, eligible: Sequence[str], counts: Mapping[str, int]) -> None:
        self.fleet = fleet
        self.eligible = eligible
        self.counts = counts
        self.zone = {name: member.record.zone for name, member in fleet.members.items()}
        self.capacity = {name: capacity_of(member.record.capacity) for name, member in fleet.members.items()}
        self._after: dict[str, dict[str, None]] = {}

    def after(self, name: str) -> Mapping[str, None]:
        """Who is there to take over from `name`: an ordered set, emptiest first."""
        found = self._after.get(name)
        if found is None:
            others = [other for other in self.eligible if other != name]
            names = others or self.fleet.eligible(other for other in sorted(self.fleet.members) if other != name)
            by_level = sorted(names, key=lambda other: (self.counts[other] / self.capacity[other], other))
            found = dict.fromkeys(by_level)
            self._after[name] = found
        return found


def orders_of(homes: Iterable[Home], pool: Pool, successors: int) -> dict[int, tuple[str, ...]]:
    """The order of every shard: (home, successor, ...), as many as there are workers for."""
    groups: dict[str, list[Home]] = {}
    orders: dict[int, tuple[str, ...]] = {}
    for home in homes:
        groups.setdefault(home.home, []).append(home)
    for name in sorted(groups):
        names = tuple(pool.after(name))
        if successors == 1:  # with a single successor another zone comes before level
            names = tuple(other for other in names if pool.zone[other] != pool.zone[name]) or names
        settled = [home for home in groups[name] if home.leader in ("", name)]
        heirs = _share_out(name, settled, names, pool) if names and successors else {}
        rotation = sorted(names)
        for home in groups[name]:
            orders[home.shard] = _order(home, heirs.get(home.shard, ""), rotation, pool, successors)
    return orders


def _share_out(name: str, homes: Sequence[Home], names: Sequence[str], pool: Pool) -> dict[int, str]:
    """The first successor of each of `name`'s shards: the stored one wherever the law allows."""
    level = level_of(len(homes), [(pool.counts[other], pool.capacity[other]) for other in names])
    floors = {other: floor(level * pool.capacity[other] + EPSILON) for other in names}
    counts = {other: pool.counts[other] for other in names}
    kept: dict[str, list[Home]] = {}
    free: list[Home] = []
    for home in homes:
        heir = next((other for other in home.stored if other in counts), "")
        if heir:
            kept.setdefault(heir, []).append(home)
            counts[heir] += 1
        else:
            free.append(home)

    lacking = sum(floors[other] - counts[other] for other in names if counts[other] < floors[other])
    # Take back what exceeds the slack; then, while somebody is short of the level, what exceeds the level.
    for slack in range(SLACK, -1, -1):
        for other in sorted(kept):
            while kept[other] and counts[other] > floors[other] + slack and (slack == SLACK or len(free) < lacking):
                free.append(kept[other].pop())
                counts[other] -= 1

    heirs = {home.shard: other for other, group in kept.items() for home in group}
    heirs.update(_fill(name, free, floors, counts, pool))
    return heirs


def _fill(
    name: str, free: Sequence[Home], floors: Mapping[str, int], counts: dict[str, int], pool: Pool
) -> dict[int, str]:
    """Heirs for the free shards, the emptiest first; of those short of the level rather one that stands in the order
    already, and among equally empty ones rather one in another zone."""
    heirs: dict[int, str] = {}
    rest: list[Home] = []
    for home in free:
        known = next((other for other in home.stored if other in counts and counts[other] < floors[other]), "")
        if known:
            heirs[home.shard] = known
            counts[known] += 1
        else:
            rest.append(home)
    if not rest:
        return heirs
    zone = pool.zone[name]
    heap = [((counts[other] + 1) / pool.capacity[other], pool.zone[other] == zone, other) for other in counts]
    heapify(heap)
    for home in rest:
        _, is_same_zone, other = heap[0]
        heirs[home.shard] = other
        counts[other] += 1
        heapreplace(heap, ((counts[other] + 1) / pool.capacity[other], is_same_zone, other))
    return heirs


def _order(home: Home, heir: str, rotation: Sequence[str], pool: Pool, successors: int) -> tuple[str, ...]:
    """(home, present leader if another, heir, then the stored ones that may stay, then new ones)."""
    order = [home.home]
    if home.leader not in ("", home.home):
        order.append(home.leader)
    elif heir:
        order.append(heir)
    length = max(1 + successors, len(order))
    kept = [other for other in dict.fromkeys(home.stored) if other in pool.after(home.home) and other not in order]
    order += kept[: length - len(order)]
    zone = pool.zone[home.home]
    if length > 2 and all(pool.zone[other] == zone for other in order[1:]):
        far = [other for other in rotation if pool.zone[other] != zone]
        if far:
            del order[length - 1 :]
            order += _pick(home.shard, order, far, 1)
    return tuple(order + _pick(home.shard, order, rotation, length - len(order)))


def _pick(shard: int, order: Sequence[str], rotation: Sequence[str], count: int) -> list[str]:
    """Up to `count` further successors, others for other shards, the same for the same."""
    begin = (shard * 7_919) % len(rotation) if rotation else 0  # a prime far from any fleet's size
    turned = (rotation[(begin + step) % len(rotation)] for step in range(len(rotation)))
    picked: list[str] = []
    while len(picked) < count:
        other = next((other for other in turned if other not in order), "")
        if not other:
            break
        picked.append(other)
    return picked
