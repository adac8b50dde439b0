"""grpo.py: Eqs. 2-5 by hand; engine/model/attention.py against plain forwards."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine.model.attention
import engine.model.packing
import grpo
from engine.model.attention import GroupLayout
from engine.model.packing import mask_from_lengths, pack, token_logprobs
from engine.model.policy import checkpoint_activations
from tests.tiny import plain_logprobs

CLIP = 0.2


# Eqs. 2-5, by hand


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
    for size in range(2, 17):  # for some sizes the mean of equal numbers is another number
        equal = (torch.rand(500, 1) * 3.8).expand(-1, size)
        assert not grpo.group_advantages(equal).any()
    with pytest.raises(ValueError, match="group size 1"):
        grpo.group_advantages(torch.tensor([[1.0]]))


def test_advantage_shares_by_hand():
    parts = {"format": [0.0, 0.0], "object": [0.0, 2.0], "iou": [1.0, 0.0]}
    one = {name: np.array([values]) for name, values in parts.items()}
    # rewards 1 and 2, -+0.5 around their mean; object -+1, iou +-0.5: covariances 2 (1 * 0.5) and
    # -2 (0.5 * 0.5), over a variance of 2 (0.5 * 0.5)
    expected = {"format": 0.0, "object": 2.0, "iou": -1.0}
    assert grpo.advantage_shares(one, eps=0.0) == pytest.approx(expected)
    # a second group with ten times the spread, all of it of iou: both count alike, as in Eq. 5
    more = {"format": [0.0, 0.0], "object": [3.0, 3.0], "iou": [0.0, 10.0]}
    two = {name: np.array([parts[name], more[name]]) for name in parts}
    expected = {"format": 0.0, "object": 1.0, "iou": 0.0}
    assert grpo.advantage_shares(two, eps=0.0) == pytest.approx(expected)


def test_advantage_shares_of_equal_rewards_are_zero():
    parts = {"object": np.array([[0.1, 0.3]]), "iou": np.array([[0.3, 0.1]])}
    assert grpo.advantage_shares(parts) == {"object": 0.0, "iou": 0.0}
    parts = {"object": np.array([[0.1 + 0.2, 0.3]]), "iou": np.array([[0.2, 0.2]])}
    assert grpo.advantage_shares(parts) == {"object": 0.0, "iou": 0.0}  # equal but for rounding


def test_eq3_policy_ratio():
    old = torch.log(torch.tensor([[0.5, 0.25]]))
    new = torch.log(torch.tensor([[0.75, 0.125]]))
    mask = torch.tensor([[True, True]])
    # per token 0.75 / 0.5 and 0.125 / 0.25; whole output 1.5 * 0.5
    assert grpo.policy_ratio(new, old, mask)[0].tolist() == pytest.approx([1.5, 0.5])
    assert grpo.policy_ratio(new, old, mask, "sequence")[0].tolist() == pytest.approx([0.75, 0.75])
    # a masked token takes no part, whatever it holds
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
    """Of 4 outputs of the global batch three are here, and one of them does not count."""
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
    terms = grpo.grpo_objective(
        logprob,
        logprob.detach(),
        ref,
        torch.tensor([2.0]),
        torch.tensor([[True]]),
        clip_eps=CLIP,
        kl_coef=0.5,
    )
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


def test_padding_takes_no_part_in_objective_or_gradient():
    logprobs = torch.randn(2, 3, requires_grad=True)
    mask = mask_from_lengths(torch.tensor([3, 1]))
    old, ref = torch.randn(2, 3), torch.randn(2, 3)
    terms = grpo.grpo_objective(logprobs, old, ref, torch.tensor([1.0, 1.0]), mask)
    (gradient,) = torch.autograd.grad(terms["objective"].sum(), logprobs)
    assert gradient[1, 1:].tolist() == [0.0, 0.0]
    assert grpo.completion_means(torch.ones(1, 2), torch.zeros(1, 2)).tolist() == [0.0]


# The packed row


def test_token_logprobs_equal_separate_forwards(model, reference, prompts, completions):
    batch = pack(model, prompts, completions)
    logprobs = token_logprobs(model, batch, temperature=0.7)
    rows = [(p, c) for p, group in zip(prompts, completions) for c in group]
    for row, (prompt, completion) in zip(logprobs, rows, strict=True):
        expected = plain_logprobs(reference, prompt, completion, temperature=0.7)
        torch.testing.assert_close(row[: len(completion)], expected, atol=1e-5, rtol=1e-5)
        assert row[len(completion) :].tolist() == [0.0] * (len(row) - len(completion))


def test_gradients_equal_separate_forwards(model, reference, prompts, completions, monkeypatch):
    """Every parameter's gradient, vision tower included, with the head in several chunks."""
    monkeypatch.setattr(engine.model.packing, "HEAD_CHUNK", 4)
    weights = torch.randn(7)
    rows = [(p, c) for p, group in zip(prompts, completions) for c in group]
    model.zero_grad(), reference.zero_grad()
    logprobs = token_logprobs(model, pack(model, prompts, completions))
    (logprobs.sum(1) * weights).sum().backward()
    for weight, (prompt, completion) in zip(weights, rows):
        (plain_logprobs(reference, prompt, completion).sum() * weight).backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        scale = expected[name].grad.abs().max()
        assert scale > 0, name
        difference = (parameter.grad - expected[name].grad).abs().max()
        assert difference < 1e-5 * max(scale, 1), (name, difference, scale)
    model.zero_grad(), reference.zero_grad()


