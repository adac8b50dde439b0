"""engine/model/packing.py and attention.py: the packed row equals separate forwards."""

import copy

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import engine.model.packing
from engine.model.packing import pack, token_logprobs
from engine.model.policy import checkpoint_activations
from tests.tiny import make_prompt, plain_logprobs


@pytest.mark.parametrize("allowed", [None, 300])
def test_token_logprobs_equal_separate_forwards(model, reference, prompts, completions, allowed):
    """allowed: number of ids that are not banned."""
    banned = allowed and torch.arange(model.config.text_config.vocab_size) >= allowed
    batch = pack(model, prompts, completions)
    logprobs = token_logprobs(model, batch, temperature=0.7, banned=banned)
    rows = [(p, c) for p, group in zip(prompts, completions) for c in group]
    for row, (prompt, completion) in zip(logprobs, rows, strict=True):
        expected = plain_logprobs(reference, prompt, completion, temperature=0.7, banned=banned)
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


def test_gradient_checkpointing_changes_only_memory(model, prompts, completions):
    """The gradients are equal, and fewer tensors are kept for backward."""
    batch, gradients, kept = pack(model, prompts, completions), [], []
    checkpointed = copy.deepcopy(model).train()
    checkpoint_activations(checkpointed)
    for each in (copy.deepcopy(model), checkpointed):
        saved = []
        with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            token_logprobs(each, batch).sum().backward()
        gradients.append([p.grad for p in each.parameters()])
        kept.append(len(saved))
    torch.testing.assert_close(*gradients)
    assert kept[1] < kept[0] / 2


def test_windows_of_the_vision_tower_equal_the_library(model, reference):
    """Images of unequal sizes with ragged windows at their edges; values and gradients."""
    generator = torch.Generator().manual_seed(5)
    images = [make_prompt(model, *size, 1, 1, generator) for size in ((5, 3), (2, 7), (4, 4))]
    pixels = torch.cat([image.pixel_values for image in images])
    grid = torch.cat([image.image_grid_thw for image in images])
    weights = torch.randn(15 + 14 + 16, model.config.text_config.hidden_size)
    found = []
    for tower in (model.model.visual, reference.model.visual):
        tower.zero_grad()
        features = tower(pixels, grid).pooler_output
        (features * weights).sum().backward()
        found.append([features.detach(), *(p.grad.clone() for p in tower.parameters())])
        tower.zero_grad()
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-5)
