"""Latencies in HDR histograms."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.histogram import LATENCY_MAX_US, coarse, fine, merged, percentiles_ms, record

POINTS = [1, 50, 90, 99, 99.9, 100]


def test_merging_is_counting_together() -> None:
    """Histograms of parts, added up, are the histogram of the whole: the same count and the same percentiles."""
    rng = random.Random(5)
    parts = [[int(rng.lognormvariate(8, 1.5)) for _ in range(2000)] for _ in range(4)]
    whole, histograms = fine(), []
    for part in parts:
        histograms.append(fine())
        for value in part:
            record(whole, value)
            record(histograms[-1], value)
    total = merged(histograms)
    assert total.total_count == whole.total_count == 8000
    assert percentiles_ms(total, POINTS) == percentiles_ms(whole, POINTS)


def test_merging_nothing_is_nothing() -> None:
    """No requests, no latency."""
    assert percentiles_ms(merged([]), POINTS) == [0.0] * len(POINTS)
    assert percentiles_ms(merged([fine(), fine()]), [99]) == [0.0]


@given(values=st.lists(st.integers(0, 10_000_000), min_size=1, max_size=200))
def test_percentiles_are_those_of_the_library(values: list[int]) -> None:
    """The quick way finds what `get_percentile_to_value_dict` finds, but never more than the longest."""
    histogram = fine()
    for value in values:
        record(histogram, value)
    theirs = histogram.get_percentile_to_value_dict(POINTS)
    assert percentiles_ms(histogram, POINTS) == [min(theirs[point], max(values)) / 1000 for point in POINTS]


@pytest.mark.parametrize(("make", "share"), [(fine, 0.001), (coarse, 0.01)])
def test_a_value_keeps_its_digits(make: object, share: float) -> None:
    """Three significant digits in total, two per shard."""
    assert callable(make)
    for value in (17, 999, 12_345, 9_876_543):
        histogram = make()
        record(histogram, value)
        record(histogram, LATENCY_MAX_US)
        assert percentiles_ms(histogram, [50])[0] * 1000 == pytest.approx(value, rel=share, abs=16)


def test_what_is_too_long_counts_as_the_longest() -> None:
    """Nothing is dropped for being beyond the range."""
    histogram = fine()
    record(histogram, 10 * LATENCY_MAX_US)
    assert histogram.total_count == 1
    assert percentiles_ms(histogram, [50]) == [LATENCY_MAX_US / 1000]
