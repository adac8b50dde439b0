"""engine/model/quantized.py: AWQ folders as the Hub has them, read without further packages."""

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
from engine.model.quantized import (
    PackedLinear,
    is_packed,
    pack_layers,
    unpack,
    unpacked_weight,
)
from tests.runs import config_of, examples_of, refusal, run
from tests.tiny import sample

GROUP = 32  # inputs; it divides the tiny model's 64 and 96
COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word, from its lowest four bits up
PLANES = ("qweight", "qzeros", "scales")


# A folder as the Hub has it, and its twin, which holds the products (q - zero) * scale


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
    """As the Hub has it: "model.layers.0..", "visual..", "lm_head"."""
    return key.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def flat_config(config) -> dict:
    """config.json as the Hub has it: the text model's fields are on top, old names of rope."""
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


QUANTIZATION = {  # as the Hub's 32B and 72B have it, but for the size of a group
    "bits": 4,
    "group_size": GROUP,
    "modules_to_not_convert": ["visual"],
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}


def write_folder(source, out, config: dict, state: dict) -> None:
    """The tokenizer and image processor of another folder with this configuration and weights."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    (out / "config.json").write_text(json.dumps(config))
    save_file(state, out / "model.safetensors", {"format": "pt"})


def write_twins(folder, out, *, tied: bool = True, old: bool = True):
    """out/packed and out/plain: one model in 4 bits and with its weights multiplied out.

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


@pytest.fixture(scope="module")
def twins(folder, tmp_path_factory):
    """A folder as the Hub has it, head untied as in 32B and 72B."""
    out = tmp_path_factory.mktemp("twins")
    write_twins(folder, out, tied=False)
    return out


@pytest.fixture
def copied(twins, tmp_path):
    """The packed folder, for tests that change it."""
    return shutil.copytree(twins / "packed", tmp_path / "packed")


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


# Layers


@pytest.mark.parametrize("words, values", [
    ([0x75316420], [*range(8)]),  # even columns first
    # the highest four bits are column 7: 0x8 there is the sign bit alone, 0xF all ones
    ([-0x80000000, 0x0000000A], [0] * 7 + [8, 10] + [0] * 7),
    ([-1, -0x10000000], [15] * 8 + [0] * 7 + [15]),
])  # fmt: skip
def test_a_word_holds_eight_values(words, values):
    assert unpack(torch.tensor([words], dtype=torch.int32)).tolist() == [values]


def hand_made() -> PackedLinear:
    """Two inputs, each a group, and eight outputs."""
    layer = PackedLinear(nn.Linear(2, 8), 1)
    layer.qweight.copy_(torch.tensor([[0x75316420], [0x11111111]]))
    layer.qzeros.copy_(torch.tensor([[0x11111111], [0x00000003]]))  # of the second: 3, then 0s
    layer.scales.copy_(torch.tensor([[0.5] * 8, [2.0] * 8]))
    layer.bias.data = torch.arange(8.0)
    return layer


