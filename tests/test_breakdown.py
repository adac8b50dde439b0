"""engine/scoring/breakdown.py, by hand."""

import pytest

import evaluate
import hicodet
from engine.scoring import breakdown
from tests.pairs import BOX, FAR, HOLD_BICYCLE, RIDE_BICYCLE, RIDE_HORSE, make_line, make_sample

WIDE = (0.0, 0.0, 11.0, 9.0)  # overlaps BOX by 100 / 120
THIRD = (0.0, 0.0, 29.0, 9.0)  # by 100 / 300
TENTH = (0.0, 0.0, 99.0, 9.0)  # by 100 / 1000
ELEVENTH = (0.0, 0.0, 109.0, 9.0)  # by 100 / 1100


def result_of(samples, lines):
    return evaluate.evaluate(lines, samples, [100] * 600, classes="present", breakdown=True)


def broken_down(truth, detections):
    """The breakdown of one image; truth: (human, object, hoi_id), detections: with a score."""
    known = {hicodet.HOI_CLASSES[hoi_id][1] for *_, hoi_id in truth}
    sample = make_sample("a", truth, known)
    return result_of([sample], [make_line("a", detections)])["breakdown"]


def gains_of(result):
    """The kinds whose fix raises the mAP, and by how much."""
    return {kind: row["map_gain"] for kind, row in result["kinds"].items() if row["map_gain"]}


@pytest.mark.parametrize("kind, gain, detections", [
    ("image unparsed", 1, []),
    ("wrong verb", 1, [(BOX, BOX, HOLD_BICYCLE, 1.0)]),
    ("wrong object", 1, [(BOX, BOX, RIDE_HORSE, 1.0)]),
    ("box below 0.5", 1, [(THIRD, TENTH, RIDE_BICYCLE, 1.0)]),
    # No detection is at fault: the new one comes after the wrong one, with precision 1/2.
    ("no such object box", 1 / 2, [(BOX, ELEVENTH, RIDE_BICYCLE, 1.0)]),
    ("no such object box", 1, [(BOX, THIRD, HOLD_BICYCLE, 1.0)]),  # another class does not count
    ("no such person box", 1 / 2, [(FAR, FAR, RIDE_BICYCLE, 1.0)]),
    ("not paired", 1, [(BOX, FAR, RIDE_HORSE, 1.0), (FAR, BOX, HOLD_BICYCLE, 1.0)]),
    (None, 0, [(BOX, BOX, RIDE_BICYCLE, 1.0)]),
])  # fmt: skip
def test_reason_and_gain_of_one_pair(kind, gain, detections):
    result = broken_down([(BOX, BOX, RIDE_BICYCLE)], detections)
    assert result["why"] == [kind] and result["missed"] == (kind is not None)
    assert gains_of(result) == pytest.approx({kind: gain} if kind else {})


def test_duplicate_is_replaced_and_the_right_detection_stays():
    # Both detections overlap BOX most. The first is right: AP 6 / 11. Fixed, both pairs are found.
    truth = [(BOX, BOX, RIDE_BICYCLE), (WIDE, WIDE, RIDE_BICYCLE)]
    result = broken_down(truth, [(BOX, BOX, RIDE_BICYCLE, score) for score in (0.9, 0.8)])
    assert result["why"] == [None, "duplicate taken"]
    assert gains_of(result) == pytest.approx({"duplicate taken": 5 / 11})


def test_wrong_verb_is_removed_from_its_class():
    # Image a: "hold" at 0.9 instead of "ride". Image b: a right "hold" at 0.5. AP of ride is 0, of
    # hold 1/2. Fixed, "ride" is right at 0.9 and the wrong "hold" is gone: 1 and 1.
    ride, hold = (BOX, BOX, RIDE_BICYCLE), (BOX, BOX, HOLD_BICYCLE)
    samples = [make_sample("a", [ride]), make_sample("b", [hold])]
    lines = [make_line("a", [(*hold, 0.9)]), make_line("b", [(*hold, 0.5)])]
    result = result_of(samples, lines)
    assert result["default"]["full"] == pytest.approx(0.25)
    assert gains_of(result["breakdown"]) == pytest.approx({"wrong verb": 0.75})


def test_table_by_hand():
    # The AP of "hold" is 1. Fixing "ride" raises its AP from 0 to 1.
    truth = [(BOX, BOX, HOLD_BICYCLE), (BOX, BOX, RIDE_BICYCLE)]
    printed = breakdown.breakdown_table(broken_down(truth, [(BOX, BOX, HOLD_BICYCLE, 0.9)]))
    title, *rows = printed.splitlines()
    assert title.split() == "1 of 2 true pairs missed pairs share mAP if fixed".split()
    for row in rows:
        expected = ["1", "100.0%", "+50.00"] if "wrong verb" in row else ["0", "0.0%", "+0.00"]
        assert row.split()[-3:] == expected and len(row) == len(title)
    # without true pairs
    rows = breakdown.breakdown_table(broken_down([], [])).splitlines()[1:]
    assert {tuple(line.split()[-3:]) for line in rows} == {("0", "-", "-")}
