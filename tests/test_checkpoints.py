"""Checkpoints: which stay, which is taken, what may change between them."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sft
from engine.runs.run_folder import Run
from tests.runs import config_of, metrics, refusal, run, weights


def checkpoints(out) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


def test_the_newest_stay(folder, tmp_path):
    run(config_of("sft", folder, tmp_path, max_steps=4, save_every=1, keep=3))
    assert checkpoints(tmp_path) == [f"checkpoint-00000{step}" for step in (2, 3, 4)]


def test_a_policy_whose_loss_is_not_finite_is_not_saved(folder, tmp_path, monkeypatch):
    sft_loss, factors = sft.sft_loss, iter([1.0, math.nan, math.nan])
    monkeypatch.setattr(sft, "sft_loss", lambda *values: sft_loss(*values) * next(factors))
    run(config_of("sft", folder, tmp_path, max_steps=3, save_every=1, keep=1))
    assert [row["skipped"] for row in metrics(tmp_path)] == [False, True, True]
    assert checkpoints(tmp_path) == ["checkpoint-000001"]


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


class TwoCheckpoints:
    """A run of a tiny policy whose weights were all 1 after a step, and all 2 after two."""

    def __init__(self, folder, ranks):
        self.policy = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.policy.parameters())
        self.run, self.second = Run(folder, None, ranks), folder / "checkpoint-000002"
        for step in (1, 2):
            torch.nn.init.constant_(self.policy.weight, step)
            self.run.save(self.policy, self.optimizer, step, keep=2)
        torch.nn.init.constant_(self.policy.weight, 9)

    def load(self) -> int:
        """The step that is taken; its weights are restored."""
        done = self.run.load(self.policy, self.optimizer)
        assert (self.policy.weight == done).all()
        return done


@pytest.fixture
def two(tmp_path, ranks):
    return TwoCheckpoints(tmp_path, ranks)


def test_one_bit_of_any_file_counts(two, capsys):
    files = list(two.second.iterdir())
    assert {file.name for file in files} == {"__0_0.distcp", ".metadata", "manifest.json"}
    assert two.load() == 2
    for file in files:
        whole = file.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 20):
            flipped = bytes([whole[place] ^ 1])
            file.write_bytes(whole[:place] + flipped + whole[place + 1 :])
            assert two.load() == 1
            if file.name != "manifest.json":
                assert f"cannot be read ({file.name} has changed): going" in capsys.readouterr().out
        file.write_bytes(whole)
    assert two.load() == 2


class TouchesWhenRead:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


OTHER_FILES = {
    "no metadata": (lambda f: (f / ".metadata").unlink(), ".metadata: No such file or directory"),
    "one more": (lambda f: (f / "__9_0.distcp").touch(), "__9_0.distcp is not in manifest.json"),
    "a folder": (lambda f: (f / "more").mkdir(), "more is not in manifest.json"),
    "nothing": (lambda f: [file.unlink() for file in f.iterdir()], "manifest.json is missing"),
    "a list": (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json is missing or"),
    "code": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(TouchesWhenRead(f.parent / "ran"))),
        ".metadata has changed"),
}  # fmt: skip


@pytest.mark.parametrize("spoilt", OTHER_FILES)
def test_a_checkpoint_of_other_files_is_not_read(spoilt, two, tmp_path, capsys):
    """Least of all unpickled, which runs the code that a pickle holds."""
    spoil, message = OTHER_FILES[spoilt]
    spoil(two.second)
    assert two.load() == 1
    assert f"{two.second} cannot be read ({message}" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


def test_the_checkpoint_before_a_damaged_one_is_taken(folder, tmp_path, capsys):
    """It is named, and replaced when the run comes to its step again, to the same weights."""
    config = config_of("sft", folder, tmp_path / "run", max_steps=2, save_every=1)
    run(config)
    whole = weights(tmp_path / "run")
    cut(tmp_path / "run" / "checkpoint-000002" / "__0_0.distcp")
    (tmp_path / "run" / "model").rename(tmp_path / "first")
    run(replace(config, resume=True))
    printed = capsys.readouterr().out
    assert f"{tmp_path}/run/checkpoint-000002 cannot be read (" in printed
    assert "): going on from step 1\n" in printed
    assert all(torch.equal(whole[name], w) for name, w in weights(tmp_path / "run").items())
    (tmp_path / "run" / "model").rename(tmp_path / "second")
    run(replace(config, resume=True))
    assert "cannot be read" not in capsys.readouterr().out


def test_a_changed_learning_rate_and_length_are_written_down(folder, tmp_path):
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


def test_files_that_the_run_did_not_make_stay(folder, tmp_path):
    config = config_of("sft", folder, tmp_path, max_steps=2, save_every=1)
    run(config)
    mine = ["notes.tmp", "mine.jsonl", "checkpoint-000006.bak", "checkpoint-best"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoint-000002.tmp").mkdir()
    run(replace(config, resume=True, max_steps=3))
    assert [(tmp_path / name).read_text() for name in mine] == ["mine"] * 4
    assert not (tmp_path / "checkpoint-000002.tmp").exists()


@pytest.mark.parametrize("name", ["run.lock", "metrics.jsonl", "config.json.tmp"])
def test_nothing_is_written_behind_a_link(name, folder, tmp_path):
    config = config_of("sft", folder, tmp_path / "run", max_steps=1)
    run(config)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    assert f"{name} is a link" in refusal(replace(config, resume=True))
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("stage, result", [("sft", "model"), ("predict", "predictions.jsonl")])
def test_a_finished_run_is_not_run_again(stage, result, folder, tmp_path, capsys):
    """A changed result would show it."""
    options = {"max_steps": 1} if stage == "sft" else {"limit": 1, "max_new_tokens": 2}
    config = config_of(stage, folder, tmp_path, **options)
    run(config)
    (tmp_path / result).rename(tmp_path / "first")
    (tmp_path / result).touch()
    run(replace(config, resume=True))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"{tmp_path}: the run is finished, there is nothing to go on with"
    assert (tmp_path / result).read_text() == ""
    (tmp_path / result).unlink()  # and then it is made anew
    run(replace(config, resume=True))
    assert (tmp_path / result).exists()


def test_a_finished_run_that_is_made_longer_is_not_finished(folder, tmp_path, monkeypatch):
    """Not even if it ends before the longer one's model takes the place of the first."""
    options = {"max_steps": 0, "epochs": 1, "batch_size": 20, "save_every": 1}
    config = config_of("sft", folder, tmp_path, **options)
    run(config)
    longer = replace(config, resume=True, epochs=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "export", interrupt)
        run(longer)
    first = weights(tmp_path)
    run(longer)
    assert any(not torch.equal(first[name], w) for name, w in weights(tmp_path).items())


@pytest.mark.parametrize("save_every", [1, 2, 0])
def test_a_run_that_is_made_shorter_than_it_is_is_refused(folder, tmp_path, save_every):
    """It would say of the longer run's model that it has had fewer steps, or lose it."""
    config = config_of("sft", folder, tmp_path, max_steps=3, save_every=save_every)
    run(config)
    before = (tmp_path / "config.json").read_text()
    said = refusal(replace(config, max_steps=2, resume=True))
    assert said == f"--out {tmp_path}: the run has done 3 steps, and only 2 are asked for"
    assert (tmp_path / "config.json").read_text() == before


def interrupt(*arguments):
    raise KeyboardInterrupt
