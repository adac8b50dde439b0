"""What a GPU compiles, on a CPU without its code generator, with a slow double of flash attention.

    python -m pytest -m slow tests/test_compiled.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import Module

import engine.model.attention
from demo.toy import tiny_model
from engine.model.attention import use_group_attention
from engine.model.packing import pack, token_logprobs
from engine.model.policy import compile_layers, shard_policy
from engine.sampling.sampler import Sampler
from tests.tiny import make_prompt, text_ids

pytestmark = pytest.mark.slow
BACKEND = "aot_eager_decomp_partition"  # all that the default does but generating code


def masked_varlen(
    q, k, v, ends_q, ends, longest_q, longest, *, scale, window_size=(-1, -1), enable_gqa=False
):
    """`torch.nn.attention.varlen.varlen_attn` in one call with a mask, of tensors alone."""
    row, column = torch.arange(len(q))[:, None], torch.arange(len(k))[None]
    of_q, of_k = (torch.searchsorted(e, x, right=True) for e, x in ((ends_q, row), (ends, column)))
    left, left_k = ends_q[of_q] - row, ends[of_k] - column  # tokens to the sequence's end
    seen = (of_q == of_k) & (left <= longest_q) & (left_k <= longest)
    if window_size == (-1, 0):
        seen &= left_k >= left
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    output = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)
    return output[0].transpose(0, 1)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """As on a GPU, with flash attention. Counts the graphs that are compiled."""
    graphs, compile_module = CompileCounterWithBackend(BACKEND), Module.compile

    def counted(module, **options):
        compile_module(module, backend=graphs, **options)

    monkeypatch.setattr(engine.model.attention, "has_flash", lambda x: True)
    monkeypatch.setattr(engine.model.attention, "varlen_attn", masked_varlen)
    monkeypatch.setattr(engine.model.attention, "GROUPED", {"enable_gqa": True})
    monkeypatch.setattr(Module, "compile", counted)
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def test_vision_blocks_compile_without_a_break_for_any_grid(model, graphs):
    """After the first two of five grids nothing is compiled."""
    compiled = copy.deepcopy(model)
    compile_layers(compiled, torch.device("cuda"))
    generator, counts = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for size in ((5, 3), (2, 7), (4, 4), (9, 6), (13, 3)):
            image = make_prompt(model, *size, 1, 1, generator)
            mine, other = (
                m.model.visual(image.pixel_values, image.image_grid_thw).pooler_output
                for m in (compiled, model)
            )
            torch.testing.assert_close(mine, other)
            counts.append(graphs.frame_count)
    assert counts[0] > 0 and counts[1:] == [counts[1]] * 4


def forward_noting_memory(model, row):
    """Log-probs, and how many values autograd keeps for backward, each tensor counted once."""
    kept = {}

    def note(x):
        kept[x.data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        logprobs = model.token_logprobs(row)
    return logprobs, sum(x.numel() for x in kept.values())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_layers_of_both_policies_compile_for_rows_of_any_lengths(ranks, graphs, checkpointing):
    """Sharded pi_theta, with gradient, and pi_ref: two steps compile, two more do not.

    Log-probs and gradients are those of layers that are not compiled, and checkpointing spares
    most of the activations.
    """
    generator = torch.Generator().manual_seed(0)
    reference = use_group_attention(tiny_model(0))
    plain, policy = (
        shard_policy(copy.deepcopy(reference), torch.device("cpu"), gradient_checkpointing=on)
        for on in (False, checkpointing)
    )
    for model in (policy, reference):
        compile_layers(model, torch.device("cuda"))
    counts, memory = [], []
    for step, groups in enumerate((1, 3, 2, 4)):
        sizes = [(2 + step % 3, 1 + i + step, 2 + i, 3) for i in range(groups)]
        prompts = [make_prompt(policy, *size, generator) for size in sizes]
        completions = [[text_ids(policy, 3 + i + step, generator) for i in range(3)] for _ in sizes]
        row = pack(policy, prompts, completions)
        (mine, kept), (other, most) = (forward_noting_memory(m, row) for m in (policy, plain))
        mine.sum().backward(), other.sum().backward()
        memory.append((kept, most))
        with torch.no_grad():
            of_reference = token_logprobs(reference, row)
        torch.testing.assert_close(mine, other)
        torch.testing.assert_close(mine, of_reference)
        counts.append(graphs.frame_count)
    for mine, other in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), other.grad.full_tensor())
    assert counts[0] > 0 and counts[1:] == [counts[1]] * 3
    (kept, most), (kept_longer, most_longer) = memory[0], memory[-1]  # both with the parameters
    assert kept_longer - kept < (0.5 if checkpointing else 1.1) * (most_longer - most)


def test_a_second_sampler_of_the_same_shapes_compiles_nothing(model, graphs):
    """As each evaluation in training makes one; and a step is one graph."""
    options = {"slots": 2, "group_size": 2, "prompt_room": 30, "max_new_tokens": 9, "end_id": 7}
    for _ in range(2):
        sampler = Sampler(model, **options)
        step = torch.compile(sampler.step, dynamic=False, fullgraph=True, backend=graphs)
        with torch.no_grad():
            step(9), step(9)
        assert graphs.frame_count == 1
