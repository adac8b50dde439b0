"""engine/scoring/pair_scores.py: cases worked by hand, and a slow reference on random data."""

import random

import numpy as np
import pytest

import evaluate
import hicodet
from engine.scoring import pair_scores
from tests.pairs import (
    BOX,
    FAR,
    HOLD_BICYCLE,
    MANY,
    RIDE_BICYCLE,
    RIDE_HORSE,
    make_line,
    make_sample,
    random_problem,
    reference_iou,
)  # fmt: skip


def scores_of(samples, lines):
    return evaluate.evaluate(lines, samples, MANY, breakdown=True)["pair_scores"]


def averaged(precision, recall, f1):
    return [pytest.approx(value) for value in (precision, recall, f1)]


def shares(result, key):
    return [result[key][name] for name in ("precision", "recall", "f1")]


def test_as_many_hits_as_possible():
    """The first detection fits both pairs, the second only the first: two hits, not one."""
    # mAP's rule gives both detections to BOX, which each overlaps most: 100 / 100 and 100 / 130.
    wide, wider = (0, 0, 12, 9), (0, 0, 9, 12)
    sample = make_sample("a", [(BOX, BOX, RIDE_BICYCLE), (wider, BOX, RIDE_BICYCLE)])
    line = make_line("a", [(BOX, BOX, RIDE_BICYCLE, 1.0), (wide, BOX, RIDE_BICYCLE, 0.5)])
    result = evaluate.evaluate([line], [sample], MANY, breakdown=True)
    assert result["max_recall"][RIDE_BICYCLE] == 0.5
    assert shares(result["pair_scores"], "micro") == [1.0, 1.0, 1.0]


def test_averages_by_hand():
    """Image a: one of two pairs, and a wrong detection; b: an exact one; c: a stray one."""
    samples = [
        make_sample("a", [(BOX, BOX, RIDE_BICYCLE), (BOX, BOX, HOLD_BICYCLE)]),
        make_sample("b", [(BOX, BOX, RIDE_BICYCLE)]),
        make_sample("c"),
        make_sample("d", [(BOX, BOX, HOLD_BICYCLE)]),
        make_sample("e"),
    ]
    lines = [
        make_line("a", [(BOX, BOX, RIDE_BICYCLE, 1.0), (FAR, BOX, HOLD_BICYCLE, 1.0)]),
        make_line("b", [(BOX, BOX, RIDE_BICYCLE, 1.0)]),
        make_line("c", [(BOX, BOX, RIDE_HORSE, 1.0)]),
        make_line("d"),
        make_line("e"),
    ]
    result = scores_of(samples, lines)
    # 2 hits of 4 detections and 4 pairs.
    assert shares(result, "micro") == averaged(1 / 2, 1 / 2, 1 / 2)
    # ride 2 of 2 and 2; hold 0 of 1 and 2; horse 0 of 1 and 0. Of 600 classes 597 have neither.
    assert shares(result, "macro") == averaged((1 + 0 + 0) / 3, (1 + 0) / 2, (1 + 0 + 0) / 3)
    # a 1 of 2 and 2; b 1 of 1 and 1; c 0 of 1 and 0; d 0 of 0 and 1; e nothing.
    expected = averaged((0.5 + 1 + 0) / 3, (0.5 + 1 + 0) / 3, (0.5 + 1 + 0 + 0) / 4)
    assert shares(result, "image") == expected
    assert result["image"]["exact"] == pytest.approx(2 / 5)  # b and e


def most_hits(fits, taken=frozenset()):
    """The largest one-to-one matching by trying all; fits: for each detection, rows of pairs."""
    if not fits:
        return 0
    best = most_hits(fits[1:], taken)
    for pair in fits[0]:
        if pair not in taken:
            best = max(best, 1 + most_hits(fits[1:], taken | {pair}))
    return best


def reference_counts(sample, line, hoi_id):
    """[hits, detections, pairs] of one image and class."""
    verb, name = hicodet.HOI_CLASSES[hoi_id]
    pairs = [pair for pair in sample.pairs if pair.hoi_id == hoi_id]
    fits = [
        [
            row for row, pair in enumerate(pairs)
            if reference_iou(i["human"], pair.human) >= 0.5
            and reference_iou(i["object"], pair.object) >= 0.5
        ]
        for i in line["instances"] if (i["verbs"], i["object_class"]) == ([verb], name)
    ]  # fmt: skip
    return [most_hits(fits), len(fits), len(pairs)]


def reference_averages(groups):
    """Precision, recall and F1 of each [hits, detections, pairs], averaged."""
    columns = [
        [hits / detections for hits, detections, _ in groups if detections],
        [hits / pairs for hits, _, pairs in groups if pairs],
        [2 * hits / (d + p) for hits, d, p in groups if d + p],
    ]
    return [pytest.approx(sum(c) / len(c)) if c else None for c in columns]


def test_equals_the_reference_on_random_data():
    for _ in range(20):
        seed = random.randrange(2**32)
        samples, lines = random_problem(random.Random(seed))
        for line in lines:
            line["instances"] = line["instances"][:7]  # all matchings are tried
        hoi_ids = RIDE_BICYCLE, HOLD_BICYCLE, RIDE_HORSE, 599  # those of random_problem
        counts = np.array([
            [reference_counts(sample, line, hoi_id) for hoi_id in hoi_ids]
            for sample, line in zip(samples, lines, strict=True)
        ])  # (images, classes, 3)
        images, classes = counts.sum(1).tolist(), counts.sum(0).tolist()
        result = scores_of(samples, lines)
        assert shares(result, "micro") == reference_averages([counts.sum((0, 1)).tolist()]), seed
        assert shares(result, "macro") == reference_averages(classes), seed
        assert shares(result, "image") == reference_averages(images), seed
        exact = sum(hits == detections == pairs for hits, detections, pairs in images)
        assert result["image"]["exact"] == pytest.approx(exact / len(images)), seed


@pytest.mark.filterwarnings("error")  # no 0 / 0
def test_table_by_hand():
    samples = [make_sample("a", [(BOX, BOX, RIDE_BICYCLE)]), make_sample("b")]
    lines = [make_line("a", [(BOX, BOX, RIDE_BICYCLE, 1.0)] * 2), make_line("b")]
    printed = pair_scores.pair_table(scores_of(samples, lines)).splitlines()
    assert printed[0].split()[-4:] == ["Precision", "Recall", "F1", "Exact"]
    assert printed[1].split()[-3:] == ["50.00", "100.00", "66.67"]
    assert printed[3].split()[-4:] == ["50.00", "100.00", "66.67", "50.00"]
    assert printed[0].index("F1") + 2 == printed[1].index("66.67") + 5  # columns end together
    rows = pair_scores.pair_table(scores_of([], [])).splitlines()[1:]
    assert [row.split().count("-") for row in rows] == [3, 3, 4]
