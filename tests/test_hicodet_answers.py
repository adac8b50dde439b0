"""hicodet.py, answers: as they are written, and what is read of any text."""

import dataclasses
import json
import random

import pytest

import hicodet
from engine.scoring.predictions import predicted_instances
from hicodet import HOI

RIDER = HOI((1.4, 2.6, 30, 40), (5, 6, 70.2, 80), "bicycle", ("ride", "sit on"))
RIDER_TEXT = (
    '{"human": [1, 3, 30, 40], "object": [5, 6, 70, 80], "object class": "bicycle", '
    '"verb class": "ride, sit on"}'
)


def test_answer_text():
    assert hicodet.format_answer([RIDER]) == f"<answer> [{RIDER_TEXT}] </answer>"
    assert hicodet.format_answer([]) == "<answer> [] </answer>"
    assert hicodet.format_completion([RIDER], None) == hicodet.format_answer([RIDER])
    completion = hicodet.format_completion([RIDER], " One person.\n")
    assert completion == f"<think> One person. </think> <answer> [{RIDER_TEXT}] </answer>"


def test_parser_reads_the_answer():
    text = hicodet.format_completion([RIDER, RIDER], "One person.")
    completion = hicodet.parse_completion(text)
    assert completion.has_think and completion.has_answer
    for instance in completion.instances:
        assert instance.human == (1, 3, 30, 40) and instance.object == (5, 6, 70, 80)
        assert instance.object_class == "bicycle" and instance.verbs == ("ride", "sit on")
        assert instance.key_count == 4
        assert text[slice(*instance.span)] == RIDER_TEXT
    assert completion.instances[0].span[1] < completion.instances[1].span[0]


def only(answer):
    """The one instance of an answer's list."""
    (instance,) = hicodet.parse_completion(f"<answer>{answer}").instances
    return instance


def fields(answer):
    found = only(answer)
    return found.human, found.object, found.object_class, found.verbs, found.key_count


NOTHING = None, None, None, ()
INSTANCES = {
    "[{}]": (*NOTHING, 0),
    '[{"human": [1, 2, 3, 4]}]': ((1, 2, 3, 4), None, None, (), 1),
    '[{"human": [1.5, -2, 3e2, 0]}]': ((1.5, -2, 300, 0), None, None, (), 1),
    '[{"human": [9, 9, 1, 1]}]': ((9, 9, 1, 1), None, None, (), 1),  # inverted, as written
    '[{"human": [1, 2, 3]}]': (*NOTHING, 1),
    '[{"human": [1, 2, 3, 4, 5]}]': (*NOTHING, 1),
    '[{"human": "1, 2, 3, 4"}]': (*NOTHING, 1),
    '[{"human": ["1", 2, 3, 4]}]': (*NOTHING, 1),
    '[{"human": [true, 2, 3, 4]}]': (*NOTHING, 1),
    '[{"human": [null, 2, 3, 4]}]': (*NOTHING, 1),
    '[{"human": [[1], 2, 3, 4]}]': (*NOTHING, 1),
    '[{"human": {"x1": 1, "y1": 2}, "object": {"x1": 3}, "object class": "car"}]': (
        None, None, "car", (), 3),
    '[{"human": [NaN, 2, 3, 4]}]': (*NOTHING, 1),
    '[{"human": [1, 2, Infinity, 4]}]': (*NOTHING, 1),
    '[{"human": [1, 2, -Infinity, 4]}]': (*NOTHING, 1),
    '[{"human": [1, 2, 1e999, 4]}]': (*NOTHING, 1),
    f'[{{"human": [1, 2, {"9" * 5000}, 4]}}]': (*NOTHING, 1),
    '[{"object class": " hot dog "}]': (None, None, "hot dog", (), 1),
    '[{"object class": "Fahrrad 自転車"}]': (None, None, "Fahrrad 自転車", (), 1),
    '[{"object class": "\\ud800"}]': (None, None, "\ud800", (), 1),
    '[{"object class": ["car"]}]': (*NOTHING, 1),
    '[{"verb class": "ride,, sit on , ride,"}]': (None, None, None, ("ride", "sit on", "ride"), 1),
    '[{"verb class": ["ride", "sit on"]}]': (None, None, None, ("ride", "sit on"), 1),
    '[{"verb class": ["ride", 1]}]': (*NOTHING, 1),
    '[{"verb class": {"ride": 1}}]': (*NOTHING, 1),
    '[{"verb class": ""}]': (*NOTHING, 1),
    '[{"verb": "ride", "Human": 1}]': (*NOTHING, 2),
    # Eq. 12 counts repeated keys, and the last value is the one used.
    '[{"object class": "car", "object class": "bus"}]': (None, None, "bus", (), 2),
    '[{"human": [1, 2, 3, 4], "human": 0}]': (*NOTHING, 2),
}  # fmt: skip


