"""HICO-DET's annotations: the official anno_bbox.mat and anno.mat, read into Samples (Sec. 4.1).

1. The official files count pixels from 1. The reader subtracts 1, once.
2. Entries marked `invis` have no boxes: they are no ground truth, but their image belongs to the
   Known Object setting of their object.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from hicodet import HOI_CLASSES, Box, InputError, Pair, Sample, merge_pairs

LAYOUT_HINT = "Expected the layout of hico_20160224_det, the official release of HICO-DET."


def load_split(root: str | Path, split: str) -> list[Sample]:
    """Reads the "train" or "test" half of HICO-DET from `root`, in the order of the file.

    `root` holds anno_bbox.mat, images/train2015, images/test2015 and, optionally, anno.mat, whose
    image-level labels say which objects an image is known for; without it the classes listed in
    anno_bbox.mat do, invisible ones included. Images are not opened.
    Raises InputError for another layout, FileNotFoundError without anno_bbox.mat.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", not {split!r}')
    root = Path(root)
    folder = root / "images" / f"{split}2015"
    return [_to_sample(folder, *row) for row in _read_rows(root, split)]


def training_counts(root: str | Path) -> list[int]:
    """Visible training pairs of each of the 600 HOI classes; a class with fewer than 10 is Rare."""
    return _read_counts(Path(root) / "anno_bbox.mat")


def require_images(samples: Iterable[Sample]) -> None:
    """Raises FileNotFoundError if images are missing on disk, with their number and the first."""
    missing = [str(sample.path) for sample in samples if not sample.path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images are missing, first {', '.join(missing[:3])}. Unpack the "
            "images of hico_20160224_det into images/train2015 and images/test2015, beside "
            "anno_bbox.mat."
        )


def _to_sample(
    folder: Path, name: str, width: int, height: int, pairs: Sequence, objects: Sequence[str]
) -> Sample:
    """A Sample from a row of `_read_rows`."""
    pairs = tuple(Pair(tuple(human), tuple(obj), hoi_id) for human, obj, hoi_id in pairs)
    return Sample(name, folder / name, width, height, merge_pairs(pairs), pairs, frozenset(objects))


def _read_rows(root: Path, split: str) -> list[tuple]:
    """(file name, width, height, pairs, known objects) of each image, in the order of the file.

    A pair is (human, object, hoi_id), as in Pair; known objects are in the alphabet's order.
    """
    path, variable = root / "anno_bbox.mat", f"bbox_{split}"
    variables = _read_mat(path, (variable, "list_action"))
    known = _image_level_objects(root / "anno.mat", split)
    rows = {}
    where = "list_action"
    try:
        _check_actions(variables["list_action"])
        for index, record in enumerate(variables[variable].ravel(), start=1):
            where = f"{variable}({index})"
            row = _read_row(record, known)
            if row[0] in rows:
                raise ValueError(f"field filename: {row[0]} for the second time")
            rows[row[0]] = row
    except ValueError as error:
        raise InputError(f"{path}, {where}: {error}. {LAYOUT_HINT}") from error
    return list(rows.values())


def _read_counts(path: Path) -> list[int]:
    variables = _read_mat(path, ("bbox_train", "list_action"))
    counts = [0] * len(HOI_CLASSES)
    try:
        _check_actions(variables["list_action"])
        for record in variables["bbox_train"].ravel():
            for entry in record["hoi"].ravel():  # no boxes: they would take as long as reading
                hoi_id, visible = _read_class(entry)
                counts[hoi_id] += visible and len(entry["connection"])
    except ValueError as error:
        raise InputError(f"{path}, bbox_train: {error}. {LAYOUT_HINT}") from error
    return counts


