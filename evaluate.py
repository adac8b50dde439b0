"""The official HICO-DET mAP: Default and Known Object, Full / Rare / Non-Rare (Sec. 4.1, Table 1).

    python evaluate.py predictions.jsonl --data hico_20160224_det --json ap.json
    python evaluate.py predictions.jsonl --data hico_20160224_det --breakdown

Prints a row of Table 1 in percent; --json writes the same as fractions, with the AP of all 600
classes. Any detector's predictions can be scored, without a GPU and without image files: only
anno_bbox.mat is needed and, if at hand, anno.mat.

The top of engine/scoring/predictions.py has the format of predictions.jsonl; breakdown.py,
pair_scores.py and official_mat.py next to it say what --breakdown and --official-mat do.

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
from engine.scoring.pair_arrays import MIN_IOU, Overlaps, detection_array, truth_array
from engine.scoring.pair_scores import pair_scores, pair_table
from engine.scoring.predictions import FORMAT, read_predictions, unknown_verbs
from engine.signals import one_line
from hicodet import HOI_CLASSES, InputError, Sample

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
    """(I, 600) bool: whether Known Object keeps detections, as the image shows their object."""
    objects = [object_class for _, object_class in HOI_CLASSES]
    known = [[name in sample.known_objects for name in objects] for sample in samples]
    return np.array(known, dtype=bool).reshape(-1, len(objects))


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


def overlaps(detections: np.recarray, truth: np.recarray, *, same_class: bool) -> Overlaps:
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
    human = box_iou(detections.human[detection], truth.human[pair])
    object_ = box_iou(detections.object[detection], truth.object[pair])
    return Overlaps(detection, pair, human, object_)


def match(detections: np.recarray, truth: np.recarray) -> np.ndarray:
    """The true pair of its class and image that each detection overlaps most, free or not.

    The overlap is the smaller of the two IoUs. Of equal overlaps the first true pair counts.
    Returns (N,) int: a row of `truth`, -1 where no overlap reaches MIN_IOU.
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


def in_official_order(detections: np.recarray) -> np.recarray:
    """By class, then falling score; equal scores by image, then as they come."""
    return detections[np.lexsort((detections.image, -detections.score, detections.hoi_id))]


def measure(detections: np.recarray, split: Split) -> dict:
    """Both settings of the result, of matched detections.

    Returns {"default", "known_object": {"full", "rare", "non_rare", "ap"}}; the mean of no class
    is None.
    """
    detections = in_official_order(detections)
    # A class's detections in one image are dropped together or not at all, so the others keep
    # their matches, and Known Object needs no second matching.
    kept = detections[split.known[detections.image, detections.hoi_id]]
    averaged, rare = split.averaged, split.rare
    rows = {"full": averaged, "rare": averaged & rare, "non_rare": averaged & ~rare}
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
    """Official HICO-DET mAP (Sec. 4.1); what --json writes.

    predictions: the lines of predictions.jsonl as dicts, one for each sample in any order; verbs
    that HICO does not have with their object are left out.
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
    """The six means of `evaluate` as a row of Table 1, in percent, and the breakdown, if any."""
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


FILES, MEASURE = "what to read and write", "what to measure"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
    """Options of the command."""

    predictions: Path = required("predictions.jsonl, as above", positional=True, group=FILES)
    data: Path = required("folder of anno_bbox.mat, or of annotations.jsonl", group=FILES)
    split: Literal["test", "train"] = option("test", "split of the predicted images", group=FILES)
    limit: int | None = option(None, "the first N images, as in predict", least=1, group=FILES)
    drop_unknown: bool = option(False, "drop verbs that HICO lacks with the object", group=FILES)
    json: Path | None = option(None, "also write the result here", metavar="FILE", group=FILES)
    official_mat: Path | None = option(
        None, "write files for the official MATLAB code; takes minutes", metavar="DIR", group=FILES
    )
    classes: Literal["all", "present"] = option(
        "all", "means over all 600 classes, or over those with true pairs", group=MEASURE
    )
    breakdown: bool = option(False, "why pairs were missed, and F1 of pairs", group=MEASURE)

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
    """Command line; --help prints the head of the module docstring and the format of a line."""
    head = __doc__.partition("\nThe top of")[0]
    config = parse_config(EvaluateConfig, f"{head}\n{FORMAT}", argv)
    with one_line("evaluate.py: "):
        run(config)


if __name__ == "__main__":
    main()
