"""The images of a training: annotated and not excluded."""

import hashlib

from engine.data.annotations import load_split, require_images
from engine.data.image_check import excluded_names, odd_boxes
from hicodet import InputError, Sample


def annotated_samples(data: str) -> list[Sample]:
    """The training images with ground truth. Raises InputError if there are none."""
    samples = [sample for sample in load_split(data, "train") if sample.hois]
    if not samples:
        raise InputError(f"--data {data}: no training image has ground truth")
    return samples


def excluded_images(exclude: str, samples: list[Sample]) -> set[int]:
    """The indices of the samples that --exclude leaves out.

    Raises InputError if no sample is left, FileNotFoundError if other images are missing.
    """
    names = excluded_names(exclude, samples)
    excluded = {i for i, sample in enumerate(samples) if sample.file_name in names}
    require_images(sample for i, sample in enumerate(samples) if i not in excluded)
    return excluded


def excluded_fingerprint(excluded: set[int]) -> str:
    """The number of excluded images and a hash of their indices, for config.json."""
    digest = hashlib.sha256(repr(sorted(excluded)).encode()).hexdigest()
    return f"{len(excluded)} images, {digest[:16]}" if excluded else "none"


def notes_on(samples: list[Sample], excluded: set[int], exclude: str) -> list[str]:
    """Notes on the images for the user. exclude: the --exclude file, or ""."""
    lines = [f"{len(excluded)} of {len(samples)} images are excluded"] if exclude else []
    return lines + ([odd] if (odd := odd_boxes(samples)) else [])
