"""A toy HICO-DET and a tiny, randomly initialised Qwen2.5-VL, both in the official formats.

    python -m demo.toy runs/toy --train 4000 --test 500

writes into runs/toy: `data` in the layout of hico_20160224_det (anno_bbox.mat, anno.mat, images),
and `model`, a `save_pretrained` folder with the tokenizer of demo/base_model. So the toy runs
through the same commands as HICO-DET and the 3B model. `grounding.jsonl` lists what each training
image shows, in the format of traces.jsonl. The base model learns from it.

A pair with two verbs is annotated once per HOI class with slightly different boxes, as in HICO-DET.
One image in forty lists an interaction that is not visible. HICO-DET's annotators missed pairs, so
training images lose each pair after the first at a given rate. Test images are annotated
completely, unlike HICO-DET's. The .mat files are 1-based.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.io import savemat
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from demo.grounding import grounding_text
from demo.scenes import SIDE, Scene, draw_scene, make_scenes
from engine.files import naming
from engine.options import Config, option, parse_config, required
from engine.signals import one_line
from hicodet import HOI_CLASSES, Box, InputError

BASE_MODEL = Path(__file__).parent / "base_model"
MAX_PAIRS = 3
INVISIBLE_SHARE = 40  # one image in 40 lists an interaction without boxes
# The special tokens of Qwen2.5-VL in a prompt with an image; they follow all other tokens.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                  "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
# Qwen's chat template without its branches for video and for picture numbers
CHAT_TEMPLATE = (BASE_MODEL / "chat_template.jinja").read_text()
IMAGE_PROCESSOR = {  # preprocessor_config.json of Qwen2.5-VL, with other max_pixels
    "min_pixels": 28 * 28, "max_pixels": MAX_PAIRS * SIDE * SIDE, "patch_size": 14,
    "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
# The demo's model has about a million parameters. With a small rope theta and large initial
# weights it learns boxes in minutes. The model for unit tests has other traits of
# the real model: grouped queries, a windowed vision block, a large rope theta.
TOY_SIZES = {
    "text": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 4, "intermediate_size": 256,
             "rope_parameters": {"rope_theta": 10.0, "mrope_section": [4, 6, 6]}},
    "vision": {"hidden_size": 96, "depth": 2, "num_heads": 4, "intermediate_size": 192,
               "window_size": 112, "fullatt_block_indexes": [0, 1]}}
TINY_SIZES = {
    "text": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 96,
             "rope_parameters": {"rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
    "vision": {"hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 48,
               "window_size": 56, "fullatt_block_indexes": [1]}}
INITIALIZER_RANGE = 0.08


def cells(values: list) -> np.ndarray:
    """(N, 1) object array, which savemat writes as a cell array."""
    array = np.empty((len(values), 1), dtype=object)
    array[:, 0] = values
    return array


def struct(rows: list[dict]) -> np.ndarray:
    """(1, N) structured array, which savemat writes as a struct array."""
    array = np.empty((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for i, row in enumerate(rows):
        array[0, i] = tuple(row.values())
    return array


def box_structs(boxes: list[Box]) -> np.ndarray:
    """Boxes in the format of the official files: 1-based unsigned integers of 16 bits."""
    rows = [[np.uint16(side + 1) for side in box] for box in boxes]
    return struct([{"x1": x1, "x2": x2, "y1": y1, "y2": y2} for x1, y1, x2, y2 in rows])


def jittered(box: Box, width: int, rng: np.random.Generator) -> Box:
    """The box with each side moved by at most a pixel, as if it were annotated separately."""
    last = (width - 1, SIDE - 1) * 2
    return tuple(int(v) for v in np.clip(np.add(box, rng.integers(-1, 2, 4)), 0, last))


def annotate(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The `hoi` struct of one image, one entry for each of its HOI classes."""
    boxes_of: dict[int, list[tuple[Box, Box]]] = {}
    for hoi in scene.hois:
        for verb in hoi.verbs:
            boxes = (hoi.human, hoi.object)
            if verb != hoi.verbs[0]:
                boxes = tuple(jittered(box, scene.width, rng) for box in boxes)
            boxes_of.setdefault(HOI_CLASSES.index((verb, hoi.object_class)) + 1, []).append(boxes)
    rows = []
    for number, boxes in sorted(boxes_of.items()):
        humans, objects = zip(*rng.permutation(boxes).tolist())
        links = np.arange(1, len(boxes) + 1, dtype=np.uint8)
        rows.append({"id": np.uint16(number), "bboxhuman": box_structs(humans),
                     "bboxobject": box_structs(objects),
                     "connection": np.stack([links, links], axis=1), "invis": np.uint8(0)})
    if rng.integers(INVISIBLE_SHARE) == 0:
        nothing = np.empty((0, 0))
        rows.append({"id": np.uint16(HOI_CLASSES.index(("repair", "bicycle")) + 1),
                     "bboxhuman": nothing, "bboxobject": nothing, "connection": nothing,
                     "invis": np.uint8(1)})
    return struct(rows)


def seen_by_annotator(scene: Scene, left_out: float, rng: np.random.Generator) -> Scene:
    """The scene without missed pairs: each pair after the first is missed at the given rate."""
    missed = rng.random(len(scene.hois)) < left_out
    hois = [hoi for i, hoi in enumerate(scene.hois) if i == 0 or not missed[i]]
    return replace(scene, hois=tuple(hois))


