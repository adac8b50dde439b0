"""What a GPU compiles, on a CPU without its code generator, with a slow double of flash attention.

    python -m pytest -m slow tests/test_compiled.py
"""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import Module

import engine.attention
import engine.policy
from tests.test_flash import slow_varlen
from tests.tiny import make_prompt

pytestmark = pytest.mark.slow


@torch.library.custom_op("tests::varlen_of_layers", mutates_args=())
def opaque_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends_q: torch.Tensor, ends: torch.Tensor,
    longest_q: int, longest: int, scale: float, causal: bool,
) -> torch.Tensor:
    options = {"scale": scale, "window_size": (-1, 0 if causal else -1)}
    grouped = q.shape[1] != k.shape[1]
    return slow_varlen(q, k, v, ends_q, ends, longest_q, longest, enable_gqa=grouped, **options)


@opaque_varlen.register_fake
def _(q, *_):
    return torch.empty_like(q)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Flash attention, and a compiler that looks into no call of it. Yields the graphs' counter."""
    graphs, compile_module = CompileCounter(), Module.compile

    def varlen(*args, scale, window_size=(-1, -1), enable_gqa=False):
        return opaque_varlen(*args, scale, window_size == (-1, 0))

    monkeypatch.setattr(engine.attention, "has_flash", lambda x: True)
    monkeypatch.setattr(engine.attention, "varlen_attn", varlen)
    monkeypatch.setattr(Module, "compile", lambda self: compile_module(self, backend=graphs))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def test_the_head_is_one_graph_for_all_chunks(model, as_on_a_gpu, monkeypatch):
    """Completions in one chunk, and in several under checkpointing; and equal gradients."""
    plain = engine.attention._chunk_logprobs
    fused = torch.compile(plain, dynamic=True, backend=as_on_a_gpu)
    vocabulary, width = model.lm_head.weight.shape
    banned = torch.arange(vocabulary) % 5 == 1
    monkeypatch.setattr(engine.attention, "HEAD_CHUNK", 12)
    for count in (11, 7, 40, 12):  # 40 are chunks of 12, 12, 12 and 4
        ids, values, found = torch.arange(count) * 5, torch.randn(count, width), []
        for chunk_logprobs in (fused, plain):
            monkeypatch.setattr(engine.attention, "_chunk_logprobs", chunk_logprobs)
            hidden, weight = values.clone().requires_grad_(), model.lm_head.weight
            logprobs = engine.attention.head_logprobs(model.lm_head, hidden, ids, 0.7, banned)
            gradients = torch.autograd.grad(logprobs.square().sum(), (hidden, weight))
            found.append((logprobs, *gradients))
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other)
    assert as_on_a_gpu.frame_count == 1


def test_vision_blocks_compile_without_a_break_for_any_grid(model, as_on_a_gpu):
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
            found.append(as_on_a_gpu.frame_count)
    assert found[0] == 2 and found[1:] == [found[1]] * 4 and found[1] <= 4
