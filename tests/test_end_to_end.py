"""The programs as a user runs them: two ranks under torchrun, --help without slow imports."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hoi_r1
from demo import toy
from engine.data import annotations
from engine.model.policy import SMALLEST_PART  # conftest.py sets it to 0 later
from tests.runs import metrics, weights, write_traces

ROOT = Path(__file__).resolve().parents[1]
TOY = ["--no-task-description", "--workers", "0"]
# Seven images in steps of three: two ranks have unequal shares, and in the third step one has none.
# Micro-batches have one image each, so the ranks have different numbers of them.
UNEVEN = ["--max-steps", 3, "--batch-size", 3, "--tokens-per-microbatch", 1]
UNEVEN += ["--learning-rate", 1e-4]


def run(*arguments, ranks=0):
    """Run a program of the project to its end. Returns what it printed.

    ranks: processes under torchrun; 0 for plain python.
    """
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks else []
    line = [sys.executable, *torchrun, *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Toy data, traces, and a model of random weights."""
    folder = tmp_path_factory.mktemp("toy")
    toy.main([str(folder), "--train", "7", "--test", "5"])
    write_traces(folder)
    return folder


@pytest.fixture(scope="module")
def learned(folder):
    """A run after which the model writes the tags and little else."""
    stage(*sft_flags(folder, folder / "model", "sft"), "--max-steps", 25)
    return folder / "sft"


def stage(*arguments, ranks=1):
    """Run a stage of hoi_r1.py: on one rank in this process, on more under torchrun."""
    if ranks > 1:
        run("hoi_r1.py", *arguments, ranks=ranks)
    else:
        hoi_r1.main([*map(str, arguments)])


def sft_flags(folder, model, out):
    common = ["--model", model, "--data", folder / "data", "--out", folder / out, *TOY]
    recipe = ["--batch-size", 7, "--learning-rate", 1e-3, "--traces", folder / "traces.jsonl"]
    return ["sft", *common, *recipe]


def difference(one, other):
    one, other = weights(one), weights(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def assert_equal_metrics(one, two):
    """Compares gradient norms too: AdamW would hide a gradient that is wrong by a factor."""
    for mine, other in zip(metrics(one), metrics(two), strict=True):
        for name in mine.keys() & {"loss", "grad_norm", "kl", "reward_total", "reward_total_std"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


@pytest.fixture(scope="module")
def wide(folder):
    """A folder with a random model that is large enough to be sharded in parts, as Qwen's are."""
    text, vision = (toy.TOY_SIZES[part] for part in ("text", "vision"))
    sizes = {"text": text | {"intermediate_size": 2560}}
    sizes |= {"vision": vision | {"intermediate_size": 1536}}
    model = toy.random_model(toy.model_config(toy.toy_tokenizer(), sizes), seed=0)
    parts = [model.model.visual, *model.model.language_model.layers]
    assert all(sum(p.numel() for p in x.parameters()) >= SMALLEST_PART for x in parts)
    shutil.copytree(folder / "model", folder / "wide" / "model")
    model.save_pretrained(folder / "wide" / "model")
    return folder / "wide"


def test_two_ranks_equal_one_in_sft(folder, wide):
    """Two ranks gather parameters once per step, and one rank for each forward."""
    for ranks, once in ((1, ()), (2, ["--no-gradient-checkpointing"])):
        flags = sft_flags(folder, wide / "model", f"sft{ranks}")
        stage(*flags, *UNEVEN, *once, ranks=ranks)
    assert_equal_metrics(folder / "sft1", folder / "sft2")
    assert difference(folder / "sft1", folder / "sft2") < 1e-5
    assert difference(folder / "sft1", wide) > 1e-4


@pytest.mark.slow
def test_two_ranks_equal_one_in_grpo(folder, learned):
    """Samples, rewards and weights are equal, and so are the lines of predictions."""
    common = ["--data", folder / "data", *TOY]
    for ranks in (1, 2):
        flags = [*UNEVEN, "--max-new-tokens", 40, "--out", folder / f"grpo{ranks}"]
        stage("grpo", "--model", learned / "model", *common, *flags, ranks=ranks)
        flags = ["--model", learned / "model", "--out", folder / f"test{ranks}"]
        flags += ["--max-new-tokens", 40, "--scores", "likelihood"]
        stage("predict", *common, *flags, ranks=ranks)
    for one, two in zip(metrics(folder / "grpo1"), metrics(folder / "grpo2"), strict=True):
        assert one["completion_length"] == two["completion_length"]
        assert max(one["logprob_gap"], two["logprob_gap"]) < 1e-4
    assert_equal_metrics(folder / "grpo1", folder / "grpo2")
    assert difference(folder / "grpo1", folder / "grpo2") < 1e-5
    assert difference(folder / "grpo1", learned) > 1e-5  # there was something to learn
    lines = [(folder / f"test{n}" / "predictions.jsonl").read_text().splitlines() for n in (1, 2)]
    found = [[(row["file_name"], row["text"]) for row in map(json.loads, each)] for each in lines]
    samples = annotations.load_split(folder / "data", "test")
    assert found[0] == found[1]
    assert [name for name, _ in found[0]] == [sample.file_name for sample in samples]


PROGRAMS = ["hoi_r1.py", "hoi_r1.py sft", "hoi_r1.py grpo", "hoi_r1.py report", "hoi_r1.py show"]
PROGRAMS += ["hoi_r1.py check", "evaluate.py", "teacher.py"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_answers_without_slow_imports(program):
    slow = {"torch", "transformers", "scipy", "numpy" if "hoi_r1" in program else "torch"}
    code = (
        "import runpy, sys\n"
        f"sys.argv = {program.split() + ['--help']}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"assert not {slow} & set(sys.modules)"
    )
    assert "usage:" in run("-c", code)


def test_report_and_show_do_not_load_torch():
    modules = "import sys, engine.report.page, engine.report.pictures; "
    run("-c", modules + "assert 'torch' not in sys.modules")
