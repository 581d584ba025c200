"""From what was sent and seen to the result: pure, after the load has ended.

Law: nothing is left out. Every request that was sent has ended somehow and is in the total, in its second and in its
shard; failed ones too.
"""

import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from loadtest.generators import Harvest
from loadtest.histogram import coarse, fine, merged, percentiles_ms, record
from loadtest.leadership import Loss, Story, failovers_ms, moves
from loadtest.options import Options
from loadtest.promises import Promise
from loadtest.result import (
    Generators,
    Latency,
    Mark,
    Point,
    Quantiles,
    Result,
    Seen,
    ShardLoad,
    Verify,
)
from loadtest.samples import OK, ByShard, Samples

LATE_MS: Final = 10.0
"""A generator whose requests leave later than this (p99) is itself what is measured."""
POINTS_MAX: Final = 400
HEAT_ROWS_MAX: Final = 128
HEAT_COLUMNS_MAX: Final = 150
HEAT_COLUMNS: Final = 30
"""A thin load gets fewer columns, but as many as these."""
HEAT_REQUESTS: Final = 10
"""Cells should hold so many requests: fewer, and chance is all that is seen."""


@dataclass(frozen=True)
class Heat:
    """Good answers per shard and time. Where there are many shards a row is several neighbours: `per_row` of them."""

    rows: Sequence[Sequence[int]]
    per_row: int
    column_s: float
    end_s: float

    def rate(self, row: int, column: int) -> float:
        """Good answers per second of one shard of that row, on average."""
        is_last = column == len(self.rows[row]) - 1
        span_s = max(self.end_s - column * self.column_s, 0.05) if is_last else self.column_s
        return self.rows[row][column] / (self.per_row * span_s)


@dataclass(frozen=True)
class Run:
    """What a run has gathered."""

    options: Options
    harvest: Harvest
    story: Story
    shards: int
    marks: Sequence[Mark]
    losses: Sequence[tuple[float, str]]
    ended_s: float
    """When the last request was due, about."""
    verify: Verify | None
    verify_note: str
    promises: Sequence[Promise]
    started: str
    settings: Mapping[str, object]
    machine: Mapping[str, object]
    command: str


def reckon(run: Run) -> Result:
    """The result, judged."""
    harvest, samples = run.harvest, run.harvest.samples
    by_shard = ByShard(samples)
    end_s = max(run.ended_s, 1e-3)
    changes = run.story.changes(end_s)
    moved = moves(changes, by_shard)
    losses = [Loss(at_s, worker, _lost(run.story, at_s, worker)) for at_s, worker in run.losses]
    failovers = failovers_ms(changes, losses, by_shard, end_s)
    points, total = _points(samples, end_s)
    p50, p90, p99, p999, longest = percentiles_ms(total, [50, 90, 99, 99.9, 100])
    ok = sum(flags & OK for flags in samples.flags)
    result = Result(
        scenario=run.options.scenario,
        rate_rps=round(run.options.mean_rate, 3),
        sent=harvest.sent,
        ok=ok,
        failed=harvest.sent - ok,
        latency_ms=Latency(p50, p90, p99, p999, longest),
        per_shard=_per_shard(samples, run.shards, end_s, run.story.leaders_at(end_s + 1)),
        moves=moved,
        failover_ms=failovers,
        verify=run.verify,
        verify_note=run.verify_note,
        seen=Seen(len(harvest.leaderships), list(harvest.violations)),
        is_kept=True,
        promises=(),
        started=run.started,
        duration_s=round(end_s, 3),
        rates_rps=list(run.options.rates),
        throughput_rps=round(ok / end_s, 1),
        pause_ms=Quantiles.of([move.pause_ms for move in moved if move.requests or move.leaderless_ms]),
        failover=Quantiles.of(failovers),
        failures=dict(Counter(harvest.reasons).most_common()),
        failure_examples=list(harvest.examples),
        marks=list(run.marks),
        generators=_generators(harvest, run.options),
        seconds=points,
        settings=run.settings,
        machine=run.machine,
        command=run.command,
    )
    verdicts = [promise.verdict(result) for promise in run.promises]
    return replace(
        result,
        promises=verdicts,
        is_kept=all(verdict.is_kept for verdict in verdicts),
        warnings=_warnings(result),
    )


