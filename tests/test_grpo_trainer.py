"""hoi_r1.py, the batch of GRPO and of prediction: against plain forwards, and what it hands on."""

import dataclasses
import json
import math

import pytest
import torch

import engine.attention
import engine.policy
import engine.sampler
import evaluate
import grpo
import hicodet
import hoi_r1
import predict
import train
from tests.runs import config_of, examples_of, metrics, policy_of, stepper_of
from tests.test_grpo import plain_logprobs


@pytest.fixture
def make_trainer(folder, ranks):
    """A trainer on the tiny model, its batch of three images, and the gradients of its steps."""

    def make(**options):
        config = config_of("grpo", folder, "unused", group_size=2, **options)
        examples = train.training_examples(config, ranks)
        policy = policy_of(config, ranks)
        replica, reference = (engine.policy.load_model(config.model, ranks.device) for _ in range(2))
        parts = (policy, stepper_of(policy, config), replica, reference)
        trainer = grpo.GRPOTrainer(*parts, examples, config, ranks)
        return trainer, [examples[i] for i in range(3)]

    return make


def random_rollout(lengths, vocabulary=200):
    ids = [torch.randint(vocabulary, (n,)) for n in lengths]
    return engine.sampler.Rollout(ids, [-torch.rand(n) for n in lengths], torch.ones(len(lengths)).bool())


@pytest.mark.parametrize("budget", [1, 10_000])
def test_the_step_has_the_gradient_of_the_equations(folder, make_trainer, budget):
    """Eqs. 2-4 written out over separate forwards; images of weight 0 and 1, unequal lengths.

    pi_theta, pi_old and pi_ref all differ, so that ratio, clip and KL all matter.
    """
    options = {"kl_coef": 0.3, "clip_eps": 0.1, "temperature": 0.8}
    trainer, batch = make_trainer(tokens_per_microbatch=budget, **options)
    plain = engine.policy.load_model(trainer.config.model, torch.device("cpu"))
    plain.set_attn_implementation("sdpa")
    with torch.no_grad():
        for parameter in trainer.reference.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    reference = engine.policy.load_model(trainer.config.model, torch.device("cpu"))
    reference.load_state_dict(trainer.reference.state_dict())
    reference.set_attn_implementation("sdpa")

    weights, advantages = [1.0, 0.0, 1.0], torch.tensor([[1.0, -1.0], [0.5, -2.0], [-0.7, 0.7]])
    rollout = random_rollout([3, 9, 4, 4, 12, 5])
    parts = trainer.parts(batch, weights, rollout, advantages)
    old = [torch.log_softmax(torch.randn(6, 13), 0)[: len(p.weights)] for p in parts]
    old = [
        engine.attention.token_logprobs(trainer.replica, p.packed, **trainer.distribution).detach()
        + 0.3 * noise[:, : p.packed.completion_mask.shape[1]].clamp(-2, 2)
        for p, noise in zip(parts, old)
    ]
    gradients = []
    trainer.stepper.step = lambda lr, loss: gradients.extend(
        p.grad.full_tensor().clone() for p in trainer.policy.parameters()
    )
    _, logged = trainer.optimizer_step(parts, old, count=4.0, lr=1.0)

    rows = {}  # old log-probs by their completion, however the parts were made
    for part, values in zip(parts, old):
        mask = part.packed.completion_mask
        cut = part.packed.completion_ids.split(mask.sum(1).tolist())
        rows |= {tuple(ids.tolist()): v[m] for ids, v, m in zip(cut, values, mask)}
    objective = 0.0
    for row, ids in enumerate(rollout.completion_ids):
        image = row // 2
        arguments = (batch[image].prompt, ids, 0.8, trainer.distribution["banned"])
        new = plain_logprobs(plain, *arguments)
        ref = plain_logprobs(reference, *arguments).detach()
        a, ratio = advantages.flatten()[row], (new - rows[tuple(ids.tolist())]).exp()
        surrogate = torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a)
        kl = (ref - new).exp() - (ref - new) - 1
        objective = objective + weights[image] * (surrogate - 0.3 * kl).mean() / 4
    (-objective).backward()
    assert logged["loss"] == pytest.approx(-objective.item(), rel=1e-4, abs=1e-6)
    for mine, parameter in zip(gradients, plain.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=2e-5, rtol=1e-4)


