"""The report's charts, each made of one result's figures. Where there are ten thousand shards each stays readable.

Law: nothing is smoothed or left out without a word in the chart's own note.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

from loadtest.charts import (
    BOTTOM,
    LEFT,
    LOG_FLOOR_MS,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    NumberedMark,
    Scale,
    at,
    frame,
    linear_scale,
    log_scale,
    number,
    shades,
)
from loadtest.leadership import Story
from loadtest.reckon import Heat
from loadtest.result import Mark, Result, ShardLoad
from loadtest.style import WORKER_COLOURS

BARS_MAX: Final = 200
LANES_MAX: Final = 96
DOTS_MAX: Final = 1_000
Numbered = Sequence[NumberedMark]


class Colours:
    """Each worker's colour, by the order in which they came."""

    def __init__(self, workers: Sequence[str]) -> None:
        self._of = {worker: index % len(WORKER_COLOURS) for index, worker in enumerate(workers)}

    @property
    def workers(self) -> list[str]:
        return list(self._of)

    def css(self, worker: str | None) -> str:
        """The class of a worker's shapes; a shade of its own for nobody."""
        return "nobody" if not worker else f"w{self._of.get(worker, 0)}"


def numbered(marks: Sequence[Mark]) -> Numbered:
    """The marks with their numbers, from 1."""
    return [NumberedMark(mark.at_s, mark.text, number, mark.is_fault) for number, mark in enumerate(marks, 1)]


def workers_of(result: Result, story: Story) -> list[str]:
    """Every worker that led something, in the order of their names' numbers."""
    names = set(story.begin.values()) | {worker for _, _, worker in story.marks if worker}
    names |= {row.leader for row in result.per_shard if row.leader}
    return sorted(names, key=lambda name: (len(name), name))


# --- throughput ------------------------------------------------------------------------------------------------


def shard_bars(result: Result, colours: Colours) -> str:
    """A bar for each shard: good answers per second, coloured by who leads it at the end, failures on top."""
    rows = result.per_shard
    if len(rows) > BARS_MAX:
        return _ranked(rows, colours)
    seconds = max(result.duration_s, 1e-3)
    high = max((row.requests / seconds for row in rows), default=1.0)
    chart = frame("Throughput of each shard", 250, (0, len(rows)), lambda low, top: linear_scale(high, low, top))
    chart.axis_y("requests/s")
    step = max(1, math.ceil(len(rows) / 32))
    chart.axis_x("shard", [(index + 0.5, str(rows[index].shard)) for index in range(0, len(rows), step)])
    width = max((chart.x(1) - chart.x(0)) * 0.82, 0.5)
    for index, row in enumerate(rows):
        x, y = chart.x(index + 0.5) - width / 2, chart.y(row.throughput_rps)
        words = (
            f"shard {row.shard} of {row.leader or 'nobody'}: {row.throughput_rps:.1f}/s, "
            f"{row.requests:,} requests, p99 {row.p99_ms:.1f} ms, {row.failed} failed"
        )
        chart.add(
            f'<rect x="{at(x)}" y="{at(y)}" width="{at(width)}" height="{at(chart.y.begin - y)}" '
            f'class="{colours.css(row.leader)}"><title>{escape(words)}</title></rect>'
        )
        if row.failed:
            top = chart.y(row.requests / seconds)
            height = max(y - top, 2.0)
            chart.add(
                f'<rect x="{at(x)}" y="{at(y - height)}" width="{at(width)}" height="{at(height)}" class="failed">'
                f"<title>shard {row.shard}: {row.failed} failed</title></rect>"
            )
    _median(chart, [row.throughput_rps for row in rows])
    return chart.svg()


