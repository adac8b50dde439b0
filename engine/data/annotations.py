"""The annotations of HICO-DET, or of other images, read into Samples (Sec. 4.1).

HICO-DET has anno_bbox.mat and anno.mat.
1. Both count pixels from 1. The reader subtracts 1, once.
2. Entries marked `invis` have no boxes. They are no ground truth, but their image belongs to the
   Known Object setting of their object.

Other images have annotations.jsonl in place of both, with HICO's 600 classes; docs/evaluation.md
describes its lines.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from engine.checks import at, expect, numbers_of, value_of
from engine.files import json_lines
from hicodet import HOI_CLASSES, HOI_IDS, Box, InputError, Pair, Sample, merge_pairs

SPLITS = ("train", "test")
# File name, width, height, pairs and known objects of an image.
Row = tuple[str, int, int, tuple[Pair, ...], Iterable[str]]


def load_split(root: str | Path, split: str) -> list[Sample]:
    """Read the annotations of one split, "train" or "test", in the order of the file.

    root: folder of hico_20160224_det, where anno.mat may be missing, or of annotations.jsonl.
    anno.mat says which objects an image is known for; without it the classes listed in
    anno_bbox.mat do, invisible ones included.
    Raises InputError for another layout or an empty split, FileNotFoundError without annotations.
    """
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
    path, counts = _annotation_file(Path(root)), Counter()
    if path.suffix == ".jsonl":
        counts.update(pair.hoi_id for row in _own_rows(path)["train"] for pair in row[3])
    else:
        for where, record in _records(path, "train"):
            with _layout(where):
                for entry in record["hoi"].ravel():  # no boxes: they take as long as reading
                    if not entry["invis"].item():
                        counts[int(entry["id"].item()) - 1] += len(entry["connection"])
    return [counts[hoi_id] for hoi_id in range(len(HOI_CLASSES))]


def image_folder(root: str | Path, split: str) -> Path:
    """A split's image folder: images/train2015 or images/test2015 if it exists, else images."""
    folder = Path(root) / "images" / f"{split}2015"
    return folder if folder.is_dir() else folder.parent