def test_a_row_lies_on_the_device_that_is_named(model, prompts, completions):
    """Not on that of the parameters, which --offload keeps on the host."""
    batch = pack(model, prompts, completions, torch.device("meta"))
    parts = [part for part in vars(batch).values() if isinstance(part, torch.Tensor)]
    assert {part.device.type for part in [*parts, batch.layout.sequences[0]]} == {"meta"}


def test_gradient_checkpointing_changes_nothing(model, prompts, completions):
    batch = pack(model, prompts, completions)
    gradients = []
    checkpointed = copy.deepcopy(model).train()
    checkpoint_activations(checkpointed)
    for each in (copy.deepcopy(model), checkpointed):
        token_logprobs(each, batch).sum().backward()
        gradients.append([p.grad for p in each.parameters()])
    torch.testing.assert_close(*gradients)


def test_banned_ids_leave_the_distribution(model, reference, prompts, completions):
    banned = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool)
    banned[300:] = True
    batch = pack(model, prompts[:1], completions[:1])
    logprobs = token_logprobs(model, batch, banned=banned)
    expected = plain_logprobs(reference, prompts[0], completions[0][1], banned=banned)
    torch.testing.assert_close(logprobs[1, : len(expected)], expected, atol=1e-5, rtol=1e-5)


def test_a_completion_does_not_see_its_siblings(model, prompts, completions):
    alone = token_logprobs(model, pack(model, prompts[:1], [completions[0][:1]]))
    changed = [[completions[0][0], completions[0][1].flip(0)]]
    together = token_logprobs(model, pack(model, prompts[:1], changed))
    torch.testing.assert_close(alone[0], together[0, : alone.shape[1]], atol=1e-6, rtol=1e-5)


def test_sequences_of_a_row_by_hand():
    """Two completions behind a prompt of 3, one behind a prompt of 2, a prompt alone."""
    layout = GroupLayout((3, 2, 1), ((2, 1), (4,), ()))
    keys, ends_q, ends_k, longest_q, longest_k = layout.sequences
    expected = [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 5], [6, 7, 8, 9, 10, 11], [12]]
    assert keys.tolist() == sum(expected, [])
    assert ends_q.tolist() == [0, 3, 5, 6, 12, 13]
    assert ends_k.tolist() == [0, 3, 8, 12, 18, 19]
    assert (longest_q, longest_k) == (6, 6)


class LargestHostCopy(TorchDispatchMode):
    """Notes the largest tensor that is joined of others on the host."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten.cat.default and result.device.type == "cpu":
            self.values = max(self.values, result.numel())
        return result


def test_pixels_are_joined_on_the_device(model, prompts, completions):
    """On a host without a GPU, with a device that has no memory."""
    elsewhere = copy.deepcopy(model).to("meta")
    with LargestHostCopy() as largest:
        batch = pack(elsewhere, prompts, completions)
    assert batch.pixel_values.device.type == batch.input_ids.device.type == "meta"
    assert batch.pixel_values.shape[0] == sum(len(p.pixel_values) for p in prompts)
    assert 0 < largest.values < min(p.pixel_values.numel() for p in prompts)
