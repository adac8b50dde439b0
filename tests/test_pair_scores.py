"""engine/scoring/pair_scores.py, by hand."""

import pytest

import evaluate
from engine.scoring import pair_scores
from tests.pairs import BOX, FAR, HOLD_BICYCLE, RIDE_BICYCLE, RIDE_HORSE, make_line, make_sample


def scores_of(samples, lines):
    return evaluate.evaluate(lines, samples, [100] * 600, breakdown=True)["pair_scores"]


def shares(result, key):
    return [result[key][name] for name in ("precision", "recall", "f1")]


def test_matching_has_the_most_hits():
    """The first detection fits both pairs, the second only the first pair: two hits."""
    # mAP's rule gives both detections to BOX, which they overlap most: 100 / 100 and 100 / 130.
    wide, wider = (0, 0, 12, 9), (0, 0, 9, 12)
    sample = make_sample("a", [(BOX, BOX, RIDE_BICYCLE), (wider, BOX, RIDE_BICYCLE)])
    line = make_line("a", [(BOX, BOX, RIDE_BICYCLE, 1.0), (wide, BOX, RIDE_BICYCLE, 0.5)])
    result = evaluate.evaluate([line], [sample], [100] * 600, breakdown=True)
    assert result["max_recall"][RIDE_BICYCLE] == 0.5
    assert shares(result["pair_scores"], "micro") == [1.0, 1.0, 1.0]


def test_averages_by_hand():
    ride, hold, horse = ((BOX, BOX, hoi_id) for hoi_id in (RIDE_BICYCLE, HOLD_BICYCLE, RIDE_HORSE))
    images = {  # true pairs, detections
        "a": ([ride, hold], [ride, (FAR, BOX, HOLD_BICYCLE)]),
        "b": ([ride], [ride]), "c": ([], [horse, hold]), "d": ([hold], []), "e": ([], []),
    }  # fmt: skip
    samples = [make_sample(name, pairs) for name, (pairs, _) in images.items()]
    lines = [make_line(name, [(*one, 1.0) for one in found]) for name, (_, found) in images.items()]
    result = scores_of(samples, lines)
    # 2 hits of 5 detections and 4 pairs.
    assert shares(result, "micro") == [0.4, 0.5, pytest.approx(4 / 9)]
    # ride 2 of 2 and 2; hold 0 of 2 and 2; horse 0 of 1 and 0. The other 597 classes do not count.
    assert shares(result, "macro") == pytest.approx([1 / 3, (1 + 0) / 2, 1 / 3])
    # a 1 of 2 and 2; b 1 of 1 and 1; c 0 of 2 and 0; d 0 of 0 and 1; e does not count.
    assert shares(result, "image") == pytest.approx([1.5 / 3, 1.5 / 3, 1.5 / 4])
    assert result["image"]["exact"] == pytest.approx(2 / 5)  # b and e


@pytest.mark.filterwarnings("error")  # no 0 / 0
def test_table_by_hand():
    samples = [make_sample("a", [(BOX, BOX, RIDE_BICYCLE)]), make_sample("b")]
    lines = [make_line("a", [(BOX, BOX, RIDE_BICYCLE, 1.0)] * 2), make_line("b")]
    printed = pair_scores.pair_table(scores_of(samples, lines)).splitlines()
    assert printed[0].split()[-4:] == ["Precision", "Recall", "F1", "Exact"]
    assert printed[1].split()[-3:] == ["50.00", "100.00", "66.67"]
    assert printed[3].split()[-4:] == ["50.00", "100.00", "66.67", "50.00"]
    rows = pair_scores.pair_table(scores_of([], [])).splitlines()[1:]
    assert [row.split().count("-") for row in rows] == [3, 3, 4]
