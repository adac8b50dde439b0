"""The annotations of HICO-DET, or of other images, read into Samples (Sec. 4.1).

HICO-DET has anno_bbox.mat and anno.mat.
1. Both count pixels from 1. The reader subtracts 1, once.
2. Entries marked `invis` have no boxes. They are no ground truth, but their image belongs to the
   Known Object setting of their object.

Other images have annotations.jsonl in place of both, with HICO's 600 classes. A line is an image:

    {"file_name": "beach.jpg", "split": "train", "width": 640, "height": 480, "pairs": [
     {"human": [319, 105, 398, 348], "object": [147, 344.5, 375, 413],
      "object_class": "surfboard", "verb": "hold"}]}

Boxes are x1, y1, x2, y2 in 0-based pixels of the image as it is stored, whatever its EXIF data say.
"split" is "train" or "test". A pair with several verbs has one entry for each. "pairs" may be
empty. An image is known for the objects of its pairs.

The images of a split are in images/train2015 or images/test2015. Where there is no such folder,
they are directly in images.
"""

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from engine.checks import at, expect, expect_box, expect_class
from engine.files import json_lines
from hicodet import HOI_CLASSES, HOI_IDS, Box, InputError, Pair, Sample, merge_pairs

SPLITS = ("train", "test")
LAYOUT_HINT = "Expected the layout of hico_20160224_det, the official release of HICO-DET."
# File name, width, height, pairs and known objects of an image.
Row = tuple[str, int, int, tuple[Pair, ...], Iterable[str]]


def load_split(root: str | Path, split: str) -> list[Sample]:
    """Read the images of one split, "train" or "test", in the order of the file; none is opened.

    root: folder of hico_20160224_det, where anno.mat may be missing, or of annotations.jsonl.
    anno.mat says which objects an image is known for; without it the classes listed in
    anno_bbox.mat do, invisible ones included.
    Raises InputError for another layout or an empty split, FileNotFoundError without annotations.
    """
    if split not in SPLITS:
        raise ValueError(f'split must be "train" or "test", not {split!r}')
    path, folder = _annotation_file(Path(root)), image_folder(root, split)
    rows = _own_rows(path)[split] if path.suffix == ".jsonl" else _official_rows(path, split)
    if not rows:
        raise InputError(f"{path}: no image of the split {split!r}")
    return [
        Sample(name, folder / name, width, height, merge_pairs(pairs), pairs, frozenset(objects))
        for name, width, height, pairs, objects in rows
    ]


def splits(root: str | Path) -> list[str]:
    """The splits that have images."""
    path = _annotation_file(Path(root))
    own = path.suffix == ".jsonl"
    return [split for split, rows in _own_rows(path).items() if rows] if own else list(SPLITS)


def training_counts(root: str | Path) -> list[int]:
    """Visible training pairs of each of the 600 HOI classes; a class with fewer than 10 is Rare."""
    path, counts = _annotation_file(Path(root)), [0] * len(HOI_CLASSES)
    if path.suffix == ".jsonl":
        for _, _, _, pairs, _ in _own_rows(path)["train"]:
            for pair in pairs:
                counts[pair.hoi_id] += 1
        return counts
    for where, record in _records(path, "train"):
        with _layout(where):
            for entry in record["hoi"].ravel():  # no boxes: they would take as long as reading
                hoi_id, visible = _read_class(entry)
                counts[hoi_id] += visible and len(entry["connection"])
    return counts


def image_folder(root: str | Path, split: str) -> Path:
    """Where the images of a split are: images/train2015 or images/test2015, if there, or images."""
    folder = Path(root) / "images" / f"{split}2015"
    return folder if folder.is_dir() else folder.parent


