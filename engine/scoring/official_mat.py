"""Detections in the files that the official MATLAB code reads (HO-RCNN, eval_one.m).

This is its format 'obj': one file per object class, detections_01.mat to detections_80.mat, in
COCO's order of objects. A file has a cell array all_boxes{action, image}: the object's HOI classes
in HICO's order, the images in the order of the annotations. A cell has a row for each detection:
human x1 y1 x2 y2, object x1 y1 x2 y2, score. Pixels are 0-based, as in predictions.jsonl; the
official code adds 1. Of equal scores the earlier row ranks first.
"""

from pathlib import Path

import numpy as np

from engine.files import aside
from hicodet import HOI_CLASSES, OBJECTS


def write_official(folder: Path, detections: np.recarray, num_images: int) -> None:
    """Write the 80 files, replacing older ones. The folder's parent must exist.

    The test set has 5.8 million cells, most of them empty, so this takes minutes.
    """
    from scipy.io import savemat  # slow, and only needed here

    rows = np.column_stack([detections.human, detections.object, detections.score])
    group = detections.hoi_id * num_images + detections.image
    order = np.argsort(group, kind="stable")
    present, first = np.unique(group[order], return_index=True)
    cells = dict(zip(present.tolist(), np.split(rows[order], first[1:])))
    empty = np.zeros((0, 9))
    folder.mkdir(exist_ok=True)
    for number, object_class in enumerate(OBJECTS, start=1):
        hoi_ids = [i for i, (_, name) in enumerate(HOI_CLASSES) if name == object_class]
        all_boxes = np.empty((len(hoi_ids), num_images), dtype=object)
        for action, hoi_id in enumerate(hoi_ids):
            for image in range(num_images):
                all_boxes[action, image] = cells.get(hoi_id * num_images + image, empty)
        with aside(folder / f"detections_{number:02d}.mat") as new:
            savemat(new, {"all_boxes": all_boxes}, appendmat=False, do_compression=True)
