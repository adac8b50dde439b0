"""What a run writes for people, and that a failure in it does not end the run."""

import json
import math
import sys

import pytest

from engine.report.events import Events
from engine.report.run_view import model_card, update_page, verdicts
from tests.run_folders import write_training
from tests.runs import config_of, run


def test_damaged_folder_is_one_line_of_warning_each(tmp_path, capsys):
    folder = write_training(tmp_path)
    (folder / "metrics.jsonl").write_text("{]\n")
    update_page(folder)
    assert verdicts(folder) == model_card(folder) == ""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and not (folder / "report.html").exists()
    for line, what in zip(lines, ("report.html", "the health check", "the model card")):
        assert line.startswith(f"warning: {what} could not be made: InputError(")


def test_resumed_run_continues_in_tensorboard_from_its_checkpoint(tmp_path):
    """Steps 1 to 3, a crash, and again from a checkpoint of step 1."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, again = Events(tmp_path, 1), Events(tmp_path, 2)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step), "kl": math.nan})
    for step in (2, 3):
        again.log(step, {"loss": 10.0 * step})
    found = EventAccumulator(str(tmp_path)).Reload()
    assert found.Tags()["scalars"] == ["train/loss"]
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(1, 1.0), (2, 20.0), (3, 30.0)]


def test_events_without_tensorboard_or_a_folder_do_not_stop_a_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    events = Events(tmp_path / "file", 1)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # its import fails
    for step in (1, 2):
        events.log(step, {"loss": 1.0})
        Events(tmp_path, 1).log(step, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert capsys.readouterr().err.count("warning: ") <= 1  # 0 without TensorBoard


def test_training_leaves_page_card_and_command(folder, tmp_path, monkeypatch, capfd):
    out = tmp_path / "run"
    monkeypatch.setattr("sys.argv", ["hoi_r1.py", "sft", "--max-steps", "2"])
    run(config_of("sft", folder, out, max_steps=2))
    assert "2 of 2 steps" in (out / "report.html").read_text()
    assert "hoi_r1.py sft --max-steps 2" in (out / "model" / "README.md").read_text()
    kept = json.loads((out / "config.json").read_text())
    assert (kept["stage"], kept["command"]) == ("sft", ["hoi_r1.py", "sft", "--max-steps", "2"])
    assert "Is this run healthy? 0 of 2 checks are good, 2 too early" in capfd.readouterr().out


def test_prediction_leaves_a_page_with_its_images(folder, tmp_path):
    run(config_of("predict", folder, tmp_path / "test", limit=2, max_new_tokens=3))
    page = (tmp_path / "test" / "report.html").read_text()
    assert "<title>test" in page and page.count("<figure>") == 2
    assert page.count('alt="ground truth: ') == 2
