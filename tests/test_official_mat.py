"""engine/scoring/official_mat.py: read back with SciPy and, where it is installed, GNU Octave."""

import json
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
from tests.pairs import (
    BOX,
    FAR,
    HOLD_BICYCLE,
    MANY,
    RIDE_BICYCLE,
    RIDE_HORSE,
    make_line,
    make_sample,
    random_problem,
)  # fmt: skip
from tests.test_evaluate_command import annotated, run_main
from tests.test_hicodet import write

SCRIPT = Path(__file__).with_name("official_layout.m")


def written(folder, samples, lines):
    write_official(folder, evaluate.detection_arrays(lines, samples), len(samples))
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
    # "hold" is the bicycle's second action; rows of equal score in the order of the instances.
    assert bicycle[1, 1].tolist() == [[*FAR, *BOX, 0.5], [*BOX, *FAR, 0.5]]
    assert horse[10, 0].tolist() == [[*BOX, *BOX, 0.25]]  # "ride" is the horse's eleventh
    rows = [cell for cells in files.values() for cell in cells.ravel() if cell.size]
    assert len(rows) == 2  # all other cells are empty


def test_every_class_has_its_cell(tmp_path):
    """A detection of each class, told apart by its score."""
    detections = [(BOX, BOX, hoi_id, hoi_id / 1000) for hoi_id in range(600)]
    files = written(tmp_path, [make_sample("a")], [make_line("a", detections)])
    for name, cells in zip(hicodet.OBJECTS, files.values(), strict=True):
        scores = [cell[0, 8] for cell in cells[:, 0]]
        expected = [i / 1000 for i, pair in enumerate(hicodet.HOI_CLASSES) if pair[1] == name]
        assert scores == expected


def test_older_files_are_replaced(tmp_path):
    samples, lines = [make_sample("a")], [make_line("a", [(BOX, BOX, RIDE_BICYCLE, 1.0)])]
    written(tmp_path, samples, lines)
    files = written(tmp_path, samples, [make_line("a")])
    assert not any(cell.size for cells in files.values() for cell in cells.ravel())


@pytest.mark.skipif(not shutil.which("octave-cli"), reason="GNU Octave is not installed")
def test_octave_comes_to_the_same_ap(tmp_path):
    """An evaluator in Octave reads the files: ties, duplicates, overlaps of exactly half."""
    samples, lines = random_problem(random.Random())
    test = [
        annotated(s.file_name, [(p.human, p.object, p.hoi_id) for p in s.pairs]) for s in samples
    ]
    write(tmp_path, *test)
    write_official(tmp_path / "mat", evaluate.detection_arrays(lines, samples), len(samples))
    anno, mat, out = (tmp_path / name for name in ("anno_bbox.mat", "mat", "ap.txt"))
    command = ["octave-cli", "--norc", "--quiet", SCRIPT, anno, mat, out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    expected = evaluate.evaluate(lines, samples, MANY)["default"]["ap"]
    np.testing.assert_allclose(np.loadtxt(out), expected, rtol=0, atol=1e-12)


@pytest.fixture
def dataset(tmp_path):
    ride = (BOX, BOX, RIDE_BICYCLE)
    write(tmp_path, annotated("a.jpg", [ride]), annotated("b.jpg", [ride]))
    lines = [make_line("b.jpg"), make_line("a.jpg", [(*ride, 0.5)])]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_command_writes_them(dataset, capsys):
    folder = dataset / "mat"
    assert run_main(dataset / "p.jsonl", "--data", dataset, "--official-mat", folder) is None
    cells = loadmat(folder / "detections_02.mat")["all_boxes"]
    assert cells[8, 0].tolist() == [[*BOX, *BOX, 0.5]]  # "ride" is the bicycle's ninth action
    assert "Known Object" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "said"), [
    (["--official-mat", "nowhere/mat"], "--official-mat nowhere/mat: give a folder"),
    (["--official-mat", "p.jsonl"], "--official-mat p.jsonl: give a folder"),
    (["--official-mat", "mat", "--limit", 1], "--official-mat is for code that wants the whole"),
])  # fmt: skip
def test_command_refuses_before_it_reads(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").touch()
    assert run_main("p.jsonl", "--data", "none", *flags) == 2
    assert said in capsys.readouterr().err
