"""Rewards of whole answers: attempts to cheat, a slow reference, random text, real annotations."""

import json
import math
import random
from dataclasses import replace
from fractions import Fraction
from itertools import permutations

import pytest

import hicodet
import rewards
from hicodet import HOI, parse_completion

RIDER = HOI((10.0, 20.0, 50.0, 100.0), (30.0, 60.0, 90.0, 110.0), "bicycle", ("ride", "sit on"))
INSTANCE = {"human": [10, 20, 50, 100], "object": [30, 60, 90, 110],
            "object class": "bicycle", "verb class": "ride, sit on"}


MATCHED, NOTHING = {"label_reward": "matched"}, {"duplicates_earn": "nothing"}


def written(*instances, think="<think> a </think> "):
    return f"{think}<answer> {json.dumps(list(instances))} </answer>"


def earned(text, hois, **options):
    return rewards.total_reward(parse_completion(text), hois, **options)


def test_a_perfect_answer_with_one_pair_earns_exactly_3_8():
    text = hicodet.format_completion([RIDER], "One person rides a bicycle.")
    assert earned(text, [RIDER])["total"] == 3.8
    assert earned(written(INSTANCE), [RIDER])["total"] == 3.8
    assert earned(written(INSTANCE, think=""), [RIDER])["total"] == pytest.approx(3.6)


def test_a_perfect_answer_with_one_person_and_two_objects():
    bag = HOI(RIDER.human, (10.0, 25.0, 30.0, 50.0), "backpack", ("wear",))
    text = hicodet.format_completion([RIDER, bag], "A rider wears a backpack.")
    # As printed the bag's instance repeats the human box: format 0.2 + (0.6 + 0) / 2.
    assert earned(text, [RIDER, bag]) == pytest.approx(
        {"format": 0.5, "object": 1, "verb": 1, "iou": 1, "total": 3.5})
    assert earned(text, [RIDER, bag], duplicate_rule="pair")["total"] == pytest.approx(3.8)
    # Then the bag's labels earn nothing: 0.5 + 1/2 + 1/2 + 1. Under "pair" it is no duplicate.
    for rule, total in (("printed", 2.5), ("pair", 3.8)):
        options = NOTHING | {"duplicate_rule": rule}
        assert earned(text, [RIDER, bag], **options)["total"] == pytest.approx(total)


def changed(**values):
    return INSTANCE | {key.replace("_", " "): value for key, value in values.items()}


def apart(i):
    """INSTANCE with boxes far from those of every other `i`."""
    return changed(human=[500 * i, 900, 500 * i + 40, 980], object=[500 * i, 700, 500 * i + 9, 709])


