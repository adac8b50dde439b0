"""A batch of GRPO: sampling, rewards, and the step, which equals Eqs. 2-5 over plain forwards."""


import pytest
import torch
from torch.distributed.tensor import DTensor

import grpo
import hicodet
from engine.model.policy import load_model, shard_reference
from engine.sampling.sampler import Rollout
from sft import supervised_text
from tests.runs import config_of, optimizer_of, policy_of, training_examples
from tests.tiny import plain_logprobs, sample

ADVANTAGES = torch.tensor([[1.0, -1.0], [0.5, -2.0], [-0.7, 0.7]])


@pytest.fixture
def make_trainer(folder, ranks):
    """GRPO on the tiny model with G = 2, and a batch of three images."""

    def make(**options):
        config = config_of("grpo", folder, "unused")
        examples, policy = training_examples(config), policy_of(config, ranks)
        replica, reference = (load_model(config.model, ranks.device) for _ in range(2))
        shard_reference(reference, ranks.device)
        values = {"slots": 3, "group_size": 2, "max_new_tokens": 12, "temperature": 1.0, "seed": 0}
        values |= {"updates_per_batch": 1, "tokens_per_microbatch": 10_000}
        values |= {"objective": {}, "rewards": {}, **options}
        parts = policy, optimizer_of(policy, config), replica, reference, examples, ranks
        return grpo.GRPO(*parts, **values), [examples[i] for i in range(3)]

    return make


def random_groups(*lengths, vocabulary=200):
    """A group of random completions for each tuple of lengths."""
    ids = [[torch.randint(vocabulary, (n,)) for n in group] for group in lengths]
    logprobs = [[-torch.rand(n) for n in group] for group in lengths]
    pairs = zip(ids, logprobs)
    return [Rollout(own, some, torch.ones(len(own)).bool(), some) for own, some in pairs]


def library_copy(model, folder):
    """The library's own model with the same weights."""
    plain = load_model(str(folder / "model"), torch.device("cpu"))
    state = model.state_dict().items()
    state = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state}
    plain.load_state_dict(state)
    plain.set_attn_implementation("sdpa")
    return plain


