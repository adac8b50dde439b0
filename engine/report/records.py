"""What the folder of a run holds, read into one record for the page, the card and the terminal.

A folder may be that of a run still under way, of an older version, or damaged: what is missing or
unreadable is left out, and no content of a file raises. Boxes are xyxy, in 0-based pixels of the
original image.
"""

import functools
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import hicodet
from engine.data import annotations
from engine.files import open_image
from engine.report import drawing
from engine.report.health import number
from engine.scoring.predictions import line_hois, predicted_instances

EXAMPLES = 12  # of a prediction: half of them the best, half the worst
REWARDS = ("format", "object", "verb", "iou")  # the parts of "total"
LEAST_PIXELS = ("shortest_edge", "min_pixels", 56**2)  # names of an area, and Qwen2.5-VL's own
MOST_PIXELS = ("longest_edge", "max_pixels", 28**2 * 16384)
# of a config
NO_OPTIONS = {"stage", "command", "examples", "weights", "changes", "resume", "dry_run", "finished"}


@dataclass(frozen=True)
class Answer:
    """One text of the model."""

    text: str
    hois: tuple[hicodet.HOI, ...]  # what of it counts as a prediction
    rewards: dict[str, float]  # "total" and its parts; empty where there is no ground truth


@dataclass(frozen=True)
class Group:
    """The G completions of one image in a step of GRPO (Fig. 6)."""

    step: int
    file_name: str
    image: Image.Image | None  # None where the photograph cannot be read
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Example:
    """One predicted image."""

    file_name: str
    image: Image.Image | None
    truth: tuple[hicodet.HOI, ...] | None  # None where the annotations cannot be read
    answer: Answer


@dataclass(frozen=True)
class Run:
    """The folder of a training or a prediction; what it lacks is empty or None."""

    folder: Path
    config: dict
    metrics: tuple[dict, ...] = ()  # a dict a step, in order; a value may be None
    group: Group | None = None  # the latest one whose rewards differ
    summary: dict | None = None  # of a prediction
    result: dict | None = None  # of evaluate.py --json
    examples: tuple[Example, ...] = ()  # best first
    examples_by: str = ""  # what orders them
    before: "Run | None" = None  # the training that this one goes on from, without its pictures

    @property
    def stage(self) -> str:
        """ "sft", "grpo" or "predict"; "run" if the options do not tell."""
        marks = {"group_size": "grpo", "traces": "sft", "split": "predict"}
        known = (stage for option, stage in marks.items() if option in self.config)
        return str(self.config.get("stage") or next(known, "run"))

    @property
    def options(self) -> dict:
        """The options of the command line, without those that do not describe the run."""
        return {name: v for name, v in self.config.items() if name not in NO_OPTIONS}

    @property
    def command(self) -> str:
        """The command line that made the run; if it was not kept, one with every option."""
        if kept := self.config.get("command"):
            return shlex.join(map(str, kept)) if isinstance(kept, list) else str(kept)
        words = [word for name, value in self.options.items() for word in _flag(name, value)]
        return shlex.join(["python", "hoi_r1.py", self.stage, *words])


