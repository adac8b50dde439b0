"""On a GPU: compiled steps, CUDA graphs and flash attention equal the CPU's plain path.

    python -m pytest -m cuda
"""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import engine.model.policy
from engine.model.packing import pack, token_logprobs
from engine.model.policy import SMALLEST_PART, shard_policy
from tests.runs import config_of, metrics, run, weights
from tests.tiny import make_prompt, sample

pytestmark = pytest.mark.cuda
BFLOAT16 = 0.05  # tolerance of a log-prob of this small model; 0.025 was measured


@pytest.fixture(scope="module", autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    torch.backends.cudnn.allow_tf32 = False


def test_samples_equal_those_of_the_cpu(model, prompts):
    """Groups of unequal length in three slots, so prompts arrive while others are decoded."""
    banned = torch.ones(model.config.text_config.vocab_size, dtype=torch.bool)
    banned[:30] = False
    generator = torch.Generator().manual_seed(0)
    many = [make_prompt(model, 2 + i, 5, 5 + i, 9, generator) for i in range(5)]
    options = {"group_size": 2, "max_new_tokens": 200, "end_id": 7, "slots": 3}
    options["seeds"] = list(range(10))
    expected = sample(model, many, banned=banned, **options)
    assert len({len(ids) for ids in expected.completion_ids}) > 4
    on_gpu = copy.deepcopy(model).cuda()
    found = sample(on_gpu, many, banned=banned.cuda(), **options)
    for mine, other in zip(found.completion_ids, expected.completion_ids, strict=True):
        assert mine.tolist() == other.tolist()
    for mine, other in zip(found.logprobs, expected.logprobs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=0)


@pytest.mark.parametrize("group_size, length", [(3, 300), (64, 20)])
def test_samples_in_bf16_have_the_log_probs_of_the_update(model, prompts, group_size, length):
    """Flex attention and fused products against the packed row.

    From 128 queries per slot, here G = 64 with two heads, PyTorch takes another kernel.
    """
    on_gpu = copy.deepcopy(model).to("cuda", torch.bfloat16)
    options = {"group_size": group_size, "max_new_tokens": length, "end_id": -1}
    rollout = sample(on_gpu, prompts, seeds=list(range(3 * group_size)), slots=2, **options)
    starts = range(0, 3 * group_size, group_size)
    groups = [rollout.completion_ids[start : start + group_size] for start in starts]
    packed = pack(on_gpu, prompts, groups)
    with torch.no_grad():
        trained = token_logprobs(on_gpu, packed)[packed.completion_mask].cpu()
    torch.testing.assert_close(trained, torch.cat(rollout.logprobs), atol=BFLOAT16, rtol=0)


@pytest.mark.parametrize(
    "checkpointing, smallest_part", [(True, 0), (False, 0), (False, SMALLEST_PART)]
)
def test_compiled_policy_has_the_gradient_of_the_cpu(
    model, prompts, completions, ranks, checkpointing, smallest_part, monkeypatch
):
    """Both towers and the head are compiled. After two rows nothing is compiled again."""
    monkeypatch.setattr(engine.model.policy, "SMALLEST_PART", smallest_part)
    policy = shard_policy(copy.deepcopy(model), ranks.device, gradient_checkpointing=checkpointing)
    plain, graphs = copy.deepcopy(model), []
    for places in ((0,), (0, 1, 2), (1, 2), (2,), (0, 2)):
        part = [prompts[i] for i in places], [completions[i] for i in places]
        mine = policy.token_logprobs(pack(policy, *part))
        other = token_logprobs(plain, pack(plain, *part))
        torch.testing.assert_close(mine.cpu(), other, atol=BFLOAT16, rtol=0)
        mine.sum().backward(), other.sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1:] == [graphs[1]] * 4
    largest = max(p.grad.abs().max() for p in plain.parameters())
    for mine, other in zip(policy.parameters(), plain.parameters(), strict=True):
        assert (mine.grad.full_tensor().cpu() - other.grad).abs().max() < BFLOAT16 * largest


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_offloaded_step_equals_the_step(stage, folder, tmp_path):
    """The loss to the bit. The gradient is not, as its order of summation is not fixed."""
    for offload in (False, True):
        out = tmp_path / str(offload)
        run(config_of(stage, folder, out, offload=offload, max_steps=1, learning_rate=1e-4))
    (plain,), (offloaded,) = metrics(tmp_path / "False"), metrics(tmp_path / "True")
    assert offloaded["loss"] == plain["loss"]
    assert offloaded["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
    plain, offloaded = weights(tmp_path / "False"), weights(tmp_path / "True")
    for name, weight in plain.items():
        # a hundredth of a step, as gradients near 0 may change sign
        assert (offloaded[name] - weight).abs().mean() < 1e-6
