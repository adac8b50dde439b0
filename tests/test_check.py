"""check lists images that cannot be used, --exclude leaves them out; odd boxes are counted."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import hoi_r1
import teacher
from engine.data import annotations
from engine.data.image_check import check, odd_boxes
from engine.data.loader import batch_order
from hicodet import HOI, InputError, Sample
from tests.annotation_files import own_line, write_own
from tests.runs import config_of, refusal, run, same_weights


def break_images(data: Path, split: str, **faults: int) -> list[str]:
    """Spoil images of a split, each by the fault that is named; returns their file names."""
    names = []
    for fault, index in faults.items():
        path = annotations.load_split(data, split)[index].path
        if fault == "missing":
            path.unlink()
        elif fault == "cut":
            path.write_bytes(path.read_bytes()[:-300])
        elif fault == "size":
            Image.new("RGB", (99, 50)).save(path)
        names.append(path.name)
    return names


@pytest.fixture
def data(folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    return tmp_path / "data"


def test_check_lists_every_image_that_cannot_be_used(data, tmp_path, capsys):
    names, bad = break_images(data, "train", cut=2, size=5, missing=9), tmp_path / "bad.txt"
    with pytest.raises(SystemExit) as ended:
        hoi_r1.main(["check", "--data", str(data), "--out", str(bad)])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    first, second, third, train, test = printed.out.splitlines()
    assert names[0] in first and "cannot be read as an image" in first
    assert names[1] in second and "is 99 x 50, annotated as 224 x 112" in second
    assert names[2] in third and "No such file" in third
    assert train == "train: 3 of 24 images cannot be used"
    assert test == "test: 0 of 6 images cannot be used"
    said = printed.err.splitlines()[-1]
    assert said.startswith("error: 3 images cannot be used: fetch them")
    assert said.endswith(f"with --exclude {bad}") and bad.read_text().split() == names


def test_check_of_one_split_that_is_fine(folder, tmp_path):
    options = {"split": "test", "workers": 2, "out": str(tmp_path / "bad.txt")}
    said = list(check(data=str(folder / "data"), **options))
    assert said == ["test: 0 of 6 images cannot be used"]
    assert (tmp_path / "bad.txt").read_text() == ""


def test_teacher_opens_images_as_the_trainer_does(photo):
    sample = Sample(photo.name, photo, 21, 10, (), (), frozenset())
    with pytest.raises(InputError, match="is 640 x 425, annotated as 21 x 10"):
        teacher.request_body(sample, None)


# --exclude


def test_others_keep_their_order():
    """Two epochs of 10 samples without 4 and 7: batches of 3, 3 and 2."""
    order = batch_order(10, 3, 6, seed=5, excluded={4, 7})
    assert [len(batch) for batch in order] == [3, 3, 2, 3, 3, 2]
    whole = sum(batch_order(10, 10, 2, seed=5), [])
    assert sum(order, []) == [i for i in whole if i not in (4, 7)]


def exclude(path, names):
    path.write_text("".join(f"{name}\n" for name in names))
    return str(path)


def test_training_that_met_a_bad_image_continues_without_it(folder, data, tmp_path, capsys):
    """At the second step, to the weights of a run that left it out from the start."""
    options = {"data": str(data), "max_steps": 3, "save_every": 1, "thinking": False, "traces": ""}
    order = batch_order(24, 4, 3, seed=0)
    names = break_images(data, "train", cut=max(order[1]), size=max(order[2]))
    bad = exclude(tmp_path / "bad.txt", names)
    config = config_of("sft", folder, tmp_path / "one", exclude=bad, **options)
    run(config)
    assert "2 of 24 images are excluded" in capsys.readouterr().out
    other = replace(config, out=str(tmp_path / "two"), exclude="", workers=1)
    said = refusal(other)
    assert f"/{names[0]}: cannot be read as an image" in said
    assert "check --out bad.txt" in said and "--exclude bad.txt" in said
    run(replace(other, resume=True, exclude=bad))
    assert same_weights(tmp_path / "one", tmp_path / "two")
    (change,) = json.loads((tmp_path / "two" / "config.json").read_text())["changes"]
    before, after = change["excluded"]
    assert change["step"] == 1 and before == "none" and after.startswith("2 images, ")


def test_without_a_usable_image_there_is_no_training(folder, tmp_path):
    names = [sample.file_name for sample in annotations.load_split(folder / "data", "train")]
    bad = exclude(tmp_path / "bad.txt", names)
    for stage in ("grpo", "predict"):
        split = {"split": "train"} if stage == "predict" else {}
        found = refusal(config_of(stage, folder, tmp_path / "out", exclude=bad, **split))
        assert found == f"--exclude {bad}: no image is left"
    found = refusal(config_of("grpo", folder, tmp_path / "out", exclude="no.txt"))
    assert "No such file or directory: 'no.txt'" in found


# Prediction


def test_bad_image_is_an_empty_line_until_it_is_replaced(folder, data, tmp_path, capfd):
    shutil.copytree(data, tmp_path / "whole")
    (name,) = break_images(data, "test", cut=1)
    options = {"data": str(data), "workers": 1, "max_new_tokens": 3}
    config = config_of("predict", folder, tmp_path / "out", **options)
    run(config)
    assert f"{name}: cannot be read as an image" in capfd.readouterr().err
    path = tmp_path / "out" / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1] == {"file_name": name, "text": "", "instances": []}
    assert len(lines) == 6 and all(line["text"] for i, line in enumerate(lines) if i != 1)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["images"], summary["unread"]) == (6, 1)
    run(replace(config, resume=True, data=str(tmp_path / "whole")))
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert again[1]["text"] and again[:1] + again[2:] == lines[:1] + lines[2:]
    assert "unread" not in json.loads((tmp_path / "out" / "summary.json").read_text())


def test_folder_of_bad_images_is_no_prediction(folder, data, tmp_path):
    break_images(data, "test", cut=0)
    break_images(data, "test", size=1)
    config = config_of("predict", folder, tmp_path / "out", data=str(data), limit=2)
    assert "none of 2 images can be used" in refusal(config)
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


# Boxes


def odd_sample(*boxes: tuple) -> Sample:
    good = (10.0, 10.0, 20.0, 20.0)
    hois = tuple(HOI(box, good, "car", ("drive",)) for box in boxes)
    return Sample("a.jpg", Path("a.jpg"), 100, 50, hois, (), frozenset())


def test_odd_boxes_are_counted_by_kind():
    inverted = [(9.0, 0.0, 5.0, 9.0), (0.0, 9.0, 5.0, 5.0)]
    flat = [(3.0, 0.0, 3.0, 9.0)]
    inside, out = (0.0, 0.0, 99.0, 49.0), [(-1.0, 0, 5, 5), (0, 0, 100.0, 5), (0, 0, 5, 50.0)]
    sample = odd_sample(*inverted, *flat, inside, *out)
    assert odd_boxes([sample]) == (
        "boxes of the ground truth: 2 inverted, 1 without area, 3 out of the image, of 8"
    )
    assert odd_boxes([odd_sample(inside)]) == ""


def test_training_says_what_is_odd_in_its_boxes(folder, photo, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    shutil.copy(photo, tmp_path / "images")
    pairs = [((9, 9, 9, 20), (1, 1, 30, 30), 151)]
    size = {"width": 640, "height": 425}
    write_own(tmp_path, own_line(photo.name, "train", pairs) | size)
    config = config_of("grpo", folder, tmp_path / "run", data=str(tmp_path), max_steps=1)
    run(config)
    said = "boxes of the ground truth: 0 inverted, 1 without area, 0 out of the image, of 2"
    assert said in capsys.readouterr().out.splitlines()
