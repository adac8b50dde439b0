"""engine/scoring/predictions.py: from an answer to a line, part files, reading and its errors."""

import json
import re
from pathlib import Path

import pytest

import hicodet
from engine.scoring.pair_arrays import detection_array
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
    # a box clipped to no area
    outside = answer_of(good | {"human": [120, 10, 140, 40]})
    assert predicted_instances(outside, (100, 50), (100, 50)) == []


RANKS = {  # rows of an answer -> a score for each verb of each instance
    "none": ([], []),
    "a single triplet": ([("bicycle", "ride")], [[1.0]]),
    "no pair of the 600 takes its place": (
        [("bicycle", "ride, type on"), ("dog", "walk")], [[1.0, 0.75], [0.5]]),
    "words of no vocabulary take none": (
        [("unicorn", "ride"), ("bicycle", "fly to, ride"), ("dog", "walk")],
        [[0.0], [0.0, 1.0], [0.5]]),
    "a list of two classes takes none": (
        [(["dog", "cat"], "walk"), ("dog", "walk")], [[0.0], [1.0]]),
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


# ---- part files


ROW = {"index": 0, "length": 3, "finished": True, "line": {"file_name": "a"}, "reward": None}


def test_rows_come_back(tmp_path):
    other, unread = ROW | {"index": 7}, ROW | {"index": 8, "unread": "cut"}
    assert stored_rows(tmp_path) == ({}, 0)
    assert write_rows(part_file(tmp_path, 2), (row for row in [ROW, unread])) == [ROW, unread]
    with open(part_file(tmp_path, 11), "w") as part:
        part.write(json.dumps(other) + "\n" + json.dumps(ROW)[:20])  # cut by a crash
    assert stored_rows(tmp_path) == ({0: ROW, 7: other}, 12)


# ---- reading


SAMPLES = [make_sample("a.jpg"), make_sample("b.jpg")]


def instance(**changes):
    """A good instance with some keys changed; None leaves the key out."""
    good = make_line("", [(BOX, BOX, RIDE_BICYCLE, 1.0)])["instances"][0] | changes
    return {key: value for key, value in good.items() if value is not None}


def line_with(**changes):
    return json.dumps({"file_name": "b.jpg", "instances": [instance(), instance(**changes)]})


def read(tmp_path, *lines):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"".join(x if isinstance(x, bytes) else x.encode() + b"\n" for x in lines))
    return read_predictions(path, SAMPLES)


def test_what_is_written_is_read(tmp_path):
    lines = [
        {"file_name": "b.jpg", "text": "<think>", "instances": [instance(scores=[1])]},
        {"file_name": "a.jpg", "instances": []},
    ]
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, lines)
    assert read_predictions(path, SAMPLES) == read_predictions(tmp_path, SAMPLES) == lines
    assert line_hois(lines[0]) == (HOI(BOX, BOX, "bicycle", ("ride",)),)


@pytest.mark.parametrize("page", ["--help", "docs/evaluation.md"])
def test_the_line_that_is_described_is_readable(page, tmp_path):
    text = FORMAT if page == "--help" else (REPO / page).read_text()
    example = json.loads(re.search(r'\{"file_name": "HICO.*?\]}\]}', text, re.DOTALL)[0])
    write_predictions(tmp_path / "p.jsonl", [example])
    assert read_predictions(tmp_path / "p.jsonl", [make_sample(example["file_name"])])
    assert not unknown_verbs([example])


BAD_LINES = [
    (b'{"file_name": "b.jpg", "inst', "not JSON (Unterminated string"),
    ("[" * 100_000, "not JSON (maximum recursion depth exceeded"),
    (json.dumps([make_line("b.jpg", [(BOX,) * 2 + (7, 1.0)] * 9)] * 9), "must be an object; found"),
    ('{"instances": []}', "'file_name' of the line must be a text; found None"),
    ('{"file_name": "b.jpg", "instances": [3]}', "instances[0] must be an object; found 3"),
    ('{"file_name": "c.jpg", "instances": []}', "'c.jpg' is not of this split; see --data, --spl"),
    ('{"file_name": "a.jpg", "instances": []}', "'a.jpg' comes twice"),
    (line_with(human=[1, 2, 3]), "'human' of instances[1] must be 4 finite numbers; found [1, 2,"),
    (line_with(object=[1, 2, 3, float("nan")]), "4 finite numbers; found [1, 2, 3, nan]"),
    (line_with(object=[1, 2, 3, 10**400]), "4 finite numbers"),
    (line_with(object_class=["bicycle"]), "'object_class' of instances[1] must be a text"),
    (line_with(verbs="ride"), "'verbs' of instances[1] must be a list; found 'ride'"),
    (line_with(verbs=[["ride"]]), "'verbs' of instances[1] must be a list of texts"),
    (line_with(scores=[1, 1]), "'scores' of instances[1] must be 1 finite numbers; found [1, 1]"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD_LINES, ids=[case[1] for case in BAD_LINES])
def test_a_bad_line_is_named(tmp_path, bad, message):
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
        with pytest.raises(InputError) as error:
            read(tmp_path, json.dumps(lines, indent=indent))
        said = f"{tmp_path / 'p.jsonl'}: one object per line, not one list"
        assert str(error.value) == said


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


def test_unknown_verbs_are_found():
    mixed = instance(verbs=["eat", "ride", "fly to"], scores=[0.9, 0.8, 0.7])
    lines = [{"file_name": "a.jpg", "instances": [mixed, instance(object_class="unicorn")]}]
    where = ["'eat' with 'bicycle'", "'fly to' with 'bicycle'", "'ride' with 'unicorn'"]
    assert unknown_verbs(lines) == [f"{found} in a.jpg" for found in where]
    known = detection_array(lines, SAMPLES)
    assert (known.hoi_id.tolist(), known.score.tolist()) == ([RIDE_BICYCLE], [0.8])
