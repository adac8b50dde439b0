"""What a GPU compiles, on a CPU without its code generator, with a slow double of flash attention.

    python -m pytest -m slow tests/test_compiled.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import Module

import engine.attention
import engine.policy
import engine.sampler
from demo.toy import tiny_model
from engine.attention import pack, token_logprobs, use_group_attention
from tests.tiny import make_prompt, text_ids

pytestmark = pytest.mark.slow
BACKEND = "aot_eager_decomp_partition"  # all that the default does but generating code


def masked_varlen(
    q, k, v, ends_q, ends, longest_q, longest, *, scale, window_size=(-1, -1), enable_gqa=False
):
    """`torch.nn.attention.varlen.varlen_attn` in one call with a mask, of tensors alone."""
    row, column = torch.arange(len(q))[:, None], torch.arange(len(k))[None]
    of_q, of_k = (torch.searchsorted(e, x, right=True) for e, x in ((ends_q, row), (ends, column)))
    behind, behind_k = ends_q[of_q] - row, ends[of_k] - column  # tokens to the sequence's end
    seen = (of_q == of_k) & (behind <= longest_q) & (behind_k <= longest)
    if window_size == (-1, 0):
        seen &= behind_k >= behind
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    output = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)
    return output[0].transpose(0, 1)


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """As on a GPU, with flash attention. Counts the graphs that are compiled."""
    graphs, compile_module = CompileCounterWithBackend(BACKEND), Module.compile

    def counted(module, **options):
        compile_module(module, backend=graphs, **options)

    monkeypatch.setattr(engine.attention, "has_flash", lambda x: True)
    monkeypatch.setattr(engine.attention, "varlen_attn", masked_varlen)
    monkeypatch.setattr(engine.attention, "GROUPED", {"enable_gqa": True})
    monkeypatch.setattr(Module, "compile", counted)
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def test_the_head_is_one_graph_for_all_chunks(model, graphs, monkeypatch):
    """Completions in one chunk, and in several under checkpointing; and equal gradients."""
    plain = engine.attention.chunk_logprobs(0.7, compiled=False)
    fused = torch.compile(plain, dynamic=True, backend=graphs)
    vocabulary, width = model.lm_head.weight.shape
    banned = torch.arange(vocabulary) % 5 == 1
    monkeypatch.setattr(engine.attention, "HEAD_CHUNK", 12)
    for count in (11, 7, 40, 12):  # 40 are chunks of 12, 12, 12 and 4
        ids, values, found = torch.arange(count) * 5, torch.randn(count, width), []
        for of_chunk in (fused, plain):
            monkeypatch.setattr(engine.attention, "chunk_logprobs", lambda *how, **_: of_chunk)
            hidden, weight = values.clone().requires_grad_(), model.lm_head.weight
            logprobs = engine.attention.head_logprobs(model.lm_head, hidden, ids, 0.7, banned)
            gradients = torch.autograd.grad(logprobs.square().sum(), (hidden, weight))
            found.append((logprobs, *gradients))
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other)
    assert graphs.frame_count == 1


def test_vision_blocks_compile_without_a_break_for_any_grid(model, graphs):
    """Five grids: blocks of windows and of whole images, each for the first grid and for any."""
    compiled = copy.deepcopy(model)
    engine.policy.compile_layers(compiled, torch.device("cuda"))
    generator, found = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for size in ((5, 3), (2, 7), (4, 4), (9, 6), (13, 3)):
            image = make_prompt(model, *size, 1, 1, generator)
            mine, other = (
                m.model.visual(image.pixel_values, image.image_grid_thw).pooler_output
                for m in (compiled, model)
            )
            torch.testing.assert_close(mine, other)
            found.append(graphs.frame_count)
    assert found[0] == 2 and found[1:] == [found[1]] * 4 and found[1] <= 4


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
        engine.policy.shard_policy(
            copy.deepcopy(reference), torch.device("cpu"), gradient_checkpointing=checkpoints
        )
        for checkpoints in (False, checkpointing)
    )
    for model in (policy, reference):
        engine.policy.compile_layers(model, torch.device("cuda"))
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
    assert counts[1:] == [counts[1]] * 3 and 8 <= counts[1] <= 12
    (kept, most), (kept_longer, most_longer) = memory[0], memory[-1]  # both with the parameters
    assert kept_longer - kept < (0.5 if checkpointing else 1.1) * (most_longer - most)


def test_a_second_sampler_of_the_same_shapes_compiles_nothing(model, graphs):
    """As each evaluation in training makes one; and a step is one graph."""
    options = {"slots": 2, "group_size": 2, "prompt_room": 30, "max_new_tokens": 9, "end_id": 7}
    for _ in range(2):
        sampler = engine.sampler.Sampler(model, **options)
        step = torch.compile(sampler.step, dynamic=False, fullgraph=True, backend=graphs)
        with torch.no_grad():
            step(9), step(9)
        assert graphs.frame_count == 1