def _read_mat(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    # Only here, as SciPy takes longer to load than all the rest of a command's --help.
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the data folder is that of hico_20160224_det")
    # What loadmat raises for a file that is cut short, damaged, of MATLAB 7.3, or none at all.
    unreadable = MatReadError, NotImplementedError, ValueError, IndexError, OSError, zlib.error
    try:
        variables = loadmat(path, variable_names=names)
    except unreadable as error:
        raise InputError(f"{path} is not a readable .mat file: {error}. {LAYOUT_HINT}") from error
    for name in names:
        if name not in variables:
            raise InputError(f"{path} has no variable {name}. {LAYOUT_HINT}")
    return variables


def _check_actions(actions: np.ndarray) -> None:
    """Ids mean what HOI_CLASSES says only if the file's own list of HOI classes is the same."""
    found = tuple(
        tuple(_item(action, name, str).replace("_", " ") for name in ("vname", "nname"))
        for action in actions.ravel()
    )
    if found != HOI_CLASSES:
        odd = next((one for one in found if one not in HOI_CLASSES), "another order or number")
        raise ValueError(f"not the {len(HOI_CLASSES)} HOI classes of HICO in their order: {odd}")


def _image_level_objects(path: Path, split: str) -> dict[str, frozenset[str]] | None:
    """Object classes of each image of the split by file name; None without anno.mat."""
    if not path.is_file():
        return None
    variables = _read_mat(path, (f"list_{split}", f"anno_{split}"))
    files, labels = variables[f"list_{split}"].ravel(), variables[f"anno_{split}"]
    if labels.shape != (len(HOI_CLASSES), files.size):
        raise InputError(
            f"{path}: anno_{split} has shape {labels.shape}, not {len(HOI_CLASSES)} classes x "
            f"{files.size} images of list_{split}. {LAYOUT_HINT}"
        )
    objects = [set() for _ in files]
    for hoi_id, column in np.argwhere(labels == 1):  # -1 is no, 0 ambiguous, NaN not asked
        objects[column].add(HOI_CLASSES[hoi_id][1])
    return {str(np.squeeze(f)): frozenset(names) for f, names in zip(files, objects, strict=True)}


def _read_row(record: np.void, known: dict[str, frozenset] | None) -> tuple:
    name = _item(record, "filename", str)
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ValueError(f"field filename: {name!r} is no name in the folder of images")
    if known is not None and name not in known:
        raise ValueError(f"field filename: {name} is not in the list of anno.mat")
    sizes = [(_item(size, "width"), _item(size, "height")) for size in record["size"].ravel()]
    if len(sizes) != 1 or min(sizes[0]) < 1:
        raise ValueError(f"field size: {sizes} is not one width and height")
    width, height = map(int, sizes[0])
    pairs, listed = [], set()
    for entry in record["hoi"].ravel():
        hoi_id, visible = _read_hoi(entry)
        pairs += visible
        listed.add(HOI_CLASSES[hoi_id][1])
    return name, width, height, pairs, sorted(listed if known is None else known[name])


def _read_class(entry: np.void) -> tuple[int, bool]:
    """The class (0-based) of one entry of `hoi`, and whether it is visible."""
    number = _item(entry, "id")
    if not (number.is_integer() and 1 <= number <= len(HOI_CLASSES)):
        raise ValueError(f"field id: {number:g} is not one of 1..{len(HOI_CLASSES)}")
    return int(number) - 1, not _item(entry, "invis")


def _read_hoi(entry: np.void) -> tuple[int, list[tuple[Box, Box, int]]]:
    """The class (0-based) of one entry of `hoi`, and its pairs, none if it is invisible."""
    hoi_id, visible = _read_class(entry)
    if not visible:
        return hoi_id, []
    rows = entry["connection"]
    if rows.size and (rows.shape[1:] != (2,) or rows.dtype.kind not in "uif"):
        raise ValueError(f"field connection: {rows.dtype} {rows.shape} is not n x 2 numbers")
    humans, objects = (_read_boxes(entry, name) for name in ("bboxhuman", "bboxobject"))
    pairs = []
    for human, obj in rows.reshape(-1, 2).tolist():
        if human not in humans or obj not in objects:
            raise ValueError(
                f"field connection: ({human:g}, {obj:g}) points beyond {len(humans)} human and "
                f"{len(objects)} object boxes"
            )
        pairs.append((humans[human], objects[obj], hoi_id))
    return hoi_id, pairs


def _read_boxes(entry: np.void, name: str) -> dict[int, Box]:
    """Boxes by the number that `connection` calls them, from 1; their pixels become 0-based."""
    boxes = [
        tuple(_item(box, side) - 1 for side in ("x1", "y1", "x2", "y2"))
        for box in entry[name].ravel()
    ]
    return dict(enumerate(boxes, start=1))


def _finite(value: object) -> float:
    # A float at once: the official file may hold unsigned bytes, for which 0 - 1 is 255.
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def _item(record: np.void, name: str, kind: Callable = _finite) -> float | str:
    """The one value in a field of a MATLAB struct."""
    try:
        return kind(record[name].item())
    except (ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"field {name}: {error}") from error
