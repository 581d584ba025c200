"""How many shards each worker should lead: by capacity, within bounds, in whole numbers.

Law: with equal capacities and no bounds two shares differ by at most one. Whole numbers come by the largest
remainder; among equal remainders whoever has most already keeps it, so that a fleet that is level stays as it is and
a fleet that is not becomes level with the fewest moves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor, isfinite
from typing import Final

CAPACITY_MIN: Final = 1e-6  # what a worker of capacity 0 counts: it leads nothing while anybody else may
EPSILON: Final = 1e-9  # shares nearer than this are equal; what is left of dividing floats


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's claim to shards: its capacity, how many it has, and the fewest and most it may have."""

    name: str
    capacity: float
    have: int
    low: int
    high: int


def capacity_of(stated: float) -> float:
    """A capacity that can be divided by; nonsense in a record counts as next to nothing."""
    return max(stated, CAPACITY_MIN) if isfinite(stated) else CAPACITY_MIN


def shares(total: int, claims: Iterable[Claim]) -> dict[str, int]:
    """The share of each claim; together `total`, or as near as the bounds allow."""
    result: dict[str, int] = {}
    open_claims = sorted(claims, key=lambda claim: claim.name)
    left = total
    # As CSS does with flexible boxes: divide what is left, pin down those outside their bounds on the side that errs
    # more, divide again. Each round pins at least one.
    while open_claims:
        scale = left / sum(claim.capacity for claim in open_claims)
        error = sum(
            min(max(scale * claim.capacity, claim.low), claim.high) - scale * claim.capacity for claim in open_claims
        )
        bounded = [
            claim
            for claim in open_claims
            if (error >= -EPSILON and scale * claim.capacity < claim.low - EPSILON)
            or (error <= EPSILON and scale * claim.capacity > claim.high + EPSILON)
        ]
        if not bounded:
            return result | _in_whole_numbers(left, scale, open_claims)
        for claim in bounded:
            result[claim.name] = claim.low if scale * claim.capacity < claim.low else claim.high
            left -= result[claim.name]
            open_claims.remove(claim)
    return result


def _in_whole_numbers(total: int, scale: float, claims: Sequence[Claim]) -> dict[str, int]:
    floors = {claim.name: floor(scale * claim.capacity + EPSILON) for claim in claims}
    rest = total - sum(floors.values())
    by_right = sorted(
        claims,
        key=lambda claim: (
            -round(scale * claim.capacity - floors[claim.name], 6),
            floors[claim.name] - claim.have,
            claim.name,
        ),
    )
    for claim in by_right[:rest]:
        floors[claim.name] += 1
    return floors


def level_of(amount: int, counts: Iterable[tuple[float, float]]) -> float:
    """How high water stands after pouring `amount` into vessels of (content, width): those above it take none.

    `counts` must be in order of content ÷ width and not empty.
    """
    content = width = 0.0
    level = 0.0
    for have, capacity in counts:
        if width and (amount + content) / width <= have / capacity:
            break
        content += have
        width += capacity
        level = (amount + content) / width
    return level
