"""engine/scoring/ties.py against all orders of small cases, cases worked by hand, and known figures."""

import collections
import itertools
import random

import numpy as np
import pytest

import evaluate
from engine.scoring import ties
from tests.pairs import (
    BOX,
    FAR,
    HOLD_BICYCLE,
    MANY,
    RIDE_BICYCLE,
    make_line,
    make_sample,
    random_problem,
    reference_ap,
)  # fmt: skip

RIGHT, WRONG = (BOX, BOX, RIDE_BICYCLE), (FAR, FAR, RIDE_BICYCLE)
SETTINGS = "default", "known_object"


def bracketed(samples, lines):
    return evaluate.evaluate(lines, samples, MANY, classes="present", ties="bracket")


def two_images():
    """A wrong detection in the first image and a right one in the second, at equal scores."""
    samples = [make_sample("a"), make_sample("b", [RIGHT])]
    return samples, [make_line("a", [(*WRONG, 0.5)]), make_line("b", [(*RIGHT, 0.5)])]


def test_a_tie_by_hand():
    result = bracketed(*two_images())["ties"]
    values = {name: result[name]["default"]["full"] for name in ("official", "best", "worst")}
    assert values == {"official": 0.5, "best": 1.0, "worst": 0.5}
    assert result["tied"] == 2


def test_mean_and_spread_are_those_of_random_orders():
    # Each order gives 1 or 1/2. If k of n give 1, the mean is (n + k) / 2n and the deviation that
    # of k ones and n - k halves. k is binomial: 20 of 20 alike would happen once in 500,000.
    result, n = bracketed(*two_images())["ties"], ties.ORDERS
    k = round((result["mean"]["default"]["full"] * 2 - 1) * n)
    assert 0 < k < n
    values = [1.0] * k + [0.5] * (n - k)
    assert result["mean"]["default"]["full"] == pytest.approx(np.mean(values))
    assert result["spread"]["default"]["full"] == pytest.approx(np.std(values, ddof=1))


def test_the_seed_is_fixed():
    problem = random_problem(random.Random())
    assert bracketed(*problem)["ties"] == bracketed(*problem)["ties"]


def test_random_orders_shuffle_ties_and_nothing_else():
    hoi_id = np.array([0, 0, 0, 0, 1, 1])
    score = np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.5])
    rng = np.random.default_rng()
    orders = {tuple(ties.random_order(hoi_id, score, rng).tolist()) for _ in range(500)}
    assert orders == {
        (0, *first, *last)
        for first in itertools.permutations((1, 2, 3)) for last in itertools.permutations((4, 5))
    }  # fmt: skip


def test_without_ties_all_rows_are_the_official_one():
    samples = [make_sample("a", [RIGHT])]
    lines = [make_line("a", [(*WRONG, 0.9), (*RIGHT, 0.5), (BOX, BOX, HOLD_BICYCLE, 0.5)])]
    result = bracketed(samples, lines)["ties"]
    for name in "mean", "best", "worst":
        assert result[name] == result["official"]
    assert set(result["spread"]["default"].values()) == {0.0, None}  # no class is rare
    assert result["tied"] == 0


def test_duplicates_in_the_worst_order_by_hand():
    # In one tie: pair A detected once, pair B three times. Worst is B, its two duplicates, A: 1/1
    # up to recall 1/2, then 2/4. A first would give 2/2 at recall 1.
    truth = [RIGHT, (FAR, FAR, RIDE_BICYCLE)]
    detections = [(*truth[0], 0.5)] + [(*truth[1], 0.5)] * 3
    for order in detections, detections[::-1]:
        result = bracketed([make_sample("a", truth)], [make_line("a", order)])["ties"]
        assert result["worst"]["default"]["full"] == pytest.approx((6 * 1 + 5 * 0.5) / 11)
        assert result["best"]["default"]["full"] == 1.0


