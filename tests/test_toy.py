"""The toy's files: layout, boxes on the drawn things, halves apart, a model folder that loads."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, whosmat
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import engine.traces.trace_file
import hicodet
from demo import grounding, scenes, toy
from engine.data import annotations
from engine.traces.template import template_trace

SHARED = Path(__file__).resolve().parents[2] / "shared" / "hico_det"
SKIN = np.array([255, 200, 160])
TRAIN, TEST = 120, 44


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    toy.main([str(root), "--train", str(TRAIN), "--test", str(TEST), "--seed", "3"])
    return root


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "model")


def in_panel(hoi):
    """The pair with its boxes counted from the left side of its panel."""
    left = min(hoi.human[0], hoi.object[0]) // scenes.SIDE * scenes.SIDE
    boxes = (scenes.moved(box, -left) for box in (hoi.human, hoi.object))
    return hicodet.HOI(*boxes, hoi.object_class, hoi.verbs)


def layouts_of(samples):
    """All pairs of samples, or of scenes, each as it lies in its panel."""
    return {in_panel(hoi) for sample in samples for hoi in sample.hois}


def prompt_ids(tokenizer, image_tokens=32):
    content = [{"type": "image"},
               {"type": "text", "text": hicodet.prompt_text(task_description=False)}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True)
    return tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * image_tokens)).input_ids


def bounds(mask):
    """Inclusive x1, y1, x2, y2 of the true pixels."""
    ys, xs = np.nonzero(mask)
    return xs.min(), ys.min(), xs.max(), ys.max()


def field_names(array):
    """The field names of a struct array and, below them, of the first element's fields."""
    if array.dtype.names is None or not array.size:
        return None
    return {name: field_names(array.ravel()[0][name]) for name in array.dtype.names}


def test_both_halves_load_and_have_their_images(folder):
    for split, count in (("train", TRAIN), ("test", TEST)):
        samples = annotations.load_split(folder / "data", split)
        annotations.require_images(samples)
        assert len(samples) == count
        for sample in samples:
            assert Image.open(sample.path).size == (sample.width, sample.height) == (224, 112)


def test_the_held_out_half_is_annotated_as_it_was_drawn(folder):
    """Every pair of every scene comes back from the .mat file, its verbs merged (Sec. 4.2)."""
    samples = annotations.load_split(folder / "data", "test")
    drawn = scenes.make_scenes("test", TEST, seed=3)
    for sample, scene in zip(samples, drawn, strict=True):
        assert set(sample.hois) == set(scene.hois) and len(sample.hois) == len(scene.hois)
        assert len(sample.pairs) == sum(len(hoi.verbs) for hoi in scene.hois)
    assert any(
        (pair.human, pair.object) not in [(hoi.human, hoi.object) for hoi in sample.hois]
        for sample in samples for pair in sample.pairs)  # so the merging has something to do


def test_pairs_are_of_known_kinds_on_the_grid():
    kinds = {(kind.object_class, kind.verbs) for kind in scenes.KINDS + scenes.RARE}
    for scene in scenes.make_scenes("test", 200, seed=0, pairs=3):
        assert scene.width == 336 and 1 <= len(scene.hois) <= 3
        for hoi in scene.hois:
            assert (hoi.object_class, hoi.verbs) in kinds
            assert all(side % 14 == 0 for side in hoi.human + hoi.object)
            assert max(hoi.human[2], hoi.object[2]) < 336 > 112 > max(hoi.human[3], hoi.object[3])


def test_one_pair_at_most_fills_a_square():
    for scene in scenes.make_scenes("train", 50, seed=0, pairs=1):
        assert scene.width == 112 and len(scene.hois) == 1 and not scene.bystanders


def test_scenes_have_what_hico_det_has():
    """Several of one class, a person with two objects, people who do nothing: at their rates."""
    drawn = scenes.make_scenes("train", 4000, seed=0)
    two = [scene for scene in drawn if len(scene.hois) == 2]
    assert len(two) == pytest.approx(3000, abs=110)  # 0.75 of 4,000, four standard deviations
    shared = [scene for scene in two if scene.hois[0].human == scene.hois[1].human]
    assert 200 < len(shared) < 300  # a tenth of two, less those that find no room for an object
    for scene in shared:
        assert len(scene.people) == 1
        assert hicodet.iou(scene.hois[0].object, scene.hois[1].object) == 0
    # half are of the first one's kind; the others may be, too
    assert sum(a.object_class == b.object_class for a, b in (s.hois for s in two)) > 1400
    bystanders = sum(len(scene.bystanders) for scene in drawn)
    assert bystanders == pytest.approx(500, abs=85)  # half of a quarter
    assert not any(scene.bystanders for scene in two)


