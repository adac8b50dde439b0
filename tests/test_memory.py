"""engine/memory.py: figures of the public models, and slots for given memory."""

import pytest
import torch
from transformers import Qwen2_5_VLConfig

from demo import toy
from engine.memory import Need, cache_bytes, choose_slots, reckon, weight_bytes

QUANTIZATION = {
    "bits": 4, "group_size": 128, "quant_method": "awq", "version": "gemm", "zero_point": True}
SIZES = {  # of the Hub's folders: width, layers, heads, width of the MLP
    "32B": (5120, 64, 40, 27648),
    "72B": (8192, 80, 64, 29568),
    "72B, padded": (8192, 80, 64, 29696),  # as Qwen pads the MLP of its AWQ folders of 72B
}
PACKED_GIGABYTES = [("32B", 20.7), ("72B", 42.9), ("72B, padded", 43.0)]


def config_of(name: str, packed: bool = True) -> Qwen2_5_VLConfig:
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


@pytest.mark.parametrize("name, gigabytes", PACKED_GIGABYTES)
def test_weights_of_the_packed_models(name, gigabytes):
    assert weight_bytes(config_of(name), torch.bfloat16) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_weights_of_a_plain_model_are_counted_once_where_they_are_tied():
    model = toy.tiny_model()
    expected = 2 * sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert weight_bytes(model.config, torch.bfloat16) == expected + buffers


# 2 * 64 layers * 8 heads * 128 * 2 bytes = 262,144; 2 * 80 * 8 * 128 * 2 = 327,680
@pytest.mark.parametrize("name, a_token, gigabytes", [("32B", 262144, 1.19), ("72B", 327680, 1.49)])
def test_keys_and_values(name, a_token, gigabytes):
    config = config_of(name)
    assert cache_bytes(config.text_config, torch.bfloat16) == a_token
    need = reckon(
        config, torch.bfloat16, prompt_room=2500, max_new_tokens=2048, prefill_prompts=16)
    assert need.slot == 4548 * a_token
    assert need.slot / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_a_prefill_of_a_packed_model():
    config = config_of("72B")
    need = reckon(config, torch.bfloat16, prompt_room=100, max_new_tokens=1, prefill_prompts=16)
    assert need.prompt == 100 * 3 * (8192 + 29568) * 2  # bytes of bf16
    assert need.unpacking == 2 * 4 * 8192 * 29568
    assert need.prefill(4) == 4 * need.prompt + need.unpacking
    assert need.prefill(64) == 16 * need.prompt + need.unpacking


def test_a_plain_model_is_not_unpacked():
    config = config_of("32B", packed=False)
    need = reckon(config, torch.bfloat16, prompt_room=100, max_new_tokens=1, prefill_prompts=16)
    assert need.unpacking == 0
    assert need.weights / 1e9 == pytest.approx(66.9, abs=0.1)  # 33.45 billion in bf16


# Slots. With n of them: 40 GB + n * 2 GB + min(n, 4) * 1 GB; 95 % of the memory may be taken.
NEED = Need(weights=40 * 10**9, slot=2 * 10**9, prompt=10**9, prefill_prompts=4)
FOR_TEN = 64 * 10**9 * 100 // 95 + 1


def test_all_slots_are_taken_where_they_fit():
    assert choose_slots(0, NEED, 200 * 10**9)[0] == 64


def test_as_many_slots_as_fit_are_taken():
    """40 + 10 * 2 + 4 = 64 GB."""
    assert choose_slots(0, NEED, FOR_TEN)[0] == 10
    assert choose_slots(0, NEED, FOR_TEN - 10**6)[0] == 9


def test_fewer_slots_have_a_smaller_prefill():
    """40 + 1 * 2 + 1 = 43 GB."""
    assert choose_slots(0, NEED, 46 * 10**9)[0] == 1


def test_what_is_taken_is_said():
    assert choose_slots(0, NEED, FOR_TEN)[1] == (
        "40.0 GB of weights + 10 slots x 2.00 GB of keys and values + 4.0 GB for a prefill are "
        "within 95% of 67.4 GB"
    )


def test_slots_that_are_asked_for_are_taken_where_they_fit():
    assert choose_slots(7, NEED, FOR_TEN)[0] == 7
    assert choose_slots(80, NEED, 300 * 10**9)[0] == 80


def test_slots_that_do_not_fit_are_refused_with_the_number_that_would():
    with pytest.raises(ValueError, match="--slots 11: 40.0 GB .* 67.4 GB; --slots 10 would fit"):
        choose_slots(11, NEED, FOR_TEN)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_model_that_leaves_room_for_no_slot_is_refused(asked):
    with pytest.raises(ValueError, match="--slots 1: .*; take a smaller model or a larger GPU"):
        choose_slots(asked, NEED, 44 * 10**9)
