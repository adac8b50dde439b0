"""engine/model/policy.py: dtypes, sharding and memory options of pi_theta, pi_old and pi_ref."""

import pytest
import torch
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor
from transformers import Qwen2_5_VLForConditionalGeneration

import engine.model.policy
from demo.toy import tiny_model
from engine.model.attention import use_group_attention
from engine.model.packing import pack, token_logprobs
from engine.model.policy import gathered, load_model, load_policy, shard_policy, shard_reference
from engine.ranks import start_ranks
from tests.runs import config_of, on_two_ranks, optimizer_of, policy_of, training_examples
from tests.tiny import make_prompt, text_ids


def in_bf16(device: torch.device) -> torch.dtype:
    """Replaces `compute_dtype`: bf16 as on a GPU."""
    return torch.bfloat16


def test_policy_in_bf16_computes_what_its_replica_does(folder, ranks, monkeypatch):
    """As on a GPU: fp32 parameters of pi_theta, computation in bf16, pi_old stored in bf16."""
    monkeypatch.setattr(engine.model.policy, "compute_dtype", in_bf16)
    config = config_of("sft", folder, "x")
    policy = policy_of(config, ranks)
    replica = load_model(config.model, ranks.device)
    examples = training_examples(config)
    batch = [examples[i] for i in range(3)]
    packed = pack(policy, [e.prompt for e in batch], [[e.target_ids] * 2 for e in batch])
    mine = policy.token_logprobs(packed)
    with torch.no_grad():
        other = token_logprobs(replica, packed)
    assert replica.dtype == torch.bfloat16 and mine.dtype == torch.float32
    assert torch.equal(mine.detach(), other)
    mine.sum().backward()
    assert {p.grad.dtype for p in policy.parameters()} == {torch.float32}


def test_policy_is_fp32_and_moves_at_the_papers_rate(folder, ranks, tmp_path):
    """bf16 weights would not move: half an ulp at 0.02 is 6e-5, and a step of AdamW is 1e-6."""
    stored = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model")
    stored.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    config = config_of("sft", folder, "x", model=str(tmp_path / "bf16"))
    policy = policy_of(config, ranks)
    before = [p.full_tensor().clone() for p in policy.parameters()]
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    optimizer = optimizer_of(policy, config)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-6, 1.0)
    for old, new in zip(before, policy.parameters(), strict=True):
        assert ((old - new.full_tensor()) > 0).float().mean() > 0.9


def test_options_for_memory_change_no_gradient(folder, ranks, monkeypatch):
    """Three micro-batches with checkpointing, without it, and offloaded add up to the same.

    Parameters are sharded again after each micro-batch; without checkpointing only after the last.
    A CPU has no pinned memory.
    """
    offload = fsdp.CPUOffloadPolicy
    monkeypatch.setattr(fsdp, "CPUOffloadPolicy", lambda: offload(pin_memory=False))
    config = config_of("sft", folder, "x")
    examples, found = training_examples(config), []
    for options in ({}, {"gradient_checkpointing": False}, {"offload": True}):
        policy, sharded = load_policy(config.model, ranks.device, **options), []
        for i in gathered(policy, range(3)):
            packed = pack(policy, [examples[i].prompt], [[examples[i].target_ids]], ranks.device)
            policy.token_logprobs(packed).sum().backward()
            sharded.append(all(isinstance(p, DTensor) for p in policy.parameters()))
        assert sharded == [options != {"gradient_checkpointing": False}] * 2 + [True]
        found.append([p.grad.full_tensor() for p in policy.parameters()])
    for plain, *others in zip(*found, strict=True):
        assert all(torch.equal(plain, other) for other in others)


def random_row(model: torch.nn.Module, seed: int):
    """Two prompts with three completions and one."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [make_prompt(model, *size, generator) for size in ((2, 3, 3, 5), (4, 2, 1, 9))]
    completions = [[text_ids(model, n, generator) for n in group] for group in ((4, 7, 1), (5,))]
    return pack(model, prompts, completions)


def share_of(model: torch.nn.Module) -> float:
    """The share of a model's bytes that this rank holds."""
    held = sum(p.to_local().nbytes for p in model.parameters())
    return held / sum(p.nbytes for p in model.parameters())


def sharded_models() -> dict:
    """Compare a sharded pi_ref with a whole one, and look at the gradients of pi_theta in bf16."""
    engine.model.policy.SMALLEST_PART = 0  # shard in parts, as large models are
    ranks = start_ranks()
    whole, reference, policy = (use_group_attention(tiny_model(3)) for _ in range(3))
    shard_reference(reference, ranks.device)
    batch = random_row(whole, 0)
    with torch.no_grad():  # twice: gathered parameters are freed after each
        rows = [reference.token_logprobs(batch) for _ in range(2)]
        expected = token_logprobs(whole, batch)
    engine.model.policy.compute_dtype = in_bf16
    shard_policy(policy, ranks.device)
    policy.token_logprobs(random_row(policy, ranks.rank)).sum().backward()
    gradients = torch.cat([p.grad.to_local().flatten() for p in policy.parameters()])
    finer = gradients != gradients.to(torch.bfloat16)
    torch.distributed.destroy_process_group()
    return {"equal": all(torch.equal(row, expected) for row in rows),
            "finer": float(finer.float().mean()),
            "shares": [share_of(reference), share_of(policy)]}  # fmt: skip


def test_two_ranks_share_the_weights_and_add_gradients_in_fp32():
    """Each rank holds half. pi_ref's log-probs equal the whole model's to the bit.

    Gradients are computed in bf16. If they were added in bf16 too, the sums would be bf16 numbers.
    """
    for found in on_two_ranks(sharded_models):
        assert found["equal"] and found["finer"] > 0.1
        assert found["shares"] == pytest.approx([0.5, 0.5], abs=0.01)
