"""File access: locks, reading line by line, atomic replacement."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hicodet import InputError

LOCK_SECONDS = 3.0  # the image workers of a killed trainer may take this long to end


def lock(file: IO) -> None:
    """Lock a file until it is closed. Raises InputError if another process holds the lock."""
    last = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= last:
                said = "is being written by another process: let it finish, or give another --out"
                raise InputError(f"{file.name} {said}") from None
        time.sleep(0.05)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the path to OSErrors that lack one, such as "No space left on device"."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A temporary path to write a file or folder to, renamed to `path` when it is complete.

    Raises OSError naming the path if writing fails, and removes what was written.
    """
    new = path.with_name(path.name + ".tmp")
    try:
        with naming(new):
            yield new
        move(new, path)
    except OSError:
        remove(new)
        raise


def move(new: Path, path: Path) -> None:
    """Rename a file or folder, replacing any at the new path; a file never replaces a folder."""
    if new.is_dir() and path.is_dir():
        shutil.rmtree(path)
    os.replace(new, path)


def remove(path: Path) -> None:
    """Remove a file or folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a file atomically; a pipe or device is written to directly."""
    if path.exists() and not path.is_file():
        with naming(path):
            path.write_text(text, encoding="utf-8")
        return
    with aside(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file atomically."""
    replace_file(path, json.dumps(value, indent=2) + "\n")


def read_object(path: Path) -> dict:
    """The object in a JSON file. Raises InputError naming a damaged file."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: no JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: no JSON object")
    return value


def json_lines(path: str | Path, *, cut_last: bool = False) -> Iterator[tuple[str, object]]:
    """The values of a JSON lines file, each with its place, as in "FILE, line 7".

    cut_last: skip a last line without a line break, which a crash has cut.
    Raises InputError naming file and line if it is not JSON, or if the file is one JSON list.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if number == 1 and line.lstrip().startswith(b"["):
                raise InputError(f"{path}: one object per line, not one list")
            if cut_last and not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                hint = "remove the line" if line.endswith(b"\n") else "cut off? resuming drops it"
                raise InputError(f"{where}: not JSON ({error}); {hint}") from None
            yield where, value