def test_a_packed_layer_is_a_linear_layer():
    """A weight is (value - zero) * scale."""
    weight = unpacked_weight(*hand_made().buffers(), torch.float32)
    # (0..7 - 1) * 0.5, and (1 - 3) * 2 for output 0, (1 - 0) * 2 for the others
    assert weight[0].tolist() == [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert weight[1].tolist() == [-4.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    # 10 * first row + 1 * second row + bias 0..7
    output = hand_made()(torch.tensor([[10.0, 1.0]]))
    assert output.tolist() == [[-9.0, 3.0, 9.0, 15.0, 21.0, 27.0, 33.0, 39.0]]


def test_a_weight_is_rounded_once():
    """9 * 0.0999756 = 0.89978 is 0.8984375 in bf16; of a scale in bf16 it would be 0.90234375."""
    layer = hand_made()
    layer.qweight.fill_(-0x66666667)  # 0x99999999
    layer.qzeros.zero_()
    layer.scales.fill_(0.1)
    assert unpacked_weight(*layer.buffers(), torch.bfloat16)[0, 7].item() == 0.8984375


def test_bytes_of_a_layer():
    """4 bits a weight, and for each 128 of them a zero of 4 bits and a scale of 16."""
    layer = PackedLinear(nn.Linear(256, 64), 128)
    bits = 8 * sum(tensor.nbytes for tensor in layer.buffers())
    assert bits == 256 * 64 * (4 + 20 / 128)


def test_a_layer_compiles_without_a_break():
    layer, x = hand_made(), torch.tensor([[10.0, 1.0]])
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


# Folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_a_packed_model_computes_what_its_twin_does(old, tied, dtype, folder, tmp_path):
    write_twins(folder, tmp_path, old=old, tied=tied)
    packed, plain = (load(tmp_path / name, dtype) for name in ("packed", "plain"))
    assert is_packed(packed.config) and not is_packed(plain.config)
    logprobs, ids = completions_of(packed, folder)
    expected, expected_ids = completions_of(plain, folder)
    assert torch.equal(logprobs, expected) and logprobs.std() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(ids, expected_ids, strict=True))


def test_only_the_decoders_linear_layers_are_packed(twins):
    """Their scales stay in fp16, and the rest has the dtype asked for."""
    model = load(twins / "packed", torch.bfloat16)
    packed = {name for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    names = [f"self_attn.{name}_proj" for name in "qkvo"]
    names += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert packed == {f"model.language_model.layers.{i}.{name}" for i in (0, 1) for name in names}
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.visual.blocks[0].attn.qkv) is nn.Linear
    dtypes = {buffer.dtype for name, buffer in model.named_buffers() if name.endswith("scales")}
    assert dtypes == {torch.float16} and model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_predictions_are_byte_for_byte_those_of_the_twin(folder, twins, tmp_path):
    found = {}
    for name in ("packed", "plain"):
        out = tmp_path / name
        run(config_of("predict", folder, out, model=str(twins / name), max_new_tokens=40))
        found[name] = (out / "predictions.jsonl").read_bytes()
    texts = {json.loads(line)["text"] for line in found["packed"].splitlines()}
    assert found["packed"] == found["plain"] and len(texts) > 1


# Refusals


def line_of(path) -> str:
    """The one line that says why this folder cannot be read, and names it."""
    with pytest.raises(hicodet.InputError) as error:
        load(path)
    line = str(error.value)
    assert line.startswith(f"--model {path}: ") and "\n" not in line
    return line


def change(path, **changes) -> None:
    """Give quantization_config these values, or leave one out where it is "missing"."""
    config = json.loads((path / "config.json").read_text())
    values = config["quantization_config"] | changes
    config["quantization_config"] = {k: v for k, v in values.items() if v != "missing"}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("key, values", [
    ("version", ["gemv", 4]), ("bits", [8]), ("zero_point", [False]), ("group_size", [0, -1, None]),
])  # fmt: skip
def test_another_layout_is_refused(key, values, copied):
    for value in [*values, "missing"]:
        change(copied, **{key: value})
        assert f"quantization_config: {key} is {str(value).lower()}; " in line_of(copied)


def test_another_method_is_refused_in_one_line(copied):
    change(copied, quant_method="gptq")
    assert "GPTQ" in line_of(copied)


@pytest.mark.parametrize("group_size, said", [
    (48, "group_size 48 does not fit the 64 inputs and 64 outputs of layers.0.self_attn.q_proj"),
    (16, "layers.0.mlp.down_proj.qzeros is [3, 8], and by config.json it is [6, 8]"),
])  # fmt: skip
def test_a_group_size_that_does_not_fit_is_refused(group_size, said, copied):
    """48 does not divide the inputs; the file has groups of 32."""
    change(copied, group_size=group_size)
    assert said in line_of(copied)


def test_outputs_that_fill_no_word_are_refused():
    model = toy.tiny_model(3)
    model.model.language_model.layers[1].mlp.up_proj = nn.Linear(64, 12)
    with pytest.raises(hicodet.InputError, match="12 outputs of layers.1.mlp.up_proj"):
        pack_layers(model, GROUP)


@pytest.mark.parametrize("key, said", [
    *((f"model.layers.1.mlp.up_proj.{plane}", "1 weights are missing, ") for plane in PLANES),
    ("model.layers.0.self_attn.q_proj.bias", "1 weights are missing, "),
    # no folder of the Hub that Table 1 has packs its head
    ("lm_head.weight", "lm_head.weight is missing, and tie_word_embeddings is not true"),
])  # fmt: skip
def test_missing_tensors_are_refused(key, said, copied):
    file = copied / "model.safetensors"
    state = load_file(file)
    del state[key]
    save_file(state, file, {"format": "pt"})
    line = line_of(copied)
    assert said in line and key.removeprefix("model.") in line


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_packed_model_is_not_trained(stage, folder, twins, tmp_path):
    model, out = str(twins / "packed"), tmp_path / "run"
    assert f"--model {model}: its weights are quantised" in refusal(
        config_of(stage, folder, out, model=model, max_steps=1)
    )
    assert not out.exists()
