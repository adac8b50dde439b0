"""Which images are used: those that can be read, have ground truth, and are not excluded.

    python hoi_r1.py check --data hico_20160224_det
"""

import hashlib
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from engine.data.annotations import load_split, require_images, splits
from engine.data.images import read_image
from engine.files import replace_file
from hicodet import InputError, Sample


def check(*, data: str, split: str | None = None, out: str = "", workers: int = 0) -> Iterator[str]:
    """Read all images of a split, or of both, and yield a line for each that cannot be used.

    out: a file for their names, for --exclude. Raises InputError at the end if there are any.
    """
    bad = {}
    for name in [split] if split else splits(data):
        samples = load_split(data, name)
        with ThreadPool(workers or None) as pool:  # Pillow decodes outside of Python's lock
            faults = pool.imap(fault, samples)
            bar = tqdm(faults, f"images of {name}", len(samples), unit="image")
            found = {sample.file_name: said for said, sample in zip(bar, samples) if said}
        yield from found.values()
        yield f"{name}: {len(found)} of {len(samples)} images cannot be used"
        if odd := odd_boxes(samples):
            yield f"{name}: {odd}"
        bad |= found
    if out:
        replace_file(Path(out), "".join(f"{name}\n" for name in bad))
    if bad:
        file = out or "bad.txt, which `check --out bad.txt` writes"
        said = "cannot be used: fetch them again, or leave them out with --exclude"
        raise InputError(f"{len(bad)} images {said} {file}")


def read_names(path: str) -> set[str]:
    """The file names in an --exclude file, one per line; none without a file.

    Raises InputError if it is no text.
    """
    try:
        return set(Path(path).read_text("utf-8-sig").split("\n")) - {""} if path else set()
    except UnicodeDecodeError as error:
        raise InputError(f"--exclude {path}: no text in UTF-8 ({error})") from None


def excluded_images(exclude: str, samples: list[Sample]) -> set[int]:
    """The indices of the samples that an --exclude file lists; it may list other images too.

    Raises InputError if no sample is left, FileNotFoundError if an image of the others is missing.
    """
    names = read_names(exclude)
    excluded = {i for i, sample in enumerate(samples) if sample.file_name in names}
    if len(excluded) == len(samples):
        raise InputError(f"--exclude {exclude}: no image is left")
    require_images(sample for i, sample in enumerate(samples) if i not in excluded)
    return excluded


def excluded_fingerprint(excluded: set[int]) -> str:
    """The number of excluded images and a hash of their indices, for config.json."""
    digest = hashlib.sha256(repr(sorted(excluded)).encode()).hexdigest()
    return f"{len(excluded)} images, {digest[:16]}" if excluded else "none"


def annotated_samples(data: str) -> list[Sample]:
    """The training images with ground truth. Raises InputError if there are none."""
    samples = [sample for sample in load_split(data, "train") if sample.hois]
    if not samples:
        raise InputError(f"--data {data}: no training image has ground truth")
    return samples


def fault(sample: Sample) -> str:
    """Why an image cannot be used: missing, broken, too narrow or of another size; "" if it can."""
    try:
        read_image(sample)
    except InputError as error:
        return str(error)
    return ""


def odd_boxes(samples: list[Sample]) -> str:
    """Numbers of ground-truth boxes that are inverted, empty or out of the image; "" if none."""
    total = inverted = empty = out = 0
    for sample in samples:
        right, bottom = sample.width - 1, sample.height - 1
        for x1, y1, x2, y2 in {box for hoi in sample.hois for box in (hoi.human, hoi.object)}:
            total += 1
            if x2 < x1 or y2 < y1:
                inverted += 1
            elif x2 == x1 or y2 == y1:
                empty += 1
            elif not (0 <= x1 and 0 <= y1 and x2 <= right and y2 <= bottom):
                out += 1
    if not (inverted or empty or out):
        return ""
    counts = f"{inverted} inverted, {empty} without area, {out} out of the image"
    return f"boxes of the ground truth: {counts}, of {total}"