TEXT = written(INSTANCE)
REPEATED_KEY = TEXT.replace("}", ', "verb class": "ride"' * 3 + "}")
POINTS = INSTANCE | {"human": [0, 0, 0, 0], "object": [0, 0, 0, 0]}
INVERTED = {"human": [50, 100, 10, 20], "object": [90, 110, 30, 60]}
UNREAD = (0.6, 1, 1, 0)  # one box unread: 0.2 + (0 + 0.2 + 0.2), no similarity
CHEATS = {  # text -> format, object, verb, IoU; the ground truth is RIDER, N_a = 1
    # One of ten is unique: 0.2 + 0.6/10. Labels match once. Surplus does not lower the IoU reward.
    "ten copies of one instance": (written(*[INSTANCE] * 10), (0.26, 0.1, 0.1, 1)),
    # A box without area counts as missing, so r_b = 0: 0.2 + 10*0.4/10, and no similarity.
    "ten copies of inverted boxes": (written(*[INSTANCE | INVERTED] * 10), (0.6, 0.1, 0.1, 0)),
    # 0.2 + (0.6 + 0.4 + 0.4) / 3. The true pair alone earns 3.8.
    "a true pair and two points": (written(INSTANCE, POINTS, POINTS), (2 / 3, 1 / 3, 1 / 3, 1)),
    # Intersection 20*40 = 800, union 40*80 + 60*50 - 800 = 5400; both IoUs are 800/5400 = 4/27.
    "human and object swapped": (
        written(changed(human=INSTANCE["object"], object=INSTANCE["human"])), (0.8, 1, 1, 4 / 27)),
    "an extra key": (written(INSTANCE | {"score": 1}), (0.2 + 0.8 * 0.6, 0.8, 0.8, 1)),  # 4/5
    "a repeated key": (REPEATED_KEY, (0.2 + 4 / 7 * 0.6, 4 / 7, 4 / 7, 1)),  # 7 keys: 4/(4+3)
    # r_kv = 1/5; each "ride" is compared with the same C^(0), so Eq. 16 gives 5/5.
    "one verb five times": (written(changed(verb_class="ride, " * 5)), (0.64, 1, 1, 1)),
    "every verb listed": (  # all are known, two are true
        written(changed(verb_class=", ".join(hicodet.VERBS))), (0.8, 1, 2 / 117, 1)),
    "verbs missing": (  # 3 keys: 4/5 * (0.2 + 0.2 + 0)
        written({k: v for k, v in INSTANCE.items() if k != "verb class"}), (0.52, 0.8, 0, 1)),
    "unknown labels": (  # 0.2 + 0.2 + 0 + 0.2/2
        written(changed(object_class="bike", verb_class="ride, pedal")), (0.5, 0, 0.5, 1)),
    "empty list": (written(), (0.2, 0, 0, 0)),
    "three empty instances more": (written({}, {}, {}, INSTANCE), (0.2 + 0.6 / 4, 0.25, 0.25, 1)),
    "three instances too many": (
        written(INSTANCE, apart(1), apart(2), apart(3)), (0.8, 0.25, 0.25, 1)),
    "one box with x2 < x1": (written(changed(human=INVERTED["human"])), UNREAD),
    "one box with y2 = y1": (written(changed(object=[30, 60, 90, 60])), UNREAD),
    # These boxes are finite; their areas are infinite, inf * 0 and 1e-320 * 1e-320 = 0.
    "an integer of 301 digits": (
        written(changed(human=[-(10**300), -(10**300), 10**300, 10**300])), UNREAD),
    "a box wider than any float": (written(changed(human=[-1e308, 50, 1e308, 50])), UNREAD),
    "a box smaller than any float": (written(changed(human=[0, 0, 1e-320, 1e-320])), UNREAD),
    "not JSON, with one reading": (
        TEXT.replace('"', "'").replace("[10,", "(10").replace("ride", "Ride"), (0.8, 1, 1, 1)),
    "not JSON, and a key too many": (  # 4/5
        TEXT.replace('"human"', "score: 1; human"), (0.2 + 0.8 * 0.6, 0.8, 0.8, 1)),
    "the prompt echoed": (hicodet.prompt_text(), (0.2, 0, 0, 0)),  # its example is no JSON
    "the example of Fig. 4": (
        '<think> reasoning process here </think> <answer> [{"human": [x1, y1, x2, y2], "object": '
        '[x1, y1, x2, y2], "object class": "<object class>", "verb class": "<verb class>, '
        '<verb class>, ... "}] </answer>', (0.2, 0, 0, 0)),
    "no <answer>": (TEXT.replace("answer>", "reply>"), (0, 0, 0, 0)),
    "cut inside the first instance": (TEXT[:TEXT.index("verb class")], (0.2, 0, 0, 0)),
    "cut inside the second instance": (written(INSTANCE, apart(1))[:-50], (0.8, 1, 1, 1)),
}


@pytest.mark.parametrize("text, expected", CHEATS.values(), ids=CHEATS.keys())
def test_attempts_to_cheat(text, expected):
    parts = earned(text, [RIDER])
    names = ("format", "object", "verb", "iou")
    assert [parts[name] for name in names] == pytest.approx(list(expected))
    assert parts["total"] == pytest.approx(sum(expected))


NO_LABEL, NO_IOU = {"without": ["label"]}, {"without": ["iou"]}
COPIES = written(*[INSTANCE] * 3)
LEFT, RIGHT = apart(1), apart(2) | {"object class": "dog", "verb class": "walk"}
SWAPPED = written(LEFT | {"object class": "dog"}, RIGHT | {"object class": "bicycle"})
HANDED_ON = written(LEFT | {"verb class": "walk"}, RIGHT | {"verb class": "ride, sit on"})
FIRST_VERB = written(LEFT | {"verb class": "ride"}, RIGHT)
PEOPLE_SWAPPED = written(LEFT | {"human": RIGHT["human"]}, RIGHT | {"human": LEFT["human"]})
PAIRS = [HOI(tuple(pair["human"]), tuple(pair["object"]), pair["object class"],
             tuple(pair["verb class"].split(", "))) for pair in (LEFT, RIGHT)]
