"""engine/scoring/predictions.py: from an answer to a line, part files, reading and its errors."""

import json
import re
from pathlib import Path

import pytest

import hicodet
from engine.scoring.predictions import (
    FORMAT,
    drop_unknown,
    line_hois,
    part_file,
    predicted_instances,
    rank_scores,
    read_lines,
    read_predictions,
    stored_rows,
    write_predictions,
    write_rows,
)
from hicodet import HOI, InputError
from tests.pairs import BOX, FAR, RIDE_BICYCLE, make_line, make_sample

REPO = Path(__file__).resolve().parents[1]

# ---- from an answer to a line


def answer_of(*rows):
    """What is read of a text whose instances are (object class, verbs), or dicts of other keys."""
    boxes = {"human": [1, 2, 3, 4], "object": [5, 6, 7, 8]}
    rows = [
        row if isinstance(row, dict) else {"object class": row[0], "verb class": row[1]}
        for row in rows
    ]
    return hicodet.parse_completion(json.dumps([boxes | row for row in rows]))


def test_predicted_instances():
    good = {"human": [10, 20, 2000, 40], "object class": "bicycle"}
    good |= {"verb class": "ride, fly, ride, sit on"}
    completion = answer_of(
        good | {"object class": "unicorn"}, good, good | {"human": [1, 2, 3]},
        good | {"object": None}, ("bicycle", "fly"), ("bicycle", ""), {}, ("unicycle", "ride"),
    )  # fmt: skip
    # The picture is twice the model's frame; 2000 lies beyond it, the last pixel is 199.
    expected = {
        "human": [20, 40, 199, 80], "object": [10, 12, 14, 16],
        "object_class": "bicycle", "verbs": ["ride", "sit on"], "scores": [1.0, 1.0],
    }  # fmt: skip
    sizes = (200, 100), (100, 50)
    assert predicted_instances(completion, *sizes) == [expected]
    scores = [index / 10 for index in range(8)]
    expected["scores"] = [0.1, 0.1]
    assert predicted_instances(completion, *sizes, scores) == [expected]


def test_box_clipped_to_no_area_is_no_instance():
    outside = {"human": [120, 10, 140, 40], "object class": "bicycle", "verb class": "ride"}
    assert predicted_instances(answer_of(outside), (100, 50), (100, 50)) == []


RANKS = {  # rows of an answer -> a score for each verb of each instance
    "none": ([], []),
    "a single triplet": ([("bicycle", "ride")], [[1.0]]),
    "three": ([("bicycle", "ride, sit on"), ("dog", "walk")], [[1.0, 0.75], [0.5]]),
    "no pair of the 600 takes its place": (
        [("bicycle", "ride, type on"), ("dog", "walk")], [[1.0, 0.75], [0.5]]),
    "a repeated verb takes another place": (
        [("bicycle", "ride, ride"), ("dog", "walk")], [[1.0, 0.75], [0.5]]),
    "words of no vocabulary take none": (
        [("unicorn", "ride"), ("bicycle", "fly to, ride"), ("dog", "walk")],
        [[0.0], [0.0, 1.0], [0.5]]),
    "a list of two classes takes none": (
        [(["dog", "cat"], "walk"), ("dog", "walk")], [[0.0], [1.0]]),
    "no verbs": ([("dog", ""), ("dog", "walk")], [[], [1.0]]),
    "a box missing": (
        [{"object": None, "object class": "dog", "verb class": "walk"}, ("dog", "walk")],
        [[0.0], [1.0]]),
    "a box without area": (
        [{"human": [1, 2, 1, 4], "object class": "dog", "verb class": "walk"}, ("dog", "walk")],
        [[0.0], [1.0]]),
    "more than a hundred": (
        [("dog", "walk")] * 251, [[pytest.approx(1 - 0.002 * place)] for place in range(251)]),
}  # fmt: skip


@pytest.mark.parametrize("rows, expected", RANKS.values(), ids=RANKS)
def test_rank_scores(rows, expected):
    assert rank_scores(answer_of(*rows)) == expected


def test_predictions_with_a_score_for_each_verb():
    rows = [("dog", "ride, walk, type on, walk"), ("unicorn", "ride"), ("bicycle", "ride, sit on")]
    completion = answer_of(*rows)
    # ride, walk, type on, walk, ride, sit on: six places, 0.1 apart. A dog is walked only.
    ranks = rank_scores(completion)
    found = predicted_instances(completion, (9, 9), (9, 9), ranks)
    assert [row["verbs"] for row in found] == [["walk"], ["ride", "sit on"]]
    assert [row["scores"] for row in found] == [[pytest.approx(0.9)], pytest.approx([0.6, 0.5])]
    for scores in (ranks[:-1], [*ranks[:-1], [1.0] * 3]):
        with pytest.raises(ValueError):
            predicted_instances(completion, (9, 9), (9, 9), scores)


