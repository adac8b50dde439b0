"""Pictures of a split's images: the ground truth and, beside it, the prediction.

    python hoi_r1.py show --data hico_20160224_det --predictions runs/test/predictions.jsonl
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from engine.data.annotations import load_split
from engine.files import aside, open_image
from engine.report import drawing
from engine.report.records import model_size, read_config
from engine.scoring.predictions import line_hois, read_lines
from hicodet import HOI, InputError, Sample, in_text_frame, parse_completion

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
    by: str = "missed",
    total_reward: Callable | None = None,
) -> Iterator[str]:
    """Draw images of a split into `out`, and yield a line for each picture.

    predictions: predictions.jsonl, or "" for the ground truth alone. Of `images`, `file` and
    `worst` one chooses the images, as `chosen` says. by: "missed" or "reward", what is worst.
    total_reward: that of rewards.py, needed for the second. A picture is DIR/NAME.png.
    Raises InputError naming the option or file that cannot be used, OSError for a missing file.
    """
    samples = {sample.file_name: sample for sample in load_split(data, split)}
    found = read_hois(predictions, samples) if predictions else None
    rewards = read_rewards(predictions, samples, total_reward) if by == "reward" else None
    choice = {"images": images, "file": file, "worst": worst}
    for sample in chosen(list(samples.values()), found, rewards, **choice):
        predicted = None if found is None else found[sample.file_name]
        path = Path(out) / f"{Path(sample.file_name).stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as new:
            draw(sample, predicted).save(new, format="PNG")
        earned = f", reward {rewards[sample.file_name]:.2f}" if rewards else ""
        yield f"{path}: {counts(sample, predicted)}{earned}"


def read_hois(path: str, samples: dict[str, Sample]) -> Predictions:
    """The HOIs of each line of predictions.jsonl by file name, which may be of a part of the split.

    Raises InputError, naming file and line, for one without an image of the split.
    """
    found: Predictions = {}
    for where, line in read_lines(path):
        if line["file_name"] not in samples:
            raise InputError(f"{where}: no image of this split (check --data and --split)")
        found[line["file_name"]] = line_hois(line)
    return found


def read_rewards(path: str, samples: dict[str, Sample], total_reward: Callable) -> dict[str, float]:
    """The total reward (Eq. 23) of each line's text, by file name.

    The text's boxes are in the frame that the config.json beside the file tells, else in that of
    Qwen2.5-VL's resize. Images without ground truth have no reward. Raises InputError, naming file
    and line, for one without a text.
    """
    config, found = read_config(Path(path).parent), {}
    for where, line in read_lines(path):
        sample, text = samples[line["file_name"]], line.get("text")
        if not isinstance(text, str):
            raise InputError(f"{where}: no text of the model, which --by reward needs")
        size = model_size((sample.width, sample.height), config)
        hois = [in_text_frame(hoi, sample, size) for hoi in sample.hois]
        if hois:
            found[sample.file_name] = total_reward(parse_completion(text), hois)["total"]
    return found


def chosen(
    samples: list[Sample],
    found: Predictions | None,
    rewards: dict[str, float] | None = None,
    *,
    images: int,
    file: str,
    worst: int,
) -> list[Sample]:
    """The images to draw, among those that are predicted if there are predictions.

    images: the first so many. file: the one of this name. worst: so many with the lowest rewards,
    or without rewards the most missed HOIs, of equal ones the first. Without any of the three, the
    first DEFAULT_IMAGES.
    Raises InputError without the image.
    """
    samples = [s for s in samples if found is None or s.file_name in found]
    if file:
        samples = [sample for sample in samples if sample.file_name == Path(file).name]
        if not samples:
            predicted = "" if found is None else ", or none that is predicted"
            raise InputError(f"--file {file}: no image of this split{predicted}")
    if worst and rewards is not None:
        scored = [sample for sample in samples if sample.file_name in rewards]
        samples = sorted(scored, key=lambda s: rewards[s.file_name])
    elif worst:
        samples = sorted(samples, key=lambda s: -drawing.missed_pairs(s.hois, found[s.file_name]))
    return samples[: worst or images or DEFAULT_IMAGES]


def draw(sample: Sample, predicted: tuple[HOI, ...] | None) -> Image.Image:
    """The ground truth of an image and, unless it is None, the prediction at its right."""
    image, truth = open_image(sample.path), sample.hois
    if predicted is None:
        return drawing.draw_pairs(image, truth, range(len(truth)))
    return drawing.side_by_side(drawing.compare(image, truth, predicted))


def counts(sample: Sample, predicted: tuple[HOI, ...] | None) -> str:
    """What there is to see; an interaction is a pair with one of its verbs."""
    true = sum(len(hoi.verbs) for hoi in sample.hois)
    if predicted is None:
        return f"{true} true interactions"
    missed = drawing.missed_pairs(sample.hois, predicted)
    written = sum(len(hoi.verbs) for hoi in predicted)
    return f"{missed} of {true} interactions missed, {written} predicted"
