"""The rewards of Sec. 3.3, one function per equation: Eqs. 6-23 in the paper's order.

All functions are pure. They take a text parsed by `hicodet.parse_completion` and the ground truth
of its image. Boxes on both sides are in the frame of the text (absolute pixels of the image that
the model sees), so they are compared as written.

Axes: N^_a predicted instances, N_a ground-truth instances. Multisets are `Counter`s.

Where the paper leaves a choice, docs/paper.md lists how this code reads it ("Readings"). Answers
that are not strict JSON are read, and earn rewards in training.
"""

import operator
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from hicodet import HOI, OBJECTS, VERBS, Box, Completion, Prediction, iou

REWARD_WEIGHTS = {"tag": 0.2, "box": 0.2, "object": 0.2, "verb": 0.2}  # w of Eq. 13, Sec. 4.2
N_KEYS = 4  # N_k of Eq. 12: "human", "object", "object class", "verb class"
DUPLICATE_IOU = 0.5  # Eq. 7
# Eq. 7: how the overlap of the human boxes and that of the object boxes make a duplicate
DUPLICATE_RULES = {"printed": operator.or_, "pair": operator.and_}

OBJECT_SET = frozenset(OBJECTS)  # C_o of Eq. 9
VERB_SET = frozenset(VERBS)  # C_v of Eq. 11

BoxPair = tuple[Box, Box]  # human box, object box
Matrix = Sequence[Sequence[float]]  # a row per predicted instance, a column per true one


# HOI key format reward


def tag_reward(completion: Completion) -> float:
    """Eq. 6: r_tag, 1 if the text contains `<think>`."""
    return float(completion.has_think)


def box_reward(
    instance: Prediction, recorded: Sequence[BoxPair], duplicate_rule: str = "printed"
) -> float:
    """Eq. 7: r_b, 1 if the instance has both boxes and they duplicate no recorded pair.

    recorded: the unique boxes of earlier instances (Eq. 8). A duplicate overlaps a recorded pair by
    IoU > 0.5 in the human or the object box ("printed"), or in both ("pair").
    """
    if not instance.has_boxes:
        return 0.0
    for human, object_ in recorded:
        same_human = iou(instance.human, human) > DUPLICATE_IOU
        same_object = iou(instance.object, object_) > DUPLICATE_IOU
        if DUPLICATE_RULES[duplicate_rule](same_human, same_object):
            return 0.0
    return 1.0


def recorded_boxes(
    recorded: Sequence[BoxPair], instance: Prediction, r_b: float
) -> tuple[BoxPair, ...]:
    """Eq. 8: the record with the boxes of `instance` added, if its r_b (Eq. 7) is 1."""
    return (*recorded, (instance.human, instance.object)) if r_b else tuple(recorded)


def box_rewards(instances: Sequence[Prediction], duplicate_rule: str = "printed") -> list[float]:
    """r_b of all instances of an answer: Eqs. 7 and 8 in turn."""
    recorded, rewards = (), []
    for instance in instances:
        rewards.append(box_reward(instance, recorded, duplicate_rule))
        recorded = recorded_boxes(recorded, instance, rewards[-1])
    return rewards


def object_format_reward(instance: Prediction) -> float:
    """Eq. 9: r_ko, 1 if the object class is one of HICO-DET's 80."""
    return float(instance.object_class in OBJECT_SET)


def verb_format_reward(instance: Prediction) -> float:
    """Eq. 10: r_kv, the distinct valid verbs over all verbs as written; 0 without verbs."""
    if not instance.verbs:
        return 0.0
    return len(valid_verbs(instance.verbs)) / len(instance.verbs)


def valid_verbs(verbs: Sequence[str]) -> frozenset[str]:
    """Eq. 11: the distinct labels in `verbs` that are one of HICO-DET's 117 verbs."""
    return VERB_SET.intersection(verbs)


def key_penalty(key_count: int) -> float:
    """Eq. 12: alpha, 1 for an instance with four keys, less if some are missing or surplus."""
    return N_KEYS / (N_KEYS + abs(key_count - N_KEYS))


def format_reward(
    completion: Completion, hois: Sequence[HOI], duplicate_rule: str = "printed"
) -> float:
    """Eq. 13: r_format, the weighted tag reward plus the mean format reward of the instances.

    The mean divides by max(N_a, N^_a), so missing and surplus instances both lower it. It is 0
    without ground truth. A duplicate adds nothing: "no further rewards are computed".
    """
    weights = REWARD_WEIGHTS
    r_tag = weights["tag"] * tag_reward(completion)
    if not hois:
        return r_tag
    total = 0.0
    rewards = box_rewards(completion.instances, duplicate_rule)
    for instance, r_b in zip(completion.instances, rewards, strict=True):
        if instance.has_boxes and not r_b:
            continue
        total += key_penalty(instance.key_count) * (
            weights["box"] * r_b
            + weights["object"] * object_format_reward(instance)
            + weights["verb"] * verb_format_reward(instance)
        )
    return r_tag + total / max(len(hois), len(completion.instances))