def read_run(folder: str | Path) -> Run:
    """The record of a run's folder. Raises FileNotFoundError if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    run = _read_numbers(folder)
    found = _read_predictions(folder)
    ordered, by = _best_first(found, run.config)
    count = EXAMPLES if len(ordered) > EXAMPLES else len(ordered)
    shown = ordered[: count - count // 2] + ordered[len(ordered) - count // 2 :]
    return Run(
        folder,
        run.config,
        run.metrics,
        _read_group(folder, run.config),
        _read_json(folder / "summary.json"),
        _read_result(folder),
        tuple(_example(line, rewards, run.config) for line, rewards in shown),
        by,
        _read_before(folder, run.config),
    )


def read_config(folder: Path) -> dict:
    """The options of a run; {} where there are none that can be read."""
    return _read_json(folder / "config.json") or {}


def largest_rewards(config: dict) -> dict[str, float]:
    """The most that a run can earn of each part, with 0.2 as weights; 0 of what --without names."""
    without = _list(config.get("without"))
    label, iou = float("label" not in without), float("iou" not in without)
    return {"format": 0.8, "object": label, "verb": label, "iou": iou}


def _read_numbers(folder: Path) -> Run:
    """Only the options and the metrics of a run."""
    rows = {row["step"]: row for row in read_lines(folder / "metrics.jsonl") if _is_step(row)}
    metrics = tuple(rows[step] for step in sorted(rows))
    return Run(folder, read_config(folder), metrics)


def _read_before(folder: Path, config: dict, depth: int = 3) -> Run | None:
    """The training whose exported model this one starts from."""
    start = Path(str(config.get("model", "")))
    before = start.parent
    if depth == 0 or start.name != "model" or before.resolve() == folder.resolve():
        return None
    run = _read_numbers(before)
    if not run.metrics:
        return None
    return Run(before, run.config, run.metrics, before=_read_before(before, run.config, depth - 1))


def _read_json(path: Path) -> dict | None:
    """A JSON object from a file; None if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a file with one a line; a line that is cut or damaged is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        rows += [value] if isinstance(value, dict) else []
    return rows


def _is_step(row: dict) -> bool:
    return type(row.get("step")) is int


