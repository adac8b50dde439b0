"""Attention of a decoding step on a GPU, flex attention over filled blocks, tested on a CPU."""

import shutil

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.graph import GraphLowering
from torch.nn.attention.flex_attention import flex_attention

from engine.sampling import decode_step
from engine.sampling.decode_step import KEY_BLOCK, DecodeStep, GroupCache


def flex_of_a_copy(query, *others, **options):
    """The CPU kernel cannot read a view with permuted axes."""
    return flex_attention(decode_step._hold(query), *others, **options)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(decode_step, "has_flash", lambda x: True)
    monkeypatch.setattr(decode_step, "flex_attention", flex_of_a_copy)


def random_step(model, generator, *, slots, group_size, prompt_room, completion_room):
    """A decoding step over random keys and values. Lengths are random; some are the longest."""
    rooms = slots + 1, group_size, prompt_room, completion_room
    cache = GroupCache(model, *rooms)
    for buffer in (*cache.own_keys, *cache.own_values):
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    prompts = torch.randint(1, prompt_room + 1, (slots,), generator=generator)
    own = torch.randint(completion_room, (slots, group_size), generator=generator)
    prompts[0], own[0, 0], own[-1, -1] = prompt_room, 0, completion_room - 1
    return DecodeStep(cache, prompts, own, completion_room)


@pytest.mark.parametrize("sizes", [(3, 2, 300, 200), (2, 5, 128, 128), (1, 1, 1, 1), (2, 70, 9, 5)])
def test_a_query_sees_its_prompt_and_its_own_tokens(model, seed, sizes):
    """A block is read if and only if one of its keys is seen."""
    generator = torch.Generator().manual_seed(seed)
    names = ("slots", "group_size", "prompt_room", "completion_room")
    step = random_step(model, generator, **dict(zip(names, sizes)))
    cache, mask, (slots, members) = step.cache, step.mask, sizes[:2]
    places = cache.own_keys[0].shape[2]
    seen = torch.zeros(slots, members, places, dtype=torch.bool)
    for slot in range(slots):
        for member in range(members):
            seen[slot, member, : step.prompt_lengths[slot]] = True
            start = cache.start + member * cache.own_room
            seen[slot, member, start : start + step.own_lengths[slot, member] + 1] = True
    queries = members * cache.served
    assert mask.seq_lengths == (queries, places)
    assert places % KEY_BLOCK == 0
    at = torch.meshgrid(*map(torch.arange, (slots, queries, places)), indexing="ij")
    expected = seen.repeat_interleave(cache.served, 1)
    assert torch.equal(mask.mask_mod(at[0], 0, at[1], at[2]), expected)
    blocks = seen.any(1).unflatten(1, (-1, KEY_BLOCK)).any(2)
    assert torch.equal(mask.to_dense()[:, 0, 0].bool(), blocks)
    assert torch.equal(mask.kv_num_blocks[:, 0, 0], blocks.sum(1).int())


@pytest.mark.slow
def test_compiled_blocks_equal_scores_in_memory(model, seed):
    """One kernel serves all lengths and reads only the listed blocks."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"slots": 3, "group_size": 2, "prompt_room": 300, "completion_room": 200}
    attend = torch.compile(DecodeStep._attend_blocks, fullgraph=True, dynamic=False)
    for _ in range(3):
        step = random_step(model, generator, **sizes)
        q = torch.randn(3, step.cache.heads, 2, step.cache.served, 16, generator=generator)
        expected = step._attend_whole(q, 1, 0.3)
        torch.testing.assert_close(attend(step, q, 1, 0.3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries, warps", [(8, 4), (64, 4), (72, 8), (128, 8)])
def test_kernel_gets_its_warps_and_stages(model, monkeypatch, queries, warps):
    """PyTorch's default spills registers on an H200."""
    given = []

    def attention(query, *others, kernel_options, **options):
        given.append((query.shape[2], kernel_options))
        return query

    monkeypatch.setattr(decode_step, "flex_attention", attention)
    served = model.config.text_config.num_attention_heads // 2
    sizes = {"slots": 2, "group_size": queries // served, "prompt_room": 9, "completion_room": 5}
    step = random_step(model, torch.Generator(), **sizes)
    step._attend_blocks(torch.zeros(2, 2, queries // served, served, 16), 0, 0.3)
    assert given == [(queries, {"num_warps": warps, "num_stages": 2})]


def compile_attention(model, seed, **options) -> None:
    """Compile a step's mask and the attention of a layer, and run it."""
    sizes = {"slots": 2, "group_size": 2, "prompt_room": 30, "completion_room": 9}
    made = random_step(model, torch.Generator().manual_seed(seed), **sizes)

    def attend(q):
        step = DecodeStep(made.cache, made.prompt_lengths, made.own_lengths, made.room)
        return step._attend_blocks(q, 0, 0.3)

    q = torch.randn(2, made.cache.heads, 2, made.cache.served, 16)
    torch.compile(attend, dynamic=False, fullgraph=True, **options)(q)


def test_mask_reads_only_a_held_tensor(model, seed):
    """On a GPU, Inductor would compute anything else inside of the attention kernel."""
    captured = []

    def note(graph, inputs):
        (call,) = graph.graph.find_nodes(
            op="call_function", target=torch.ops.higher_order.flex_attention
        )
        captured.extend(one for one in call.args[8] if isinstance(one, torch.fx.Node))
        return make_boxed_func(graph.forward)

    compile_attention(model, seed, backend=aot_autograd(fw_compiler=note))
    assert [node.target for node in captured] == [torch.ops.hoi_r1.hold.default]


class Lowered(BaseException):
    """Inductor has lowered the graph, and only code generation is left."""


@pytest.mark.skipif(not shutil.which("g++"), reason="without g++ Inductor lowers nothing on a CPU")
def test_attention_is_lowered_where_a_cat_is_fused(model, seed, monkeypatch):
    """As for CUDA, where a cat that is not held becomes a part of the kernel, which then fails."""

    def stop(graph):
        raise Lowered

    monkeypatch.setattr(GraphLowering, "compile_to_module", stop)
    with torch._inductor.config.patch(force_pointwise_cat=True, fx_graph_cache=False):
        with pytest.raises(Lowered):
            compile_attention(model, seed)
