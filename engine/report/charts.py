"""Line charts as SVG, written by hand: axes with round numbers, a limit, gaps.

Colours are the page's CSS variables, so a chart has the colours of its light or dark theme.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 340, 190  # of a chart; a page shows it at about this size in pixels
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 10, 34  # margins of the plot
END, FLOOR = WIDTH - RIGHT, HEIGHT - BOTTOM
DOTS_BELOW = 25  # a line with fewer points shows them
SMOOTH_ABOVE = 40  # a line with more points is faint, under a line of means
FAINT_POINTS, SMOOTH_POINTS = 300, 30  # most points of a faint line, and of its means

Place = Callable[[float, float], tuple[float, float]]  # from a value's to the drawing's x and y


@dataclass(frozen=True)
class Line:
    """A series to draw."""

    name: str
    colour: str  # a CSS colour
    x: Sequence[float]
    y: Sequence[float]  # NaN where nothing was logged


def line_chart(lines: Sequence[Line], label: str, limit: float | None = None) -> str:
    """An SVG of the lines against steps from 0.

    label: a text for screen readers. limit: a dotted horizontal line.
    """
    last = max([1, *(x for line in lines for x in line.x)])
    values = [value for line in lines for value in line.y if math.isfinite(value)]
    values += [] if limit is None else [limit]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if math.isclose(low, high, rel_tol=1e-6) or 0 < low < 0.7 * high:  # 0 is near
        low, high = min(low, 0.0), max(high, 0.0)
    y_ticks = ticks(low, high, count=4)

    def place(x: float, y: float) -> tuple[float, float]:
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + x / last * (END - LEFT), FLOOR - up * (FLOOR - TOP)

    x_ticks = [x for x in ticks(0, last, count=5) if x <= last and x % 1 == 0]
    parts = [_axes(x_ticks, y_ticks, place)]
    if limit is not None:
        parts.append(f'<path class="limit" d="M{LEFT} {place(0, limit)[1]:.1f}H{END}"/>')
    parts += [_curve(line, place) for line in lines]
    opening = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label='
    return f'{opening}"{html.escape(label)}">{"".join(parts)}</svg>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, the first at or below low and the last at or above high."""
    rough = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.9g}") for k in range(first, max(last, first + 1) + 1)]


def means(values: Sequence[float], most: int) -> list[float]:
    """The values, or the means of `most` stretches of them, NaN left out; NaN if all are."""
    if len(values) <= most:
        return list(values)
    parts = np.array_split(np.asarray(values, dtype=float), most)
    known = [part[np.isfinite(part)] for part in parts]
    return [float(part.mean()) if len(part) else math.nan for part in known]


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float], place: Place) -> str:
    """Fine horizontal lines at the values, and numbers at both axes."""
    parts = [f'<text class="x" x="{(LEFT + END) / 2}" y="{HEIGHT - 4}">step</text>']
    for value in y_ticks:
        y, kind = place(0, value)[1], "axis" if value == y_ticks[0] else "grid"
        parts.append(f'<path class="{kind}" d="M{LEFT} {y:.1f}H{END}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 3.5:.1f}">{value:g}</text>')
    for value in x_ticks:
        x = place(value, y_ticks[0])[0]
        parts.append(f'<text class="x" x="{x:.1f}" y="{FLOOR + 14}">{value:g}</text>')
    return "".join(parts)


def _curve(line: Line, place: Place) -> str:
    """The line. A long one is faint under its means, and a short one shows its points."""
    name = html.escape(line.name)
    parts, drawn = [f"<title>{name}</title>"], [("line", FAINT_POINTS)]
    if len(line.x) > SMOOTH_ABOVE:
        drawn = [("line faint", FAINT_POINTS), ("line", SMOOTH_POINTS)]
    for kind, most in drawn:
        path = _path(means(line.x, most), means(line.y, most), place)
        parts.append(f'<path class="{kind}" stroke="{line.colour}" d="{path}"/>')
    for step, value in zip(line.x, line.y) if len(line.x) < DOTS_BELOW else ():
        if math.isfinite(value):
            centre = 'cx="{:.1f}" cy="{:.1f}"'.format(*place(step, value))
            title = f"<title>{name}, {step:g}: {value:.4g}</title>"
            parts.append(f'<circle {centre} r="2.6" fill="{line.colour}">{title}</circle>')
    return f"<g>{''.join(parts)}</g>"


def _path(x: Sequence[float], y: Sequence[float], place: Place) -> str:
    """A path through the points, with a gap where a value is NaN."""
    path, command = "", "M"
    for point in zip(x, y, strict=True):
        if math.isfinite(point[1]):
            path += "{}{:.1f} {:.1f}".format(command, *place(*point))
        command = "L" if math.isfinite(point[1]) else "M"
    return path
