"""The model card of an exported folder."""

from engine.report.card import model_card
from engine.report.records import read_run
from tests.run_folders import write_lines, write_sft, write_training


def test_card_says_how_the_model_was_trained(tmp_path):
    card = model_card(read_run(write_training(tmp_path, model="sft/model")))
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n# grpo\n" in card
    assert f"- Training: GRPO, 20 steps of 16 images of {tmp_path}/data\n" in card
    assert "- Started from: sft/model\n" in card and "- Traces: none\n" in card
    assert "- Command: `hoi_r1.py grpo --model sft/model" in card


def test_card_names_teachers(tmp_path):
    teachers, traces = ["template"] * 3 + ["gpt"] * 2, tmp_path / "traces.jsonl"
    write_lines(traces, [{"think": "a", "teacher": teacher} for teacher in teachers])
    run = read_run(write_sft(tmp_path, traces=str(traces)))
    assert "- Traces: 3 by template, 2 by gpt\n" in model_card(run)
    traces.unlink()
    assert "- Traces: none\n" in model_card(run)
