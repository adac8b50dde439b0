"""Photographs without a data set: what the model said of them, as text and as pictures."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from engine.files import open_image
from engine.report import drawing
from engine.scoring.predictions import line_hois
from hicodet import ANSWER_OPEN, InputError, Sample

LONGEST = 200  # times the shorter side: what Qwen2.5-VL's processor takes
WIDTHS = (640, 1280)  # of a picture
COLUMNS = 96  # of text


def photographs(paths: Sequence[str]) -> list[Sample]:
    """A Sample without ground truth for each file, with its size when it is held upright.

    Raises InputError naming a file that is no image, or one too long for the model.
    """
    samples = []
    for path in map(Path, paths):
        size = open_image(path, upright=True).size
        if max(size) > LONGEST * min(size):
            raise InputError(f"{path}: one side is more than {LONGEST} times the other; crop it")
        samples.append(Sample(path.name, path, *size, (), (), frozenset()))
    return samples


def picture_paths(paths: Sequence[str], out: str) -> list[Path]:
    """Where the picture of each photograph goes, OUT/NAME_hois.png.

    The end keeps it from the place of a photograph that lies in the same folder. Raises InputError
    if two photographs have one name.
    """
    found = [Path(out) / f"{Path(path).stem}_hois.png" for path in paths]
    for path, picture in zip(paths, found):
        if found.count(picture) > 1:
            raise InputError(f"--image {path}: another one has this name; predict it on its own")
    return found


def draw(sample: Sample, line: dict) -> Image.Image:
    """The photograph with the predicted pairs, at most 1,280 pixels wide. line: of predictions."""
    image, hois = open_image(sample.path, upright=True), line_hois(line)
    width = min(max(image.width, WIDTHS[0]), WIDTHS[1])
    caption = "" if hois else "no interaction"
    return drawing.draw_pairs(image, hois, range(len(hois)), width=width, caption=caption)


def as_text(sample: Sample, line: dict) -> str:
    """The reasoning, then a table with a row for each interaction, boxes in pixels, upright.

    line: of predictions.jsonl. Without an <answer> all that was written is shown.
    """
    head = f"{sample.path}, {sample.width} x {sample.height}"
    row = "{:<16} {:<16} {:>6}  {:<21} {}"
    table = [row.format("verb", "object", "score", "person", "object")]
    for instance in line["instances"]:
        boxes = [" ".join(f"{side:.0f}" for side in instance[key]) for key in ("human", "object")]
        for verb, score in zip(instance["verbs"], instance["scores"], strict=True):
            table.append(row.format(verb, instance["object_class"], f"{score:.3f}", *boxes))
    if not line["instances"]:
        table = ["No interaction can be read from the answer."]
    return "\n".join([head, *_reasoning(line["text"]), "", *table])


def _reasoning(text: str) -> list[str]:
    """What stands before the answer, wrapped, without tags and what a terminal would obey."""
    before = text.rpartition(ANSWER_OPEN)[0] or text
    before = before.replace("<think>", "").replace("</think>", "").strip()
    lines = before.splitlines()
    lines = ["".join(c if c.isprintable() else " " for c in line) for line in lines]
    return [row for line in lines for row in textwrap.wrap(line, COLUMNS)]
