"""Checks of JSON that users write: an error names the key, what it must be, and what was found."""

import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hicodet import HOI_IDS, OBJECTS, VERBS, InputError

SHOWN = 60  # characters of a value that an error shows


@contextmanager
def at(where: str) -> Iterator[None]:
    """Turn a ValueError into an InputError that starts with the place, as "FILE, line 7"."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def expect(holds: bool, what: str, expected: str, found: object) -> None:
    """Raise ValueError "WHAT must be EXPECTED; found FOUND" unless it holds."""
    if not holds:
        shown = reprlib.repr(found)
        shown = shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 3]}..."
        raise ValueError(f"{what} must be {expected}; found {shown}")


def expect_box(box: object, what: str) -> None:
    """Raise ValueError unless the value is a list of four finite numbers."""
    expect(are_numbers(box, 4), what, "four finite numbers, [x1, y1, x2, y2]", box)


def expect_class(verb: object, object_class: object, what: str, where: str, hint: str = "") -> None:
    """Raise ValueError unless HICO has the verb with the object class.

    what: the verb's name in the error. where: the instance or pair that holds both.
    """
    expected = f"one of hicodet.OBJECTS{hint}"
    expect(object_class in OBJECTS, f"'object_class' of {where}", expected, object_class)
    expect(verb in VERBS, f"{what} of {where}", f"one of hicodet.VERBS{hint}", verb)
    expected = f"one that HICO has with {object_class!r}{hint}"
    expect((verb, object_class) in HOI_IDS, f"{what} of {where}", expected, verb)


def are_numbers(values: object, count: int) -> bool:
    """Whether a JSON value is a list of `count` numbers that a float can hold."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in values)
