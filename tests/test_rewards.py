"""Eqs. 6-23, each with numbers worked out by hand."""

from collections import Counter
from dataclasses import replace

import pytest

import rewards
from hicodet import HOI, Completion, Prediction

# Two boxes of 10x10 whose left and right halves meet: intersection 5*10, union 150, IoU 1/3.
BOX, THIRD = (0.0, 0.0, 10.0, 10.0), (5.0, 0.0, 15.0, 10.0)
HALF = (0.0, 0.0, 10.0, 5.0)  # inside BOX: IoU 50/100 = 0.5 with it
CLOSE = (0.0, 0.0, 10.0, 8.0)  # inside BOX: IoU 80/100 = 0.8 with it
FAR = (50.0, 50.0, 60.0, 60.0)  # IoU 0 with all of the above
LINE, INVERTED = (0.0, 0.0, 10.0, 0.0), (10.0, 10.0, 0.0, 0.0)  # no area


def predicted(human=BOX, object=FAR, object_class="bicycle", verbs=("ride",), key_count=4):
    return Prediction(human, object, object_class, tuple(verbs), key_count, (0, 0))


def truth(human=BOX, object=FAR, object_class="bicycle", verbs=("ride",)):
    return HOI(human, object, object_class, tuple(verbs))


def completion(*instances, has_think=True, has_answer=True):
    return Completion(has_think, has_answer, tuple(instances))


def test_eq6_tag_reward():
    assert rewards.tag_reward(completion(has_think=True)) == 1.0
    assert rewards.tag_reward(completion(has_think=False)) == 0.0


@pytest.mark.parametrize(
    "human, object, printed, pair",
    [
        (BOX, FAR, 0, 0),  # IoU 1 and 1
        (CLOSE, FAR, 0, 0),  # 0.8 and 1
        (CLOSE, BOX, 0, 1),  # 0.8 and 0: one person, another object
        (FAR, FAR, 0, 1),  # 0 and 1: another person, the same object
        (HALF, BOX, 1, 1),  # 0.5 and 0: not MORE than 0.5
        (THIRD, BOX, 1, 1),  # 1/3 and 0
        (None, FAR, 0, 0),  # a box is missing
        (BOX, None, 0, 0),
        (LINE, BOX, 0, 0),  # a box has no area
        (BOX, INVERTED, 0, 0),
    ],
)
def test_eq7_box_reward(human, object, printed, pair):
    instance, recorded = predicted(human, object), [(BOX, FAR)]
    assert rewards.box_reward(instance, recorded) == printed
    assert rewards.box_reward(instance, recorded, "pair") == pair
    complete = not {human, object} & {None, LINE, INVERTED}
    assert rewards.box_reward(instance, []) == complete


def test_eq7_box_reward_compares_with_every_recorded_pair():
    recorded = [(FAR, FAR), (THIRD, BOX), (BOX, THIRD)]
    assert rewards.box_reward(predicted(BOX, THIRD), recorded, "pair") == 0
    # Human boxes overlap one record and object boxes another: no pair is repeated.
    assert rewards.box_reward(predicted(FAR, BOX), recorded, "pair") == 1


def test_eq8_recorded_boxes():
    recorded = ((BOX, FAR),)
    assert rewards.recorded_boxes((), predicted(BOX, FAR), 1.0) == recorded
    assert rewards.recorded_boxes(recorded, predicted(FAR, BOX), 1.0) == ((BOX, FAR), (FAR, BOX))
    assert rewards.recorded_boxes(recorded, predicted(CLOSE, FAR), 0.0) == recorded
    assert recorded == ((BOX, FAR),)


def test_eq8_a_duplicate_is_not_recorded():
    # Heights 10, 6, 3.2: IoU 6/10 of the first and second, 3.2/6 = 0.53 of the second and third,
    # 3.2/10 of the first and third. The second duplicates the first and is not recorded.
    boxes = [BOX, (0.0, 0.0, 10.0, 6.0), (0.0, 0.0, 10.0, 3.2)]
    instances = [predicted(box, box) for box in boxes]
    assert rewards.box_rewards(instances) == [1, 0, 1]
    # 0.2 + (0.6 + 0 + 0.6) / 3
    assert rewards.format_reward(completion(*instances), [truth()] * 3) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "object_class, reward",
    [("dining table", 1), ("dining_table", 0), ("unicorn", 0), ("ride", 0), ("", 0), (None, 0)],
)
def test_eq9_object_format_reward(object_class, reward):
    assert rewards.object_format_reward(predicted(object_class=object_class)) == reward


def test_eq10_verb_format_reward():
    # known and distinct: ride, sit on; as written: five labels -> 2/5
    verbs = ("ride", "ride", "sit on", "fly to the moon", "ride")
    assert rewards.verb_format_reward(predicted(verbs=verbs)) == pytest.approx(0.4)
    assert rewards.verb_format_reward(predicted(verbs=("ride", "sit on"))) == 1.0
    assert rewards.verb_format_reward(predicted(verbs=())) == 0.0


