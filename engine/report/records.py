"""The files in the folder of a run, read into one record for the page, the card and the terminal.

A run may still be running. What it has not written yet is left out.
"""

import functools
import shlex
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from engine.data.annotations import image_folder, load_split
from engine.data.images import open_image
from engine.files import json_lines, read_object
from engine.scoring.predictions import stored_rows
from hicodet import HOI, InputError


@dataclass(frozen=True)
class RunRecord:
    """The folder of a training or a prediction. A missing file is empty or None here."""

    folder: Path
    config: dict  # "stage" is "sft", "grpo" or "predict"; "reward_parts" describes the reward
    metrics: tuple[dict, ...] = ()  # one dict per step, in order; a value may be None
    group: dict | None = None  # the last row of rollouts.jsonl whose rewards differ (Fig. 6)
    summary: dict | None = None  # of a prediction
    result: dict | None = None  # of evaluate.py --json
    predictions: tuple[dict, ...] = ()  # one row per image, with "line" and "reward"

    @property
    def command(self) -> str:
        """The command line that started the run."""
        return shlex.join(self.config.get("command", ()))


def read_run(folder: str | Path) -> RunRecord:
    """The record of a run's folder.

    Raises InputError for a folder that is not a run, and for a damaged file.
    """
    folder = Path(folder)
    config = _object(folder / "config.json") or {}
    if "stage" not in config:
        why = "it has no config.json of a training or prediction"
        raise InputError(f"{folder} is not a run: {why if folder.is_dir() else 'no such folder'}")
    groups = _rows(folder / "rollouts.jsonl")
    differ = [g for g in groups if len({c["rewards"]["total"] for c in g["completions"]}) > 1]
    newest = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    found = map(read_object, newest)  # one may be of evaluate.py, under any name
    return RunRecord(
        folder,
        config,
        metrics=tuple(_rows(folder / "metrics.jsonl")),
        group=next(reversed(differ or groups), None),
        summary=_object(folder / "summary.json"),
        result=next((value for value in found if "known_object" in value), None),
        predictions=tuple(row for _, row in sorted(stored_rows(folder)[0].items())),
    )


def _object(path: Path) -> dict | None:
    return read_object(path) if path.exists() else None


def _rows(path: Path) -> list[dict]:
    """The rows of a JSON lines file, without a last one that is still being written."""
    return [row for _, row in json_lines(path, cut_last=True)] if path.exists() else []


def stored_image(run: RunRecord, split: str, name: str) -> Image.Image | None:
    """An image of the run's data; None if it cannot be read."""
    try:
        return open_image(image_folder(run.config["data"], split) / name)
    except InputError:
        return None


@functools.lru_cache(maxsize=1)  # reading takes seconds, and runs on one page share their data
def ground_truth(data: str, split: str) -> dict[str, tuple[HOI, ...]]:
    """The HOIs of each image of a split; {} if the annotations cannot be read."""
    try:
        return {sample.file_name: sample.hois for sample in load_split(data, split)}
    except (OSError, ValueError):
        return {}
