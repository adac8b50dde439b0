"""Images that cannot be read, boxes that mean nothing: listed, left out, counted."""

import json
import shutil
import struct
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import engine.data.image_check
import hoi_r1
import teacher
from engine.data import annotations
from engine.data.image_check import check, odd_boxes
from engine.data.images import open_image, read_image
from engine.data.loader import batch_order
from engine.ranks import Ranks
from engine.runs.run_folder import BAD_IMAGES
from hicodet import HOI, InputError, Sample
from tests.runs import config_of, metrics, refusal, run, weights

ROOT = Path(hoi_r1.__file__).parent


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


# check


def test_check_lists_every_image_that_cannot_be_used(data, capsys):
    names = break_images(data, "train", cut=2, size=5, missing=9)
    with pytest.raises(SystemExit) as ended:
        hoi_r1.main(["check", "--data", str(data)])
    assert ended.value.code == 1
    printed = capsys.readouterr()
    first, second, third, train, test = printed.out.splitlines()
    assert names[0] in first and "not a readable image" in first
    assert names[1] in second and "is 99 x 50, annotated as 224 x 112" in second
    assert names[2] in third and "No such file" in third
    assert train == "train: 3 of 24 images cannot be used"
    assert test == "test: 0 of 6 images cannot be used"
    assert printed.err.splitlines()[-1].startswith("error: 3 images cannot be used: fetch them")


def test_check_of_one_split_says_what_is_odd_in_its_boxes(folder):
    assert list(check(data=str(folder / "data"), split="test", workers=2)) == [
        "test: 0 of 6 images cannot be used"
    ]


def test_what_pillow_raises_names_the_file(tmp_path, monkeypatch):
    """A huge picture, a bare ValueError, what its plugins for odd formats let through."""
    path = tmp_path / "huge.png"
    Image.new("1", (200, 100)).save(path)
    sample = Sample(path.name, path, 200, 100, (), (), frozenset())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9999)
    with pytest.raises(InputError, match=f"{path}: not a readable image .*decompression bomb"):
        open_image(path)
    monkeypatch.undo()
    for error in (ValueError("x"), RuntimeError("x"), struct.error("x"), AttributeError("x")):
        def convert(self, mode, error=error):
            raise error

        monkeypatch.setattr(Image.Image, "convert", convert)
        with pytest.raises(InputError, match=f"{path}: not a readable image"):
            read_image(sample)


def test_the_teacher_opens_images_as_the_trainer_does(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (20, 10)).save(path)
    sample = Sample(path.name, path, 21, 10, (), (), frozenset())
    with pytest.raises(InputError, match="is 20 x 10, annotated as 21 x 10"):
        teacher.request_body(sample, None)


# --skip-bad-images


def test_the_others_keep_their_order():
    """Two epochs of 10 samples, of which 4 and 7 are left out: batches of 3, 3 and 2."""
    order = batch_order(10, 3, 6, seed=5, left_out={4, 7})
    assert [len(batch) for batch in order] == [3, 3, 2, 3, 3, 2]
    whole = sum(batch_order(10, 10, 2, seed=5), [])
    assert sum(order, []) == [i for i in whole if i not in (4, 7)]


def test_a_training_that_met_a_bad_image_goes_on_without_it(folder, data, tmp_path, capsys):
    """At the second step, to the weights of a run that left it out from the start."""
    options = {"data": str(data), "max_steps": 3, "save_every": 1, "thinking": False, "traces": ""}
    order = batch_order(24, 4, 3, seed=0)
    break_images(data, "train", cut=max(order[1]), size=max(order[2]))
    config = config_of("sft", folder, tmp_path / "one", skip_bad_images=True, **options)
    run(config)
    assert "2 of 24 images cannot be used: left out" in capsys.readouterr().out
    assert [row["bad_images"] for row in metrics(tmp_path / "one")] == [2] * 3
    other = replace(config, out=str(tmp_path / "two"), skip_bad_images=False)
    assert "not a readable image" in refusal(other)
    run(replace(other, resume=True, skip_bad_images=True))
    for name, value in weights(tmp_path / "one").items():
        assert torch.equal(value, weights(tmp_path / "two")[name])
    changes = json.loads((tmp_path / "two" / "config.json").read_text())["changes"]
    assert changes == [{"step": 1, "skip_bad_images": [False, True]}]


