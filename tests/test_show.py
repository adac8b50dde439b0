"""hoi_r1.py show and report: which images and runs, what is written, what is refused."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

import hoi_r1
from engine.data.annotations import load_split
from engine.report.pictures import show
from hicodet import InputError
from tests.run_folders import instance_row, write_lines, write_prediction, write_training


@pytest.fixture
def data(folder, tmp_path):
    """Predictions for five of the toy's six images. Only the second and the fourth have mistakes.

    The second has no pair, and the fourth lacks its first pair.
    """
    samples = load_split(folder / "data", "test")
    answers = [list(sample.hois) for sample in samples[:5]]
    answers[1], answers[3] = [], answers[3][1:]
    lines = [
        {"file_name": sample.file_name, "instances": [instance_row(hoi) for hoi in hois]}
        for sample, hois in zip(samples, answers)
    ]
    write_lines(tmp_path / "predictions.jsonl", lines)
    paths = {"out": str(tmp_path / "out"), "predictions": str(tmp_path / "predictions.jsonl")}
    return {"data": str(folder / "data"), **paths}


def shown(**options):
    """(number of the image, the text of `show` about its picture), in order."""
    rows = (row.split(": ", 1) for row in show(**options))
    return [(int(Path(path).stem[-1]), text) for path, text in rows]


def test_worst_first(data, folder):
    samples = load_split(folder / "data", "test")
    true = [sum(len(hoi.verbs) for hoi in sample.hois) for sample in samples]
    first = len(samples[3].hois[0].verbs)
    assert true[1] > first  # or the order would be another
    assert shown(**data, worst=3) == [
        (2, f"{true[1]} of {true[1]} interactions missed, 0 predicted"),
        (4, f"{first} of {true[3]} interactions missed, {true[3] - first} predicted"),
        (1, f"0 of {true[0]} interactions missed, {true[0]} predicted"),
    ]


def test_first_images_and_one_by_name(data):
    assert [number for number, _ in shown(**data, images=2)] == [1, 2]
    name = "images/test2015/HICO_test2015_00000003.jpg"
    assert [number for number, _ in shown(**data, file=name)] == [3]
    assert [number for number, _ in shown(**data)] == [1, 2, 3, 4, 5]  # the sixth has none


def test_pictures_are_side_by_side_only_with_predictions(data):
    shown(**data, images=1)
    picture = Path(data["out"]) / "HICO_test2015_00000001.png"
    assert Image.open(picture).width == 2 * 640 + 8
    texts = dict(shown(**data | {"predictions": ""}))
    assert len(texts) == 6 and texts[1].endswith(" true interactions")
    assert Image.open(picture).width == 640


@pytest.mark.parametrize("options, row, words", [
    ({"file": "HICO_test2015_00000006.jpg"}, "", "none with a prediction"),
    ({}, '{"file_name": "x.jpg", "instances": []}\n', "'x.jpg' is not of this split"),
])  # fmt: skip
def test_unusable_option_or_line_is_one_line(data, options, row, words):
    with open(data["predictions"], "a") as file:
        file.write(row)
    with pytest.raises(InputError, match=words) as refused:
        shown(**data, **options)
    assert "\n" not in str(refused.value)


def test_missing_image_is_named_before_anything_is_drawn(data, tmp_path):
    shutil.copytree(data["data"], tmp_path / "data")
    missing = "HICO_test2015_00000004.jpg"
    (tmp_path / "data" / "images" / "test2015" / missing).unlink()
    with pytest.raises(OSError, match=missing) as refused:
        shown(**data | {"data": str(tmp_path / "data")}, worst=20)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [
    "--images 2 --file a.jpg", "--worst 3", "--worst 3 --images 2 --predictions p"
])  # fmt: skip
def test_choices_that_contradict_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        hoi_r1.parse_config(["show", "--data", "d", *flags.split()])
    assert "error: --" in capsys.readouterr().err


def test_report_of_several_runs_is_in_the_last(tmp_path, capsys):
    folders = write_training(tmp_path), write_prediction(tmp_path)
    hoi_r1.main(["report", *map(str, folders)])
    assert capsys.readouterr().out.strip() == str(folders[-1] / "report.html")
    page = (folders[-1] / "report.html").read_text()
    assert "<title>grpo, test" in page and not (folders[0] / "report.html").exists()
    hoi_r1.main(["report", str(folders[0]), "--out", str(tmp_path / "page.html")])
    assert "<title>grpo ·" in (tmp_path / "page.html").read_text()
