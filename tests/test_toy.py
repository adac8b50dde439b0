"""The toy's files: layout, boxes on what is drawn, separate halves, a model folder that loads."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, whosmat
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

import hicodet
from demo import grounding, scenes, toy
from engine.data import annotations
from engine.traces.trace_file import read_traces

OFFICIAL = Path(__file__).resolve().parents[2] / "shared" / "hico_det"
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


def layouts_of(scenes_or_samples):
    """All pairs, with x counted from the left side of their panel."""
    found = set()
    for hoi in (hoi for scene in scenes_or_samples for hoi in scene.hois):
        left = min(hoi.human[0], hoi.object[0]) // scenes.SIDE * scenes.SIDE
        boxes = (scenes.moved(box, -left) for box in (hoi.human, hoi.object))
        found.add(hicodet.HOI(*boxes, hoi.object_class, hoi.verbs))
    return found


def bounds(mask):
    """Inclusive x1, y1, x2, y2 of the true pixels."""
    ys, xs = np.nonzero(mask)
    return xs.min(), ys.min(), xs.max(), ys.max()


# drawings and annotations


def test_held_out_half_is_annotated_completely(folder):
    """The .mat file holds every pair of every scene, and merging restores its verbs (Sec. 4.2)."""
    samples = annotations.load_split(folder / "data", "test")
    drawn = scenes.make_scenes("test", TEST, seed=3)
    for sample, scene in zip(samples, drawn, strict=True):
        assert set(sample.hois) == set(scene.hois) and len(sample.hois) == len(scene.hois)
        assert len(sample.pairs) == sum(len(hoi.verbs) for hoi in scene.hois)
        assert Image.open(sample.path).size == (sample.width, sample.height) == (224, 112)
    assert any((pair.human, pair.object) not in [(hoi.human, hoi.object) for hoi in sample.hois]
               for sample in samples for pair in sample.pairs)  # the merging has something to do


def test_training_half_misses_pairs_at_the_rate_but_never_the_first(tmp_path):
    drawn = scenes.make_scenes("train", 150, seed=5)
    second, found = sum(len(scene.hois) - 1 for scene in drawn), {}
    for left_out in ("0", "0.55", "1"):
        root = tmp_path / left_out
        toy.write_data(root, 150, 1, seed=5, left_out=float(left_out))
        samples = annotations.load_split(root, "train")
        for sample, scene in zip(samples, drawn, strict=True):
            assert scene.hois[0] in sample.hois and set(sample.hois) <= set(scene.hois)
        found[left_out] = sum(len(sample.hois) - 1 for sample in samples)
    assert found["0"] == second and found["1"] == 0
    assert found["0.55"] == pytest.approx(0.45 * second, abs=22)  # four standard deviations
    name = "images/train2015/HICO_train2015_00000150.jpg"  # the images do not depend on the rate
    assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_boxes_are_where_things_are_drawn(folder):
    """Fails if boxes are some pixels off, have x and y swapped, or belong to another image."""
    background = scenes.background(224).astype(int)
    drawn_scenes = scenes.make_scenes("test", TEST, seed=3)
    for sample, scene in zip(annotations.load_split(folder / "data", "test"), drawn_scenes):
        pixels = np.asarray(Image.open(sample.path)).astype(int)
        drawn = np.abs(pixels - background).max(axis=2) > 40  # more than JPEG's ringing
        boxes = [box for hoi in sample.hois for box in (hoi.human, hoi.object)]
        both = np.array(boxes + list(scene.bystanders))
        union = (*both[:, :2].min(axis=0), *both[:, 2:].max(axis=0))
        # JPEG blurs a rim, and its colour may be close to the background's
        assert bounds(drawn) == pytest.approx(union, abs=2)
        skin = drawn & (np.abs(pixels - SKIN).max(axis=2) < 30)
        for left, top, right, bottom in scene.people:
            near = max(left - 3, 0)
            found = bounds(skin[:, near : right + 4])
            assert found[:3:2] == pytest.approx((left - near, right - near), abs=2)


def test_no_test_layout_is_in_the_training_half(folder):
    halves = (annotations.load_split(folder / "data", split) for split in ("train", "test"))
    train, test = map(layouts_of, halves)
    assert test and not train & test
    seeds = random.sample(range(10**6), 2)  # and not across seeds either
    assert not (layouts_of(scenes.make_scenes("train", 2000, seeds[0]))
                & layouts_of(scenes.make_scenes("test", 500, seeds[1], pairs=3)))


def test_drawings_of_a_seed_stay_the_same():
    """The base model and the study were made with these drawings: compared by a hash."""
    assert scenes.make_scenes("train", 50, 3) != scenes.make_scenes("train", 50, 4)
    drawn, colours = scenes.make_scenes("train", 20, seed=3, pairs=3), np.random.default_rng(0)
    pixels = b"".join(scenes.draw_scene(scene, colours).tobytes() for scene in drawn)
    assert hashlib.sha256(repr(drawn).encode() + pixels).hexdigest()[:16] == "83ac5621dbe9294e"


def test_invisible_interaction_is_not_true_but_its_object_is_known(folder):
    bbox = loadmat(folder / "data" / "anno_bbox.mat")["bbox_train"][0]
    hidden = [i for i, image in enumerate(bbox) if any(h["invis"] for h in image["hoi"][0])]
    samples = annotations.load_split(folder / "data", "train")
    assert hidden and all("bicycle" in samples[i].known_objects for i in hidden)
    pairs = [pair for i in hidden for pair in samples[i].pairs]
    assert all(hicodet.HOI_CLASSES[pair.hoi_id][0] != "repair" for pair in pairs)


def field_names(array):
    """The field names of a struct array and, below them, of the first element's fields."""
    if array.dtype.names is None or not array.size:
        return None
    return {name: field_names(array.ravel()[0][name]) for name in array.dtype.names}


