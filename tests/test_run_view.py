"""What a run leaves for people to read, and that none of it ends the run."""

import importlib.util
import json
import math
import shutil
import sys
from dataclasses import replace

import pytest

from engine.report.events import Events
from engine.report.run_view import model_card, update_page, verdicts
from tests.run_folders import write_training
from tests.runs import config_of, run


def test_page_verdicts_and_card_are_of_the_folder(tmp_path):
    folder = write_training(tmp_path)
    update_page(folder)
    assert "<title>grpo" in (folder / "report.html").read_text()
    first, *rest = verdicts(folder).splitlines()
    assert first.startswith("Is this run healthy? ") and len(rest) == 8
    assert "# grpo" in model_card(folder)


def test_damaged_folder_is_one_line_of_warning_each(tmp_path, capsys):
    folder = write_training(tmp_path)
    (folder / "metrics.jsonl").write_text("{]\n")
    update_page(folder)
    assert verdicts(folder) == model_card(folder) == ""
    lines = capsys.readouterr().err.splitlines()
    whats = ("report.html", "the health of the run", "the model card")
    assert len(lines) == 3 and not (folder / "report.html").exists()
    for line, what in zip(lines, whats):
        assert line.startswith(f"warning: {what} could not be made: InputError(")


def events_of(folder):
    """(step, value) of each tag, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    tags = found.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags}


def test_resumed_run_continues_in_tensorboard_from_its_checkpoint(tmp_path):
    """Steps 1 to 3, a crash, and again from a checkpoint of step 1."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    first = Events(tmp_path, 1)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step), "reward_total_std": 0.5, "kl": math.nan})
    assert events_of(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    again = Events(tmp_path, 2)
    for step in (2, 3):
        again.log(step, {"loss": 10.0 * step})
    expected = {"train/loss": [(1, 1.0), (2, 20.0), (3, 30.0)], "reward/total_std": [(1, 0.5)]}
    assert events_of(tmp_path) == expected


def test_without_tensorboard_nothing_is_written_or_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # its import fails
    Events(tmp_path, 1).log(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


def test_events_that_cannot_be_written_are_one_warning(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    (tmp_path / "file").touch()
    events = Events(tmp_path / "file", 1)
    for step in (1, 2):
        events.log(step, {"loss": 1.0})
    assert capsys.readouterr().err.count("warning: no TensorBoard events: ") == 1


def test_training_leaves_page_card_and_command(folder, tmp_path, monkeypatch, capfd):
    config = config_of("sft", folder, tmp_path / "run", max_steps=2, save_every=1)
    monkeypatch.setattr("sys.argv", ["hoi_r1.py", "sft", "--max-steps", "2"])
    run(config)
    out = tmp_path / "run"
    assert "2 of 2 steps" in (out / "report.html").read_text()
    assert "hoi_r1.py sft --max-steps 2" in (out / "model" / "README.md").read_text()
    kept = json.loads((out / "config.json").read_text())
    assert (kept["stage"], kept["command"]) == ("sft", ["hoi_r1.py", "sft", "--max-steps", "2"])
    written = list(out.glob("events.out.tfevents.*"))
    assert bool(written) == (importlib.util.find_spec("tensorboard") is not None)
    assert "Is this run healthy? Too early to tell." in capfd.readouterr().out
    (out / "report.html").unlink()
    shutil.rmtree(out / "model")  # or the run would be finished
    run(replace(config, resume=True))
    assert (out / "report.html").exists()


def test_prediction_leaves_a_page_with_its_images(folder, tmp_path):
    run(config_of("predict", folder, tmp_path / "test", limit=2, max_new_tokens=3))
    page = (tmp_path / "test" / "report.html").read_text()
    assert "<title>test" in page and page.count("<figure>") == 2
