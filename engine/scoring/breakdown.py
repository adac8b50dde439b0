"""Why true pairs were missed, and the mAP there would be if each reason were mended.

A true pair is found if the official protocol counts a detection as right for it. The reason of a
missed pair is the first of KINDS that applies. Overlap is the official IoU of two boxes. A
detection, always one of the same image, fits a pair if both its boxes overlap the pair's by at
least the official 0.5.

    image unparsed      the image has no detection: no instance was read from its answer, or the
                        answer said that there is none
    duplicate taken     a detection of the pair's class fits it, but counts for another pair,
                        which it overlaps more or, if equally, comes first in the annotations
    wrong verb          a detection with another verb and the same object class fits it
    wrong object        a detection with another object class fits it
    box below 0.5       a detection of the pair's class overlaps it with both boxes by NEAR, but
                        not by 0.5
    no such person box  no detection of the image overlaps the pair's person by 0.5
    no such object box  no detection of the image overlaps the pair's object by 0.5
    not paired          both are overlapped by 0.5, but by different detections (Diag-HOI's
                        association error); what is left when no other kind applies

To mend a kind is to give each of its pairs a detection that is right, as Diag-HOI does
(arXiv 2308.08529); all other detections stay what they are, right or wrong.
1. "duplicate taken", "wrong verb", "wrong object", "box below 0.5": the detections that the
   definition speaks of are at fault. The pair's new detection has the highest of their scores, and
   those of them that were wrong are removed. One that is right for another pair remains.
2. The other kinds have no detection at fault, so no score says how sure the model would have been.
   The new detection comes behind all others of its class, which makes the gain a lower bound.
   Diag-HOI takes such pairs out of the true pairs instead; a class of which nothing was found
   would then have none left, and no AP to gain.
Each kind is mended alone; the gains do not add up.

Axes: N detections, M true pairs, K overlaps (each detection beside each true pair of its image).
Where a parameter is called detections, truth or overlaps, it is evaluate.PairArrays or .Overlaps.
"""

from collections.abc import Callable

import numpy as np

from hicodet import HOI_CLASSES, OBJECTS

NEAR = 0.1  # overlap below which TIDE (arXiv 2008.08115) calls a detection background
KINDS = (
    "image unparsed",
    "duplicate taken",
    "wrong verb",
    "wrong object",
    "box below 0.5",
    "no such person box",
    "no such object box",
    "not paired",
)
OBJECT_OF = np.array([OBJECTS.index(object_class) for _, object_class in HOI_CLASSES])  # (600,)


def at_fault(detections, truth, overlaps, min_iou: float) -> dict[str, np.ndarray]:
    """The overlaps in which a detection has one thing wrong, {kind: (K,) bool}."""
    hoi_id, true_id = detections.hoi_id[overlaps.detection], truth.hoi_id[overlaps.pair]
    same_class, same_object = hoi_id == true_id, OBJECT_OF[hoi_id] == OBJECT_OF[true_id]
    smaller = np.minimum(overlaps.human, overlaps.object)
    fits = smaller >= min_iou
    return {
        "duplicate taken": fits & same_class,
        "wrong verb": fits & same_object & ~same_class,
        "wrong object": fits & ~same_object,
        "box below 0.5": ~fits & same_class & (smaller >= NEAR),
    }


def reasons(detections, truth, found: np.ndarray, overlaps, min_iou: float) -> np.ndarray:
    """Why each true pair was missed; found: (M,) bool. Returns (M,) int into KINDS, -1: found."""

    def pairs_of(rows: np.ndarray) -> np.ndarray:
        return np.bincount(overlaps.pair[rows], minlength=len(found)) > 0

    faults = at_fault(detections, truth, overlaps, min_iou)
    fits = {kind: pairs_of(rows) for kind, rows in faults.items()} | {
        "image unparsed": ~np.isin(truth.image, detections.image),
        "no such person box": ~pairs_of(overlaps.human >= min_iou),
        "no such object box": ~pairs_of(overlaps.object >= min_iou),
        "not paired": np.ones(len(found), dtype=bool),
    }
    reason = np.select([fits[kind] for kind in KINDS], range(len(KINDS)))
    return np.where(found, -1, reason)


def mend(detections, truth, right: np.ndarray, missed: np.ndarray, faults: np.ndarray, overlaps):
    """The detections after one kind was mended, as (hoi_id, image, score, right), unsorted.

    right: (N,) bool. missed: (M,) bool, the pairs of the kind. faults: (K,) bool, the overlaps in
    which a detection has the kind's fault.
    """
    rows = np.flatnonzero(faults & missed[overlaps.pair])
    score = np.full(len(missed), -np.inf)  # behind all others
    np.maximum.at(score, overlaps.pair[rows], detections.score[overlaps.detection[rows]])
    kept = right | ~np.isin(np.arange(len(right)), overlaps.detection[rows])
    return (
        np.concatenate([detections.hoi_id[kept], truth.hoi_id[missed]]),
        np.concatenate([detections.image[kept], truth.image[missed]]),
        np.concatenate([detections.score[kept], score[missed]]),
        np.concatenate([right[kept], np.ones(missed.sum(), dtype=bool)]),
    )


def breakdown(
    detections, truth, overlaps, matched: np.ndarray, right: np.ndarray, mean_ap: Callable,
    *, min_iou: float,
) -> dict:  # fmt: skip
    """Reasons for all missed pairs and what mending each kind gains; what --json writes.

    matched: (N,) int, from evaluate.match. right: (N,) bool. mean_ap: the mAP of detections given
    as `mend` returns them, None if it is over no class.
    Returns {"missed": int, "kinds": {kind: {"pairs": int, "map_gain": float or None}},
    "why": for each true pair, in the order of the annotations, a kind, or None if it was found}.
    """
    found = np.zeros(len(truth.hoi_id), dtype=bool)
    found[matched[right]] = True
    reason = reasons(detections, truth, found, overlaps, min_iou)
    faults = at_fault(detections, truth, overlaps, min_iou)
    before = mean_ap(detections.hoi_id, detections.image, detections.score, right)
    kinds = {}
    for index, kind in enumerate(KINDS):
        missed = reason == index
        none = np.zeros(len(overlaps.pair), dtype=bool)
        mended = mend(detections, truth, right, missed, faults.get(kind, none), overlaps)
        gain = None if before is None else mean_ap(*mended) - before
        kinds[kind] = {"pairs": int(missed.sum()), "map_gain": gain}
    why = [None if index < 0 else KINDS[index] for index in reason]
    return {"missed": int((~found).sum()), "kinds": kinds, "why": why}


def table(result: dict) -> str:
    """`breakdown`'s result: a line for each kind, pairs and gain in percent."""
    missed, total = result["missed"], len(result["why"])
    title = f"{missed} of {total} true pairs missed"
    lines = [f"{title:<32} {'pairs':>5} {'share':>8} {'mAP if mended':>14}"]
    for kind, row in result["kinds"].items():
        share = f"{100 * row['pairs'] / missed:7.1f}%" if missed else "       -"
        gain = "-" if row["map_gain"] is None else f"{100 * row['map_gain']:+.2f}"
        lines.append(f"  {kind:<28} {row['pairs']:7d} {share} {gain:>14}")
    return "\n".join(lines)