def test_a_duplicate_of_a_pair_taken_at_a_higher_score_comes_first_in_the_worst_order():
    # A is taken at 1.0; at 0.5 a duplicate of A and three detections of B are tied. Worst is A's
    # duplicate, B: 1/1 up to recall 1/2, then 2/3.
    truth = [RIGHT, (FAR, FAR, RIDE_BICYCLE)]
    detections = [(*truth[1], 1.0)] + [(*truth[0], 0.5)] * 3 + [(*truth[1], 0.5)]
    result = bracketed([make_sample("a", truth)], [make_line("a", detections)])["ties"]
    assert result["worst"]["default"]["full"] == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_whichever_duplicate_comes_first_is_right():
    # Both detections fit the one pair: in any order the first is right, and AP is 1.
    result = bracketed([make_sample("a", [RIGHT])], [make_line("a", [(*RIGHT, 0.5)] * 2)])["ties"]
    assert (result["mean"]["default"]["full"], result["spread"]["default"]["full"]) == (1.0, 0.0)


def small_problem(rng):
    """One class, at most six detections in two images, with few scores and many duplicates."""
    places = [(x, 0, x + 9, 9) for x in (0, 100, 200)]
    samples = [
        make_sample(name, [(box, BOX, RIDE_BICYCLE) for box in places[: rng.randint(1, 3)]])
        for name in "ab"
    ]
    weights = rng.choice(((5, 2, 1), (1, 1, 1)))
    lines = []
    for sample in samples:
        boxes = rng.choices(places, weights, k=3)
        line = [
            (box, rng.choice((BOX, BOX, FAR)), RIDE_BICYCLE, rng.choice((0.5, 0.5, 1.0)))
            for box in boxes
        ]
        lines.append(make_line(sample.file_name, line))
    return samples, lines


def test_best_and_worst_are_those_of_all_orders():
    """Every permutation of the rows through the slow reference, which sorts stably by score."""
    differing = 0
    for _ in range(8):
        seed = random.randrange(2**32)
        samples, lines = small_problem(random.Random(seed))
        truth = [(i, pair.human, pair.object) for i, s in enumerate(samples) for pair in s.pairs]
        detections = [
            (i, instance["human"], instance["object"], instance["scores"][0])
            for i, line in enumerate(lines) for instance in line["instances"]
        ]  # fmt: skip
        aps = set()
        for order in itertools.permutations(detections):
            aps.add(reference_ap(order, truth, collections.Counter()))
        result = bracketed(samples, lines)["ties"]
        for setting in SETTINGS:
            found = [result[name][setting]["full"] for name in ("worst", "best")]
            assert found == pytest.approx([min(aps), max(aps)], abs=1e-12), (seed, setting)
        differing += len(aps) > 1
    assert differing


def test_no_random_order_leaves_the_bracket():
    for _ in range(8):
        seed = random.randrange(2**32)
        samples, lines = random_problem(random.Random(seed))
        samples[0] = make_sample("0.jpg", [RIGHT])  # so that there is a true pair
        lines[0] = make_line("0.jpg", [(*WRONG, 0.5), (*RIGHT, 0.5)])
        result = bracketed(samples, lines)["ties"]
        for setting in SETTINGS:
            worst, mean, official, best = (
                result[name][setting]["full"] for name in ("worst", "mean", "official", "best")
            )
            assert worst - 1e-12 <= min(mean, official) <= max(mean, official) <= best + 1e-12, seed


def test_nothing_detected_and_nothing_to_average():
    result = bracketed([make_sample("a")], [make_line("a")])["ties"]
    assert (result["tied"], result["mean"]["default"]["full"]) == (0, None)
    assert bracketed([make_sample("a", [RIGHT])], [make_line("a")])["ties"]["best"]["default"] == {
        "full": 0.0, "rare": None, "non_rare": 0.0,
    }  # fmt: skip


def test_rows_of_the_table():
    rows = evaluate.table(bracketed(*two_images())).splitlines()[3:]
    assert [row.split()[0] for row in rows if not row.endswith("these")][1:] == ["100.00", "50.00"]
    assert [row[55:] for row in rows] == list(ties.ROWS.values())


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match='ties is "official" or "bracket", not \'best\''):
        evaluate.evaluate([], [], MANY, ties="best")