def test_the_training_half_misses_pairs_but_never_the_first(tmp_path):
    """Of 150 drawings as many second pairs are there as the rate says; the images are the same."""
    drawn = scenes.make_scenes("train", 150, seed=5)
    second = sum(len(scene.hois) - 1 for scene in drawn)
    found = {}
    for left_out in (0.0, 0.55, 1.0):
        root = tmp_path / str(left_out)
        toy.write_data(root, 150, 1, seed=5, left_out=left_out)
        samples = annotations.load_split(root, "train")
        for sample, scene in zip(samples, drawn, strict=True):
            assert scene.hois[0] in sample.hois and set(sample.hois) <= set(scene.hois)
        found[left_out] = sum(len(sample.hois) - 1 for sample in samples)
    assert found[0.0] == second and found[1.0] == 0
    assert found[0.55] == pytest.approx(0.45 * second, abs=22)  # four standard deviations
    names = [f"images/train2015/HICO_train2015_{n:08d}.jpg" for n in (1, 150)]
    for name in names:
        assert (tmp_path / "0.0" / name).read_bytes() == (tmp_path / "1.0" / name).read_bytes()


def test_complete_is_nothing_left_out(tmp_path):
    toy.main([str(tmp_path), "--train", "60", "--test", "1", "--pairs", "3", "--complete"])
    drawn = scenes.make_scenes("train", 60, seed=0, pairs=3)
    for sample, scene in zip(annotations.load_split(tmp_path / "data", "train"), drawn, strict=True):
        assert set(sample.hois) == set(scene.hois) and len(sample.hois) == len(scene.hois)
        assert Image.open(sample.path).size == (sample.width, sample.height) == (336, 112)


def test_boxes_are_where_things_are_drawn(folder):
    """Fails when boxes are a pixel off, have x and y swapped, or belong to another image."""
    background = scenes.background(224).astype(int)
    drawn_scenes = scenes.make_scenes("test", TEST, seed=3)
    for sample, scene in zip(annotations.load_split(folder / "data", "test"), drawn_scenes):
        pixels = np.asarray(Image.open(sample.path)).astype(int)
        drawn = np.abs(pixels - background).max(axis=2) > 40  # more than JPEG's ringing
        boxes = [box for hoi in sample.hois for box in (hoi.human, hoi.object)]
        both = np.array(boxes + list(scene.bystanders))
        union = (*both[:, :2].min(axis=0), *both[:, 2:].max(axis=0))
        # JPEG blurs a rim, and its colour may come close to the background's.
        assert bounds(drawn) == pytest.approx(union, abs=2)
        skin = drawn & (np.abs(pixels - SKIN).max(axis=2) < 30)
        for left, top, right, bottom in scene.people:
            near = max(left - 3, 0)
            found = bounds(skin[:, near : right + 4])
            assert found[:3:2] == pytest.approx((left - near, right - near), abs=2)


def test_the_image_says_where_a_box_is_to_the_pixel():
    hoi = hicodet.HOI((14, 21, 42, 63), (42, 35, 84, 63), "bicycle", ("hold",))
    for scene, box in ((scenes.Scene(224, (hoi,), ()), (14, 21, 84, 63)),
                       (scenes.Scene(224, (hoi,), ((126, 14, 154, 70),)), (14, 14, 154, 70))):
        image = np.asarray(scenes.draw_scene(scene, np.random.default_rng()))
        assert bounds((image != scenes.background(224)).any(axis=2)) == box


def test_no_test_layout_is_in_train(folder):
    train, test = (layouts_of(annotations.load_split(folder / "data", s)) for s in ("train", "test"))
    assert test and not train & test
    seeds = random.sample(range(10**6), 2)  # and not across seeds either
    assert not (layouts_of(scenes.make_scenes("train", 2000, seeds[0]))
                & layouts_of(scenes.make_scenes("test", 500, seeds[1], pairs=3)))