def heat(samples: Samples, shards: int, end_s: float) -> Heat:
    """Good answers per shard and time, by when their requests were due."""
    per_row = max(1, math.ceil(shards / HEAT_ROWS_MAX))
    thin_s = HEAT_REQUESTS * shards * end_s / (per_row * max(len(samples), 1))  # a cell of that has enough to compare
    column_s = max(
        0.5, math.ceil(2 * end_s / HEAT_COLUMNS_MAX) / 2, min(math.ceil(2 * thin_s) / 2, end_s / HEAT_COLUMNS)
    )
    columns = max(1, round(end_s / column_s))
    rows = [array("I", bytes(4 * columns)) for _ in range(math.ceil(shards / per_row))]
    width_us = column_s * 1e6
    for due_us, shard, flags in zip(samples.due_us, samples.shard, samples.flags, strict=True):
        if flags & OK:
            rows[shard // per_row][min(int(due_us / width_us), columns - 1)] += 1
    return Heat(rows, per_row, column_s, end_s)


def percentile_curve(samples: Samples) -> list[tuple[float, float]]:
    """(per cent, ms) at closer and closer steps towards 100, as HDR histograms are drawn."""
    total = fine()
    for latency_us in samples.latency_us:
        record(total, latency_us)
    if not total.total_count:
        return []
    points: list[float] = []
    share = 1.0
    while total.total_count * share >= 1 and share > 1e-6:
        points += [100 * (1 - share * factor) for factor in (1.0, 0.75, 0.5, 0.35, 0.2, 0.14)]
        share /= 10
    points = sorted({round(max(point, 1.0), 6) for point in points})
    return list(zip(points, percentiles_ms(total, points), strict=True))


def _lost(story: Story, at_s: float, worker: str) -> frozenset[int]:
    """What `worker` led then; if it is not known who was lost: every shard that loses its leader before long."""
    if worker:
        return frozenset(shard for shard, leader in story.leaders_at(at_s).items() if leader == worker)
    return frozenset(shard for mark_s, shard, leader in story.marks if leader is None and mark_s >= at_s)


def _points(samples: Samples, end_s: float) -> tuple[list[Point], Any]:
    """A point for each second (or more, in a long run), and the histogram of them all."""
    width_s = max(1, math.ceil(end_s / POINTS_MAX))
    count = max(1, round(end_s / width_s))  # a rest of less than half a point belongs to the last one
    histograms: list[Any] = [None] * count
    failed = [0] * count
    for due_us, latency_us, flags in zip(samples.due_us, samples.latency_us, samples.flags, strict=True):
        at = min(due_us // (width_s * 1_000_000), count - 1)
        if histograms[at] is None:
            histograms[at] = fine()
        record(histograms[at], latency_us)
        failed[at] += not flags & OK
    points = []
    for at, histogram in enumerate(histograms):
        if histogram is None:
            points.append(Point(float(at * width_s), 0, 0, 0.0, 0.0, 0.0))
        else:
            p50, p99, longest = percentiles_ms(histogram, [50, 99, 100])
            points.append(Point(float(at * width_s), histogram.total_count, failed[at], p50, p99, longest))
    return points, merged(histogram for histogram in histograms if histogram is not None)


def _per_shard(samples: Samples, shards: int, end_s: float, leaders: Mapping[int, str]) -> list[ShardLoad]:
    histograms: list[Any] = [None] * shards
    good = [0] * shards
    for latency_us, shard, flags in zip(samples.latency_us, samples.shard, samples.flags, strict=True):
        if histograms[shard] is None:
            histograms[shard] = coarse()
        record(histograms[shard], latency_us)
        good[shard] += flags & OK
    rows = []
    for shard, histogram in enumerate(histograms):
        requests = 0 if histogram is None else histogram.total_count
        rows.append(
            ShardLoad(
                shard=shard,
                requests=requests,
                throughput_rps=round(good[shard] / end_s, 3),
                p99_ms=0.0 if histogram is None else percentiles_ms(histogram, [99])[0],
                failed=requests - good[shard],
                leader=leaders.get(shard, ""),
            )
        )
    return rows


def _generators(harvest: Harvest, options: Options) -> Generators:
    p50, p99, longest = percentiles_ms(harvest.lags, [50, 99, 100])
    return Generators(options.generator_count, p50, p99, longest, round(harvest.cpu_s, 3), p99 > LATE_MS)


def _warnings(result: Result) -> list[str]:
    found = []
    if result.generators.is_late:
        found.append(
            f"the generators ran late (p99 {result.generators.lag_p99_ms:.0f} ms): latencies contain the wait for a "
            "processor; take a lower --rate, more --generators, or a larger machine"
        )
    blind = sum(not move.requests for move in result.moves)
    if result.moves and blind > len(result.moves) / 2:
        found.append(
            f"{blind} of {len(result.moves)} moves were met by no request, so their pause is not known: "
            "take a higher --rate or fewer --shards"
        )
    return found
