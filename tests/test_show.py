"""hoi_r1.py report and show: which runs and images, what is written, what is refused."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import hoi_r1
from engine.report import pictures
from hicodet import HOI, InputError, Sample, format_completion
from rewards import total_reward
from tests.run_folders import write_prediction, write_training

ROOT = Path(__file__).resolve().parents[1]
RIDE = HOI((0.0, 0.0, 40.0, 40.0), (40.0, 0.0, 80.0, 40.0), "bicycle", ("ride", "sit on"))
HOLD = HOI((0.0, 50.0, 40.0, 90.0), (40.0, 50.0, 80.0, 90.0), "bicycle", ("hold",))


def line(name, *hois):
    keys = ("human", "object", "object_class", "verbs")
    return {"file_name": name, "instances": [{k: getattr(h, k) for k in keys} for h in hois]}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Four images of one split, and predictions that miss 1, 3 and 0 HOIs of three of them."""
    truths = {"a.jpg": (RIDE,), "b.jpg": (RIDE, HOLD), "c.jpg": (HOLD,), "d.jpg": ()}
    samples = []
    for name, hois in truths.items():
        Image.new("RGB", (100, 100)).save(tmp_path / name)
        samples.append(Sample(name, tmp_path / name, 100, 100, hois, (), frozenset()))
    monkeypatch.setattr(pictures, "load_split", lambda root, split: samples)
    half = HOI(RIDE.human, RIDE.object, "bicycle", ("ride",))
    rows = [line("a.jpg", half), line("b.jpg"), line("c.jpg", HOLD, HOLD)]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data": str(tmp_path), "out": str(tmp_path / "out"), "predictions": str(path)}


def shown(**options):
    """What `show` says of each picture, by its name."""
    rows = (row.split(": ", 1) for row in pictures.show(**options))
    return {Path(path).name: text for path, text in rows}


def test_worst_first(data):
    assert shown(**data, worst=2) == {
        "b.png": "3 of 3 interactions missed, 0 predicted",
        "a.png": "1 of 2 interactions missed, 1 predicted",
    }
    assert list(shown(**data, worst=2)) == ["b.png", "a.png"]


def write_answers(data, box_frame):
    """Predictions of a run: of a.jpg all, of b.jpg one pair, of c.jpg another verb, d.jpg none."""
    other = replace(HOLD, verbs=("wash",))
    answers = {"a.jpg": [RIDE], "b.jpg": [RIDE], "c.jpg": [other], "d.jpg": []}
    scale = 1.12 if box_frame == "model" else 1.0  # 100 pixels a side are resized to 112
    rows = []
    for name, hois in answers.items():
        boxes = [[[scale * x for x in box] for box in (hoi.human, hoi.object)] for hoi in hois]
        moved = [replace(hoi, human=h, object=o) for hoi, (h, o) in zip(hois, boxes)]
        rows.append(line(name, *hois) | {"text": format_completion(moved, "a person")})
    path = Path(data["predictions"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.with_name("config.json").write_text(json.dumps({"box_frame": box_frame}))


@pytest.mark.parametrize("box_frame", ["model", "original"])
def test_worst_by_reward_in_the_frame_of_the_run(data, box_frame):
    """The missed pair of b.jpg costs half of what instances earn; c.jpg misses one verb of one."""
    write_answers(data, box_frame)
    rows = shown(**data, worst=4, by="reward", total_reward=total_reward)
    # b: tags 0.2, then 0.6 / 2, 1 / 2, 1 / 2, 1 / 2; c: 0.8, 1, 0, 1, the boxes rounded
    assert list(rows) == ["b.png", "c.png", "a.png"]  # d.jpg has no ground truth
    earned = [float(row.split(", reward ")[1]) for row in rows.values()]
    assert earned == pytest.approx([2.0, 2.8, 3.8], abs=0.02)  # in the other frame 3.6 at most


def test_first_images_and_one_by_name(data):
    assert list(shown(**data, images=2)) == ["a.png", "b.png"]
    assert list(shown(**data, file="images/test2015/c.jpg")) == ["c.png"]
    assert list(shown(**data)) == ["a.png", "b.png", "c.png"]  # d.jpg is not predicted


def test_pictures_are_side_by_side_only_with_predictions(data):
    shown(**data, images=1)
    with Image.open(Path(data["out"]) / "a.png") as both:
        assert both.width == 2 * 640 + 8
    texts = shown(**data | {"predictions": ""})
    assert texts["a.png"] == "2 true interactions" and texts["d.png"] == "0 true interactions"
    with Image.open(Path(data["out"]) / "a.png") as truth:
        assert truth.width == 640


@pytest.mark.parametrize(
    "options, row, words",
    [
        ({"file": "d.jpg"}, "", "--file d.jpg: no image of this split, or none that is predicted"),
        ({}, '{"file_name": "x.jpg", "instances": []}\n', "line 4: no image of this split"),
        ({}, "{]\n", "line 4: not JSON"),
        ({}, "7\n", "line 4: the line must be an object"),
        ({"worst": 1, "by": "reward"}, "", "line 1: no text of the model, which --by reward needs"),
    ],
)
def test_what_cannot_be_shown_is_one_line(data, options, row, words):
    with open(data["predictions"], "a") as file:
        file.write(row)
    with pytest.raises(InputError, match=words) as refused:
        shown(**data, **options)
    assert "\n" not in str(refused.value)


def test_choices_that_contradict_are_refused(capsys):
    both, alone = "--worst 3 --images 2 --predictions p", "--by reward --predictions p"
    for flags in ("--images 2 --file a.jpg", "--worst 3", both, alone):
        with pytest.raises(SystemExit):
            hoi_r1.parse_config(["show", "--data", "d", *flags.split()])
        assert "error: --" in capsys.readouterr().err


def test_report_of_several_runs_lies_in_the_last(tmp_path, capsys):
    folders = write_training(tmp_path), write_prediction(tmp_path)
    hoi_r1.main(["report", *map(str, folders)])
    assert capsys.readouterr().out.strip() == str(folders[-1] / "report.html")
    page = (folders[-1] / "report.html").read_text()
    assert "<title>grpo, test" in page and not (folders[0] / "report.html").exists()
    hoi_r1.main(["report", str(folders[0]), "--out", str(tmp_path / "page.html")])
    assert "<title>grpo<" in (tmp_path / "page.html").read_text()


def test_report_of_no_folder_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        hoi_r1.main(["report", str(tmp_path / "absent")])
    said = capsys.readouterr().err.strip()
    assert said == f"error: {tmp_path / 'absent'}: no such folder"
    with pytest.raises(SystemExit):
        hoi_r1.parse_config(["report"])


def test_neither_needs_torch():
    code = "import sys, engine.report.page, engine.report.pictures\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
