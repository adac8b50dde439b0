"""The official HICO-DET mAP: Default and Known Object, Full / Rare / Non-Rare (Sec. 4.1, Table 1).

    python evaluate.py predictions.jsonl --data hico_20160224_det --json ap.json
    python evaluate.py predictions.jsonl --data hico_20160224_det --breakdown

Prints a row of Table 1 in percent; --json writes the same as fractions, with the AP of all 600
classes. Any detector's predictions can be scored, without a GPU and without image files: only
anno_bbox.mat is needed and, if at hand, anno.mat.

The top of engine/scoring/predictions.py has the format of predictions.jsonl, and --help prints it.
engine/scoring/breakdown.py, pair_scores.py and official_mat.py say what --breakdown and
--official-mat do; neither changes the official result.

The official MATLAB code does the following, and so does this one:
1. A box from x1 to x2 is x2 - x1 + 1 pixels wide.
2. A detection's overlap with a true pair is the smaller of the human and the object IoU. It goes to
   the true pair of its class and image that it overlaps most, taken or not, and is right if that
   overlap is at least 0.5 and no detection before it took the pair.
3. Every other detection is wrong, also in images without a true pair of the class.
4. Detections come in the order of falling score; equal scores in the order of the images in the
   annotations (not of the lines), then in the order of the image's instances.
5. AP is the mean of eleven precisions, each the best one at a recall of at least k * 0.1.
6. Known Object drops detections in images that do not show the class's object.
7. A class without detections or without true pairs has AP 0, and counts in the means.
Departure: --classes present leaves classes without true pairs out of the means, for parts of the
data set. In the official test set every class has true pairs, so the result there is the same.

Axes: N detections (one for each verb of each instance), M true pairs, I images.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from engine.data.annotations import load_split, training_counts
from engine.files import replace_file
from engine.options import Config, option, parse_config, required
from engine.scoring.breakdown import break_down, breakdown_table
from engine.scoring.official_mat import write_official
from engine.scoring.pair_arrays import (
    MIN_IOU,
    Overlaps,
    PairArrays,
    detection_arrays,
    truth_arrays,
)
from engine.scoring.pair_scores import pair_scores, pair_table
from engine.scoring.predictions import FORMAT, drop_unknown, read_predictions
from engine.signals import one_line
from hicodet import HOI_CLASSES, OBJECTS, InputError, Sample

RARE_BELOW = 10  # training pairs; fewer make a class rare
# Not the decimals: 3 * 0.1 lies one ulp above 0.3, so a recall of 3/10 does not reach it.
RECALL_GRID = tuple(k * 0.1 for k in range(11))


class Split(NamedTuple):
    """What mAP depends on besides the detections."""

    npos: np.ndarray  # (600,) int, true pairs of each class
    known: np.ndarray  # (I, 600) bool, from known_classes
    averaged: np.ndarray  # (600,) bool, the classes that the means include
    rare: np.ndarray  # (600,) bool


def known_classes(samples: list[Sample]) -> np.ndarray:
    """Whether Known Object keeps an image's detections of a class: the image shows its object.

    Returns (I, 600) bool. Raises InputError if an image is not known for the object of one of its
    true pairs; the official code asserts this too.
    """
    known = np.zeros((len(samples), len(OBJECTS)), dtype=bool)
    for i, sample in enumerate(samples):
        stray = {HOI_CLASSES[pair.hoi_id][1] for pair in sample.pairs} - sample.known_objects
        if stray:
            raise InputError(
                f"{sample.file_name}: anno_bbox.mat has pairs with {min(stray)!r}, which anno.mat "
                "does not know in this image; the two files do not belong together"
            )
        known[i, [OBJECTS.index(name) for name in sample.known_objects]] = True
    return known[:, [OBJECTS.index(object_class) for _, object_class in HOI_CLASSES]]


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of a[n] and b[n], a box from x1 to x2 being x2 - x1 + 1 pixels wide.

    a, b: (N, 4) float xyxy. Returns (N,) float: 0 where no pixel is shared or a box is inverted.
    """
    ax1, ay1, ax2, ay2 = a.T
    bx1, by1, bx2, by2 = b.T
    with np.errstate(over="ignore", invalid="ignore"):  # a box of 1e300 pixels has IoU 0
        width = np.minimum(ax2, bx2) - np.maximum(ax1, bx1) + 1
        height = np.minimum(ay2, by2) - np.maximum(ay1, by1) + 1
        area_a = (ax2 - ax1 + 1) * (ay2 - ay1 + 1)
        area_b = (bx2 - bx1 + 1) * (by2 - by1 + 1)
        shared = width * height
        union = area_a + area_b - shared
        overlapping = (width > 0) & (height > 0)
        return np.divide(shared, union, out=np.zeros(len(a)), where=overlapping)