def test_grounding_names_every_person_and_object_from_left_to_right():
    """A rider of a bicycle with a ball in hand, one person who does nothing; one person twice."""
    rider = (112, 14, 140, 70)
    hois = (hicodet.HOI(rider, (112, 42, 154, 70), "bicycle", ("ride", "sit on")),
            hicodet.HOI(rider, (140, 14, 168, 42), "sports ball", ("hold",)))
    text = grounding.grounding_text(scenes.Scene(224, hois, ((0, 28, 28, 70),)))
    assert text.splitlines()[1] == '\t{"bbox_2d": [0, 28, 28, 70], "label": "person"},'
    assert [(thing["bbox_2d"], thing["label"]) for thing in json.loads(text)] == [
        ([0, 28, 28, 70], "person"), ([112, 14, 140, 70], "person"),
        ([112, 42, 154, 70], "bicycle"), ([140, 14, 168, 42], "sports ball")]


def test_grounding_tells_what_annotators_missed(folder):
    """Of every training image, in the format of traces.jsonl, boxes as the model sees them."""
    texts = engine.traces.trace_file.read_traces(folder / "grounding.jsonl")
    drawn = scenes.make_scenes("train", TRAIN, seed=3)
    samples = annotations.load_split(folder / "data", "train")
    for sample, scene in zip(samples, drawn, strict=True):
        assert texts[sample.file_name] == grounding.grounding_text(scene)
    assert sum(len(scene.hois) for scene in drawn) > sum(len(sample.hois) for sample in samples)


def pair_counts(split, count):
    """How many pairs of each object class and verbs all scenes have, and the first ones alone."""
    drawn = scenes.make_scenes(split, count, seed=0)
    kinds = [[(hoi.object_class, hoi.verbs) for hoi in scene.hois] for scene in drawn]
    return Counter(kind for each in kinds for kind in each), Counter(each[0] for each in kinds)


def test_rare_kinds_are_rare_in_train_and_ordinary_in_test():
    rare, common = ([(kind.object_class, kind.verbs) for kind in group]
                    for group in (scenes.RARE, scenes.KINDS))
    train, _ = pair_counts("train", 2000)
    assert [train[kind] for kind in rare] == [8, 8]
    assert min(train[kind] for kind in common) > 200  # (2000 - 16) / 9 kinds = 220 as first ones
    _, test = pair_counts("test", 330)
    assert all(30 <= test[kind] <= 31 for kind in common + rare)  # 330 / 11 kinds


@pytest.mark.parametrize("kind", scenes.KINDS + scenes.RARE)
def test_kinds_are_hico_pairs_in_hico_order_with_layouts_in_both_halves(kind):
    ids = [hicodet.HOI_CLASSES.index((verb, kind.object_class)) for verb in kind.verbs]
    assert ids == sorted(ids)
    halves = Counter(scenes.is_test_layout(hoi) for hoi in scenes.layouts(kind))
    assert min(halves[True], halves[False]) >= 15


def test_an_invisible_interaction_is_no_truth_but_marks_the_known_object(folder):
    bbox = loadmat(folder / "data" / "anno_bbox.mat")["bbox_train"][0]
    hidden = [i for i, image in enumerate(bbox) if any(h["invis"] for h in image["hoi"][0])]
    assert hidden
    samples = annotations.load_split(folder / "data", "train")
    for i in hidden:
        assert "bicycle" in samples[i].known_objects
        assert all(hicodet.HOI_CLASSES[pair.hoi_id][0] != "repair" for pair in samples[i].pairs)


def test_the_files_have_the_fields_of_the_official_ones(folder):
    if not SHARED.is_dir():
        pytest.skip(f"no HICO-DET annotations in {SHARED}")
    for name in ("anno_bbox.mat", "anno.mat"):
        ours, theirs = whosmat(folder / "data" / name), whosmat(SHARED / name)
        images = {TRAIN, TEST, 600, 9658}  # the sizes that may differ; 600 are the classes, too
        assert {(key, tuple(n for n in shape if n not in images)) for key, shape, _ in ours} == {
            (key, tuple(n for n in shape if n not in images)) for key, shape, _ in theirs}
    ours, theirs = (loadmat(root / "anno_bbox.mat", variable_names=["bbox_train", "list_action"])
                    for root in (folder / "data", SHARED))
    assert ours["list_action"].shape == theirs["list_action"].shape == (600, 1)
    for key in ("bbox_train", "list_action"):
        assert field_names(ours[key]) == field_names(theirs[key])


