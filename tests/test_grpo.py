"""grpo.py: Eqs. 2-5 by hand, with their gradients."""

import math

import pytest
import torch

import grpo
from engine.model.packing import mask_from_lengths

CLIP = 0.2


def test_eq5_group_advantages():
    # mean 2, squared deviations 1 + 0 + 1, sample variance 2 / 2 = 1 (population: 2 / 3)
    advantages = grpo.group_advantages(torch.tensor([[1.0, 2.0, 3.0]]), eps=0.0)
    assert advantages.tolist() == [[-1.0, 0.0, 1.0]]
    # two rewards 0 and 1: std 0.70711, so -+ 0.5 / 0.70721
    advantages = grpo.group_advantages(torch.tensor([[0.0, 1.0]]))
    assert advantages[0].tolist() == pytest.approx([-0.70701, 0.70701], abs=1e-5)


def test_eq5_equal_rewards_give_zeros_and_groups_stay_apart():
    advantages = grpo.group_advantages(torch.tensor([[3.8, 3.8, 3.8], [0.0, 1.0, 2.0]]))
    assert advantages[0].tolist() == [0.0, 0.0, 0.0]
    assert advantages[1].tolist() == pytest.approx([-0.9999, 0.0, 0.9999])
    for size in range(2, 17):  # for some sizes the rounded mean differs from the equal numbers
        equal = (torch.rand(500, 1) * 3.8).expand(-1, size)
        assert not grpo.group_advantages(equal).any()
    with pytest.raises(ValueError, match="group size 1"):
        grpo.group_advantages(torch.tensor([[1.0]]))


def test_eq3_policy_ratio():
    old = torch.log(torch.tensor([[0.5, 0.25]]))
    new = torch.log(torch.tensor([[0.75, 0.125]]))
    mask = torch.tensor([[True, True]])
    # per token 0.75 / 0.5 and 0.125 / 0.25; whole output 1.5 * 0.5
    assert grpo.policy_ratio(new, old, mask)[0].tolist() == pytest.approx([1.5, 0.5])
    assert grpo.policy_ratio(new, old, mask, "sequence")[0].tolist() == pytest.approx([0.75, 0.75])
    # a masked token does not count
    mask = torch.tensor([[True, False]])
    assert grpo.policy_ratio(new, old, mask, "sequence")[0].tolist() == pytest.approx([1.5, 1.0])
    with pytest.raises(ValueError, match="tokens"):
        grpo.policy_ratio(new, old, mask, "tokens")


def test_eq4_clipped_ratio():
    ratio = torch.tensor([0.5, 0.8, 1.0, 1.2, 1.5])
    assert grpo.clipped_ratio(ratio, CLIP).tolist() == pytest.approx([0.8, 0.8, 1.0, 1.2, 1.2])


def test_eq2_clipped_surrogate():
    ratio = torch.tensor([[1.5, 0.5], [1.5, 0.5]])
    # A = 2: min(3, 2.4), min(1, 1.6); A = -2: min(-3, -2.4), min(-1, -1.6)
    surrogate = grpo.clipped_surrogate(ratio, torch.tensor([2.0, -2.0]), CLIP)
    assert surrogate.flatten().tolist() == pytest.approx([2.4, 1.0, -3.0, -1.6])


def test_eq2_kl_estimate():
    # ref / theta = 0.5 / 0.25 = 2: 2 - ln 2 - 1 = 0.306853; equal policies: 0
    new, ref = torch.tensor([0.25, 0.3]).log(), torch.tensor([0.5, 0.3]).log()
    assert grpo.kl_estimate(new, ref).tolist() == pytest.approx([1 - math.log(2), 0.0])


def test_log_ratios_are_held_within_20():
    """1,000 tokens at +0.1 are e^100 as a whole output, more than fp32 holds; so is e^200."""
    new = torch.full((2, 1000), -0.9, requires_grad=True)
    mask, advantages = torch.ones(2, 1000, dtype=torch.bool), torch.tensor([1.0, -1.0])
    terms = grpo.grpo_objective(
        new, new.detach() - 0.1, None, advantages, mask, clip_eps=CLIP, ratio="sequence"
    )
    # A = 1: min(e^20, 1.2); A = -1: min(-e^20, -1.2)
    assert terms["objective"].tolist() == pytest.approx([1.2, -math.exp(20)], rel=1e-4)
    (gradient,) = torch.autograd.grad(terms["objective"].sum(), new)
    assert not gradient.any()  # NaN would be true
    new, ref = torch.tensor([-200.0, 0.0], requires_grad=True), torch.tensor([0.0, -200.0])
    kl = grpo.kl_estimate(new, ref)
    # e^20 - 20 - 1 and e^-20 + 20 - 1
    assert kl.tolist() == pytest.approx([math.exp(20) - 21, 19.0])
    (gradient,) = torch.autograd.grad(kl.sum(), new)
    assert not gradient.any()