def test_eq11_valid_verbs():
    assert rewards.valid_verbs(("ride", "sit on", "ride", "moon")) == {"ride", "sit on"}
    assert rewards.valid_verbs(()) == set()


@pytest.mark.parametrize(
    "key_count, alpha",
    [(4, 1.0), (3, 4 / 5), (5, 4 / 5), (0, 4 / 8), (8, 4 / 8), (12, 4 / 12)],
)
def test_eq12_key_penalty(key_count, alpha):
    assert rewards.key_penalty(key_count) == pytest.approx(alpha)


def test_eq13_format_reward():
    instances = [
        predicted(),  # 1 * (0.2 + 0.2 + 0.2) = 0.6
        predicted(THIRD, BOX, "unicorn", ("ride", "ride"), 5),  # 4/5 * (0.2 + 0 + 0.1) = 0.24
        predicted(BOX, BOX),  # a duplicate of the first human box: 0, labels included
        predicted(None, BOX),  # no human box: 1 * (0 + 0.2 + 0.2) = 0.4
    ]
    hois = [truth()] * 5
    # 0.2 + (0.6 + 0.24 + 0 + 0.4) / max(5, 4)
    assert rewards.format_reward(completion(*instances), hois) == pytest.approx(0.448)
    assert rewards.format_reward(completion(*instances), hois[:1]) == pytest.approx(0.2 + 1.24 / 4)
    # under "pair" the third is no duplicate: 0.6 more
    assert rewards.format_reward(completion(*instances), hois, "pair") == pytest.approx(0.568)


def test_eq14_object_label_reward():
    hois = [truth(object_class=name) for name in ("bicycle", "bicycle", "dog")]
    instances = [
        predicted(object_class="bicycle"),  # 1, one bicycle is left
        predicted(object_class="cat"),  # 0
        predicted(object_class="bicycle", key_count=5),  # 4/5, none is left
        predicted(object_class="bicycle"),  # 0
    ]
    # (1 + 4/5) / max(3, 4)
    assert rewards.object_label_reward(instances, hois) == pytest.approx(0.45)
    # (1 + 0) / max(3, 2)
    assert rewards.object_label_reward(instances[:2], hois) == pytest.approx(1 / 3)


def test_eq15_drop_object_label():
    remaining = Counter({"bicycle": 2, "dog": 1})
    assert rewards.drop_object_label(remaining, "bicycle") == {"bicycle": 1, "dog": 1}
    assert "dog" not in rewards.drop_object_label(remaining, "dog")
    assert rewards.drop_object_label(remaining, "cat") == remaining
    assert rewards.drop_object_label(remaining, None) == remaining
    assert remaining == {"bicycle": 2, "dog": 1}


def test_eq16_verb_label_reward():
    hois = [truth(verbs=("ride", "sit on")), truth(verbs=("ride", "hold"))]
    instances = [
        # left: ride 2, sit on, hold. Both "ride" count, one occurrence is dropped: 2/3
        predicted(verbs=("ride", "ride", "moon")),
        predicted(verbs=("ride",), key_count=3),  # left: ride, sit on, hold: 4/5 * 1
        predicted(verbs=("ride", "hold")),  # left: sit on, hold: 1/2
        predicted(verbs=()),  # 0, not 0/0
    ]
    # (2/3 + 4/5 + 1/2) / max(2, 4)
    assert rewards.verb_label_reward(instances, hois) == pytest.approx(59 / 120)
    # 2/3 / max(2, 1)
    assert rewards.verb_label_reward(instances[:1], hois) == pytest.approx(1 / 3)


def test_eq17_drop_verbs():
    remaining = Counter({"ride": 2, "hold": 1})
    assert rewards.drop_verbs(remaining, {"ride", "hold"}) == {"ride": 1}
    assert rewards.drop_verbs(remaining, set()) == remaining
    assert remaining == {"ride": 2, "hold": 1}


def test_eq18_matched_verbs():
    remaining = Counter({"ride": 2, "hold": 1})
    assert rewards.matched_verbs(("ride", "ride", "fly"), remaining) == {"ride"}
    assert rewards.matched_verbs((), remaining) == set()


def test_eq19_matching_cost():
    assert rewards.matching_cost([[1.0, 0.25], [0.0, 0.5]]) == [[0.0, 0.75], [1.0, 0.5]]


def test_eq20_pair_similarity():
    # 1/2 * (1/3 + 1/2)
    assert rewards.pair_similarity(predicted(THIRD, HALF), truth(BOX, BOX)) == pytest.approx(5 / 12)


def test_eq21_match_instances():
    # Greedy takes 0.1 first and pays 0.1 + 0.9; the best matching pays 0.2 + 0.3.
    assert rewards.match_instances([[0.1, 0.2], [0.3, 0.9]]) == [(0, 1), (1, 0)]
    assert rewards.match_instances([[0.9], [0.1]]) == [(1, 0)]
    assert rewards.match_instances([[0.9, 0.1]]) == [(0, 1)]


