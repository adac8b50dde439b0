"""predictions.jsonl: making, writing, reading and checking it. FORMAT describes it.

While `predict` runs, each process writes its rows to a part file in the run's folder. A row has a
line of predictions.jsonl, the index of its image, its rewards and its length.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

import hicodet
from engine.checks import at, expect, numbers_of, value_of
from engine.files import json_lines, naming, replace_file
from hicodet import HOI, HOI_IDS, OBJECTS, VERBS, Completion, InputError, Sample

FORMAT = """\
predictions.jsonl has one line for every image of the split:

    {"file_name": "HICO_test2015_00000001.jpg", "instances": [{"human":
     [319, 305, 358, 348], "object": [147, 344.5, 375, 413], "object_class":
     "motorcycle", "verbs": ["ride", "sit on"], "scores": [1.0, 0.7]}]}

Boxes are x1, y1, x2, y2 in 0-based pixels of the original image. Each verb has its own score. An
image without predictions has an empty list of instances. Other keys, such as "text", are ignored.
"""
RANK_SCORES = 1.0, 0.5  # scores of the first and the last triplet of an image


def rank_scores(completion: Completion) -> list[list[float]]:
    """The authors' scores: from 1.0 down to 0.5, linearly, in the order of an image's triplets.

    A triplet is a verb of an instance with both boxes, if HICO has the object class and the verb,
    together or not. A repeated verb is another triplet. A single triplet gets 1.0.
    Returns a score for each verb of each instance, 0 if it is no triplet. Departures: the authors
    keep only 100 triplets, which the official evaluation does not require. They take the first of
    several object classes; we take none. They may count boxes without area.
    """
    counts = [
        [a.has_boxes and a.object_class in OBJECTS and verb in VERBS for verb in a.verbs]
        for a in completion.instances
    ]
    falling = iter(np.linspace(*RANK_SCORES, sum(map(sum, counts))).tolist())
    return [[next(falling) if counted else 0.0 for counted in row] for row in counts]


def predicted_instances(
    completion: Completion,
    image_size: tuple[int, int],
    text_size: tuple[int, int],
    scores: Sequence[float | Sequence[float]] | None = None,
) -> list[dict]:
    """The "instances" of a line, with boxes in pixels of the original image.

    An instance is kept if both boxes have an area in the image, and if it has a verb that HICO has
    with its object class. It keeps only such verbs, each once. Sizes are (width, height).
    scores: for each instance of the completion, one number for all its verbs, or a list with a
    number for each verb as written; a repeated verb gets its first number. None: 1.0.
    Raises ValueError if the lengths of scores and of instances or verbs differ.
    """
    if scores is None:
        scores = [1.0] * len(completion.instances)
    kept = []
    for instance, score in zip(completion.instances, scores, strict=True):
        each = score if isinstance(score, Sequence) else [score] * len(instance.verbs)
        first: dict[str, float] = {}
        for verb, value in zip(instance.verbs, each, strict=True):
            if (verb, instance.object_class) in HOI_IDS:
                first.setdefault(verb, float(value))
        if not (first and instance.has_boxes):
            continue
        boxes = instance.human, instance.object
        human, object_ = (list(hicodet.to_image_frame(box, image_size, text_size)) for box in boxes)
        if hicodet.iou(human, human) > 0 and hicodet.iou(object_, object_) > 0:
            row = {"human": human, "object": object_, "object_class": instance.object_class}
            kept.append(row | {"verbs": list(first), "scores": list(first.values())})
    return kept


def line_hois(line: dict) -> tuple[HOI, ...]:
    """The HOIs of a line."""
    return tuple(
        HOI(tuple(row["human"]), tuple(row["object"]), row["object_class"], tuple(row["verbs"]))
        for row in line["instances"]
    )


def write_predictions(path: Path, lines: Iterable[dict]) -> None:
    """Write predictions.jsonl atomically."""
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_rows(path: Path, rows: Iterator[dict]) -> list[dict]:
    """Write each row to a new part file as it arrives. Returns all rows."""
    written = []
    with naming(path), closing(rows), open(path, "x") as part:
        for row in rows:
            part.write(json.dumps(row) + "\n")
            part.flush()
            written.append(row)
    return written


def part_file(folder: Path, number: int) -> Path:
    """The part file with this number. Each process of each start of a prediction has its own."""
    return folder / f"part-{number:04d}.jsonl"


def stored_rows(folder: Path) -> tuple[dict[int, dict], int]:
    """The rows of an unfinished prediction, by image index, and the number of its next part file.

    Rows of unreadable images are left out, so that these are tried again.
    """
    parts, rows = sorted(folder.glob("part-*.jsonl")), {}
    for part in parts:
        for _, row in json_lines(part, cut_last=True):
            if "unread" not in row:
                rows[row["index"]] = row
    # numbered after the last file, as a crash may leave gaps
    return rows, max((int(part.stem[5:]) + 1 for part in parts), default=0)


def read_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """The lines of predictions.jsonl, each with its place, "FILE, line 7".

    path: the file, or the folder of its run. Object classes and verbs are not checked. Raises
    InputError for a malformed line, naming file and line, and for an unfinished prediction.
    """
    path = Path(path)
    path = path / "predictions.jsonl" if path.is_dir() else path
    if not path.exists() and any(path.parent.glob("part-*.jsonl")):
        folder = path.parent
        raise InputError(f"{folder} is not finished: predict ... --out {folder} --resume")
    for where, line in json_lines(path):
        with at(where):
            _check_line(line)
        yield where, line


def _check_line(line: object) -> None:
    """Raise ValueError for a malformed line, naming the key."""
    value_of(line, "file_name", str)
    for i, instance in enumerate(value_of(line, "instances", list)):
        where = f"instances[{i}]"
        for key in ("human", "object"):
            numbers_of(instance, key, 4, where)
        value_of(instance, "object_class", str, where)
        verbs = value_of(instance, "verbs", list, where)
        texts = all(isinstance(verb, str) for verb in verbs)
        expect(texts, f"'verbs' of {where}", "a list of texts", verbs)
        numbers_of(instance, "scores", len(verbs), where)


def read_predictions(path: str | Path, samples: list[Sample]) -> list[dict]:
    """The lines of predictions.jsonl as dicts, in the file's order, one for each sample.

    Object classes and verbs are not checked. Raises InputError, naming file and line, for a
    malformed line and for an image that is missing, repeated or not among the samples.
    """
    missing = {sample.file_name for sample in samples}
    names, predictions = frozenset(missing), []
    for where, line in read_lines(path):
        name = line["file_name"]
        if name not in missing:
            said = "comes twice" if name in names else "is not of this split; see --data, --split"
            raise InputError(f"{where}: {name!r} {said}")
        missing.remove(name)
        predictions.append(line)
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(samples)} images have no line, such as "
            f"{min(missing)!r}: predict the whole split, or give --limit"
        )
    return predictions


def unknown_verbs(predictions: list[dict]) -> list[str]:
    """The verbs that HICO does not have with their object, each with object and image."""
    return [
        f"{verb!r} with {instance['object_class']!r} in {line['file_name']}"
        for line in predictions
        for instance in line["instances"]
        for verb in instance["verbs"]
        if (verb, instance["object_class"]) not in HOI_IDS
    ]
