"""When each request is due: arithmetic alone, so that nothing that happens can move it.

Law: request n of a schedule is due at `due_s(n)`, whatever became of the requests before it. A generator that is late
sends at once and counts its lateness; it never leaves a request out.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Schedule:
    """Requests at each of `rates` (per second) for `step_s` seconds; at the last one for as long as is wanted.

    Several generators share one schedule: number `share` of `shares` sends requests share, share + shares, …
    """

    rates: tuple[float, ...]
    step_s: float

    def __post_init__(self) -> None:
        assert self.rates, "at least one rate"
        assert all(rate > 0 for rate in self.rates), f"rates are more than 0: {self.rates}"
        assert self.step_s > 0, f"a step takes time: {self.step_s}"

    @property
    def firsts(self) -> tuple[float, ...]:
        """How many requests were due before each step began; not whole where rate times step is not."""
        return (0.0, *accumulate(rate * self.step_s for rate in self.rates[:-1]))

    def due_s(self, number: int) -> float:
        """Seconds from the begin until request `number` (0, 1, …) is due. Never goes back as the number grows."""
        firsts = self.firsts
        step = bisect_right(firsts, number) - 1
        return step * self.step_s + (number - firsts[step]) / self.rates[step]

    def rate_at(self, at_s: float) -> float:
        """Requests per second wanted at that time."""
        return self.rates[min(int(at_s // self.step_s), len(self.rates) - 1)] if at_s >= 0 else 0.0

    def due_by(self, at_s: float) -> float:
        """How many requests are due up to that time, as a number that need not be whole."""
        step = min(int(at_s // self.step_s), len(self.rates) - 1)
        return self.firsts[step] + (at_s - step * self.step_s) * self.rates[step]