def overlaps(detections: PairArrays, truth: PairArrays, *, same_class: bool) -> Overlaps:
    """Each detection with each true pair of its image, only those of its class if `same_class`."""
    num_images = max(detections.image.max(initial=-1), truth.image.max(initial=-1)) + 1
    group, true_group = (
        p.hoi_id * num_images + p.image if same_class else p.image for p in (detections, truth)
    )
    by_group = np.argsort(true_group, kind="stable")
    start = np.searchsorted(true_group[by_group], group, side="left")
    count = np.searchsorted(true_group[by_group], group, side="right") - start

    detection = np.repeat(np.arange(len(group)), count)  # (K,)
    first = np.cumsum(count) - count  # (N,) where a detection's rows begin
    pair = by_group[np.arange(len(detection)) + np.repeat(start - first, count)]  # (K,)
    human = box_iou(detections.boxes_human[detection], truth.boxes_human[pair])
    object_ = box_iou(detections.boxes_object[detection], truth.boxes_object[pair])
    return Overlaps(detection, pair, human, object_)


def match(detections: PairArrays, truth: PairArrays) -> np.ndarray:
    """The true pair of its class and image that each detection overlaps most, free or not.

    The overlap is the smaller of the two IoUs. Of equal overlaps the first true pair counts.
    Returns (N,) int: a row of `truth`, -1 where no overlap reaches MIN_IOU.
    """
    near = overlaps(detections, truth, same_class=True)
    overlap = np.minimum(near.human, near.object)
    ranked = np.lexsort((-overlap, near.detection))  # stable, so the first of equal overlaps leads
    row, first = np.unique(near.detection, return_index=True)
    best = ranked[first]
    matched = np.full(len(detections.hoi_id), -1)
    matched[row] = np.where(overlap[best] >= MIN_IOU, near.pair[best], -1)
    return matched


def true_positives(matched: np.ndarray) -> np.ndarray:
    """Which detections are right: of those matched to one true pair only the first.

    matched: (N,) int from `match`, in the order of falling score. Returns (N,) bool.
    """
    rows = np.flatnonzero(matched >= 0)
    _, first = np.unique(matched[rows], return_index=True)
    right = np.zeros(len(matched), dtype=bool)
    right[rows[first]] = True
    return right


def average_precision(right: np.ndarray, npos: int) -> float:
    """11-point AP of one class: the mean over k of the best precision at recall >= k * 0.1.

    right: (N,) bool in the order of falling score; npos: number of true pairs, missed ones too.
    Returns a fraction; 0 without detections or without true pairs.
    """
    if npos == 0:
        return 0.0
    hits = np.cumsum(right)
    recall = hits / npos
    precision = hits / np.arange(1, len(right) + 1)
    best = [precision[recall >= level].max(initial=0.0) for level in RECALL_GRID]
    return float(sum(best) / len(best))


