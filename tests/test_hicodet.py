"""The data set and its language: annotations, merging, frames, prompt, answers, parser, drawing."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops
from scipy.io import savemat

import evaluate
import hicodet
from hicodet import HOI, Pair

SHARED = Path(__file__).resolve().parents[2] / "shared"
HICO_DET, QWEN = SHARED / "hico_det", SHARED / "qwen2.5-vl"
QWEN_PIXELS = {"factor": 28, "min_pixels": 3136, "max_pixels": 12845056}
HOLD_BICYCLE, RIDE_BICYCLE, SIT_ON_BICYCLE, RIDE_HORSE = map(
    hicodet.PAIRS.index,
    [("hold", "bicycle"), ("ride", "bicycle"), ("sit on", "bicycle"), ("ride", "horse")],
)
PERSON, BICYCLE = (10.0, 10.0, 50.0, 90.0), (20.0, 50.0, 80.0, 100.0)


@pytest.fixture(scope="module")
def real_samples():
    if not (HICO_DET / "anno_bbox.mat").is_file():
        pytest.skip("the annotations of HICO-DET are not beside the repository")
    return hicodet.load_split(HICO_DET, "test")


@pytest.fixture(scope="module")
def tokenizer():
    if not (QWEN / "vocab.json").is_file():
        pytest.skip("the tokenizer of Qwen2.5-VL is not beside the repository")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QWEN)


def test_vocabulary():
    assert len(hicodet.OBJECTS) == len(set(hicodet.OBJECTS)) == 80
    assert hicodet.OBJECTS[:2] + hicodet.OBJECTS[-2:] == (
        "person", "bicycle", "hair drier", "toothbrush",
    )  # fmt: skip
    assert len(hicodet.VERBS) == len(set(hicodet.VERBS)) == 117
    assert hicodet.VERBS[57] == "no interaction"  # 58th of the official list of verbs
    assert len(hicodet.PAIRS) == len(set(hicodet.PAIRS)) == 600
    assert {name for _, name in hicodet.PAIRS} == set(hicodet.OBJECTS)
    assert sum(verb == "no interaction" for verb, _ in hicodet.PAIRS) == 80
    assert hicodet.PAIRS[0] == ("board", "airplane")
    assert hicodet.PAIRS[245] == ("sit on", "bench")
    assert hicodet.PAIRS[599] == ("no interaction", "zebra")


def test_imports_without_torch():
    code = "import sys, hicodet; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(hicodet.__file__).parent, check=True)


# What MATLAB writes, from dicts: a struct array is an object array with named fields.


def struct(*records):
    names = list(records[0]) if records else ["x1", "x2", "y1", "y2"]
    array = np.empty((1, len(records)), dtype=[(name, object) for name in names])
    for index, record in enumerate(records):
        for name in names:
            array[0, index][name] = record[name]
    return array


def box(x1, y1, x2, y2, dtype=np.uint8):
    sides = {"x1": x1, "x2": x2, "y1": y1, "y2": y2}
    return {name: np.array([[side]], dtype=dtype) for name, side in sides.items()}


def hoi(number, connection=((1, 1),), humans=None, objects=None, invis=0):
    return {
        "id": np.array([[number]], dtype=np.uint16 if isinstance(number, int) else float),
        "bboxhuman": struct(*(humans or [box(1, 2, 30, 40)])),
        "bboxobject": struct(*(objects or [box(5, 6, 70, 80)])),
        "connection": np.array(connection, dtype=np.uint8),
        "invis": np.array([[invis]], dtype=np.uint8),
    }


def image(name, *hois, size=(640, 480)):
    width, height = (np.array([[side]], dtype=np.uint16) for side in size)
    size = struct({"width": width, "height": height, "depth": np.uint8(3)})
    empty = np.zeros((0, 0))
    return {"filename": name, "size": size, "hoi": struct(*hois) if hois else empty}


def write(root, *images, actions=hicodet.PAIRS, **changes):
    """anno_bbox.mat with the images as both halves."""
    rows = [{"nname": n.replace(" ", "_"), "vname": v.replace(" ", "_")} for v, n in actions]
    variables = {"bbox_test": struct(*images), "bbox_train": struct(*images)}
    variables |= {"list_action": struct(*rows).T} | changes
    savemat(root / "anno_bbox.mat", {k: v for k, v in variables.items() if v is not None})
    return root


def write_labels(root, names, labels):
    files = np.array([[name] for name in names], dtype=object)
    savemat(root / "anno.mat", {"list_test": files, "anno_test": labels})


def test_boxes_are_moved_to_zero_once_and_do_not_wrap(tmp_path):
    # The corner pixel (1, 1) becomes (0, 0); a 0 in unsigned bytes becomes -1 and not 255.
    entry = hoi(1, humans=[box(1, 1, 255, 200)], objects=[box(0, 3, 4, 5)])
    (sample,) = hicodet.load_split(write(tmp_path, image("a.jpg", entry)), "test")
    assert sample.pairs == (Pair((0, 0, 254, 199), (-1, 2, 3, 4), 0),)
    assert sample.hois == (HOI((0, 0, 254, 199), (-1, 2, 3, 4), "airplane", ("board",)),)
    assert (sample.width, sample.height) == (640, 480)
    assert sample.path == tmp_path / "images" / "test2015" / "a.jpg"


def test_connection_names_the_boxes_of_each_pair(tmp_path):
    humans = [box(1, 1, 11, 11), box(101, 101, 111, 111)]
    objects = [box(21, 21, 31, 31), box(41, 41, 51, 51), box(61, 61, 71, 71)]
    entry = hoi(2, connection=[[2, 3], [1, 1], [2, 1]], humans=humans, objects=objects)
    (sample,) = hicodet.load_split(write(tmp_path, image("a.jpg", entry)), "train")
    far, near = (100, 100, 110, 110), (0, 0, 10, 10)
    first, last = (20, 20, 30, 30), (60, 60, 70, 70)
    assert sample.pairs == (Pair(far, last, 1), Pair(near, first, 1), Pair(far, first, 1))
    assert sample.path.parent.name == "train2015"


def test_invisible_and_empty_entries(tmp_path):
    nothing = np.zeros((0, 0))
    hidden = hoi(RIDE_HORSE + 1, invis=1) | dict.fromkeys(
        ("bboxhuman", "bboxobject", "connection"), nothing
    )
    bare = hoi(1) | {"connection": nothing}
    images = image("a.jpg", hidden), image("b.jpg"), image("c.jpg", hoi(1), hidden, bare)
    a, b, c = hicodet.load_split(write(tmp_path, *images), "test")
    assert a.pairs == a.hois == b.pairs == b.hois == ()
    assert a.known_objects == {"horse"} and b.known_objects == frozenset()
    assert [pair.hoi_id for pair in c.pairs] == [0]
    assert c.known_objects == {"airplane", "horse"}


def test_known_objects_come_from_the_image_level_labels(tmp_path):
    root = write(tmp_path, image("a.jpg", hoi(1)), image("b.jpg", hoi(2)))
    labels = np.full((600, 2), np.nan)  # not asked
    labels[0] = [-1, 1]  # airplane: no, yes
    labels[RIDE_HORSE] = [1, 0]  # horse: yes, ambiguous
    write_labels(root, ["b.jpg", "a.jpg"], labels)  # another order than anno_bbox.mat's
    a, b = hicodet.load_split(root, "test")
    assert a.known_objects == {"airplane"} and b.known_objects == {"horse"}


def test_training_counts(tmp_path):
    entry = hoi(3, connection=[[1, 1], [1, 1]])
    hidden = hoi(3, invis=1)
    counts = hicodet.training_counts(write(tmp_path, image("a", entry), image("b", hidden, entry)))
    assert counts[2] == 4 and sum(counts) == 4 and len(counts) == 600


NO_ID = {name: value for name, value in hoi(1).items() if name != "id"}
WRONG_IMAGES = {
    "field id: 0 ": image("a", hoi(0)),
    "field id: 601 ": image("a", hoi(601)),
    "field id: 1.5 ": image("a", hoi(1.5)),
    "no field of name id": image("a", NO_ID),
    r"field connection: \(2, 1\) points beyond 1 human and 1 object": image("a", hoi(1, [[2, 1]])),
    r"field connection: \(1, 0\) points": image("a", hoi(1, [[1, 0]])),
    r"field connection: \(1.5, 1\)": image("a", hoi(1) | {"connection": np.array([[1.5, 1]])}),
    r"field connection: uint8 \(1, 3\)": image("a", hoi(1, [[1, 1, 1]])),
    "field y1: nan is not finite": image("a", hoi(1, humans=[box(1, np.nan, 2, 2, float)])),
    "field x1": image("a", hoi(1) | {"bboxhuman": np.array([[1.0, 2.0, 3.0, 4.0]])}),
    "field size": image("a", hoi(1), size=(0, 480)),
    "no field of name size": {"filename": "a", "hoi": struct(hoi(1))},
    "field filename": image(np.zeros((0, 0)), hoi(1)),
    "field width": image("a", hoi(1)) | {"size": np.array([[640, 480]])},
}


@pytest.mark.parametrize("message", WRONG_IMAGES)
def test_wrong_annotation_is_named(tmp_path, message):
    with pytest.raises(ValueError, match=message) as caught:
        hicodet.load_split(write(tmp_path, WRONG_IMAGES[message]), "test")
    where = f"{tmp_path / 'anno_bbox.mat'}, bbox_test(1): "
    assert str(caught.value).startswith(where) and "hico_20160224_det" in str(caught.value)


def test_wrong_files_are_named(tmp_path):
    good = image("a.jpg", hoi(1))
    with pytest.raises(FileNotFoundError, match="anno_bbox.mat is missing"):
        hicodet.load_split(tmp_path, "test")
    with pytest.raises(ValueError, match="not 'val'"):
        hicodet.load_split(write(tmp_path, good), "val")
    with pytest.raises(ValueError, match=r"bbox_test\(2\): field filename: a.jpg .* second time"):
        hicodet.load_split(write(tmp_path, good, good), "test")
    with pytest.raises(ValueError, match="no variable bbox_test"):
        hicodet.load_split(write(tmp_path, good, bbox_test=None), "test")
    swapped = (hicodet.PAIRS[1], hicodet.PAIRS[0], *hicodet.PAIRS[2:])
    for actions in (swapped, hicodet.PAIRS[:599], [("fly", "kite"), *hicodet.PAIRS[1:]]):
        with pytest.raises(ValueError, match="list_action: not the 600 HOI classes"):
            hicodet.load_split(write(tmp_path, good, actions=actions), "test")
    whole = (write(tmp_path, good) / "anno_bbox.mat").read_bytes()
    for content in (b"", b"<html>not found</html>" * 50, whole[: len(whole) // 2], whole[:200]):
        (tmp_path / "anno_bbox.mat").write_bytes(content)
        with pytest.raises(ValueError, match="anno_bbox.mat is not a readable .mat file"):
            hicodet.load_split(tmp_path, "test")


def test_labels_of_other_images_are_refused(tmp_path):
    root = write(tmp_path, image("a.jpg", hoi(1)))
    write_labels(root, ["b.jpg"], np.ones((600, 1)))
    with pytest.raises(ValueError, match="a.jpg is not in the list of anno.mat"):
        hicodet.load_split(root, "test")
    write_labels(root, ["a.jpg"], np.ones((600, 2)))
    with pytest.raises(ValueError, match=r"anno.mat: anno_test has shape \(600, 2\)"):
        hicodet.load_split(root, "test")


def test_require_images(tmp_path):
    samples = hicodet.load_split(write(tmp_path, image("a.jpg"), image("b.jpg")), "test")
    with pytest.raises(FileNotFoundError, match="2 images are missing, first .*a.jpg"):
        hicodet.require_images(samples)
    for sample in samples:
        sample.path.parent.mkdir(parents=True, exist_ok=True)
        sample.path.touch()
    hicodet.require_images(samples)


def test_real_annotations(real_samples):
    assert len(real_samples) == 9658
    assert sum(bool(sample.pairs) for sample in real_samples) == 9546
    assert sum(len(sample.pairs) for sample in real_samples) == 33405
    # First image: human boxes (320, 306)-(359, 349), (270, 303)-(311, 350) and one bench, from 1.
    first = real_samples[0]
    bench = (147, 344, 375, 413)
    humans = (319, 305, 358, 348), (269, 302, 310, 349)
    assert first.pairs == tuple(Pair(human, bench, 245) for human in humans)
    assert (first.width, first.height, first.known_objects) == (640, 427, {"bench"})
    counts = hicodet.training_counts(HICO_DET)
    assert sum(counts) == 117871 and sum(count < 10 for count in counts) == 138


def test_real_merging(real_samples):
    hois = [hoi for sample in real_samples for hoi in sample.hois]
    # With widths counted as x2 - x1 + 1 there would be 22,145.
    assert len(hois) == 22221
    assert sum(len(hoi.verbs) for hoi in hois) == 33405  # every pair is in one instance
    assert all(len(set(hoi.verbs)) == len(hoi.verbs) for hoi in hois)
    assert max(len(sample.hois) for sample in real_samples) == 161


def test_iou():
    # 10 x 10 and 10 x 10, shifted by 5: shared 5 x 10 = 50 of 100 + 100 - 50 = 150.
    assert hicodet.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert hicodet.iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert hicodet.iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0  # they touch
    assert hicodet.iou((5, 5, 5, 9), (0, 0, 10, 10)) == 0  # empty
    assert hicodet.iou((10, 10, 0, 0), (10, 10, 0, 0)) == 0  # inverted
    for side in (1e300, 1e-300):
        assert hicodet.iou((0, 0, side, side), (0, 0, side, side)) == 0  # area inf, and 0
    assert hicodet.iou((-1e308, -1e308, 1e308, 1e308), (0, 0, 1, 1)) == 0


def test_iou_counts_cells():
    rng = np.random.default_rng()
    for _ in range(300):
        a, b = (tuple(map(float, rng.integers(0, 12, 4))) for _ in range(2))
        rows, columns = np.mgrid[0:12, 0:12]
        in_a, in_b = (
            (columns >= x1) & (columns < x2) & (rows >= y1) & (rows < y2)
            for x1, y1, x2, y2 in (a, b)
        )
        expected = (in_a & in_b).sum() / max((in_a | in_b).sum(), 1)
        assert hicodet.iou(a, b) == hicodet.iou(b, a) == pytest.approx(expected), (a, b)


def shifted(box, by):
    return box[0] + by, box[1], box[2] + by, box[3]


def test_merging_joins_verbs_on_overlapping_boxes():
    pairs = [
        Pair(PERSON, BICYCLE, RIDE_BICYCLE),
        Pair(shifted(PERSON, 4), shifted(BICYCLE, 4), SIT_ON_BICYCLE),
        Pair(PERSON, BICYCLE, RIDE_HORSE),
    ]
    ride = HOI(PERSON, BICYCLE, "bicycle", ("ride", "sit on"))  # boxes of the first
    assert hicodet.merge_pairs(pairs) == (ride, HOI(PERSON, BICYCLE, "horse", ("ride",)))
    assert hicodet.merge_pairs([]) == ()


def test_merging_needs_both_boxes_and_another_verb():
    far = shifted(PERSON, 500), shifted(BICYCLE, 500)
    for human, obj in ((far[0], BICYCLE), (PERSON, far[1]), far):
        pairs = [Pair(PERSON, BICYCLE, RIDE_BICYCLE), Pair(human, obj, SIT_ON_BICYCLE)]
        assert len(hicodet.merge_pairs(pairs)) == 2
    assert len(hicodet.merge_pairs([Pair(PERSON, BICYCLE, RIDE_BICYCLE)] * 2)) == 2
    # (0, 0, 10, 10) and (0, 0, 10, 5) share 50 of 100: exactly 0.5 is not enough.
    half = Pair((0, 0, 10, 5), BICYCLE, SIT_ON_BICYCLE)
    assert len(hicodet.merge_pairs([Pair((0, 0, 10, 10), BICYCLE, RIDE_BICYCLE), half])) == 2


def test_merging_prefers_the_best_overlap_and_then_the_earliest():
    # Width 40, shifted by 8: 32 / 48 = 0.67; by 2: 38 / 42 = 0.90.
    left, right = shifted(PERSON, -8), shifted(PERSON, 2)
    pairs = [Pair(left, BICYCLE, RIDE_BICYCLE), Pair(right, BICYCLE, RIDE_BICYCLE)]
    pairs.append(Pair(PERSON, BICYCLE, SIT_ON_BICYCLE))
    assert [hoi.verbs for hoi in hicodet.merge_pairs(pairs)] == [("ride",), ("ride", "sit on")]
    # The next verb prefers that instance too, and a second "sit on" is left for the other.
    pairs += [Pair(PERSON, BICYCLE, HOLD_BICYCLE), Pair(PERSON, BICYCLE, SIT_ON_BICYCLE)]
    assert [hoi.verbs for hoi in hicodet.merge_pairs(pairs)] == [
        ("ride", "sit on"), ("ride", "sit on", "hold"),
    ]  # fmt: skip
    same = [Pair(PERSON, BICYCLE, RIDE_BICYCLE)] * 2 + [Pair(PERSON, BICYCLE, SIT_ON_BICYCLE)]
    assert [hoi.verbs for hoi in hicodet.merge_pairs(same)] == [("ride", "sit on"), ("ride",)]


def test_smart_resize_equals_the_image_processor():
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as reference

    rng = random.Random()
    for _ in range(2000):
        height, width = (round(2 ** rng.uniform(0, 12.5)) for _ in range(2))
        low = rng.choice([3136, 28 * 28, rng.randrange(784, 400_000)])
        high = low + rng.randrange(0, 2_000_000)
        arguments = height, width, rng.choice([28, 28, 14, 32]), low, high
        if max(height, width) / min(height, width) > 200:
            with pytest.raises(ValueError, match=f"{width} x {height}.*200 times"):
                hicodet.smart_resize(*arguments)
        else:
            assert hicodet.smart_resize(*arguments) == reference.smart_resize(*arguments), arguments
    processor = reference.Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=100_000)
    for width, height in ((640, 427), (30, 500), (9, 9), (1000, 20)):
        grid = processor(Image.new("RGB", (width, height)))["image_grid_thw"][0].tolist()
        size = hicodet.smart_resize(height, width, 28, 3136, 100_000)
        assert size == (grid[1] * 14, grid[2] * 14)


def test_frames():
    # 640 x 427 becomes 644 x 420: x times 644 / 640, y times 420 / 427.
    size, model = (640, 427), (644, 420)
    assert hicodet.smart_resize(427, 640, **QWEN_PIXELS) == (420, 644)
    there = hicodet.to_model_frame((320, 305, 640, 427), size, model)
    assert there == pytest.approx((322, 300, 644, 420))
    assert hicodet.to_image_frame(there, size, model) == pytest.approx((320, 305, 639, 426))
    assert hicodet.to_image_frame((-5, -1e308, 1e308, 999), size, model) == (0, 0, 639, 426)
    rng = random.Random()
    for _ in range(100):
        box = tuple(rng.uniform(0, side - 1) for side in size * 2)
        back = hicodet.to_image_frame(hicodet.to_model_frame(box, size, model), size, model)
        assert back == pytest.approx(box)


def test_fig4_prompt():
    lines = hicodet.prompt_text().splitlines()
    assert lines[0] == "You are an HOI detection model. Follow this exact structure:"
    assert lines[1] == "<VALID OBJECT CLASSES>:"
    assert lines[2].startswith("<object class>:person, bicycle, car, motorcycle, airplane, bus, ")
    assert lines[3] == "<VALID INTERACTIONS> (object: allowed_verbs):"
    assert lines[4] == "<object class>: <verb class>, <verb class>, ..."
    assert lines[5] == (
        "airplane: board, direct, exit, fly, inspect, load, ride, sit on, wash, no interaction"
    )
    assert lines[6] == (
        "bicycle: carry, hold, inspect, jump, hop on, park, push, repair, ride, sit on, "
        "straddle, walk, wash, no interaction"
    )
    assert lines[85] == "Thinking Process:"
    assert lines[89].startswith("4. Find existing <verb class> combinations from <VALID INTER")
    assert lines[90] == "EXAMPLE OUTPUT FORMAT:"
    assert lines[91] == "<think> reasoning process here </think>"
    assert (lines[92], lines[-1]) == ("<answer>", "</answer>")
    listed = [(verb, row[0]) for line in lines[5:85] if (row := line.split(": "))
              for verb in row[1].split(", ")]  # fmt: skip
    assert tuple(listed) == hicodet.PAIRS


def test_prompt_ablations_of_table_2():
    for thinking in (True, False):
        for task_description in (True, False):
            text = hicodet.prompt_text(thinking=thinking, task_description=task_description)
            assert ("Thinking Process" in text) == ("<think>" in text) == thinking
            assert ("You are an HOI" in text) == ("airplane" in text) == task_description
            assert text.count("Follow this exact structure:\n") == 1
            assert "EXAMPLE OUTPUT FORMAT:" in text and text.endswith("\n]\n</answer>")
            assert not hicodet.parse_completion(text).instances  # an echo earns nothing


def test_prompt_and_answers_in_real_tokens(tokenizer, real_samples):
    template = json.loads((QWEN / "chat_template.json").read_text())["chat_template"]
    content = [{"type": "image"}, {"type": "text", "text": hicodet.prompt_text()}]
    turns = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template,
        add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    assert len(tokenizer(turns)["input_ids"]) == 1966
    answers = [answer_in_model_frame(s)[0] for s in real_samples[:1000] if s.hois]
    lengths = [len(tokens) for tokens in tokenizer(answers)["input_ids"]]
    assert 135 < sum(lengths) / len(lengths) < 150


def in_model_frame(sample):
    """The sample's instances and the (width, height) that they are written for."""
    size = sample.width, sample.height
    model = hicodet.smart_resize(sample.height, sample.width, **QWEN_PIXELS)[::-1]
    to_model = hicodet.to_model_frame
    return [
        HOI(to_model(hoi.human, size, model), to_model(hoi.object, size, model),
            hoi.object_class, hoi.verbs)
        for hoi in sample.hois
    ], model  # fmt: skip


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