def test_a_seed_always_writes_the_same(folder, tmp_path):
    toy.write_data(tmp_path, 1, TEST, seed=3)
    ours, again = (annotations.load_split(root, "test") for root in (folder / "data", tmp_path))
    assert [sample.hois for sample in ours] == [sample.hois for sample in again]
    assert ours[7].path.read_bytes() == again[7].path.read_bytes()
    assert scenes.make_scenes("train", 50, 3) != scenes.make_scenes("train", 50, 4)


def test_the_model_folder_loads_and_reads_an_image(folder, tokenizer):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model")
    processor = AutoImageProcessor.from_pretrained(folder / "model")
    images = processor(images=[Image.new("RGB", (224, 112))], return_tensors="pt")
    assert images["image_grid_thw"].tolist() == [[1, 8, 16]]  # patches of 14, rows first
    ids = torch.tensor([prompt_ids(tokenizer)])
    with torch.no_grad():
        logits = model(ids, mm_token_type_ids=(ids == model.config.image_token_id).long(),
                       **images).logits
    assert logits.shape == (1, ids.shape[1], model.config.text_config.vocab_size)
    assert torch.isfinite(logits).all()
    stop = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == stop
    assert tokenizer.eos_token_id == stop[0] and tokenizer.pad_token_id == stop[1]
    assert len(tokenizer) < model.config.text_config.vocab_size  # padded, as Qwen's is


def test_special_tokens_are_single_ids_after_all_others(tokenizer):
    ids = [tokenizer(token).input_ids for token in toy.SPECIAL_TOKENS]
    assert ids == [[len(tokenizer) - len(ids) + i] for i in range(len(ids))]
    text = "<think> a </think>" + "".join(toy.SPECIAL_TOKENS)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text[:18]


def test_the_tokenizer_round_trips_any_text(tokenizer):
    alphabet = [chr(c) for c in (*range(32, 127), 9, 10, 0xE9, 0x4EBA, 0x1F6B2, 0x661)] + [
        "hold", "holding", "sports ball", ", 14", "105", '"}] </answer>', "no interaction"]
    for _ in range(200):
        text = "".join(random.choices(alphabet, k=random.randint(1, 60)))
        assert tokenizer.decode(tokenizer(text).input_ids) == text, repr(text)


def test_prompt_and_completions_are_short(folder, tokenizer):
    assert len(prompt_ids(tokenizer)) <= 76  # 32 of them image tokens
    for sample in annotations.load_split(folder / "data", "test"):
        think = template_trace(sample.hois)
        text = hicodet.format_completion(sample.hois, think=think)
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert len(ids) <= (28 if len(sample.hois) == 1 else 54)
        coordinates = [tokenizer.decode([i]).strip(", ") for i in ids]
        # "1 person" and, for each pair, two boxes
        assert sum(c.isdigit() for c in coordinates) == 1 + 8 * len(sample.hois)
    for text in engine.traces.trace_file.read_traces(folder / "grounding.jsonl").values():
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and len(ids) <= 38  # four things, 9 tokens each


def test_the_chat_template_is_qwens(tokenizer):
    path = SHARED.parent / "qwen2.5-vl" / "chat_template.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    template = json.loads(path.read_text())["chat_template"]
    content = [{"type": "image"}, {"type": "text", "text": "one\ntwo"}]
    for messages in ([{"role": "user", "content": content}],
                     [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
                      {"role": "assistant", "content": "a"}]):
        for start in (True, False):
            ours, theirs = (tokenizer.apply_chat_template(
                messages, chat_template=chosen, tokenize=False, add_generation_prompt=start)
                for chosen in (None, template))
            assert ours == theirs


def test_tiny_model_has_what_hides_bugs_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model, same, other = toy.tiny_model(1), toy.tiny_model(1), toy.tiny_model(2)
    assert torch.rand(1) == expected
    text, vision = model.config.text_config, model.config.vision_config
    assert text.num_key_value_heads < text.num_attention_heads
    assert vision.window_size < scenes.SIDE and len(vision.fullatt_block_indexes) < vision.depth
    weights = [m.get_input_embeddings().weight for m in (model, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("rate", ["-0.1", "1.1", "nan"])
def test_a_rate_that_is_none_is_refused(rate, tmp_path, capsys):
    with pytest.raises(SystemExit):
        toy.main([str(tmp_path / "x"), f"--left-out={rate}"])
    assert "--left-out" in capsys.readouterr().err and not (tmp_path / "x").exists()
