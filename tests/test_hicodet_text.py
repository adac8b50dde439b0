"""hicodet.py, its language: prompt, answers, parser, predictions."""

import dataclasses
import hashlib
import json
import random
from pathlib import Path

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import engine.examples
import evaluate
import hicodet
from hicodet import HOI

SHARED = Path(__file__).resolve().parents[2] / "shared"
HICO_DET, QWEN = SHARED / "hico_det", SHARED / "qwen2.5-vl"
QWEN_PIXELS = {"factor": 28, "min_pixels": 3136, "max_pixels": 12845056}


@pytest.fixture(scope="module")
def tokenizer():
    if not (QWEN / "vocab.json").is_file():
        pytest.skip("the tokenizer of Qwen2.5-VL is not beside the repository")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QWEN)


PROMPT_SHA256 = "02de28236c8a0d32bc0a0313abb6ac85890074adbe9bb3dd2444114288bffea3"  # the authors'


def test_fig4_prompt_is_the_authors_to_the_character():
    text = hicodet.prompt_text()
    assert len(text) == 6844
    assert hashlib.sha256(text.encode()).hexdigest() == PROMPT_SHA256


def test_fig4_prompt_layout():
    lines = hicodet.prompt_text().split("\n")
    assert lines[0] == "You are an HOI detection model. Follow this exact structure:"
    assert lines[1:3] == ["", "<VALID OBJECT CLASSES>:"]
    assert lines[3].startswith("<object class>:person, bicycle, car, motorcycle, airplane, bus, ")
    assert lines[3].endswith(", hair drier, toothbrush.")
    assert lines[4:7] == [
        "", "<VALID INTERACTIONS> (object: allowed_verbs):",
        "<object class>: <verb class>, <verb class>, ...",
    ]  # fmt: skip
    assert lines[8] == (
        "bicycle: carry, hold, inspect, jump, hop on, park, push, repair, ride, sit on, "
        "straddle, walk, wash, no interaction"
    )
    listed = [(verb, row[0]) for line in lines[7:87] if (row := line.split(": "))
              for verb in row[1].split(", ")]  # fmt: skip
    assert tuple(listed) == hicodet.PAIRS
    assert lines[87:90] == ["", "Thinking Process:", "1. How many people are in the image?"]
    assert lines[93:] == [
        "", "EXAMPLE OUTPUT FORMAT:", "<think>", "reasoning process here", "</think>", "<answer>",
        "[", "    {", '        "human":  [x1, y1, x2, y2],', '        "object": [x1, y1, x2, y2],',
        '        "object class": "<object class>",',
        '        "verb class": "<verb class>, <verb class>, ... "', "    },", "    ...", "]",
        "</answer>",
    ]  # fmt: skip


TABLE_2 = {  # (thinking, task_description) -> how the text opens, and what follows it at once
    (True, True): ("You are an HOI detection model. Follow this exact structure:", "<VALID OBJECT"),
    (False, True): ("You are an HOI detection model. Follow this exact structure:", "<VALID OBJEC"),
    (True, False): ("Follow this exact structure:", "Thinking Process:\n1. How many"),
    (False, False): ("Follow this exact structure:", "EXAMPLE OUTPUT FORMAT:\n<answer>\n[\n    {"),
}


@pytest.mark.parametrize("thinking, task_description", TABLE_2)
def test_prompt_ablations_of_table_2(thinking, task_description):
    text = hicodet.prompt_text(thinking=thinking, task_description=task_description)
    opening, following = TABLE_2[thinking, task_description]
    assert text.startswith(f"{opening}\n\n{following}")
    assert ("Thinking Process" in text) == ("<think>" in text) == thinking
    assert ("zebra: feed, hold, pet, watch, no interaction\n\n" in text) == task_description
    assert "\n\nEXAMPLE OUTPUT FORMAT:\n" in text and text.endswith("\n    ...\n]\n</answer>")
    assert "\n\n\n" not in text  # one empty line between parts, whichever are left out
    assert not hicodet.parse_completion(text).instances  # an echo earns nothing


