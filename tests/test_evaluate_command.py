"""evaluate.py as a program: reading predictions.jsonl, and the command from end to end."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate
from engine.data import annotations
from tests.pairs import BOX, FAR, HOLD_BICYCLE, RIDE_BICYCLE, make_line, make_sample
from tests.test_disk_full import no_file_above
from tests.test_hicodet import box, hoi, image, struct, write

REPO = Path(__file__).resolve().parents[1]


# ---- reading predictions.jsonl


def instance(**changes):
    """A good instance with some keys changed; None leaves the key out."""
    good = make_line("", [(BOX, BOX, RIDE_BICYCLE, 1.0)])["instances"][0] | changes
    return {key: value for key, value in good.items() if value is not None}


def line_with(**changes):
    return json.dumps({"file_name": "b.jpg", "instances": [instance(), instance(**changes)]})


def read(tmp_path, *lines):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"".join(x if isinstance(x, bytes) else x.encode() + b"\n" for x in lines))
    return evaluate.read_predictions(path, [make_sample("a.jpg"), make_sample("b.jpg")])


def test_read_predictions_accepts_good_lines(tmp_path):
    lines = [
        {"file_name": "b.jpg", "text": "<think>", "instances": [instance(scores=[1])]},
        {"file_name": "a.jpg", "instances": []},
    ]
    assert read(tmp_path, *map(json.dumps, lines)) == lines


BAD_LINES = [
    (b'{"file_name": "b.jpg", "inst', "not JSON (Unterminated string"),
    ("", "not JSON (Expecting value"),
    (b"\xff\xfe{\n", "not JSON ("),
    ("[" * 100_000, "not JSON (maximum recursion depth exceeded"),
    ("1" * 5_000, "not JSON (Exceeds the limit"),
    ("[]", "the line must be an object; found []"),
    ('{"instances": []}', "'file_name' must be a string, the name of an image; found None"),
    ('{"file_name": 7, "instances": []}', "'file_name' must be a string, the name of an image"),
    ('{"file_name": "b.jpg"}', "'instances' must be a list, which may be empty; found None"),
    ('{"file_name": "b.jpg", "instances": {}}', "'instances' must be a list, which may be"),
    ('{"file_name": "b.jpg", "instances": [3]}', "instances[0] must be an object; found 3"),
    (
        '{"file_name": "c.jpg", "instances": []}',
        "must be an image of this split (check --data and --split); found 'c.jpg'",
    ),
    (
        '{"file_name": "a.jpg", "instances": []}',
        "must be on one line only, but is on line 1 already; found 'a.jpg'",
    ),
    (
        line_with(human=[1, 2, 3]),
        "'human' of instances[1] must be four finite numbers, [x1, y1, x2, y2]; found [1, 2, 3]",
    ),
    (line_with(human=[1, 2, 3, 4, 5]), "[x1, y1, x2, y2]; found [1, 2, 3, 4, 5]"),
    (line_with(human=None), "'human' of instances[1] must be four finite numbers"),
    (line_with(object=[1, 2, 3, "4"]), "'object' of instances[1] must be four finite numbers"),
    (line_with(object=[1, 2, 3, True]), "[x1, y1, x2, y2]; found [1, 2, 3, True]"),
    (line_with(object=[1, 2, 3, float("nan")]), "[x1, y1, x2, y2]; found [1, 2, 3, nan]"),
    (line_with(object=[1, 2, float("-inf"), 3]), "[x1, y1, x2, y2]; found [1, 2, -inf, 3]"),
    (line_with(object=[1, 2, 3, 10**400]), "[x1, y1, x2, y2]; found [1, 2, 3, 1000"),
    (line_with(object="1, 2, 3, 4"), "[x1, y1, x2, y2]; found '1, 2, 3, 4'"),
    (line_with(object_class="bike"), "'object_class' of instances[1] must be one of hicodet.OBJ"),
    (line_with(object_class=["bicycle"]), "must be one of hicodet.OBJECTS; found ['bicycle']"),
    (line_with(object_class=None), "must be one of hicodet.OBJECTS; found None"),
    (line_with(verbs="ride"), "'verbs' of instances[1] must be a list of names; found 'ride'"),
    (line_with(verbs=None), "'verbs' of instances[1] must be a list of names; found None"),
    (line_with(verbs=["riding"]), "must be one of hicodet.VERBS; found 'riding'"),
    (line_with(verbs=[["ride"]]), "must be one of hicodet.VERBS; found ['ride']"),
    (line_with(verbs=["eat"]), "one that hicodet.HOI_CLASSES has with 'bicycle'; found 'eat'"),
    (
        line_with(scores=[1, 1]),
        "'scores' of instances[1] must be 1 finite numbers, one for each verb; found [1, 1]",
    ),
    (line_with(scores=None), "one for each verb; found None"),
    (line_with(scores=1.0), "one for each verb; found 1.0"),
    (line_with(scores=["1"]), "one for each verb; found ['1']"),
    (line_with(scores=[float("nan")]), "one for each verb; found [nan]"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_LINES, ids=[case[1] for case in BAD_LINES])
def test_read_predictions_names_file_line_and_fault(tmp_path, bad, message):
    good = json.dumps(make_line("a.jpg"))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read(tmp_path, good, bad)
    assert str(error.value).startswith(f"{tmp_path / 'p.jsonl'}, line 2: ")
    assert len(str(error.value)) < 400


def test_read_predictions_names_missing_images(tmp_path):
    message = "p.jsonl: 1 of 2 images have no line, such as 'b.jpg'; predict the whole split"
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, json.dumps(make_line("a.jpg")))


# ---- the command


def annotated(name, pairs):
    """One element of bbox_test; pairs: (human, object, hoi_id) in 0-based pixels."""
    return image(name, *(
        hoi(hoi_id + 1, humans=[box(*np.add(human, 1))], objects=[box(*np.add(object_, 1))])
        for human, object_, hoi_id in pairs
    ))  # fmt: skip


@pytest.fixture
def dataset(tmp_path):
    """Two test images, three classes: one rare, one not, one only in training."""
    rare, common = (BOX, BOX, RIDE_BICYCLE), (BOX, FAR, HOLD_BICYCLE)
    train = [annotated(f"t{i}.jpg", [common, common] + [rare] * (i == 0)) for i in range(5)]
    test = [annotated("a.jpg", [rare]), annotated("b.jpg", [common]), annotated("c.jpg", [])]
    write(tmp_path, *test, bbox_train=struct(*train))
    lines = [
        make_line("c.jpg", [(*common, 0.9)]),  # no bicycle there: wrong, dropped in Known Object
        make_line("b.jpg", [(*common, 0.8)]),
        make_line("a.jpg", [(*rare, 1.0)]),
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def command(*arguments):
    return subprocess.run(
        [sys.executable, REPO / "evaluate.py", *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )


def test_command_prints_a_row_of_table_1_and_writes_json(dataset):
    arguments = [dataset / "p.jsonl", "--data", dataset, "--json", dataset / "out.json"]
    done = command(*arguments, "--classes", "present")
    assert (done.returncode, done.stderr) == (0, "")
    top, names, row = done.stdout.splitlines()
    assert top.split() == ["Default", "Known", "Object"]
    assert names.split() == ["Full", "Rare", "Non-Rare"] * 2
    # "ride bicycle" 1; "hold bicycle" 1/2, or 1 without the detection in c.jpg.
    assert row.split() == ["75.00", "100.00", "50.00", "100.00", "100.00", "100.00"]
    assert len({len(line) for line in (names, row)}) == 1

    samples = annotations.load_split(dataset, "test")
    expected = evaluate.evaluate(
        evaluate.read_predictions(dataset / "p.jsonl", samples), samples,
        annotations.training_counts(dataset), classes="present",
    )
    written = json.loads((dataset / "out.json").read_text())
    assert written == expected
    assert written["known_object"]["full"] == 1.0 and len(written["default"]["ap"]) == 600
    assert (written["num_images"], written["num_predictions"]) == (3, 3)


def test_command_prints_and_writes_the_breakdown(dataset, capsys):
    out = dataset / "out.json"
    arguments = [dataset / "p.jsonl", "--data", dataset, "--classes", "present", "--json", out]
    assert run_main(*arguments) is None
    plain, official = capsys.readouterr().out, json.loads(out.read_text())
    assert run_main(*arguments, "--breakdown") is None
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    assert printed.startswith(plain)
    for part in "0 of 2 true pairs missed", "all pairs (micro)":
        assert part in printed
    assert {key: written.pop(key) for key in ("breakdown", "pair_scores")}
    assert written == official


def test_command_counts_absent_classes_by_default(dataset):
    done = command(dataset / "p.jsonl", "--data", dataset)
    assert done.stderr.startswith("598 classes have no true pair here and count as 0")
    *_, row = done.stdout.splitlines()
    assert row.split()[0] == "0.25"  # 1.5 / 600 in percent


def run_main(*arguments):
    """The command in this process. Returns its exit status, or its last words."""
    try:
        evaluate.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code


def test_command_takes_the_first_images_of_a_split(dataset, capsys):
    """Two of three test images; of five training images, all of them or one."""
    common, ride = (BOX, FAR, HOLD_BICYCLE, 1.0), (BOX, BOX, RIDE_BICYCLE, 1.0)
    some = [("a.jpg", [ride]), ("b.jpg", [common])]
    train = [("t0.jpg", [ride])] + [(f"t{i}.jpg", [common]) for i in range(1, 5)]
    cases = [
        (some, ["--limit", 2], None, "100.00", 2),
        (some, [], "1 of 3 images have no line, such as 'c.jpg'", "", 0),
        # "ride bicycle" 1; "hold bicycle" 4 of 10: recall reaches 5 of 11 levels
        (train, ["--split", "train"], None, "72.73", 5),
        (train[:1], ["--split", "train", "--limit", 1], None, "50.00", 1),
        (train, [], "must be an image of this split", "", 0),
    ]
    for number, (images, flags, refused, full, count) in enumerate(cases):
        path, out = (dataset / f"{number}.{end}" for end in ("jsonl", "json"))
        path.write_text("".join(json.dumps(make_line(*image)) + "\n" for image in images))
        found = run_main(path, "--data", dataset, "--classes", "present", "--json", out, *flags)
        printed = capsys.readouterr().out
        if refused:
            assert refused in found and not printed and not out.exists()
        else:
            assert found is None and printed.splitlines()[-1].split()[0] == full
            assert json.loads(out.read_text())["num_images"] == count


@pytest.mark.parametrize("flags, said", [
    (["--limit", 0], "--limit 0: must be at least 1"),
    (["--limit", -1], "--limit -1: must be at least 1"),
    (["--json", "nowhere/out.json"], "--json nowhere/out.json: give a file in a folder"),
    (["--json", "/"], "--json /: give a file"),
])
def test_command_refuses_flags_before_it_reads(flags, said, tmp_path, capsys):
    assert run_main(tmp_path / "none.jsonl", "--data", tmp_path / "none", *flags) == 2
    assert said in capsys.readouterr().err


def test_command_reports_bad_input_in_one_line(dataset):
    with (dataset / "p.jsonl").open("a") as file:
        file.write('{"file_name": "a.jpg", "insta')  # a writer that was interrupted
    done = command(dataset / "p.jsonl", "--data", dataset)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"evaluate.py: error: .*p\.jsonl, line 4: not JSON .*\n", done.stderr)
    (dataset / "empty").mkdir()
    for predictions, data in ("none.jsonl", dataset), ("p.jsonl", dataset / "empty"):
        done = command(dataset / predictions, "--data", data)
        assert done.returncode == 1 and done.stderr.startswith("evaluate.py: error: ")
        assert done.stderr.count("\n") == 1


def test_command_does_not_overwrite_its_input(dataset):
    before = (dataset / "p.jsonl").read_bytes()
    done = command(dataset / "p.jsonl", "--data", dataset, "--json", dataset / "p.jsonl")
    assert done.returncode == 2 and "would overwrite the predictions" in done.stderr
    assert (dataset / "p.jsonl").read_bytes() == before


def test_a_result_that_does_not_fit_leaves_the_one_before(dataset, capsys):
    """capsys: what is printed goes to no file."""
    words, out = [dataset / "p.jsonl", "--data", dataset], dataset / "ap.json"
    out.write_text("old")
    with no_file_above(100):
        assert run_main(*words, "--json", out).endswith(f"File too large: '{out}.tmp'")
        said = run_main(*words, "--official-mat", dataset / "mat")
    assert said.endswith(f"File too large: '{dataset / 'mat' / 'detections_01.mat'}.tmp'")
    assert out.read_text() == "old" and not list(dataset.rglob("*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_command_reports_a_full_disk_in_one_line(dataset):
    (dataset / "full.json").symlink_to("/dev/full")
    done = command(dataset / "p.jsonl", "--data", dataset, "--json", dataset / "full.json")
    assert done.returncode == 1 and "Known Object" in done.stdout
    message = f"evaluate.py: error: [Errno 28] No space left on device: '{dataset}/full.json'"
    assert done.stderr.splitlines()[-1] == message
    assert "Traceback" not in done.stderr


def test_help_shows_an_example_and_the_format():
    done = command("--help")
    assert done.returncode == 0
    for part in "python evaluate.py predictions.jsonl --data", '"scores"', "--classes", "0-based":
        assert part in done.stdout


def test_the_line_in_the_docstring_is_readable(tmp_path):
    text = evaluate.__doc__
    example = text[text.index('{"file_name"') : text.index("Boxes are x1")]
    line = json.dumps(json.loads(example))
    path = tmp_path / "p.jsonl"
    path.write_text(line + "\n")
    assert evaluate.read_predictions(path, [make_sample("HICO_test2015_00000001.jpg")])