def test_eq22_iou_reward():
    hois = [truth(BOX, BOX), truth(FAR, FAR)]
    # The second answer equals the first truth. The first answer is matched with FAR and gets 0.
    instances = [predicted(THIRD, HALF), predicted(BOX, BOX)]
    assert rewards.iou_reward(instances, hois) == pytest.approx(1 / 2)
    # Alone it gets (1/3 + 1/2) / 2 = 5/12, over N_a = 2; three of it earn no more.
    assert rewards.iou_reward(instances[:1], hois) == pytest.approx(5 / 24)
    assert rewards.iou_reward(instances[:1] * 3, hois) == pytest.approx(5 / 24)
    # An instance without both boxes takes no part.
    assert rewards.iou_reward([predicted(None, BOX), *instances], hois) == pytest.approx(1 / 2)
    assert rewards.iou_reward([predicted(BOX, None)], hois) == 0.0


def test_rewards_of_labels_on_matched_pairs():
    """The boxes decide who is compared with whom: BOX with BOX, and FAR with FAR."""
    hois = [truth(BOX, BOX, verbs=("ride", "sit on")), truth(FAR, FAR, "dog", ("hold",))]
    dog = predicted(FAR, FAR, "dog", ("hold", "hold", "moon"))
    instances = [dog, predicted(BOX, BOX, key_count=5)]
    # Objects (1 + 4/5) / 2. Verbs: 1 in common of 3 written, 4/5 of 1 in common of 2 true.
    assert rewards.matched_object_reward(instances, hois) == pytest.approx(0.9)
    assert rewards.matched_verb_reward(instances, hois) == pytest.approx(11 / 30)
    # Two instances without a pair: one surplus, one that lacks a box.
    surplus = [predicted(BOX, FAR, "dog", ("hold",)), predicted(None, FAR, "dog", ("hold",)), dog]
    assert rewards.matched_object_reward(surplus, hois[1:]) == pytest.approx(1 / 3)
    assert rewards.matched_verb_reward(surplus, hois[1:]) == pytest.approx(1 / 9)
    unlabelled = predicted(BOX, BOX, None, ())
    for answer, true in ((instances, []), ([], hois), ([unlabelled], hois)):
        assert rewards.matched_object_reward(answer, true) == 0
        assert rewards.matched_verb_reward(answer, true) == 0


# Overall reward

PARTS = ("format", "object", "verb", "iou", "total")


def total(answer, hois, **options):
    """The values in the order of PARTS."""
    parts = rewards.total_reward(answer, hois, **options)
    assert tuple(parts) == PARTS
    return pytest.approx(tuple(parts.values()))


def test_eq23_total_reward():
    answer = completion(predicted(THIRD, HALF, "bicycle", ("ride", "moon")))
    # format 0.2 + 0.2 + 0.2 + 0.2 * 1/2, object 1, verb 1/2, IoU 5/12
    assert (0.7, 1.0, 0.5, 5 / 12, 157 / 60) == total(answer, [truth(BOX, BOX)])
    assert (0, 0, 0, 0, 0) == total(replace(answer, has_answer=False), [truth(BOX, BOX)])


def test_eq23_total_reward_without_parts_of_table_3():
    for without, values in {
        (): (0.8, 1, 1, 1, 3.8),
        ("label",): (0.8, 0, 0, 1, 1.8),
        ("iou",): (0.8, 1, 1, 0, 2.8),
        ("label", "iou"): (0.8, 0, 0, 0, 0.8),
    }.items():
        for rule in ("printed", "matched"):
            options = {"without": without, "label_reward": rule}
            assert values == total(completion(predicted()), [truth()], **options)
        largest = [part["largest"] for part in rewards.reward_parts(without=without).values()]
        assert largest == [value for value in values[:4] if value]


def test_eq23_total_reward_where_duplicates_earn_nothing():
    """A duplicate neither earns the bicycle nor takes it from the next instance."""
    first, last = predicted(BOX, BOX, "dog", ("walk",)), predicted(FAR, FAR)
    # One bicycle and one ride are true. As printed the copy earns 4/5 of them (it has an extra
    # key); otherwise the last instance earns them.
    answer, hois = completion(first, predicted(BOX, BOX, key_count=5), last), [truth(FAR, FAR)]
    assert (0.6, 4 / 15, 4 / 15, 1, 1.6 + 8 / 15) == total(answer, hois)
    assert (0.6, 1 / 3, 1 / 3, 1, 1.6 + 2 / 3) == total(answer, hois, duplicates_earn="nothing")


@pytest.mark.parametrize("options", [{"without": ["verb"]}, {"duplicate_rule": "both"},
                                     {"duplicates_earn": "some"}, {"label_reward": "both"}])
def test_eq23_total_reward_refuses_unknown_names(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        rewards.total_reward(completion(), [truth()], **options)


def test_eq23_total_reward_without_ground_truth_is_the_tag_reward():
    for instances in ((), (predicted(),)):
        assert (0.2, 0, 0, 0, 0.2) == total(completion(*instances), [])