def test_eq2_grpo_objective():
    old = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    new = torch.log(torch.tensor([[0.75, 0.25], [0.5, 0.9]]))
    ref = torch.log(torch.tensor([[0.75, 0.5], [0.5, 0.1]]))
    mask = torch.tensor([[True, True], [True, False]])
    terms = grpo.grpo_objective(
        new, old, ref, torch.tensor([1.0, -1.0]), mask, clip_eps=CLIP, kl_coef=0.1
    )
    # output 1, A = 1: ratios 1.5 -> 1.2 and 0.5; KL 0 and 2 - ln 2 - 1 = 0.306853
    #   mean (1.2 + 0.5 - 0.1 * 0.306853) / 2 = 0.834657
    # output 2, A = -1: ratio 1 -> -1; KL 0; the second token is padding
    assert terms["objective"].tolist() == pytest.approx([0.834657, -1.0], abs=1e-6)
    assert terms["kl"].tolist() == pytest.approx([0.306853 / 2, 0.0], abs=1e-6)
    assert terms["clip_fraction"].tolist() == [0.5, 0.0]
    # sequence ratio of output 1: 1.5 * 0.5 = 0.75 for both tokens, min(0.75, 0.8)
    terms = grpo.grpo_objective(
        new, old, None, torch.tensor([1.0, -1.0]), mask, clip_eps=CLIP, ratio="sequence"
    )
    assert terms["objective"].tolist() == pytest.approx([0.75, -1.0])


def test_eq2_grpo_loss():
    """Three of 4 outputs of the global batch are on this rank, and one of them has weight 0."""
    logprobs = torch.log(torch.tensor([[0.5], [0.5], [0.5]]))
    ref = torch.log(torch.tensor([[1.0], [0.5], [0.5]]))
    found = grpo.grpo_loss(
        logprobs, None, ref, torch.tensor([1.0, -3.0, 9.0]), torch.ones(3, 1, dtype=torch.bool),
        torch.tensor([1.0, 1.0, 0.0]), 4, kl_coef=0.1)  # fmt: skip
    # ratios 1; KL 2 - ln 2 - 1 = 0.306853, 0: -((1 - 0.0306853) - 3) / 4
    assert float(found["loss"]) == pytest.approx(0.507671, abs=1e-6)
    assert float(found["kl"]) == pytest.approx(0.306853 / 4, abs=1e-6)
    assert float(found["clip_fraction"]) == 0.0


def test_objective_gradient_by_hand_on_two_tokens():
    """A policy over two tokens with one logit z: p = sigmoid(z), d log p / dz = 1 - p."""
    z = torch.tensor(0.0, requires_grad=True)
    logprob = torch.nn.functional.logsigmoid(z)[None, None]  # p = 0.5
    ref = torch.tensor([[0.8]]).log()
    arguments = (logprob, logprob.detach(), ref, torch.tensor([2.0]), torch.tensor([[True]]))
    terms = grpo.grpo_objective(*arguments, clip_eps=CLIP, kl_coef=0.5)
    (gradient,) = torch.autograd.grad(terms["objective"].sum(), z)
    # ratio 1, d ratio / dz = 1 - p = 0.5, times A = 2: 1.0
    # KL = r - ln r - 1 with r = 0.8 / p = 1.6: dKL / dlogp = 1 - r = -0.6, dKL / dz = -0.3;
    # times -kl_coef: 0.15
    assert gradient.item() == pytest.approx(1.15, abs=1e-6)


def test_clip_stops_the_gradient_only_where_it_should():
    logprobs = torch.log(torch.tensor([[0.9], [0.9], [0.1], [0.1]])).requires_grad_()
    old = torch.full((4, 1), math.log(0.5))
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    mask = torch.ones(4, 1, dtype=torch.bool)
    terms = grpo.grpo_objective(logprobs, old, None, advantages, mask, clip_eps=CLIP)
    (gradient,) = torch.autograd.grad(terms["objective"].sum(), logprobs)
    # ratio 1.8 with A > 0 and ratio 0.2 with A < 0 are clipped; the others keep A * ratio
    assert gradient[:, 0].tolist() == pytest.approx([0.0, -1.8, 0.2, 0.0])
    assert terms["clip_fraction"].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_padding_has_no_gradient():
    logprobs = torch.randn(2, 3, requires_grad=True)
    mask = mask_from_lengths(torch.tensor([3, 1]))
    old, ref = torch.randn(2, 3), torch.randn(2, 3)
    terms = grpo.grpo_objective(logprobs, old, ref, torch.tensor([1.0, 1.0]), mask)
    (gradient,) = torch.autograd.grad(terms["objective"].sum(), logprobs)
    assert gradient[1, 1:].tolist() == [0.0, 0.0]
    assert grpo.completion_means(torch.ones(1, 2), torch.zeros(1, 2)).tolist() == [0.0]


def test_sample_seeds_are_a_pure_function_of_seed_step_and_place():
    keys = [(seed, step, place) for seed in (0, 1) for step in (3, 4) for place in (0, 1, 2)]
    seeds = [grpo.sample_seeds(*key, group_size=2) for key in keys]
    assert seeds == [grpo.sample_seeds(*key, group_size=2) for key in keys]
    assert len(set(sum(seeds, []))) == 2 * len(keys)