RIDERS = [RIDER, *(replace(RIDER, human=box, object=box)
                   for box in [(900.0, 0.0, 950.0, 80.0), (900.0, 500.0, 950.0, 580.0)])]
TOTALS = {  # text, ground truth, options -> total
    "two pairs": (written(LEFT, RIGHT), PAIRS, {}, 3.8),
    # A missed pair costs 0.6/2 of the format reward, and 1/2 of each label and of the IoU reward.
    # A surplus pair costs 1/2 of each label reward (docs/study.md).
    "one missed": (written(LEFT), PAIRS, {}, 3.8 - 1.8),
    "one missed, without IoU": (written(LEFT), PAIRS, NO_IOU, 2.8 - 1.3),
    "one missed, without labels": (written(LEFT), PAIRS, NO_LABEL, 1.8 - 0.8),
    "one surplus": (written(LEFT, RIGHT), PAIRS[:1], {}, 3.8 - 1),
    "one surplus, without labels": (written(LEFT, RIGHT), PAIRS[:1], NO_LABEL, 1.8),
    # What the label reward does not see as printed, and sees on matched pairs.
    "classes swapped": (SWAPPED, PAIRS, {}, 3.8),
    "classes swapped, labels matched": (SWAPPED, PAIRS, MATCHED, 2.8),
    "verbs swapped": (HANDED_ON, PAIRS, {}, 3.8),
    "verbs swapped, labels matched": (HANDED_ON, PAIRS, MATCHED, 2.8),
    "the first verb only": (FIRST_VERB, PAIRS, {}, 3.8),
    "the first verb only, labels matched": (FIRST_VERB, PAIRS, MATCHED, 3.55),  # (1/2 + 1) / 2
    # Human boxes do not overlap, object boxes do: the IoU reward is 1/2.
    "people swapped": (PEOPLE_SWAPPED, PAIRS, {}, 3.3),
    # Three ride a bicycle: as a plain set, C_gt of Eq. 15 would give at most 1/3.
    "three riders": (hicodet.format_completion(RIDERS, "Three."), RIDERS, {}, 3.8),
    # Boxes 0.2 + 0.6/3, labels 1/3 each, IoU 1/3.
    "one of three": (written(INSTANCE), RIDERS, {}, 1.4),
    # Labels 3/3 each: 0.2 + (0.6 + 0 + 0)/3 + 1 + 1 + 1/3.
    "three copies": (COPIES, RIDERS, {}, 2.4 + 1 / 3),
    "three copies that earn nothing": (COPIES, RIDERS, NOTHING, 1.4),
    # The copies are matched with the other pairs.
    "three copies, labels matched": (COPIES, RIDERS, MATCHED, 2.4 + 1 / 3),
    "three copies, matched, that earn nothing": (COPIES, RIDERS, MATCHED | NOTHING, 1.4),
    # Points have no pair: 0.2 + (0.6 + 0.4 + 0.4)/3 + 1/3 + 1/3 + 1/3.
    "a pair and two points, matched": (
        written(INSTANCE, POINTS, POINTS), RIDERS, MATCHED, 0.2 + 1.4 / 3 + 1),
}


@pytest.mark.parametrize("text, hois, options, total", TOTALS.values(), ids=TOTALS)
def test_total_of_answers(text, hois, options, total):
    assert earned(text, hois, **options)["total"] == pytest.approx(total)


# A slow reference without code in common: sets of pixels, fractions, lists, all permutations


def slow_iou(a, b):
    """On whole-numbered boxes: common pixels over all pixels."""
    a, b = ({(x, y) for x in range(x1, x2) for y in range(y1, y2)} for x1, y1, x2, y2 in (a, b))
    return Fraction(len(a & b), len(a | b)) if a and b else Fraction(0)


def slow_matching(similarity):
    """The largest sum of a one-to-one matching, by trying all of them."""
    if len(similarity) > len(similarity[0]):
        similarity = list(zip(*similarity, strict=True))
    ways = permutations(range(len(similarity[0])), len(similarity))
    return max(sum(row[j] for row, j in zip(similarity, way, strict=True)) for way in ways)


