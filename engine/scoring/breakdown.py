"""Why true pairs were missed, and what mAP would be if each reason were fixed.

A true pair is found if the official protocol counts a detection as right for it. The reason of a
missed pair is the first of KINDS that applies. Overlap is the official IoU of two boxes. Only
detections of the pair's image count. A detection fits the pair if both its boxes overlap the
pair's by at least 0.5.

    image unparsed      the image has no detection: its answer has no instance that can be read, or
                        says that there is none
    duplicate taken     a detection of the pair's class fits it, but counts for another pair: one
                        that it overlaps more or, if equally, one that the annotations have earlier
    wrong verb          a detection with another verb and the same object class fits it
    wrong object        a detection with another object class fits it
    box below 0.5       a detection of the pair's class overlaps it with both boxes by NEAR, but
                        not by 0.5
    no such person box  no detection of the image overlaps the pair's person by 0.5
    no such object box  no detection of the image overlaps the pair's object by 0.5
    not paired          different detections overlap the person and the object by 0.5 (Diag-HOI's
                        association error)

To fix a kind is to give each of its pairs a right detection, as Diag-HOI does (arXiv 2308.08529).
Each kind is fixed alone; the gains do not add up.
1. "duplicate taken", "wrong verb", "wrong object", "box below 0.5": the definition says which
   detections are at fault. The new detection gets the highest of their scores. Those of them that
   were wrong are removed; one that is right for another pair stays.
2. The other kinds have no detection at fault, so no score says how sure the model would have been.
   The new detection comes after all others of its class, which makes the gain a lower bound.
   (Diag-HOI removes such true pairs, which leaves a class of misses without an AP to gain.)

Axes: N detections, M true pairs, K overlaps.
"""

from collections.abc import Callable

import numpy as np

from engine.scoring.pair_arrays import MIN_IOU, Overlaps
from hicodet import HOI_CLASSES, OBJECTS

NEAR = 0.1  # overlap below which TIDE (arXiv 2008.08115) calls a detection background
KINDS = (
    *("image unparsed", "duplicate taken", "wrong verb", "wrong object", "box below 0.5"),
    *("no such person box", "no such object box", "not paired"),
)
OBJECT_OF = np.array([OBJECTS.index(object_class) for _, object_class in HOI_CLASSES])  # (600,)


def at_fault(detections: np.recarray, truth: np.recarray, overlaps: Overlaps) -> dict:
    """The overlaps in which a detection has one thing wrong, {kind: (K,) bool}."""
    hoi_id, true_id = detections.hoi_id[overlaps.detection], truth.hoi_id[overlaps.pair]
    same_class, same_object = hoi_id == true_id, OBJECT_OF[hoi_id] == OBJECT_OF[true_id]
    smaller = np.minimum(overlaps.human, overlaps.object)
    fits = smaller >= MIN_IOU
    return {
        "duplicate taken": fits & same_class,
        "wrong verb": fits & same_object & ~same_class,
        "wrong object": fits & ~same_object,
        "box below 0.5": ~fits & same_class & (smaller >= NEAR),
    }


def reasons(
    detections: np.recarray, truth: np.recarray, overlaps: Overlaps, found: np.ndarray,
    faults: dict[str, np.ndarray],
) -> np.ndarray:  # fmt: skip
    """Why each true pair was missed.

    found: (M,) bool. faults: from `at_fault`. Returns (M,) int into KINDS, -1 for a found pair.
    """

    def pairs_of(rows: np.ndarray) -> np.ndarray:
        return np.bincount(overlaps.pair[rows], minlength=len(found)) > 0

    applies = {kind: pairs_of(rows) for kind, rows in faults.items()} | {
        "image unparsed": ~np.isin(truth.image, detections.image),
        "no such person box": ~pairs_of(overlaps.human >= MIN_IOU),
        "no such object box": ~pairs_of(overlaps.object >= MIN_IOU),
        "not paired": np.ones(len(found), dtype=bool),
    }
    reason = np.select([applies[kind] for kind in KINDS], range(len(KINDS)))
    return np.where(found, -1, reason)


def fixed(
    detections: np.recarray, truth: np.recarray, overlaps: Overlaps, missed: np.ndarray,
    fault: np.ndarray,
) -> np.recarray:  # fmt: skip
    """The detections after one kind was fixed, in no order.

    missed: (M,) bool, the pairs of the kind. fault: (K,) bool, the overlaps in which a detection
    has the kind's fault.
    """
    rows = np.flatnonzero(fault & missed[overlaps.pair])
    score = np.full(len(missed), -np.inf)  # after all others
    np.maximum.at(score, overlaps.pair[rows], detections.score[overlaps.detection[rows]])
    kept = detections.right | ~np.isin(np.arange(len(detections)), overlaps.detection[rows])
    new = truth[missed]
    new.score, new.right = score[missed], True
    return np.concatenate([detections[kept], new]).view(np.recarray)


def break_down(
    detections: np.recarray, truth: np.recarray, overlaps: Overlaps, matched: np.ndarray,
    mean_ap: Callable,
) -> dict:  # fmt: skip
    """Reasons for all missed pairs and what fixing each kind gains; what --json writes.

    matched: (N,) int, from evaluate.match. mean_ap: the mAP of detections; None if it is a mean
    over no class.
    Returns {"missed": int, "kinds": {kind: {"pairs": int, "map_gain": float or None}},
    "why": for each true pair, in the order of the annotations, a kind, or None if it was found}.
    """
    found = np.zeros(len(truth), dtype=bool)
    found[matched[detections.right]] = True
    faults = at_fault(detections, truth, overlaps)
    reason = reasons(detections, truth, overlaps, found, faults)
    before, no_fault, kinds = mean_ap(detections), np.zeros(len(overlaps.pair), dtype=bool), {}
    for index, kind in enumerate(KINDS):
        missed = reason == index
        after = fixed(detections, truth, overlaps, missed, faults.get(kind, no_fault))
        gain = None if before is None else mean_ap(after) - before
        kinds[kind] = {"pairs": int(missed.sum()), "map_gain": gain}
    why = [None if index < 0 else KINDS[index] for index in reason]
    return {"missed": int((~found).sum()), "kinds": kinds, "why": why}


def breakdown_table(result: dict) -> str:
    """`break_down`'s result: a line for each kind, pairs and gain in percent."""
    missed, total = result["missed"], len(result["why"])
    title = f"{missed} of {total} true pairs missed"
    lines = [f"{title:<32} {'pairs':>5} {'share':>8} {'mAP if fixed':>14}"]
    for kind, row in result["kinds"].items():
        share = f"{100 * row['pairs'] / missed:7.1f}%" if missed else "       -"
        gain = "-" if row["map_gain"] is None else f"{100 * row['map_gain']:+.2f}"
        lines.append(f"  {kind:<28} {row['pairs']:7d} {share} {gain:>14}")
    return "\n".join(lines)
