"""engine/scoring/predictions.py: from an answer to a line, part files, reading and its errors."""

import json
import re
from pathlib import Path

import pytest

import hicodet
from engine.scoring.predictions import (
    FORMAT,
    line_hois,
    part_file,
    predicted_instances,
    rank_scores,
    read_lines,
    read_predictions,
    stored_rows,
    unknown_verbs,
    write_predictions,
    write_rows,
)
from hicodet import HOI, InputError
from tests.pairs import BOX, RIDE_BICYCLE, make_line, make_sample

REPO = Path(__file__).resolve().parents[1]

# ---- from an answer to a line


def answer_of(*rows):
    """A parsed answer. Its instances are given as (object class, verbs), or as dicts of keys."""
    boxes, names = {"human": [1, 2, 3, 4], "object": [5, 6, 7, 8]}, ("object class", "verb class")
    rows = [row if isinstance(row, dict) else zip(names, row) for row in rows]
    return hicodet.parse_completion(json.dumps([boxes | dict(row) for row in rows]))


def test_predicted_instances():
    good = {"human": [10, 20, 2000, 40], "object class": "bicycle"}
    good |= {"verb class": "ride, fly, ride, sit on"}
    completion = answer_of(
        good | {"object class": "unicorn"}, good, good | {"human": [1, 2, 3]},
        good | {"object": None}, ("bicycle", "fly"), ("bicycle", ""), {}, ("unicycle", "ride"),
    )  # fmt: skip
    # The image is twice as large as the model's frame. 2000 is clipped to the last pixel, 199.
    expected = {
        "human": [20, 40, 199, 80], "object": [10, 12, 14, 16],
        "object_class": "bicycle", "verbs": ["ride", "sit on"], "scores": [1.0, 1.0],
    }  # fmt: skip
    sizes = (200, 100), (100, 50)
    assert predicted_instances(completion, *sizes) == [expected]
    scores = [index / 10 for index in range(8)]
    expected["scores"] = [0.1, 0.1]
    assert predicted_instances(completion, *sizes, scores) == [expected]
    # clipping leaves no area
    outside = answer_of(good | {"human": [120, 10, 140, 40]})
    assert predicted_instances(outside, (100, 50), (100, 50)) == []


RANKS = {  # rows of an answer -> a score for each verb of each instance
    "none": ([], []),
    "a single triplet": ([("bicycle", "ride")], [[1.0]]),
    "a pair that HICO lacks counts": (
        [("bicycle", "ride, type on"), ("dog", "walk")], [[1.0, 0.75], [0.5]]),
    "unknown words do not count": (
        [("unicorn", "ride"), ("bicycle", "fly to, ride"), ("dog", "walk")],
        [[0.0], [0.0, 1.0], [0.5]]),
    "a list of two classes does not": ([(["dog", "cat"], "walk"), ("dog", "walk")], [[0.0], [1.0]]),
    "no verbs": ([("dog", ""), ("dog", "walk")], [[], [1.0]]),
    "a box missing": (
        [{"object": None, "object class": "dog", "verb class": "walk"}, ("dog", "walk")],
        [[0.0], [1.0]]),
    "more than a hundred": (
        [("dog", "walk")] * 251, [[pytest.approx(1 - 0.002 * place)] for place in range(251)]),
}  # fmt: skip


@pytest.mark.parametrize("rows, expected", RANKS.values(), ids=RANKS)
def test_rank_scores(rows, expected):
    assert rank_scores(answer_of(*rows)) == expected


# ---- part files


ROW = {"index": 0, "length": 3, "finished": True, "line": {"file_name": "a"}, "reward": None}


def test_stored_rows_after_a_crash(tmp_path):
    """Without the line that was cut, and without unread images, which are tried again."""
    other, unread = ROW | {"index": 7}, ROW | {"index": 8, "unread": "cut"}
    assert stored_rows(tmp_path) == ({}, 0)
    assert write_rows(part_file(tmp_path, 2), (row for row in [ROW, unread])) == [ROW, unread]
    with open(part_file(tmp_path, 11), "w") as part:
        part.write(json.dumps(other) + "\n" + json.dumps(ROW)[:20])  # cut by a crash
    assert stored_rows(tmp_path) == ({0: ROW, 7: other}, 12)


