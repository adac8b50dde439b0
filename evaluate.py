"""The official HICO-DET mAP: Default and Known Object, Full / Rare / Non-Rare (Sec. 4.1, Table 1).

    python evaluate.py predictions.jsonl --data hico_20160224_det --json ap.json
    python evaluate.py predictions.jsonl --data hico_20160224_det --breakdown

Prints a row of Table 1 in percent. --json writes the same as fractions, with the AP of all 600
classes. Any detector's predictions can be scored, without a GPU and without image files. It reads
anno_bbox.mat, and anno.mat if it exists.

The top of engine/scoring/predictions.py describes predictions.jsonl. breakdown.py, pair_scores.py
and official_mat.py next to it describe --breakdown and --official-mat.

This code follows the official MATLAB code:
1. A box from x1 to x2 is x2 - x1 + 1 pixels wide.
2. A detection's overlap with a true pair is the smaller of the human and the object IoU. Each
   detection is matched to the true pair of its class and image that it overlaps most, even if that
   pair is taken. It is right if the overlap is at least 0.5 and the pair is not taken yet.
3. Every other detection is wrong, also in images without a true pair of the class.
4. Detections are sorted by falling score. Equal scores keep the order of the images in the
   annotations (not of the lines), then the order of the image's instances.
5. AP is the mean of eleven precisions, each the best one at a recall of at least k * 0.1.
6. Known Object drops detections in images that do not show the class's object.
7. A class without detections or without true pairs has AP 0, and counts in the means.
Departure: --classes present leaves classes without true pairs out of the means, for parts of the
data set. In the official test set every class has true pairs, so the result is the same.

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
from engine.scoring.pair_arrays import MIN_IOU, Overlaps, detection_array, truth_array
from engine.scoring.pair_scores import pair_scores, pair_table
from engine.scoring.predictions import FORMAT, read_predictions, unknown_verbs
from engine.signals import one_line
from hicodet import HOI_CLASSES, InputError, Sample

RARE_BELOW = 10  # a class with fewer training pairs is rare
# Products, as in the official code: 3 * 0.1 is above 0.3, so a recall of 3/10 does not reach it.
RECALL_GRID = tuple(k * 0.1 for k in range(11))


class Split(NamedTuple):
    """The data of a split that mAP needs, besides the detections."""

    npos: np.ndarray  # (600,) int, true pairs of each class
    known: np.ndarray  # (I, 600) bool, from known_classes
    averaged: np.ndarray  # (600,) bool, the classes that the means include
    rare: np.ndarray  # (600,) bool


def known_classes(samples: list[Sample]) -> np.ndarray:
    """(I, 600) bool: whether the image shows the class's object, so Known Object keeps it."""
    objects = [object_class for _, object_class in HOI_CLASSES]
    known = [[name in sample.known_objects for name in objects] for sample in samples]
    return np.array(known, dtype=bool).reshape(-1, len(objects))


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of a[n] and b[n]. A box from x1 to x2 is x2 - x1 + 1 pixels wide.

    a, b: (N, 4) float xyxy. Returns (N,) float, 0 if no pixel is shared or a box is inverted.
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


def overlaps(detections: np.recarray, truth: np.recarray, *, same_class: bool) -> Overlaps:
    """Each detection with each true pair of its image; with `same_class`, of its class only."""
    num_images = max(detections.image.max(initial=-1), truth.image.max(initial=-1)) + 1
    group, true_group = (
        p.hoi_id * num_images + p.image if same_class else p.image for p in (detections, truth)
    )
    by_group = np.argsort(true_group, kind="stable")
    start = np.searchsorted(true_group[by_group], group, side="left")
    count = np.searchsorted(true_group[by_group], group, side="right") - start

    detection = np.repeat(np.arange(len(group)), count)  # (K,)
    first = np.cumsum(count) - count  # (N,) a detection's first row
    pair = by_group[np.arange(len(detection)) + np.repeat(start - first, count)]  # (K,)
    human = box_iou(detections.human[detection], truth.human[pair])
    object_ = box_iou(detections.object[detection], truth.object[pair])
    return Overlaps(detection, pair, human, object_)