def parts_of(config, ranks, others: Iterable = ()) -> dict[str, str]:
    import train

    class Shared(Ranks):
        def gather(self, rows):
            return [*rows, *others]

    samples = annotations.load_split(config.data, "train")
    return train.images_left_out(config, samples, Shared(ranks.rank, 2, ranks.device))


def test_ranks_share_the_reading_and_its_outcome(folder, data, tmp_path):
    cut, size = break_images(data, "train", cut=3, size=4)
    options = {"data": str(data), "skip_bad_images": True}
    config, device = config_of("grpo", folder, tmp_path, **options), torch.device("cpu")
    found = [parts_of(config, Ranks(rank, 2, device)) for rank in (0, 1)]
    assert [set(bad) for bad in found] == [{size}, {cut}]  # ranks take every other image
    assert set(parts_of(config, Ranks(0, 2, device), found[1].items())) == {size, cut}


def test_a_resumed_run_leaves_out_what_it_left_out_first(folder, data, tmp_path, monkeypatch):
    """Also once the image is there again: the order of the run is that of its first list."""
    monkeypatch.setattr(engine.data.image_check, "fault", None)  # nothing is read again
    (tmp_path / BAD_IMAGES).write_text('{"a.jpg": "cut"}')
    config = config_of("grpo", folder, tmp_path, data=str(data), resume=True)
    for skip in (True, False):
        ranks = Ranks(0, 1, torch.device("cpu"))
        assert parts_of(replace(config, skip_bad_images=skip), ranks) == {"a.jpg": "cut"}


def test_without_a_usable_image_there_is_no_training(folder, data, tmp_path):
    shutil.rmtree(data / "images" / "train2015")
    found = refusal(config_of("grpo", folder, tmp_path, data=str(data), skip_bad_images=True))
    assert "none of 24 images can be used" in found and "No such file" in found


# Prediction


def test_a_bad_image_is_an_empty_line_until_it_is_mended(folder, data, tmp_path, capfd):
    shutil.copytree(data, tmp_path / "whole")
    (name,) = break_images(data, "test", cut=1)
    config = config_of(
        "predict", folder, tmp_path / "out", data=str(data), workers=1, max_new_tokens=3)
    run(config)
    assert f"{name}: not a readable image" in capfd.readouterr().err
    path = tmp_path / "out" / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1] == {"file_name": name, "text": "", "instances": []}
    assert len(lines) == 6 and all(line["text"] for i, line in enumerate(lines) if i != 1)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["images"], summary["unread"]) == (6, 1)
    run(replace(config, resume=True, data=str(tmp_path / "whole")))
    mended = [json.loads(line) for line in path.read_text().splitlines()]
    assert mended[1]["text"] and mended[:1] + mended[2:] == lines[:1] + lines[2:]
    assert "unread" not in json.loads((tmp_path / "out" / "summary.json").read_text())


def test_a_folder_of_bad_images_is_no_prediction(folder, data, tmp_path):
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


def test_a_training_says_what_is_odd_in_its_boxes(folder, tmp_path, monkeypatch, capsys):
    load = annotations.load_split

    def load_split(root, split):
        first, *others = load(root, split)
        hois = (replace(first.hois[0], human=(9.0, 9.0, 9.0, 20.0)), *first.hois[1:])
        return [replace(first, hois=hois), *others]

    monkeypatch.setattr(annotations, "load_split", load_split)
    run(config_of("grpo", folder, tmp_path / "run", dry_run=True))
    assert "0 inverted, 1 without area, 0 out of the image, of " in capsys.readouterr().out
