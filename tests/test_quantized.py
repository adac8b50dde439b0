"""engine/model/quantized.py: AWQ folders of the Hub equal their weights in floating point."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hicodet
from demo import toy
from engine.data import annotations
from engine.model.packing import pack, token_logprobs
from engine.model.policy import load_model
from engine.model.quantized import PackedLinear, is_packed, pack_layers, unpacked_weight
from tests.runs import config_of, examples_of, refusal
from tests.tiny import sample

GROUP = 32  # inputs per group; it divides the tiny model's 64 and 96
COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # columns in a word, from its lowest four bits up
PLANES = ("qweight", "qzeros", "scales")


# A folder in the Hub's layout, and its twin, which holds the products (q - zero) * scale


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(in, out) fp32 -> values (in, out) and zeros (groups, out) of 0..15, scales fp16."""
    groups = weight.reshape(-1, GROUP, weight.shape[1])
    low, high = groups.min(1), groups.max(1)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.clip(np.round(-low / scales), 0, 15).astype(np.int64)
    values = np.clip(np.round(groups / scales[:, None]) + zeros[:, None], 0, 15).astype(np.int64)
    return values.reshape(weight.shape), zeros, scales


def words_of(values: np.ndarray) -> torch.Tensor:
    """(rows, out) of 0..15 -> (rows, out / 8) int32."""
    words = sum(values[:, c::8] << 4 * place for place, c in enumerate(COLUMNS))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def dequantised(values: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> torch.Tensor:
    """(out, in) fp32."""
    zeros, scales = (np.repeat(x, GROUP, axis=0).astype(np.float32) for x in (zeros, scales))
    return torch.from_numpy((values - zeros) * scales).T.contiguous()


def is_linear_of_decoder(key: str) -> bool:
    return "language_model.layers" in key and key.endswith("proj.weight")


def old_key(key: str) -> str:
    """The Hub's name of a tensor: "model.layers.0..", "visual..", "lm_head"."""
    return key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def flat_config(config) -> dict:
    """The Hub's config.json: the text model's fields are on top, rope has its old names."""
    text = config.text_config.to_dict()
    rope = text.pop("rope_parameters")
    text = {key: value for key, value in text.items() if key not in ("dtype", "model_type")}
    vision = {**config.vision_config.to_dict(), "model_type": "qwen2_5_vl"}
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        **text,
        **{name: getattr(config, name) for name in ids},
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float16",
        "vision_config": vision,
    }


QUANTIZATION = {  # that of the Hub's 32B and 72B, except for the group size
    "bits": 4, "group_size": GROUP, "modules_to_not_convert": ["visual"],
    "quant_method": "awq", "version": "gemm", "zero_point": True,
}  # fmt: skip