def move(model):
    """Add noise to all weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().add_(0.01 * torch.randn(parameter.shape))


class RandomStep:
    """Replaces the optimizer: moves the weights once and keeps the last loss and gradient."""

    def __init__(self, policy):
        self.policy, self.moved = policy, False

    def step(self, lr: float, loss: float) -> float:
        parameters = list(self.policy.parameters())
        self.loss, self.gradients = loss, [p.grad.full_tensor().clone() for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        if not self.moved:
            move(self.policy)
        self.moved = True
        return 0.0


def test_the_step_has_the_gradient_of_the_equations(folder, make_trainer):
    """Eqs. 2-4 written out over separate forwards, for images of weight 0 and 1.

    This is the third step on the batch, and the first one moves the weights. So pi_theta, pi_old
    and pi_ref differ, and ratio, clip and KL matter.
    """
    objective = {"kl_coef": 0.3, "clip_eps": 0.1}
    trainer, batch = make_trainer(objective=objective, temperature=0.8, updates_per_batch=3)
    banned = trainer.distribution["banned"]
    move(trainer.reference)
    weights, groups = [1.0, 0.0, 1.0], random_groups((3, 9), (4, 4), (12, 5))
    trainer.optimizer = optimizer = RandomStep(trainer.policy)
    (micro,) = trainer.micro_batches(batch, weights, groups, ADVANTAGES)
    trainer.optimize([micro], num_outputs=4.0, lr=1.0)

    plain, old, reference = (
        library_copy(model, folder)
        for model in (trainer.policy, trainer.replica, trainer.reference)
    )
    expected, ratios = 0.0, []
    for weight, example, group, advantages in zip(weights, batch, groups, ADVANTAGES):
        for ids, a in zip(group.completion_ids, advantages):
            arguments = (example.prompt, ids, 0.8, banned)
            new = plain_logprobs(plain, *arguments)
            with torch.no_grad():
                before, ref = (plain_logprobs(model, *arguments) for model in (old, reference))
            ratio = (new - before).exp()
            ratios.append(ratio.detach())
            surrogate = torch.minimum(ratio * a, ratio.clamp(0.9, 1.1) * a)
            kl = (ref - new).exp() - (ref - new) - 1
            expected = expected - weight * (surrogate - 0.3 * kl).mean() / 4
    assert 0.2 < ((torch.cat(ratios) - 1).abs() > 0.1).float().mean() < 0.98
    expected.backward()
    assert optimizer.loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    for mine, parameter in zip(optimizer.gradients, plain.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=2e-5, rtol=1e-4)


def test_micro_batches_of_one_group_have_the_gradient_of_one_row(make_trainer):
    groups, found = random_groups((3, 9), (4, 4), (12, 5)), []
    for budget in (1, 10_000):
        trainer, batch = make_trainer(tokens_per_microbatch=budget)
        micros = trainer.micro_batches(batch, [1.0, 0.0, 1.0], groups, ADVANTAGES)
        assert len(micros) == (3 if budget == 1 else 1)
        found.append(trainer.optimize(micros, num_outputs=4.0, lr=1e-3))
    for name in ("loss", "grad_norm", "kl", "logprob_gap"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4, abs=1e-6), name


def test_advantages_belong_to_their_completions(make_trainer, monkeypatch):
    """Rewards are lengths here, and each group is a micro-batch."""
    trainer, batch = make_trainer(tokens_per_microbatch=1)
    monkeypatch.setattr(trainer, "sample", lambda *_: random_groups((2, 3), (9, 4), (5, 6)))
    parts, given = ("format", "object", "verb", "iou", "total"), {}

    def score(example, rollout):
        rewards = [dict.fromkeys(parts, float(len(ids))) for ids in rollout.completion_ids]
        return [grpo.Scored("", hicodet.parse_completion(""), reward) for reward in rewards]

    def optimize(micros, num_outputs, lr):
        for micro in micros:
            lengths = micro.packed.completion_mask.sum(1).tolist()
            given.update(zip(lengths, micro.advantages.tolist()))
        return {}

    monkeypatch.setattr(trainer, "score", score)
    monkeypatch.setattr(trainer, "optimize", optimize)
    _, shown = trainer.update(0, batch, [1.0] * 3, 1e-3)
    # a group of rewards r and s: -+ |r - s| / 2 over (|r - s| / sqrt 2 + 1e-4)
    low, high = (side * 0.5 / (0.5**0.5 + 1e-4) for side in (-1, 1))
    wide = 2.5 / (12.5**0.5 + 1e-4)
    assert given == pytest.approx({2: low, 3: high, 5: low, 6: high, 9: wide, 4: -wide})
    assert shown["file_name"] == batch[0].sample.file_name
    assert [one["advantage"] for one in shown["completions"]] == pytest.approx([low, high])


def answers_as_rollout(trainer, *answers):
    """A group whose completions are these ground truths as text."""
    ids = [trainer.examples.token_ids(supervised_text(hois, "a person")) for hois in answers]
    logprobs = [-torch.rand(len(row)) for row in ids]
    return Rollout(ids, logprobs, torch.ones(len(ids)).bool(), logprobs)


def test_completions_are_scored_in_the_frame_of_the_text(make_trainer):
    trainer, batch = make_trainer()
    right, other = batch[0].text_hois, batch[1].text_hois
    assert right != other
    first, second = trainer.score(batch[0], answers_as_rollout(trainer, right, other))
    assert first.rewards["total"] == pytest.approx(3.8) and second.rewards["total"] < 3.8
    assert first.text.startswith("<think> a person </think>")
    assert len(second.completion.instances) == len(other)


def test_completions_come_from_pi_old_by_their_seeds(make_trainer):
    """In training each token gets the log-prob that the sampler gave it."""
    trainer, batch = make_trainer(temperature=0.7, seed=5)
    seeds = sum((grpo.sample_seeds(5, 3, place, 2) for place in (0, 1, 2)), [])
    expected = sample(
        trainer.replica, [example.prompt for example in batch], seeds=seeds, group_size=2,
        max_new_tokens=12, end_id=trainer.examples.end_id, **trainer.distribution,
    )  # fmt: skip
    found = [ids for group in trainer.sample(3, batch) for ids in group.completion_ids]
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected.completion_ids]
    banned = trainer.distribution["banned"]
    assert banned[trainer.examples.image_id] and not banned[trainer.examples.end_id]
    assert not banned[torch.cat(found)].any()
    logged, _ = trainer.update(3, batch, [1.0] * 3, 1e-3)
    assert logged["logprob_gap"] < 1e-4