def slow_rewards(instances, hois, rule):
    """Eqs. 6-23 for a text with both tags; an instance is the (key, value) pairs as written."""
    r_format = r_object = r_verb = Fraction(0)
    unique, complete = [], []
    objects_left = [hoi.object_class for hoi in hois]
    verbs_left = [verb for hoi in hois for verb in hoi.verbs]
    for pairs in instances:
        alpha = Fraction(4, max(len(pairs), 8 - len(pairs)))
        last = dict(pairs)
        boxes = (last.get("human", "?"), last.get("object", "?"))
        label, verbs = last.get("object class"), last.get("verb class", "").split(", ")
        verbs = [verb for verb in verbs if verb]

        r_box, duplicate = 0, False
        if "?" not in boxes and all(x1 < x2 and y1 < y2 for x1, y1, x2, y2 in boxes):
            complete.append(boxes)
            hits = [[slow_iou(*ab) > Fraction(1, 2) for ab in zip(boxes, seen)] for seen in unique]
            duplicate = any(h or o if rule == "printed" else h and o for h, o in hits)
            if not duplicate:
                r_box = 1
                unique.append(boxes)
        if not duplicate:
            good = {verb for verb in verbs if verb in hicodet.VERBS}
            share = Fraction(len(good), len(verbs)) if verbs else 0
            r_format += alpha * Fraction(1, 5) * (r_box + (label in hicodet.OBJECTS) + share)

        if label in objects_left:
            r_object += alpha
            objects_left.remove(label)
        matched = [verb for verb in verbs if verb in verbs_left]
        if matched:
            r_verb += alpha * Fraction(len(matched), len(verbs))
        for verb in set(matched):
            verbs_left.remove(verb)
    r_iou = 0
    if complete:
        scores = [[(slow_iou(h, hoi.human) + slow_iou(o, hoi.object)) / 2 for hoi in hois]
                  for h, o in complete]
        r_iou = slow_matching(scores) / len(hois)
    n = max(len(hois), len(instances))
    return [Fraction(1, 5) + r_format / n, r_object / n, r_verb / n, r_iou]


@pytest.fixture
def rng():
    seed = random.SystemRandom().randrange(2**32)
    print("seed of this run:", seed)  # pytest shows it when the test fails
    return random.Random(seed)


def random_box(rng, tidy):
    x1, y1 = rng.randrange(8), rng.randrange(8)
    low = 1 if tidy else -2  # untidy boxes may be empty or inverted
    return [x1, y1, x1 + rng.randint(low, 6), y1 + rng.randint(low, 6)]


def random_instance(rng, boxes):
    """(key, value) pairs: keys missing, repeated or unknown, values good or bad."""
    values = {
        "human": lambda: rng.choice(boxes + ["?"]),
        "object": lambda: rng.choice(boxes + ["?"]),
        "object class": lambda: rng.choice(["bicycle", "dog", "cat", "unicorn"]),
        "verb class": lambda: ", ".join(rng.choices(["ride", "hold", "wash", "moon"],
                                                    k=rng.randrange(5))),
        "score": lambda: 1,
    }
    keys = [key for key in values if rng.random() < (0.2 if key == "score" else 0.9)]
    keys += rng.choices(list(values), k=rng.choice([0, 0, 0, 1, 2]))
    return [(key, values[key]()) for key in keys]


def test_random_answers_against_the_slow_reference(rng):
    for _ in range(400):
        hois = [
            HOI(tuple(random_box(rng, True)), tuple(random_box(rng, True)),
                rng.choice(["bicycle", "dog"]),
                tuple(rng.sample(["ride", "hold", "wash"], rng.randint(1, 3))))
            for _ in range(rng.randint(1, 4))
        ]
        # From a small pool, so boxes repeat. Some are right.
        boxes = [random_box(rng, False) for _ in range(3)] + [list(hoi.human) for hoi in hois]
        instances = [random_instance(rng, boxes) for _ in range(rng.randrange(6))]
        written_ = ["{" + ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs) + "}"
                    for pairs in instances]
        text = f"<think> a </think> <answer> [{', '.join(written_)}] </answer>"
        for rule in ("printed", "pair"):
            parts = earned(text, hois, duplicate_rule=rule)
            expected = slow_rewards(instances, hois, rule)
            assert list(parts.values()) == pytest.approx(
                [float(x) for x in [*expected, sum(expected)]], abs=1e-12), (text, hois, rule)