# ---- reading


SAMPLES = [make_sample("a.jpg"), make_sample("b.jpg")]


def instance(**changes):
    """A good instance with some keys changed."""
    return make_line("", [(BOX, BOX, RIDE_BICYCLE, 1.0)])["instances"][0] | changes


def line_with(**changes):
    return json.dumps({"file_name": "b.jpg", "instances": [instance(), instance(**changes)]})


def read(tmp_path, *lines):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"".join(x if isinstance(x, bytes) else x.encode() + b"\n" for x in lines))
    return read_predictions(path, SAMPLES)


def test_written_predictions_can_be_read(tmp_path):
    lines = [
        {"file_name": "b.jpg", "text": "<think>", "instances": [instance(scores=[1])]},
        {"file_name": "a.jpg", "instances": []},
    ]
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, lines)
    assert read_predictions(path, SAMPLES) == read_predictions(tmp_path, SAMPLES) == lines
    assert line_hois(lines[0]) == (HOI(BOX, BOX, "bicycle", ("ride",)),)


@pytest.mark.parametrize("page", ["--help", "docs/evaluation.md"])
def test_example_line_of_the_docs_can_be_read(page, tmp_path):
    text = FORMAT if page == "--help" else (REPO / page).read_text()
    example = json.loads(re.search(r'\{"file_name": "HICO.*?\]}\]}', text, re.DOTALL)[0])
    write_predictions(tmp_path / "p.jsonl", [example])
    assert read_predictions(tmp_path / "p.jsonl", [make_sample(example["file_name"])])
    assert not unknown_verbs([example])


BAD_LINES = [
    (b'{"file_name": "b.jpg", "inst', "not JSON (Unterminated string"),
    ("[" * 100_000, "not JSON (maximum recursion depth exceeded"),
    ('{"instances": []}', "'file_name' of the line must be a text; found None"),
    ('{"file_name": "c.jpg", "instances": []}', "'c.jpg' is not of this split; see --data, --spl"),
    ('{"file_name": "a.jpg", "instances": []}', "'a.jpg' comes twice"),
    (line_with(human=[1, 2, 3]), "'human' of instances[1] must be 4 finite numbers; found [1, 2,"),
    (line_with(object=[1, 2, 3, float("nan")]), "4 finite numbers; found [1, 2, 3, nan]"),
    (line_with(verbs="ride"), "'verbs' of instances[1] must be a list; found 'ride'"),
    (line_with(verbs=[["ride"]]), "'verbs' of instances[1] must be a list of texts"),
    (line_with(scores=[1, 1]), "'scores' of instances[1] must be 1 finite numbers; found [1, 1]"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD_LINES, ids=[case[1] for case in BAD_LINES])
def test_bad_line_is_named(tmp_path, bad, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read(tmp_path, json.dumps(make_line("a.jpg")), bad)
    place = f"{tmp_path / 'p.jsonl'}, line 2: "
    assert str(error.value).startswith(place) and len(str(error.value)) < len(place) + 200


def test_missing_images_and_lists_are_named(tmp_path):
    message = "p.jsonl: 1 of 2 images have no line, such as 'b.jpg': predict the whole split"
    with pytest.raises(InputError, match=re.escape(message)):
        read(tmp_path, json.dumps(make_line("a.jpg")))
    lines = [make_line(sample.file_name, [(BOX, BOX, 7, 1.0)] * 50) for sample in SAMPLES]
    for indent in None, 2:
        with pytest.raises(InputError, match="p.jsonl: one object per line, not one list$"):
            read(tmp_path, json.dumps(lines, indent=indent))


def test_unfinished_prediction_says_how_to_finish(tmp_path):
    whole = tmp_path / "predictions.jsonl"
    with pytest.raises(FileNotFoundError, match="predictions.jsonl"):
        list(read_lines(whole))
    part_file(tmp_path, 0).write_text("")
    for path in (whole, tmp_path):
        said = f"^{tmp_path} is not finished: predict ... --out {tmp_path} --resume$"
        with pytest.raises(InputError, match=said):
            list(read_lines(path))
