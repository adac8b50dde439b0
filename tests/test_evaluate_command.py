"""evaluate.py as a program: what it prints and writes, and its errors of one line."""

import json

import pytest

import evaluate
from engine.data import annotations
from engine.scoring.predictions import read_predictions, write_predictions
from tests.annotation_files import own_line, write_own
from tests.pairs import BOX, FAR, HOLD_BICYCLE, RIDE_BICYCLE, make_line
from tests.programs import end_of
from tests.test_disk_full import no_file_above

RARE, COMMON = (BOX, BOX, RIDE_BICYCLE), (BOX, FAR, HOLD_BICYCLE)
TEST = {"a.jpg": [RARE], "b.jpg": [COMMON], "c.jpg": []}
TRAIN = {f"t{i}.jpg": [COMMON, COMMON] + [RARE] * (i == 0) for i in range(5)}


@pytest.fixture
def dataset(tmp_path):
    """Three test images, two classes: one rare, one not."""
    halves = {"test": TEST, "train": TRAIN}
    write_own(tmp_path, *(own_line(n, s, p) for s in halves for n, p in halves[s].items()))
    write_predictions(tmp_path / "p.jsonl", [
        make_line("c.jpg", [(*COMMON, 0.9)]),  # wrong; c.jpg has no bicycle for Known Object
        make_line("b.jpg", [(*COMMON, 0.8)]),
        make_line("a.jpg", [(*RARE, 1.0)]),
    ])  # fmt: skip
    return tmp_path


def run_main(*arguments):
    return end_of(evaluate.main, *arguments)


def test_a_row_of_table_1_and_json(dataset, capsys):
    arguments = [dataset / "p.jsonl", "--data", dataset, "--json", dataset / "out.json"]
    assert run_main(*arguments, "--classes", "present") is None
    printed = capsys.readouterr()
    top, names, row = printed.out.splitlines()
    assert top.split() == ["Default", "Known", "Object"] and not printed.err
    assert names.split() == ["Full", "Rare", "Non-Rare"] * 2
    # "ride bicycle" 1; "hold bicycle" 1/2, or 1 without the detection in c.jpg.
    assert row.split() == ["75.00", "100.00", "50.00", "100.00", "100.00", "100.00"]
    assert len(names) == len(row)
    samples = annotations.load_split(dataset, "test")
    lines = read_predictions(dataset / "p.jsonl", samples)
    counts = annotations.training_counts(dataset)
    expected = evaluate.evaluate(lines, samples, counts, classes="present")
    assert json.loads((dataset / "out.json").read_text()) == expected


def test_breakdown_is_printed_and_written(dataset, capsys):
    out = dataset / "out.json"
    assert run_main(dataset / "p.jsonl", "--data", dataset, "--json", out) is None
    plain, official = capsys.readouterr(), json.loads(out.read_text())
    assert plain.err.startswith("598 classes have no true pair here and count as 0")
    assert plain.out.splitlines()[-1].split()[0] == "0.25"  # 1.5 / 600 in percent
    assert run_main(dataset / "p.jsonl", "--data", dataset, "--json", out, "--breakdown") is None
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    assert printed.startswith(plain.out)
    for part in "0 of 2 true pairs missed", "all pairs (micro)":
        assert part in printed
    assert {key: written.pop(key) for key in ("breakdown", "pair_scores")}
    assert written == official


@pytest.mark.parametrize("flags, images, full", [
    (["--limit", 2], list(TEST.items())[:2], "100.00"),
    # "ride bicycle" 1; "hold bicycle" 4 of 10: recall reaches 5 of 11 levels
    (["--split", "train"], TRAIN.items(), "72.73"),
])  # fmt: skip
def test_first_images_of_a_split(flags, images, full, dataset, capsys):
    """Each image has one prediction: a true pair, a rare one if there is one."""
    path = dataset / "some.jsonl"
    write_predictions(path, [make_line(name, [(*min(pairs), 1.0)]) for name, pairs in images])
    assert run_main(path, "--data", dataset, "--classes", "present", *flags) is None
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == full


def test_drop_unknown_drops_unknown_verbs(dataset, capsys):
    lines = [json.loads(line) for line in (dataset / "p.jsonl").read_text().splitlines()]
    lines[2]["instances"][0] |= {"verbs": ["eat", "ride"], "scores": [1.0, 1.0]}
    lines[1]["instances"] += [lines[1]["instances"][0] | {"object_class": "unicorn"}]
    write_predictions(dataset / "q.jsonl", lines)
    words = [dataset / "q.jsonl", "--data", dataset, "--classes", "present"]
    said = "2 verbs that HICO does not have with their object, first 'hold' with 'unicorn' in b.jpg"
    assert run_main(*words).endswith(f"q.jsonl: {said}; --drop-unknown drops them")
    capsys.readouterr()
    assert run_main(*words, "--drop-unknown") is None
    printed = capsys.readouterr()
    assert printed.err == f"dropped {said}\n"
    assert printed.out.splitlines()[-1].split()[0] == "75.00"


@pytest.mark.parametrize("flags, said", [
    (["--limit", 0], "--limit 0: must be at least 1"),
    (["--json", "none.jsonl"], "--json would overwrite the predictions"),
    (["--official-mat", "mat", "--limit", 1], "--official-mat needs the whole split"),
])  # fmt: skip
def test_flags_are_refused_before_anything_is_read(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_main("none.jsonl", "--data", "none", *flags) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("predictions, data, said", [
    ("cut.jsonl", ".", "cut.jsonl, line 1: not JSON"),
    ("none.jsonl", ".", "No such file or directory"),
    ("p.jsonl", "none", "anno_bbox.mat is missing"),
])  # fmt: skip
def test_bad_input_is_one_short_line(predictions, data, said, dataset, capsys):
    (dataset / "cut.jsonl").write_text('{"file_name": "a.jpg", "insta')
    line = run_main(dataset / predictions, "--data", dataset / data)
    assert line.startswith("evaluate.py: error: ") and not capsys.readouterr().out
    assert said in line and len(line) < len(str(dataset)) * 2 + 200


def test_json_does_not_overwrite_the_predictions_of_a_run(dataset, capsys):
    (dataset / "run").mkdir()
    path = (dataset / "p.jsonl").rename(dataset / "run" / "predictions.jsonl")
    before = path.read_text()
    assert run_main(dataset / "run", "--data", dataset, "--json", path) == 2
    assert "--json would overwrite the predictions" in capsys.readouterr().err
    assert path.read_text() == before


def test_output_that_cannot_be_written_is_named(dataset, capsys):
    """The table is printed first. On a full disk the earlier file stays."""
    words, out = [dataset / "p.jsonl", "--data", dataset], dataset / "ap.json"
    out.write_text("old")
    for flag, at in ("--json", "no/out.json"), ("--json", "."), ("--official-mat", "no/mat"):
        said = run_main(*words, flag, dataset / at)
        assert said.startswith("evaluate.py: error: [Errno ") and str(dataset / at) in said
        assert "Known Object" in capsys.readouterr().out
    with no_file_above(100):
        assert run_main(*words, "--json", out).endswith(f"File too large: '{out}.tmp'")
        said = run_main(*words, "--official-mat", dataset / "mat")
    assert said.endswith(f"File too large: '{dataset / 'mat' / 'detections_01.mat'}.tmp'")
    assert out.read_text() == "old" and not list(dataset.rglob("*.tmp"))
    assert run_main(*words, "--official-mat", dataset / "mat") is None
    assert len(list((dataset / "mat").iterdir())) == 80