def test_hois_of_a_line():
    line = make_line("a.jpg", [(BOX, FAR, RIDE_BICYCLE, 1.0)])
    ride = HOI(BOX, FAR, "bicycle", ("ride",))
    assert line_hois(line) == (ride,)
    odd = [None, 3, {}, {"human": [1, 2, 3, 4]}, {"human": [1, 2, 3, float("nan")], "object": [1]}]
    assert line_hois({"instances": [*odd, *line["instances"]]}) == (ride,)
    assert line_hois({}) == line_hois({"instances": 3}) == ()


# ---- part files


REWARD = {"format": 0.0, "object": 0.0, "verb": 0.0, "iou": 0.0, "total": 0.0}
ROW = {"index": 0, "length": 3, "finished": True, "line": {"file_name": "a"}, "reward": REWARD}
NO_ROW = {"list": [], "null": None, "nothing": {}, "index": ROW | {"index": []},
          "length": ROW | {"length": "3"}, "finished": ROW | {"finished": 1},
          "line": ROW | {"line": None}, "reward": ROW | {"reward": [1]},
          "part": ROW | {"reward": REWARD | {"iou": None}}}  # fmt: skip


def test_rows_come_back(tmp_path):
    other, unread = ROW | {"index": 7, "reward": None}, ROW | {"index": 8, "unread": "cut"}
    assert stored_rows(tmp_path) == ({}, 0)
    assert write_rows(part_file(tmp_path, 2), (row for row in [ROW, unread])) == [ROW, unread]
    with open(part_file(tmp_path, 11), "w") as part:
        part.write(json.dumps(other) + "\n" + json.dumps(ROW)[:20])  # cut by a crash
    (tmp_path / "part-mine.jsonl").write_text("not of the run")
    assert stored_rows(tmp_path) == ({0: ROW, 7: other}, 12)


@pytest.mark.parametrize("row", NO_ROW.values(), ids=NO_ROW)
def test_a_part_file_has_rows(row, tmp_path):
    part = part_file(tmp_path, 3)
    part.write_text(f"{json.dumps(ROW)}\n{json.dumps(row)}\n")
    with pytest.raises(InputError, match=f"{part}, line 2: not written by a prediction"):
        stored_rows(tmp_path)


# ---- reading


SAMPLES = [make_sample("a.jpg"), make_sample("b.jpg")]


def instance(**changes):
    """A good instance with some keys changed; None leaves the key out."""
    good = make_line("", [(BOX, BOX, RIDE_BICYCLE, 1.0)])["instances"][0] | changes
    return {key: value for key, value in good.items() if value is not None}


def line_with(**changes):
    return json.dumps({"file_name": "b.jpg", "instances": [instance(), instance(**changes)]})


def read(tmp_path, *lines, **options):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"".join(x if isinstance(x, bytes) else x.encode() + b"\n" for x in lines))
    return read_predictions(path, SAMPLES, **options)


def test_what_is_written_is_read(tmp_path):
    lines = [
        {"file_name": "b.jpg", "text": "<think>", "instances": [instance(scores=[1])]},
        {"file_name": "a.jpg", "instances": []},
    ]
    write_predictions(tmp_path / "p.jsonl", lines)
    assert read_predictions(tmp_path / "p.jsonl", SAMPLES) == lines


@pytest.mark.parametrize("page", ["--help", "docs/evaluation.md"])
def test_the_line_that_is_described_is_readable(page, tmp_path):
    text = FORMAT if page == "--help" else (REPO / page).read_text()
    example = json.loads(re.search(r'\{"file_name": "HICO.*?\]}\]}', text, re.DOTALL)[0])
    write_predictions(tmp_path / "p.jsonl", [example])
    assert read_predictions(tmp_path / "p.jsonl", [make_sample(example["file_name"])])