def test_files_have_the_fields_of_the_official_ones(folder):
    if not OFFICIAL.is_dir():
        pytest.skip(f"no HICO-DET annotations in {OFFICIAL}")
    roots = folder / "data", OFFICIAL
    counts = {TRAIN, TEST, 600, 9658}  # of images, which may differ
    for name in ("anno_bbox.mat", "anno.mat"):
        ours, theirs = ({(key, tuple(n for n in shape if n not in counts))
                         for key, shape, _ in whosmat(root / name)} for root in roots)
        assert ours == theirs
    ours, theirs = (loadmat(root / "anno_bbox.mat") for root in roots)
    assert ours["list_action"].shape == theirs["list_action"].shape == (600, 1)
    for key in ("bbox_train", "list_action"):
        assert field_names(ours[key]) == field_names(theirs[key])


# what the base model learns


def test_grounding_names_every_person_and_object_from_left_to_right():
    """A rider of a bicycle with a ball in hand, who is listed once, and a bystander."""
    rider = (112, 14, 140, 70)
    hois = (hicodet.HOI(rider, (112, 42, 154, 70), "bicycle", ("ride", "sit on")),
            hicodet.HOI(rider, (140, 14, 168, 42), "sports ball", ("hold",)))
    text = grounding.grounding_text(scenes.Scene(224, hois, ((0, 28, 28, 70),)))
    assert text.splitlines()[1] == '\t{"bbox_2d": [0, 28, 28, 70], "label": "person"},'
    assert [(thing["bbox_2d"], thing["label"]) for thing in json.loads(text)] == [
        ([0, 28, 28, 70], "person"), ([112, 14, 140, 70], "person"),
        ([112, 42, 154, 70], "bicycle"), ([140, 14, 168, 42], "sports ball")]
    assert grounding.pair_lines(hois[::-1]).splitlines() == [
        "person [112, 14, 140, 70]: ride, sit on bicycle [112, 42, 154, 70]",
        "person [112, 14, 140, 70]: hold sports ball [140, 14, 168, 42]"]


def test_grounding_has_the_pairs_that_annotators_missed(folder):
    texts = read_traces(folder / "grounding.jsonl")
    drawn = scenes.make_scenes("train", TRAIN, seed=3)
    samples = annotations.load_split(folder / "data", "train")
    for sample, scene in zip(samples, drawn, strict=True):
        assert texts[sample.file_name] == grounding.grounding_text(scene)
    assert sum(len(scene.hois) for scene in drawn) > sum(len(sample.hois) for sample in samples)


# model and tokenizer


def test_model_folder_loads_and_reads_an_image(folder, tokenizer):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model")
    processor = AutoImageProcessor.from_pretrained(folder / "model")
    images = processor(images=[Image.new("RGB", (224, 112))], return_tensors="pt")
    assert images["image_grid_thw"].tolist() == [[1, 8, 16]]  # patches of 14, rows first
    ids = tokenizer("<|image_pad|>" * 32 + "a", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids, mm_token_type_ids=(ids == model.config.image_token_id).long(),
                       **images).logits
    assert logits.shape == (1, 33, model.config.text_config.vocab_size)
    assert torch.isfinite(logits).all()
    stop = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == stop
    assert tokenizer.eos_token_id == stop[0] and tokenizer.pad_token_id == stop[1]
    assert len(tokenizer) < model.config.text_config.vocab_size  # padded, as Qwen's is


def test_folder_of_a_run_keeps_its_model(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "run.lock").touch()
    with pytest.raises(SystemExit):
        toy.main([str(tmp_path), "--train", "1", "--test", "1"])
    assert f"{tmp_path}: holds a run; choose another folder" in capsys.readouterr().err
    assert not list((tmp_path / "model").iterdir())


def test_special_tokens_are_single_ids_after_all_others(tokenizer):
    ids = [tokenizer(token).input_ids for token in toy.SPECIAL_TOKENS]
    assert ids == [[len(tokenizer) - len(ids) + i] for i in range(len(ids))]
    text = "<think> é 人 </think>" + "".join(toy.SPECIAL_TOKENS)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text[:20]
