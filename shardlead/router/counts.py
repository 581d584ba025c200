"""What a router counts on the request path: plain integers, read by the metrics when somebody looks.

Law: only this process's loop writes them, so `+= 1` is all it takes. (A prometheus child costs 0.5 to 2 µs a touch; a
request touches several.)
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Final

BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Durations:
    """How long something took: a count for each bucket, and the sum."""

    __slots__ = ("buckets_s", "counts", "sum_s")

    def __init__(self, buckets_s: Sequence[float] = BUCKETS_S) -> None:
        self.buckets_s = tuple(buckets_s)
        self.counts = [0] * (len(self.buckets_s) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.buckets_s, seconds)] += 1
        self.sum_s += seconds


class Counts:
    """A router's figures since its start. Names of outcomes and reasons are those of `metrics.RouterMetrics`."""

    __slots__ = (
        "access_log_dropped",
        "answered",
        "client_connections",
        "connects",
        "held",
        "hold_durations",
        "kept_bytes",
        "others",
        "refused",
        "request_durations",
        "resent",
        "tunnels",
    )

    def __init__(self) -> None:
        self.access_log_dropped = 0  # lines
        self.answered = 0  # requests whose answer came from a worker, whole
        self.others: Counter[str] = Counter()  # requests by every other outcome
        self.resent: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.connects: Counter[str] = Counter()
        self.held = 0  # now
        self.kept_bytes = 0  # now
        self.client_connections = 0  # now
        self.tunnels = 0  # now
        self.request_durations = Durations()
        self.hold_durations = Durations()