def _ranked(rows: Sequence[ShardLoad], colours: Colours) -> str:
    """For many shards: all of them by their throughput, from the busiest to the quietest."""
    ranked = sorted(rows, key=lambda row: -row.throughput_rps)
    high = ranked[0].throughput_rps if ranked else 1.0
    chart = frame("Throughput by rank", 250, (0, len(ranked)), lambda low, top: linear_scale(high, low, top))
    chart.axis_y("requests/s")
    chart.axis_x("shards, the busiest first")
    step = max(1, len(ranked) // 1000)
    points = [(float(index), ranked[index].throughput_rps) for index in range(0, len(ranked), step)]
    path = "L".join(f"{at(chart.x(x))} {at(chart.y(y))}" for x, y in points)
    base = at(chart.y.begin)
    chart.add(f'<path d="M{at(chart.x(0))} {base}L{path}L{at(chart.x(points[-1][0]))} {base}z" class="area"/>')
    chart.line(points, "p50")
    _median(chart, [row.throughput_rps for row in rows])
    for index in range(min(3, len(ranked))):
        row = ranked[index]
        chart.add(
            f'<circle cx="{at(chart.x(index))}" cy="{at(chart.y(row.throughput_rps))}" r="4" '
            f'class="{colours.css(row.leader)}"><title>shard {row.shard}: {row.throughput_rps:.1f}/s</title></circle>'
        )
    return chart.svg()


def _median(chart: Chart, values: Sequence[float]) -> None:
    if values:
        middle = sorted(values)[(len(values) - 1) // 2]
        y = chart.y(middle)
        chart.add(f'<path d="M{at(chart.x.begin)} {at(y)}H{at(chart.x.end)}" class="median"/>')
        chart.text(chart.x.end + 6, y + 4, f"median {number(middle)}", "label median-text")


def heat_map(result: Result, heat: Heat, marks: Numbered) -> str:
    """Shards down, time across: how bright a cell is says how many good answers a shard gave per second."""
    columns = max((len(row) for row in heat.rows), default=1)
    rates = [[heat.rate(row, column) for column in range(columns)] for row in range(len(heat.rows))]
    found = sorted(rate for row in rates for rate in row if rate > 0)
    high = found[int(len(found) * 0.99)] if found else 1.0
    row_height = max(3.0, min(9.0, 460 / max(1, len(rates))))
    height = TOP + BOTTOM + row_height * len(rates)
    across = Scale(0, max(result.duration_s, 1e-3), LEFT, WIDTH - RIGHT)
    chart = Chart("Throughput of each shard over time", height, across, Scale(0, len(rates), TOP, height - BOTTOM))
    shades(chart, rates, TOP, row_height, heat.column_s, high)
    step = max(1, math.ceil(len(rates) / 16))
    for row in range(0, len(rates), step):
        chart.text(LEFT - 8, TOP + row * row_height + row_height / 2 + 4, str(row * heat.per_row), "tick", "end")
    chart.text(LEFT - 8, TOP - 10, "shard", "tick unit", "end")
    chart.y = Scale(0, 1, height - BOTTOM, TOP)
    chart.axis_x("s")
    chart.marks(marks)
    for shade in range(8):
        x = WIDTH - RIGHT + 12
        chart.add(f'<rect x="{at(x)}" y="{at(TOP + 96 - shade * 12)}" width="14" height="12" class="heat{shade}"/>')
    chart.text(WIDTH - RIGHT + 31, TOP + 20, f"{number(high)}/s", "tick")
    chart.text(WIDTH - RIGHT + 31, TOP + 108, "0", "tick")
    return chart.svg()


def rate_over_time(result: Result, marks: Numbered) -> str:
    """Good answers per second in all, and failures."""
    width_s = _width_s(result)
    points = result.seconds
    high = max((point.sent / width_s for point in points), default=1.0)
    chart = frame("Requests per second", 170, (0, result.duration_s), lambda low, top: linear_scale(high, low, top))
    chart.axis_y("requests/s")
    chart.axis_x("s")
    good = [
        (point.at_s + width_s / 2, (point.sent - point.failed) / _span_s(result, point.at_s, width_s))
        for point in points
    ]
    if good:
        path = "L".join(f"{at(chart.x(x))} {at(chart.y(y))}" for x, y in good)
        base = at(chart.y.begin)
        chart.add(
            f'<path d="M{at(chart.x(good[0][0]))} {base}L{path}L{at(chart.x(good[-1][0]))} {base}z" class="area"/>'
        )
    chart.line(good, "p50", "ok")
    for point in points:
        if point.failed:
            x, right = chart.x(point.at_s), chart.x(point.at_s + width_s)
            y = chart.y(point.failed / width_s)
            chart.add(
                f'<rect x="{at(x)}" y="{at(min(y, chart.y.begin - 3))}" width="{at(max(right - x - 0.5, 1))}" '
                f'height="{at(max(chart.y.begin - y, 3))}" class="failed"><title>{point.at_s:.0f} s: '
                f"{point.failed} failed</title></rect>"
            )
    chart.marks(marks)
    return chart.svg()


def _width_s(result: Result) -> float:
    points = result.seconds
    return points[1].at_s - points[0].at_s if len(points) > 1 else max(result.duration_s, 1.0)


def _span_s(result: Result, at_s: float, width_s: float) -> float:
    """How much time a point stands for: the last one has what is left."""
    is_last = at_s == result.seconds[-1].at_s
    return max(result.duration_s - at_s, 0.05) if is_last else width_s


# --- latency ---------------------------------------------------------------------------------------------------


def latency_over_time(result: Result, marks: Numbered) -> str:
    """p50, p99 and the longest of each second, on a logarithmic scale."""
    points = [point for point in result.seconds if point.sent]
    values = [value for point in points for value in (point.p50_ms, point.p99_ms, point.max_ms)]
    chart = frame("Latency over time", 300, (0, result.duration_s), lambda low, top: log_scale(values, low, top))
    chart.axis_y("ms")
    chart.axis_x("s")
    middle = _width_s(result) / 2
    at_s = [min(point.at_s + middle, result.duration_s) for point in points]
    chart.line(list(zip(at_s, [point.max_ms for point in points], strict=True)), "max", "max")
    chart.line(list(zip(at_s, [point.p99_ms for point in points], strict=True)), "p99", "p99")
    chart.line(list(zip(at_s, [point.p50_ms for point in points], strict=True)), "p50", "p50")
    chart.marks(marks)
    return chart.svg()


def percentiles(curve: Sequence[tuple[float, float]]) -> str:
    """Latency by percentile, as HDR histograms are drawn: each step to the right is ten times rarer."""
    if not curve:
        return ""
    rarest = max(-math.log10(max(1 - point / 100, 1e-9)) for point, _ in curve)
    chart = frame(
        "Latency by percentile",
        300,
        (0, max(rarest, 1.0)),
        lambda low, top: log_scale([value for _, value in curve], low, top),
    )
    chart.axis_y("ms")
    names = ["0 %", "90 %", "99 %", "99.9 %", "99.99 %", "99.999 %", "99.9999 %"]
    ticks = [(float(power), names[power]) for power in range(min(len(names), int(max(rarest, 1.0)) + 1))]
    chart.axis_x("", [*ticks, (-math.log10(0.5), "50 %")])
    chart.line([(-math.log10(max(1 - point / 100, 1e-9)), value) for point, value in curve], "p50")
    for point, value in curve:
        if any(math.isclose(point, wanted, abs_tol=1e-6) for wanted in (50, 90, 99, 99.9, 99.99)):
            x, y = chart.x(-math.log10(1 - point / 100)), chart.y(value)
            chart.add(f'<circle cx="{at(x)}" cy="{at(y)}" r="3.5" class="handoff"/>')
            chart.text(x - 6, y - 8, f"{number(value)} ms", "label p50", "end")
    return chart.svg()


# --- leadership ------------------------------------------------------------------------------------------------


def counts_over_time(result: Result, story: Story, shards: int, colours: Colours, marks: Numbered) -> str:
    """How many shards each worker leads, one on top of the other; a gap at the top are shards without a leader."""
    chart = frame("Shards by leader", 190, (0, result.duration_s), lambda low, top: Scale(0, shards, low, top))
    chart.axis_y("shards")
    chart.axis_x("s")
    steps = [(at_s, counts) for at_s, counts in story.counts() if at_s <= result.duration_s]
    base = [0] * len(steps)
    for worker in colours.workers:
        lower = list(base)
        for index, (_, counts) in enumerate(steps):
            base[index] += counts.get(worker, 0)
        if base == lower:
            continue
        up, down = [], []
        for index, (at_s, _) in enumerate(steps):
            x, end = (
                chart.x(max(at_s, 0)),
                chart.x(steps[index + 1][0] if index + 1 < len(steps) else result.duration_s),
            )
            up.append(f"{at(x)} {at(chart.y(base[index]))}H{at(end)}")
            down.append(f"{at(end)} {at(chart.y(lower[index]))}H{at(x)}")
        chart.add(
            f'<path d="M{"L".join(up)}L{"L".join(reversed(down))}z" class="{colours.css(worker)}">'
            f"<title>{escape(worker)}</title></path>"
        )
    chart.marks(marks)
    return chart.svg()


def lanes(result: Result, story: Story, shards: int, colours: Colours, marks: Numbered) -> tuple[str, str]:
    """A lane for each shard in its leader's colour, and a note; of many shards only those that changed hands."""
    changed = sorted({shard for _, shard, _ in story.marks})
    shown = list(range(shards)) if shards <= LANES_MAX else changed[:LANES_MAX]
    note = ""
    if shards > LANES_MAX:
        note = f"{len(shown)} of the {len(changed)} shards that changed hands, of {shards:,}."
        if not shown:
            return "", f"No shard of {shards:,} changed hands."
    row_height = max(3.5, min(11.0, 620 / len(shown)))
    height = TOP + BOTTOM + row_height * len(shown)
    across = Scale(0, max(result.duration_s, 1e-3), LEFT, WIDTH - RIGHT)
    chart = Chart("Who led which shard", height, across, Scale(0, 1, height - BOTTOM, TOP))
    by_shard: dict[int, list[tuple[float, str | None]]] = {shard: [(0.0, story.begin.get(shard))] for shard in shown}
    for at_s, shard, worker in story.marks:
        if shard in by_shard and at_s <= result.duration_s:
            by_shard[shard].append((max(at_s, 0.0), worker))
    boxes: dict[str, list[str]] = {}
    for row, shard in enumerate(shown):
        spans = by_shard[shard]
        y = TOP + row * row_height
        for index, (at_s, worker) in enumerate(spans):
            x = chart.x(at_s)
            end = chart.x(spans[index + 1][0] if index + 1 < len(spans) else result.duration_s)
            width = max(end - x, 1.0 if worker is None else 0.1)
            boxes.setdefault(colours.css(worker), []).append(
                f"M{at(x)} {at(y)}h{width:.1f}v{at(row_height - 1)}h-{width:.1f}z"
            )
    for css, paths in sorted(boxes.items(), key=lambda item: item[0] == "nobody"):
        chart.add(f'<path d="{"".join(paths)}" class="{css}"/>')
    step = max(1, math.ceil(len(shown) / 24))
    for row in range(0, len(shown), step):
        chart.text(LEFT - 8, TOP + row * row_height + row_height / 2 + 4, str(shown[row]), "tick", "end")
    chart.text(LEFT - 8, TOP - 10, "shard", "tick unit", "end")
    chart.axis_x("s")
    chart.marks(marks)
    return chart.svg(), note


def pauses(result: Result, marks: Numbered, limit_ms: float | None) -> str:
    """A dot for each move that a request met: when, and how long it was felt."""
    moves = [move for move in result.moves if move.requests or move.leaderless_ms]
    values = [move.pause_ms for move in moves] + ([limit_ms] if limit_ms else [])
    chart = frame("Pause of each move", 250, (0, result.duration_s), lambda low, top: log_scale(values, low, top))
    chart.axis_y("ms")
    chart.axis_x("s")
    chart.marks(marks)
    if limit_ms:
        chart.level(limit_ms, f"{number(limit_ms)} ms")
    step = max(1, math.ceil(len(moves) / DOTS_MAX))
    for move in sorted(moves, key=lambda move: -move.pause_ms)[::step]:
        words = (
            f"shard {move.shard}, {move.source} to {move.target} at {move.at_s:.2f} s: {move.pause_ms:.1f} ms "
            f"({move.requests} requests around it, without a leader {move.leaderless_ms:.1f} ms)"
        )
        css = "handoff" if move.is_handoff else "claim"
        chart.add(
            f'<circle cx="{at(chart.x(move.at_s))}" cy="{at(chart.y(max(move.pause_ms, LOG_FLOOR_MS)))}" r="4.2" '
            f'class="{css}"><title>{escape(words)}</title></circle>'
        )
    return chart.svg()


def failovers(result: Result, limit_ms: float | None) -> str:
    """Each lost shard's time without service, the shortest first."""
    values = sorted(result.failover_ms)
    high = max([*values, *([limit_ms] if limit_ms else [])], default=1.0)
    chart = frame("Failover of each lost shard", 220, (0, len(values)), lambda low, top: linear_scale(high, low, top))
    chart.axis_y("ms")
    chart.axis_x("lost shards, the quickest first", [])
    step = max(1, math.ceil(len(values) / 400))
    shown = values[::step]
    width = (chart.x.end - chart.x.begin) / max(1, len(shown))
    for index, value in enumerate(shown):
        y = chart.y(value)
        chart.add(
            f'<rect x="{at(chart.x.begin + index * width)}" y="{at(y)}" width="{at(max(width * 0.84, 0.6))}" '
            f'height="{at(chart.y.begin - y)}" class="claim"><title>{value:.0f} ms</title></rect>'
        )
    if limit_ms:
        chart.level(limit_ms, f"{number(limit_ms)} ms")
    return chart.svg()


def legend(colours: Colours, counts: Mapping[str, int]) -> str:
    """Which colour is which worker, with what it led at the end."""
    items = "".join(
        f'<li><i class="{colours.css(worker)}"></i>{escape(worker)} '
        f'<span class="soft">({counts.get(worker, 0)} at the end)</span></li>'
        for worker in colours.workers
    )
    return f'<ul class="legend">{items}<li><i class="nobody"></i>nobody</li></ul>'
