"""hoi_r1.py, the parts of a training: flags, policies, batches, rates, optimizer steps."""

import math
import os

import numpy as np
import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Qwen2_5_VLForConditionalGeneration

import engine.policy
import grpo
import hoi_r1
from demo.toy import tiny_model
from engine.attention import pack, token_logprobs, use_group_attention
from engine.examples import batch_order
from engine.policy import accumulate
from hicodet import InputError
from tests.runs import config_of, optimizer_of, policy_of, training_examples
from tests.test_killed import SERVER
from tests.test_ranks_agree import free_port
from tests.tiny import make_prompt, text_ids


def test_flags_are_checked_before_anything_is_read(capsys):
    line = ["grpo", "--model", "m", "--data", "d", "--out", "o"]
    config = hoi_r1.parse_config([*line, "--without", "iou", "label", "--no-thinking"])
    assert config.without == ("iou", "label") and not config.thinking and config.group_size == 4
    bad = ["--group-size 1", "--batch-size 0", "--temperature 0", "--max-steps -1", "--slots 0"]
    for flag in [*bad, "--learning-rate nan", "--with-out iou", "--ratio tokens"]:
        with pytest.raises(SystemExit):
            hoi_r1.parse_config([*line, *flag.split()])
        assert flag.split()[0] in capsys.readouterr().err


def test_bf16_policy_is_the_same_function_as_its_replica(folder, ranks, monkeypatch):
    """As on a GPU: the sharded fp32 policy computing in bf16, and pi_old stored in bf16."""
    monkeypatch.setattr(engine.policy, "compute_dtype", lambda device: torch.bfloat16)
    config = config_of("sft", folder, "x")
    policy = policy_of(config, ranks)
    replica = engine.policy.load_model(config.model, ranks.device)
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


def test_gradients_of_all_ranks_are_added_in_fp32(folder, ranks, monkeypatch):
    """One rank has nothing to add, so this is what FSDP is told for each part it shards."""
    told, fully_shard = [], engine.policy.fully_shard

    def noted(part, **options):
        told.append(options["mp_policy"])
        return fully_shard(part, **options)

    monkeypatch.setattr(engine.policy, "fully_shard", noted)
    monkeypatch.setattr(engine.policy, "compute_dtype", lambda device: torch.bfloat16)
    policy_of(config_of("sft", folder, "x"), ranks)
    assert len(told) == 4  # the vision tower, two layers, the rest
    assert {(p.param_dtype, p.reduce_dtype) for p in told} == {(torch.bfloat16, torch.float32)}


def test_parts_of_few_parameters_are_sharded_with_the_rest(folder, ranks, monkeypatch):
    """A layer here has 30,976, and the vision tower 80,480."""
    told, fully_shard = [], engine.policy.fully_shard

    def noted(part, **options):
        told.append(type(part).__name__)
        return fully_shard(part, **options)

    monkeypatch.setattr(engine.policy, "fully_shard", noted)
    tower, whole = "Qwen2_5_VisionTransformerPretrainedModel", "Qwen2_5_VLForConditionalGeneration"
    for least, parts in ((80_480, [tower, whole]), (80_481, [whole])):
        monkeypatch.setattr(engine.policy, "SMALLEST_PART", least)
        policy_of(config_of("sft", folder, "x"), ranks)
        assert told == parts
        told.clear()


def test_without_checkpointing_parameters_are_gathered_once_a_step(folder, ranks, monkeypatch):
    """Three micro-batches; four parts: the vision tower, two layers, the rest. Same gradients."""
    calls, note = [], FSDPParamGroup._to_unsharded
    monkeypatch.setattr(FSDPParamGroup, "_to_unsharded", lambda g: calls.append(g) or note(g))
    found, gathered = [], []
    for checkpointing in (True, False):
        config = config_of("sft", folder, "x", gradient_checkpointing=checkpointing)
        policy, examples = policy_of(config, ranks), training_examples(config)
        calls.clear()

        def terms(i):
            packed = pack(policy, [examples[i].prompt], [[examples[i].target_ids]])
            return {"loss": policy.token_logprobs(packed).sum()}

        accumulate(policy, [0, 1, 2], terms, ranks)
        gathered.append(len(calls))
        found.append([p.grad.full_tensor() for p in policy.parameters()])
    assert gathered == [3 * (4 + 3), 4]  # the root, used last, is not gathered anew for backward
    assert all(torch.equal(mine, other) for mine, other in zip(*found, strict=True))


