"""Detections and true pairs of all images as flat arrays, for evaluate.py and its breakdown.

Axes: N detections, one for each verb of each instance, or N true pairs; K combinations.
"""

from typing import NamedTuple

import numpy as np

from hicodet import HOI_IDS, Sample

MIN_IOU = 0.5  # Sec. 4.1: a detection fits a true pair if both boxes overlap by this
# A human-object pair. Of equal scores the earlier row of an array ranks first.
PAIR = [
    ("hoi_id", int),  # 0 to 599
    ("image", int),  # index into the samples
    ("human", float, 4),  # xyxy, 0-based pixels of the original image
    ("object", float, 4),
    ("score", float),  # only of detections
    ("right", bool),  # only of detections, after matching
]


class Overlaps(NamedTuple):
    """Each combination of a detection and a true pair of its image."""

    detection: np.ndarray  # (K,) int, row of the detections, ascending
    pair: np.ndarray  # (K,) int, row of the true pairs
    human: np.ndarray  # (K,) float, IoU of the human boxes
    object: np.ndarray  # (K,) float


def detection_array(predictions: list[dict], samples: list[Sample]) -> np.recarray:
    """(N,) rows of PAIR, with its fields as attributes: one for each verb of each instance.

    They keep the order of lines and instances. Verbs that HICO lacks with the object are left out.
    """
    index = {sample.file_name: i for i, sample in enumerate(samples)}
    rows = []
    for line in predictions:
        for hoi in line["instances"]:
            boxes = tuple(hoi["human"]), tuple(hoi["object"])
            for verb, score in zip(hoi["verbs"], hoi["scores"], strict=True):
                hoi_id = HOI_IDS.get((verb, hoi["object_class"]))
                if hoi_id is not None:
                    rows.append((hoi_id, index[line["file_name"]], *boxes, score, False))
    return np.array(rows, dtype=PAIR).view(np.recarray)


def truth_array(samples: list[Sample]) -> np.recarray:
    """(N,) rows of PAIR for the annotated pairs, unmerged, in the order of the annotations."""
    pairs = [(i, pair) for i, sample in enumerate(samples) for pair in sample.pairs]
    rows = [(pair.hoi_id, i, pair.human, pair.object, 0.0, False) for i, pair in pairs]
    return np.array(rows, dtype=PAIR).view(np.recarray)
