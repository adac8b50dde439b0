"""The programs as a user runs them: two ranks under torchrun, a kill -9, and --help."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import hoi_r1
from demo import toy
from engine.data import annotations
from engine.model.policy import SMALLEST_PART  # before the tests set it to 0
from tests.runs import metrics, write_traces

ROOT = Path(__file__).resolve().parents[1]
TOY = ["--no-task-description", "--workers", "0"]
# Seven images in steps of three on two ranks: unequal shares, in the third step a rank without any,
# and micro-batches of one image each, so that a rank has fewer of them than the other.
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
    """A run whose model has learned to write the tags and little else."""
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
    one, other = (load_file(path / "model" / "model.safetensors") for path in (one, other))
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def assert_equal_metrics(one, two):
    """Loss and gradient norm: AdamW would hide a gradient that is off by a factor."""
    logs = [(path / "metrics.jsonl").read_text().splitlines() for path in (one, two)]
    for mine, other in zip(*(map(json.loads, log) for log in logs), strict=True):
        for name in mine.keys() & {"loss", "grad_norm", "kl", "reward_total", "reward_total_std"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


@pytest.fixture(scope="module")
def wide(folder):
    """A folder with model/, of random weights: large enough to be sharded in parts, as Qwen's."""
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
    """Of the two, parameters are gathered once a step, and of the one for each forward."""
    for ranks, once in ((1, ()), (2, ["--no-gradient-checkpointing"])):
        flags = sft_flags(folder, wide / "model", f"sft{ranks}")
        stage(*flags, *UNEVEN, *once, ranks=ranks)
    assert_equal_metrics(folder / "sft1", folder / "sft2")
    assert difference(folder / "sft1", folder / "sft2") < 1e-5
    assert difference(folder / "sft1", wide) > 1e-4


@pytest.mark.slow
def test_what_is_promised_of_the_number_of_ranks(folder, learned):
    """Losses to 1e-6. AdamW divides by the second moment, where that is small by rounding alone."""
    flags = ["--max-steps", 8, "--batch-size", 3, "--learning-rate", 1e-3]
    outs = [folder / f"ranks{ranks}" for ranks in (1, 2, 3)]
    for ranks, out in enumerate(outs, start=1):
        stage(*sft_flags(folder, learned / "model", out.name), *flags, ranks=ranks)
    one, two, three = ([row["loss"] for row in metrics(out)] for out in outs)
    assert two == pytest.approx(one, rel=1e-6) and three == pytest.approx(one, rel=1e-6)
    moved = [difference(outs[0], other) for other in (*outs[1:], learned)]
    assert max(moved[:2]) < 1e-4 and moved[2] > 1e-3, moved


@pytest.mark.slow
def test_two_ranks_equal_one_in_grpo(folder, learned):
    """Same samples, same rewards, same weights; then predictions, whose lines are equal too."""
    common = ["--data", folder / "data", *TOY]
    for ranks in (1, 2):
        flags = [*UNEVEN, "--max-new-tokens", 40, "--out", folder / f"grpo{ranks}"]
        stage("grpo", "--model", learned / "model", *common, *flags, ranks=ranks)
        flags = ["--model", learned / "model", "--out", folder / f"test{ranks}"]
        flags += ["--max-new-tokens", 40, "--scores", "likelihood"]
        stage("predict", *common, *flags, ranks=ranks)
    logs = [(folder / f"grpo{n}" / "metrics.jsonl").read_text().splitlines() for n in (1, 2)]
    for one, two in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert one["completion_length"] == two["completion_length"]
        assert max(one["logprob_gap"], two["logprob_gap"]) < 1e-4
    assert_equal_metrics(folder / "grpo1", folder / "grpo2")
    assert difference(folder / "grpo1", folder / "grpo2") < 1e-5
    assert difference(folder / "grpo1", learned) > 1e-5  # there was something to learn
    lines = [(folder / f"test{n}" / "predictions.jsonl").read_text().splitlines() for n in (1, 2)]
    names = [[json.loads(line)["file_name"] for line in each] for each in lines]
    samples = annotations.load_split(folder / "data", "test")
    assert names[0] == names[1] == [sample.file_name for sample in samples]
    texts = [[json.loads(line)["text"] for line in each] for each in lines]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_killed_at_any_moment_a_run_goes_on_to_the_same_weights(folder):
    flags = ["--max-steps", 6, "--save-every", 1, "--workers", 2]
    start = folder / "model"
    stage(*sft_flags(folder, start, "whole"), *flags)
    line = [sys.executable, "hoi_r1.py", *map(str, sft_flags(folder, start, "killed") + flags)]
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE)
    log = folder / "killed" / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "killed" / "model").exists()
    stage(*sft_flags(folder, start, "killed"), *flags, "--resume")
    assert difference(folder / "whole", folder / "killed") == 0
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 7))


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
