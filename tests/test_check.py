"""check lists images that cannot be used, --exclude leaves them out, and odd boxes are counted."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import evaluate
import hoi_r1
from engine.data import annotations
from engine.data.image_check import read_names
from engine.data.loader import batch_order
from hicodet import InputError
from tests.annotation_files import own_line, write_own
from tests.runs import config_of, refusal, run, same_weights


def break_images(data: Path, split: str, **faults: int) -> list[str]:
    """Damage images of a split: fault -> index of an image. Returns their file names."""
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
    *lines, train, test = printed.out.splitlines()
    reasons = ["cannot be read as an image", "is 99 x 50, annotated as 224 x 112", "No such file"]
    for name, reason, line in zip(names, reasons, lines, strict=True):
        assert name in line and reason in line
    assert train == "train: 3 of 24 images cannot be used"
    assert test == "test: 0 of 6 images cannot be used"
    said = printed.err.splitlines()[-1]
    assert said.startswith("error: 3 images cannot be used: fetch them")
    assert said.endswith(f"with --exclude {bad}") and bad.read_text().split() == names


# --exclude


def exclude(path, names):
    path.write_text("".join(f"{name}\n" for name in names))
    return str(path)


def test_training_that_met_a_bad_image_continues_without_it(folder, data, tmp_path, capsys):
    """It stops at the second step. It ends with the weights of a run that excluded the image."""
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


def test_first_image_that_cannot_be_used_names_the_way_out(folder, data, tmp_path):
    (name,) = break_images(data, "train", cut=0)
    config = config_of("grpo", folder, tmp_path / "out", data=str(data))
    for dry_run in (False, True):
        said = refusal(replace(config, dry_run=dry_run))
        assert f"/{name}: cannot be read as an image" in said and "--exclude bad.txt" in said


def test_exclude_file_may_start_with_a_byte_order_mark_but_must_be_text(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"\xef\xbb\xbfa.jpg\r\nb.jpg\r\n")
    assert read_names(str(path)) == {"a.jpg", "b.jpg"}
    path.write_bytes(b"\xff\xd8\xff\xe0")  # a JPEG
    with pytest.raises(InputError, match=f"--exclude {path}: no text in UTF-8"):
        read_names(str(path))


def test_run_without_any_image_is_refused(folder, tmp_path):
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
    assert again[1]["text"] and [again[0], *again[2:]] == [lines[0], *lines[2:]]
    assert "unread" not in json.loads((tmp_path / "out" / "summary.json").read_text())


def test_excluded_image_is_an_empty_line_that_can_be_evaluated(folder, data, tmp_path):
    names = break_images(data, "test", cut=1)
    bad, out = exclude(tmp_path / "bad.txt", names), tmp_path / "out"
    options = {"data": str(data), "exclude": bad, "max_new_tokens": 3}
    run(config_of("predict", folder, out, **options))
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert lines[1] == {"file_name": names[0], "text": "", "instances": []} and len(lines) == 6
    evaluate.main([str(out), "--data", str(data)])


def test_prediction_of_bad_images_alone_is_refused(folder, data, tmp_path):
    break_images(data, "test", cut=0, size=1)
    config = config_of("predict", folder, tmp_path / "out", data=str(data), limit=2)
    assert "none of 2 images can be used" in refusal(config)
    assert not (tmp_path / "out" / "predictions.jsonl").exists()


# Boxes


def test_training_counts_odd_boxes(folder, photo, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    shutil.copy(photo, tmp_path / "images")
    good, flat, inverted, outside = (1, 1, 639, 424), (9, 9, 9, 20), (9, 9, 5, 20), (9, 9, 640, 20)
    pairs = [(flat, good, 151), (inverted, outside, 151)]
    write_own(tmp_path, own_line(photo.name, "train", pairs) | {"width": 640, "height": 425})
    run(config_of("grpo", folder, tmp_path / "run", data=str(tmp_path), max_steps=1))
    said = "boxes of the ground truth: 1 inverted, 1 without area, 1 out of the image, of 4"
    assert said in capsys.readouterr().out.splitlines()
