"""engine/sampling/slots.py: figures of the public models, and slots for given memory."""

import json
import shutil

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import engine.sampling.slots
import predict
from demo import toy
from engine.data import annotations
from engine.model.attention import use_group_attention
from engine.model.quantized import PackedLinear
from engine.sampling.sampler import PREFILL_PROMPTS
from engine.sampling.slots import (
    Need,
    cache_bytes,
    choose_slots,
    reckon,
    unpacking_bytes,
    vision_bytes,
    weight_bytes,
)
from hicodet import InputError
from tests.runs import config_of, examples_of, refusal, run

QUANTIZATION = {
    "bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True}
SIZES = {  # of the Hub's folders: width, layers, heads, width of the MLP
    "3B": (2048, 36, 16, 11008),
    "32B": (5120, 64, 40, 27648),
    "72B": (8192, 80, 64, 29568),
    "72B, padded": (8192, 80, 64, 29696),  # as Qwen pads the MLP of its AWQ folders of 72B
}
PACKED_GIGABYTES = [("32B", 20.7), ("72B", 42.9), ("72B, padded", 43.0)]


def model_config(name: str, packed: bool = True) -> Qwen2_5_VLConfig:
    hidden, layers, heads, intermediate = SIZES[name]
    text = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "intermediate_size": intermediate, "vocab_size": 152064}
    vision = {
        "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3456,
        "out_hidden_size": hidden}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    if packed:
        config.quantization_config = QUANTIZATION
    return config


def need_of(config, **changes):
    options = {"prompt_room": 100, "patches": 0, "max_new_tokens": 1, "prefill_prompts": 16}
    return reckon(config, torch.bfloat16, **options | changes)


@pytest.mark.parametrize("name, gigabytes", PACKED_GIGABYTES)
def test_weights_of_the_packed_models(name, gigabytes):
    found = weight_bytes(model_config(name), torch.bfloat16)
    assert found / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_weights_of_a_plain_model_are_counted_once_where_they_are_tied():
    model = toy.tiny_model()
    expected = 2 * sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert weight_bytes(model.config, torch.bfloat16) == expected + buffers


# 2 * 64 layers * 8 heads * 128 * 2 bytes = 262,144; 2 * 80 * 8 * 128 * 2 = 327,680
@pytest.mark.parametrize("name, a_token, gigabytes", [("32B", 262144, 1.21), ("72B", 327680, 1.51)])
def test_keys_and_values(name, a_token, gigabytes):
    config = model_config(name)
    assert cache_bytes(config.text_config, torch.bfloat16) == a_token
    need = need_of(config, prompt_room=2500, max_new_tokens=2048)
    assert need.slot == (20 * 128 + 16 * 128) * a_token  # whole blocks of keys
    assert need.slot / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_a_prefill_of_a_packed_model():
    config = model_config("72B")
    need = need_of(config)
    assert need.prompt == 100 * 3 * (8192 + 29568) * 2  # bytes of bf16
    assert need.unpacking == 2 * 4 * 8192 * 29568
    assert need.prefill(4) == 4 * need.prompt + need.unpacking
    assert need.prefill(64) == 16 * need.prompt + need.unpacking


def storages(values):
    tensors = (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


class AliveBytes(TorchDispatchMode):
    """The most bytes of tensors that were made in its context and were alive at a time."""

    def __init__(self):
        super().__init__()
        self.made, self.most = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        given = storages(arguments).keys() - self.made.keys()  # what is a view of these is not made
        result = function(*arguments, **(options or {}))
        for at, storage in storages(result).items():
            if at not in given:
                self.made[at] = StorageWeakRef(storage), storage.nbytes()
        self.made = {at: pair for at, pair in self.made.items() if not pair[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.made.values()))
        return result


def test_unpacking_a_layer_takes_what_is_reckoned():
    """Two tensors of 4 bytes a weight, beside which the layer, its zeros and scales are small."""
    config = model_config("72B").text_config
    config.hidden_size, config.intermediate_size = 256, 1024
    layer = PackedLinear(nn.Linear(256, 1024, bias=False), 128)
    with AliveBytes() as alive:
        layer.weight(torch.bfloat16)
    assert unpacking_bytes(config) <= alive.most < unpacking_bytes(config) * 1.1


def test_the_vision_tower_takes_what_is_reckoned():
    """One layer of two heads of 80, as Qwen2.5-VL's 16 are."""
    config = toy.tiny_model().config
    vision = config.vision_config
    vision.hidden_size, vision.num_heads, vision.intermediate_size = 160, 2, 432
    vision.depth, vision.fullatt_block_indexes = 1, [0]
    model = use_group_attention(Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16))
    with torch.no_grad(), AliveBytes() as alive:
        pixels = torch.zeros(256, 3 * 2 * 14 * 14)
        model.get_image_features(pixels, torch.tensor([[1, 16, 16]]))
    assert alive.most == pytest.approx(256 * vision_bytes(vision, torch.bfloat16), rel=0.01)


# 1,970 tokens of text. 3 * (2048 + 11008) * 2 = 78,336 bytes a token; 5 * 2 + 6 * 4 = 34 a number
# of the vision tower's 1,280, 640 of angles and 6 * 1176 of pixels are 51,216 a patch
@pytest.mark.parametrize("image_tokens, expected", [
    (529, 2499 * 78336),  # the widest of HICO-DET's
    (15000, 4 * 15000 * 51216)])  # a phone's, of 12 megapixels
