"""Line charts as SVG, written by hand: axes with round numbers, a limit, a spread, gaps.

Colours are the page's CSS variables, so a chart follows its light and its dark theme. Text is in
units of the drawing, which a page shows at about its own size.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 340, 190  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 10, 34  # margins of the plot
MAX_POINTS = 300  # of a line; more are averaged
DOTS_BELOW = 25  # lines with fewer points show them
SMOOTH_ABOVE = 40  # lines with more points are drawn faintly, and their running mean over them


@dataclass(frozen=True)
class Line:
    """A series to be drawn."""

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
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """An SVG of the lines. label: what is drawn, for those who do not see it.

    limit: a dashed horizontal line. y_range: of the vertical axis, where it is known beforehand;
    what lies beyond is cut. marks: (x, text) of vertical lines.
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
    for x, text in marks:
        at = _place(box, x, 0)[0]
        parts.append(f'<path class="mark" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at + 4:.1f}" y="{TOP + 9}">{html.escape(text)}</text>')
    parts += [_curve(line, box) for line in lines]
    opening = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label='
    return f'{opening}"{html.escape(label)}">{"".join(parts)}</svg>'


def ticks(low: float, high: float, *, count: int, whole: bool = False) -> list[float]:
    """Round numbers, about `count` of them, that begin at or below low and end at or above high."""
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
    """The running mean over `width` places, of those that are no NaN; NaN stays NaN."""
    known = np.isfinite(y)
    kernel = np.ones(width)
    sums = np.convolve(np.where(known, y, 0.0), kernel, mode="same")
    counts = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(known, sums / np.maximum(counts, 1), np.nan)


def _averaged(line: Line) -> Line:
    """The line with at most MAX_POINTS points, each the mean of its neighbours."""
    count = len(line.x)
    if count <= MAX_POINTS:
        return line
    owner = np.arange(count) * MAX_POINTS // count  # the point that each value goes into

    def means(values):
        values = np.asarray(values, dtype=float)
        known = np.isfinite(values)
        counts = np.bincount(owner[known], minlength=MAX_POINTS)
        sums = np.bincount(owner[known], values[known], minlength=MAX_POINTS)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    spread = None if line.spread is None else means(line.spread)
    return Line(line.name, means(line.x), means(line.y), line.colour, spread, line.dashed)


def _range(rows: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The least and the largest finite value; 0 and 1 if there is none."""
    values = np.concatenate([np.asarray(row, dtype=float) for row in rows] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)


def _y_range(lines: Sequence[Line], limit: float | None) -> tuple[float, float]:
    """What the vertical axis has to show: spreads, the limit, and 0 where it is not far."""
    rows = [np.asarray(line.y, dtype=float) for line in lines]
    for line in (line for line in lines if line.spread is not None):
        y, spread = (np.asarray(v, dtype=float) for v in (line.y, line.spread))
        rows += [y + spread, np.maximum(y - spread, min(0.0, _range([y])[0]))]
    low, high = _range(rows if limit is None else [*rows, [limit]])
    return (0.0 if 0 < low < 0.7 * high else low), high


def _place(box: tuple[float, float, float, float], x: float, y: float) -> tuple[float, float]:
    """A point of the data in the drawing; box is (least x, largest x, least y, largest y)."""
    across, up = (x - box[0]) / (box[1] - box[0]), (y - box[2]) / (box[3] - box[2])
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return LEFT + across * inner_width, TOP + (1 - min(max(up, 0.0), 1.0)) * inner_height


def _axes(x_ticks: list[float], y_ticks: list[float], box, x_label: str) -> str:
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
    middle = (LEFT + WIDTH - RIGHT) / 2
    label = html.escape(x_label)
    return "".join([*parts, f'<text class="x" x="{middle}" y="{HEIGHT - 4}">{label}</text>'])


def _pieces(line: Line, box, y: np.ndarray) -> list[list[tuple[float, float]]]:
    """The points of a line in the drawing, cut where a value is missing."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(line.x, y, strict=True):
        if math.isfinite(b):
            pieces[-1].append(_place(box, a, b))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _curve(line: Line, box) -> str:
    """The line; a long one faintly under its running mean, a short one with its points."""
    y = np.asarray(line.y, dtype=float)
    known = int(np.isfinite(y).sum())
    style = f'stroke="{line.colour}"' + (' stroke-dasharray="5 4"' if line.dashed else "")
    lines = [(y, "line")]
    if known > SMOOTH_ABOVE:
        lines = [(y, "line faint"), (smooth(y, max(3, known // 20)), "line")]
    parts = [
        f'<path class="{name}" {style} d="{_path(piece)}"/>'
        for values, name in lines
        for piece in _pieces(line, box, values)
    ]
    dots = []
    if known < DOTS_BELOW:
        points = [(a, b, *_place(box, a, b)) for a, b in zip(line.x, y) if math.isfinite(b)]
        dots = [
            f'<circle cx="{x:.1f}" cy="{at:.1f}" r="2.6" fill="{line.colour}">'
            f"<title>{html.escape(line.name)}, {short(a)}: {short(b)}</title></circle>"
            for a, b, x, at in points
        ]
    return f"<g><title>{html.escape(line.name)}</title>{''.join([*parts, *dots])}</g>"


def _band(line: Line, box) -> str:
    """The spread above and below a line."""
    y, spread = (np.nan_to_num(np.asarray(v, dtype=float)) for v in (line.y, line.spread))
    rows = [(a, b, s) for a, b, s, raw in zip(line.x, y, spread, line.y) if math.isfinite(raw)]
    upper = [_place(box, a, b + s) for a, b, s in rows]
    lower = [_place(box, a, b - s) for a, b, s in reversed(rows)]
    return f'<path class="band" fill="{line.colour}" d="{_path(upper + lower)}Z"/>' if rows else ""
