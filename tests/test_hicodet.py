"""hicodet.py, the data set: vocabulary, merging, box frames."""

import pytest

import hicodet
from hicodet import HOI, Pair

HOLD_BICYCLE, RIDE_BICYCLE, SIT_ON_BICYCLE, RIDE_HORSE = map(
    hicodet.HOI_CLASSES.index,
    [("hold", "bicycle"), ("ride", "bicycle"), ("sit on", "bicycle"), ("ride", "horse")],
)
PERSON, BICYCLE = (10.0, 10.0, 50.0, 90.0), (20.0, 50.0, 80.0, 100.0)


def test_vocabulary():
    assert len(hicodet.OBJECTS) == len(set(hicodet.OBJECTS)) == 80
    assert hicodet.OBJECTS[:2] + hicodet.OBJECTS[-2:] == (
        "person", "bicycle", "hair drier", "toothbrush",
    )  # fmt: skip
    assert len(hicodet.VERBS) == len(set(hicodet.VERBS)) == 117
    assert hicodet.VERBS[57] == "no interaction"  # 58th of the official list of verbs
    assert len(hicodet.HOI_CLASSES) == len(set(hicodet.HOI_CLASSES)) == 600
    assert {name for _, name in hicodet.HOI_CLASSES} == set(hicodet.OBJECTS)
    assert sum(verb == "no interaction" for verb, _ in hicodet.HOI_CLASSES) == 80
    assert hicodet.HOI_CLASSES[0] == ("board", "airplane")
    assert hicodet.HOI_CLASSES[245] == ("sit on", "bench")
    assert hicodet.HOI_CLASSES[599] == ("no interaction", "zebra")


def test_real_merging(real_samples):
    hois = [hoi for sample in real_samples for hoi in sample.hois]
    # With widths counted as x2 - x1 + 1 there would be 22,145.
    assert len(hois) == 22221
    assert sum(len(hoi.verbs) for hoi in hois) == 33405  # every pair is in one instance
    assert all(len(set(hoi.verbs)) == len(hoi.verbs) for hoi in hois)
    assert max(len(sample.hois) for sample in real_samples) == 161


def test_iou():
    # 10 x 10 and 10 x 10, shifted by 5: shared 5 x 10 = 50 of 100 + 100 - 50 = 150.
    assert hicodet.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert hicodet.iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert hicodet.iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0  # they touch
    assert hicodet.iou((5, 5, 5, 9), (0, 0, 10, 10)) == 0  # empty
    assert hicodet.iou((10, 10, 0, 0), (10, 10, 0, 0)) == 0  # inverted
    for side in (1e300, 1e-300):
        assert hicodet.iou((0, 0, side, side), (0, 0, side, side)) == 0  # area inf, and 0
    assert hicodet.iou((-1e308, -1e308, 1e308, 1e308), (0, 0, 1, 1)) == 0


def shifted(box, by):
    return box[0] + by, box[1], box[2] + by, box[3]


def test_merging_joins_verbs_on_overlapping_boxes():
    pairs = [
        Pair(PERSON, BICYCLE, RIDE_BICYCLE),
        Pair(shifted(PERSON, 4), shifted(BICYCLE, 4), SIT_ON_BICYCLE),
        Pair(PERSON, BICYCLE, RIDE_HORSE),
    ]
    ride = HOI(PERSON, BICYCLE, "bicycle", ("ride", "sit on"))  # boxes of the first
    assert hicodet.merge_pairs(pairs) == (ride, HOI(PERSON, BICYCLE, "horse", ("ride",)))
    assert hicodet.merge_pairs([]) == ()


def test_merging_needs_both_boxes_and_another_verb():
    far = shifted(PERSON, 500), shifted(BICYCLE, 500)
    for human, obj in ((far[0], BICYCLE), (PERSON, far[1]), far):
        pairs = [Pair(PERSON, BICYCLE, RIDE_BICYCLE), Pair(human, obj, SIT_ON_BICYCLE)]
        assert len(hicodet.merge_pairs(pairs)) == 2
    assert len(hicodet.merge_pairs([Pair(PERSON, BICYCLE, RIDE_BICYCLE)] * 2)) == 2
    # (0, 0, 10, 10) and (0, 0, 10, 5) share 50 of 100: exactly 0.5 is not enough.
    half = Pair((0, 0, 10, 5), BICYCLE, SIT_ON_BICYCLE)
    assert len(hicodet.merge_pairs([Pair((0, 0, 10, 10), BICYCLE, RIDE_BICYCLE), half])) == 2


def test_merging_prefers_the_best_overlap_and_then_the_earliest():
    # Boxes 40 wide: shifted by 8 they overlap by 32 / 48 = 0.67, by 2 by 38 / 42 = 0.90.
    left, right = shifted(PERSON, -8), shifted(PERSON, 2)
    pairs = [Pair(left, BICYCLE, RIDE_BICYCLE), Pair(right, BICYCLE, RIDE_BICYCLE)]
    pairs.append(Pair(PERSON, BICYCLE, SIT_ON_BICYCLE))
    assert [hoi.verbs for hoi in hicodet.merge_pairs(pairs)] == [("ride",), ("ride", "sit on")]
    # "hold" prefers that instance too. A second "sit on" joins the other one.
    pairs += [Pair(PERSON, BICYCLE, HOLD_BICYCLE), Pair(PERSON, BICYCLE, SIT_ON_BICYCLE)]
    assert [hoi.verbs for hoi in hicodet.merge_pairs(pairs)] == [
        ("ride", "sit on"), ("ride", "sit on", "hold"),
    ]  # fmt: skip
    same = [Pair(PERSON, BICYCLE, RIDE_BICYCLE)] * 2 + [Pair(PERSON, BICYCLE, SIT_ON_BICYCLE)]
    assert [hoi.verbs for hoi in hicodet.merge_pairs(same)] == [("ride", "sit on"), ("ride",)]


def test_frames():
    # 640 x 427 becomes 644 x 420: x times 644 / 640, y times 420 / 427.
    size, model = (640, 427), (644, 420)
    there = hicodet.to_model_frame((320, 305, 640, 427), size, model)
    assert there == pytest.approx((322, 300, 644, 420))
    assert hicodet.to_image_frame(there, size, model) == pytest.approx((320, 305, 639, 426))
    assert hicodet.to_image_frame((-5, -1e308, 1e308, 999), size, model) == (0, 0, 639, 426)
