"""Checks of a data set: images that cannot be read, boxes that make no sense.

    python hoi_r1.py check --data hico_20160224_det
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from engine.data.annotations import load_split, splits
from engine.data.images import read_image
from engine.files import replace_file
from hicodet import Box, InputError, Sample

ODD = ("inverted", "without area", "out of the image")  # faults of a ground-truth box


def check(
    *, data: str, split: str | None = None, out: str = "", workers: int = 0
) -> Iterator[str]:
    """Read all images of a split, or of both, and yield a line for each that cannot be used.

    out: a file for their names, for --exclude. Raises InputError at the end if there are any.
    """
    bad = {}
    for name in [split] if split else splits(data):
        samples = load_split(data, name)
        found = bad_images(samples, workers or os.cpu_count(), desc=f"images of {name}")
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
    """The file names in an --exclude file, one per line; none without a file."""
    return set(Path(path).read_text().split("\n")) - {""} if path else set()


def excluded_names(path: str, samples: Sequence[Sample]) -> set[str]:
    """The samples' names that an --exclude file lists; it may list other images too.

    Raises InputError if no sample is left.
    """
    known = {sample.file_name for sample in samples}
    names = read_names(path) & known
    if names == known:
        raise InputError(f"--exclude {path}: no image is left")
    return names


def bad_images(samples: Sequence[Sample], workers: int, *, desc: str = "images") -> dict[str, str]:
    """Why images cannot be used, by file name: missing, broken or not of their annotated size.

    Uses threads, as Pillow decodes outside of Python's lock.
    """
    bad = {}
    bar = tqdm(total=len(samples), desc=desc, unit="image")
    with bar, ThreadPool(max(workers, 1)) as pool:
        for sample, reason in zip(samples, pool.imap(fault, samples)):
            if reason:
                bad[sample.file_name] = reason
            bar.update()
    return bad


def fault(sample: Sample) -> str:
    """Why a sample's image cannot be used; "" if it can."""
    try:
        read_image(sample)
    except InputError as error:
        return str(error)
    return ""


def odd_boxes(samples: Sequence[Sample]) -> str:
    """Numbers of ground-truth boxes that are inverted, empty or out of the image; "" if none."""
    found = Counter()
    for sample in samples:
        boxes = {box for hoi in sample.hois for box in (hoi.human, hoi.object)}
        found.update(box_fault(box, sample.width, sample.height) for box in boxes)
    if found.total() == found[""]:
        return ""
    counts = ", ".join(f"{found[kind]} {kind}" for kind in ODD)
    return f"boxes of the ground truth: {counts}, of {found.total()}"


def box_fault(box: Box, width: int, height: int) -> str:
    """Which of ODD a box is, in 0-based pixels of an image of this size; "" if it is fine."""
    x1, y1, x2, y2 = box
    if x2 < x1 or y2 < y1:
        return ODD[0]
    if x2 == x1 or y2 == y1:
        return ODD[1]
    inside = 0 <= x1 and 0 <= y1 and x2 <= width - 1 and y2 <= height - 1
    return "" if inside else ODD[2]