def test_a_prefill_takes_the_larger_of_text_and_vision(image_tokens, expected):
    config = model_config("3B", packed=False)
    need = need_of(config, prompt_room=1970 + image_tokens, patches=4 * image_tokens)
    assert need.prompt == expected


def test_a_plain_model_is_not_unpacked():
    config = model_config("32B", packed=False)
    need = need_of(config)
    assert need.unpacking == 0
    assert need.weights / 1e9 == pytest.approx(66.9, abs=0.1)  # 33.45 billion in bf16


# Slots. With n of them: 40 GB + n * 2 GB + min(n, 4) * 1 GB; 95 % of the memory may be taken.
NEED = Need(weights=40 * 10**9, slot=2 * 10**9, prompt=10**9, prefill_prompts=4)
FOR_TEN = 64 * 10**9 * 100 // 95 + 1
MANY = 9658  # images


def test_all_slots_are_taken_where_they_fit():
    assert choose_slots(0, MANY, NEED, 200 * 10**9)[0] == 64


def test_as_many_slots_as_fit_are_taken():
    """40 + 10 * 2 + 4 = 64 GB."""
    assert choose_slots(0, MANY, NEED, FOR_TEN)[0] == 10
    assert choose_slots(0, MANY, NEED, FOR_TEN - 10**6)[0] == 9


def test_fewer_slots_have_a_smaller_prefill():
    """40 + 1 * 2 + 1 = 43 GB."""
    assert choose_slots(0, MANY, NEED, 46 * 10**9)[0] == 1


def test_what_is_taken_is_said():
    assert choose_slots(0, MANY, NEED, FOR_TEN)[1] == (
        "--slots 10: 40.0 GB of weights + 10 x 2.00 GB of keys and values + 4.0 GB for a prefill "
        "are within 95% of the 67.4 GB that are free"
    )


def test_slots_that_are_asked_for_are_taken_where_they_fit():
    assert choose_slots(7, MANY, NEED, FOR_TEN)[0] == 7
    assert choose_slots(80, MANY, NEED, 300 * 10**9)[0] == 80


def test_slots_that_do_not_fit_are_refused_with_the_number_that_would():
    with pytest.raises(InputError, match="--slots 11: 40.0 GB .* free; --slots 10 would fit"):
        choose_slots(11, MANY, NEED, FOR_TEN)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_model_that_leaves_room_for_no_slot_is_refused(asked):
    with pytest.raises(InputError, match="--slots 1: .*; take a smaller model or a larger GPU"):
        choose_slots(asked, MANY, NEED, 44 * 10**9)


@pytest.mark.parametrize("asked", [0, 11])
def test_no_more_slots_are_taken_than_there_are_images(asked):
    assert choose_slots(asked, 3, NEED, FOR_TEN)[0] == 3


# Predictions, on a CPU that is taken for a GPU


@pytest.fixture
def room_for(folder, monkeypatch):
    """Let `predict` find memory for so many slots, and no more, of a config."""

    def find(slots, config):
        examples = examples_of(config, annotations.load_split(config.data, config.split))
        need = reckon(
            toy.tiny_model(3).config,
            torch.float32,
            prompt_room=examples.longest_prompt(),
            patches=examples.most_patches(),
            max_new_tokens=config.max_new_tokens,
            prefill_prompts=PREFILL_PROMPTS,
        )
        free = need.total(slots) * 100 // 95 + 1
        monkeypatch.setattr(engine.sampling.slots, "free_memory", lambda device: free)

    return find


@pytest.fixture
def taken(monkeypatch):
    """The slots of every sampler that `predict` makes."""
    slots, sampler = [], predict.Sampler

    def make(model, **options):
        slots.append(options["slots"])
        return sampler(model, **options)

    monkeypatch.setattr(predict, "Sampler", make)
    return slots


def test_a_prediction_takes_the_slots_that_fit(folder, tmp_path, room_for, taken):
    found = []
    for name in ("all", "few"):
        config = config_of("predict", folder, tmp_path / name, max_new_tokens=9)
        if name == "few":
            room_for(4, config)
        run(config)
        found.append((tmp_path / name / "predictions.jsonl").read_bytes())
    assert taken == [6, 4] and found[0] == found[1]  # of 6 images


def test_a_prediction_says_what_it_takes(folder, tmp_path, room_for, capsys):
    config = config_of("predict", folder, tmp_path / "run", max_new_tokens=2)
    room_for(4, config)
    run(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if "keys and values" in line]
    assert len(lines) == 1 and lines[0].startswith("--slots 4: 0.0 GB of weights + 4 x ")


def test_a_prediction_is_refused_slots_that_do_not_fit(folder, tmp_path, room_for, monkeypatch):
    config = config_of("predict", folder, tmp_path / "run", slots=5, max_new_tokens=9)
    room_for(4, config)
    monkeypatch.delattr(predict, "load_model")  # no weights are read
    found = refusal(config)
    assert found.startswith("--slots 5: ") and found.endswith("; --slots 4 would fit")


def test_packed_weights_that_cannot_be_read_are_refused_before_they_are_read(
    folder, tmp_path, monkeypatch
):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    values = json.loads((model / "config.json").read_text())
    values["quantization_config"] = QUANTIZATION | {"quant_method": "gptq"}
    (model / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr(engine.sampling.slots, "free_memory", lambda device: 10**12)
    found = refusal(config_of("predict", folder, tmp_path / "run", model=str(model)))
    assert f"--model {model}: " in found and "quant_method is gptq; only awq can be read" in found