def test_truth_written_as_text_scores_99_66_map(real_samples):
    predictions = []
    for sample in real_samples:
        text, model = answer_in_model_frame(sample)
        instances = hicodet.predicted_instances(
            hicodet.parse_completion(text), (sample.width, sample.height), model
        )
        predictions.append({"file_name": sample.file_name, "instances": instances})
    counts = hicodet.training_counts(HICO_DET)
    result = evaluate.evaluate(predictions, real_samples, counts)
    assert result["default"]["full"] >= 0.996


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
    "[7]": (*NOTHING, 0),
    "[null]": (*NOTHING, 0),
    '["ride"]': (*NOTHING, 0),
    "[[1, 2, 3, 4]]": (*NOTHING, 0),
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
    '[{"human": {"x1": 1}}]': (*NOTHING, 1),
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


LISTS = {
    "": (False, 0),
    "[{}]": (False, 0),
    "<answer>": (True, 0),
    "<answer> none </answer>": (True, 0),
    "<answer> </answer> [{}]": (True, 0),  # a list after the closing tag is no answer
    "<answer> {} </answer>": (True, 0),
    "<answer> [] </answer>": (True, 0),
    "<ANSWER> [{}]": (False, 0),
    "<answer>```json\n[{}, {}]\n```</answer>": (True, 2),
    "<answer> [,{} {},\n\t\r,{},] </answer>": (True, 3),
    "<answer> [{}, {}": (True, 2),  # cut
    '<answer> [{}, {"human": [1, 2': (True, 1),
    '<answer> [{}, {"object class": "bic': (True, 1),
    "<answer> [{}, {'human': 1}, {}]": (True, 1),  # no JSON from there on
    "<answer> [{}] [{}, {}] </answer>": (True, 1),
    "<answer> [{}] </answer> <answer> [{}, {}] </answer>": (True, 2),
    "an <answer> tag, <answer> [{}] </answer>": (True, 1),
    "<answer> [{}] </answer> in <answer> tags": (True, 0),
    "<answer> " + "[" * 100_000: (True, 0),
    "<answer> [{}, " + '{"a":' * 100_000: (True, 1),
    "<answer> [{}, " + "[" * 100_000 + "]" * 100_000 + "]": (True, 1),
    "<answer> [" + "[" * 900 + "]" * 900 + ", {}]": (True, 2),
}


