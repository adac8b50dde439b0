"""Precision, recall and F1 of pairs: how right an answer is as a set, whatever its scores.

mAP judges a ranking, but a model that writes text gives no score. So the set of its pairs is judged
too, as CrossHOI-Bench does (arXiv 2508.18753). A detection may hit a true pair of its image and
class if both boxes overlap by at least 0.5. Each detection hits at most one pair and each pair is
hit at most once, with as many hits as possible. Neither scores nor order count: unlike in mAP's
rule, a detection may hit any free pair, not only the one that it overlaps most.

    precision = hits / detections    recall = hits / true pairs
    F1 = 2 hits / (detections + true pairs)

"micro"  over all pairs at once.
"macro"  the mean over the 600 classes of each class's own. Precision leaves out the classes that
         were never predicted, recall those without true pairs, F1 those with neither.
"image"  the mean over images of each image's own. Precision leaves out images without detections,
         recall those without true pairs, F1 those with neither. "exact" is the share of images
         in which every detection is a hit and no pair is missed; it leaves out none, and an image
         with neither is exact.
--classes changes nothing here. A duplicate lowers precision, as it is a detection.
"""

import numpy as np

from engine.scoring.pair_arrays import MIN_IOU, Overlaps, PairArrays
from hicodet import HOI_CLASSES


def one_to_one(detection: np.ndarray, pair: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Which detections hit a pair when as many as possible do.

    detection, pair: (E,) int, which detection may hit which pair. shape: (N, M), their numbers.
    Returns (N,) bool.
    """
    from scipy.sparse import csr_array  # only here, as SciPy would slow down --help
    from scipy.sparse.csgraph import maximum_bipartite_matching

    if len(detection) == 0:
        return np.zeros(shape[0], dtype=bool)
    graph = csr_array((np.ones(len(detection)), (detection, pair)), shape=shape)
    return maximum_bipartite_matching(graph, perm_type="column") >= 0


def ratios(hits: np.ndarray, detections: np.ndarray, truth: np.ndarray) -> dict:
    """Precision, recall and F1, each a mean over groups. hits, detections, truth: (G,) int counts.

    A mean leaves out the groups whose denominator is 0; "left_out" has their number. A mean over no
    group is None.
    """
    result, left_out = {}, {}
    for name, above, below in (
        ("precision", hits, detections),
        ("recall", hits, truth),
        ("f1", 2 * hits, detections + truth),
    ):
        counted = below > 0
        shares = above[counted] / below[counted]
        result[name] = float(shares.mean()) if counted.any() else None
        left_out[name] = int((~counted).sum())
    return result | {"left_out": left_out}


def pair_scores(
    detections: PairArrays, truth: PairArrays, overlaps: Overlaps, num_images: int
) -> dict:
    """{"micro", "macro", "image"} as above, in fractions; what --json writes.

    overlaps: also those of detections and true pairs of two classes, which are left out here.
    """
    fits = np.minimum(overlaps.human, overlaps.object) >= MIN_IOU
    fits &= detections.hoi_id[overlaps.detection] == truth.hoi_id[overlaps.pair]
    shape = len(detections.hoi_id), len(truth.hoi_id)
    hit = one_to_one(overlaps.detection[fits], overlaps.pair[fits], shape)

    def counts(column: str, groups: int) -> list[np.ndarray]:
        values, true = getattr(detections, column), getattr(truth, column)
        return [np.bincount(rows, minlength=groups) for rows in (values[hit], values, true)]

    by_image = counts("image", num_images)
    exact = (by_image[0] == by_image[1]) & (by_image[0] == by_image[2])
    return {
        "micro": ratios(*(count.sum(keepdims=True) for count in by_image)),
        "macro": ratios(*counts("hoi_id", len(HOI_CLASSES))),
        "image": ratios(*by_image) | {"exact": float(exact.mean()) if num_images else None},
    }


def pair_table(result: dict) -> str:
    """`pair_scores`' result in percent, a line for each way of averaging."""
    names = {
        "micro": "all pairs (micro)",
        "macro": "mean of classes (macro)",
        "image": "mean of images",
    }
    lines = [f"{'pairs as a set, scores ignored':<32} Precision   Recall       F1    Exact"]
    for key, name in names.items():
        shares = [result[key].get(column) for column in ("precision", "recall", "f1")]
        shares += [result[key]["exact"]] if key == "image" else []
        cells = ("-" if share is None else f"{100 * share:.2f}" for share in shares)
        lines.append(f"  {name:<30} " + " ".join(f"{c:>{w}}" for c, w in zip(cells, (9, 8, 8, 8))))
    return "\n".join(lines)
