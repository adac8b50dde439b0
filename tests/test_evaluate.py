"""evaluate.py: equality with the official code, a slow reference, and cases worked by hand."""

import json
import random

import numpy as np
import pytest

import evaluate
from engine.data import annotations
from engine.scoring.predictions import read_predictions, write_predictions
from tests import pairs
from tests.conftest import HICO_DET
from tests.pairs import BOX, FAR, HOLD_BICYCLE, RIDE_BICYCLE, RIDE_HORSE, make_line, make_sample

MANY = pairs.MANY

# ---- the official code's result


@pytest.fixture(scope="module")
def official(real_samples, tmp_path_factory):
    """The real samples and training counts, predictions from a file, the MATLAB code's result."""
    lines = [make_line(sample.file_name) for sample in real_samples]
    with np.load(HICO_DET / "dets_c.npz") as file:
        boxes = file["boxes_h"] - 1, file["boxes_o"] - 1  # 1-based there
        columns = file["image_index"], *boxes, file["hoi"], file["score"]
        for image, *detection in zip(*(column.tolist() for column in columns)):
            lines[image]["instances"] += make_line("", [detection])["instances"]
    random.shuffle(lines)  # ties follow the annotations, not the file
    path = tmp_path_factory.mktemp("official") / "predictions.jsonl"
    write_predictions(path, lines)
    expected = json.loads((HICO_DET / "expected_c.json").read_text())
    counts = annotations.training_counts(HICO_DET)
    return real_samples, counts, read_predictions(path, real_samples), expected


@pytest.mark.parametrize("options", [{}, {"classes": "present"}, {"breakdown": True}])
def test_equals_the_official_code(official, options):
    """All classes have true pairs in the test set. The breakdown does not change the result."""
    samples, train_counts, lines, expected = official
    result = evaluate.evaluate(lines, samples, train_counts, **options)
    for ours, theirs in ("default", "default"), ("known_object", "known"):
        difference = np.abs(np.array(result[ours]["ap"]) - expected[f"{theirs}_ap"])
        assert difference.max() < 1e-9, np.flatnonzero(difference > 1e-9)
        means = {name.replace("_", ""): result[ours][name] for name in ("full", "rare", "non_rare")}
        assert means == pytest.approx(expected[theirs], abs=1e-9)
        assert result["max_recall"] == pytest.approx(expected[f"{theirs}_max_recall"], abs=1e-9)
    assert (sum(result["true_pairs"]), result["num_images"]) == (33405, 9658)
    if "breakdown" in options:
        found = sum(recall * n for recall, n in zip(result["max_recall"], result["true_pairs"]))
        assert result["breakdown"]["missed"] == 33405 - round(found)
        assert all(row["pairs"] for row in result["breakdown"]["kinds"].values())
        assert result["pair_scores"]["micro"]["recall"] >= found / 33405  # mAP's rule finds no more


# ---- an independent reference, detection by detection


def test_equals_the_reference_on_random_data():
    rules = ("equal overlaps", "no truth in image", "exactly half", "already taken")
    seen = dict.fromkeys(rules, 0)
    for _ in range(60):
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        samples, lines = pairs.random_problem(rng)
        shuffled, before = rng.sample(lines, len(lines)), json.dumps(lines)
        result = evaluate.evaluate(shuffled, samples, MANY, breakdown=True)
        assert json.dumps(lines) == before  # arguments are not changed
        for setting in "default", "known_object":
            for hoi_id in range(600):
                expected = pairs.reference_problem(
                    samples, lines, hoi_id, setting != "default", seen)
                got = result[setting]["ap"][hoi_id]
                assert got == pytest.approx(expected, abs=1e-12), (seed, setting, hoi_id)
    assert all(seen.values()), seen  # the data did exercise each rule


# ---- cases worked by hand


@pytest.mark.filterwarnings("error")  # no overflow
def test_box_iou_counts_both_end_pixels():
    # Equal; 10x10 of 20x10; one shared pixel of 100 + 100 - 1; side by side.
    other = np.array([[0, 0, 9, 9], [0, 0, 19, 9], [9, 9, 18, 18], [10, 0, 19, 9]], float)
    assert evaluate.box_iou(np.array([BOX] * 4), other).tolist() == [1.0, 0.5, 1 / 199, 0.0]
    inverted = np.array([[9.0, 0.0, 0.0, 9.0]])
    assert evaluate.box_iou(inverted, np.array([BOX])).tolist() == [0.0]
    huge = np.array([[-1e308, -1e308, 1e308, 1e308], [1e308, -1e308, -1e308, 1e308]])
    assert evaluate.box_iou(huge, np.array([BOX, BOX])).tolist() == [0.0, 0.0]


@pytest.mark.filterwarnings("error")  # no 0 / 0
@pytest.mark.parametrize("right, npos, expected", [
    ([1], 1, 1.0), ([0], 1, 0.0), ([], 1, 0.0), ([0, 0], 0, 0.0),
    # Recall 1/4, 1/4, 2/4 with precision 1, 1/2, 2/3: levels 0, .1, .2 find 1 and
    # .3, .4, .5 find 2/3, so (3 * 1 + 3 * 2/3) / 11.
    ([1, 0, 1], 4, 5 / 11),
    # Recall 0, 1/2, 1 with precision 0, 1/2, 2/3: the later 2/3 counts at every level.
    ([0, 1, 1], 2, 2 / 3),
])  # fmt: skip
def test_average_precision_by_hand(right, npos, expected):
    assert evaluate.average_precision(np.array(right, bool), npos) == pytest.approx(expected)


