"""hoi_r1.py, whole runs on the toy in this process: resume, metrics, switches, refusals."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

import engine.data.examples
import engine.data.loader
import engine.runs.run_folder
import grpo
import predict
import sft
from engine.data import annotations
from engine.model.attention import GROUP_ATTENTION, WINDOW_ATTENTION
from engine.model.policy import load_model
from engine.report import health
from tests.runs import (
    config_of,
    metrics,
    policy_of,
    refusal,
    run,
    training_examples,
    weights,
)


@pytest.fixture
def any_reward(monkeypatch):
    """A reward that random text earns too: an untrained model's answers are all worth 0."""

    def score(trainer, example, group):
        values = [float((ids % 7).float().mean()) for ids in group.completion_ids]
        none = {"object": 0.0, "verb": 0.0, "iou": 0.0, "written": {"instances": 2, "verbs": 3}}
        texts = [trainer.examples.decode(ids) for ids in group.completion_ids]
        return [{"text": t, "format": v, **none, "total": v} for t, v in zip(texts, values)]

    monkeypatch.setattr(grpo.GRPO, "score", score)


def assert_resumes_bit_for_bit(stage, method, crash, folder, tmp_path, **options):
    """A run whose `Run` method crashes, resumed, comes to the weights of one that did not."""
    run(config_of(stage, folder, tmp_path / "whole", **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runs.run_folder.Run, method, crash)
        with pytest.raises(KeyboardInterrupt):
            run(config_of(stage, folder, tmp_path / "cut", **options))
    run(config_of(stage, folder, tmp_path / "cut", resume=True, **options))
    first, whole, cut = weights(folder), weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert any(not torch.equal(whole[name], first[name]) for name in whole)


def test_sft_resumes_bit_for_bit(folder, tmp_path):
    """4 steps at once equal 3 steps, a crash after the checkpoint of step 2, and the rest."""
    log = engine.runs.run_folder.Run.log

    def crash(folder_, name, step, values):
        log(folder_, name, step, values)
        if step == 3:
            with open(folder_.folder / "metrics.jsonl", "a") as file:
                file.write('{"step": 4, "lo')
            raise KeyboardInterrupt

    options = {"max_steps": 4, "save_every": 2}
    assert_resumes_bit_for_bit("sft", "log", crash, folder, tmp_path, **options)
    assert [row["step"] for row in metrics(tmp_path / "cut")] == [1, 2, 3, 4]
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_grpo_resumes_bit_for_bit(folder, tmp_path, any_reward):
    """With a crash while the second checkpoint is written."""
    save = engine.runs.run_folder.Run.save

    def crash(folder_, policy, optimizer, done, keep):
        if done == 2:
            aside = folder_.folder / "checkpoint-000002.tmp"
            aside.mkdir()
            (aside / "half").write_text("a file")
            raise KeyboardInterrupt
        save(folder_, policy, optimizer, done, keep)

    options = {"save_every": 1, "updates_per_batch": 2}
    assert_resumes_bit_for_bit("grpo", "save", crash, folder, tmp_path, **options)
    rollouts = [(tmp_path / name / "rollouts.jsonl").read_text() for name in ("whole", "cut")]
    assert rollouts[0] == rollouts[1]
    rows = [json.loads(line) for line in rollouts[0].splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(len(row["completions"]) == 4 for row in rows)
    assert all(one["total"] > 0 and one["text"] for row in rows for one in row["completions"])


def crash_in(into: Path, name: str):
    """Leave half of a file, as a process does that is killed while writing."""
    into.mkdir(exist_ok=True)
    (into / name).write_text("half")
    raise KeyboardInterrupt


TWO_STEPS = {"max_steps": 2, "save_every": 1}


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """The weights of an SFT of two steps."""
    out = tmp_path_factory.mktemp("whole")
    run(config_of("sft", folder, out, **TWO_STEPS))
    return weights(out)


def test_a_crash_amid_a_checkpoint_leaves_the_one_before(
    folder, undisturbed, tmp_path, monkeypatch
):
    out, save = tmp_path / "cut", dcp.save

    def save_one(state, checkpoint_id, storage_writer):
        if list(out.glob("checkpoint-*")):
            crash_in(Path(checkpoint_id), "__0_0.distcp")
        save(state, checkpoint_id=checkpoint_id, storage_writer=storage_writer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dcp, "save", save_one)
        run(config_of("sft", folder, out, **TWO_STEPS))
    assert folders(out) == ["checkpoint-000001"]
    assert_goes_on_as_if_nothing_had_been(folder, out, undisturbed)


def test_a_crash_amid_the_model_leaves_none(folder, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "cut"

    def save_pretrained(model, into, **options):
        crash_in(Path(into), "model.safetensors")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Qwen2_5_VLForConditionalGeneration, "save_pretrained", save_pretrained)
        run(config_of("sft", folder, out, **TWO_STEPS))
    assert folders(out) == ["checkpoint-000001", "checkpoint-000002"]
    assert_goes_on_as_if_nothing_had_been(folder, out, undisturbed)


def folders(out: Path) -> list[str]:
    """The folders of a run that are whole."""
    return sorted(p.name for p in out.iterdir() if p.is_dir() and p.suffix != ".tmp")


def assert_goes_on_as_if_nothing_had_been(folder, cut: Path, expected: dict):
    run(config_of("sft", folder, cut, resume=True, **TWO_STEPS))
    assert not list(cut.glob("*.tmp"))
    found = weights(cut)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_before_the_first_good_step_changes_nothing(folder, tmp_path, monkeypatch):
    """The library would make AdamW's moments by a step of its own, and that step would count."""
    sft_loss = sft.sft_loss
    for save_every in (0, 1):
        losses = iter([math.nan, 1.0, 1.0])
        monkeypatch.setattr(sft, "sft_loss", lambda *values: sft_loss(*values) * next(losses))
        options = {"max_steps": 3, "save_every": save_every}
        run(config_of("sft", folder, tmp_path / str(save_every), **options))
        skipped = [row["skipped"] for row in metrics(tmp_path / str(save_every))]
        assert skipped == [True, False, False]
    without, saved = weights(tmp_path / "0"), weights(tmp_path / "1")
    assert all(torch.equal(without[name], saved[name]) for name in without)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_step_whose_loss_is_not_finite_is_left_out(
    stage, folder, tmp_path, monkeypatch, any_reward
):
    """Its gradient is finite: NaN is added behind the last operation."""
    sft_loss, objective = sft.sft_loss, grpo.grpo_objective

    def spoilt(*values, **options):
        terms = objective(*values, **options)
        return terms | {"objective": terms["objective"] + math.nan}

    monkeypatch.setattr(sft, "sft_loss", lambda *values: sft_loss(*values) + math.nan)
    monkeypatch.setattr(grpo, "grpo_objective", spoilt)
    run(config_of(stage, folder, tmp_path / "run", max_steps=1))
    (row,) = metrics(tmp_path / "run")
    assert row["loss"] is None and row["skipped"] and row["grad_norm"] > 0
    first, last = weights(folder), weights(tmp_path / "run")
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_grpo_logs_what_matters(folder, tmp_path, any_reward):
    """And pi_old's log-probs are those of pi_theta, at a temperature that is not 1."""
    evaluation = {"eval_every": 3, "eval_max_new_tokens": 40}
    run(config_of("grpo", folder, tmp_path / "run", temperature=0.7, **evaluation))
    rows = metrics(tmp_path / "run")
    names = {
        *("loss", "learning_rate", "grad_norm", "kl", "clip_fraction", "zero_variance_groups"),
        *("reward_format", "reward_object_std", "reward_verb", "reward_iou", "reward_total"),
        *("completion_length", "truncated", "logprob_gap", "seconds_sample", "seconds_update"),
        *("sample_tokens_per_second", "update_tokens_per_second", "seconds_waiting"),
        *("skipped", "distinct_completions", "share_waiting"),
        *("entropy", "instances", "verbs_per_instance", "instances_true"),
        *("verbs_per_instance_true", "advantage_format", "advantage_iou"),
    }
    assert all(names <= row.keys() for row in rows)
    assert all(row["share_waiting"] == row["seconds_waiting"] / row["seconds"] for row in rows)
    assert max(row["logprob_gap"] for row in rows) < 1e-4
    assert all(row["clip_fraction"] == 0 for row in rows)  # one update a batch: every ratio is 1
    assert all(row["reward_total_std"] > 0 for row in rows)
    assert all(row["distinct_completions"] > 0.9 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[2]["kl"] > 1e-6
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert {"KL", "Entropy"} <= {verdict.name for verdict in health.verdicts(rows)}
    assert "eval_map" in rows[2] and "eval_map" not in rows[1]


def test_micro_batches_do_not_change_the_step(folder, tmp_path):
    for name, budget in (("one", 10_000), ("many", 1)):
        options = {"max_steps": 1, "tokens_per_microbatch": budget}
        run(config_of("sft", folder, tmp_path / name, **options))
    one, many = metrics(tmp_path / "one")[0], metrics(tmp_path / "many")[0]
    assert one["loss"] == pytest.approx(many["loss"], rel=1e-6)
    assert one["grad_norm"] == pytest.approx(many["grad_norm"], rel=1e-5)


def test_no_thinking_needs_no_trace(folder, tmp_path):
    run(
        config_of("sft", folder, tmp_path / "run", thinking=False, traces="", max_steps=1)
    )
    assert len(metrics(tmp_path / "run")) == 1


def test_epochs_steps_and_checkpoints(folder, tmp_path):
    """20 images in batches of 8: 3 steps an epoch; the last checkpoint stays, or none is made."""
    options = {"batch_size": 8, "max_steps": 0, "save_every": 2}
    run(config_of("sft", folder, tmp_path / "two", epochs=2, **options))
    assert len(metrics(tmp_path / "two")) == 6
    assert folders(tmp_path / "two") == ["checkpoint-000004", "checkpoint-000006", "model"]
    run(config_of("sft", folder, tmp_path / "one", **options | {"save_every": 0}))
    assert len(metrics(tmp_path / "one")) == 3
    assert not list((tmp_path / "one").glob("checkpoint-*"))


def test_what_the_switches_switch(folder, tmp_path, ranks):
    config = config_of("grpo", folder, "x")
    examples = training_examples(config)
    policy = policy_of(config, ranks)
    assert policy.model.language_model.layers[0].gradient_checkpointing
    config = replace(config, gradient_checkpointing=False, task_description=True)
    policy = policy_of(config, ranks)
    assert not policy.model.language_model.layers[0].gradient_checkpointing
    long = training_examples(config)[0].prompt.prompt_ids
    assert "airplane: board, direct" in examples.decode(long)
    assert "airplane" not in examples.decode(examples[0].prompt.prompt_ids)


def test_limit_and_a_second_prediction(folder, tmp_path):
    config = config_of("predict", folder, tmp_path / "test", limit=2, max_new_tokens=3)
    run(config)
    path = tmp_path / "test" / "predictions.jsonl"
    assert len(path.read_text().splitlines()) == 2
    assert "holds a run" in refusal(config)


def test_prediction_goes_on_where_it_was_cut(folder, tmp_path, monkeypatch):
    """Killed in the third image's line: two images are kept, four are predicted anew.

    The part is that of a second rank, whose first had none yet when the crash came.
    """
    config = config_of("predict", folder, tmp_path / "test", max_new_tokens=5)
    run(config)
    whole = (tmp_path / "test" / "predictions.jsonl").read_text()
    part = tmp_path / "test" / "part-0000.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    part.with_name("part-0001.jsonl").write_text("".join(lines[:2]) + lines[2][:-9])
    part.unlink()
    (tmp_path / "test" / "predictions.jsonl").unlink()
    asked, read = [], engine.data.loader.read_ahead

    def read_ahead(examples, indices, workers):
        asked.extend(indices)
        return read(examples, indices, workers)

    monkeypatch.setattr(predict, "read_ahead", read_ahead)
    run(replace(config, resume=True))
    assert asked == [2, 3, 4, 5]
    assert (tmp_path / "test" / "predictions.jsonl").read_text() == whole


def test_the_result_is_an_ordinary_model_folder(folder, tmp_path):
    """fp32, so that the next stage starts where this one ended."""
    run(config_of("sft", folder, tmp_path / "run", max_steps=1))
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}
    path = tmp_path / "run" / "model"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert AutoTokenizer.from_pretrained(path).chat_template
    processor = Qwen2VLImageProcessorPil.from_pretrained(path)
    assert (processor.patch_size, processor.size["shortest_edge"]) == (14, 784)
    saved = json.loads((path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "Qwen2VLImageProcessor"  # the name that servers know
    assert not list(path.glob("*.bin")) and not (tmp_path / "run" / "model.tmp").exists()
    names = {GROUP_ATTENTION, WINDOW_ATTENTION}  # which mean nothing to others
    assert not any(name in (path / "config.json").read_text() for name in names)


def test_weights_in_pickles_are_refused(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_model(str(tmp_path / "model"), torch.device("cpu"))
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    load_model(str(tmp_path / "model"), torch.device("cpu"))


def test_a_folder_is_not_given_to_two_runs(folder, tmp_path):
    config = config_of("sft", folder, tmp_path / "run", max_steps=1)
    run(config)
    refused = {
        "holds a run": config,
        "seed = 0, not 5": replace(config, resume=True, seed=5),
    }
    for message, other in refused.items():
        assert message in refusal(other)
    run(replace(config, resume=True, tokens_per_microbatch=50))


@pytest.mark.parametrize("stage, split", [("grpo", "train"), ("sft", "test"), ("predict", "test")])
def test_missing_images_stop_a_run_before_the_model_is_read(
    stage, split, folder, tmp_path
):
    """Those of the training set, those of its evaluations, those to predict."""
    shutil.copytree(folder / "data", tmp_path / "data")
    name = annotations.load_split(folder / "data", split)[3].file_name
    (tmp_path / "data" / "images" / f"{split}2015" / name).unlink()
    options = {"eval_every": 1} if split == "test" and stage != "predict" else {}
    config = config_of(stage, folder, tmp_path / "run", data=str(tmp_path / "data"), **options)
    assert name in refusal(config)
    assert not (tmp_path / "run").exists()


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