BAD_LINES = [
    (b'{"file_name": "b.jpg", "inst', "not JSON (Unterminated string"),
    ("", "not JSON (Expecting value"),
    (b"\xff\xfe{\n", "not JSON ("),
    ("[" * 100_000, "not JSON (maximum recursion depth exceeded"),
    ("1" * 5_000, "not JSON (Exceeds the limit"),
    (json.dumps([make_line("b.jpg", [(BOX,) * 2 + (7, 1.0)] * 9)] * 9), "must be an object; found"),
    ('{"instances": []}', "'file_name' must be a string, the name of an image; found None"),
    ('{"file_name": "b.jpg"}', "'instances' must be a list, which may be empty; found None"),
    ('{"file_name": "b.jpg", "instances": [3]}', "instances[0] must be an object; found 3"),
    ('{"file_name": "c.jpg", "instances": []}',
     "must be an image of this split (check --data and --split); found 'c.jpg'"),
    ('{"file_name": "a.jpg", "instances": []}',
     "must be on one line only, but is on line 1 already; found 'a.jpg'"),
    (line_with(human=[1, 2, 3]),
     "'human' of instances[1] must be four finite numbers, [x1, y1, x2, y2]; found [1, 2, 3]"),
    (line_with(human=None), "'human' of instances[1] must be four finite numbers"),
    (line_with(object=[1, 2, 3, "4"]), "'object' of instances[1] must be four finite numbers"),
    (line_with(object=[1, 2, 3, True]), "[x1, y1, x2, y2]; found [1, 2, 3, True]"),
    (line_with(object=[1, 2, 3, float("nan")]), "[x1, y1, x2, y2]; found [1, 2, 3, nan]"),
    (line_with(object=[1, 2, 3, 10**400]), "[x1, y1, x2, y2]; found [1, 2, 3, 1000"),
    (line_with(object_class="bike"), "'object_class' of instances[1] must be one of hicodet.OBJ"),
    (line_with(object_class=["bicycle"]), "'object_class' of instances[1] must be a string"),
    (line_with(verbs="ride"), "'verbs' of instances[1] must be a list of strings; found 'ride'"),
    (line_with(verbs=["riding"]), "must be one of hicodet.VERBS (--drop-unknown drops others)"),
    (line_with(verbs=["eat"]),
     "one that HICO has with 'bicycle' (--drop-unknown drops others); found 'eat'"),
    (line_with(scores=[1, 1]),
     "'scores' of instances[1] must be 1 finite numbers, one for each verb; found [1, 1]"),
    (line_with(scores=None), "one for each verb; found None"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD_LINES, ids=[case[1] for case in BAD_LINES])
def test_a_bad_line_is_named(tmp_path, bad, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read(tmp_path, json.dumps(make_line("a.jpg")), bad)
    place = f"{tmp_path / 'p.jsonl'}, line 2: "
    assert str(error.value).startswith(place) and len(str(error.value)) < len(place) + 200


def test_missing_images_are_named(tmp_path):
    message = "p.jsonl: 1 of 2 images have no line, such as 'b.jpg'; predict the whole split"
    with pytest.raises(InputError, match=re.escape(message)):
        read(tmp_path, json.dumps(make_line("a.jpg")))


@pytest.mark.parametrize("indent", [None, 2])
def test_one_list_is_no_lines(indent, tmp_path):
    lines = [make_line(sample.file_name, [(BOX, BOX, 7, 1.0)] * 50) for sample in SAMPLES]
    with pytest.raises(InputError) as error:
        read(tmp_path, json.dumps(lines, indent=indent))
    assert str(error.value) == f"{tmp_path / 'p.jsonl'}: one object per line, not one list"


def test_an_unfinished_prediction_says_how_to_finish(tmp_path):
    whole = tmp_path / "predictions.jsonl"
    with pytest.raises(FileNotFoundError, match="predictions.jsonl"):
        list(read_lines(whole))
    part_file(tmp_path, 0).write_text("")
    for path in (whole, tmp_path):
        with pytest.raises(InputError) as error:
            list(read_lines(path))
        said = f"{tmp_path} is not finished: predict ... --out {tmp_path} --resume"
        assert str(error.value) == said
    whole.write_text("")
    with pytest.raises(InputError, match=f"is a folder; give its file, {whole}"):
        list(read_lines(tmp_path))


def test_unknown_classes_are_dropped_and_counted(tmp_path):
    mixed = instance(verbs=["eat", "ride", "fly to"], scores=[0.9, 0.8, 0.7])
    unknown = [instance(object_class="unicorn"), instance(verbs=["eat"])]
    lines = [{"file_name": "a.jpg", "text": "x", "instances": [mixed, *unknown, instance()]},
             {"file_name": "b.jpg", "instances": [instance(object_class="bike")]}]  # fmt: skip
    before = json.dumps(lines)
    found = read(tmp_path, *map(json.dumps, lines), any_class=True)
    assert found == lines
    kept, dropped = drop_unknown(found)
    assert dropped == 5 and json.dumps(found) == before
    ride = instance(scores=[0.8])
    assert kept == [{"file_name": "a.jpg", "text": "x", "instances": [ride, instance()]},
                    {"file_name": "b.jpg", "instances": []}]  # fmt: skip
    with pytest.raises(InputError, match="'scores' of instances"):
        read(tmp_path, line_with(verbs=["fly to"], scores=[]), any_class=True)
