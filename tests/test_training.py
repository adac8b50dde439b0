"""Whole runs on the toy in this process: resume, logs, steps, and the files of a run."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

import train
from engine.data import annotations
from engine.model.attention import GROUP_ATTENTION, WINDOW_ATTENTION
from engine.report import health
from engine.runs.run_folder import RunFolder
from tests.runs import as_killed, config_of, metrics, refusal, run, same_weights, weights

SMALL = {
    "sft": {"max_steps": 4, "save_every": 2},
    "grpo": {"max_steps": 2, "save_every": 1, "updates_per_batch": 2},
}


def folders(out):
    """The complete folders of a run."""
    return sorted(p.name for p in out.iterdir() if p.is_dir() and p.suffix != ".tmp")


@pytest.mark.parametrize(
    "stage, amid", [("sft", "checkpoint-000004"), ("sft", "model"), ("grpo", "checkpoint-000002")]
)
def test_killed_run_resumes_to_the_same_bits(stage, amid, folder, tmp_path, any_reward):
    config, names = config_of(stage, folder, tmp_path, **SMALL[stage]), ("loss", "grad_norm")
    run(config)
    expected, logged = weights(tmp_path), [[row[n] for n in names] for row in metrics(tmp_path)]
    rollouts = stage == "grpo" and (tmp_path / "rollouts.jsonl").read_text()
    as_killed(tmp_path, amid)
    run(replace(config, resume=True))
    assert same_weights(expected, tmp_path) and not same_weights(expected, folder)
    assert [[row[name] for name in names] for row in metrics(tmp_path)] == logged
    assert not list(tmp_path.glob("*.tmp"))
    if rollouts:
        assert (tmp_path / "rollouts.jsonl").read_text() == rollouts
        rows = [json.loads(line) for line in rollouts.splitlines()]
        assert [row["step"] for row in rows] == [1, 2]
        completions = [one for row in rows for one in row["completions"]]
        assert len(completions) == 8 and all(one["text"] for one in completions)


def test_signal_while_a_checkpoint_is_written_stops_after_it(folder, tmp_path, monkeypatch):
    """A further step would wait for image workers that the signal has ended too."""
    save = RunFolder.save

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments, **options)

    monkeypatch.setattr(RunFolder, "save", interrupted)
    run(config_of("sft", folder, tmp_path, max_steps=3, save_every=2))
    assert len(metrics(tmp_path)) == 2 and folders(tmp_path) == ["checkpoint-000002"]
    assert (tmp_path / "report.html").exists()  # written with each checkpoint


def test_killed_prediction_continues(folder, tmp_path):
    """A kill cut the third line: two images are kept, and four are predicted again.

    The lines are those of a second rank; the first rank had written none.
    """
    config = config_of("predict", folder, tmp_path, max_new_tokens=5)
    run(config)
    path, part = tmp_path / "predictions.jsonl", tmp_path / "part-0000.jsonl"
    whole = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    rows = [json.loads(line) for line in part.read_text().splitlines()]
    lines = [json.dumps(row | {"line": row["line"] | {"text": "kept"}}) + "\n" for row in rows]
    part.with_name("part-0001.jsonl").write_text("".join(lines[:2]) + lines[2][:-9])
    part.unlink()
    path.unlink()
    run(replace(config, resume=True))
    kept = [row["index"] for row in rows[:2]]
    expected = ["kept" if index in kept else text for index, text in enumerate(whole)]
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == expected


def test_steps_with_a_loss_that_is_not_finite_change_nothing(folder, tmp_path):
    """The log has null, as JSON has no NaN. No checkpoint is written."""
    shutil.copytree(folder / "model", tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.norm.weight"][0] = torch.nan
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    out = tmp_path / "run"
    run(config_of("sft", folder, out, model=str(tmp_path / "model"), max_steps=2, save_every=1))
    assert [(row["loss"], row["skipped"]) for row in metrics(out)] == [(None, True)] * 2
    assert "NaN" not in (out / "metrics.jsonl").read_text() and folders(out) == ["model"]
    found = weights(out)
    assert all(torch.equal(state[name].nan_to_num(), found[name].nan_to_num()) for name in found)


NAMES = """loss learning_rate grad_norm kl clip_fraction zero_variance_groups reward_format
reward_object_std reward_verb reward_iou reward_total completion_length truncated logprob_gap
seconds_sample seconds_update sample_tokens_per_second update_tokens_per_second seconds_waiting
skipped distinct_completions share_waiting entropy instances verbs_per_instance instances_true
verbs_per_instance_true advantage_format advantage_iou""".split()


def test_metrics_of_grpo(folder, tmp_path, any_reward):
    """pi_old's log-probs are those of pi_theta, here at a temperature that is not 1."""
    evaluation = {"eval_every": 3, "eval_max_new_tokens": 40}
    run(config_of("grpo", folder, tmp_path, temperature=0.7, **evaluation))
    rows = metrics(tmp_path)
    for row in rows:
        assert row.keys() >= set(NAMES)
        assert row["share_waiting"] == row["seconds_waiting"] / row["seconds"]
        assert row["logprob_gap"] < 1e-4
        assert row["clip_fraction"] == 0  # with one update per batch every ratio is 1
        assert row["reward_total_std"] > 0 and row["distinct_completions"] > 0.9
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[2]["kl"] > 1e-6
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert {"KL", "Entropy"} <= {verdict.name for verdict in health.verdicts(rows)}
    assert "eval_map" in rows[2] and "eval_map" not in rows[1]


