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

import hicodet
from demo import scenes, toy
from teacher import template_trace

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


def layout_of(sample):
    (hoi,) = sample.hois
    return hoi.human, hoi.object, hoi.object_class, hoi.verbs


def prompt_ids(tokenizer, image_tokens=16):
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
        samples = hicodet.load_split(folder / "data", split)
        hicodet.require_images(samples)
        assert len(samples) == count
        for sample in samples:
            assert Image.open(sample.path).size == (sample.width, sample.height) == (112, 112)


def test_a_scene_is_one_instance_on_the_grid_with_one_pair_a_verb(folder):
    kinds = {(kind.object_class, kind.verbs) for kind in scenes.KINDS + scenes.RARE}
    moved = 0
    for sample in hicodet.load_split(folder / "data", "test"):
        (hoi,) = sample.hois
        assert (hoi.object_class, hoi.verbs) in kinds
        assert all(value % 7 == 0 and 0 <= value <= 105 for value in hoi.human + hoi.object)
        names = [hicodet.PAIRS[pair.hoi_id] for pair in sample.pairs]
        assert names == [(verb, hoi.object_class) for verb in hoi.verbs]
        moved += any((pair.human, pair.object) != (hoi.human, hoi.object) for pair in sample.pairs)
    assert moved  # second verbs come with other boxes, so the merging has something to do


def test_boxes_are_where_things_are_drawn(folder):
    """Fails when boxes are a pixel off, have x and y swapped, or belong to another image."""
    background = scenes.background().astype(int)
    for sample in hicodet.load_split(folder / "data", "test"):
        (hoi,) = sample.hois
        pixels = np.asarray(Image.open(sample.path)).astype(int)
        drawn = np.abs(pixels - background).max(axis=2) > 40  # more than JPEG's ringing
        both = np.array([hoi.human, hoi.object])
        union = (*both[:, :2].min(axis=0), *both[:, 2:].max(axis=0))
        # JPEG blurs a rim, and its colour may come close to the background's.
        assert bounds(drawn) == pytest.approx(union, abs=2)
        skin = drawn & (np.abs(pixels - SKIN).max(axis=2) < 30)
        left, top, right, _ = bounds(skin)
        assert (left, top, right) == pytest.approx(hoi.human[:3], abs=1)


def test_the_image_says_where_a_box_is_to_the_pixel():
    scene = scenes.Scene(scenes.KINDS[1], (14, 21, 42, 63), (42, 35, 84, 63))
    image = np.asarray(scenes.draw_scene(scene, np.random.default_rng()))
    assert bounds((image != scenes.background()).any(axis=2)) == (14, 21, 84, 63)


def test_no_test_layout_is_in_train(folder):
    train = {layout_of(sample) for sample in hicodet.load_split(folder / "data", "train")}
    test = {layout_of(sample) for sample in hicodet.load_split(folder / "data", "test")}
    assert test and not train & test
    seeds = random.sample(range(10**6), 2)  # and not across seeds either
    assert not (set(scenes.make_scenes("train", 2000, seeds[0]))
                & set(scenes.make_scenes("test", 500, seeds[1])))


def test_rare_kinds_are_rare_in_train_and_ordinary_in_test():
    train = Counter(scene.kind for scene in scenes.make_scenes("train", 2000, seed=0))
    test = Counter(scene.kind for scene in scenes.make_scenes("test", 330, seed=0))
    assert [train[kind] for kind in scenes.RARE] == [8, 8]
    assert min(train[kind] for kind in scenes.KINDS) > 200  # (2000 - 16) / 9 kinds = 220
    assert all(30 <= test[kind] <= 31 for kind in scenes.KINDS + scenes.RARE)  # 330 / 11 kinds


@pytest.mark.parametrize("kind", scenes.KINDS + scenes.RARE)
def test_kinds_are_hico_pairs_in_hico_order_with_layouts_in_both_halves(kind):
    ids = [hicodet.PAIRS.index((verb, kind.object_class)) for verb in kind.verbs]
    assert ids == sorted(ids)
    halves = Counter(scenes.is_test_layout(scene) for scene in scenes.layouts(kind))
    assert min(halves[True], halves[False]) >= 50


def test_an_invisible_interaction_is_no_truth_but_marks_the_known_object(folder):
    bbox = loadmat(folder / "data" / "anno_bbox.mat")["bbox_train"][0]
    hidden = [i for i, image in enumerate(bbox) if any(h["invis"] for h in image["hoi"][0])]
    assert hidden
    samples = hicodet.load_split(folder / "data", "train")
    for i in hidden:
        assert "bicycle" in samples[i].known_objects
        assert all(hicodet.PAIRS[pair.hoi_id][0] != "repair" for pair in samples[i].pairs)


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
    ours, again = (hicodet.load_split(root, "test") for root in (folder / "data", tmp_path))
    assert [layout_of(sample) for sample in ours] == [layout_of(sample) for sample in again]
    assert ours[7].path.read_bytes() == again[7].path.read_bytes()
    assert scenes.make_scenes("train", 50, 3) != scenes.make_scenes("train", 50, 4)


def test_the_model_folder_loads_and_reads_an_image(folder, tokenizer):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model")
    processor = AutoImageProcessor.from_pretrained(folder / "model")
    images = processor(images=[Image.new("RGB", (112, 112))], return_tensors="pt")
    assert images["image_grid_thw"].tolist() == [[1, 8, 8]]  # 112 / 14 = 8 patches a side
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
    assert len(prompt_ids(tokenizer)) <= 52  # 16 of them image tokens
    for sample in hicodet.load_split(folder / "data", "train"):
        text = hicodet.format_completion(sample.hois, think=template_trace(sample.hois))
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert len(ids) <= 28
        coordinates = [tokenizer.decode([i]).strip(", ") for i in ids]
        assert sum(c.isdigit() for c in coordinates) == 1 + 8  # "1 person" and two boxes


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
