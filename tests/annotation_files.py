"""Writes anno_bbox.mat, anno.mat and annotations.jsonl for tests."""

import json

import numpy as np
from scipy.io import savemat

import hicodet


def struct(*records):
    """Dicts as a MATLAB struct array: an object array with named fields."""
    names = list(records[0]) if records else ["x1", "x2", "y1", "y2"]
    array = np.empty((1, len(records)), dtype=[(name, object) for name in names])
    for index, record in enumerate(records):
        for name in names:
            array[0, index][name] = record[name]
    return array


def box(x1, y1, x2, y2, dtype=np.uint8):
    sides = {"x1": x1, "x2": x2, "y1": y1, "y2": y2}
    return {name: np.array([[side]], dtype=dtype) for name, side in sides.items()}


def hoi(number, connection=((1, 1),), humans=None, objects=None, invis=0):
    """An entry of `hoi`; number: the class, from 1."""
    return {
        "id": np.array([[number]], dtype=np.uint16),
        "bboxhuman": struct(*(humans or [box(1, 2, 30, 40)])),
        "bboxobject": struct(*(objects or [box(5, 6, 70, 80)])),
        "connection": np.array(connection, dtype=np.uint8),
        "invis": np.array([[invis]], dtype=np.uint8),
    }


def image(name, *hois, size=(640, 480)):
    """An element of bbox_test."""
    width, height = (np.array([[side]], dtype=np.uint16) for side in size)
    size = struct({"width": width, "height": height, "depth": np.uint8(3)})
    empty = np.zeros((0, 0))
    return {"filename": name, "size": size, "hoi": struct(*hois) if hois else empty}


def record(name, pairs):
    """An element of bbox_test; pairs: (human, object, hoi_id) in 0-based pixels."""
    return image(name, *(
        hoi(hoi_id + 1, humans=[box(*np.add(human, 1))], objects=[box(*np.add(object_, 1))])
        for human, object_, hoi_id in pairs
    ))  # fmt: skip


def write(root, *images, actions=hicodet.HOI_CLASSES, **changes):
    """anno_bbox.mat with the images as both halves."""
    rows = [{"nname": n.replace(" ", "_"), "vname": v.replace(" ", "_")} for v, n in actions]
    variables = {"bbox_test": struct(*images), "bbox_train": struct(*images)}
    variables |= {"list_action": struct(*rows).T} | changes
    savemat(root / "anno_bbox.mat", {k: v for k, v in variables.items() if v is not None})
    return root


def write_labels(root, names, labels):
    files = np.array([[name] for name in names], dtype=object)
    savemat(root / "anno.mat", {"list_test": files, "anno_test": labels})


def own_line(name="a.jpg", split="test", pairs=()):
    """A line of annotations.jsonl as a dict; pairs: (human, object, hoi_id)."""
    entries = []
    for human, object_, hoi_id in pairs:
        verb, object_class = hicodet.HOI_CLASSES[hoi_id]
        boxes = {"human": list(human), "object": list(object_)}
        entries.append(boxes | {"object_class": object_class, "verb": verb})
    return {"file_name": name, "split": split, "width": 640, "height": 480, "pairs": entries}


def write_own(root, *lines):
    """annotations.jsonl of dicts, or of texts as they are."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (root / "annotations.jsonl").write_text("".join(text + "\n" for text in texts))
    return root
