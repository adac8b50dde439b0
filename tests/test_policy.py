"""engine/model/policy.py: what pi_theta, pi_old and pi_ref compute and hold, on one rank or two."""

import multiprocessing
import os
import socket

import pytest
import torch
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor
from transformers import Qwen2_5_VLForConditionalGeneration

import engine.model.policy
from demo.toy import tiny_model
from engine.model.attention import use_group_attention
from engine.model.packing import pack, token_logprobs
from engine.model.policy import (
    gathered,
    load_model,
    load_policy,
    shard_policy,
    shard_reference,
    sharded_parts,
)
from engine.ranks import start_ranks
from tests.runs import config_of, optimizer_of, policy_of, training_examples
from tests.tiny import make_prompt, text_ids

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])


def in_bf16(device: torch.device) -> torch.dtype:
    """In place of `compute_dtype`: as on a GPU."""
    return torch.bfloat16


def test_bf16_policy_is_the_same_function_as_its_replica(folder, ranks, monkeypatch):
    """As on a GPU: the sharded fp32 policy computes in bf16, and pi_old is stored in bf16."""
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
    """bf16 weights would not move: half an ulp at 0.02 is 6e-5, a step of AdamW is 1e-6."""
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


def test_small_parts_are_sharded_with_the_rest(monkeypatch):
    """The tiny model's vision tower has 80,480 parameters, a layer 30,976."""
    model = tiny_model()
    tower, layers = model.model.visual, model.model.language_model.layers
    for least, parts in ((0, [tower, *layers]), (80_480, [tower]), (80_481, [])):
        monkeypatch.setattr(engine.model.policy, "SMALLEST_PART", least)
        assert sharded_parts(model) == parts


def test_options_for_memory_change_no_gradient(folder, ranks, monkeypatch):
    """Three micro-batches with checkpointing, without it, and offloaded: the same sum.

    Parameters are sharded again after each micro-batch. Without checkpointing they stay gathered
    until the last one. There is no pinned memory without a GPU: the CPU is device and host.
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


# Two ranks


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


def join(rank: int, port: int):
    """Start this process as one of two ranks, with parts sharded as large models' are."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank}
    os.environ.update({name: str(value) for name, value in place.items()})
    engine.model.policy.SMALLEST_PART = 0
    return start_ranks()


def reference_on_a_rank(rank: int, port: int) -> dict:
    """Whether a sharded pi_ref has the log-probs of a whole one, twice, and the share it holds."""
    ranks = join(rank, port)
    whole, sharded = (use_group_attention(tiny_model(3)) for _ in range(2))
    shard_reference(sharded, ranks.device)
    batch = random_row(whole, 0)
    with torch.no_grad():  # twice: what was gathered is freed after each
        rows = [sharded.token_logprobs(batch) for _ in range(2)]
        expected = token_logprobs(whole, batch)
    return {"equal": [torch.equal(row, expected) for row in rows], "share": share_of(sharded)}


def gradient_on_a_rank(rank: int, port: int) -> dict:
    """The share of gradients that no bf16 number holds, where each rank has a row of its own."""
    ranks = join(rank, port)
    engine.model.policy.compute_dtype = in_bf16
    policy = shard_policy(use_group_attention(tiny_model(3)), ranks.device)
    policy.token_logprobs(random_row(policy, rank)).sum().backward()
    gradients = torch.cat([p.grad.to_local().flatten() for p in policy.parameters()])
    finer = gradients != gradients.to(torch.bfloat16)
    return {"finer": float(finer.float().mean()), "share": share_of(policy)}


def put_result(act, rank: int, port: int, results) -> None:
    """act of one rank, in a process of its own."""
    results.put(act(rank, port))
    torch.distributed.destroy_process_group()


def on_two_ranks(act) -> list[dict]:
    """act(rank, port) in two processes; what they return, in the order in which they end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = SERVER.SimpleQueue()
    ranks = [SERVER.Process(target=put_result, args=(act, r, port, results)) for r in (0, 1)]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(100)
            assert rank.exitcode == 0
    finally:
        for rank in ranks:
            rank.kill()
    return [results.get() for _ in ranks]


def test_two_ranks_hold_half_of_pi_ref_each():
    """Its log-probs are those of the whole one, to the bit."""
    for found in on_two_ranks(reference_on_a_rank):
        assert found["equal"] == [True, True] and found["share"] == pytest.approx(0.5, abs=0.01)


def test_gradients_of_two_ranks_add_up_in_fp32():
    """Each is computed in bf16. Sums in bf16 would be bf16 numbers again."""
    for found in on_two_ranks(gradient_on_a_rank):
        assert found["finer"] > 0.1 and found["share"] == pytest.approx(0.5, abs=0.01)