# Object and verb label reward


def object_label_reward(instances: Sequence[Prediction], hois: Sequence[HOI]) -> float:
    """Eq. 14: r_lo, the share of instances whose object class is left over in the ground truth.

    Each instance is weighted by alpha (Eq. 12); the sum is divided by max(N_a, N^_a). 0 without
    ground truth.
    """
    if not hois:
        return 0.0
    remaining, total = Counter(hoi.object_class for hoi in hois), 0.0
    for instance in instances:
        total += key_penalty(instance.key_count) * (instance.object_class in remaining)
        remaining = drop_object_label(remaining, instance.object_class)
    return total / max(len(hois), len(instances))


def drop_object_label(remaining: Counter, object_class: str | None) -> Counter:
    """Eq. 15: the ground-truth object classes left over, with one `object_class` fewer."""
    return remaining - Counter((object_class,))  # a difference of Counters never goes below 0


def verb_label_reward(instances: Sequence[Prediction], hois: Sequence[HOI]) -> float:
    """Eq. 16: r_lv, the mean share of an instance's verbs that are left over in the ground truth.

    The ground truth has one occurrence for each verb of each instance, regardless of its object.
    Each share is weighted by alpha (Eq. 12); the sum is divided by max(N_a, N^_a). 0 without ground
    truth.
    """
    if not hois:
        return 0.0
    remaining, total = Counter(verb for hoi in hois for verb in hoi.verbs), 0.0
    for instance in instances:
        if instance.verbs:
            hits = sum(verb in remaining for verb in instance.verbs)
            total += key_penalty(instance.key_count) * hits / len(instance.verbs)
        remaining = drop_verbs(remaining, matched_verbs(instance.verbs, remaining))
    return total / max(len(hois), len(instances))


def drop_verbs(remaining: Counter, matched: Collection[str]) -> Counter:
    """Eq. 17: the ground-truth verbs left over, with one fewer of each verb in `matched`."""
    return remaining - Counter(matched)


def matched_verbs(verbs: Sequence[str], remaining: Counter) -> frozenset[str]:
    """Eq. 18: the distinct labels in `verbs` that are left over in the ground truth."""
    return frozenset(verbs).intersection(remaining)


def without_duplicate_labels(
    instances: Sequence[Prediction], duplicate_rule: str = "printed"
) -> list[Prediction]:
    """The instances, with the labels of duplicates (Eq. 7) removed: these use up no labels."""
    rewards = box_rewards(instances, duplicate_rule)
    return [
        replace(a, object_class=None, verbs=()) if a.has_boxes and not r_b else a
        for a, r_b in zip(instances, rewards, strict=True)
    ]


# HOI IoU reward


def matching_cost(similarity: Matrix) -> Matrix:
    """Eq. 19: C = 1 - s. similarity: (N^_a, N_a). Returns (N^_a, N_a)."""
    return [[1.0 - value for value in row] for row in similarity]


def pair_similarity(instance: Prediction, hoi: HOI) -> float:
    """Eq. 20: s, the mean of the human boxes' IoU and the object boxes' IoU.

    `instance` must have both boxes.
    """
    return 0.5 * (iou(instance.human, hoi.human) + iou(instance.object, hoi.object))


def match_instances(cost: Matrix) -> list[tuple[int, int]]:
    """Eq. 21: M*, the min(N^_a, N_a) pairs (i, j) of the one-to-one matching with least cost."""
    from scipy.optimize import linear_sum_assignment  # slow, and only needed here

    rows, columns = linear_sum_assignment(cost)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def matched_pairs(
    instances: Sequence[Prediction], hois: Sequence[HOI]
) -> list[tuple[Prediction, HOI, float]]:
    """The matched pairs (Eq. 21) with their similarity (Eq. 20), without incomplete instances."""
    complete = [instance for instance in instances if instance.has_boxes]
    if not hois or not complete:
        return []
    similarity = [[pair_similarity(a, b) for b in hois] for a in complete]
    matching = match_instances(matching_cost(similarity))
    return [(complete[i], hois[j], similarity[i][j]) for i, j in matching]


def iou_reward(instances: Sequence[Prediction], hois: Sequence[HOI]) -> float:
    """Eq. 22: r_IoU, the sum of the matched pairs' similarities over N_a; 0 without ground truth.

    Surplus instances do not lower it.
    """
    pairs = matched_pairs(instances, hois)
    return sum(similarity for _, _, similarity in pairs) / len(hois) if pairs else 0.0


# Label rewards on matched pairs, which are not in the paper: `label_reward="matched"`