def match(detections: np.recarray, truth: np.recarray) -> np.ndarray:
    """The true pair of its class and image that each detection overlaps most, even if taken.

    The overlap is the smaller of the two IoUs. If overlaps are equal, the first true pair counts.
    Returns (N,) int: a row of `truth`, or -1 if no overlap reaches MIN_IOU.
    """
    near = overlaps(detections, truth, same_class=True)
    overlap = np.minimum(near.human, near.object)
    ranked = np.lexsort((-overlap, near.detection))  # stable, so the first of equal overlaps leads
    row, first = np.unique(near.detection, return_index=True)
    best = ranked[first]
    matched = np.full(len(detections), -1)
    matched[row] = np.where(overlap[best] >= MIN_IOU, near.pair[best], -1)
    return matched


def true_positives(matched: np.ndarray) -> np.ndarray:
    """Which detections are right: the first one that is matched to each true pair.

    matched: (N,) int from `match`, by falling score. Returns (N,) bool.
    """
    rows = np.flatnonzero(matched >= 0)
    _, first = np.unique(matched[rows], return_index=True)
    right = np.zeros(len(matched), dtype=bool)
    right[rows[first]] = True
    return right


def average_precision(right: np.ndarray, npos: int) -> float:
    """11-point AP of one class: the mean over k of the best precision at recall >= k * 0.1.

    right: (N,) bool, by falling score. npos: number of true pairs, found or missed. Returns a
    fraction; 0 without detections or without true pairs.
    """
    if npos == 0:
        return 0.0
    hits = np.cumsum(right)
    recall = hits / npos
    precision = hits / np.arange(1, len(right) + 1)
    best = [precision[recall >= level].max(initial=0.0) for level in RECALL_GRID]
    return float(sum(best) / len(best))


def in_official_order(detections: np.recarray) -> np.recarray:
    """Sort by class, then by falling score; equal scores by image, then in their given order."""
    return detections[np.lexsort((detections.image, -detections.score, detections.hoi_id))]


def measure(detections: np.recarray, split: Split) -> dict:
    """mAP in both settings. detections: after matching, in any order.

    Returns {"default", "known_object": {"full", "rare", "non_rare", "ap"}}. A mean over no class
    is None.
    """
    detections = in_official_order(detections)
    # Known Object drops all of a class's detections in an image or none, so matches stay valid.
    kept = detections[split.known[detections.image, detections.hoi_id]]
    rare = split.averaged & split.rare
    rows = {"full": split.averaged, "rare": rare, "non_rare": split.averaged & ~split.rare}
    result = {}
    for setting, found in ("default", detections), ("known_object", kept):
        ends = np.searchsorted(found.hoi_id, np.arange(len(split.npos)), side="right")
        ap = np.array(list(map(average_precision, np.split(found.right, ends), split.npos)))
        means = {name: float(ap[row].mean()) if row.any() else None for name, row in rows.items()}
        result[setting] = means | {"ap": ap.tolist()}
    return result


