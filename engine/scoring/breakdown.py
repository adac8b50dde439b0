"""Why true pairs were missed, and what mAP would be if each reason were fixed.

A true pair is found if the official protocol counts a detection as right for it. A missed pair has
the first of the following reasons that applies. Only detections in the pair's image count. A
detection fits the pair if both its boxes have an IoU of at least 0.5 with the pair's.

    image unparsed      the image has no detection: its answer is empty or unreadable
    duplicate taken     a detection of the pair's class fits it, but counts for another pair that it
                        overlaps more, or equally and earlier in the annotations
    wrong verb          a detection with another verb and the same object class fits it
    wrong object        a detection with another object class fits it
    box below 0.5       both boxes of a detection of the pair's class have an IoU of at least NEAR
                        with the pair's, but not both of 0.5
    no such person box  no detection has an IoU of 0.5 with the pair's person
    no such object box  no detection has an IoU of 0.5 with the pair's object
    not paired          different detections have an IoU of 0.5 with the person and with the object
                        (Diag-HOI's association error)

Fixing a kind gives each of its pairs a right detection, as Diag-HOI does (arXiv 2308.08529). Each
kind is fixed alone; the gains do not add up.
1. "duplicate taken", "wrong verb", "wrong object", "box below 0.5": detections are at fault. The
   new detection gets their highest score. They are removed, except those that are right for another
   pair.
2. Other kinds: no detection is at fault, so there is no score to use. The new detection is ranked
   after all others of its class, so the gain is a lower bound. (Diag-HOI removes these true pairs;
   then a class with nothing else would have no AP to gain.)

Axes: N detections, M true pairs, K overlaps.
"""

from collections.abc import Callable

import numpy as np

from engine.scoring.pair_arrays import MIN_IOU, Overlaps
from hicodet import HOI_CLASSES, OBJECTS

NEAR = 0.1  # TIDE (arXiv 2008.08115) calls detections with a smaller IoU background
KINDS = (
    *("image unparsed", "duplicate taken", "wrong verb", "wrong object", "box below 0.5"),
    *("no such person box", "no such object box", "not paired"),
)
OBJECT_OF = np.array([OBJECTS.index(object_class) for _, object_class in HOI_CLASSES])  # (600,)


def at_fault(detections: np.recarray, truth: np.recarray, overlaps: Overlaps) -> dict:
    """The overlaps in which a detection is at fault, {kind: (K,) bool}."""
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
    detections: np.recarray, truth: np.recarray, overlaps: Overlaps, faults: dict[str, np.ndarray]
) -> np.ndarray:
    """Why each true pair is missed, if it is: (M,) int into KINDS. faults: from `at_fault`."""

    def pairs_of(rows: np.ndarray) -> np.ndarray:
        return np.bincount(overlaps.pair[rows], minlength=len(truth)) > 0

    applies = {kind: pairs_of(rows) for kind, rows in faults.items()} | {
        "image unparsed": ~np.isin(truth.image, detections.image),
        "no such person box": ~pairs_of(overlaps.human >= MIN_IOU),
        "no such object box": ~pairs_of(overlaps.object >= MIN_IOU),
        "not paired": np.ones(len(truth), dtype=bool),
    }
    return np.select([applies[kind] for kind in KINDS], range(len(KINDS)))


def fixed(
    detections: np.recarray, truth: np.recarray, overlaps: Overlaps, missed: np.ndarray,
    fault: np.ndarray,
) -> np.recarray:  # fmt: skip
    """The detections after one kind is fixed, unordered.

    missed: (M,) bool, the pairs of the kind. fault: (K,) bool, from `at_fault`.
    """
    rows = np.flatnonzero(fault & missed[overlaps.pair])
    score = np.full(len(missed), -np.inf)  # ranks after all others
    np.maximum.at(score, overlaps.pair[rows], detections.score[overlaps.detection[rows]])
    kept = detections.right | ~np.isin(np.arange(len(detections)), overlaps.detection[rows])
    new = truth[missed]
    new.score, new.right = score[missed], True
    return np.concatenate([detections[kept], new]).view(np.recarray)


def break_down(
    detections: np.recarray, truth: np.recarray, overlaps: Overlaps, matched: np.ndarray,
    mean_ap: Callable,
) -> dict:  # fmt: skip
    """The reason for each missed pair, and the gain of fixing each kind, for --json.

    matched: (N,) int, from evaluate.match. mean_ap: maps detections to their mAP, or to None if no
    class counts. Returns {"missed": int, "kinds": {kind: {"pairs": int, "map_gain": float or
    None}}, "why": for each true pair, in the order of the annotations, its kind, or None if found}.
    """
    found = np.zeros(len(truth), dtype=bool)
    found[matched[detections.right]] = True
    faults = at_fault(detections, truth, overlaps)
    reason = np.where(found, -1, reasons(detections, truth, overlaps, faults))
    before, no_fault, kinds = mean_ap(detections), np.zeros(len(overlaps.pair), dtype=bool), {}
    for index, kind in enumerate(KINDS):
        missed = reason == index
        after = fixed(detections, truth, overlaps, missed, faults.get(kind, no_fault))
        gain = None if before is None else mean_ap(after) - before
        kinds[kind] = {"pairs": int(missed.sum()), "map_gain": gain}
    why = [None if index < 0 else KINDS[index] for index in reason]
    return {"missed": int((~found).sum()), "kinds": kinds, "why": why}


def breakdown_table(result: dict) -> str:
    """The result of `break_down` as text: a line for each kind, in percent."""
    missed, total = result["missed"], len(result["why"])
    title = f"{missed} of {total} true pairs missed"
    lines = [f"{title:<32} {'pairs':>5} {'share':>8} {'mAP if fixed':>14}"]
    for kind, row in result["kinds"].items():
        share = f"{100 * row['pairs'] / missed:7.1f}%" if missed else "       -"
        gain = "-" if row["map_gain"] is None else f"{100 * row['map_gain']:+.2f}"
        lines.append(f"  {kind:<28} {row['pairs']:7d} {share} {gain:>14}")
    return "\n".join(lines)