@pytest.mark.parametrize("found, levels", [(2, 3), (3, 3), (5, 6), (6, 6), (7, 7), (10, 11)])
def test_recall_of_3_6_and_7_tenths_misses_its_level(found, levels):
    # A recall of found / 10 reaches found + 1 levels: 0, .1, ..., found / 10. The exceptions are
    # 3 * 0.1, 6 * 0.1 and 7 * 0.1, which are one ulp above .3, .6 and .7.
    assert evaluate.average_precision(np.ones(found, bool), 10) == pytest.approx(levels / 11)


HERE, AWAY = (BOX, BOX), (FAR, FAR)
WIDE = ((0, 0, 11, 9),) * 2  # overlaps HERE by 100 / 120
ONE_IMAGE = {  # true pairs, detections with scores, AP
    # 3x3 of 4x4 pixels: 9/16 >= 0.5. Without the +1 it would be 2x2 of 3x3: 4/9 < 0.5.
    "plus one": ([((0, 0, 3, 3), BOX)], [(((0, 0, 2, 2), BOX), 1.0)], 1),
    "exactly half": ([(BOX, (0, 0, 19, 9))], [(HERE, 1.0)], 1),  # 100 / 200
    "below half": ([(BOX, (0, 0, 20, 9))], [(HERE, 1.0)], 0),  # 100 / 210
    "only the human": ([HERE], [((BOX, FAR), 1.0)], 0),
    # Both detections overlap HERE most, so the second is wrong: precision 1 up to recall 1/2, 6 of
    # 11 levels. If the second could take the free pair, the AP would be 1.
    "a duplicate": ([HERE, WIDE], [(HERE, 0.9), (HERE, 0.8)], 6 / 11),
    "equal scores in the order of lines": ([HERE], [(AWAY, 1.0), (HERE, 1.0)], 1 / 2),
    "equal scores, right first": ([HERE], [(HERE, 1.0), (AWAY, 1.0)], 1),
}


@pytest.mark.parametrize(("truth", "detections", "ap"), ONE_IMAGE.values(), ids=ONE_IMAGE)
def test_one_image_by_hand(truth, detections, ap):
    sample = make_sample("a.jpg", [(*pair, RIDE_BICYCLE) for pair in truth])
    line = make_line("a.jpg", [(*pair, RIDE_BICYCLE, score) for pair, score in detections])
    found = evaluate.evaluate([line], [sample], MANY)["default"]["ap"][RIDE_BICYCLE]
    assert found == pytest.approx(ap)


def test_each_verb_of_an_instance_is_a_detection_with_its_own_score():
    sample = make_sample("a", [(BOX, BOX, RIDE_BICYCLE), (BOX, BOX, HOLD_BICYCLE)])
    line = make_line("a", [(FAR, FAR, HOLD_BICYCLE, 0.5), (BOX, BOX, RIDE_BICYCLE, 1.0)])
    line["instances"][1] |= {"verbs": ["ride", "hold"], "scores": [1.0, 0.4]}
    ap = evaluate.evaluate([line], [sample], MANY)["default"]["ap"]
    assert (ap[RIDE_BICYCLE], ap[HOLD_BICYCLE]) == (1.0, pytest.approx(0.5))


def test_means_over_all_or_present_and_rare_below_ten():
    counts = list(MANY)
    counts[RIDE_BICYCLE], counts[HOLD_BICYCLE] = 9, 10
    pairs = [(BOX, BOX, hoi_id) for hoi_id in (RIDE_BICYCLE, HOLD_BICYCLE, RIDE_HORSE)]
    sample = make_sample("a", pairs, known=["bicycle", "horse"])
    line = make_line("a", [(*pair, 1.0) for pair in pairs[:2]])
    official = evaluate.evaluate([line], [sample], counts)
    present = evaluate.evaluate([line], [sample], counts, classes="present")
    for setting in "default", "known_object":
        means = [official[setting][name] for name in ("full", "rare", "non_rare")]
        assert means == pytest.approx([2 / 600, 1.0, 1 / 599])
        means = [present[setting][name] for name in ("full", "rare", "non_rare")]
        assert means == pytest.approx([2 / 3, 1.0, 1 / 2])  # "ride horse" is missed
    assert official["max_recall"][RIDE_HORSE] == 0.0 and official["max_recall"][599] is None


def test_mean_of_no_class_is_none_and_a_dash():
    result = evaluate.evaluate([make_line("a")], [make_sample("a")], MANY, classes="present")
    assert result["default"]["full"] is None
    assert evaluate.map_table(result).splitlines()[-1].split() == ["-"] * 6
    assert evaluate.evaluate([], [], MANY)["num_images"] == 0


def test_evaluate_refuses_other_images():
    samples = [make_sample("a"), make_sample("b")]
    for names in ["a"], ["a", "a"], ["a", "c"], ["a", "b", "b"]:
        with pytest.raises(ValueError, match="every image of the samples, each exactly once"):
            evaluate.evaluate([make_line(name) for name in names], samples, MANY)
