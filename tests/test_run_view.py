"""What a run leaves to be looked at, and that none of it ends the run."""

import importlib.util
import json
import math
import shutil
import sys
from dataclasses import replace

import pytest

import hoi_r1
from engine.report import run_view as live
from engine.report.run_view import LiveView
from tests.run_folders import write_lines, write_training
from tests.runs import config_of, run


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so, and a count of pages that take `page` each."""

    class Clock:
        now, page, pages = 100.0, 0.1, 0

    def write_page(folders):
        Clock.now, Clock.pages = Clock.now + Clock.page, Clock.pages + 1
        return folders[0] / "report.html"

    monkeypatch.setattr(live.time, "monotonic", lambda: Clock.now)
    monkeypatch.setattr(live, "write_page", write_page)
    return Clock


def pages_of(clock, view, seconds):
    """How many pages are written in so many seconds, with a step in each."""
    before, start = clock.pages, clock.now
    while clock.now < start + seconds:
        view.refresh()
        clock.now += 1
    return clock.pages - before


def test_page_is_refreshed_once_in_ten_seconds(clock, tmp_path):
    # at 0, then with the tenth step behind each: at 10.1 s, 20.2 s, ... 90.9 s
    assert pages_of(clock, LiveView(tmp_path, active=True), 95) == 10


def test_slow_page_takes_a_twentieth_of_the_time(clock, tmp_path):
    clock.page = 5.0  # the next one not before 100 s
    assert pages_of(clock, LiveView(tmp_path, active=True), 290) == 3


def test_other_ranks_write_nothing(clock, tmp_path):
    view = LiveView(tmp_path, active=False)
    assert pages_of(clock, view, 30) == 0 and view.card() == view.verdicts() == ""
    view.log(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_failed_page_warns_once_and_is_tried_again_at_the_end(clock, tmp_path, monkeypatch, capsys):
    def fail(folders):
        raise ZeroDivisionError("a bug\nof ours")

    view = LiveView(tmp_path, active=True)
    with monkeypatch.context() as patch:
        patch.setattr(live, "write_page", fail)
        pages_of(clock, view, 60)
    line = "warning: report.html could not be made: ZeroDivisionError('a bug\\nof ours')\n"
    assert capsys.readouterr().err == line
    assert pages_of(clock, view, 60) == 0
    view.write()
    assert clock.pages == 1


def test_failed_card_is_no_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(live, "model_card", lambda record: record.absent)
    assert LiveView(tmp_path, active=True).card() == ""
    assert "warning: the model card could not be made" in capsys.readouterr().err


def events_of(folder):
    """(step, value) of each tag, as TensorBoard shows them."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    tags = found.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in tags}


def test_resumed_run_goes_on_in_tensorboard_from_its_checkpoint(tmp_path):
    """Steps 1 to 3, a crash, and from a checkpoint of step 1 on again."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    first, again = (LiveView(tmp_path, active=True) for _ in range(2))
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step), "reward_total_std": 0.5, "kl": math.nan})
    assert events_of(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    for step in (2, 3):
        again.log(step, {"loss": 10.0 * step})
    expected = {"train/loss": [(1, 1.0), (2, 20.0), (3, 30.0)], "reward/total_std": [(1, 0.5)]}
    assert events_of(tmp_path) == expected


def test_without_tensorboard_nothing_is_written_or_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # its import fails
    view = LiveView(tmp_path, active=True)
    view.log(1, {"loss": 1.0})
    view.log(2, {"loss": 1.0})
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


def test_events_that_fail_warn_once(tmp_path, monkeypatch, capsys):
    view = LiveView(tmp_path, active=True)
    monkeypatch.setattr(live, "open_events", lambda folder, step: 1 / 0)
    view.log(1, {"loss": 1.0})
    view.log(2, {"loss": 1.0})
    assert capsys.readouterr().err.count("warning: TensorBoard events could not be made") == 1


def test_interrupt_ends_a_run(tmp_path, monkeypatch):
    def interrupt(folders):
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "write_page", interrupt)
    with pytest.raises(KeyboardInterrupt):
        LiveView(tmp_path, active=True).write()


def test_card_and_verdicts_are_of_the_folder(tmp_path):
    view = LiveView(write_training(tmp_path), active=True)
    assert view.card().startswith("---\n") and "# grpo" in view.card()
    # 20 steps with the KL rising to 0.2, below 0.5
    first, *rest = view.verdicts().splitlines()
    assert first.startswith("Is this run healthy? ") and len(rest) == 8


def test_a_flat_reward_is_judged_by_what_the_run_can_earn(tmp_path):
    folder = write_training(tmp_path)  # --without iou
    rows = [{"step": step, "reward_total": 1.0} for step in range(1, 21)]
    write_lines(folder / "metrics.jsonl", rows)
    assert "Flat. Expected near 2.8 and" in LiveView(folder, active=True).verdicts()


def test_training_leaves_page_card_and_command(folder, tmp_path, monkeypatch, capfd):
    config = config_of("sft", folder, tmp_path / "run", max_steps=2, save_every=1)
    monkeypatch.setattr("sys.argv", ["hoi_r1.py", "sft", "--max-steps", "2"])
    run(config)
    out = tmp_path / "run"
    assert "hoi_r1.py <span>--max-steps 2" in (out / "report.html").read_text().replace(" sft", "")
    assert "hoi_r1.py sft --max-steps 2" in (out / "model" / "README.md").read_text()
    kept = json.loads((out / "config.json").read_text())
    assert (kept["stage"], kept["command"]) == ("sft", ["hoi_r1.py", "sft", "--max-steps", "2"])
    written = list(out.glob("events.out.tfevents.*"))
    assert bool(written) == (importlib.util.find_spec("tensorboard") is not None)
    assert "Is this run healthy? " in capfd.readouterr().out.splitlines()[-3]
    monkeypatch.setattr("sys.argv", ["hoi_r1.py", "sft", "--resume"])
    (out / "report.html").unlink()
    shutil.rmtree(out / "model")  # or the run would be finished
    run(replace(config, resume=True))
    assert (out / "report.html").exists()
    assert json.loads((out / "config.json").read_text())["command"][-1] == "--resume"


def test_training_goes_on_without_its_page(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "write_page", lambda folders: 1 / 0)
    monkeypatch.setattr(live, "model_card", lambda record: 1 / 0)
    run(config_of("sft", folder, tmp_path / "run", max_steps=1))
    found = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert "model.safetensors" in found and "README.md" not in found


def test_prediction_leaves_a_page_with_its_images(folder, tmp_path):
    run(config_of("predict", folder, tmp_path / "test", limit=2, max_new_tokens=3))
    page = (tmp_path / "test" / "report.html").read_text()
    assert "<title>test" in page and page.count("<figure>") == 2


def test_page_of_a_run_that_failed_early_does_not_keep_it_from_its_folder(folder, tmp_path):
    out = tmp_path / "run"
    config = config_of("sft", folder, out, max_steps=1)
    out.mkdir()
    for name in ("run.lock", "config.json"):
        (out / name).touch()
    hoi_r1.main(["report", str(out)])
    run(config)
    assert (out / "model").is_dir()