def write_split(root: Path, split: str, scenes: list[Scene], left_out: float,
                seed: int) -> tuple[list[str], np.ndarray]:
    """Draw the images of a half. Returns file names and the `bbox_train` or `bbox_test` struct."""
    folder = root / "images" / f"{split}2015"
    folder.mkdir(parents=True, exist_ok=True)
    colors, notes = (np.random.default_rng([seed, n + (split == "test")]) for n in (2, 4))
    names, rows = [], []
    for number, scene in enumerate(scenes, start=1):
        names.append(f"HICO_{split}2015_{number:08d}.jpg")
        draw_scene(scene, colors).save(folder / names[-1], quality=95, subsampling=0)
        size = {"width": np.uint16(scene.width), "height": np.uint16(SIDE), "depth": np.uint8(3)}
        rows.append({"filename": names[-1], "size": struct([size]),
                     "hoi": annotate(seen_by_annotator(scene, left_out, notes), notes)})
    return names, struct(rows)


def image_labels(bbox: np.ndarray) -> np.ndarray:
    """(600, images) int8 of `anno.mat`: 1 where an image shows an HOI class, visible or not."""
    labels = np.full((len(HOI_CLASSES), bbox.shape[1]), -1, np.int8)
    for image, hois in enumerate(bbox["hoi"][0]):
        labels[[hoi["id"] - 1 for hoi in hois[0]], image] = 1
    return labels


def write_data(root: Path, train: int, test: int, seed: int, *, pairs: int = 2,
               left_out: float = 0.55) -> None:
    """Write a folder in the layout of hico_20160224_det, with `train` and `test` images.

    pairs: the most pairs of an image, 1 to 3. left_out: share of the training half's second and
    third pairs that are not annotated. The drawings do not depend on it.
    """
    train_names, bbox_train = write_split(
        root, "train", make_scenes("train", train, seed, pairs), left_out, seed)
    test_names, bbox_test = write_split(
        root, "test", make_scenes("test", test, seed, pairs), 0.0, seed)
    empty = np.empty((0, 0))
    actions = struct([{"nname": name.replace(" ", "_"), "vname": verb.replace(" ", "_"),
                       "vname_ing": verb.replace(" ", "_"), "syn": empty, "def": "",
                       "synset": "", "ex": ""} for verb, name in HOI_CLASSES]).T
    boxes = {"bbox_train": bbox_train, "bbox_test": bbox_test}
    labels = {"list_train": cells(train_names), "list_test": cells(test_names),
              "anno_train": image_labels(bbox_train), "anno_test": image_labels(bbox_test)}
    for name, variables in (("anno_bbox.mat", boxes), ("anno.mat", labels)):
        savemat(root / name, variables | {"list_action": actions}, do_compression=True)


def write_grounding(path: Path, train: int, seed: int, pairs: int) -> None:
    """Write what each training image shows, one line per image in the format of traces.jsonl."""
    rows = [{"file_name": f"HICO_train2015_{number:08d}.jpg", "think": grounding_text(scene)}
            for number, scene in enumerate(make_scenes("train", train, seed, pairs), start=1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@cache
def toy_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with one token for each number, label and constant line of the toy."""
    return AutoTokenizer.from_pretrained(BASE_MODEL)


def model_config(tokenizer: PreTrainedTokenizerFast, sizes: dict) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL configuration for this tokenizer; the vocabulary is padded like Qwen's."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    rope = {"rope_type": "default", **sizes["text"]["rope_parameters"]}
    text = {**sizes["text"], "rope_parameters": rope, "max_position_embeddings": 4096,
            "vocab_size": (len(tokenizer) // 64 + 1) * 64, "initializer_range": INITIALIZER_RANGE,
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"]}
    vision = {**sizes["vision"], "patch_size": 14, "initializer_range": INITIALIZER_RANGE,
              "out_hidden_size": text["hidden_size"]}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])


def random_model(config: Qwen2_5_VLConfig, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A randomly initialised fp32 model in eval mode. Does not change torch's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    text = config.text_config
    model.generation_config.eos_token_id = [text.eos_token_id, text.pad_token_id]
    model.generation_config.pad_token_id = text.pad_token_id
    return model


def tiny_model(seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None
               ) -> Qwen2_5_VLForConditionalGeneration:
    """A model for unit tests with the token ids of `tokenizer`, by default the toy's."""
    return random_model(model_config(tokenizer or toy_tokenizer(), TINY_SIZES), seed)


def write_model(folder: Path, seed: int) -> None:
    """Write weights, configuration, tokenizer and image processor, as `save_pretrained` does."""
    tokenizer = toy_tokenizer()
    random_model(model_config(tokenizer, TOY_SIZES), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR, indent=2))


@dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    """Options of the command."""

    FILES, IMAGES = "what to write", "images and annotations"
    dir: Path = required("folder to write data/ and model/ into", positional=True, group=FILES)
    seed: int = option(0, "seed of scenes, colours and weights", least=0, group=FILES)
    train: int = option(4000, "training images", least=1, group=IMAGES)
    test: int = option(500, "test images", least=1, group=IMAGES)
    pairs: int = option(2, "most pairs of an image, 1 to 3", least=1, below=4, group=IMAGES)
    left_out: float = option(
        0.55, "share of the training images' further pairs to leave out; 1: all", least=0,
        group=IMAGES,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Write data, model and grounding texts; --help lists the options."""
    config = parse_config(ToyConfig, __doc__, argv, prog="python -m demo.toy")
    with one_line(), naming(config.dir):
        if (config.dir / "run.lock").exists():  # its model/ may have been trained for days
            raise InputError(f"{config.dir}: holds a run; choose another folder")
        write_data(config.dir / "data", config.train, config.test, config.seed, pairs=config.pairs,
                   left_out=config.left_out)
        write_grounding(config.dir / "grounding.jsonl", config.train, config.seed, config.pairs)
        write_model(config.dir / "model", config.seed)


if __name__ == "__main__":
    main()
