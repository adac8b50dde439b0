"""Checkpoints: which stay, which is taken, what may change between them."""

import json
import math
from dataclasses import replace

import pytest
import torch

import sft
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


DAMAGE = {
    "cut weights": lambda folder: cut(folder / "__0_0.distcp"),
    "cut metadata": lambda folder: cut(folder / ".metadata"),
    "no metadata": lambda folder: (folder / ".metadata").unlink(),
    "nothing": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_taken(damage, folder, tmp_path, capsys):
    """It is named, and replaced when the run comes to its step again, to the same weights."""
    config = config_of("sft", folder, tmp_path / "run", max_steps=2, save_every=1)
    run(config)
    whole = weights(tmp_path / "run")
    DAMAGE[damage](tmp_path / "run" / "checkpoint-000002")
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
    change = {"step": 2, "learning_rate": [1e-3, 1e-4], "max_steps": [2, 4]}
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["changes"] == [change, {"step": 4, "max_steps": [4, 5]}]
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