def ap_per_class(hoi_id: np.ndarray, right: np.ndarray, npos: np.ndarray) -> np.ndarray:
    """AP of every class; hoi_id, right: (N,) sorted by class, then by falling score; npos: (600,).

    Returns (600,) float.
    """
    ends = np.searchsorted(hoi_id, np.arange(len(HOI_CLASSES)), side="right")
    by_class = np.split(right, ends)[: len(HOI_CLASSES)]
    return np.array([average_precision(*pair) for pair in zip(by_class, npos, strict=True)])


def measure(hoi_id: np.ndarray, image: np.ndarray, right: np.ndarray, split: Split) -> dict:
    """Both settings of the result; the rows sorted by class, then by falling score.

    Returns {"default", "known_object": {"full", "rare", "non_rare", "ap"}}; the mean of no class
    is None.
    """
    # A class's detections in one image are dropped together or not at all, so the others keep
    # their matches, and Known Object needs no second matching.
    kept = split.known[image, hoi_id]
    aps = {
        "default": ap_per_class(hoi_id, right, split.npos),
        "known_object": ap_per_class(hoi_id[kept], right[kept], split.npos),
    }
    averaged, rare = split.averaged, split.rare
    rows = {"full": averaged, "rare": averaged & rare, "non_rare": averaged & ~rare}
    return {
        setting: {name: float(ap[row].mean()) if row.any() else None for name, row in rows.items()}
        | {"ap": ap.tolist()}
        for setting, ap in aps.items()
    }


