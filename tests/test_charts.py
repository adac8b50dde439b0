"""Axes, averages and gaps of the charts, by hand."""

import re

import numpy as np
import pytest

from engine.report import charts
from engine.report.charts import Line, line_chart

NAN = float("nan")


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 3.8, [0, 1, 2, 3, 4]),
        (0, 0.08, [0, 0.02, 0.04, 0.06, 0.08]),
        (-1.2, 0.9, [-2, -1, 0, 1]),
        (0, 0, [0, 0.5]),
        (5, 5, [4, 6]),
        (0, 1e-6, [0, 5e-7, 1e-6]),
    ],
)
def test_ticks_are_round_and_hold_the_values(low, high, expected):
    found = charts.ticks(low, high, count=4)
    assert found[0] <= low and high <= found[-1]
    assert found == pytest.approx(expected, rel=1e-9, abs=0)


def test_ticks_of_steps_are_whole():
    assert charts.ticks(1, 3, count=5, whole=True) == [1, 2, 3]


def test_smooth_is_the_mean_of_known_neighbours():
    smoothed = charts.smooth(np.array([1.0, 2.0, NAN, 6.0]), 3)
    assert smoothed[[0, 1, 3]] == pytest.approx([1.5, 1.5, 6.0])
    assert np.isnan(smoothed[2])


def points(svg):
    """The coordinates of each curve of a chart."""
    paths = re.findall(r'<path class="line[^>]* d="M([^"]*)"', svg)
    return [[tuple(map(float, p.split())) for p in path.split("L")] for path in paths]


def test_line_runs_from_corner_to_corner():
    ((first, last),) = points(line_chart([Line("a", [0, 1], [0.0, 4.0], "red")], "a"))
    assert first == (charts.LEFT, charts.HEIGHT - charts.BOTTOM)
    assert last == (charts.WIDTH - charts.RIGHT, charts.TOP)


def test_missing_value_cuts_the_line():
    pieces = points(line_chart([Line("a", [1, 2, 3, 4, 5], [1, 1, NAN, 2, 2], "red")], "a"))
    assert [len(piece) for piece in pieces] == [2, 2]


def test_long_line_is_averaged():
    count = 10 * charts.MAX_POINTS
    line = Line("a", range(count), [float(i // 10) for i in range(count)], "red")
    faint, _ = points(line_chart([line], "a"))
    assert len(faint) == charts.MAX_POINTS


def test_chart_without_values_is_drawn():
    assert line_chart([Line("a", [], [], "red")], "nothing").endswith("</svg>")
    assert line_chart([Line("a", [1], [NAN], "red", spread=[NAN])], "nothing").endswith("</svg>")


def test_text_of_a_chart_is_escaped():
    svg = line_chart([Line("<a>", [1], [1.0], "red")], '"<b>', x_label="<c>")
    assert not re.search(r"<[abc]>", svg) and "&quot;&lt;b&gt;" in svg