@pytest.mark.parametrize("answer", INSTANCES, ids=lambda answer: answer[:40])
def test_parser_on_one_instance(answer):
    assert fields(answer) == INSTANCES[answer]


QUOTED = RIDER_TEXT.replace('"', "'")
INDENTED = RIDER_TEXT.replace(", \"", ",\n    \"")
BUS = '{"object class": "bus"}'
READ = {  # text -> whether it has <answer>, and the object classes of the instances read
    "a raw line break in a string": (
        '<answer> [{"object class": "bicycle", "verb class": "ride,\nsit on"}]', True, ["bicycle"]),
    "a comment between": (f"<answer> [{RIDER_TEXT}, // two\n{BUS}]", True, ["bicycle", "bus"]),
    "the same on one line": (f"<answer> [{RIDER_TEXT}, // other {BUS}]", True, ["bicycle", "bus"]),
    "a comment inside": (
        '<answer> [{"human": [1, 2], // the "rider\'s"\n "object class": "bus" # or car\n}]',
        True, ["bus"]),
    "None between": (f"<answer> [{RIDER_TEXT}, None, {BUS}]", True, ["bicycle", "bus"]),
    "None inside": ('<answer> [{"human": None, "object class": "bus"}]', True, ["bus"]),
    "True and False": ('<answer> [{"object class": "bus", "a": True, "b": False}]', True, ["bus"]),
    "single quotes": (f"<answer> [{QUOTED}, {QUOTED}] </answer>", True, ["bicycle"] * 2),
    "single quotes around double ones": (
        """<answer> [{'object class': 'a "b"', 'verb class': 'x\\'s'}]""", True, ["a 'b'"]),
    "what strings hold": (
        """<answer> [{"object class": "it's // #1, None,]",}]""", True, ["it's // #1, None,]"]),
    "trailing commas": (
        '<answer> [{"human": [1, 2, 3, 4, ], "object class": "bus" , // last\n },]', True, ["bus"]),
    "a fence": (f"<answer>\n```json\n[{INDENTED},\n{BUS}]\n```\n</answer>", True,
                ["bicycle", "bus"]),
    "a fence without <answer>": (f"Here's it:\n```json\n[{BUS}]\n```", False, ["bus"]),
    "a bare object": (f"<answer> {RIDER_TEXT} </answer>", True, ["bicycle"]),
    "bare objects": (f"<answer>\n{RIDER_TEXT}\n{BUS}\n", True, ["bicycle", "bus"]),
    "two lists": (f"<answer> [{RIDER_TEXT}] [{BUS}] </answer>", True, ["bicycle", "bus"]),
    "a list in a list": (f"<answer> [[{RIDER_TEXT}], [{BUS}]] </answer>", True, ["bicycle", "bus"]),
    "no <answer>": (f"<think> {BUS}? </think> [{RIDER_TEXT}]", False, ["bicycle"]),
    "no <answer>, </think> again": (
        f"{RIDER_TEXT} </think> {RIDER_TEXT} </think> [{BUS}]", False, ["bus"]),
    "no tag at all": (f"Two people [1]: {RIDER_TEXT} and {BUS}.", False, ["bicycle", "bus"]),
    "no <answer>, </answer>": (f"[{BUS}] </answer> [{RIDER_TEXT}]", False, ["bus"]),
    "another case": (f"<ANSWER> [{BUS}]", False, ["bus"]),
    "<answer> quoted afterwards": (
        f"<answer> [{BUS}] </answer> is in <answer> tags.", True, ["bus"]),
    "<answer> quoted before": (f"In <answer> tags: <answer> [{BUS}] </answer>", True, ["bus"]),
    "two answers": (f"<answer> [{RIDER_TEXT}] </answer> <answer> [{BUS}]", True, ["bus"]),
    "an object behind </answer>": (f"<answer> none </answer> [{BUS}]", True, []),
    "<answer> alone": ("<answer>", True, []),
    "an empty list": ("<answer> [] </answer>", True, []),
    "no objects": ('<answer> [7, null, "ride", [1, 2, 3, 4]] </answer>', True, []),
    "nothing": ("", False, []),
    "only commas between": (f"<answer> [,{BUS} {BUS},\n\t\r,{BUS},]", True, ["bus"] * 3),
    "a cut list": (f"<answer> [{BUS}, {BUS}", True, ["bus"] * 2),
    "a cut box": (f'<answer> [{BUS}, {{"human": [1, 2', True, ["bus"]),
    "a cut string": (f'<answer> [{BUS}, {{"object class": "bic', True, ["bus"]),
    "an odd word in a box": (f'<answer> [{{"human": [1, x]}}, {BUS}]', True, ["bus"]),
    "a key without a value": (f'<answer> [{{"human"}}, {BUS}]', True, ["bus"]),
    "a missing quote": (f'<answer> [{{"human: [1, 2]}}, {BUS}, {RIDER_TEXT}]', True,
                        ["bus", "bicycle"]),
    "missing quotes on both sides": (
        f'<answer> [{{"a: 1}}, {BUS}, {{"a: 1}}, {RIDER_TEXT}]', True, ["bus", "bicycle"]),
    "a missing brace": (f'<answer> [{{"human": [1, 2], {BUS}, {RIDER_TEXT}]', True,
                        ["bus", "bicycle"]),
    "brackets 100,000 deep": ("<answer> " + "[" * 100_000, True, []),
    "closed brackets 100,000 deep": (
        f'<answer> [{{"a": {"[" * 100_000}{"]" * 100_000}}}, {BUS}]', True, ["bus"]),
    "braces 100,000 deep": (f"<answer> [{BUS}, " + '{"a":' * 100_000, True, ["bus"]),
}  # fmt: skip


