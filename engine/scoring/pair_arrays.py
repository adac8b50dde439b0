"""Detections and true pairs of all images as flat arrays, for evaluate.py and its breakdown.

Axes: N detections, one for each verb of each instance, or N true pairs; K combinations.
"""

from typing import NamedTuple

import numpy as np

from hicodet import HOI_IDS, Sample

MIN_IOU = 0.5  # Sec. 4.1: a detection fits a true pair if both boxes overlap by this


class PairArrays(NamedTuple):
    """Human-object pairs of all images as flat arrays; the order of rows is the order of ties."""

    hoi_id: np.ndarray  # (N,) int, 0 to 599
    image: np.ndarray  # (N,) int, index into the samples
    boxes_human: np.ndarray  # (N, 4) float xyxy, 0-based pixels of the original image
    boxes_object: np.ndarray  # (N, 4)
    score: np.ndarray  # (N,) float; of true pairs 1.0, which nothing reads


class Overlaps(NamedTuple):
    """Each detection with each true pair of its image: a row for each combination."""

    detection: np.ndarray  # (K,) int, row of the detections; rising
    pair: np.ndarray  # (K,) int, row of the true pairs
    human: np.ndarray  # (K,) float, IoU of the human boxes
    object: np.ndarray  # (K,) float


def _stack(rows: list[tuple]) -> PairArrays:
    """Rows of (hoi_id, image, human, object, score) as arrays; there may be none."""
    columns = list(zip(*rows)) or [()] * 5
    hoi_id, image = (np.array(column, dtype=np.int64) for column in columns[:2])
    humans, objects = (np.array(column, dtype=float).reshape(-1, 4) for column in columns[2:4])
    return PairArrays(hoi_id, image, humans, objects, np.array(columns[4], dtype=float))


def detection_arrays(predictions: list[dict], samples: list[Sample]) -> PairArrays:
    """One row for each verb of each instance, in the order of the lines and instances."""
    index = {sample.file_name: i for i, sample in enumerate(samples)}
    rows = []
    for prediction in predictions:
        image = index[prediction["file_name"]]
        for hoi in prediction["instances"]:
            for verb, score in zip(hoi["verbs"], hoi["scores"], strict=True):
                hoi_id = HOI_IDS[verb, hoi["object_class"]]
                rows.append((hoi_id, image, hoi["human"], hoi["object"], score))
    return _stack(rows)


def truth_arrays(samples: list[Sample]) -> PairArrays:
    """The annotated pairs, unmerged, in the order of the annotations."""
    return _stack(
        [(p.hoi_id, i, p.human, p.object, 1.0) for i, s in enumerate(samples) for p in s.pairs]
    )
