"""hoi_r1.py: what an option does to a run, at another value than its default."""

import json

import pytest

from tests.runs import config_of, metrics, run, same_weights

SMALL = {
    "sft": {"max_steps": 4, "batch_size": 2},
    "grpo": {"max_steps": 1, "batch_size": 2, "updates_per_batch": 2},
}


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """A run of each training with the defaults of the small configs."""
    outs = {}
    for stage, options in SMALL.items():
        outs[stage] = tmp_path_factory.mktemp("plain") / stage
        run(config_of(stage, folder, outs[stage], **options))
    return outs


@pytest.fixture
def changed(folder, tmp_path):
    """A run of a training with changed options."""

    def change(stage, **options):
        run(config_of(stage, folder, tmp_path / "run", **SMALL[stage] | options))
        return tmp_path / "run"

    return change


def column(out, name):
    return [row[name] for row in metrics(out)]


STEP = {"adam_beta2": 0.5, "weight_decay": 0.5, "max_grad_norm": 1e-3, "learning_rate": 1e-4}


@pytest.mark.parametrize("name", STEP)
def test_options_of_the_step_change_the_weights(name, plain, changed):
    """The first loss is the same."""
    out = changed("sft", **{name: STEP[name]})
    assert column(out, "loss")[0] == column(plain["sft"], "loss")[0]
    assert not same_weights(out, plain["sft"])


def test_seed_orders_the_images(plain, changed):
    assert column(changed("sft", seed=7), "loss") != column(plain["sft"], "loss")


def test_batch_size_counts_images(plain, changed):
    one = column(changed("sft", batch_size=1), "supervised_tokens")
    assert max(one) < min(column(plain["sft"], "supervised_tokens"))


# shares of the peak rate after two steps of warm-up: (1 + cos(pi k / 3)) / 2, and 1 - k / 3
FALLING = {"sft": [0.75, 0.25], "grpo": [2 / 3, 1 / 3]}


@pytest.mark.parametrize("stage", FALLING)
def test_rate_rises_and_falls(stage, changed):
    out = changed(stage, max_steps=5, warmup_steps=2)
    expected = [1e-3 * part for part in (0.5, 1, 1, *FALLING[stage])]
    assert column(out, "learning_rate") == pytest.approx(expected)


@pytest.mark.parametrize("stage", SMALL)
def test_options_for_speed_change_no_bit(stage, plain, changed):
    speed = {"workers": 1, "gradient_checkpointing": False}
    speed |= {"slots": 1} if stage == "grpo" else {}
    assert same_weights(changed(stage, **speed), plain[stage])


def test_options_of_sampling(changed):
    out = changed("grpo", group_size=3, max_new_tokens=5, temperature=0.01)
    (row,) = metrics(out)
    assert row["completion_length"] <= 5
    assert row["distinct_completions"] <= 0.5  # nearly greedy
    (shown,) = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert len(shown["completions"]) == 3


def test_training_without_kl(changed, any_reward):
    (row,) = metrics(changed("grpo", kl_coef=0.0))
    assert row["kl"] == 0


def test_kl_has_its_weight(changed, any_reward):
    """After the first update pi_theta differs from pi_ref. The loss is -surrogate + beta KL."""
    (row,) = metrics(changed("grpo", kl_coef=1e6))
    assert row["kl"] > 0 and row["loss"] == pytest.approx(1e6 * row["kl"], rel=1e-2)


@pytest.mark.parametrize("eps, clips", [(1e-6, True), (1e6, False)])
def test_clip_range(eps, clips, changed, any_reward):
    (row,) = metrics(changed("grpo", clip_eps=eps, learning_rate=1e-2))
    assert (row["clip_fraction"] > 0) == clips


def test_ratio_changes_the_step(changed, folder, tmp_path, any_reward):
    run(config_of("grpo", folder, tmp_path / "token", **SMALL["grpo"]))
    assert not same_weights(changed("grpo", ratio="sequence"), tmp_path / "token")


def test_options_of_the_rewards_change_the_reward(folder, tmp_path, capsys):
    run(config_of("grpo", folder, tmp_path / "x", without=("iou",), dry_run=True))
    reward = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (reward["iou"], reward["total"]) == (0.0, pytest.approx(2.8))


def test_options_of_predict(folder, tmp_path):
    options = {"split": "train", "limit": 4, "max_new_tokens": 3}
    run(config_of("predict", folder, tmp_path / "one", **options))
    speed = {"slots": 1, "workers": 1}
    run(config_of("predict", folder, tmp_path / "two", **options, **speed))
    one, two = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two"))
    assert one == two and len(one.splitlines()) == 4 and "train2015" in one
    assert json.loads((tmp_path / "one" / "summary.json").read_text())["completion_length"] <= 3