@pytest.mark.parametrize("text, has_answer, classes", READ.values(), ids=READ)
def test_parser_reads(text, has_answer, classes):
    completion = hicodet.parse_completion(text)
    assert completion.has_answer == has_answer
    assert [instance.object_class for instance in completion.instances] == classes
    assert completion.has_think == ("<think>" in text)
    assert hicodet.parse_completion("<think>" + text).has_think
    for instance in completion.instances:
        written = text[slice(*instance.span)]
        assert written[0] + written[-1] == "{}" and instance.key_count == written.count(":")


def test_near_json_is_read_whole():
    """Each oddity costs nothing of the instance it stands in."""
    (wanted,) = hicodet.parse_completion(RIDER_TEXT).instances
    commented = INDENTED.replace(",\n", ", // a comment\n").replace("}", ",}")
    for text in (QUOTED, INDENTED, commented, commented.replace('"', "'"), QUOTED[:-1] + ", }"):
        (found,) = hicodet.parse_completion(text).instances
        assert dataclasses.replace(found, span=wanted.span) == wanted


def test_parser_keeps_what_precedes_any_cut():
    text = hicodet.format_completion([RIDER] * 3, "Three.")
    ends = [instance.span[1] for instance in hicodet.parse_completion(text).instances]
    for cut in range(len(text)):
        found = hicodet.parse_completion(text[:cut]).instances
        assert len(found) == sum(end <= cut for end in ends)


def test_parser_never_raises():
    rng = random.Random()
    pieces = [
        "<think>", "</think>", "<answer>", "</answer>", "[", "]", "{", "}", ",", ":", " ", "\n",
        '"', "\\", "\\u", "\\ud83d", '"human"', '"object"', '"object class"', '"verb class"',
        "[1, 2, 3, 4]", '"ride, sit on"', '"bicycle"', "NaN", "-Infinity", "true", "null", "1e999",
        "-", "0", "9" * 5000, "\x00", "\ud800", "自転車", "é", "'", "//", "#", "None", "\\'",
        RIDER_TEXT, hicodet.prompt_text(),
    ]  # fmt: skip
    for _ in range(1500):
        text = "".join(rng.choices(pieces, k=rng.randrange(40)))
        if rng.random() < 0.8:
            text = "<answer> [" + text
        completion = hicodet.parse_completion(text)
        assert completion.has_answer == ("<answer>" in text)
        for found in completion.instances:
            assert text[found.span[0]] == "{" and text[found.span[1] - 1] == "}"
            assert all(verb == verb.strip() != "" for verb in found.verbs)
        for line in predicted_instances(completion, (640, 480), (644, 476)):
            json.dumps(line, allow_nan=False).encode()  # finite, and free of lone surrogates
    for _ in range(300):
        kept = list(hicodet.format_completion([RIDER] * 2, "Two."))
        for _ in range(rng.randrange(1, 9)):
            kept[rng.randrange(len(kept))] = rng.choice(pieces)
        hicodet.parse_completion("".join(kept))


@pytest.mark.parametrize(
    "unit",
    ["<answer>", "<answer>[", "[", '{"a":', "{},", '"', ",", "9", "\\", '{"a":1,', "][", "'", "\\'",
     '\\"', "\\{", "{'", '{"', ",#", ",//\n", "{'a':1},", '{"a', "#", "None ", '"}{"', "</think>"],
)  # fmt: skip
def test_parser_takes_linear_time(unit):
    """A quadratic parser would take many minutes here, which is not to be overlooked."""
    for opening in ("", "<answer> [", '<answer> {"a": "', "<answer> {'a': '"):
        hicodet.parse_completion(opening + unit * (50_000 // len(unit)))
