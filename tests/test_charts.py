"""Axes, averages and gaps of the charts, by hand."""

import re

import pytest

from engine.report import charts
from engine.report.charts import Line, line_chart

NAN = float("nan")


@pytest.mark.parametrize("low, high, expected", [
    (0, 3.8, [0, 1, 2, 3, 4]),
    (0, 0.08, [0, 0.02, 0.04, 0.06, 0.08]),
    (-1.2, 0.9, [-2, -1, 0, 1]),
    (0, 0, [0, 1]),
    (0, 1e-6, [0, 5e-7, 1e-6]),
])  # fmt: skip
def test_ticks_are_round_and_hold_the_values(low, high, expected):
    assert charts.ticks(low, high, count=4) == pytest.approx(expected, rel=1e-9, abs=0)


def points(svg):
    """The coordinates of the curves of a chart, one list for each piece."""
    paths = re.findall(r'<path class="line[^>]* d="M([^"]*)"', svg)
    pieces = [piece for path in paths for piece in path.split("M")]
    return [[tuple(map(float, p.split())) for p in piece.split("L")] for piece in pieces]


def test_line_runs_from_corner_to_corner():
    ((first, last),) = points(line_chart([Line("a", "red", [0, 1], [0.0, 4.0])], "a"))
    assert first == (charts.LEFT, charts.FLOOR) and last == (charts.END, charts.TOP)


def test_missing_value_cuts_the_line():
    svg = line_chart([Line("a", "red", [1, 2, 3, 4, 5], [1, 1, NAN, 2, 2])], "a")
    assert [len(piece) for piece in points(svg)] == [2, 2]


def test_long_line_is_averaged():
    line = Line("a", "red", range(3000), [float(i // 100 % 2) for i in range(3000)])
    faint, smooth = points(line_chart([line], "a"))
    assert (len(faint), len(smooth)) == (300, 30)
    assert len({y for _, y in smooth}) == 2  # each mean is of 100 equal values
    assert charts.means([1.0, NAN, NAN, NAN, 2.0, 4.0], 3)[::2] == [1.0, 3.0]


@pytest.mark.parametrize("values", [[], [NAN], [0.1, 0.10000000000000002], [-3.0], [1e-300], [0.0]])
def test_chart_of_odd_values_is_drawn(values):
    svg = line_chart([Line("a", "red", range(len(values)), values)], "odd")
    assert svg.endswith("</svg>") and "nan" not in svg