def test_long_answers_are_scored():
    """10,000 copies, or 1,000 distinct pairs, each compared with all others."""
    hoi = HOI(tuple(apart(0)["human"]), tuple(apart(0)["object"]), "bicycle", ("ride",))
    # One is unique: 0.2 + 0.6/10,000. The first "ride" is found, 1/2 of its verbs.
    assert earned(written(*[apart(0)] * 10_000), [hoi]) == pytest.approx(
        {"format": 0.20006, "object": 1e-4, "verb": 0.5e-4, "iou": 1, "total": 1.20021})
    assert earned(written(*map(apart, range(1000))), [hoi]) == pytest.approx(
        {"format": 0.8, "object": 1e-3, "verb": 0.5e-3, "iou": 1, "total": 1.8015})


PIECES = ["<think>", "</think>", "<answer>", "</answer>", "[", "]", "{", "}", ",", ":", '"', "\\",
          '"human": ', '"object": ', '"object class": ', '"verb class": ', '"bicycle"', '"ride"',
          '"ride, ride, sit on"', "[10, 20, 50, 100]", "[1, 2, 3]", "null", " ", "é", "人", "x1",
          "'", "//", "#", "\n", "None", "```json", "NaN", "\x00", "\ud800", "\\ud800", "\u2028",
          "\u200b", "”", "：", "-", "1e999", "\\'", "[" * 2000, '{"a":' * 500, "9" * 5000, TEXT]
NUMBERS = ["0", "-0.0", "10", "50", "1e308", "-1e308", "1e-320", "NaN", "Infinity", "-Infinity",
           "9" * 400, "-" + "9" * 308, "true", "null", '"10"', "[]"]
SHARES = [1 if len(piece) < 1000 else 0.05 for piece in PIECES]  # the longest take longest to read
TWICE, TWO = written(INSTANCE, INSTANCE), written(INSTANCE, apart(1))


def odd_coordinates(rng):
    odd = [f"[{', '.join(rng.choices(NUMBERS, k=4))}]" for _ in range(2)]
    text = TWICE.replace("[10, 20, 50, 100]", odd[0])
    return text.replace("[30, 60, 90, 110]", odd[1]) if rng.random() < 0.5 else text


def cut_and_doubled(rng):
    text = TWO
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.choices(range(len(text) + 1), k=2))
        middle = rng.choice(["", text[i:j] * 2, *rng.choices(PIECES, SHARES)])
        text = text[:i] + middle + text[rng.choice([i, j]):]
    return text


def loose_pieces(rng):
    return "<think><answer>" + "".join(rng.choices(PIECES, SHARES, k=rng.randrange(40)))


def test_garbage_is_read_and_earns_a_finite_reward_between_0_and_3_8():
    """20,000 texts, the same in every run."""
    rng = random.Random(0)
    for _ in range(20_000):
        text = rng.choice([odd_coordinates, cut_and_doubled, loose_pieces])(rng)
        completion = parse_completion(text)
        assert completion.has_answer == ("<answer>" in text)
        for found in completion.instances:
            assert 0 <= found.span[0] < found.span[1] <= len(text)
            assert all(map(math.isfinite, (*(found.human or ()), *(found.object or ()))))
            assert all(verb == verb.strip() != "" for verb in found.verbs)
        rule = rng.choice(["printed", "pair"])
        parts = rewards.total_reward(completion, [RIDER], duplicate_rule=rule)
        assert all(math.isfinite(part) and part >= 0 for part in parts.values()), text
        assert parts["format"] <= 0.8 + 1e-9 and parts["total"] <= 3.8 + 1e-9, text
        assert max(parts["object"], parts["verb"], parts["iou"]) <= 1 + 1e-9, text


def test_share_of_real_images_whose_perfect_answer_is_punished(real_samples):
    samples = [sample for sample in real_samples if sample.hois]
    answers = [parse_completion(hicodet.format_completion(s.hois, "a")) for s in samples]
    for rule, share in {"printed": 0.320, "pair": 0.012}.items():
        punished = sum(
            rewards.format_reward(answer, sample.hois, rule) < 0.8 - 1e-9
            for answer, sample in zip(answers, samples, strict=True)
        )
        assert punished / len(samples) == pytest.approx(share, abs=0.004)
