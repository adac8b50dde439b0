"""What a step of GRPO takes of a GPU's memory: Qwen2.5-VL-3B by hand, and against measurements."""

from dataclasses import asdict

import pytest

import hoi_r1
from tests.bench_fits import (
    GIGABYTES,
    Options,
    Parameters,
    block_bytes,
    choose,
    kept_bytes,
    needs_of_3b,
    parameters,
    row,
    step_bytes,
)
from tests.bench_models import SIZES, model_config

CONFIG = model_config(SIZES["3b"])
COUNT = Parameters(layer=77_076_992, layers=36, vision=668_684_288, root=311_166_976)


@pytest.fixture(scope="module")
def needs():
    return needs_of_3b(gpus=1)


def test_parameters_of_the_3b():
    """A layer: q and o 2 * 2048^2 + 2048, k and v 2 * 256 * 2049, the MLP 3 * 2048 * 11008, norms
    2 * 2048. The root: 151,936 * 2048 and a norm. All: 3,754,622,976, as the model is known to
    have."""
    layer = 2 * 2048**2 + 2048 + 2 * 256 * 2049 + 3 * 2048 * 11008 + 2 * 2048
    assert (COUNT.layer, COUNT.root) == (layer, 151936 * 2048 + 2048)
    assert parameters(CONFIG) == COUNT and COUNT.total == 3_754_622_976


def test_what_a_block_keeps():
    # (4 * 11008 + 11 * 2048) * 2, (3 * 11008 + 7 * 2048) * 2, (4 * 3420 + 11 * 1280) * 2 bytes
    assert block_bytes(CONFIG.text_config, compiled=False) == 133_120
    assert block_bytes(CONFIG.text_config, compiled=True) == 94_720
    assert block_bytes(CONFIG.vision_config, compiled=False) == 55_520


def test_an_update_takes_what_was_measured_on_a_gpu():
    """4 groups of 2,338 + 4 * 400 tokens, 368 of them image; weights and gradient in bf16."""
    tokens, patches = 4 * 3938, 4 * 4 * 368
    states = 4 * COUNT.total
    vision = patches * 32 * 55_520
    eager = states + tokens * 36 * 133_120 + vision
    compiled = states + kept_bytes(CONFIG, tokens, patches, checkpointing=False)
    assert eager / 2**30 == pytest.approx(94.0, rel=0.01)
    assert compiled / 2**30 == pytest.approx(73.6, rel=0.01)
    checkpointed = states + kept_bytes(CONFIG, tokens, patches, checkpointing=True)
    assert 16.2 < checkpointed / 2**30 < 1.2 * 16.2


def test_a_step_by_hand():
    """Slots: 16 * (2499 + 4 * 1024) tokens of 36,864 bytes. A micro-batch of 8,192 tokens holds at
    most 3 images of 2,116 patches, and most is taken where backward ends: the vision tower's
    inputs and a block, and 8 bytes for each parameter of the tower and the root."""
    options = Options(0.04, offload=False, gradient_checkpointing=True, tokens_per_microbatch=8192)
    found = step_bytes(CONFIG, COUNT, options, gpus=2)
    assert found == {
        "weights, gradient, AdamW": 8 * COUNT.total,  # 16 bytes each, on two GPUs
        "gathered parameters": 0,
        "pi_old": 2 * COUNT.total,
        "pi_ref": COUNT.total,  # in bf16, on two GPUs
        "keys and values": 8 * 6595 * 36_864,
        "a micro-batch": 3 * 2116 * (32 * 2560 + 55_520) + 8 * (COUNT.root + COUNT.vision),
    }


def test_activations_decide_where_none_are_computed_again():
    """16,384 tokens, 6 images; 4 * 4 bytes of 1,024 rows of logits, the root twice in bf16, a layer
    in 10 bytes."""
    options = Options(0.0, True, gradient_checkpointing=False, tokens_per_microbatch=16384)
    found = step_bytes(CONFIG, COUNT, options, gpus=1)
    assert found["weights, gradient, AdamW"] == found["gathered parameters"] == found["pi_ref"] == 0
    kept = 16384 * 36 * 94_720 + 6 * 2116 * 32 * 55_520
    others = 16 * 1024 * 151_936 + 4 * COUNT.root + 10 * COUNT.layer
    assert found["a micro-batch"] == kept + others


def test_the_first_options_that_fit_are_taken():
    slow, slower = Options(0.04, False, True, 8192), Options(0.0, True, True, 8192)
    needs = {slow: {"a": 60 * 10**9, "b": 16 * 10**9}, slower: {"a": 19 * 10**9}}
    assert choose(needs, 80) == slow  # 95 % of it are 76 GB
    assert choose(needs, 79.9) == slower
    assert choose(needs, 19.9) is None
    assert row(needs, 19, 1) == "1 x 19 GB: none fit"
    first = "2 x 80 GB: --tokens-per-microbatch 8192\n    76.0 GB a GPU"
    assert row(needs, 80, 2).startswith(first)
    assert row(needs, 48, 1).startswith("1 x 48 GB: --offload --kl-coef 0 --tokens")


@pytest.mark.parametrize("gigabytes", GIGABYTES)
def test_the_sizes_of_the_bench_take_the_options_that_fit(gigabytes, needs):
    size = SIZES[f"3b-{gigabytes}gb"]
    config = asdict(hoi_r1.GRPOConfig(model="m", data="d", out="o", **size.step))
    options = asdict(choose(needs, gigabytes))
    assert {name: config[name] for name in options} == options and size.memory == gigabytes