def require_images(samples: Iterable[Sample]) -> None:
    """Raise FileNotFoundError if images are missing, with their number and the first one."""
    missing = [sample.path for sample in samples if not sample.path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images are missing, first {missing[0]} (they belong in "
            "images/train2015 and images/test2015, or in images). `python hoi_r1.py check --out "
            "FILE` lists them, and --exclude FILE leaves them out"
        )


def _annotation_file(root: Path) -> Path:
    """anno_bbox.mat or annotations.jsonl, whichever exists."""
    found = [root / name for name in ("anno_bbox.mat", "annotations.jsonl")]
    found = [path for path in found if path.is_file()]
    if len(found) == 2:
        raise InputError(f"{root} has both {found[0].name} and {found[1].name}; keep one of them")
    if not found:
        raise FileNotFoundError(
            f"{root / 'anno_bbox.mat'} is missing: --data is the folder of hico_20160224_det, or "
            "of annotations.jsonl for other images"
        )
    return found[0]


def _own_rows(path: Path) -> dict[str, list[Row]]:
    """The rows of annotations.jsonl by split."""
    rows = {split: {} for split in SPLITS}
    for where, line in json_lines(path):
        with at(where):
            split, row = _own_row(line)
            expect(row[0] not in rows[split], "'file_name'", "on one line of a split only", row[0])
        rows[split][row[0]] = row
    return {split: list(found.values()) for split, found in rows.items()}


def _own_row(line: object) -> tuple[str, Row]:
    """The split and the row of a line. Raises ValueError naming a key whose value is wrong."""
    name, split = value_of(line, "file_name", str), value_of(line, "split", str)
    expect(split in SPLITS, "'split'", '"train" or "test"', split)
    width, height = value_of(line, "width", int), value_of(line, "height", int)
    expect(min(width, height) > 0, "'width' and 'height'", "at least 1", [width, height])
    entries = enumerate(value_of(line, "pairs", list))
    pairs = tuple(_own_pair(entry, f"pairs[{i}]") for i, entry in entries)
    return split, (name, width, height, pairs, {HOI_CLASSES[pair.hoi_id][1] for pair in pairs})


def _own_pair(entry: object, where: str) -> Pair:
    human, object_ = (numbers_of(entry, key, 4, where) for key in ("human", "object"))
    verb, object_class = (value_of(entry, key, str, where) for key in ("verb", "object_class"))
    known = (verb, object_class) in HOI_IDS
    expect(known, f"'verb' of {where}", f"one that HICO has with {object_class!r}", verb)
    return Pair(human, object_, HOI_IDS[verb, object_class])


@contextmanager
def _layout(where: str | Path) -> Iterator[None]:
    """Turn errors of reading a .mat file and its structs into an InputError that names the place.

    The file may be cut, damaged, of MATLAB 7.3, or not HICO-DET's.
    """
    from scipy.io.matlab import MatReadError  # only here, as SciPy would slow down --help

    odd_structs = (ValueError, TypeError, LookupError, AttributeError)
    try:
        yield
    except (*odd_structs, NotImplementedError, OSError, zlib.error, MatReadError) as error:
        said = f"{where}: {type(error).__name__}: {error}"
        raise InputError(f"{said}; expected the layout of hico_20160224_det") from error


def _variables(path: Path, *names: str) -> list[np.ndarray]:
    """Variables of a .mat file."""
    from scipy.io import loadmat

    with _layout(path):
        found = loadmat(path, variable_names=names)
        return [found[name] for name in names]


def _records(path: Path, split: str) -> Iterator[tuple[str, np.void]]:
    """The image records of a split in anno_bbox.mat, each with its place in the file."""
    actions, records = _variables(path, "list_action", f"bbox_{split}")
    with _layout(f"{path}, list_action"):
        found = [f"{a['vname'].item()} {a['nname'].item()}" for a in actions.ravel()]
        if [name.replace("_", " ") for name in found] != [" ".join(pair) for pair in HOI_CLASSES]:
            raise ValueError("not the 600 HOI classes of HICO in their order")
    for index, record in enumerate(records.ravel(), start=1):
        yield f"{path}, bbox_{split}({index})", record


def _official_rows(path: Path, split: str) -> list[Row]:
    """The rows of anno_bbox.mat, with known objects from anno.mat, if it is there."""
    known, rows = _image_level_objects(path.with_name("anno.mat"), split), []
    for where, record in _records(path, split):
        with _layout(where):
            rows.append(_official_row(record, known))
    return rows


def _image_level_objects(path: Path, split: str) -> dict[str, set[str]] | None:
    """Object classes of each image of the split by file name; None without anno.mat."""
    if not path.is_file():
        return None
    files, labels = _variables(path, f"list_{split}", f"anno_{split}")
    with _layout(path):
        names = [str(np.squeeze(file)) for file in files.ravel()]
        objects = {name: set() for name in names}
        for hoi_id, column in np.argwhere(labels == 1):  # -1: no, 0: ambiguous, NaN: not labelled
            objects[names[column]].add(HOI_CLASSES[hoi_id][1])
    return objects


def _official_row(record: np.void, known: dict[str, set[str]] | None) -> Row:
    name, (size,) = record["filename"].item(), record["size"].ravel()
    if known is not None and name not in known:
        raise ValueError(f"{name} is not in the list of anno.mat")
    pairs, listed = [], set()
    for entry in record["hoi"].ravel():
        hoi_id = int(entry["id"].item()) - 1
        if not entry["invis"].item():
            humans, objects = _boxes(entry["bboxhuman"]), _boxes(entry["bboxobject"])
            links = entry["connection"].reshape(-1, 2).tolist()
            pairs += [Pair(humans[human], objects[object_], hoi_id) for human, object_ in links]
        listed.add(HOI_CLASSES[hoi_id][1])
    width, height = (int(size[side].item()) for side in ("width", "height"))
    return name, width, height, tuple(pairs), listed if known is None else known[name]


def _boxes(boxes: np.ndarray) -> dict[int, Box]:
    """Boxes in 0-based pixels, keyed by their number in `connection`, from 1."""
    # float first, as the official file may hold unsigned bytes, where 0 - 1 is 255
    sides = ("x1", "y1", "x2", "y2")
    values = (tuple(float(box[side].item()) - 1 for side in sides) for box in boxes.ravel())
    return dict(enumerate(values, start=1))