def test_offloaded_parameters_take_the_same_step(folder, ranks, monkeypatch):
    """As with a GPU, but for its pinned memory: the CPU is both the device and the host."""
    told, fully_shard = [], engine.policy.fully_shard

    def noted(part, **options):
        told.append(type(options["offload_policy"]))
        return fully_shard(part, **options)

    monkeypatch.setattr(engine.policy, "fully_shard", noted)
    offload = engine.policy.CPUOffloadPolicy
    monkeypatch.setattr(engine.policy, "CPUOffloadPolicy", lambda: offload(pin_memory=False))
    config = config_of("sft", folder, "x")
    examples, policies = training_examples(config), []
    batch = [examples[i] for i in range(2)]
    for offloaded in (False, True):
        policies.append(engine.policy.load_policy(config.model, ranks.device, offload=offloaded))
        optimizer = optimizer_of(policies[-1], config)
        for example in batch:  # the second gradient is added to the first, on the host
            packed = pack(policies[-1], [example.prompt], [[example.target_ids]], ranks.device)
            policies[-1].token_logprobs(packed).sum().backward()
        optimizer.step(1e-3, 0.0)
    assert told[:4] == [engine.policy.OffloadPolicy] * 4 and told[4:] == [offload] * 4
    for mine, other in zip(*(policy.parameters() for policy in policies), strict=True):
        assert torch.equal(mine.full_tensor(), other.full_tensor())


def reference_on_a_rank(rank: int, port: int, results) -> None:
    """Put into results: has a sharded pi_ref the log-probs of a whole one, and what share of it?"""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank}
    os.environ.update({name: str(value) for name, value in place.items()})
    ranks, engine.policy.SMALLEST_PART = engine.policy.start_ranks(), 0
    whole, sharded = (use_group_attention(tiny_model(3)) for _ in range(2))
    engine.policy.shard_reference(sharded, ranks.device)
    generator = torch.Generator().manual_seed(0)
    prompts = [make_prompt(whole, *size, generator) for size in ((2, 3, 3, 5), (4, 2, 1, 9))]
    completions = [[text_ids(whole, n, generator) for n in group] for group in ((4, 7, 1), (5,))]
    batch = pack(whole, prompts, completions)
    with torch.no_grad():
        for _ in range(2):  # what was gathered is freed after each
            equal = torch.equal(sharded.token_logprobs(batch), token_logprobs(whole, batch))
    mine = [p.to_local() if isinstance(p, DTensor) else p for p in sharded.parameters()]
    share = sum(p.nbytes for p in mine) / sum(p.nbytes for p in whole.parameters())
    results.put((equal, share))
    torch.distributed.destroy_process_group()


