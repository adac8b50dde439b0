"""GRPO learns a small problem. This takes about twenty seconds of one core."""

import json
from dataclasses import replace

import pytest

from demo import scenes, toy
from tests.runs import config_of, metrics, run

PLACES = [(28, 28, 56, 70), (56, 28, 84, 70), (28, 42, 56, 84), (56, 42, 84, 84)]
COMMON = {"thinking": False, "gradient_checkpointing": False, "adam_beta2": 0.98, "save_every": 0}
MARGIN = 0.2


@pytest.fixture
def small(tmp_path, monkeypatch):
    """64 drawings of one pair, a ball in the hand of a person at one of four places."""
    monkeypatch.setattr(scenes, "KINDS", (scenes.KINDS[6],))
    monkeypatch.setattr(scenes, "RARE", ())
    monkeypatch.setattr(scenes, "people", lambda: PLACES)
    monkeypatch.setattr(scenes, "is_test_layout", lambda hoi: hoi.object[0] % 56 == 0)
    toy.write_data(tmp_path / "data", 64, 1, seed=0, pairs=1)
    tokenizer = toy.toy_tokenizer()
    model = toy.random_model(toy.model_config(tokenizer, toy.TINY_SIZES), seed=0)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    processor = json.dumps(toy.IMAGE_PROCESSOR)
    (tmp_path / "model" / "preprocessor_config.json").write_text(processor)
    return tmp_path


@pytest.mark.slow
def test_grpo_raises_the_reward_at_temperature_1(small):
    """Means of five steps rose from 1.06 to 1.40, and with another seed from 1.12 to 1.45.

    If the learning rate is too high, the total rises although the model forgets the boxes. So the
    reward of boxes may not fall.
    """
    sft = {"traces": "", "batch_size": 8, "max_steps": 70, "learning_rate": 3e-3}
    run(config_of("sft", small, small / "sft", **sft, **COMMON))
    grpo = {"batch_size": 8, "group_size": 8, "max_steps": 20, "learning_rate": 6e-4}
    grpo |= {"max_new_tokens": 40, "kl_coef": 0.0}
    config = config_of("grpo", small, small / "grpo", **grpo, **COMMON)
    run(replace(config, model=str(small / "sft" / "model")))
    rows = metrics(small / "grpo")

    def rise(name):
        return sum(row[name] for row in rows[-5:]) / 5 - sum(row[name] for row in rows[:5]) / 5

    assert rise("reward_total") > MARGIN
    assert rise("reward_iou") > -0.02
