"""Checks of JSON from users: errors name the key, what was expected and what was found."""

import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hicodet import InputError

KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
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
        raise ValueError(f"{what} must be {expected}; found {reprlib.repr(found)[:SHOWN]}")


def value_of(record: object, key: str, kind: type, where: str = "the line"):
    """The value of a key. Raises ValueError if the record is no object or the value not of KIND."""
    expect(isinstance(record, dict), where, KINDS[dict], record)
    expect(type(record.get(key)) is kind, f"{key!r} of {where}", KINDS[kind], record.get(key))
    return record[key]


def numbers_of(record: object, key: str, count: int, where: str) -> tuple[float, ...]:
    """The numbers of a key. Raises ValueError if it is no list of COUNT that a float can hold."""
    values = value_of(record, key, list, where)
    finite = [type(v) in (int, float) and abs(v) <= sys.float_info.max for v in values]
    holds = len(finite) == count and all(finite)
    expect(holds, f"{key!r} of {where}", f"{count} finite numbers", values)
    return tuple(map(float, values))