def test_two_ranks_hold_half_of_pi_ref_each():
    """Its log-probs are those of the whole one, to the bit."""
    results, port = SERVER.SimpleQueue(), free_port()
    ranks = [
        SERVER.Process(target=reference_on_a_rank, args=(rank, port, results)) for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(100)
            assert rank.exitcode == 0
    finally:
        for rank in ranks:
            rank.kill()
    for _ in ranks:
        equal, share = results.get()
        assert equal and share == pytest.approx(0.5, abs=0.01)


def test_batch_order_is_pure_and_takes_each_sample_once_an_epoch():
    order = batch_order(10, 4, 7, seed=5)
    assert [len(batch) for batch in order] == [4, 4, 2, 4, 4, 2, 4]
    assert sorted(sum(order[:3], [])) == sorted(sum(order[3:6], [])) == list(range(10))
    assert order[:3] != order[3:6]
    assert order[:5] == batch_order(10, 4, 5, seed=5)
    assert order != batch_order(10, 4, 7, seed=6)


def test_sample_seeds_are_a_pure_function_of_seed_step_and_place():
    keys = [(seed, step, place) for seed in (0, 1) for step in (3, 4) for place in (0, 1, 2)]
    drawn = [grpo.sample_seeds(*key, group_size=2) for key in keys]
    assert drawn == [grpo.sample_seeds(*key, group_size=2) for key in keys]
    assert len(set(sum(drawn, []))) == 2 * len(keys)


def test_rollout_metrics_by_hand():
    def group(totals, ids, finished, entropies, written, true):
        names = {"format": 0.25, "object": 0, "verb": 0, "iou": 0.75, "total": 1}
        rewards = [{name: part * total for name, part in names.items()} for total in totals]
        *written, true = ({"instances": n, "verbs": m} for n, m in (*written, true))
        row = {"rewards": rewards, "ids": ids, "finished": finished, "entropies": entropies}
        return row | {"written": written, "true": true}

    groups = [  # equal rewards of one text; other rewards of other texts, one cut
        group([1.0, 1.0], [(5, 6)] * 2, [True, True], [1.0, 2.0], [(1, 2), (1, 2)], (1, 3)),
        group([0.0, 2.0], [(7,), (8, 9, 9)], [True, False], [0.5, 4.5], [(0, 0), (6, 8)], (4, 4)),
    ]
    logged = grpo.rollout_metrics(groups, {"sample": 2.0, "update": 4.0})
    assert logged["reward_total"] == 1.0 and logged["reward_iou"] == 0.75
    assert logged["reward_total_std"] == pytest.approx(2**0.5 / 2)  # of 0 and sqrt((1 + 1) / 1)
    assert logged["zero_variance_groups"] == 0.5
    assert logged["distinct_completions"] == 0.75  # 1 of 2, 2 of 2
    assert (logged["completion_length"], logged["truncated"]) == (2.0, 0.25)
    assert logged["advantage_iou"] == pytest.approx(0.75) and logged["advantage_verb"] == 0
    assert logged["entropy"] == 1.0  # 8 nats, 8 tokens: not the mean of the four means
    assert (logged["instances"], logged["verbs_per_instance"]) == (2.0, 1.5)  # 8 / 4, 12 / 8
    assert (logged["instances_true"], logged["verbs_per_instance_true"]) == (2.5, 1.4)
    assert logged["sample_tokens_per_second"] == 4.0 and logged["seconds_update"] == 4.0


def test_learning_rates():
    rates = [engine.policy.learning_rate(step, 4, 1.0, 0, "cosine") for step in range(4)]
    # (1 + cos(pi k / 4)) / 2
    assert rates == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    rates = [engine.policy.learning_rate(step, 4, 1.0, 0, "linear") for step in range(4)]
    assert rates == [1.0, 0.75, 0.5, 0.25]
    rates = [engine.policy.learning_rate(step, 4, 1.0, 2, "linear") for step in range(4)]
    assert rates == [0.5, 1.0, 1.0, 0.5]


def test_micro_batches(ranks):
    parts = engine.policy.micro_batches([3, 9, 4, 20, 1], [1.0, 1.0, 0.0, 1.0, 1.0], 10, ranks)
    assert parts == [([3], [1.0]), ([1], [1.0]), ([2, 0, 4], [0.0, 1.0, 1.0])]
    lengths = np.random.default_rng().integers(1, 40, 30).tolist()
    parts = engine.policy.micro_batches(lengths, [1.0] * 30, 50, ranks)
    assert sorted(i for part, _ in parts for i in part) == list(range(30))
    assert all(sum(lengths[i] for i in part) <= 50 for part, _ in parts)


def test_a_rank_without_a_part_weighs_nothing():
    share = engine.policy.Ranks(2, 4, torch.device("cpu")).share
    assert share([7, 8, 9, 10, 11, 12, 13]) == ([9, 13], [1.0, 1.0])
    assert share([7, 8]) == ([7], [0.0])


def test_policy_is_fp32_and_moves_at_the_papers_rate(folder, ranks, tmp_path):
    """bf16 weights would not move: half an ulp at 0.02 is 6e-5, a step of AdamW is 1e-6."""
    stored = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model")
    stored.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    config = config_of("sft", folder, "x", model=str(tmp_path / "bf16"), learning_rate=1e-6)
    policy = policy_of(config, ranks)
    before = [p.full_tensor().clone() for p in policy.parameters()]
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    stepper = optimizer_of(policy, config)
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    stepper.step(1e-6, 1.0)
    for old, new in zip(before, policy.parameters(), strict=True):
        assert ((old - new.full_tensor()) > 0).float().mean() > 0.9


def test_a_step_is_adamw_on_the_clipped_gradient(folder, ranks):
    """Against a plain model, its gradient scaled by hand, and PyTorch's AdamW."""
    options = {"adam_beta2": 0.9, "weight_decay": 0.1, "max_grad_norm": 0.5, "learning_rate": 7.0}
    config = config_of("sft", folder, "x", **options)
    policy = policy_of(config, ranks)
    plain = Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model, dtype=torch.float32)
    stepper = optimizer_of(policy, config)
    reference = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.9), weight_decay=0.1)
    for lr in (1e-3, 4e-4):  # the rate of the step, not that of the config
        gradients = [torch.randn_like(p) for p in plain.parameters()]
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        for mine, other, gradient in zip(policy.parameters(), plain.parameters(), gradients):
            mine.grad = distribute_tensor(gradient, mine.device_mesh, mine.placements)
            other.grad = gradient * 0.5 / norm
        reference.param_groups[0]["lr"] = lr
        reference.step()
        assert stepper.step(lr, 1.0) == pytest.approx(norm, rel=1e-5)
    for mine, other in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), other, atol=1e-6, rtol=1e-5)
        assert mine.grad is None


def test_a_gradient_that_is_not_finite_changes_nothing(folder, ranks):
    policy = policy_of(config_of("sft", folder, "x"), ranks)
    stepper = optimizer_of(policy, config_of("sft", folder, "x"))
    before = [p.full_tensor().clone() for p in policy.parameters()]

    def step(value, loss=1.0):
        for parameter in policy.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        next(policy.parameters()).grad.mul_(value)
        return stepper.step(1e-3, loss)

    assert math.isnan(step(math.nan)) and stepper.bad_in_a_row == 1
    assert all(parameter.grad is None for parameter in policy.parameters())
    step(1.0, loss=math.inf)
    moments = stepper.adamw.state.values()
    assert stepper.bad_in_a_row == 2
    assert not any(value.any() for state in moments for value in state.values())
    for old, new in zip(before, policy.parameters(), strict=True):
        assert torch.equal(old, new.full_tensor())
    assert math.isfinite(step(1.0)) and stepper.bad_in_a_row == 0
    assert not torch.equal(before[0], next(policy.parameters()).full_tensor())
    with pytest.raises(InputError, match="10 steps in a row"):
        for _ in range(10):
            step(math.inf)
