"""How a GPU attends in decoding: flex attention over filled blocks, on a CPU."""

import math
import re
import shutil

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import run_and_get_code
from torch.nn.attention.flex_attention import flex_attention

import engine.sampling.decode_step
import engine.sampling.sampler
from demo.toy import tiny_model
from engine.model.attention import use_group_attention


def flex_of_a_copy(query, *others, **options):
    """A CPU's kernel takes no view of a tensor with other axes."""
    return flex_attention(engine.sampling.decode_step._hold(query), *others, **options)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(engine.sampling.decode_step, "has_flash", lambda x: True)
    monkeypatch.setattr(engine.sampling.decode_step, "flex_attention", flex_of_a_copy)


def random_step(model, generator, *, slots, group_size, prompt_room, completion_room):
    """A decoding step with random lengths, some at their ends, over random keys and values."""
    rooms = slots + 1, group_size, prompt_room, completion_room
    cache = engine.sampling.decode_step.GroupCache(model, *rooms)
    for buffer in (*cache.own_keys, *cache.own_values):
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    prompts = torch.randint(1, prompt_room + 1, (slots,), generator=generator)
    own = torch.randint(completion_room, (slots, group_size), generator=generator)
    prompts[0], own[0, 0], own[-1, -1] = prompt_room, 0, completion_room - 1
    return engine.sampling.decode_step.DecodeStep(cache, prompts, own, completion_room)


@pytest.mark.parametrize("sizes", [(3, 2, 300, 200), (2, 5, 128, 128), (1, 1, 1, 1), (2, 70, 9, 5)])
def test_a_query_sees_its_prompt_and_its_own_tokens(model, seed, sizes):
    """And a block is read if and only if one of its keys is seen."""
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
    assert places % engine.sampling.decode_step.KEY_BLOCK == 0
    at = torch.meshgrid(*map(torch.arange, (slots, queries, places)), indexing="ij")
    expected = seen.repeat_interleave(cache.served, 1)
    assert torch.equal(mask.mask_mod(at[0], 0, at[1], at[2]), expected)
    blocks = seen.any(1).unflatten(1, (-1, engine.sampling.decode_step.KEY_BLOCK)).any(2)
    assert torch.equal(mask.to_dense()[:, 0, 0].bool(), blocks)
    assert torch.equal(mask.kv_num_blocks[:, 0, 0], blocks.sum(1).int())


@pytest.mark.slow
def test_blocks_compiled_for_new_lengths_equal_scores_in_memory(model, seed):
    """One kernel for all lengths, which reads no block that is not listed."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"slots": 3, "group_size": 2, "prompt_room": 300, "completion_room": 200}
    blocks = engine.sampling.decode_step.DecodeStep._attend_blocks
    attend = torch.compile(blocks, fullgraph=True, dynamic=False)
    for _ in range(3):
        step = random_step(model, generator, **sizes)
        q = torch.randn(3, step.cache.heads, 2, step.cache.served, 16, generator=generator)
        expected = step._attend_whole(q, 1, 0.3)
        torch.testing.assert_close(attend(step, q, 1, 0.3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries, warps", [(8, 4), (64, 4), (72, 8), (128, 8)])
def test_the_kernel_is_given_its_warps_and_stages(model, monkeypatch, queries, warps):
    """PyTorch's own choice spills registers on an H200: see `kernel_options`."""
    given = []

    def attention(query, *others, kernel_options, **options):
        given.append((query.shape[2], kernel_options))
        return query

    monkeypatch.setattr(engine.sampling.decode_step, "flex_attention", attention)
    sizes = {"slots": 2, "prompt_room": 9, "completion_room": 5}
    served = model.config.text_config.num_attention_heads // 2
    step = random_step(model, torch.Generator(), group_size=queries // served, **sizes)
    step._attend_blocks(torch.zeros(2, 2, queries // served, served, 16), 0, 0.3)
    assert given == [(queries, {"num_warps": warps, "num_stages": 2})]


def compile_attention(model, seed, **options) -> None:
    """Compile a step's mask and the attention of a layer, and run it."""
    sizes = {"slots": 2, "group_size": 2, "prompt_room": 30, "completion_room": 9}
    made = random_step(model, torch.Generator().manual_seed(seed), **sizes)

    def attend(q):
        parts = made.cache, made.prompt_lengths, made.own_lengths, made.room
        return engine.sampling.decode_step.DecodeStep(*parts)._attend_blocks(q, 0, 0.3)

    q = torch.randn(2, made.cache.heads, 2, made.cache.served, 16)
    torch.compile(attend, dynamic=False, fullgraph=True, **options)(q)


def test_what_the_mask_reads_is_held(model, seed):
    """A GPU's kernel reads a tensor there; Inductor would compute all else inside of it."""
    captured = []

    def note(graph, inputs):
        (attention,) = graph.graph.find_nodes(
            op="call_function", target=torch.ops.higher_order.flex_attention
        )
        captured.extend(one for one in attention.args[8] if isinstance(one, torch.fx.Node))
        return make_boxed_func(graph.forward)

    compile_attention(model, seed, backend=aot_autograd(fw_compiler=note))
    assert [node.target for node in captured] == [torch.ops.hoi_r1.hold.default]


class Lowered(BaseException):
    """Nothing is left but to write the code and to compile it."""


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor lowers nothing for a CPU without it")
def test_attention_is_lowered_where_a_cat_is_fused(model, seed, monkeypatch):
    """As for CUDA: a cat that is not held becomes a part of the kernel, which then fails."""

    def stop(graph):
        raise Lowered

    monkeypatch.setattr(GraphLowering, "compile_to_module", stop)
    with torch._inductor.config.patch(force_pointwise_cat=True, fx_graph_cache=False):
        with pytest.raises(Lowered):
            compile_attention(model, seed)


@pytest.mark.slow
def test_a_step_makes_no_copy_of_the_cache():
    """As a write to a view of it would, of all rows' own keys and values in every layer."""
    model = use_group_attention(tiny_model(0))
    engine.sampling.decode_step.prepare_for_decoding(model)
    options = {"slots": 2, "group_size": 2, "prompt_room": 30, "max_new_tokens": 9, "end_id": 7}
    sampler = engine.sampling.sampler.Sampler(model, **options)
    step = torch.compile(sampler.step, dynamic=False, fullgraph=True)
    with torch.no_grad():
        _, (code,) = run_and_get_code(step, 9)
    made = re.findall(r"= empty_strided\w+\(\(([\d, ]+)\)", code[code.index("def call(") :])
    sizes = [math.prod(map(int, shape.rstrip(", ").split(", "))) for shape in made]
    assert len(sizes) > 20 and max(sizes) < 2 * 2 * 2 * 128 * 16