def test_prompt_in_real_tokens(tokenizer):
    template = json.loads((QWEN / "chat_template.json").read_text())["chat_template"]
    content = [{"type": "image"}, {"type": "text", "text": hicodet.prompt_text()}]
    turns = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template,
        add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    assert turns.count("<|image_pad|>") == 1
    assert len(tokenizer(turns)["input_ids"]) == 1971


def test_answers_in_real_tokens(tokenizer, real_samples):
    answers = [answer_in_model_frame(s)[0] for s in real_samples[:1000] if s.hois]
    lengths = [len(tokens) for tokens in tokenizer(answers)["input_ids"]]
    assert 135 < sum(lengths) / len(lengths) < 150


def in_model_frame(sample):
    """The sample's instances and the (width, height) that they are written for."""
    model = smart_resize(sample.height, sample.width, **QWEN_PIXELS)[::-1]
    return [engine.examples.in_text_frame(hoi, sample, model) for hoi in sample.hois], model


def rounded(box):
    return tuple(map(round, box))


def answer_in_model_frame(sample):
    hois, model = in_model_frame(sample)
    return hicodet.format_answer(hois), model


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


def test_real_answers_come_back(real_samples):
    for sample in real_samples:
        hois, _ = in_model_frame(sample)
        completion = hicodet.parse_completion(hicodet.format_completion(hois, "People."))
        expected = [
            (rounded(hoi.human), rounded(hoi.object), hoi.object_class, hoi.verbs, 4)
            for hoi in hois
        ]
        assert expected == [
            (found.human, found.object, found.object_class, found.verbs, found.key_count)
            for found in completion.instances
        ]


@pytest.mark.parametrize("frame, full", [("model", 0.9966), ("original", 0.9970)])
def test_truth_written_as_text_keeps_its_map(frame, full, real_samples):
    predictions = {"ones": [], "rank": []}
    for sample in real_samples:
        size = sample.width, sample.height
        hois, model = in_model_frame(sample) if frame == "model" else (sample.hois, size)
        completion = hicodet.parse_completion(hicodet.format_answer(hois))
        for name, scores in ("ones", None), ("rank", hicodet.rank_scores(completion)):
            instances = hicodet.predicted_instances(completion, size, model, scores)
            predictions[name].append({"file_name": sample.file_name, "instances": instances})
    counts = hicodet.training_counts(HICO_DET)
    for lines in predictions.values():
        result = evaluate.evaluate(lines, real_samples, counts)
        assert result["default"]["full"] == pytest.approx(full, abs=0.0005)


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
    "no comment": ('<answer> [{"object class": "bus // #1, None"}]', True, ["bus // #1, None"]),
    "None between": (f"<answer> [{RIDER_TEXT}, None, {BUS}]", True, ["bicycle", "bus"]),
    "None inside": ('<answer> [{"human": None, "object class": "bus"}]', True, ["bus"]),
    "True and False": ('<answer> [{"object class": "bus", "a": True, "b": False}]', True, ["bus"]),
    "single quotes": (f"<answer> [{QUOTED}, {QUOTED}] </answer>", True, ["bicycle"] * 2),
    "single quotes around double ones": (
        """<answer> [{'object class': 'a "b"', 'verb class': 'x\\'s'}]""", True, ["a 'b'"]),
    "an apostrophe": ('<answer> [{"object class": "it\'s",}]', True, ["it's"]),
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
    "no <answer>, </think> again": (f"<think> a </think> </think> [{BUS}]", False, ["bus"]),
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
        for line in hicodet.predicted_instances(completion, (640, 480), (644, 476)):
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


