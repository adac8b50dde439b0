"""Layers as a GPU compiles them, on a CPU: no code is generated, and flash attention is replaced.

    python -m pytest -m slow tests/test_compiled.py
"""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import Module

import engine.model.attention
from demo.toy import tiny_model
from engine.model.attention import use_group_attention
from engine.model.lora import Adapter, add_adapters, trained
from engine.model.packing import pack, token_logprobs
from engine.model.policy import compile_layers, shard_policy
from engine.sampling.sampler import Sampler
from tests.test_flash import masked_varlen
from tests.tiny import make_prompt, text_ids

pytestmark = pytest.mark.slow
BACKEND = "aot_eager_decomp_partition"  # the default backend without code generation


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Compile as on a GPU with flash attention, and count the graphs."""
    graphs, compile_module = CompileCounterWithBackend(BACKEND), Module.compile

    def counted(module, **options):
        compile_module(module, backend=graphs, **options)

    monkeypatch.setattr(engine.model.attention, "has_flash", lambda x: True)
    monkeypatch.setattr(engine.model.attention, "varlen_attn", masked_varlen)
    monkeypatch.setattr(Module, "compile", counted)
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing, adapter", [
    (True, None), (False, None), (False, Adapter(4, 8, "x"))
], ids=["checkpointing", "plain", "adapters"])  # fmt: skip
def test_layers_of_both_policies_compile_for_rows_of_any_lengths(
    ranks, graphs, checkpointing, adapter
):
    """Layers of both towers: after two steps of pi_theta and pi_ref nothing is compiled.

    Log-probs and gradients equal those of layers that are not compiled.
    """
    generator = torch.Generator().manual_seed(0)
    reference = use_group_attention(tiny_model(0))

    def policy_with(gradient_checkpointing):
        policy = copy.deepcopy(reference)
        if adapter:
            add_adapters(policy, adapter, torch.float32, seed=0)
        options = {"gradient_checkpointing": gradient_checkpointing}
        return shard_policy(policy, torch.device("cpu"), **options)

    plain, policy = policy_with(False), policy_with(checkpointing)
    for model in (policy, reference):
        compile_layers(model, torch.device("cuda"))
    counts = []
    for step, groups in enumerate((1, 3, 2, 4)):
        sizes = [(2 + step % 3, 1 + i + step, 2 + i, 3) for i in range(groups)]
        prompts = [make_prompt(policy, *size, generator) for size in sizes]
        completions = [[text_ids(policy, 3 + i + step, generator) for i in range(3)] for _ in sizes]
        row = pack(policy, prompts, completions)
        mine, other = policy.token_logprobs(row), plain.token_logprobs(row)
        mine.sum().backward(), other.sum().backward()
        with torch.no_grad():
            of_reference = token_logprobs(reference, row)
        torch.testing.assert_close(mine, other)
        torch.testing.assert_close(mine, of_reference)
        counts.append(graphs.frame_count)
    for mine, other in zip(trained(policy), trained(plain), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), other.grad.full_tensor())
    assert counts[0] > 0 and counts[1:] == [counts[1]] * 3


def test_second_sampler_of_the_same_shapes_compiles_nothing(model, graphs):
    """Each evaluation in training makes one. A step is one graph."""
    options = {"slots": 2, "group_size": 2, "prompt_room": 30, "max_new_tokens": 9, "end_id": 7}
    for _ in range(2):
        sampler = Sampler(model, **options)
        step = torch.compile(sampler.step, dynamic=False, fullgraph=True, backend=graphs)
        with torch.no_grad():
            step(9), step(9)
        assert graphs.frame_count == 1
