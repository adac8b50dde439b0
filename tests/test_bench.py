"""The benchmarks run, and their baselines compute the same as ours."""

import json
from dataclasses import replace

import pytest
import torch

import engine.decode
from tests import bench, bench_cpu
from tests.bench_models import SIZES, Work, random_model

SMALL = replace(
    SIZES["tiny"], prompts=2, group_size=2, text_tokens=20, grid=(2, 3), sampled=4, trained=5
)


@pytest.fixture
def process_group():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.MODEL_BENCHES)
def test_every_bench_of_a_model_runs(name, process_group, monkeypatch):
    monkeypatch.setattr(bench, "ANSWER_LENGTHS", [3 + i % 7 for i in range(32)])
    cpu, runs = torch.device("cpu"), bench.Runs(repeats=1, baseline=name != "predict")
    found = bench.MODEL_BENCHES[name](SMALL, cpu, runs)
    assert found.ours > 0 and found.peak_memory > 0 and found.device == "CPU"
    if runs.baseline:
        assert found.baseline > 0
        assert found.ratio == pytest.approx(found.baseline / found.ours)
    if name == "update":
        assert found.details["gradient_off_relative"] < 1e-5
    if name == "sft":
        assert found.details["ours"] == pytest.approx(found.details["baseline"], rel=1e-5)
    assert bench.report(found).startswith(found.what)


def test_figures_are_written(tmp_path, capsys):
    path = tmp_path / "rewards.json"
    bench.main(["rewards", "--repeats", "1", "--json", str(path)])
    written = json.loads(path.read_text())
    assert {"ours", "baseline", "ratio", "peak_memory", "floor"} <= written.keys()
    assert "ratio" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["update", "--model-size", "3b"])
    assert "needs a GPU" in capsys.readouterr().err


def test_what_a_bench_varies(monkeypatch):
    """Gradient checkpointing of a step, and the stages of decoding's kernel."""
    step = bench.BenchConfig(what="step", checkpointing="off").size().step
    assert step == {"gradient_checkpointing": False}
    with pytest.raises(ValueError, match="only of step"):
        bench.BenchConfig(what="update", checkpointing="on")
    monkeypatch.setattr(engine.decode, "STAGES", engine.decode.STAGES)  # put back afterwards
    bench.main(["rewards", "--repeats", "1", "--no-baseline", "--num-stages", "3"])
    assert engine.decode.kernel_options(8)["num_stages"] == 3


def test_annotations_and_detections_of_the_benches(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_cpu, "IMAGES", {"train": 120, "test": 30})
    bench_cpu.write_annotations(tmp_path)
    assert len(bench_cpu.hicodet.load_split(tmp_path, "train")) == 120
    functions = bench_cpu.bench_evaluate()
    functions["ours"]()
    functions["baseline"]()  # compares the two


def test_floor_by_hand():
    model = random_model(SMALL, torch.device("cpu"), torch.float32)
    work = Work(model, SMALL)
    layers, head, vision = work.parameters()
    assert head == 4096 * 256
    assert layers + head + vision == sum(p.numel() for p in model.parameters())
    # two prompts of 26 tokens, each read once, and four rows with two tokens at the mean;
    # keys and values of 4 layers, one head of 128, 2 bytes each
    cached = (2 * 26 + 4 * 2) * 4 * 2 * 128 * 2
    assert work.decode_bytes() == 2 * (layers + head) + cached
    seen = 26**2 / 2 + 10 * (26 + 2.5)
    each = 2 * (36 * layers + 10 * head + 24 * vision) + 4 * seen * 256 * 4
    assert work.forward(5) == pytest.approx(2 * each)
    assert work.update((1e3, 1e3)) == pytest.approx(3 * work.forward(5) / 1e3)
