"""Attention of a decoding step on a GPU, flex attention over filled blocks, tested on a CPU."""

import pytest
import torch
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