def _read_result(folder: Path) -> dict | None:
    """What evaluate.py wrote into the folder, under any name; of several the latest."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return next((r for path in paths if _is_result(r := _read_json(path))), None)


def _is_result(value: dict | None) -> bool:
    settings = [(value or {}).get(name) for name in ("default", "known_object")]
    return all(
        isinstance(setting, dict) and len(_list(setting.get("ap"))) == len(hicodet.HOI_CLASSES)
        for setting in settings
    )


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _rewards(row: object) -> dict[str, float]:
    """The finite rewards of a completion as it was logged; {} without a total."""
    row = row if isinstance(row, dict) else {}
    found = {name: number(row.get(name)) for name in (*REWARDS, "total")}
    found = {name: value for name, value in found.items() if math.isfinite(value)}
    return found if "total" in found else {}


def _read_group(folder: Path, config: dict) -> Group | None:
    """The last group of rollouts.jsonl whose rewards differ; if none do, the last one."""
    rows = [row for row in read_lines(folder / "rollouts.jsonl") if _is_step(row)]
    rows = [row | {"completions": _completions(row)} for row in rows]
    rows = [row for row in rows if row["completions"]]
    if not rows:
        return None
    totals = [{c.get("total") for c in row["completions"]} for row in rows]
    last = next((i for i in reversed(range(len(rows))) if len(totals[i]) > 1), len(rows) - 1)
    row, name = rows[last], str(rows[last].get("file_name", ""))
    image = _read_image(config, "train", name)
    answers = (_answer(c["text"], _rewards(c), image, config) for c in row["completions"])
    return Group(row["step"], name, image, tuple(answers))


def _completions(row: dict) -> list[dict]:
    found = _list(row.get("completions"))
    return [c for c in found if isinstance(c, dict) and isinstance(c.get("text"), str)]


def _answer(text: str, rewards: dict, image: Image.Image | None, config: dict) -> Answer:
    """A completion of the training, whose boxes are in the frame that the model sees."""
    if image is None:
        return Answer(text, (), rewards)
    sizes = image.size, model_size(image.size, config)
    instances = predicted_instances(hicodet.parse_completion(text), *sizes)
    return Answer(text, line_hois({"instances": instances}), rewards)


def model_size(size: tuple[int, int], config: dict) -> tuple[int, int]:
    """(width, height) of an image as the model sees it, by Qwen2.5-VL's resize.

    Sides become multiples of a merged patch, 28 pixels, and the area is kept within the bounds of
    the model's preprocessor_config.json; without that file, within Qwen2.5-VL's own.
    """
    if config.get("box_frame") == "original":
        return size
    kept = _read_json(Path(str(config.get("model", ""))) / "preprocessor_config.json") or {}
    kept |= kept["size"] if isinstance(kept.get("size"), dict) else {}  # as newer files have it
    low, high = (_first(kept, *names) for names in (LEAST_PIXELS, MOST_PIXELS))
    unit = _first(kept, "patch_size", 14) * _first(kept, "merge_size", 2)
    width, height = (max(unit, round(side / unit) * unit) for side in size)
    if width * height > high:
        scale = math.sqrt(high / (size[0] * size[1]))
        width, height = (max(unit, math.floor(side * scale / unit) * unit) for side in size)
    elif width * height < low:
        scale = math.sqrt(low / (size[0] * size[1]))
        width, height = (math.ceil(side * scale / unit) * unit for side in size)
    return width, height


def _first(kept: dict, *names: str | int) -> int:
    """The first positive whole number under one of the names, else the last argument."""
    *names, default = names
    values = (kept.get(name) for name in names)
    return next((v for v in values if type(v) is int and v > 0), default)


def _read_image(config: dict, split: str, name: str) -> Image.Image | None:
    path = annotations.image_folder(str(config.get("data", "")), split) / Path(name).name
    try:
        return open_image(path)
    except hicodet.InputError:
        return None


def _read_predictions(folder: Path) -> list[tuple[dict, dict[str, float]]]:
    """(line, rewards) of each predicted image.

    The rewards stand in the parts that the ranks wrote, beside the same lines.
    """
    parts = [row for path in sorted(folder.glob("part-*.jsonl")) for row in read_lines(path)]
    parts = [row for row in parts if isinstance(row.get("line"), dict)]
    rewards = {str(row["line"].get("file_name")): _rewards(row.get("reward")) for row in parts}
    lines = read_lines(folder / "predictions.jsonl") or [row["line"] for row in parts]
    lines = [line for line in lines if isinstance(line.get("file_name"), str)]
    return [(line, rewards.get(line["file_name"], {})) for line in lines]


def _best_first(found: list, config: dict) -> tuple[list, str]:
    """Predictions in the order of their rewards, else of the pairs they miss; and which it is."""
    rewarded = [pair for pair in found if pair[1]]
    if rewarded:
        return sorted(rewarded, key=lambda pair: -pair[1]["total"]), "reward"
    truths = _truths(config) if found else {}
    known = [pair for pair in found if truths.get(pair[0]["file_name"])]
    if not known:
        return found[:EXAMPLES], "file" if found else ""
    missed = {
        line["file_name"]: drawing.missed_pairs(truths[line["file_name"]], line_hois(line))
        for line, _ in known
    }
    return sorted(known, key=lambda pair: missed[pair[0]["file_name"]]), "missed pairs"


def _example(line: dict, rewards: dict[str, float], config: dict) -> Example:
    name = line["file_name"]
    answer = Answer(str(line.get("text", "")), line_hois(line), rewards)
    image = _read_image(config, str(config.get("split", "test")), name)
    return Example(name, image, _truths(config).get(name), answer)


def _truths(config: dict) -> dict[str, tuple[hicodet.HOI, ...]]:
    """The ground truth of each image of the split; {} where the annotations cannot be read."""
    return _read_truths(str(config.get("data", "")), str(config.get("split", "test")))


@functools.lru_cache(maxsize=1)  # reading takes seconds, and runs side by side share their data
def _read_truths(data: str, split: str) -> dict[str, tuple[hicodet.HOI, ...]]:
    try:
        return {sample.file_name: sample.hois for sample in annotations.load_split(data, split)}
    except (OSError, ValueError):
        return {}


def _flag(name: str, value: object) -> list[str]:
    """The words of one option, as the command line takes them."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)] if value else []
    return [] if value in (None, "") or isinstance(value, dict) else [f"--{flag}", str(value)]