def write_folder(source, out, config: dict, state: dict) -> None:
    """Write a folder with this configuration and weights; the rest is copied from `source`."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    (out / "config.json").write_text(json.dumps(config))
    save_file(state, out / "model.safetensors", {"format": "pt"})


def write_twins(folder, out, *, tied: bool = True, old: bool = True):
    """Write out/packed and out/plain: a model in 4 bits, and the same weights in floating point.

    tied: the head has no weights of its own. old: a flat configuration and the Hub's older keys.
    """
    model = toy.tiny_model(3)
    state = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    model.config.tie_word_embeddings = tied
    if not tied:
        state["lm_head.weight"] = model.lm_head.weight.flip(0)
    packed, plain = {}, {}
    for key, value in state.items():
        name = old_key(key) if old else key
        if is_linear_of_decoder(key):
            values, zeros, scales = quantise(np.ascontiguousarray(value.numpy().T))
            tensors = words_of(values), words_of(zeros), torch.from_numpy(scales)
            packed |= {name.replace("weight", p): t for p, t in zip(PLANES, tensors)}
            plain[name] = dequantised(values, zeros, scales)
        else:
            packed[name] = plain[name] = value.half().contiguous()
    config = flat_config(model.config) if old else model.config.to_dict()
    write_folder(folder / "model", out / "plain", config, plain)
    config = config | {"quantization_config": QUANTIZATION}
    write_folder(folder / "model", out / "packed", config, packed)


def load(path, dtype=torch.float32):
    return load_model(str(path), torch.device("cpu"), dtype)


def completions_of(model, folder):
    """Log-probs of random completions, and greedy ones, of the first two test images."""
    config = config_of("predict", folder, "")
    examples = examples_of(config, annotations.load_split(config.data, "test")[:2])
    prompts = [examples[i].prompt for i in range(2)]
    given = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    packed = pack(model, prompts, [[given[0]], [given[1]]])
    with torch.no_grad():
        logprobs = token_logprobs(model, packed)
    options = {"group_size": 1, "max_new_tokens": 8, "end_id": examples.end_id, "temperature": 0}
    return logprobs, sample(model, prompts, **options).completion_ids


def test_packed_layer_by_hand():
    """Two inputs, each a group, and eight outputs. A weight is (value - zero) * scale."""
    layer = PackedLinear(nn.Linear(2, 8), 1)
    layer.qweight.copy_(torch.tensor([[0x75316420], [0x11111111]]))  # even columns come first
    layer.qzeros.copy_(torch.tensor([[0x11111111], [0x00000003]]))  # the second group: 3, then 0s
    layer.scales.copy_(torch.tensor([[0.5] * 8, [2.0] * 8]))
    layer.bias.data = torch.arange(8.0)
    weight = unpacked_weight(*layer.buffers(), torch.float32)
    # (0..7 - 1) * 0.5, and (1 - 3) * 2 for output 0, (1 - 0) * 2 for the others
    assert weight[0].tolist() == [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert weight[1].tolist() == [-4.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    # 10 * first row + 1 * second row + bias 0..7
    output = layer(torch.tensor([[10.0, 1.0]]))
    assert output.tolist() == [[-9.0, 3.0, 9.0, 15.0, 21.0, 27.0, 33.0, 39.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_packed_model_equals_its_twin(old, tied, dtype, folder, tmp_path):
    """To the bit, so in bf16 each weight is rounded only once."""
    write_twins(folder, tmp_path, old=old, tied=tied)
    packed, plain = (load(tmp_path / name, dtype) for name in ("packed", "plain"))
    assert is_packed(packed.config) and not is_packed(plain.config)
    logprobs, ids = completions_of(packed, folder)
    expected, expected_ids = completions_of(plain, folder)
    assert torch.equal(logprobs, expected) and logprobs.std() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(ids, expected_ids, strict=True))


# Refusals


@pytest.fixture
def packed(folder, tmp_path):
    """A packed folder for tests that change it, its head untied as in 32B and 72B."""
    write_twins(folder, tmp_path, tied=False)
    return tmp_path / "packed"


def line_of(path) -> str:
    """The one line that names this folder and says why it cannot be read."""
    with pytest.raises(hicodet.InputError) as error:
        load(path)
    line = str(error.value)
    assert line.startswith(f"--model {path}: ") and "\n" not in line
    return line


def change(path, **changes) -> None:
    """Set values of quantization_config, or remove those that are "missing"."""
    config = json.loads((path / "config.json").read_text())
    values = config["quantization_config"] | changes
    config["quantization_config"] = {k: v for k, v in values.items() if v != "missing"}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("key, value, said", [
    ("version", "gemv", "quantization_config: version is gemv; "),
    ("version", "missing", "quantization_config: version is missing; "),
    ("bits", 8, "quantization_config: bits is 8; "),
    ("zero_point", False, "quantization_config: zero_point is false; "),
    ("group_size", 0, "quantization_config: group_size is 0; "),
    ("group_size", None, "quantization_config: group_size is none; "),
    ("quant_method", "gptq", "GPTQ"),
    ("group_size", 48, "group_size 48 does not fit the 64 inputs and 64 outputs of layers.0.self"),
    ("group_size", 16, "layers.0.mlp.down_proj.qzeros is [3, 8], and by config.json it is [6, 8]"),
])  # fmt: skip
def test_another_layout_is_refused(key, value, said, packed):
    """48 does not divide the inputs. The file has groups of 32."""
    change(packed, **{key: value})
    assert said in line_of(packed)


def test_outputs_that_fill_no_word_are_refused():
    model = toy.tiny_model(3)
    model.model.language_model.layers[1].mlp.up_proj = nn.Linear(64, 12)
    with pytest.raises(hicodet.InputError, match="12 outputs of layers.1.mlp.up_proj"):
        pack_layers(model, GROUP)


@pytest.mark.parametrize("name", [*(f"mlp.up_proj.{p}" for p in PLANES), "self_attn.q_proj.bias"])
def test_missing_tensor_is_refused(name, packed):
    file = packed / "model.safetensors"
    state = load_file(file)
    del state[f"model.layers.1.{name}"]
    save_file(state, file, {"format": "pt"})
    line = line_of(packed)
    assert "1 weights are missing, " in line and f"layers.1.{name}" in line


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_packed_weights_are_not_trained(stage, folder, packed, tmp_path):
    said = refusal(config_of(stage, folder, tmp_path / "run", model=str(packed)))
    assert f"--model {packed}: its weights are quantised" in said
    assert not (tmp_path / "run").exists()
