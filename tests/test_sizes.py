"""Wrong sizes in a model's folder, through the programs: one line that names them, and no run."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.model.model_files import read_config
from tests.runs import config_of, refusal

TEXT, VISION, ROPE = "text_config", "vision_config", "text_config.rope_parameters"
STAGES = ("sft", "grpo", "predict")
GONE = object()


def size(where: str, value) -> tuple:
    """A case of config.json: what it is to hold, and the words that name it."""
    return {where: value}, rf"{where.split('.')[-1]}\b.* {'.*' if value is GONE else value}\b"


def sizes() -> dict[str, tuple]:
    """Cases of one value: negative, zero, huge, null, a word; each with a name."""
    names = [f"{TEXT}.{n}" for n in ("hidden_size", "num_attention_heads", "num_hidden_layers")]
    names += [f"{TEXT}.{n}" for n in ("intermediate_size", "vocab_size", "num_key_value_heads")]
    names += [f"{VISION}.{n}" for n in ("hidden_size", "depth", "num_heads", "out_hidden_size")]
    names += [f"{VISION}.{n}" for n in ("intermediate_size", "in_channels", "window_size")]
    cases = {f"{n}={v}": size(n, v) for n in names for v in (-1, 0, 10**12)}
    cases |= {f"{n}=null": ({n: None}, n.split(".")[1]) for n in names if "key_value" not in n}
    cases |= {f"{n}=word": ({n: "x"}, n.split(".")[1]) for n in names}
    sides = [f"{VISION}.{n}" for n in ("patch_size", "spatial_merge_size", "temporal_patch_size")]
    for n in sides:
        cases |= {f"{n}={v}": ({n: v}, n.split(".")[1][-10:]) for v in (0, 7, None, "x", 10**12)}
    for v in ([3, 3, 3], [5, 3], [9, -4, 3], ["x", 3, 3], 8, None):
        cases[f"mrope_section={v}"] = {f"{ROPE}.mrope_section": v}, "mrope_section .* sum 8,"
    return cases | {
        "mrope_section gone": ({f"{ROPE}.mrope_section": GONE}, "mrope_section .* sum 8,"),
        "rope_theta": size(f"{ROPE}.rope_theta", 0),
        "heads": ({f"{TEXT}.num_attention_heads": 3}, "num_attention_heads is 3: .* of 32"),
        "fewer heads": ({f"{TEXT}.num_attention_heads": 2}, "mrope_section .* sum 16,"),
        "vision heads": ({f"{VISION}.num_heads": 3}, "num_heads is 3: .* of 8"),
        "output": ({f"{VISION}.out_hidden_size": 32}, "out_hidden_size is 32: .*hidden_size, 64"),
        "blocks": ({f"{VISION}.fullatt_block_indexes": [2]}, r"fullatt_block_indexes is \[2\]"),
        "layers": ({f"{TEXT}.num_hidden_layers": 3}, "num_hidden_layers"),
        "vocabulary": ({f"{TEXT}.vocab_size": 700}, "vocab_size, 700"),
        "sliding": ({f"{TEXT}.layer_types": ["sliding_attention"] * 2}, "layer_types"),
    }


NO_TYPES = {f"{TEXT}.layer_types": GONE}  # as in the Hub's folders
LAYERS = r"model.layers.1.*has no place in the model of config.json"
TENSORS = {  # config.json, a change of the tensors, and what is named
    "more layers": (
        NO_TYPES | {f"{TEXT}.num_hidden_layers": 4}, None, r"24 weights are missing, as .*\.2\."),
    "fewer layers": (NO_TYPES | {f"{TEXT}.num_hidden_layers": 1}, None, LAYERS),
    "fewer blocks": (
        {f"{VISION}.depth": 1, f"{VISION}.fullatt_block_indexes": [0]}, None,
        "blocks.1.*no place"),
    "wider": ({f"{TEXT}.intermediate_size": 97}, None, r"\[64, 96\], and by .*\[64, 97\]"),
    "key-value heads": ({f"{TEXT}.num_key_value_heads": 4}, None, r"k_proj.* \[32\], .* \[64\]"),
    "larger vocabulary": ({f"{TEXT}.vocab_size": 1000}, None, r"embed_tokens.*\[1000, 64\]"),
    "not tied": ({"tie_word_embeddings": False}, None, "1 weights are missing, as lm_head.weight"),
    "missing": ({}, lambda s: s.pop("model.norm.weight"), "1 weights are missing, as .*norm"),
    "surplus": ({}, lambda s: s.update(score=torch.zeros(2)), "score has no place in the model"),
    "other shape": (
        {}, lambda s: s.update({"model.norm.weight": torch.zeros(63)}), r"norm.*\[63\].*\[64\]"),
    "integers": (
        {}, lambda s: s.update({"model.norm.weight": torch.ones(64).int()}), r"norm.*I32.*F32"),
    "vocabulary of both": (
        {f"{TEXT}.vocab_size": 803, f"{TEXT}.pad_token_id": None},
        lambda s: s.update({"model.embed_tokens.weight": torch.zeros(803, 64)}),
        "tokenizer has 806 tokens, and vocab_size is 803 in config.json"),
}  # fmt: skip
CASES = {name: (values, None, named) for name, (values, named) in sizes().items()} | TENSORS
DEFAULT = [("heads", "sft"), ("fewer layers", "grpo"), ("surplus", "predict"), ("wider", "sft")]
ALL = [(case, stage) for case in CASES for stage in STAGES if (case, stage) not in DEFAULT]


def spoilt_model(folder: Path, at: Path, values: dict, change) -> str:
    """A copy of the toy's model, with these values in config.json and the tensors changed."""
    shutil.copytree(folder / "model", at)
    config = json.loads((at / "config.json").read_text())
    for where, value in values.items():
        *parts, last = where.split(".")
        part = config
        for name in parts:
            part = part[name]
        part[last] = value
        if value is GONE:
            del part[last]
    (at / "config.json").write_text(json.dumps(config))
    if change:
        state = load_file(at / "model.safetensors")
        change(state)
        save_file(state, at / "model.safetensors", {"format": "pt"})
    return str(at)


@pytest.fixture
def library():
    """What transformers logs."""
    records, handler = [], logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    yield records
    logging.getLogger("transformers").removeHandler(handler)


@pytest.mark.parametrize(
    "case, stage", DEFAULT + [pytest.param(*both, marks=pytest.mark.slow) for both in ALL]
)
def test_a_model_of_wrong_sizes_is_one_line(case, stage, folder, tmp_path, library):
    """Nothing is drawn in the place of what is missing, and the library's page stays away."""
    values, change, named = CASES[case]
    model = spoilt_model(folder, tmp_path / "m", values, change)
    line = refusal(config_of(stage, folder, tmp_path / "out", model=model))
    assert line.startswith(f"--model {model}: ") and not library
    assert re.search(named, line), line


HUB = {  # config.json of Qwen2.5-VL-3B-Instruct on the Hub, as far as it concerns the model
    "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008,
    "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
    "max_window_layers": 70, "sliding_window": 32768, "use_sliding_window": False,
    "tie_word_embeddings": True, "vocab_size": 151936, "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "temporal_patch_size": 2},
}  # fmt: skip


def test_the_sizes_of_the_real_model_are_right(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    assert read_config(str(tmp_path)).text_config.num_hidden_layers == 36
