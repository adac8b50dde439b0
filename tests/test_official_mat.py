"""engine/scoring/official_mat.py: read back with SciPy and, where it is installed, GNU Octave."""

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat

import evaluate
import hicodet
from engine.scoring.official_mat import write_official
from tests.annotation_files import record, write
from tests.pairs import BOX, FAR, HOLD_BICYCLE, RIDE_HORSE, make_line, make_sample, random_problem

SCRIPT = Path(__file__).with_name("official_layout.m")


def written(folder, samples, lines):
    write_official(folder, evaluate.detection_array(lines, samples), len(samples))
    return {path.name: loadmat(path)["all_boxes"] for path in sorted(folder.iterdir())}


def test_files_and_cells(tmp_path):
    samples = [make_sample("a"), make_sample("b")]
    lines = [
        make_line("b", [(FAR, BOX, HOLD_BICYCLE, 0.5), (BOX, FAR, HOLD_BICYCLE, 0.5)]),
        make_line("a", [(BOX, BOX, RIDE_HORSE, 0.25)]),
    ]
    files = written(tmp_path / "new", samples, lines)
    assert list(files) == [f"detections_{number:02d}.mat" for number in range(1, 81)]
    bicycle, horse = files["detections_02.mat"], files["detections_18.mat"]  # as COCO counts them
    assert bicycle.shape == (14, 2) and horse.shape == (17, 2)  # HOI classes of the object, images
    # "hold" is the bicycle's second action. Rows of equal score keep the order of the instances.
    assert bicycle[1, 1].tolist() == [[*FAR, *BOX, 0.5], [*BOX, *FAR, 0.5]]
    assert horse[10, 0].tolist() == [[*BOX, *BOX, 0.25]]  # "ride" is the horse's eleventh
    rows = [cell for cells in files.values() for cell in cells.ravel() if cell.size]
    assert len(rows) == 2  # all other cells are empty


def test_every_class_has_its_cell(tmp_path):
    """One detection of each class, each with another score."""
    detections = [(BOX, BOX, hoi_id, hoi_id / 1000) for hoi_id in range(600)]
    files = written(tmp_path, [make_sample("a")], [make_line("a", detections)])
    for name, cells in zip(hicodet.OBJECTS, files.values(), strict=True):
        scores = [cell[0, 8] for cell in cells[:, 0]]
        expected = [i / 1000 for i, pair in enumerate(hicodet.HOI_CLASSES) if pair[1] == name]
        assert scores == expected


@pytest.mark.skipif(not shutil.which("octave-cli"), reason="GNU Octave is not installed")
def test_octave_reads_the_same_detections(tmp_path):
    samples, lines = random_problem(random.Random())
    write(tmp_path, *(record(sample.file_name, []) for sample in samples))
    detections = evaluate.detection_array(lines, samples)
    write_official(tmp_path / "mat", detections, len(samples))
    objects = ",".join(hicodet.OBJECTS).replace(" ", "_")
    words = [tmp_path / "anno_bbox.mat", tmp_path / "mat", objects, tmp_path / "out.txt"]
    subprocess.run(["octave-cli", "--norc", "--quiet", SCRIPT, *words], check=True, timeout=300)
    order = np.lexsort((detections.image, detections.hoi_id))  # stable: then in the order of ties
    read = np.loadtxt(words[3], delimiter=",", ndmin=2)
    rows = np.column_stack([detections[name] for name in list(detections.dtype.names)[:5]])
    place = {name: number for number, name in enumerate(hicodet.OBJECTS)}
    in_files = sorted(order, key=lambda row: place[hicodet.HOI_CLASSES[detections.hoi_id[row]][1]])
    np.testing.assert_array_equal(read, rows[in_files])
