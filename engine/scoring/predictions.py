"""predictions.jsonl: the one module that makes, writes, reads and checks it; FORMAT describes it.

While `predict` runs, each process keeps its rows in a part file of the run's folder. A row holds a
line of predictions.jsonl with the index of its image, its rewards and its length.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from engine.checks import are_numbers, at, expect, expect_box, expect_class
from engine.files import json_lines, naming, replace_file
from hicodet import (
    HOI,
    HOI_IDS,
    OBJECTS,
    VERBS,
    Completion,
    InputError,
    Sample,
    iou,
    to_image_frame,
)

FORMAT = """\
predictions.jsonl has one line for every image of the split:

    {"file_name": "HICO_test2015_00000001.jpg", "instances": [{"human":
     [319, 305, 358, 348], "object": [147, 344.5, 375, 413], "object_class":
     "motorcycle", "verbs": ["ride", "sit on"], "scores": [1.0, 0.7]}]}

Boxes are x1, y1, x2, y2 in 0-based pixels of the original image. Each verb has its own score. An
image without predictions has an empty list of instances. Other keys, such as "text", are ignored.
"""
RANK_SCORES = 1.0, 0.5  # of the first and of the last triplet of an image


def rank_scores(completion: Completion) -> list[list[float]]:
    """The authors' scores: the triplets of an image fall from 1.0 to 0.5, linearly, as written.

    A triplet is a verb of an instance with both boxes, if HICO has the object class and the verb,
    together or not. A repeated verb is another triplet. A single triplet gets 1.0.
    Returns a score for each verb of each instance, 0 where it is no triplet. Departures: the
    authors cut at 100 triplets, which the official evaluation does not; they take the first of
    several object classes, where we read none; and they may count boxes without area.
    """
    objects, verbs = set(OBJECTS), set(VERBS)
    counts = [
        [a.has_boxes and a.object_class in objects and verb in verbs for verb in a.verbs]
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
    """The "instances" of a line; boxes in pixels of the original image.

    An instance is kept if both boxes have an area in the image, and if it has a verb that HICO has
    with its object class. It keeps only such verbs, each once. Sizes are (width, height).
    scores: for each instance of the completion a number, which all its verbs get, or a number for
    each verb as written, where a repeated verb gets its first. None: 1.0.
    Raises ValueError if the numbers of scores and of instances or verbs differ.
    """
    if scores is None:
        scores = [1.0] * len(completion.instances)
    kept = []
    for instance, score in zip(completion.instances, scores, strict=True):
        score_of = _first_scores(instance.verbs, score)
        verbs = [verb for verb in score_of if (verb, instance.object_class) in HOI_IDS]
        if not (verbs and instance.has_boxes):
            continue
        boxes = [
            list(to_image_frame(box, image_size, text_size))
            for box in (instance.human, instance.object)
        ]
        if all(iou(box, box) > 0 for box in boxes):
            scores_kept = [score_of[verb] for verb in verbs]
            row = {"human": boxes[0], "object": boxes[1], "object_class": instance.object_class}
            kept.append(row | {"verbs": verbs, "scores": scores_kept})
    return kept


def _first_scores(verbs: Sequence[str], score: float | Sequence[float]) -> dict[str, float]:
    """The score of each distinct verb, in the order of the verbs."""
    scores = score if isinstance(score, Sequence) else [score] * len(verbs)
    first: dict[str, float] = {}
    for verb, value in zip(verbs, scores, strict=True):
        first.setdefault(verb, float(value))
    return first


def prediction_line(file_name: str, text: str, instances: list[dict]) -> dict:
    """A line as a dict. text: what the model wrote; instances: from `predicted_instances`."""
    return {"file_name": file_name, "text": text, "instances": instances}


def line_hois(line: dict) -> tuple[HOI, ...]:
    """The HOIs of a line, of any origin: what is no instance with two boxes is left out."""
    found = []
    for row in _list(line.get("instances")):
        boxes = [row.get(key) if isinstance(row, dict) else None for key in ("human", "object")]
        if all(are_numbers(box, 4) for box in boxes):
            human, object_ = (tuple(map(float, box)) for box in boxes)
            verbs = tuple(map(str, _list(row.get("verbs"))))
            found.append(HOI(human, object_, str(row.get("object_class", "")), verbs))
    return tuple(found)


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def write_predictions(path: Path, lines: Iterable[dict]) -> None:
    """Write predictions.jsonl, whole or not at all."""
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_rows(path: Path, rows: Iterator[dict]) -> list[dict]:
    """Write rows to a new part file as they come, and return them."""
    written = []
    with naming(path), closing(rows), open(path, "x") as part:
        for row in rows:
            part.write(json.dumps(row) + "\n")
            part.flush()
            written.append(row)
    return written


def part_file(folder: Path, number: int) -> Path:
    """The part file of this number, which counts the processes of all starts of a prediction."""
    return folder / f"part-{number:04d}.jsonl"


def stored_rows(folder: Path) -> tuple[dict[int, dict], int]:
    """The rows of an unfinished prediction, by image, and the number of its next part file.

    Rows of images that could not be read are left out, so that these are tried again. Raises
    InputError naming a line that is no row.
    """
    parts = [p for p in sorted(folder.glob("part-*.jsonl")) if p.stem[5:].isdecimal()]
    rows = {}
    for where, row in (found for part in parts for found in json_lines(part, cut_last=True)):
        if not _is_row(row):
            raise InputError(f"{where}: not written by a prediction; remove the line")
        if "unread" not in row:
            rows[row["index"]] = row
    # After the last: a crash may have come before each rank had begun its part.
    return rows, max((int(part.stem[5:]) + 1 for part in parts), default=0)


def _is_row(value: object) -> bool:
    """Whether a JSON value is what `predict` writes into a part file."""
    kinds = {"index": int, "length": int, "finished": bool, "line": dict}
    if not isinstance(value, dict) or any(type(value.get(n)) is not k for n, k in kinds.items()):
        return False
    rewards = value.get("reward")
    if not isinstance(rewards, dict):
        return rewards is None
    return are_numbers(list(rewards.values()), len(rewards))


def read_lines(path: str | Path) -> Iterator[tuple[str, dict]]:
    """The objects of predictions.jsonl, each with its place, "FILE, line 7"; not checked further.

    Raises InputError for an unfinished prediction, and for a line that is no object or has no
    "file_name".
    """
    _require_finished(Path(path))
    for where, line in json_lines(path):
        with at(where):
            expect(isinstance(line, dict), "the line", "an object", line)
            name = line.get("file_name")
            expect(isinstance(name, str), "'file_name'", "a string, the name of an image", name)
        yield where, line


def _require_finished(path: Path) -> None:
    """Raise InputError for a folder, and for the missing file of an unfinished prediction."""
    folder = path if path.is_dir() else path.parent
    whole = folder / "predictions.jsonl" if path.is_dir() else path
    if not whole.exists() and next(folder.glob("part-*.jsonl"), None):
        raise InputError(f"{folder} is not finished: predict ... --out {folder} --resume")
    if path.is_dir():
        raise InputError(f"{path} is a folder; give its file, {whole}")


def read_predictions(
    path: str | Path, samples: list[Sample], *, any_class: bool = False
) -> list[dict]:
    """The lines of predictions.jsonl as dicts, in the file's order, one for each sample.

    any_class: object classes and verbs that HICO does not have are let through; see `drop_unknown`.
    Raises InputError, naming file and line, for a malformed line and for an image that is missing,
    repeated or none of the samples'.
    """
    place = dict.fromkeys(sample.file_name for sample in samples)
    predictions = []
    for where, line in read_lines(path):
        name = line["file_name"]
        with at(where):
            expected = "an image of this split (check --data and --split)"
            expect(name in place, "'file_name'", expected, name)
            expected = f"on one line only, but is on line {place[name]} already"
            expect(place[name] is None, "'file_name'", expected, name)
            _check_instances(line.get("instances"), any_class)
        predictions.append(line)
        place[name] = len(predictions)
    missing = [name for name, number in place.items() if number is None]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(place)} images have no line, such as {missing[0]!r};"
            ' predict the whole split, or give --limit (an image without predictions has'
            ' "instances": [])'
        )
    return predictions


def _check_instances(instances: object, any_class: bool) -> None:
    expect(isinstance(instances, list), "'instances'", "a list, which may be empty", instances)
    for i, instance in enumerate(instances):
        where = f"instances[{i}]"
        expect(isinstance(instance, dict), where, "an object", instance)
        for key in ("human", "object"):
            expect_box(instance.get(key), f"{key!r} of {where}")
        name, verbs, scores = map(instance.get, ("object_class", "verbs", "scores"))
        expect(isinstance(name, str), f"'object_class' of {where}", "a string", name)
        strings = isinstance(verbs, list) and all(isinstance(verb, str) for verb in verbs)
        expect(strings, f"'verbs' of {where}", "a list of strings", verbs)
        expected = f"{len(verbs)} finite numbers, one for each verb"
        expect(are_numbers(scores, len(verbs)), f"'scores' of {where}", expected, scores)
        for verb in () if any_class else verbs:
            hint = " (--drop-unknown drops others)"
            expect_class(verb, name, "each of 'verbs'", where, hint)


def drop_unknown(predictions: list[dict]) -> tuple[list[dict], int]:
    """The lines without verbs that HICO does not have with their object, and the number of these.

    An instance that is left without a verb is dropped too.
    """
    kept, dropped = [], 0
    for line in predictions:
        instances = []
        for instance in line["instances"]:
            pairs = list(zip(instance["verbs"], instance["scores"], strict=True))
            known = [pair for pair in pairs if (pair[0], instance["object_class"]) in HOI_IDS]
            dropped += len(pairs) - len(known)
            if known:
                verbs, scores = map(list, zip(*known))
                instances.append(instance | {"verbs": verbs, "scores": scores})
        kept.append(line | {"instances": instances})
    return kept, dropped
