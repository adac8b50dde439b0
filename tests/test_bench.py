"""The benches run, their baselines compute the same as ours, and their estimates are right."""

import json
from dataclasses import asdict, replace

import pytest
import torch

import hoi_r1
from engine.configs import GRPOConfig
from tests import bench, bench_cpu, bench_fits, bench_peer
from tests.bench_fits import GIGABYTES, Options, Parameters, choose, kept_bytes, step_bytes
from tests.bench_measure import Runs
from tests.bench_models import SIZES, decode_bytes, floors, model_config, random_model

CPU = torch.device("cpu")
SMALL = replace(
    SIZES["tiny"], prompts=2, group_size=2, text_tokens=20, grid=(2, 3), sampled=4, trained=5
)
CONFIG = model_config(SIZES["3b"])
COUNT = Parameters(layer=77_076_992, layers=36, vision=668_684_288, root=311_166_976)


@pytest.fixture
def process_group():
    yield
    hoi_r1.leave_ranks(failed=False)


@pytest.mark.slow
@pytest.mark.parametrize("name, step", [
    *((name, {}) for name in bench.BENCHES), ("step", {"lora_rank": 4})
])  # fmt: skip
def test_bench_runs(name, step, process_group, monkeypatch):
    monkeypatch.setattr(bench_cpu, "IMAGES", 30)
    runs = Runs(repeats=1, baseline=name != "predict")
    found = bench.BENCHES[name](replace(SMALL, step=step), CPU, runs)
    assert found.ours > 0 and found.peak_memory > 0 and found.device == "CPU"
    if runs.baseline:
        assert found.ratio == pytest.approx(found.baseline / found.ours)
    if name == "update":
        assert found.details["gradient_off_relative"] < 1e-5
    assert bench.report(found).startswith(found.what)


def test_loop_over_detections_finds_the_same_map(monkeypatch, tmp_path, capsys):
    """The baseline compares the two. The figures are printed and written."""
    monkeypatch.setattr(bench_cpu, "IMAGES", 30)
    bench.main(["evaluate", "--repeats", "1", "--json", str(tmp_path / "map.json")])
    written = json.loads((tmp_path / "map.json").read_text())
    assert {"ours", "baseline", "ratio", "peak_memory", "floor"} <= written.keys()
    assert "ratio" in capsys.readouterr().out


def test_floors_by_hand():
    model = random_model(SMALL, CPU, torch.float32)
    head, vision = 4096 * 256, sum(p.numel() for p in model.model.visual.parameters())
    layers = sum(p.numel() for p in model.parameters()) - head - vision
    # two prompts of 26 tokens, each read once, and four rows with two tokens at the mean;
    # keys and values of 4 layers, one head of 128, 2 bytes each
    cached = (2 * 26 + 4 * 2) * 4 * 2 * 128 * 2
    assert decode_bytes(model, SMALL) == 2 * (layers + head) + cached
    # each prompt: 26 + 10 tokens, 10 of them in the head, 24 patches; forward and backward
    seen = 26**2 / 2 + 10 * (26 + 2.5)
    each = 2 * (36 * layers + 10 * head + 24 * vision) + 4 * seen * 256 * 4
    assert floors(model, SMALL, (1e3, 1e3))["update"] == pytest.approx(3 * 2 * each / 1e3)


@pytest.mark.slow
def test_gradient_of_trl_is_ours(process_group):
    """On TRL's completions. Its log has four digits."""
    size = replace(SIZES["tiny"], text_tokens=33, grid=(2, 3), sampled=6)
    try:
        details = bench_peer.bench_peer(size, CPU, Runs(1, True)).details
    except bench_peer.Unavailable as error:
        pytest.skip(str(error))
    assert details["prompt"] == 33 + 6
    ours, theirs = details["grad_norm_on_its_completions"], details["grad_norm_of_trl"]
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_parameters_of_the_3b():
    """The model is known to have 3,754,622,976."""
    assert bench_fits.parameters(CONFIG) == COUNT and COUNT.total == 3_754_622_976
    # r (in + out): q and o 2048 + 2048, k and v 2048 + 256, three of the MLP 2048 + 11008
    adapters = 36 * 8 * (2 * 4096 + 2 * 2304 + 3 * 13056)
    assert bench_fits.parameters(CONFIG, lora_rank=8) == replace(COUNT, adapters=adapters)


def test_update_needs_the_memory_measured_on_a_gpu():
    """4 groups of 2,338 + 4 * 400 tokens, 368 of them image; weights and gradient in bf16."""
    tokens, patches, states = 4 * 3938, 4 * 4 * 368, 4 * COUNT.total
    # (4 * 11008 + 11 * 2048) * 2 bytes of a token, (4 * 3420 + 11 * 1280) * 2 of a patch
    eager = states + tokens * 36 * 133_120 + patches * 32 * 55_520
    compiled, checkpointed = (
        states + kept_bytes(CONFIG, tokens, patches, checkpointing=on) for on in (False, True)
    )
    assert eager / 2**30 == pytest.approx(94.0, rel=0.01)
    assert compiled / 2**30 == pytest.approx(73.6, rel=0.01)
    assert 16.2 < checkpointed / 2**30 < 1.2 * 16.2


def test_memory_of_a_step_by_hand():
    """Keys and values: 8 * (20 blocks + 4 * 8) of 128 tokens of 36,864 bytes. A micro-batch of
    8,192 tokens holds at most 3 images of 2,116 patches. It needs most where backward ends: the
    vision tower's inputs, one block, and 8 bytes for each parameter of tower and root."""
    options = Options(0.04, offload=False, gradient_checkpointing=True, tokens_per_microbatch=8192)
    found = step_bytes(CONFIG, COUNT, options, gpus=2)
    assert found == {
        "frozen base": 0,
        "weights, gradient, AdamW": 8 * COUNT.total,  # 16 bytes each, on two GPUs
        "gathered parameters": 0,
        "pi_old": 2 * COUNT.total,
        "pi_ref": COUNT.total,  # in bf16, on two GPUs
        "keys and values": 8 * 52 * 128 * 36_864,
        "a micro-batch": 3 * 2116 * (32 * 2560 + 55_520) + 8 * (COUNT.root + COUNT.vision),
    }
    # adapters: one base in bf16, and 16 + 2 bytes each; no gradient reaches the vision tower;
    # a token's inputs of 36 layers and one block, and logits of 1,024 rows, four times in fp32
    found = step_bytes(CONFIG, replace(COUNT, adapters=10**6), options, gpus=1)
    kept = 8192 * (36 * 4096 + 133_120) + 16 * 1024 * 151_936
    keys = 16 * 52 * 128 * 36_864
    assert sum(found.values()) == 2 * COUNT.total + 18 * 10**6 + keys + kept


def test_sizes_of_the_bench_have_options_that_fit():
    needs = bench_fits.needs_of_3b(gpus=1)
    for gigabytes in GIGABYTES:
        size = SIZES[f"3b-{gigabytes}gb"]
        config = asdict(GRPOConfig(model="m", data="d", out="o", **size.step))
        options = asdict(choose(needs, gigabytes))
        assert {name: config[name] for name in options} == options and size.memory == gigabytes


@pytest.mark.parametrize("name, weights, slot", [
    ("3B", 7.5, 0.17), ("32B-AWQ", 20.7, 1.21), ("72B-AWQ", 43.0, 1.51),
])  # fmt: skip
def test_memory_of_a_prediction(name, weights, slot):
    """In gigabytes. The weights have the size of the Hub's folders."""
    found = bench_fits.prediction(name)
    assert [n / 1e9 for n in found] == pytest.approx([weights, slot], rel=0.01)
