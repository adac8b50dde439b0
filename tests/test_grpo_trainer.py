"""A batch of GRPO against plain forwards; prediction, and evaluation in training."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.distributed.tensor import DTensor

import evaluate
import grpo
import hicodet
import predict
import train
from engine.data import annotations
from engine.model.packing import token_logprobs
from engine.model.policy import load_model, load_reference
from engine.sampling.sampler import Rollout
from sft import supervised_text
from tests.runs import (
    config_of,
    examples_of,
    metrics,
    optimizer_of,
    policy_of,
    run,
    training_examples,
)
from tests.tiny import plain_logprobs


@pytest.fixture
def make_trainer(folder, ranks):
    """GRPO on the tiny model with G = 2, and a batch of three images."""

    def make(**options):
        config = config_of("grpo", folder, "unused")
        examples = training_examples(config)
        policy = policy_of(config, ranks)
        replica = load_model(config.model, ranks.device)
        reference = load_reference(config.model, ranks.device)
        values = {
            "slots": 3,
            "group_size": 2,
            "max_new_tokens": 12,
            "temperature": 1.0,
            "seed": 0,
            "updates_per_batch": 1,
            "tokens_per_microbatch": 10_000,
            "objective": {},
            "rewards": {},
        }
        optimizer = optimizer_of(policy, config)
        parts = (policy, optimizer, replica, reference, examples, ranks)
        return grpo.GRPO(*parts, **values | options), [examples[i] for i in range(3)]

    return make


def random_groups(*lengths, vocabulary=200):
    """A group of random completions for each tuple of lengths."""
    return [
        Rollout(
            [torch.randint(vocabulary, (n,)) for n in group],
            [-torch.rand(n) for n in group],
            torch.ones(len(group), dtype=torch.bool),
            [torch.rand(n) for n in group],
        )
        for group in lengths
    ]


def library_copy(model, folder):
    """The same weights in a model that runs as the library made it."""
    plain = load_model(str(folder / "model"), torch.device("cpu"))
    state = model.state_dict().items()
    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state}
    plain.load_state_dict(state)
    plain.set_attn_implementation("sdpa")
    return plain


def test_the_step_has_the_gradient_of_the_equations(folder, make_trainer):
    """Eqs. 2-4 written out over separate forwards; images of weight 0 and 1, unequal lengths.

    pi_theta, pi_old and pi_ref all differ, so that ratio, clip and KL all matter.
    """
    trainer, batch = make_trainer(
        objective={"kl_coef": 0.3, "clip_eps": 0.1}, temperature=0.8, updates_per_batch=2
    )
    distribution = trainer.distribution
    with torch.no_grad():
        for parameter in trainer.reference.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    plain = library_copy(trainer.replica, folder)
    reference = library_copy(trainer.reference, folder)
    weights, advantages = [1.0, 0.0, 1.0], torch.tensor([[1.0, -1.0], [0.5, -2.0], [-0.7, 0.7]])
    groups = random_groups((3, 9), (4, 4), (12, 5))
    (micro,) = trainer.micro_batches(batch, weights, groups, advantages)
    noise = 0.3 * torch.randn(micro.packed.completion_mask.shape).clamp(-2, 2)
    with torch.no_grad():
        old = token_logprobs(trainer.replica, micro.packed, **distribution) + noise
    order = [i for i in (2, 0, 1)]  # the longest group comes first in the row
    gradients = []
    trainer.optimizer.step = lambda lr, loss: gradients.extend(
        p.grad.full_tensor().clone() for p in trainer.policy.parameters()
    )
    _, logged = trainer.optimizer_step([micro], [old], num_outputs=4.0, lr=1.0)

    objective = 0.0
    for place, image in enumerate(order):
        for g, ids in enumerate(groups[image].completion_ids):
            arguments = (batch[image].prompt, ids, 0.8, distribution["banned"])
            new, ref = plain_logprobs(plain, *arguments), plain_logprobs(reference, *arguments)
            a, ratio = advantages[image, g], (new - old[2 * place + g, : len(ids)]).exp()
            surrogate = torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a)
            kl = (ref.detach() - new).exp() - (ref.detach() - new) - 1
            objective = objective + weights[image] * (surrogate - 0.3 * kl).mean() / 4
    (-objective).backward()
    assert logged["loss"] == pytest.approx(-objective.item(), rel=1e-4, abs=1e-6)
    for mine, parameter in zip(gradients, plain.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=2e-5, rtol=1e-4)


def test_micro_batches_of_one_group_have_the_gradient_of_one_row(make_trainer):
    advantages = torch.tensor([[1.0, -1.0], [0.5, -2.0], [-0.7, 0.7]])
    groups, found = random_groups((3, 9), (4, 4), (12, 5)), []
    for budget in (1, 10_000):
        trainer, batch = make_trainer(tokens_per_microbatch=budget)
        micros = trainer.micro_batches(batch, [1.0, 0.0, 1.0], groups, advantages)
        assert len(micros) == (3 if budget == 1 else 1)
        found.append(trainer.optimize(micros, num_outputs=4.0, lr=1e-3))
    for name in ("loss", "grad_norm", "kl", "logprob_gap"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4, abs=1e-6), name


def test_several_updates_keep_the_first_policy_as_pi_old(make_trainer):
    """With pi_old taken anew at each update every ratio would be 1 and nothing clipped."""
    trainer, batch = make_trainer(updates_per_batch=3, objective={"clip_eps": 0.01})
    advantages = torch.tensor([[1.0, -1.0]] * 3)
    micros = trainer.micro_batches(batch, [1.0] * 3, random_groups(*[(5, 5)] * 3), advantages)
    logged = trainer.optimize(micros, num_outputs=6.0, lr=1e-2)
    assert logged["clip_fraction"] > 0.05
    steps = {int(state["step"]) for state in trainer.optimizer.adamw.state.values()}
    assert steps == {3}


def test_advantages_and_rewards_belong_to_their_completions(make_trainer, monkeypatch):
    """From sampling to the micro-batches, each group in one of its own."""
    trainer, batch = make_trainer(tokens_per_microbatch=1)
    monkeypatch.setattr(trainer, "sample", lambda *_: random_groups((2, 3), (9, 4), (5, 6)))
    parts = ("format", "object", "verb", "iou", "total")

    def score(example, group):
        written = {"written": {"instances": 1, "verbs": 1}}
        return [dict.fromkeys(parts, float(len(i))) | written for i in group.completion_ids]

    monkeypatch.setattr(trainer, "score", score)
    given = {}

    def optimize(micros, num_outputs, lr):
        for micro in micros:
            lengths = micro.packed.completion_mask.sum(1).tolist()
            given.update(zip(lengths, micro.advantages.tolist()))
        return {}

    monkeypatch.setattr(trainer, "optimize", optimize)
    trainer.update(0, batch, [1.0] * 3, 1e-3)
    # a group of rewards r and s: -+ |r - s| / 2 over (|r - s| / sqrt 2 + 1e-4)
    low, high = (side * 0.5 / (0.5**0.5 + 1e-4) for side in (-1, 1))
    wide = 2.5 / (12.5**0.5 + 1e-4)
    assert given == pytest.approx({2: low, 3: high, 5: low, 6: high, 9: wide, 4: -wide})


def answers_as_rollout(trainer, *answers):
    """A group whose completions are these ground truths, written out."""
    ids = [trainer.examples.token_ids(supervised_text(hois, "a person")) for hois in answers]
    logprobs = [-torch.rand(len(row)) for row in ids]
    return Rollout(ids, logprobs, torch.ones(len(ids)).bool(), logprobs)


def test_completions_are_scored_in_the_frame_of_the_text(make_trainer):
    trainer, batch = make_trainer()
    right, other = batch[0].text_hois, batch[1].text_hois
    assert right != other
    scored = trainer.score(batch[0], answers_as_rollout(trainer, right, other))
    assert scored[0]["total"] == pytest.approx(3.8) and scored[1]["total"] < 3.8
    assert scored[0]["text"].startswith("<think> a person </think>")
    verbs = sum(len(hoi.verbs) for hoi in other)
    assert scored[1]["written"] == {"instances": len(other), "verbs": verbs}


def test_rewards_of_table_3_and_the_duplicate_rule_reach_the_score(make_trainer):
    trainer, batch = make_trainer(rewards={"without": ("label",), "duplicate_rule": "pair"})
    hoi = batch[0].text_hois[0]
    two = (
        replace(hoi, object=(90.0, 90.0, 99.0, 99.0)),
        hicodet.HOI(hoi.human, (0.0, 0.0, 9.0, 9.0), "bicycle", ("hold",)),
    )
    (reward,) = trainer.score(batch[0], answers_as_rollout(trainer, two))
    assert reward["object"] == reward["verb"] == 0.0
    # as printed, the second would be a duplicate; one true pair, two written
    assert reward["format"] == pytest.approx(0.8)


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
    seeds = [grpo.sample_seeds(5, 3, place, 2) for place in (0, 1, 2)]
    assert calls == [([example.prompt for example in batch], seeds)]


@pytest.mark.parametrize("scores", ["ones", "likelihood"])
def test_predictions_of_a_model_that_is_right(folder, ranks, monkeypatch, scores):
    """predict_rows on completions that are the ground truth, each token with log-prob -0.01."""
    config = config_of("predict", folder, "x", scores=scores, slots=1)
    samples = annotations.load_split(folder / "data", "test")
    examples = examples_of(config, samples)
    texts = [supervised_text(examples[i].text_hois, "x") for i in range(len(samples))]
    answers = [examples.token_ids(text) for text in texts]
    calls = []

    class Sampler:
        def __init__(self, model, **options):
            calls.append(options)

        def run(self, prompts):
            """All prompts under way at a time, the last one done first."""
            for number in reversed(range(len(list(prompts)))):
                ids = answers[number]
                logprobs = [torch.full((len(ids),), -0.01)]
                yield number, Rollout([ids], logprobs, torch.ones(1), logprobs)

    monkeypatch.setattr(predict, "Sampler", Sampler)
    model = load_model(config.model, ranks.device)
    indices = list(range(len(samples)))
    rows = list(predict.predict_rows(
        model, examples, indices, ranks, max_new_tokens=9, slots=1, scores=scores
    ))
    assert [row["index"] for row in rows] == indices[::-1]
    rows.reverse()
    assert all(call["banned"][examples.image_id] and call["temperature"] == 0 for call in calls)
    for row, sample_ in zip(rows, samples, strict=True):
        assert row["line"]["file_name"] == sample_.file_name
        # Eq. 7 as printed punishes a person's second object: 0.6 of two instances' mean
        shared = len({hoi.human for hoi in sample_.hois}) < len(sample_.hois)
        assert row["finished"]
        assert row["reward"]["total"] == pytest.approx(3.5 if shared else 3.8)
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
    samples, asked = annotations.load_split(folder / "data", "train")[:4], []
    held_out, predict_rows = {"train": samples[:1], "test": samples}, predict.predict_rows
    monkeypatch.setattr(annotations, "load_split", lambda root, split: held_out[split])

    def noted(model, examples, indices, *arguments, **options):
        asked.append([examples.decode(examples[i].prompt.prompt_ids) for i in indices])
        return predict_rows(model, examples, indices, *arguments, **options)

    for module in (predict, train):
        monkeypatch.setattr(module, "predict_rows", noted)
    options = {"thinking": False, "traces": "", "batch_size": 1, "learning_rate": 1e-2}
    options |= {"max_steps": 25, "eval_every": 25, "eval_images": 2, "eval_max_new_tokens": 30}
    run(config_of("sft", folder, tmp_path / "run", **options))
    model, options = str(tmp_path / "run" / "model"), {"thinking": False, "max_new_tokens": 30}
    run(config_of("predict", folder, tmp_path / "test", model=model, limit=2, **options))
    assert asked[0] == asked[1] and len(asked[0]) == 2  # images and prompts
    lines = (tmp_path / "test" / "predictions.jsonl").read_text().splitlines()
    counts = annotations.training_counts(folder / "data")
    rows = [json.loads(line) for line in lines]
    expected = evaluate.evaluate(rows, samples[:2], counts, classes="present")
    logged = metrics(tmp_path / "run")[-1]
    summary = json.loads((tmp_path / "test" / "summary.json").read_text())
    assert logged["eval_map"] == pytest.approx(100 * expected["default"]["full"])
    assert logged["eval_map"] > 10 and logged["eval_reward"] > 1
    assert logged["eval_reward"] == pytest.approx(summary["reward"]["total"])
    assert logged["eval_length"] == pytest.approx(summary["completion_length"])
