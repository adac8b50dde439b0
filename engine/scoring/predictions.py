"""Reading and checking predictions.jsonl, the file that evaluate.py describes."""

import reprlib
import sys
from pathlib import Path

from engine.files import json_lines
from hicodet import HOI_IDS, OBJECTS, VERBS, InputError, Sample


def read_predictions(path: str | Path, samples: list[Sample]) -> list[dict]:
    """Reads and checks predictions.jsonl; returns its lines as dicts, in the file's order.

    Raises InputError, naming file and line, for a malformed line and for an image that is missing,
    repeated or none of the samples'.
    """
    line_of = dict.fromkeys(sample.file_name for sample in samples)
    predictions = []
    for number, (where, prediction) in enumerate(json_lines(path), start=1):
        try:
            name = _checked_name(prediction)
            expected = "an image of this split (check --data and --split)"
            _expect(name in line_of, "'file_name'", expected, name)
            expected = f"on one line only, but is on line {line_of[name]} already"
            _expect(line_of[name] is None, "'file_name'", expected, name)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
        line_of[name] = number
        predictions.append(prediction)
    missing = [name for name, number in line_of.items() if number is None]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(line_of)} images have no line, such as {missing[0]!r};"
            ' predict the whole split, or give --limit (an image without predictions has'
            ' "instances": [])'
        )
    return predictions


def _checked_name(prediction: object) -> str:
    """The image of a line; ValueError says what is wrong with the line and what is expected."""
    _expect(isinstance(prediction, dict), "the line", "an object", prediction)
    name, instances = prediction.get("file_name"), prediction.get("instances")
    _expect(isinstance(name, str), "'file_name'", "a string, the name of an image", name)
    _expect(isinstance(instances, list), "'instances'", "a list, which may be empty", instances)
    for i, instance in enumerate(instances):
        _check_instance(instance, f"instances[{i}]")
    return name


def _check_instance(instance: object, where: str) -> None:
    _expect(isinstance(instance, dict), where, "an object", instance)
    for key in ("human", "object"):
        box = instance.get(key)
        expected = "four finite numbers, [x1, y1, x2, y2]"
        _expect(_are_numbers(box, 4), f"{key!r} of {where}", expected, box)
    name, verbs, scores = map(instance.get, ("object_class", "verbs", "scores"))
    _expect(name in OBJECTS, f"'object_class' of {where}", "one of hicodet.OBJECTS", name)
    _expect(isinstance(verbs, list), f"'verbs' of {where}", "a list of names", verbs)
    for verb in verbs:
        _expect(verb in VERBS, f"each of 'verbs' of {where}", "one of hicodet.VERBS", verb)
        expected = f"one that hicodet.HOI_CLASSES has with {name!r}"
        _expect((verb, name) in HOI_IDS, f"each of 'verbs' of {where}", expected, verb)
    expected = f"{len(verbs)} finite numbers, one for each verb"
    _expect(_are_numbers(scores, len(verbs)), f"'scores' of {where}", expected, scores)


def _expect(holds: bool, what: str, expected: str, found: object) -> None:
    if not holds:
        raise ValueError(f"{what} must be {expected}; found {reprlib.repr(found)}")


def _are_numbers(values: object, count: int) -> bool:
    """Whether a JSON value is a list of `count` numbers that a float can hold."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in values)
