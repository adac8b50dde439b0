"""Pictures of images with ground truth and prediction, and the answers for photographs.

    python hoi_r1.py show --data hico_20160224_det --predictions runs/test/predictions.jsonl
    python hoi_r1.py predict --image photo.jpg --model runs/grpo/model --out photos
"""

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from engine.data.annotations import load_split, require_images
from engine.data.images import LONGEST, open_image, too_long
from engine.files import aside
from engine.report import drawing
from engine.scoring.predictions import line_hois, read_lines
from hicodet import ANSWER_OPEN, HOI, InputError, Sample

DEFAULT_IMAGES = 12
LEAST_WIDTH, MOST_WIDTH = 640, 1280  # of a photograph's picture
COLUMNS = 96  # of text
UNREAD_LINES = 15  # shown of a text without a readable instance


def show(
    *,
    data: str,
    split: str = "test",
    out: str = "pictures",
    predictions: str = "",
    images: int = 0,
    file: str = "",
    worst: int = 0,
) -> Iterator[str]:
    """Draw images of a split into OUT/NAME.png, and yield a line for each picture.

    predictions: predictions.jsonl, to draw only its images; "" draws the ground truth. images: the
    first N. file: the one of this name. worst: the N with the most missed interactions, in this
    order. Without these three options: the first DEFAULT_IMAGES.
    Raises InputError naming the option or file that cannot be used, and OSError for a missing
    file. If an image is missing, nothing is drawn.
    """
    samples, found = load_split(data, split), {}
    if predictions:
        found = {line["file_name"]: line_hois(line) for _, line in read_lines(predictions)}
        if other := found.keys() - {sample.file_name for sample in samples}:
            said = f"{min(other)!r} is not of this split; see --data, --split"
            raise InputError(f"{predictions}: {said}")
    wanted = [s for s in samples if not predictions or s.file_name in found]
    if file:
        wanted = [sample for sample in wanted if sample.file_name == Path(file).name]
        if not wanted:
            raise InputError(f"--file {file}: no image of this split, or none with a prediction")
    if worst:
        wanted.sort(key=lambda s: -drawing.missed_pairs(s.hois, found[s.file_name]))
    wanted = wanted[: worst or images or DEFAULT_IMAGES]
    require_images(wanted)
    Path(out).mkdir(parents=True, exist_ok=True)
    for sample in wanted:
        path = Path(out) / f"{Path(sample.file_name).stem}.png"
        picture, numbers = draw_sample(sample, found.get(sample.file_name))
        with aside(path) as new:
            picture.save(new, format="PNG")
        yield f"{path}: {numbers}"


def draw_sample(sample: Sample, predicted: tuple[HOI, ...] | None) -> tuple[Image.Image, str]:
    """The ground truth of an image, with the prediction at its right unless that is None.

    Returns the picture, and a text with numbers of interactions. A pair has one for each verb.
    """
    image, truth = open_image(sample.path), sample.hois
    true = sum(len(hoi.verbs) for hoi in truth)
    if predicted is None:
        return drawing.draw_pairs(image, truth, range(len(truth))), f"{true} true interactions"
    picture = drawing.side_by_side(drawing.compare(image, truth, predicted))
    missed = drawing.missed_pairs(truth, predicted)
    written = sum(len(hoi.verbs) for hoi in predicted)
    return picture, f"{missed} of {true} interactions missed, {written} predicted"


def photographs(paths: Sequence[str]) -> list[Sample]:
    """A Sample without ground truth for each file, with the size of the upright image.

    Raises InputError naming a path that is not an image, or one too long for the model.
    """
    samples = []
    for path in map(Path, paths):
        size = open_image(path, upright=True).size
        if too_long(*size):
            raise InputError(f"{path}: one side is more than {LONGEST} times the other; crop it")
        samples.append(Sample(path.name, path, *size, (), (), frozenset()))
    return samples


def picture_paths(paths: Sequence[str], out: str) -> list[Path]:
    """Paths of the photographs' pictures: OUT/NAME_hois.png, so none replaces a photograph.

    Raises InputError if two photographs have one name.
    """
    found = [Path(out) / f"{Path(path).stem}_hois.png" for path in paths]
    if len(set(found)) < len(found):
        raise InputError("--image: two photographs have one name; predict them one by one")
    return found


def draw_photograph(sample: Sample, line: dict) -> Image.Image:
    """The photograph with the pairs of its line of predictions.jsonl, at most 1,280 pixels wide."""
    image, hois = open_image(sample.path, upright=True), line_hois(line)
    width = min(max(image.width, LEAST_WIDTH), MOST_WIDTH)
    caption = "" if hois else "no interaction"
    return drawing.draw_pairs(image, hois, range(len(hois)), width=width, caption=caption)


def answer_text(sample: Sample, line: dict) -> str:
    """The reasoning, then a table of interactions with boxes in pixels of the upright image.

    line: of predictions.jsonl. If it has no instances: the first lines of the whole text.
    """
    head = f"{sample.path}, {sample.width} x {sample.height}"
    if not line["instances"]:
        rows = _wrapped(line["text"])
        rest = ["..."] if len(rows) > UNREAD_LINES else []
        unread = "No interaction can be read from the answer."
        return "\n".join([head, *rows[:UNREAD_LINES], *rest, "", unread])
    row = "{:<16} {:<16} {:>6}  {:<21} {}"
    table = [row.format("verb", "object", "score", "person", "object")]
    for instance in line["instances"]:
        boxes = [" ".join(f"{side:.0f}" for side in instance[key]) for key in ("human", "object")]
        for verb, score in zip(instance["verbs"], instance["scores"], strict=True):
            table.append(row.format(verb, instance["object_class"], f"{score:.3f}", *boxes))
    return "\n".join([head, *_wrapped(line["text"].rpartition(ANSWER_OPEN)[0]), "", *table])


def _wrapped(text: str) -> list[str]:
    """The lines of a text, without <think> tags and without terminal control characters."""
    lines = text.replace("<think>", "").replace("</think>", "").strip().splitlines()
    lines = ["".join(c if c.isprintable() else " " for c in line) for line in lines]
    return [row for line in lines for row in textwrap.wrap(line, COLUMNS)]