def matched_object_reward(instances: Sequence[Prediction], hois: Sequence[HOI]) -> float:
    """Instead of Eq. 14: the share of instances with the object class of their true instance.

    Weights, divisor and zero case are those of Eq. 14.
    """
    pairs = matched_pairs(instances, hois)
    total = sum(key_penalty(a.key_count) * (a.object_class == b.object_class) for a, b, _ in pairs)
    return total / max(len(hois), len(instances), 1)


def matched_verb_reward(instances: Sequence[Prediction], hois: Sequence[HOI]) -> float:
    """Instead of Eq. 16: verbs shared with the true instance, over the larger number of verbs.

    Missing and surplus verbs both lower it. Weights, divisor and zero case as in Eq. 16.
    """
    total = 0.0
    for instance, hoi, _ in matched_pairs(instances, hois):
        common = len(set(instance.verbs).intersection(hoi.verbs))
        share = common / max(len(instance.verbs), len(hoi.verbs))
        total += key_penalty(instance.key_count) * share
    return total / max(len(hois), len(instances), 1)


OBJECT_REWARDS = {"printed": object_label_reward, "matched": matched_object_reward}
VERB_REWARDS = {"printed": verb_label_reward, "matched": matched_verb_reward}


# Overall reward


@dataclass(frozen=True)
class RewardPart:
    """A term of Eq. 23."""

    title: str  # its name in the report
    largest: float  # its largest value
    reward: Callable[[Completion, Sequence[HOI], dict], float]  # the dict: REWARD_OPTIONS' values
    ablation: str | None = None  # the name in `without` that leaves it out (Table 3)


def _format_part(completion: Completion, hois: Sequence[HOI], options: dict) -> float:
    return format_reward(completion, hois, options["duplicate_rule"])


def _object_part(completion: Completion, hois: Sequence[HOI], options: dict) -> float:
    return OBJECT_REWARDS[options["label_reward"]](completion.instances, hois)


def _verb_part(completion: Completion, hois: Sequence[HOI], options: dict) -> float:
    return VERB_REWARDS[options["label_reward"]](completion.instances, hois)


def _iou_part(completion: Completion, hois: Sequence[HOI], options: dict) -> float:
    return iou_reward(completion.instances, hois)


REWARD_PARTS = {  # to add a reward, add a function and a row here
    "format": RewardPart("Format", sum(REWARD_WEIGHTS.values()), _format_part),
    "object": RewardPart("Object label", 1.0, _object_part, ablation="label"),
    "verb": RewardPart("Verb label", 1.0, _verb_part, ablation="label"),
    "iou": RewardPart("IoU", 1.0, _iou_part, ablation="iou"),
}
ABLATIONS = tuple(dict.fromkeys(part.ablation for part in REWARD_PARTS.values() if part.ablation))
REWARD_OPTIONS = {  # keyword of total_reward -> its values
    "duplicate_rule": tuple(DUPLICATE_RULES),
    "duplicates_earn": ("labels", "nothing"),  # in Eqs. 14 and 16
    "label_reward": tuple(OBJECT_REWARDS),
}


def reward_parts(*, without: Collection[str] = ()) -> dict[str, dict]:
    """The parts that make up the reward, in order: {name: {"title": str, "largest": float}}.

    without: as in total_reward. Raises ValueError for an unknown name.
    """
    if unknown := set(without).difference(ABLATIONS):
        raise ValueError(f"without takes names of {ABLATIONS}: {sorted(unknown)}")
    return {
        name: {"title": part.title, "largest": part.largest}
        for name, part in REWARD_PARTS.items()
        if part.ablation not in without
    }


def total_reward(
    completion: Completion,
    hois: Sequence[HOI],
    *,
    duplicate_rule: str = "printed",
    duplicates_earn: str = "labels",
    label_reward: str = "printed",
    without: Collection[str] = (),
) -> dict[str, float]:
    """Eq. 23: r, the sum of the format, label and IoU rewards, at most 3.8.

    hois: the ground truth, in the frame of the text. without: rewards to leave out, as in Table 3:
    "label" (Eqs. 14-18), "iou" (Eqs. 19-22). Returns the value of each of REWARD_PARTS, and their
    sum "total". A part that is left out is 0; without `<answer>` all are 0. Raises ValueError for
    an unknown value of an option.
    """
    options = {
        "duplicate_rule": duplicate_rule,
        "duplicates_earn": duplicates_earn,
        "label_reward": label_reward,
    }
    for name, value in options.items():
        if value not in REWARD_OPTIONS[name]:
            raise ValueError(f"{name} is one of {REWARD_OPTIONS[name]}: {value!r}")
    earning = reward_parts(without=without) if completion.has_answer else {}
    if duplicates_earn == "nothing":
        instances = without_duplicate_labels(completion.instances, duplicate_rule)
        completion = replace(completion, instances=tuple(instances))
    parts = {
        name: part.reward(completion, hois, options) if name in earning else 0.0
        for name, part in REWARD_PARTS.items()
    }
    return parts | {"total": sum(parts.values())}
