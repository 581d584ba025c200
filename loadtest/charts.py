"""Inline SVG by small functions: scales, axes, and the kinds of chart that the report needs.

Law: pure text out of numbers. Colours are the page's CSS variables, so that one drawing serves light and dark; what a
shape means is in its <title>, which browsers show on hover and screen readers read. Nothing here needs a script.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

WIDTH: Final = 1060.0
LEFT: Final = 62.0
RIGHT: Final = 100.0
BOTTOM: Final = 34.0
TOP: Final = 24.0
SHADES: Final = 8
LOG_FLOOR_MS: Final = 0.05


@dataclass(frozen=True)
class Scale:
    """Maps values from low to high to pixels from begin to end; by their logarithm if `is_log`."""

    low: float
    high: float
    begin: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        share = 0.0 if high == low else (value - low) / (high - low)
        return self.begin + min(max(share, 0.0), 1.0) * (self.end - self.begin)

    def ticks(self, count: int = 6) -> list[float]:
        """Round values between low and high: powers of ten on a logarithmic scale, else steps of 1, 2 or 5."""
        if self.is_log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers]
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        step = 10 ** math.floor(math.log10(span / count))
        step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def log_scale(values: Iterable[float], begin: float, end: float) -> Scale:
    """A logarithmic scale in whole powers of ten around `values`."""
    found = [max(value, LOG_FLOOR_MS) for value in values]
    low, high = min(found, default=1.0), max(found, default=10.0)
    low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high) + 1e-9)
    return Scale(low, max(high, low * 10), begin, end, is_log=True)


def linear_scale(high: float, begin: float, end: float, low: float = 0.0) -> Scale:
    """A linear scale from `low` to a little above `high`."""
    return Scale(low, high * 1.06 if high > low else low + 1.0, begin, end)


def number(value: float) -> str:
    """As short as it can be said: 1200 as 1.2k, 0.05 as 0.05, 3.0 as 3."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def at(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class NumberedMark:
    """Something that was done to the cluster, and its number in the drawings."""

    at_s: float
    text: str
    number: int
    is_fault: bool


@dataclass
class Chart:
    """One drawing with its axes. `parts` grows; `svg` is the whole."""

    title: str
    height: float
    x: Scale
    y: Scale
    width: float = WIDTH
    parts: list[str] = field(default_factory=list)
    _labels: list[tuple[float, float, str, str]] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.parts.append(text)

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start") -> None:
        """Words at a place."""
        self.add(f'<text x="{at(x)}" y="{at(y)}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>')

    def axis_y(self, unit: str = "", label: Callable[[float], str] = number) -> None:
        """Lines across at each tick, with their values and the unit above."""
        for tick in self.y.ticks():
            y = self.y(tick)
            self.add(f'<path d="M{at(self.x.begin)} {at(y)}H{at(self.x.end)}" class="grid"/>')
            self.text(self.x.begin - 8, y + 4, label(tick), "tick", "end")
        if unit:
            self.text(0, self.y.end - 10, unit, "tick unit")

    def axis_x(self, unit: str = "", ticks: Sequence[tuple[float, str]] | None = None) -> None:
        """Values under the chart."""
        shown = ticks if ticks is not None else [(tick, number(tick)) for tick in self.x.ticks(10)]
        for tick, label in shown:
            x = self.x(tick)
            self.add(f'<path d="M{at(x)} {at(self.y.begin)}v5" class="axis"/>')
            self.text(x, self.y.begin + 19, label, "tick", "middle")
        self.add(f'<path d="M{at(self.x.begin)} {at(self.y.begin)}H{at(self.x.end)}" class="axis"/>')
        if unit:
            self.text(self.x.end, self.y.begin + 32, unit, "tick unit", "end")

    def marks(self, marks: Sequence["NumberedMark"]) -> None:
        """Vertical lines with their numbers above; of numbers that would cover each other the first is shown."""
        last = -math.inf
        for mark in marks:
            x = self.x(mark.at_s)
            self.add(
                f'<g class="{"fault" if mark.is_fault else "event"}"><title>{escape(f"{mark.at_s:.1f} s: {mark.text}")}'
                f'</title><path d="M{at(x)} {at(self.y.end - 4)}V{at(self.y.begin)}"/>'
            )
            if x - last > 15:
                self.add(f'<circle cx="{at(x)}" cy="{at(self.y.end - 11)}" r="7.5"/>')
                self.add(f'<text x="{at(x)}" y="{at(self.y.end - 7)}" text-anchor="middle">{mark.number}</text>')
                last = x
            self.add("</g>")

    def line(self, points: Sequence[tuple[float, float]], css: str, label: str = "") -> None:
        """A line through (x, y), with its name at its end."""
        if not points:
            return
        path = "L".join(f"{at(self.x(x))} {at(self.y(y))}" for x, y in points)
        self.add(f'<path d="M{path}" class="line {css}"><title>{escape(label)}</title></path>')
        if label:
            x, y = points[-1]
            self._labels.append((self.y(y) + 4, self.x(x) + 6, label, f"label {css}"))

    def level(self, value: float, text: str) -> None:
        """A dashed line across, for a limit."""
        if self.y.low <= value <= self.y.high:
            y = self.y(value)
            self.add(f'<path d="M{at(self.x.begin)} {at(y)}H{at(self.x.end)}" class="limit"/>')
            self.text(self.x.end + 6, y + 4, text, "label limit-text")

    def svg(self) -> str:
        """The drawing."""
        low = -math.inf
        for y, x, label, css in sorted(self._labels):  # names of lines that end together stand below each other
            low = max(y, low + 13)
            self.text(x, low, label, css)
        self._labels.clear()
        return (
            f'<svg viewBox="0 0 {at(self.width)} {at(self.height)}" role="img" aria-label="{escape(self.title)}">'
            f"{''.join(self.parts)}</svg>"
        )


def frame(title: str, height: float, x: tuple[float, float], y: Callable[[float, float], Scale]) -> Chart:
    """An empty chart whose x goes linearly from x[0] to x[1]; `y` makes its scale from the bottom to the top pixel."""
    across = Scale(x[0], max(x[1], x[0] + 1e-9), LEFT, WIDTH - RIGHT)
    return Chart(title, height, across, y(height - BOTTOM, TOP))


def shades(
    chart: Chart, rows: Sequence[Sequence[float]], top: float, row_height: float, column_s: float, high: float
) -> None:
    """A heat map: one path for each of SHADES shades, of runs of equal cells, so that it stays small. `high` is the
    value of the darkest one; what is 0 is left out."""
    runs: list[list[str]] = [[] for _ in range(SHADES)]
    for row, values in enumerate(rows):
        y = top + row * row_height
        column = 0
        while column < len(values):
            shade = _shade(values[column], high)
            end = column + 1
            while end < len(values) and _shade(values[end], high) == shade:
                end += 1
            if shade >= 0:
                x = chart.x(column * column_s)
                right = chart.x.end if end == len(values) else chart.x(end * column_s)  # the last has what is left
                runs[shade].append(f"M{at(x)} {at(y)}h{at(right - x)}v{at(row_height - 0.4)}h-{at(right - x)}z")
            column = end
    for shade, run in enumerate(runs):
        if run:
            chart.add(f'<path d="{"".join(run)}" class="heat{shade}"/>')


def _shade(value: float, high: float) -> int:
    if value <= 0 or high <= 0:
        return -1
    return min(SHADES - 1, int(value / high * SHADES))
