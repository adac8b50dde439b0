"""The new reward of docs/paper.md, a function and a row: it reaches total, log and page."""

import json

import pytest

import rewards
from engine.report.page import write_page
from rewards import REWARD_PARTS, RewardPart
from tests.runs import config_of, run


def answer_reward(completion, hois, options) -> float:
    """1 if the answer names an interaction and the image has one."""
    return float(bool(hois) and bool(completion.instances))


@pytest.fixture
def with_answer_reward(monkeypatch):
    part = RewardPart("Answer", 1.0, answer_reward)
    monkeypatch.setattr(rewards, "REWARD_PARTS", REWARD_PARTS | {"answer": part})


def test_new_reward_reaches_log_and_page(with_answer_reward, folder, tmp_path):
    out = tmp_path / "run"
    run(config_of("grpo", folder, out, max_steps=1))
    row = json.loads((out / "metrics.jsonl").read_text())
    assert {"reward_answer", "reward_answer_std", "advantage_answer"} <= row.keys()
    completion = json.loads((out / "rollouts.jsonl").read_text())["completions"][0]
    parts = [value for name, value in completion["rewards"].items() if name != "total"]
    assert len(parts) == 5 and completion["rewards"]["total"] == pytest.approx(sum(parts))
    page = write_page([out]).read_text()
    assert "Reward: Answer" in page and " of 4.8</h3>" in page
