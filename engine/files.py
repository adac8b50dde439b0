"""Files: locked, read line by line, replaced at one stroke."""

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO

from safetensors import SafetensorError


def lock(file: IO) -> None:
    """Keep other processes from a file until it is closed. Raises ValueError if one has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{file.name} is being written by another process: let it finish, or "
                         "give another --out") from None


def write_aside(path: Path, text: str) -> None:
    """Replace a file at one stroke."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    aside.replace(path)


def write_json(path: Path, value: dict) -> None:
    """Replace a JSON file at one stroke."""
    write_aside(path, json.dumps(value, indent=2) + "\n")


def read_rows(path: Path) -> list[dict]:
    """The whole lines of a JSON lines file of a run; a crash may have cut the last one."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        try:
            rows += [json.loads(line)] if line.endswith("\n") else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; remove the line") from None
    return rows


def from_model(read: Callable, path: str, what: str):
    """What the library reads from --model. Raises ValueError naming the folder if it cannot."""
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        inside = Path(path) / "model"
        hint = f"; is {inside} meant?" if inside.is_dir() else ""
        raise ValueError(f"--model {path}: no {what} that can be read ({error}){hint}") from None
