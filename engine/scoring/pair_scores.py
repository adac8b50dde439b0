"""Precision, recall and F1 of pairs: the quality of an answer as a set, without its scores.

mAP measures a ranking, but a model that writes text gives no scores. So the set of its pairs is
measured too, as in CrossHOI-Bench (arXiv 2508.18753). A detection can hit a true pair of its image
and class if both boxes overlap by at least 0.5. Hits are one-to-one, and as many as possible.
Scores and order do not matter. Unlike in mAP, a detection can hit any free pair, not only the one
that it overlaps most.

    precision = hits / detections    recall = hits / true pairs
    F1 = 2 hits / (detections + true pairs)

"micro" counts all pairs together. "macro" is the mean over the 600 classes, "image" the mean over
images. A mean leaves out groups whose denominator is 0. "exact" is the share of images in which
every detection is a hit and no pair is missed. --classes has no effect.
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
    """{"micro", "macro", "image"} as above, in fractions, for --json.

    overlaps: of any classes; those of different classes are ignored.
    """
    from scipy.sparse import csr_array  # slow, and only needed here
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
    """The result of `pair_scores` as text: a line for each way of averaging, in percent."""
    names = {"micro": "all pairs (micro)", "macro": "mean of classes (macro)",
             "image": "mean of images"}  # fmt: skip
    lines = [f"{'pairs as a set, scores ignored':<32} Precision   Recall       F1    Exact"]
    for key, name in names.items():
        cells = ["-" if share is None else f"{100 * share:.2f}" for share in result[key].values()]
        lines.append(f"  {name:<30} " + " ".join(f"{c:>{w}}" for c, w in zip(cells, (9, 8, 8, 8))))
    return "\n".join(lines)
