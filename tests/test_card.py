"""The model card of an exported folder."""

from engine.report.card import model_card
from engine.report.records import read_run
from tests.run_folders import write_lines, write_sft, write_training


def test_card_of_grpo_says_how_the_model_was_trained(tmp_path):
    card = model_card(read_run(write_training(tmp_path)))
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'base_model: "Qwen/Qwen2.5-VL-3B-Instruct"\n---\n# grpo\n' in card
    assert "(Eqs. 2-23), 20 steps of 16 images" in card and f"- Data: {tmp_path}/data" in card
    assert "- Command: `hoi_r1.py grpo --model Qwen/Qwen2.5-VL-3B-Instruct" in card
    assert "Not included: " in card and "Traces" not in card


def test_card_after_sft_has_its_own_steps_and_teachers(tmp_path):
    teachers = ["template"] * 3 + ["gpt"] * 2 + ["qwen"]
    traces = tmp_path / "traces.jsonl"
    write_lines(traces, [{"think": "a", "teacher": teacher} for teacher in teachers])
    card = model_card(read_run(write_sft(tmp_path, model="sft/model", traces=str(traces))))
    assert f"- Traces: {traces}: 2 by gpt, 1 by qwen, 3 sentences from the ground truth" in card
    assert "(Eq. 1), 50 steps of 8 images" in card
    assert "base_model: " in card  # a name of two parts may be on a hub
    traces.unlink()
    assert "Traces" not in model_card(read_run(tmp_path / "sft"))


def test_local_folder_is_no_base_model_of_a_hub(tmp_path):
    card = model_card(read_run(write_training(tmp_path, model=str(tmp_path / "model"))))
    assert "base_model" not in card and f"- Started from: {tmp_path / 'model'}\n" in card