def test_epochs_steps_and_checkpoints(folder, tmp_path):
    """20 images in batches of 8: 3 steps per epoch. The newest checkpoints stay."""
    options = {"batch_size": 8, "max_steps": 0, "save_every": 1, "keep": 3}
    run(config_of("sft", folder, tmp_path / "two", epochs=2, **options))
    assert len(metrics(tmp_path / "two")) == 6
    kept = [f"checkpoint-00000{step}" for step in (4, 5, 6)]
    assert folders(tmp_path / "two") == [*kept, "model"]
    run(config_of("sft", folder, tmp_path / "one", **options | {"save_every": 0}))
    assert len(metrics(tmp_path / "one")) == 3 and folders(tmp_path / "one") == ["model"]


def test_short_training_is_warned_about():
    said = ["40 steps at --learning-rate 1e-06 move a weight by at most 4e-05"]
    assert train.small_change(40, 1e-6) == said
    assert train.small_change(100, 1e-6) == train.small_change(40, 1e-5) == []


def test_result_is_an_ordinary_model_folder(folder, tmp_path):
    """Weights are fp32, so the next stage starts exactly where this one ended."""
    run(config_of("sft", folder, tmp_path, max_steps=1))
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}
    path = tmp_path / "model"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert AutoTokenizer.from_pretrained(path).chat_template
    processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    assert (processor.patch_size, processor.size["shortest_edge"]) == (14, 784)
    saved = json.loads((path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "Qwen2VLImageProcessor"  # the usual name
    assert not list(path.glob("*.bin")) and not (tmp_path / "model.tmp").exists()
    names = {GROUP_ATTENTION, WINDOW_ATTENTION}  # unknown to other programs
    assert not any(name in (path / "config.json").read_text() for name in names)
    with Image.open(tmp_path / "first_sample.png") as picture:
        assert picture.width >= 640


def test_dry_run_shows_prompt_and_target_and_writes_nothing(folder, tmp_path, capsys):
    for stage in ("sft", "grpo", "predict"):
        run(config_of(stage, folder, tmp_path / "run", dry_run=True))
        shown = capsys.readouterr().out
        assert "Thinking Process" in shown and "<|image_pad|> x 32" in shown
        if stage == "sft":
            assert "supervised: these" in shown and "<|im_end|>" in shown.splitlines()[-1]
        else:
            assert '"verb": 1.0, "iou": 1.0, "total": 3.' in shown  # 3.8, or less by Eq. 7
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage, split", [("grpo", "train"), ("sft", "test"), ("predict", "test")])
def test_missing_images_stop_a_run_before_the_model_is_read(stage, split, folder, tmp_path):
    """Images of training, of its evaluations, and of prediction. --exclude leaves them out."""
    shutil.copytree(folder / "data", tmp_path / "data")
    name = annotations.load_split(folder / "data", split)[3].file_name
    (tmp_path / "data" / "images" / f"{split}2015" / name).unlink()
    options = {"eval_every": 1, "eval_max_new_tokens": 2} if stage == "sft" else {}
    config = config_of(stage, folder, tmp_path / "run", data=str(tmp_path / "data"), **options)
    said = refusal(config)
    assert said.startswith("1 images are missing, first ") and f"/{name} (" in said
    assert "hoi_r1.py check" in said and "--exclude" in said
    assert not (tmp_path / "run").exists()
    (tmp_path / "bad.txt").write_text(f"{name}\n")
    short = {"max_new_tokens": 2} if stage == "predict" else {"max_steps": 1}
    run(replace(config, exclude=str(tmp_path / "bad.txt"), **short))
