"""engine/model/optimizer.py: the clipped step, the learning rate and micro-batches."""

import math

import pytest
import torch
from torch.distributed.tensor import distribute_tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from engine.model.optimizer import learning_rate, micro_batches
from hicodet import InputError
from tests.runs import config_of, optimizer_of, policy_of


def test_step_is_adamw_on_the_clipped_gradient(folder, ranks):
    """Compared with PyTorch's AdamW on a plain model whose gradient is scaled by hand."""
    options = {"adam_beta2": 0.9, "weight_decay": 0.1, "max_grad_norm": 0.5, "learning_rate": 7.0}
    config = config_of("sft", folder, "x", **options)
    policy = policy_of(config, ranks)
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model, dtype=torch.float32)
    optimizer = optimizer_of(policy, config)
    reference = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.9), weight_decay=0.1)
    for lr in (1e-3, 4e-4):  # the step's rate counts, not the config's
        gradients = [torch.randn_like(p) for p in plain.parameters()]
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        for mine, other, gradient in zip(policy.parameters(), plain.parameters(), gradients):
            mine.grad = distribute_tensor(gradient, mine.device_mesh, mine.placements)
            other.grad = gradient * 0.5 / norm
        reference.param_groups[0]["lr"] = lr
        reference.step()
        assert optimizer.step(lr, 1.0) == pytest.approx(norm, rel=1e-5)
    for mine, other in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), other, atol=1e-6, rtol=1e-5)
        assert mine.grad is None


def test_gradient_that_is_not_finite_changes_nothing(folder, ranks):
    config = config_of("sft", folder, "x")
    policy = policy_of(config, ranks)
    optimizer = optimizer_of(policy, config)
    before = [p.full_tensor().clone() for p in policy.parameters()]

    def step(value, loss=1.0):
        for parameter in policy.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        next(policy.parameters()).grad.mul_(value)
        return optimizer.step(1e-3, loss)

    assert math.isnan(step(math.nan)) and optimizer.bad_in_a_row == 1
    assert all(parameter.grad is None for parameter in policy.parameters())
    step(1.0, loss=math.inf)
    moments = optimizer.adamw.state.values()
    assert optimizer.bad_in_a_row == 2
    assert not any(value.any() for state in moments for value in state.values())
    for old, new in zip(before, policy.parameters(), strict=True):
        assert torch.equal(old, new.full_tensor())
    assert math.isfinite(step(1.0)) and optimizer.bad_in_a_row == 0
    assert not torch.equal(before[0], next(policy.parameters()).full_tensor())
    with pytest.raises(InputError, match="10 steps in a row"):
        for _ in range(10):
            step(math.inf)


@pytest.mark.parametrize("warmup, schedule, rates", [
    (0, "cosine", [1.0, 0.853553, 0.5, 0.146447]),  # (1 + cos(pi k / 4)) / 2
    (0, "linear", [1.0, 0.75, 0.5, 0.25]),
    (2, "linear", [0.5, 1.0, 1.0, 0.5]),
])  # fmt: skip
def test_learning_rates(warmup, schedule, rates):
    found = [learning_rate(step, 4, 1.0, warmup, schedule) for step in range(4)]
    assert found == pytest.approx(rates, abs=1e-6)


def test_micro_batches(ranks):
    """The longest first, within the budget; a sample over the budget is alone."""
    parts = micro_batches([3, 9, 4, 20, 1], [1.0, 1.0, 0.0, 1.0, 1.0], 10, ranks)
    assert parts == [([3], [1.0]), ([1], [1.0]), ([2, 0, 4], [0.0, 1.0, 1.0])]
    # if all share 100 tokens, those count once: 200 + 90 + 80
    for budget, expected in ((370, [[1, 2, 0]]), (369, [[1, 2], [0]])):
        parts = micro_batches([180, 200, 190], [1.0] * 3, budget, ranks, 100)
        assert [part for part, _ in parts] == expected
