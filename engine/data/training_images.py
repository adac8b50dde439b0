"""Which images a training takes: annotated ones that are not excluded."""

import hashlib

from engine.data.annotations import load_split, require_images
from engine.data.image_check import excluded_names, odd_boxes
from hicodet import InputError, Sample


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

    Raises InputError if no sample is left, FileNotFoundError if others are missing.
    """
    names = excluded_names(exclude, samples)
    excluded = {i for i, sample in enumerate(samples) if sample.file_name in names}
    require_images(sample for i, sample in enumerate(samples) if i not in excluded)
    return excluded


def excluded_fingerprint(excluded: set[int]) -> str:
    """The number of excluded images and a hash of their places, for config.json."""
    digest = hashlib.sha256(repr(sorted(excluded)).encode()).hexdigest()
    return f"{len(excluded)} images, {digest[:16]}" if excluded else "none"


def notes_on(samples: list[Sample], excluded: set[int], exclude: str) -> list[str]:
    """What the user should know of the images before a training, a line each.

    exclude: the file that named the excluded ones, or "".
    """
    lines = [f"{len(excluded)} of {len(samples)} images are excluded"] if exclude else []
    return lines + ([odd] if (odd := odd_boxes(samples)) else [])