@pytest.mark.parametrize("text", LISTS, ids=lambda text: text[:40])
def test_parser_on_lists(text):
    completion = hicodet.parse_completion(text)
    assert (completion.has_answer, len(completion.instances)) == LISTS[text]
    assert not completion.has_think
    assert hicodet.parse_completion("<think>" + text).has_think


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
        "-", "0", "9" * 5000, "\x00", "\ud800", "自転車", "é", "'", RIDER_TEXT,
        hicodet.prompt_text(),
    ]  # fmt: skip
    for _ in range(1500):
        text = "".join(rng.choices(pieces, k=rng.randrange(40)))
        if rng.random() < 0.8:
            text = "<answer> [" + text
        completion = hicodet.parse_completion(text)
        assert completion.has_answer == ("<answer>" in text)
        for found in completion.instances:
            assert text[slice(*found.span)].strip()
            assert all(verb == verb.strip() != "" for verb in found.verbs)
        for line in hicodet.predicted_instances(completion, (640, 480), (644, 476)):
            json.dumps(line, allow_nan=False).encode()  # finite, and free of lone surrogates
    for _ in range(300):
        kept = list(hicodet.format_completion([RIDER] * 2, "Two."))
        for _ in range(rng.randrange(1, 9)):
            kept[rng.randrange(len(kept))] = rng.choice(pieces)
        hicodet.parse_completion("".join(kept))


