"""Latencies in HDR histograms (the package `hdrhistogram`): in whole microseconds, up to two minutes.

Every request counts, a failed one with the time until it failed, so that a system cannot look quick by failing slowly.

Law: three significant digits in total and per second; two per shard, where ten thousand of them must fit in memory.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Final

from hdrh.histogram import HdrHistogram

LATENCY_MAX_US: Final = 120_000_000
_PER_SHARD_UNIT_US: Final = 16


def fine() -> Any:
    """An empty histogram of three significant digits: for totals and for seconds."""
    return HdrHistogram(1, LATENCY_MAX_US, 3)


def coarse() -> Any:
    """An empty histogram of two significant digits in 9 KiB: for one shard of many."""
    return HdrHistogram(_PER_SHARD_UNIT_US, LATENCY_MAX_US, 2, word_size=4)


def record(histogram: Any, latency_us: int) -> None:
    """Count one latency; one that is longer than LATENCY_MAX_US counts as that."""
    histogram.record_value(min(latency_us, LATENCY_MAX_US))


def merged(histograms: Iterable[Any]) -> Any:
    """One histogram of all that several of `fine` have counted."""
    total = fine()
    for histogram in histograms:
        if histogram.total_count:
            longest = max(total.max_value, histogram.max_value)
            total.add(histogram)
            total.max_value = longest  # `add` puts the end of the longest one's bucket there
    return total


def percentiles_ms(histogram: Any, points: Sequence[float]) -> list[float]:
    """The latencies, in ms, that `points` (0 to 100) per cent of the requests did not exceed; 0.0 for no requests.

    As the library's own `get_percentile_to_value_dict`, which takes 3 ms: too much for each of ten thousand shards.
    No value is above the longest that was recorded, though the histogram's buckets are wider.
    """
    if not histogram.total_count:
        return [0.0 for _ in points]
    counts = histogram.counts[: histogram._counts_index_for(histogram.max_value) + 1]  # noqa: SLF001 - it has no public name
    sums = list(accumulate(counts))
    found = []
    for point in points:
        at = bisect_left(sums, histogram.get_target_count_at_percentile(point))
        value = histogram.get_value_from_index(min(at, len(sums) - 1))
        found.append(min(histogram.get_highest_equivalent_value(value), histogram.max_value) / 1000)
    return found
