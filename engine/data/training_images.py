"""Which images a training takes: annotated ones, not excluded, with a trace if SFT needs one."""

import hashlib
from pathlib import Path

from engine.data.annotations import load_split, require_images
from engine.data.image_check import odd_boxes, read_names
from engine.traces.trace_file import read_traces
from hicodet import InputError, Sample

MAX_UNTRACED = 0.05  # share of images without a trace that SFT leaves out unasked


def annotated_samples(data: str) -> list[Sample]:
    """The training images with ground truth; others have nothing to train on.

    Raises InputError if there are none.
    """
    samples = [sample for sample in load_split(data, "train") if sample.hois]
    if not samples:
        raise InputError(f"--data {data}: no training image has ground truth")
    return samples


def excluded_images(exclude: str, samples: list[Sample]) -> set[int]:
    """The places of the samples that --exclude leaves out.

    Raises InputError if nothing is left, FileNotFoundError if others are not on disk.
    """
    names = read_names(exclude, samples)
    excluded = {i for i, sample in enumerate(samples) if sample.file_name in names}
    if len(excluded) == len(samples):
        raise InputError(f"--exclude {exclude}: no training image is left")
    require_images(sample for i, sample in enumerate(samples) if i not in excluded)
    return excluded


def excluded_fingerprint(excluded: set[int]) -> str:
    """The number of excluded images and a hash of their places, for config.json."""
    digest = hashlib.sha256(repr(sorted(excluded)).encode()).hexdigest()
    return f"{len(excluded)} images, {digest[:16]}" if excluded else "none"


def notes_on(samples: list[Sample], excluded: set[int]) -> list[str]:
    """What the user should know of the images before a training, a line each."""
    lines = [f"{len(excluded)} of {len(samples)} images are excluded"] if excluded else []
    return lines + ([odd] if (odd := odd_boxes(samples)) else [])


def traces_of(path: str, data: str, samples: list[Sample]) -> dict[str, str]:
    """The teacher's traces by file name, from the file of --traces.

    Raises InputError if there is no such file, or if none of its traces is of an image of --data.
    """
    if not path:
        raise InputError("--traces: give the file of teacher.py, or --no-thinking")
    if not Path(path).is_file():
        raise InputError(f"--traces {path}: no such file; teacher.py writes it")
    thinks = read_traces(path)
    if not any(sample.file_name in thinks for sample in samples):
        raise InputError(f"--traces {path}: none of its {len(thinks)} images is in --data {data}")
    return thinks


def untraced_line(missing: int, total: int, untraced: str | None) -> str:
    """What SFT says of images without a trace. Raises InputError for many if none chose."""
    if missing > MAX_UNTRACED * total and untraced is None:
        raise InputError(
            f"{missing} of {total} annotated images have no trace: run teacher.py again, or choose "
            "--untraced skip (leave them out) or --untraced answer (train on their answers alone)"
        )
    if not missing:
        return f"all {total} annotated images have a trace"
    fate = "trained on their answer alone" if untraced == "answer" else "left out"
    return f"{missing} of {total} annotated images have no trace: {fate}"