@pytest.mark.parametrize(
    "unit", ["<answer>", "<answer>[", "[", '{"a":', "{},", '"', ",", "9", "\\", '{"a":1,', "]["]
)
def test_parser_takes_linear_time(unit):
    # Half a megabyte takes under a second; a quadratic parser would take many minutes.
    text = "<answer> [" + unit * (500_000 // len(unit))
    start = time.monotonic()
    hicodet.parse_completion(text)
    assert time.monotonic() - start < 20


def test_predicted_instances():
    def answer(**changes):
        keys = json.loads(RIDER_TEXT) | {k.replace("_", " "): v for k, v in changes.items()}
        return json.dumps(keys)

    good = answer(human=[10, 20, 2000, 40], verb_class="ride, fly, ride, sit on")
    answers = [
        answer(object_class="unicorn"), good, answer(human=[1, 2, 3]), answer(object=None),
        answer(verb_class="fly"), answer(verb_class=""), "3", answer(object_class="Bicycle"),
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


def test_drawing():
    picture = Image.new("RGB", (600, 500), "white")
    before = picture.copy()
    hoi = HOI((50, 60, 200, 400), (300, 100, 500, 300), "bicycle", ("ride", "sit on"))
    drawn = hicodet.draw_hois(picture, [hoi])
    assert ImageChops.difference(picture, before).getbbox() is None  # the argument is as it was
    assert drawn.size == picture.size
    colour = hicodet.OBJECT_COLOURS[0]
    assert drawn.getpixel((50, 60)) == drawn.getpixel((200, 400)) == hicodet.HUMAN_COLOUR
    assert drawn.getpixel((300, 200)) == drawn.getpixel((400, 100)) == colour
    # The line runs from (125, 230) to (400, 200); its middle is (262.5, 215).
    assert colour in {drawn.getpixel((262, y)) for y in (214, 215, 216)}
    label = drawn.crop((250, 301, 550, 350))  # below the object: its colour, and white letters
    counts = {rgb: count for count, rgb in label.getcolors(maxcolors=label.width * label.height)}
    assert counts[colour] > 1500 and counts[255, 255, 255] > 100
    assert drawn.getpixel((20, 480)) == (255, 255, 255)


def test_drawing_enlarges_small_pictures_and_adds_a_caption():
    hoi = HOI((1, 2, 10, 30), (90, 2, 5, 70), "dog", hicodet.VERBS)  # inverted; a very long label
    for mode in ("L", "RGBA", "P"):
        small = Image.new(mode, (112, 80))
        assert hicodet.draw_hois(small, [hoi] * 30).size == (672, 480)
        captioned = hicodet.draw_hois(small, [], caption="Two people.\n自転車 \ud800\x00" * 9)
        assert captioned.width == 672 and captioned.height > 500
        assert captioned.getpixel((671, captioned.height - 1)) == (255, 255, 255)
    assert hicodet.draw_hois(small, [hoi], min_side=80).size == small.size
