"""The first losses of SFT and GRPO equal those in losses.json, so no change altered the steps.

    python -m tests.test_losses     # write losses.json after an intended change of a step

One process with one thread, the tests' tiny model, 24 drawings. Answers of random weights earn 0,
so GRPO gets a reward that random tokens earn too. Its KL term has weight 1, as the surrogate of a
batch's first update is 0.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

import grpo
from tests.runs import config_of, metrics, run, score_tokens, write_toy

FILE = Path(__file__).with_name("losses.json")
STEPS = 10
LOGGED = {"sft": ("loss",), "grpo": ("loss", "reward_total")}


def first_losses(folder, out):
    """Train on the toy in `folder`. Returns the LOGGED values of the first STEPS steps."""
    options = {"max_steps": STEPS, "save_every": 0, "batch_size": 2}
    run(config_of("sft", folder, out / "sft", **options))
    options |= {"kl_coef": 1.0, "learning_rate": 2e-4, "max_new_tokens": 8}
    run(config_of("grpo", folder, out / "grpo", **options))
    return {
        stage: {name: [row[name] for row in metrics(out / stage)] for name in names}
        for stage, names in LOGGED.items()
    }


def test_first_losses_are_unchanged(folder, tmp_path, any_reward):
    found, expected = first_losses(folder, tmp_path), json.loads(FILE.read_text())
    for stage, names in LOGGED.items():
        for name in names:
            # processors add up in different orders
            close = pytest.approx(expected[stage][name], rel=1e-5, abs=1e-5)
            assert found[stage][name] == close, (stage, name)


def write_losses():
    """Write losses.json."""
    torch.set_num_threads(1)
    grpo.GRPO.score = score_tokens
    with tempfile.TemporaryDirectory() as folder:
        write_toy(Path(folder))
        FILE.write_text(json.dumps(first_losses(Path(folder), Path(folder)), indent=1) + "\n")


if __name__ == "__main__":
    write_losses()
