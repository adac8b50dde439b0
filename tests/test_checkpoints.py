"""Checkpoints: what they hold, which cannot be read, and what --resume may change."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from engine.runs.run_folder import RunFolder
from hicodet import InputError
from tests import runs
from tests.runs import as_killed, config_of, metrics, refusal, run, same_weights, weights


def test_saving_before_the_first_step_changes_nothing(folder, tmp_path, ranks):
    """The library creates AdamW's moments by taking a step, which must not count."""
    config = config_of("sft", folder, "x")
    policy = runs.policy_of(config, ranks)
    optimizer = runs.optimizer_of(policy, config).adamw
    before = [parameter.full_tensor().clone() for parameter in policy.parameters()]
    RunFolder(tmp_path, None, ranks).save(policy, optimizer, 1, keep=1)
    for old, parameter in zip(before, policy.parameters(), strict=True):
        assert torch.equal(old, parameter.full_tensor())
        assert optimizer.state[parameter]["step"] == 0


class TwoCheckpoints:
    """A run of a tiny policy. All weights were 1 after the first step and 2 after the second."""

    def __init__(self, folder, ranks):
        self.policy = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.policy.parameters())
        self.run, self.second = RunFolder(folder, None, ranks), folder / "checkpoint-000002"
        for step in (1, 2):
            torch.nn.init.constant_(self.policy.weight, step)
            self.run.save(self.policy, self.optimizer, step, keep=2)
        torch.nn.init.constant_(self.policy.weight, 9)

    def load(self) -> int:
        """Restore the weights of the last checkpoint. Returns its step."""
        done = self.run.load(self.policy, self.optimizer)
        assert (self.policy.weight == done).all()
        return done


@pytest.fixture
def two(tmp_path, ranks):
    return TwoCheckpoints(tmp_path, ranks)


def cut(file):
    file.write_bytes(file.read_bytes()[:100])


DAMAGES = {
    "values cut": lambda folder: cut(folder / "__0_0.distcp"),
    "values gone": lambda folder: (folder / "__0_0.distcp").unlink(),
    "metadata cut": lambda folder: cut(folder / ".metadata"),
    "metadata gone": lambda folder: (folder / ".metadata").unlink(),
    "nothing": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoint_that_cannot_be_read_is_named_with_the_one_before(damage, two, tmp_path):
    assert two.load() == 2
    DAMAGES[damage](two.second)
    with pytest.raises(InputError, match=rf"^{two.second} cannot be read \(.+\)") as refused:
        two.load()
    said = str(refused.value)
    assert said.endswith(": remove it to continue from checkpoint-000001") and "\n" not in said
    shutil.rmtree(tmp_path / "checkpoint-000001")
    with pytest.raises(InputError, match="remove it to continue from the first step"):
        two.load()


def test_changed_learning_rate_and_length_are_noted(folder, tmp_path):
    config = config_of("sft", folder, tmp_path, max_steps=2, save_every=1)
    run(config)
    changed = replace(config, resume=True, learning_rate=1e-4, max_steps=4)
    run(changed)
    run(replace(changed, max_steps=5))
    change = {"step": 2, "learning_rate": [1e-3, 1e-4], "steps": [2, 4]}
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["changes"] == [change, {"step": 4, "steps": [4, 5]}]
    assert settings["learning_rate"] == 1e-4
    rates = [row["learning_rate"] for row in metrics(tmp_path)]
    # cosine: 1e-3 from its start; 1e-4 half way of 4 steps and at 3/4; then of 5 steps at 4/5
    quarters = [(1 + math.cos(math.pi * part)) / 2 for part in (0, 1 / 2, 1 / 2, 3 / 4, 4 / 5)]
    peaks = [1e-3, 1e-3, 1e-4, 1e-4, 1e-4]
    assert rates == pytest.approx([peak * part for peak, part in zip(peaks, quarters)])


@pytest.mark.parametrize("stage, result", [("sft", "model"), ("predict", "predictions.jsonl")])
def test_finished_run_is_not_run_again(stage, result, folder, tmp_path, capsys):
    """The result does not change. If it was removed, it is made again."""
    options = {"max_steps": 1} if stage == "sft" else {"limit": 1, "max_new_tokens": 2}
    config = config_of(stage, folder, tmp_path, **options)
    run(config)
    (tmp_path / result).rename(tmp_path / "first")
    (tmp_path / result).touch()
    run(replace(config, resume=True))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"{tmp_path}: the run is finished, there is nothing to continue"
    assert (tmp_path / result).read_text() == ""
    (tmp_path / result).unlink()
    run(replace(config, resume=True))
    assert (tmp_path / result).exists()


def test_longer_run_is_not_finished_before_its_end(folder, tmp_path):
    """The model of the shorter run, which is still there, does not count."""
    options = {"max_steps": 0, "epochs": 1, "batch_size": 20, "save_every": 1}
    config = config_of("sft", folder, tmp_path, **options)
    run(config)
    first, longer = weights(tmp_path), replace(config, resume=True, epochs=2)
    (tmp_path / "model").rename(tmp_path / "first")
    run(longer)
    as_killed(tmp_path, "model")
    (tmp_path / "first").rename(tmp_path / "model")
    run(longer)
    assert not same_weights(first, tmp_path)


@pytest.mark.parametrize("save_every", [1, 2, 0])
def test_shorter_run_is_refused(folder, tmp_path, save_every):
    """It would lose the longer run's model, or note fewer steps than that model has had."""
    config = config_of("sft", folder, tmp_path, max_steps=3, save_every=save_every)
    run(config)
    before = (tmp_path / "config.json").read_text()
    said = refusal(replace(config, max_steps=2, resume=True))
    assert said == f"{tmp_path}: the run has done 3 steps, more than 2"
    assert (tmp_path / "config.json").read_text() == before