def evaluate(
    predictions: list[dict], samples: list[Sample], train_counts: list[int],
    *, classes: str = "all", breakdown: bool = False,
) -> dict:  # fmt: skip
    """Official HICO-DET mAP (Sec. 4.1). Returns the content of --json.

    predictions: the lines of predictions.jsonl as dicts, one per sample, in any order. Verbs that
    HICO does not have with their object are ignored. train_counts: from
    annotations.training_counts. classes: "all" averages all 600 classes (official), "present"
    those with true pairs in samples.
    Returns fractions from 0 to 1: {"default": {"full", "rare", "non_rare", "ap": [600]},
    "known_object": the same, "max_recall": [600] (None without true pairs), "true_pairs": [600],
    "classes", "num_images", "num_predictions"}. A mean over no class is None. breakdown adds
    "breakdown" and "pair_scores"; see the modules of these names.
    Raises ValueError unless the predictions name each sample's image exactly once.
    """
    if sorted(p["file_name"] for p in predictions) != sorted(s.file_name for s in samples):
        raise ValueError("predictions must name every image of the samples, each exactly once")
    detections = in_official_order(detection_array(predictions, samples))
    truth = truth_array(samples)
    matched = match(detections, truth)
    detections.right = true_positives(matched)
    npos = np.bincount(truth.hoi_id, minlength=len(HOI_CLASSES))
    found = np.bincount(detections.hoi_id[detections.right], minlength=len(HOI_CLASSES))
    averaged = npos > 0 if classes == "present" else npos >= 0
    split = Split(npos, known_classes(samples), averaged, np.asarray(train_counts) < RARE_BELOW)
    result = measure(detections, split) | {
        "max_recall": [f / n if n else None for f, n in zip(found.tolist(), npos.tolist())],
        "true_pairs": npos.tolist(),
        "classes": classes,
        "num_images": len(samples),
        "num_predictions": len(detections),
    }
    if breakdown:
        args = detections, truth, overlaps(detections, truth, same_class=False)
        result["breakdown"] = break_down(
            *args, matched, lambda rows: measure(rows, split)["default"]["full"]
        )
        result["pair_scores"] = pair_scores(*args, len(samples))
    return result


def map_table(result: dict) -> str:
    """The six means of `evaluate` as a row of Table 1, in percent, and any breakdown."""
    names = ("full", "rare", "non_rare")
    means = [result[s][name] for s in ("default", "known_object") for name in names]
    lines = [
        f"{'Default':^26} {'Known Object':^26}".rstrip(),
        " ".join(["    Full     Rare Non-Rare"] * 2),
        " ".join("       -" if mean is None else f"{100 * mean:8.2f}" for mean in means),
    ]
    if "breakdown" in result:
        lines += ["", breakdown_table(result["breakdown"]), "", pair_table(result["pair_scores"])]
    return "\n".join(lines)


FILES, MEASURE = "input and output", "measures"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
    """Options of the command."""

    predictions: Path = required("predictions.jsonl, as above", positional=True, group=FILES)
    data: Path = required("folder with anno_bbox.mat or annotations.jsonl", group=FILES)
    split: Literal["test", "train"] = option("test", "split that was predicted", group=FILES)
    limit: int | None = option(None, "score only the first N images", least=1, group=FILES)
    drop_unknown: bool = option(False, "drop verbs that HICO lacks with the object", group=FILES)
    json: Path | None = option(None, "file for the result as JSON", metavar="FILE", group=FILES)
    official_mat: Path | None = option(
        None, "folder of files for the official MATLAB code; slow", metavar="DIR", group=FILES
    )
    classes: Literal["all", "present"] = option(
        "all", "average all 600 classes, or those with true pairs", group=MEASURE
    )
    breakdown: bool = option(False, "print why pairs were missed, and F1 of pairs", group=MEASURE)

    def __post_init__(self):
        super().__post_init__()
        read = (self.predictions, self.predictions / "predictions.jsonl")  # or the folder of a run
        if self.json and self.json.resolve() in [path.resolve() for path in read]:
            raise ValueError("--json would overwrite the predictions")
        if self.official_mat and self.limit:
            raise ValueError("--official-mat needs the whole split: leave out --limit")


def run(config: EvaluateConfig) -> None:
    """Read and evaluate predictions, print the table, and write the requested files."""
    samples = load_split(config.data, config.split)[: config.limit]
    train_counts = training_counts(config.data)
    predictions = read_predictions(config.predictions, samples)
    if unknown := unknown_verbs(predictions):
        said = f"{len(unknown)} verbs that HICO does not have with their object, first {unknown[0]}"
        if not config.drop_unknown:
            raise InputError(f"{config.predictions}: {said}; --drop-unknown drops them")
        print(f"dropped {said}", file=sys.stderr)
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
        write_official(config.official_mat, detection_array(predictions, samples), len(samples))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    head = __doc__.partition("\nThe top of")[0]
    config = parse_config(EvaluateConfig, f"{head}\n{FORMAT}", argv)
    with one_line("evaluate.py: "):
        run(config)


if __name__ == "__main__":
    main()