def official_order(hoi_id: np.ndarray, image: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Rows by class, then falling score; equal scores by image, then as they come."""
    return np.lexsort((image, -score, hoi_id))  # stable


def evaluate(
    predictions: list[dict], samples: list[Sample], train_counts: list[int],
    *, classes: str = "all", breakdown: bool = False,
) -> dict:  # fmt: skip
    """Official HICO-DET mAP (Sec. 4.1); what --json writes.

    predictions: the lines of predictions.jsonl as dicts, one for each sample in any order.
    train_counts: from annotations.training_counts.
    classes: "all" averages all 600 classes (official), "present" those with true pairs in samples.
    Returns fractions from 0 to 1: {"default": {"full", "rare", "non_rare", "ap": [600]},
    "known_object": the same, "max_recall": [600] (None without true pairs), "true_pairs": [600],
    "classes", "num_images", "num_predictions"}; a mean over no class is None. breakdown adds
    "breakdown" and "pair_scores", which the modules of these names describe.
    Raises ValueError if the predictions are not for exactly the samples' images.
    """
    if sorted(p["file_name"] for p in predictions) != sorted(s.file_name for s in samples):
        raise ValueError("predictions must name every image of the samples, each exactly once")
    if classes not in ("all", "present"):
        raise ValueError(f'classes is "all" or "present", not {classes!r}')
    detections, truth = detection_arrays(predictions, samples), truth_arrays(samples)
    order = official_order(detections.hoi_id, detections.image, detections.score)
    detections = PairArrays(*(column[order] for column in detections))
    matched = match(detections, truth)
    right = true_positives(matched)
    npos = np.bincount(truth.hoi_id, minlength=len(HOI_CLASSES))
    found = np.bincount(detections.hoi_id[right], minlength=len(HOI_CLASSES))
    averaged = npos > 0 if classes == "present" else npos >= 0
    split = Split(npos, known_classes(samples), averaged, np.asarray(train_counts) < RARE_BELOW)
    result = measure(detections.hoi_id, detections.image, right, split) | {
        "max_recall": [f / n if n else None for f, n in zip(found.tolist(), npos.tolist())],
        "true_pairs": npos.tolist(),
        "classes": classes,
        "num_images": len(samples),
        "num_predictions": len(order),
    }
    return result | (_why_missed(detections, truth, matched, right, split) if breakdown else {})


def _why_missed(
    detections: PairArrays, truth: PairArrays, matched: np.ndarray, right: np.ndarray, split: Split
) -> dict:
    """What `breakdown` adds to the result; detections in the official order."""

    def full_map(hoi_id, image, score, right) -> float | None:
        order = official_order(hoi_id, image, score)
        return measure(hoi_id[order], image[order], right[order], split)["default"]["full"]

    args = detections, truth, overlaps(detections, truth, same_class=False)
    return {
        "breakdown": break_down(*args, matched, right, full_map),
        "pair_scores": pair_scores(*args, len(split.known)),
    }


def map_table(result: dict) -> str:
    """The six means of `evaluate` as a row of Table 1, in percent, and the breakdown, if any."""
    means = [
        result[setting][name]
        for setting in ("default", "known_object")
        for name in ("full", "rare", "non_rare")
    ]
    lines = [
        f"{'Default':^26} {'Known Object':^26}".rstrip(),
        " ".join(["    Full     Rare Non-Rare"] * 2),
        " ".join("       -" if mean is None else f"{100 * mean:8.2f}" for mean in means),
    ]
    if "breakdown" in result:
        lines += ["", breakdown_table(result["breakdown"]), "", pair_table(result["pair_scores"])]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
    """Options of the command."""

    predictions: Path = required(
        "predictions.jsonl, as described above", positional=True, group="what to read and write"
    )
    data: Path = required(
        "folder with anno_bbox.mat and anno.mat, or annotations.jsonl",
        group="what to read and write",
    )
    split: Literal["test", "train"] = option(
        "test", "split of the predicted images", group="what to read and write"
    )
    limit: int | None = option(
        None, "only the first N images, as in predict", least=1, group="what to read and write"
    )
    drop_unknown: bool = option(
        False, "drop verbs that HICO does not have with the object", group="what to read and write"
    )
    json: Path | None = option(
        None, "also write the result to this file", metavar="FILE", group="what to read and write"
    )
    classes: Literal["all", "present"] = option(
        "all", "means over all 600 classes, or over those with true pairs in the split",
        group="what to measure",
    )
    breakdown: bool = option(
        False, "why true pairs were missed, what that costs, F1 of pairs", group="what to measure"
    )
    official_mat: Path | None = option(
        None, "also write files for the official MATLAB code; takes minutes", metavar="DIR",
        group="what to measure",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.json and self.json.resolve() == self.predictions.resolve():
            raise ValueError("--json would overwrite the predictions")
        if self.official_mat and self.limit:
            raise ValueError("--official-mat needs the whole split: leave out --limit")


def run(config: EvaluateConfig) -> None:
    """Read, evaluate, print the table, and write what the options ask for."""
    samples = load_split(config.data, config.split)[: config.limit]
    train_counts = training_counts(config.data)
    predictions = read_predictions(config.predictions, samples, any_class=config.drop_unknown)
    if config.drop_unknown:
        predictions, dropped = drop_unknown(predictions)
        note = f"dropped {dropped} verbs that HICO does not have with their object"
        print(note, file=sys.stderr)
    result = evaluate(
        predictions, samples, train_counts, classes=config.classes, breakdown=config.breakdown
    )
    absent = result["true_pairs"].count(0)
    if absent and config.classes == "all":
        note = f"{absent} classes have no true pair here and count as 0; see --classes present"
        print(note, file=sys.stderr)
    print(map_table(result), flush=True)
    if config.json:
        replace_file(config.json, json.dumps(result, allow_nan=False) + "\n")
    if config.official_mat:
        write_official(config.official_mat, detection_arrays(predictions, samples), len(samples))


def main(argv: list[str] | None = None) -> None:
    """Command line; --help prints the head of the module docstring and the format of a line."""
    head = __doc__.partition("\nThe top of")[0]
    config = parse_config(EvaluateConfig, f"{head}\n{FORMAT}", argv)
    with one_line("evaluate.py: "):
        run(config)


if __name__ == "__main__":
    main()
