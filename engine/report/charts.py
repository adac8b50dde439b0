"""Line charts as SVG, written by hand: axes with round numbers, a limit, a spread, gaps.

Colours are the page's CSS variables, so a chart follows its light and its dark theme.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 340, 190  # of a chart; a page shows it at about this size in pixels
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 10, 34  # margins of the plot
MAX_POINTS = 300  # of a line; more are averaged
DOTS_BELOW = 25  # lines with fewer points show them
SMOOTH_ABOVE = 40  # lines with more points are drawn faintly, under their running mean

Box = tuple[float, float, float, float]  # least x, largest x, least y, largest y of the data
Points = list[tuple[float, float]]  # of the drawing


@dataclass(frozen=True)
class Line:
    """A series to draw."""

    name: str
    x: Sequence[float]
    y: Sequence[float]  # NaN where nothing was logged
    colour: str  # a CSS colour
    spread: Sequence[float] | None = None  # of the values at each x, drawn as a band
    dashed: bool = False


def line_chart(
    lines: Sequence[Line],
    label: str,
    *,
    limit: float | None = None,
    y_range: tuple[float, float] | None = None,
    x_label: str = "step",
) -> str:
    """An SVG of the lines.

    label: what a screen reader says of it. limit: a dotted horizontal line. y_range: of the
    vertical axis, if it is known beforehand; what lies beyond is cut.
    """
    lines = [_averaged(line) for line in lines]
    first, last = _range([line.x for line in lines])
    last = max(last, first + 1)
    x_ticks = [x for x in ticks(first, last, count=5, whole=True) if first <= x <= last]
    y_ticks = ticks(*(y_range or _y_range(lines, limit)), count=4)
    box = (first, last, y_ticks[0], y_ticks[-1])
    parts = [_axes(x_ticks, y_ticks, box, x_label)]
    parts += [_band(line, box) for line in lines if line.spread is not None]
    if limit is not None:
        y = _place(box, 0, limit)[1]
        parts.append(f'<path class="limit" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
    parts += [_curve(line, box) for line in lines]
    opening = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label='
    return f'{opening}"{html.escape(label)}">{"".join(parts)}</svg>'


def ticks(low: float, high: float, *, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers, the first at or below low and the last at or above high."""
    size = max(abs(low), abs(high))
    span = high - low if high - low > 1e-6 * size else size or 1.0
    rough = max(span / count, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{k * step:.9g}") for k in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """A number as an axis shows it."""
    if value and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def smooth(y: np.ndarray, width: int) -> np.ndarray:
    """The running mean over `width` places, NaN left out; NaN stays NaN."""
    known = np.isfinite(y)
    kernel = np.ones(width)
    sums = np.convolve(np.where(known, y, 0.0), kernel, mode="same")
    counts = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(known, sums / np.maximum(counts, 1), np.nan)


def _averaged(line: Line) -> Line:
    """The line with at most MAX_POINTS points, each the mean of its neighbours."""
    if len(line.x) <= MAX_POINTS:
        return line
    spread = None if line.spread is None else _means(line.spread)
    return Line(line.name, _means(line.x), _means(line.y), line.colour, spread, line.dashed)


def _means(values: Sequence[float]) -> list[float]:
    """MAX_POINTS means of the values in order, NaN left out; NaN if all are."""
    parts = np.array_split(np.asarray(values, dtype=float), MAX_POINTS)
    known = [part[np.isfinite(part)] for part in parts]
    return [part.mean() if len(part) else math.nan for part in known]


def _range(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The least and the largest finite value; 0 and 1 without any."""
    values = [value for row in rows for value in row if math.isfinite(value)]
    return (min(values), max(values)) if values else (0.0, 1.0)


def _y_range(lines: Sequence[Line], limit: float | None) -> tuple[float, float]:
    """What the vertical axis has to show: spreads, the limit, and 0 if it is not far."""
    rows = [[] if limit is None else [limit]]
    for line in lines:
        y, spread = np.asarray(line.y), np.asarray(0.0 if line.spread is None else line.spread)
        least = min(0.0, _range([y])[0])  # a spread alone shows nothing below 0
        rows += [y, y + spread, np.maximum(y - spread, least)]
    low, high = _range(rows)
    return (0.0 if 0 < low < 0.7 * high else low), high


def _place(box: Box, x: float, y: float) -> tuple[float, float]:
    """A point of the data in the drawing."""
    across, up = (x - box[0]) / (box[1] - box[0]), (y - box[2]) / (box[3] - box[2])
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return LEFT + across * inner_width, TOP + (1 - min(max(up, 0.0), 1.0)) * inner_height


def _axes(x_ticks: list[float], y_ticks: list[float], box: Box, x_label: str) -> str:
    """Fine horizontal lines at the values, numbers at both axes, and the name of the lower one."""
    parts, floor = [], HEIGHT - BOTTOM
    for value in y_ticks:
        y = _place(box, box[0], value)[1]
        kind = "axis" if value == y_ticks[0] else "grid"
        parts.append(f'<path class="{kind}" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 3.5:.1f}">{short(value)}</text>')
    for value in x_ticks:
        x = _place(box, value, box[2])[0]
        parts.append(f'<text class="x" x="{x:.1f}" y="{floor + 14}">{short(value)}</text>')
    middle, label = (LEFT + WIDTH - RIGHT) / 2, html.escape(x_label)
    return "".join([*parts, f'<text class="x" x="{middle}" y="{HEIGHT - 4}">{label}</text>'])


def _pieces(x: Sequence[float], y: Sequence[float], box: Box) -> list[Points]:
    """The points of a line in the drawing, cut where a value is missing."""
    pieces: list[Points] = [[]]
    for a, b in zip(x, y, strict=True):
        if math.isfinite(b):
            pieces[-1].append(_place(box, a, b))
        else:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _path(points: Points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _curve(line: Line, box: Box) -> str:
    """The line; a long one faintly under its running mean, a short one with its points."""
    y = np.asarray(line.y, dtype=float)
    known = int(np.isfinite(y).sum())
    style = f'stroke="{line.colour}"' + (' stroke-dasharray="5 4"' if line.dashed else "")
    drawn = [(y, "line")]
    if known > SMOOTH_ABOVE:
        drawn = [(y, "line faint"), (smooth(y, max(3, known // 20)), "line")]
    parts = [f"<title>{html.escape(line.name)}</title>"]
    for values, name in drawn:
        pieces = _pieces(line.x, values, box)
        parts += [f'<path class="{name}" {style} d="{_path(piece)}"/>' for piece in pieces]
    if known < DOTS_BELOW:
        parts += [_dot(line, a, b, box) for a, b in zip(line.x, y) if math.isfinite(b)]
    return f"<g>{''.join(parts)}</g>"


def _dot(line: Line, a: float, b: float, box: Box) -> str:
    x, y = _place(box, a, b)
    title = f"<title>{html.escape(line.name)}, {short(a)}: {short(b)}</title>"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{line.colour}">{title}</circle>'


def _band(line: Line, box: Box) -> str:
    """The spread above and below a line."""
    rows = [row for row in zip(line.x, line.y, line.spread) if all(map(math.isfinite, row))]
    upper = [_place(box, a, b + spread) for a, b, spread in rows]
    lower = [_place(box, a, b - spread) for a, b, spread in reversed(rows)]
    return f'<path class="band" fill="{line.colour}" d="{_path(upper + lower)}Z"/>' if rows else ""
