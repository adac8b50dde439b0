"""Files: locked, read line by line, replaced whole."""

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

LOCK_SECONDS = 3.0  # the image workers of a killed trainer may need this long to end


def lock(file: IO) -> None:
    """Keep other processes from a file until it is closed. Raises InputError if one keeps it."""
    last = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= last:
                raise InputError(
                    f"{file.name} is being written by another process: let it finish, or give "
                    "another --out"
                ) from None
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
    """A path to write a file or folder to, which is renamed to `path` when it is whole.

    Raises OSError naming it if it cannot be written; then nothing of it stays.
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
    """Put a file or folder in the place of another one, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(new, path)


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_file(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that it is always whole; a pipe or device stays one."""
    if path.exists() and not path.is_file():
        with naming(path):
            path.write_text(text)
        return
    with aside(path) as new:
        new.write_text(text)


def write_json(path: Path, value: dict) -> None:
    """Replace a JSON file, whole."""
    replace_file(path, json.dumps(value, indent=2) + "\n")


def read_object(path: Path) -> dict:
    """The object of a JSON file. Raises InputError naming a file that holds none."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: no JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: no JSON object")
    return value


def json_lines(path: str | Path, *, cut_last: bool = False) -> Iterator[tuple[str, object]]:
    """The values of a JSON lines file, each with its place, "FILE, line 7", for an error to name.

    cut_last: a last line without its line break was cut by a crash, and is left out.
    Raises InputError naming file and line for what is not JSON, and for one list of all values.
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
