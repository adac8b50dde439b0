"""Precision, recall and F1 of pairs: how right an answer is as a set, whatever its scores.

mAP judges a ranking, but a model that writes text gives no score. So the set of its pairs is judged
too, as CrossHOI-Bench does (arXiv 2508.18753). A detection may hit a true pair of its image and
class if both boxes overlap by at least 0.5. Each detection hits at most one pair and each pair is
hit at most once, with as many hits as possible. Neither scores nor order count: unlike in mAP's
rule, a detection may hit any free pair, not only the one that it overlaps most.

    precision = hits / detections    recall = hits / true pairs
    F1 = 2 hits / (detections + true pairs)

"micro" is over all pairs at once. "macro" is the mean over the 600 classes of each class's own, and
"image" the mean over images. A mean leaves out the groups whose denominator is 0. "exact" is the
share of images in which every detection is a hit and no pair is missed. --classes changes nothing.
"""

import numpy as np

from engine.scoring.pair_arrays import MIN_IOU, Overlaps
from hicodet import HOI_CLASSES


def ratios(hits: np.ndarray, detections: np.ndarray, truth: np.ndarray) -> dict:
    """Precision, recall and F1, each a mean over groups. hits, detections, truth: (G,) int counts.

    A mean leaves out the groups whose denominator is 0; the mean of no group is None.
    """
    names, sums = ("precision", "recall", "f1"), (detections, truth, detections + truth)
    return {
        name: float((above[below > 0] / below[below > 0]).mean()) if below.any() else None
        for name, above, below in zip(names, (hits, hits, 2 * hits), sums)
    }


def pair_scores(
    detections: np.recarray, truth: np.recarray, overlaps: Overlaps, num_images: int
) -> dict:
    """{"micro", "macro", "image"} as above, in fractions; what --json writes.

    overlaps: also those of detections and true pairs of two classes, which are left out here.
    """
    from scipy.sparse import csr_array  # only here, as SciPy would slow down --help
    from scipy.sparse.csgraph import maximum_bipartite_matching

    fits = np.minimum(overlaps.human, overlaps.object) >= MIN_IOU
    fits &= detections.hoi_id[overlaps.detection] == truth.hoi_id[overlaps.pair]
    hit = np.zeros(len(detections), dtype=bool)
    if fits.any():
        edges = fits[fits], (overlaps.detection[fits], overlaps.pair[fits])
        graph = csr_array(edges, shape=(len(detections), len(truth)))
        hit = maximum_bipartite_matching(graph, perm_type="column") >= 0

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
    names = {"micro": "all pairs (micro)", "macro": "mean of classes (macro)",
             "image": "mean of images"}  # fmt: skip
    lines = [f"{'pairs as a set, scores ignored':<32} Precision   Recall       F1    Exact"]
    for key, name in names.items():
        cells = ["-" if share is None else f"{100 * share:.2f}" for share in result[key].values()]
        lines.append(f"  {name:<30} " + " ".join(f"{c:>{w}}" for c, w in zip(cells, (9, 8, 8, 8))))
    return "\n".join(lines)
