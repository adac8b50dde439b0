"""engine/scoring/breakdown.py: cases worked by hand, and a slow reference on random data."""

import random

import pytest

import evaluate
import hicodet
from engine.scoring import breakdown
from tests.pairs import (
    BOX,
    FAR,
    HOLD_BICYCLE,
    MANY,
    RIDE_BICYCLE,
    RIDE_HORSE,
    eleven_points,
    make_line,
    make_sample,
    random_problem,
    reference_iou,
)  # fmt: skip

THIRD = (0.0, 0.0, 29.0, 9.0)  # overlaps BOX by 100 / 300
TENTH = (0.0, 0.0, 99.0, 9.0)  # by 100 / 1000
ELEVENTH = (0.0, 0.0, 109.0, 9.0)  # by 100 / 1100


def result_of(samples, lines):
    return evaluate.evaluate(lines, samples, MANY, classes="present", breakdown=True)


def broken_down(truth, detections):
    """The breakdown of one image; truth: (human, object, hoi_id), detections: with a score."""
    known = {hicodet.HOI_CLASSES[hoi_id][1] for *_, hoi_id in truth}
    sample = make_sample("a", truth, known)
    return result_of([sample], [make_line("a", detections)])["breakdown"]


# ---- why a pair was missed


@pytest.mark.parametrize("kind, detections", [
    ("image unparsed", []),
    ("wrong verb", [(BOX, BOX, HOLD_BICYCLE, 1.0)]),
    ("wrong object", [(BOX, BOX, RIDE_HORSE, 1.0)]),
    ("box below 0.5", [(THIRD, BOX, RIDE_BICYCLE, 1.0)]),
    ("box below 0.5", [(BOX, TENTH, RIDE_BICYCLE, 1.0)]),
    ("no such object box", [(BOX, ELEVENTH, RIDE_BICYCLE, 1.0)]),
    ("no such object box", [(BOX, THIRD, HOLD_BICYCLE, 1.0)]),  # another class is not near
    ("no such person box", [(FAR, FAR, RIDE_BICYCLE, 1.0)]),
    ("not paired", [(BOX, FAR, RIDE_HORSE, 1.0), (FAR, BOX, HOLD_BICYCLE, 1.0)]),
    (None, [(BOX, BOX, RIDE_BICYCLE, 1.0)]),
])  # fmt: skip
def test_reason_of_one_pair(kind, detections):
    result = broken_down([(BOX, BOX, RIDE_BICYCLE)], detections)
    assert result["why"] == [kind] and result["missed"] == (kind is not None)


def reference_reason(pair, detections, found):
    """One pair; detections: (human, object, hoi_id, score) of its image."""
    if found:
        return None
    if not detections:
        return "image unparsed"
    verb, name = hicodet.HOI_CLASSES[pair.hoi_id]
    seen, persons, objects = set(), [], []
    for human, object_, hoi_id, _ in detections:
        other_verb, other_name = hicodet.HOI_CLASSES[hoi_id]
        person, thing = reference_iou(human, pair.human), reference_iou(object_, pair.object)
        persons.append(person)
        objects.append(thing)
        if person >= 0.5 and thing >= 0.5:
            if other_name != name:
                seen.add("wrong object")
            else:
                seen.add("duplicate taken" if other_verb == verb else "wrong verb")
        elif hoi_id == pair.hoi_id and person >= 0.1 and thing >= 0.1:
            seen.add("box below 0.5")
    for kind in "duplicate taken", "wrong verb", "wrong object", "box below 0.5":
        if kind in seen:
            return kind
    if max(persons) < 0.5:
        return "no such person box"
    return "no such object box" if max(objects) < 0.5 else "not paired"


def flat(samples, lines):
    """[(image, pair)] and [(image, (human, object, hoi_id, score))] in the official order."""
    pairs = [(i, pair) for i, sample in enumerate(samples) for pair in sample.pairs]
    detections = []
    for i, line in enumerate(lines):
        for instance in line["instances"]:
            hoi_id = hicodet.HOI_IDS[instance["verbs"][0], instance["object_class"]]
            boxes = instance["human"], instance["object"]
            detections.append((i, (*boxes, hoi_id, instance["scores"][0])))
    return pairs, sorted(detections, key=lambda row: -row[1][3])


def reference_found(pairs, detections):
    """{row of pairs: row of the detection that is right for it}, one detection after the other."""
    taken = {}
    for row, (image, (human, object_, hoi_id, _)) in enumerate(detections):
        best, best_overlap = None, 0.0
        for p, (true_image, pair) in enumerate(pairs):
            if true_image == image and pair.hoi_id == hoi_id:
                ious = reference_iou(human, pair.human), reference_iou(object_, pair.object)
                if min(ious) > best_overlap:
                    best, best_overlap = p, min(ious)
        if best_overlap >= 0.5 and best not in taken:
            taken[best] = row
    return taken


