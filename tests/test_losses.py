"""The first losses of SFT and GRPO are those of losses.json: nothing has changed the steps.

    python -m tests.test_losses     # writes losses.json anew, where a step is meant to be another

One process of one thread, the tests' tiny model, 24 drawings. Of random weights every answer
is worth 0, so GRPO is given a reward that random tokens earn too; its KL term weighs 1, as the
surrogate of a batch's first update is 0.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

import grpo
from tests.runs import config_of, metrics, run, write_toy

FILE = Path(__file__).with_name("losses.json")
STEPS = 10
LOGGED = {"sft": ("loss",), "grpo": ("loss", "reward_total")}


def score(trainer, example, group):
    """In place of the rewards: a number between 0 and 6 that the tokens decide."""
    parts = {"format": 0.0, "object": 0.0, "verb": 0.0, "written": {"instances": 0, "verbs": 0}}
    values = [float((ids % 7).float().mean()) for ids in group.completion_ids]
    texts = [trainer.examples.decode(ids) for ids in group.completion_ids]
    return [{"text": t, **parts, "iou": v, "total": v} for t, v in zip(texts, values)]


def first_losses(folder, out):
    """Train on the toy in `folder`. Returns what LOGGED names of each stage's first STEPS steps."""
    options = {"max_steps": STEPS, "save_every": 0, "batch_size": 2}
    run(config_of("sft", folder, out / "sft", **options))
    options |= {"kl_coef": 1.0, "learning_rate": 2e-4, "max_new_tokens": 8}
    run(config_of("grpo", folder, out / "grpo", **options))
    return {
        stage: {name: [row[name] for row in metrics(out / stage)] for name in names}
        for stage, names in LOGGED.items()
    }


def test_the_first_losses_are_those_that_were(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo.GRPO, "score", score)
    found, expected = first_losses(folder, tmp_path), json.loads(FILE.read_text())
    for stage, names in LOGGED.items():
        for name in names:
            # another processor adds up in another order
            close = pytest.approx(expected[stage][name], rel=1e-5, abs=1e-5)
            assert found[stage][name] == close, (stage, name)


def write_losses():
    """Write losses.json anew."""
    torch.set_num_threads(1)
    grpo.GRPO.score = score
    with tempfile.TemporaryDirectory() as folder:
        write_toy(Path(folder))
        FILE.write_text(json.dumps(first_losses(Path(folder), Path(folder)), indent=1) + "\n")


if __name__ == "__main__":
    write_losses()