def test_predicted_instances():
    def answer(**changes):
        keys = json.loads(RIDER_TEXT) | {k.replace("_", " "): v for k, v in changes.items()}
        return json.dumps(keys)

    good = answer(human=[10, 20, 2000, 40], verb_class="ride, fly, ride, sit on")
    answers = [
        answer(object_class="unicorn"), good, answer(human=[1, 2, 3]), answer(object=None),
        answer(verb_class="fly"), answer(verb_class=""), "{}", answer(object_class="Bicycle"),
    ]  # fmt: skip
    completion = hicodet.parse_completion(f"<answer> [{', '.join(answers)}]")
    assert len(completion.instances) == len(answers)
    # The picture is twice the model's frame; 2000 lies beyond it, the last pixel is 199.
    expected = {
        "human": [20, 40, 199, 80], "object": [10, 12, 140, 99],
        "object_class": "bicycle", "verbs": ["ride", "sit on"], "scores": [1.0, 1.0],
    }  # fmt: skip
    sizes = (200, 100), (100, 50)
    assert hicodet.predicted_instances(completion, *sizes) == [expected]
    scores = [index / 10 for index in range(len(answers))]
    expected["scores"] = [0.1, 0.1]
    assert hicodet.predicted_instances(completion, *sizes, scores) == [expected]
    with pytest.raises(ValueError):
        hicodet.predicted_instances(completion, *sizes, scores[:-1])


def answer_of(*rows):
    """A text whose instances are (object class, verbs), or anything else to be written as it is."""
    boxes = {"human": [1, 2, 3, 4], "object": [5, 6, 7, 8]}
    return json.dumps([
        boxes | {"object class": row[0], "verb class": row[1]} if isinstance(row, tuple) else row
        for row in rows
    ])  # fmt: skip


RANKS = {  # rows of an answer -> a score for each verb of each instance
    "none": ([], []),
    "a single triplet": ([("bicycle", "ride")], [[1.0]]),
    "two": ([("bicycle", "ride, sit on")], [[1.0, 0.5]]),
    "three": ([("bicycle", "ride, sit on"), ("dog", "walk")], [[1.0, 0.75], [0.5]]),
    "no pair of the 600 takes its place": (
        [("bicycle", "ride, type on"), ("dog", "walk")], [[1.0, 0.75], [0.5]]),
    "a repeated verb takes another place": (
        [("bicycle", "ride, ride"), ("dog", "walk")], [[1.0, 0.75], [0.5]]),
    "words of no vocabulary take none": (
        [("unicorn", "ride"), ("bicycle", "fly to, ride"), ("Dog", "walk"), ("dog", "walk")],
        [[0.0], [0.0, 1.0], [0.0], [0.5]]),
    "a list of classes takes none": ([(["dog"], "walk"), ("dog", "walk")], [[0.0], [1.0]]),
    "no verbs": ([("dog", ""), ("dog", "walk")], [[], [1.0]]),
    "a box missing": (
        [{"human": [1, 2, 3, 4], "object class": "dog", "verb class": "walk"}, ("dog", "walk")],
        [[0.0], [1.0]]),
    "a box without area": (
        [{"human": [1, 2, 1, 4], "object": [5, 6, 7, 8], "object class": "dog",
          "verb class": "walk"}, ("dog", "walk")], [[0.0], [1.0]]),
}  # fmt: skip


@pytest.mark.parametrize("rows, expected", RANKS.values(), ids=RANKS)
def test_rank_scores(rows, expected):
    assert hicodet.rank_scores(hicodet.parse_completion(answer_of(*rows))) == expected


def test_rank_scores_of_more_than_a_hundred():
    completion = hicodet.parse_completion(answer_of(*[("bicycle", "ride")] * 251))
    scores = [score for (score,) in hicodet.rank_scores(completion)]
    assert scores == pytest.approx([1 - 0.002 * place for place in range(251)])


def test_predictions_with_a_score_for_each_verb():
    rows = [("dog", "ride, walk, type on, walk"), ("unicorn", "ride"), ("bicycle", "ride, sit on")]
    completion = hicodet.parse_completion(answer_of(*rows))
    # ride, walk, type on, walk, ride, sit on: six places, 0.1 apart. A dog is walked only.
    ranks = hicodet.rank_scores(completion)
    found = hicodet.predicted_instances(completion, (9, 9), (9, 9), ranks)
    assert [row["verbs"] for row in found] == [["walk"], ["ride", "sit on"]]
    assert [row["scores"] for row in found] == [[pytest.approx(0.9)], pytest.approx([0.6, 0.5])]
    for scores in (ranks[:-1], [*ranks[:-1], [1.0]], [*ranks[:-1], [1.0] * 3]):
        with pytest.raises(ValueError):
            hicodet.predicted_instances(completion, (9, 9), (9, 9), scores)
