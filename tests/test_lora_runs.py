"""Whole runs with --lora-rank and --adapter on the toy: resume, export, predict, refusals."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from tests.runs import config_of, metrics, refusal, run
from tests.test_end_to_end import TOY, UNEVEN, assert_equal_metrics, difference, stage
from tests.test_lora import NAME, PEFT


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """learned/: an SFT after which rewards differ. grpo/: from there, GRPO with adapters."""
    out = tmp_path_factory.mktemp("runs")
    run(config_of("sft", folder, out / "learned", batch_size=7, max_steps=25))
    run(grpo_config(folder, out, "grpo"))
    return out


def grpo_config(folder, out, name):
    options = {"lora_rank": 4, "learning_rate": 1e-2, "max_new_tokens": 40, "save_every": 1}
    return config_of("grpo", folder, out / name, model=str(out / "learned" / "model"), **options)


def stopped_copy(out, other, done):
    """Copy a run's folder as it was after `done` steps."""
    later = [p.name for p in out.glob("checkpoint-*") if int(p.name.split("-")[1]) > done]
    shutil.copytree(out, other, ignore=shutil.ignore_patterns(*later, "model", "adapter"))
    config = json.loads((other / "config.json").read_text())
    del config["finished"]
    (other / "config.json").write_text(json.dumps(config))


def assert_same_results(one, other, start):
    """The weights of two runs are equal to the bit, and differ from those of the start."""
    found = [path.relative_to(one) for path in one.glob("*/*.safetensors")]
    assert found and difference(one, start) > 1e-3
    for name in found:
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_run_with_adapters_resumes_to_the_same_bits(runs, folder):
    stopped_copy(runs / "grpo", runs / "resumed", 2)
    run(replace(grpo_config(folder, runs, "resumed"), resume=True))
    assert_same_results(runs / "grpo", runs / "resumed", runs / "learned")
    assert [row["step"] for row in metrics(runs / "resumed")] == [1, 2, 3]


def test_checkpoint_holds_adapters_only(runs):
    checkpoint = runs / "grpo" / "checkpoint-000003"
    names = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    of_model = [name for name in names if name.startswith("model.")]
    assert len(of_model) == 28 and all(".lora_" in name for name in of_model)


def test_predictions_of_merged_model_and_of_adapter_are_equal(runs, folder):
    merged, adapter = str(runs / "grpo" / "model"), str(runs / "grpo" / "adapter")
    on_base, lines = {"model": str(runs / "learned" / "model"), "adapter": adapter}, []
    for named in ({"model": merged}, {"model": adapter}, on_base):
        out = runs / f"test{len(lines)}"
        run(config_of("predict", folder, out, max_new_tokens=40, **named))
        lines.append((out / "predictions.jsonl").read_text())
    assert lines[0] == lines[1] == lines[2] and len(set(lines[0].splitlines())) == 6


def test_training_continues_an_adapter(runs, folder):
    """The learning rate is LoRA's, pi_ref is the start, and the adapter names its base."""
    options = {"model": str(runs / "grpo" / "adapter"), "learning_rate": None, "max_steps": 1}
    run(config_of("grpo", folder, runs / "further", max_new_tokens=40, **options))
    stored = json.loads((runs / "further" / "config.json").read_text())
    assert stored["model"] == str(runs / "learned" / "model")
    assert stored["adapter"] == options["model"] and stored["learning_rate"] == 1e-5
    assert metrics(runs / "further")[0]["kl"] == 0
    assert 0 < difference(runs / "grpo", runs / "further") < 1e-3
    written = json.loads((runs / "further" / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == stored["model"] and written["r"] == 4


def test_two_ranks_equal_one_with_adapters(runs, folder):
    model, (one, two) = runs / "learned" / "model", (runs / f"ranks{n}" for n in (1, 2))
    for ranks, out in ((1, one), (2, two)):
        flags = [*UNEVEN, "--max-new-tokens", 40, "--lora-rank", 4, "--out", out]
        stage("grpo", "--model", model, "--data", folder / "data", *TOY, *flags, ranks=ranks)
    assert_equal_metrics(one, two)
    assert difference(one, two) < 1e-5 < 0.1 * difference(one, runs / "learned")


# Refusals

Q = f"{NAME}model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
SEVENTH = Q.replace("layers.0", "layers.7")
VISION = f"{NAME}model.visual.blocks.0.mlp.up_proj.lora_"
FAULTS = {  # changes of adapter_config.json, changed weights, the message
    "rank": ({"r": 4}, {}, "has rank 2, and adapter_config.json says 4"),
    "rsLoRA": ({"use_rslora": True}, {}, "only plain LoRA adapters are read, and this one has use"),
    "DoRA": ({"use_dora": True}, {}, "and this one has use_dora"),
    "bias": ({}, {Q.replace("lora_A.weight", "bias"): (64,)}, "q_proj.bias is more than a plain"),
    "other model": ({}, {Q: (2, 128)}, "layers.0.self_attn.q_proj does not fit that layer"),
    "no B": ({}, {SEVENTH: (2, 64)}, "layers.7.self_attn.q_proj.lora_B.weight is missing"),
    "more layers": ({}, {SEVENTH: (2, 64), SEVENTH.replace("lora_A", "lora_B"): (64, 2)},
                    "layers.7.self_attn.q_proj.lora_A.weight belongs to no linear layer"),
    "vision": ({}, {f"{VISION}A.weight": (2, 32), f"{VISION}B.weight": (48, 2)},
               "visual.blocks.0.mlp.up_proj.lora_A.weight belongs to no linear layer"),
}  # fmt: skip


def changed_adapter(tmp_path, changes, shapes):
    """A copy of peft's adapter with another configuration and other weights."""
    path = shutil.copytree(PEFT, tmp_path / "adapter")
    config = json.loads((path / "adapter_config.json").read_text()) | changes
    (path / "adapter_config.json").write_text(json.dumps(config))
    state = load_file(path / "adapter_model.safetensors")
    state |= {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(state, path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize("fault", FAULTS)
def test_adapter_that_does_not_fit_is_refused(fault, folder, tmp_path):
    *changes, said = FAULTS[fault]
    path = changed_adapter(tmp_path, *changes)
    assert said in refusal(config_of("predict", folder, tmp_path / "out", adapter=str(path)))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_adapter_is_named(file, folder, tmp_path):
    path = shutil.copytree(PEFT, tmp_path / "adapter")
    config = config_of("sft", folder, tmp_path / "out", adapter=str(path))
    (path / file).write_bytes((path / file).read_bytes()[:-50])
    assert refusal(config).startswith(f"{path}: no LoRA adapter that can be read")
    (path / file).unlink()
    assert file in refusal(config) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, said", [
    ({"lora_rank": 3}, "--lora-rank 3: the adapter has rank 2"),
    ({"lora_alpha": 4}, "--lora-alpha 4: the adapter has alpha 6"),
])  # fmt: skip
def test_options_that_contradict_the_adapter_are_refused(options, said, folder, tmp_path):
    assert refusal(config_of("grpo", folder, tmp_path, adapter=str(PEFT), **options)) == said


def test_adapter_without_the_name_of_its_base_is_refused(folder, tmp_path):
    path = changed_adapter(tmp_path, {"base_model_name_or_path": None}, {})
    line = refusal(config_of("predict", folder, tmp_path / "out", model=str(path)))
    assert f"--model {path}: a LoRA adapter of an unnamed model, which is not there" in line
