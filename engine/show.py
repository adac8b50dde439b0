"""Pictures of a split's images: the ground truth and, beside it, the prediction.

    python hoi_r1.py show --data hico_20160224_det --predictions runs/test/predictions.jsonl
"""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from engine import panels
from engine.files import json_lines, open_image
from engine.records import line_hois
from hicodet import HOI, InputError, Sample, load_split

DEFAULT_IMAGES = 12
Predictions = dict[str, tuple[HOI, ...]]


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
    """Draw images of a split into `out`, and yield a line for each picture.

    predictions: predictions.jsonl, or "" for the ground truth alone. Of `images`, `file` and
    `worst` one chooses the images, as `chosen` says. A picture is DIR/NAME.png.
    Raises InputError naming the option or file that cannot be used, OSError for a missing file.
    """
    samples = {sample.file_name: sample for sample in load_split(data, split)}
    found = read_hois(predictions, samples) if predictions else None
    for sample in chosen(list(samples.values()), found, images=images, file=file, worst=worst):
        predicted = None if found is None else found[sample.file_name]
        path = Path(out) / f"{Path(sample.file_name).stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(sample, predicted).save(path)
        yield f"{path}: {counts(sample, predicted)}"


def read_hois(path: str, samples: dict[str, Sample]) -> Predictions:
    """The HOIs of each line of predictions.jsonl by file name, which may be of a part of the split.

    Raises InputError, naming file and line, for one without an image of the split.
    """
    found: Predictions = {}
    for where, line in json_lines(path):
        name = line.get("file_name") if isinstance(line, dict) else None
        if not isinstance(name, str) or name not in samples:
            raise InputError(f"{where}: no image of this split (check --data and --split)")
        found[name] = line_hois(line)
    return found


def chosen(
    samples: list[Sample], found: Predictions | None, *, images: int, file: str, worst: int
) -> list[Sample]:
    """The images to draw, among those that are predicted if there are predictions.

    images: the first so many. file: the one of this name. worst: so many with the most missed
    HOIs, of equal ones the first. Without any of the three, the first DEFAULT_IMAGES.
    Raises InputError without the image.
    """
    samples = [s for s in samples if found is None or s.file_name in found]
    if file:
        samples = [sample for sample in samples if sample.file_name == Path(file).name]
        if not samples:
            predicted = "" if found is None else ", or none that is predicted"
            raise InputError(f"--file {file}: no image of this split{predicted}")
    if worst:
        samples = sorted(samples, key=lambda s: -panels.missed_pairs(s.hois, found[s.file_name]))
    return samples[: worst or images or DEFAULT_IMAGES]


def draw(sample: Sample, predicted: tuple[HOI, ...] | None) -> Image.Image:
    """The ground truth of an image and, unless it is None, the prediction at its right."""
    image, truth = open_image(sample.path), sample.hois
    if predicted is None:
        return panels.draw_pairs(image, truth, range(len(truth)))
    return panels.side_by_side(panels.compare(image, truth, predicted))


def counts(sample: Sample, predicted: tuple[HOI, ...] | None) -> str:
    """What there is to see; an interaction is a pair with one of its verbs."""
    true = sum(len(hoi.verbs) for hoi in sample.hois)
    if predicted is None:
        return f"{true} true interactions"
    missed = panels.missed_pairs(sample.hois, predicted)
    written = sum(len(hoi.verbs) for hoi in predicted)
    return f"{missed} of {true} interactions missed, {written} predicted"