def small_problems(count):
    """Random problems in which images have no or few detections, some of them of other classes."""
    for _ in range(count):
        seed = random.randrange(2**32)
        rng = random.Random(seed)
        samples, lines = random_problem(rng)
        for line in lines:
            line["instances"] = line["instances"][: rng.choice((0, 1, 3, 99))]
            for instance in rng.sample(line["instances"], len(line["instances"]) // 2):
                hoi_id = rng.choice((RIDE_BICYCLE, HOLD_BICYCLE, HOLD_BICYCLE, RIDE_HORSE))
                verb, instance["object_class"] = hicodet.HOI_CLASSES[hoi_id]
                instance["verbs"] = [verb]
        yield seed, samples, lines


# ---- mAP if a kind were fixed


def test_a_wrong_verb_is_replaced():
    # Image a: "hold" at 0.9 for "ride". Image b: "hold" is right at 0.5. Before: ride 0, and hold
    # 1/2 after the wrong one. Fixed: ride is right at 0.9 and the wrong "hold" is gone: 1 and 1.
    ride, hold = (BOX, BOX, RIDE_BICYCLE), (BOX, BOX, HOLD_BICYCLE)
    samples = [make_sample("a", [ride]), make_sample("b", [hold])]
    lines = [make_line("a", [(*hold, 0.9)]), make_line("b", [(*hold, 0.5)])]
    result = result_of(samples, lines)
    assert result["default"]["full"] == pytest.approx(0.25)
    kinds = result["breakdown"]["kinds"]
    assert kinds["wrong verb"]["map_gain"] == pytest.approx(0.75)
    assert all(row["map_gain"] == 0 for kind, row in kinds.items() if kind != "wrong verb")


def reference_fixed_map(kind, why, pairs, detections, right):
    """Full mAP over the classes present after one kind was fixed; row after row."""
    rows, removed = [], set()
    for (image, pair), reason in zip(pairs, why, strict=True):
        if reason != kind:
            continue
        at_fault = [
            row for row, (other, detection) in enumerate(detections)
            if other == image and reference_reason(pair, [detection], found=False) == kind
        ] if kind in breakdown.KINDS[1:5] else []  # fmt: skip
        score = max((detections[row][1][3] for row in at_fault), default=float("-inf"))
        rows.append((score, image, pair.hoi_id, True))
        removed |= set(at_fault) - right
    rows = [
        (detection[3], image, detection[2], row in right)
        for row, (image, detection) in enumerate(detections) if row not in removed
    ] + rows  # fmt: skip
    aps = []
    for hoi_id in {pair.hoi_id for _, pair in pairs}:
        own = [row for row in rows if row[2] == hoi_id]
        ranked = sorted(own, key=lambda row: (-row[0], row[1]))
        npos = sum(pair.hoi_id == hoi_id for _, pair in pairs)
        aps.append(eleven_points([row[3] for row in ranked], npos))
    return sum(aps) / len(aps)


def test_reasons_and_gains_equal_the_reference_on_random_data():
    seen, gained = set(), set()
    for seed, samples, lines in small_problems(50):
        pairs, detections = flat(samples, lines)
        found = reference_found(pairs, detections)
        why = [
            reference_reason(pair, [d for i, d in detections if i == image], row in found)
            for row, (image, pair) in enumerate(pairs)
        ]
        result = result_of(samples, lines)
        assert result["breakdown"]["why"] == why, seed
        seen |= set(why)
        for kind, row in result["breakdown"]["kinds"].items() if pairs else ():
            assert row["pairs"] == why.count(kind)
            expected = reference_fixed_map(kind, why, pairs, detections, set(found.values()))
            got = result["default"]["full"] + row["map_gain"]
            assert got == pytest.approx(expected, abs=1e-12), (seed, kind)
            gained |= {kind} if row["map_gain"] > 1e-9 else set()
    assert seen == {None, *breakdown.KINDS} and gained == set(breakdown.KINDS)


# ---- what is printed


def test_table_by_hand():
    # "hold" is right and stays so; "ride" goes from 0 to 1.
    truth = [(BOX, BOX, HOLD_BICYCLE), (BOX, BOX, RIDE_BICYCLE)]
    printed = breakdown.breakdown_table(broken_down(truth, [(BOX, BOX, HOLD_BICYCLE, 0.9)]))
    title, *rows = printed.splitlines()
    assert title.split() == "1 of 2 true pairs missed pairs share mAP if fixed".split()
    for row in rows:
        expected = ["1", "100.0%", "+50.00"] if "wrong verb" in row else ["0", "0.0%", "+0.00"]
        assert row.split()[-3:] == expected and len(row) == len(title)
    # nothing to average, and nothing missed
    rows = breakdown.breakdown_table(broken_down([], [])).splitlines()[1:]
    assert {tuple(line.split()[-3:]) for line in rows} == {("0", "-", "-")}
