"""The model card of an exported folder."""

import json

from engine.report.card import model_card
from engine.report.records import read_run
from tests.run_folders import write_lines, write_training


def test_card_says_how_the_model_was_trained(tmp_path):
    run = read_run(write_training(tmp_path))
    card = model_card(run)
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'base_model: "Qwen/Qwen2.5-VL-3B-Instruct"\n---\n' in card
    assert f"```\n{run.command}\n```" in card
    assert "- 20 steps, 16 images a step" in card
    assert '| `without` | ["iou"] |' in card
    assert "## Not included" in card


def test_metrics_are_means_of_recent_steps_and_the_last_evaluation(tmp_path):
    card = model_card(read_run(write_training(tmp_path)))
    assert "| `kl` | 0.155 |" in card  # steps 11 to 20 of 0.01 a step
    assert "| `eval_map` | 20 |" in card


def test_card_names_what_came_before_and_the_first_model(tmp_path):
    sft = tmp_path / "sft"
    sft.mkdir()
    (sft / "config.json").write_text(json.dumps({"traces": "t.jsonl", "model": "org/first"}))
    write_lines(sft / "metrics.jsonl", [{"step": 50, "loss": 1.0}])
    card = model_card(read_run(write_training(tmp_path, before=sft)))
    assert 'base_model: "org/first"' in card
    assert "That one was trained before, from org/first: 50 steps of sft" in card


def test_folder_is_no_base_model(tmp_path):
    folder = write_training(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"model": str(tmp_path / "x|y")}
    (folder / "config.json").write_text(json.dumps(config))
    card = model_card(read_run(folder))
    assert "base_model:" not in card and "x\\|y |" in card


def test_card_of_an_empty_folder(tmp_path):
    assert "None were logged." in model_card(read_run(tmp_path))
