"""What became of each request, in columns: 17 bytes a request, so that a long run fits in memory.

Generators send columns to the run once a second; what is felt in a move or a failover is found in them afterwards.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

OK: Final = 1
POST: Final = 2

_CODES: Final = ("Q", "I", "I", "B")
LATENCY_MAX: Final = 2**32 - 1


class Sample(NamedTuple):
    """One request: when it was due (µs since the load began), how long it took from then on, and its shard."""

    due_us: int
    latency_us: int
    shard: int
    flags: int

    @property
    def is_ok(self) -> bool:
        return bool(self.flags & OK)

    @property
    def done_us(self) -> int:
        return self.due_us + self.latency_us


class Samples:
    """Many of them, as columns."""

    __slots__ = ("due_us", "flags", "latency_us", "shard")

    def __init__(self) -> None:
        self.due_us, self.latency_us, self.shard, self.flags = (array(code) for code in _CODES)

    def __len__(self) -> int:
        return len(self.due_us)

    def __iter__(self) -> Iterator[Sample]:
        return map(Sample, self.due_us, self.latency_us, self.shard, self.flags)

    def add(self, due_us: int, latency_us: int, shard: int, flags: int) -> None:
        """Note one request; negative times (a clock that was read in another order) count as 0."""
        self.due_us.append(max(due_us, 0))
        self.latency_us.append(min(max(latency_us, 0), LATENCY_MAX))
        self.shard.append(shard)
        self.flags.append(flags)

    def encode(self) -> tuple[bytes, ...]:
        """For another process on this machine."""
        return tuple(column.tobytes() for column in self._columns())

    def extend(self, encoded: tuple[bytes, ...]) -> None:
        """Add what another process has encoded."""
        for column, raw in zip(self._columns(), encoded, strict=True):
            column.frombytes(raw)

    def _columns(self) -> "tuple[array[int], ...]":
        return self.due_us, self.latency_us, self.shard, self.flags


@dataclass(frozen=True)
class Felt:
    """What the requests of one shard around one moment felt. `longest_ms` is 0.0 if there were none."""

    requests: int
    longest_ms: float


class ByShard:
    """The requests of each shard, to ask what was felt around a moment."""

    def __init__(self, samples: Samples) -> None:
        rows: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for due_us, latency_us, shard in zip(samples.due_us, samples.latency_us, samples.shard, strict=True):
            rows[shard].append((due_us, latency_us))
        self._dues: dict[int, array[int]] = {}
        self._latencies: dict[int, array[int]] = {}
        for shard in list(rows):
            found = sorted(rows.pop(shard))
            self._dues[shard] = array("Q", [due_us for due_us, _ in found])
            self._latencies[shard] = array("I", [latency_us for _, latency_us in found])
        self._longest_us = {shard: max(column) for shard, column in self._latencies.items()}

    def felt(self, shard: int, begin_s: float, end_s: float) -> Felt:
        """The requests of `shard` that were under way (due, and not done yet) at any time from begin to end."""
        dues = self._dues.get(shard)
        if dues is None:
            return Felt(0, 0.0)
        latencies = self._latencies[shard]
        begin_us, end_us = int(begin_s * 1e6), int(end_s * 1e6)
        count = longest = 0
        for at in range(bisect_left(dues, begin_us - self._longest_us[shard]), bisect_right(dues, end_us)):
            if dues[at] + latencies[at] >= begin_us:
                count += 1
                longest = max(longest, latencies[at])
        return Felt(count, longest / 1000)