def require_images(samples: Iterable[Sample]) -> None:
    """Raises FileNotFoundError if images are missing on disk, with their number and the first."""
    missing = [sample.path for sample in samples if not sample.path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images are missing, first {missing[0]} (places: images/train2015 and "
            "images/test2015, or images). `python hoi_r1.py check` lists all that are missing, and "
            "--exclude FILE leaves them out"
        )


def _annotation_file(root: Path) -> Path:
    """anno_bbox.mat or annotations.jsonl, whichever is there."""
    official, own = root / "anno_bbox.mat", root / "annotations.jsonl"
    if own.is_file() and official.is_file():
        raise InputError(f"{root} has both {own.name} and {official.name}; keep one of them")
    if not own.is_file() and not official.is_file():
        raise FileNotFoundError(
            f"{official} is missing: the data folder is that of hico_20160224_det, or has "
            "annotations.jsonl for other images"
        )
    return own if own.is_file() else official


def _own_rows(path: Path) -> dict[str, list[Row]]:
    """The rows of annotations.jsonl by split."""
    rows = {split: {} for split in SPLITS}
    for where, line in json_lines(path):
        with at(where):
            split, row = _own_row(line)
            _check_name(row[0], rows[split])
        rows[split][row[0]] = row
    return {split: list(by_name.values()) for split, by_name in rows.items()}


def _check_name(name: str, rows: dict[str, Row]) -> None:
    """Raises ValueError for a file outside of the folder of images, and for one that has a row."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise ValueError(f"file name {name!r} is outside of the folder of images")
    if name in rows:
        raise ValueError(f"file name {name!r} for the second time in its split")


def _own_row(line: object) -> tuple[str, Row]:
    """The split and the row of a line; ValueError names a key whose value is wrong."""
    expect(isinstance(line, dict), "the line", "an object", line)
    keys = "file_name", "split", "width", "height", "pairs"
    name, split, width, height, pairs = map(line.get, keys)
    expect(isinstance(name, str), "'file_name'", "the name of a file", name)
    expect(split in SPLITS, "'split'", '"train" or "test"', split)
    for key, side in (("width", width), ("height", height)):
        expect(type(side) is int and side > 0, f"{key!r}", "a whole number of pixels", side)
    expect(isinstance(pairs, list), "'pairs'", "a list, which may be empty", pairs)
    read = tuple(_own_pair(pair, f"pairs[{i}]") for i, pair in enumerate(pairs))
    return split, (name, width, height, read, {HOI_CLASSES[pair.hoi_id][1] for pair in read})


def _own_pair(pair: object, where: str) -> Pair:
    expect(isinstance(pair, dict), where, "an object", pair)
    for key in ("human", "object"):
        expect_box(pair.get(key), f"{key!r} of {where}")
    object_class, verb = pair.get("object_class"), pair.get("verb")
    expect_class(verb, object_class, "'verb'", where)
    human, object_ = (tuple(map(float, pair[key])) for key in ("human", "object"))
    return Pair(human, object_, HOI_IDS[verb, object_class])


def _official_rows(path: Path, split: str) -> list[Row]:
    """The rows of anno_bbox.mat, with known objects from anno.mat, if it is there."""
    known, rows = _image_level_objects(path.with_name("anno.mat"), split), {}
    for where, record in _records(path, split):
        with _layout(where):
            row = _read_row(record, known)
            _check_name(row[0], rows)
        rows[row[0]] = row
    return list(rows.values())


@contextmanager
def _layout(where: str) -> Iterator[None]:
    """Turn errors of reading MATLAB's structs into an InputError that names the place."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise InputError(f"{where}: {kind}{error}. {LAYOUT_HINT}") from error


def _records(path: Path, split: str) -> Iterator[tuple[str, np.void]]:
    """The images of a split as anno_bbox.mat has them, each with its place."""
    variables = _read_mat(path, (f"bbox_{split}", "list_action"))
    with _layout(f"{path}, list_action"):
        _check_actions(variables["list_action"])
    for index, record in enumerate(variables[f"bbox_{split}"].ravel(), start=1):
        yield f"{path}, bbox_{split}({index})", record


def _read_mat(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    # Only here, as SciPy takes longer to load than all the rest of a command's --help.
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    # What loadmat raises for a file that is cut short, damaged, of MATLAB 7.3, or no .mat at all.
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
    """Ids mean what HOI_CLASSES says only if the file has the same list of HOI classes."""
    names = "vname", "nname"
    found = [tuple(str(a[n].item()).replace("_", " ") for n in names) for a in actions.ravel()]
    if found != list(HOI_CLASSES):
        odd = next((one for one in found if one not in HOI_CLASSES), "another order or number")
        raise ValueError(f"not the {len(HOI_CLASSES)} HOI classes of HICO in their order: {odd}")


def _image_level_objects(path: Path, split: str) -> dict[str, set[str]] | None:
    """Object classes of each image of the split by file name; None without anno.mat."""
    if not path.is_file():
        return None
    variables = _read_mat(path, (f"list_{split}", f"anno_{split}"))
    with _layout(path):
        files, labels = variables[f"list_{split}"].ravel(), variables[f"anno_{split}"]
        if labels.shape != (len(HOI_CLASSES), files.size):
            raise ValueError(f"anno_{split} has shape {labels.shape}, not (600, {files.size})")
        objects = {str(np.squeeze(file)): set() for file in files}
        names = list(objects)
        for hoi_id, column in np.argwhere(labels == 1):  # -1 is no, 0 ambiguous, NaN not asked
            objects[names[column]].add(HOI_CLASSES[hoi_id][1])
    return objects


def _read_row(record: np.void, known: dict[str, set[str]] | None) -> Row:
    name, (size,) = record["filename"].item(), record["size"].ravel()
    if known is not None and name not in known:
        raise ValueError(f"{name} is not in the list of anno.mat")
    pairs, listed = [], set()
    for entry in record["hoi"].ravel():
        hoi_id, visible = _read_class(entry)
        pairs += _read_pairs(entry, hoi_id) if visible else []
        listed.add(HOI_CLASSES[hoi_id][1])
    width, height = (int(size[side].item()) for side in ("width", "height"))
    return name, width, height, tuple(pairs), listed if known is None else known[name]


def _read_class(entry: np.void) -> tuple[int, bool]:
    """The class (0-based) of one entry of `hoi`, and whether it is visible."""
    number = int(entry["id"].item())
    if not 1 <= number <= len(HOI_CLASSES):
        raise ValueError(f"id {number} is not one of 1..{len(HOI_CLASSES)}")
    return number - 1, not entry["invis"].item()


def _read_pairs(entry: np.void, hoi_id: int) -> list[Pair]:
    """A pair for each row of `connection`, which numbers the boxes from 1."""
    humans, objects = (
        dict(enumerate(map(_read_box, entry[name].ravel()), start=1))
        for name in ("bboxhuman", "bboxobject")
    )
    links = entry["connection"].reshape(-1, 2).tolist()
    return [Pair(humans[human], objects[object_], hoi_id) for human, object_ in links]


def _read_box(box: np.void) -> Box:
    """A box in 0-based pixels."""
    # A float first: the official file may hold unsigned bytes, for which 0 - 1 is 255.
    return tuple(float(box[side].item()) - 1 for side in ("x1", "y1", "x2", "y2"))