def test_several_updates_keep_the_first_policy_as_pi_old(make_trainer):
    """With pi_old taken anew at each update every ratio would be 1 and nothing clipped."""
    trainer, batch = make_trainer(updates_per_batch=3, clip_eps=0.01)
    rollout = random_rollout([5] * 6)
    parts = trainer.parts(batch, [1.0] * 3, rollout, torch.tensor([[1.0, -1.0]] * 3))
    logged = trainer.optimize(parts, 3, 1e-2)
    assert logged["clip_fraction"] > 0.05
    steps = {int(state["step"]) for state in trainer.stepper.optimizer.state.values()}
    assert steps == {3}


def test_advantages_and_rewards_belong_to_their_completions(make_trainer, monkeypatch):
    """From sampling to the micro-batches: rewards in the model's frame, advantages in place."""
    trainer, batch = make_trainer(tokens_per_microbatch=1)
    rollout = random_rollout([2, 3, 9, 4, 5, 6])
    seen, given = [], {}
    monkeypatch.setattr(trainer, "sample", lambda step, batch: rollout)

    def score(hois, ids):
        seen.append((hois, len(ids)))
        return {"format": 0.0, "object": 0.0, "verb": 0.0, "iou": 0.0, "total": float(len(ids))}

    def optimize(parts, prompts, lr):
        for part in parts:
            lengths = part.packed.completion_mask.sum(1).tolist()
            given.update(zip(lengths, part.advantages.tolist()))
        return {}

    monkeypatch.setattr(trainer, "score", score)
    monkeypatch.setattr(trainer, "optimize", optimize)
    trainer.update(0, batch, [1.0] * 3, 1e-3)
    assert seen == [(batch[row // 2].hois, n) for row, n in enumerate([2, 3, 9, 4, 5, 6])]
    # a group of rewards r and s: -+ |r - s| / 2 over (|r - s| / sqrt 2 + 1e-4)
    low, high = (side * 0.5 / (0.5**0.5 + 1e-4) for side in (-1, 1))
    wide = 2.5 / (12.5**0.5 + 1e-4)
    assert given == pytest.approx({2: low, 3: high, 5: low, 6: high, 9: wide, 4: -wide})


def test_rewards_of_table_3_and_the_duplicate_rule_reach_the_score(make_trainer):
    trainer, batch = make_trainer(without=("label",), duplicate_rule="pair")
    example = batch[0]
    bicycle = hicodet.HOI(example.hois[0].human, (0.0, 0.0, 9.0, 9.0), "bicycle", ("hold",))
    hois = (dataclasses.replace(example.hois[0], object=(90.0, 90.0, 99.0, 99.0)), bicycle)
    ids = trainer.examples.target_ids(hois, "one person, two objects")
    reward = trainer.score(hois, ids)
    assert reward["object"] == reward["verb"] == 0.0
    assert reward["format"] == pytest.approx(0.8)  # as printed, the second would be a duplicate


def test_what_is_banned_is_banned_in_sampling_and_in_the_log_probs(make_trainer, monkeypatch):
    trainer, batch = make_trainer(temperature=0.7, seed=5)
    sampler, calls = trainer.sampler, []
    image_id, end_id = trainer.examples.image_id, trainer.examples.end_id
    assert sampler.banned[image_id] and not sampler.banned[end_id]
    assert sampler.banned is trainer.distribution["banned"]
    assert sampler.temperature == trainer.distribution["temperature"] == 0.7
    assert sampler.model is trainer.replica
    monkeypatch.setattr(sampler, "collect", lambda prompts, seeds: calls.append((prompts, seeds)))
    trainer.sample(3, batch)
    seeds = grpo.sample_seeds(5, 3, [0, 1, 2], 2)
    assert calls == [([example.prompt for example in batch], seeds)]


@pytest.mark.parametrize("scores", ["ones", "likelihood"])
def test_predictions_of_a_model_that_is_right(folder, ranks, monkeypatch, scores):
    """predict_rows on completions that are the ground truth, each token with log-prob -0.01."""
    config = config_of("predict", folder, "x", scores=scores, slots=1)
    samples = hicodet.load_split(folder / "data", "test")
    examples = examples_of(config, samples)
    answers = [examples.target_ids(examples[i].hois, "x") for i in range(len(samples))]
    calls = []

    class Sampler:
        def __init__(self, model, **options):
            calls.append(options)

        def run(self, prompts):
            """All prompts under way at a time, the last one done first."""
            for number in reversed(range(len(list(prompts)))):
                ids = answers[number]
                yield number, engine.sampler.Rollout([ids], [torch.full((len(ids),), -0.01)], torch.ones(1))

    monkeypatch.setattr(predict, "Sampler", Sampler)
    model = engine.policy.load_model(config.model, ranks.device)
    indices = list(range(len(samples)))
    rows = list(predict.predict_rows(
        model, examples, indices, ranks, max_new_tokens=9, slots=1, scores=scores
    ))
    assert [row["index"] for row in rows] == indices[::-1]
    rows.reverse()
    assert all(call["banned"][examples.image_id] and call["temperature"] == 0 for call in calls)
    for row, sample_ in zip(rows, samples, strict=True):
        assert row["line"]["file_name"] == sample_.file_name
        assert row["finished"] and row["reward"]["total"] == pytest.approx(3.8)
        for instance, hoi in zip(row["line"]["instances"], sample_.hois, strict=True):
            assert instance["human"] == pytest.approx(hoi.human, abs=0.5)
            if scores == "ones":
                assert instance["scores"] == [1.0] * len(hoi.verbs)
            else:  # some 15 of the answer's tokens
                assert math.exp(-0.01 * row["length"]) < instance["scores"][0] < 0.95


def test_evaluation_in_training_is_of_the_present_weights(folder, tmp_path, monkeypatch):
    """What --eval-every logs after the last step is what predict says of the exported model.

    One image is learned by heart and is the first of the held-out ones, of which two are taken.
    """
    samples, asked = hicodet.load_split(folder / "data", "train")[:4], []
    held_out, predict_rows = {"train": samples[:1], "test": samples}, predict.predict_rows
    monkeypatch.setattr(hicodet, "load_split", lambda root, split: held_out[split])

    def noted(model, examples, indices, *arguments, **options):
        asked.append([examples.decode(examples[i].prompt.prompt_ids) for i in indices])
        return predict_rows(model, examples, indices, *arguments, **options)

    for module in (predict, train):
        monkeypatch.setattr(module, "predict_rows", noted)
    options = {"thinking": False, "traces": "", "batch_size": 1, "learning_rate": 1e-2}
    options |= {"max_steps": 25, "eval_every": 25, "eval_images": 2, "eval_max_new_tokens": 30}
    hoi_r1.main(config_of("sft", folder, tmp_path / "run", **options))
    model, options = str(tmp_path / "run" / "model"), {"thinking": False, "max_new_tokens": 30}
    hoi_r1.main(config_of("predict", folder, tmp_path / "test", model=model, limit=2, **options))
    assert asked[0] == asked[1] and len(asked[0]) == 2  # images and prompts
    lines = (tmp_path / "test" / "predictions.jsonl").read_text().splitlines()
    counts = hicodet.training_counts(folder / "data")
    rows = [json.loads(line) for line in lines]
    expected = evaluate.evaluate(rows, samples[:2], counts, classes="present")
    logged = metrics(tmp_path / "run")[-1]
    summary = json.loads((tmp_path / "test" / "summary.json").read_text())
    assert logged["eval_map"] == pytest.approx(100 * expected["default"]["full"])
    assert logged["eval_map"] > 10 and logged["eval_reward"] > 1
    assert logged["eval_reward"] == pytest.approx(summary["reward"]["total"])
    assert logged["eval_length"] == pytest.approx(summary["completion_length"])
