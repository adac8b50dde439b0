"""engine/sampling: the tokens equal those of plain loops, for any slots and neighbours."""

import pytest
import torch

from engine.sampling.draw import sample_tokens
from engine.sampling.sampler import Sampler
from tests.tiny import collect, generate, plain_distributions, sample


def only(model, count):
    """The `banned` that leaves the first `count` ids."""
    return torch.arange(model.config.text_config.vocab_size) >= count


def lists(rollout):
    """The completions as lists of ids."""
    return [ids.tolist() for ids in rollout.completion_ids]


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_greedy_ids_equal_generate(model, reference, prompts, slots):
    """Unequal prompts in one batch. The end token is one that the first prompt's answer has."""
    end_id = int(generate(reference, prompts[0], 12, -1)[5])
    options = {"max_new_tokens": 12, "end_id": end_id, "temperature": 0, "slots": slots}
    rollout = sample(model, prompts, group_size=1, **options)
    expected = [generate(reference, prompt, 12, end_id).tolist() for prompt in prompts]
    assert lists(rollout) == expected
    assert rollout.finished.tolist() == [ids[-1] == end_id for ids in expected]
    assert rollout.finished[0] and len(rollout.completion_ids[0]) <= 6


@pytest.mark.parametrize("temperature", [0, 1.0, 0.6])
def test_what_was_sampled_from_equals_a_fresh_forward(model, reference, prompts, temperature):
    """Log-probs and entropies. The rows of a prompt are different texts, unless greedy."""
    banned, seeds = only(model, 300), list(range(9)) if temperature else None
    options = {"max_new_tokens": 10, "end_id": 7, "temperature": temperature, "slots": 2}
    rollout = sample(model, prompts, group_size=3, banned=banned, seeds=seeds, **options)
    rows = zip(rollout.completion_ids, rollout.logprobs, rollout.entropies)
    for row, (ids, logprobs, entropies) in enumerate(rows):
        arguments = (prompts[row // 3], ids, temperature or 1.0, banned)
        expected = torch.distributions.Categorical(
            logits=plain_distributions(reference, *arguments)
        )
        torch.testing.assert_close(logprobs, expected.log_prob(ids), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(entropies, expected.entropy(), atol=1e-4, rtol=1e-4)
        assert ids.max() < 300
    assert len(set(map(tuple, lists(rollout)[:3]))) == (3 if temperature else 1)


def test_sample_depends_only_on_its_seed(model, prompts):
    options = {"max_new_tokens": 10, "end_id": 7, "group_size": 2}
    seeds = [11, 12, 13, 14, 15, 16]
    together = lists(sample(model, prompts, seeds=seeds, **options))
    assert together == lists(sample(model, prompts, seeds=seeds, slots=1, **options))
    assert together[2:4] == lists(sample(model, prompts[1:2], seeds=[13, 14], **options))


def test_rows_do_not_depend_on_rows_that_end(model, prompts):
    """With ten ids, one of them the end, lengths differ, and slots are dropped and reused."""
    many = [prompts[i % 3] for i in range(7)]
    options = {"group_size": 2, "max_new_tokens": 40, "end_id": 7, "banned": only(model, 10)}
    together = sample(model, many, seeds=list(range(14)), slots=5, **options)
    assert len(set(map(len, together.completion_ids))) > 4
    for i, prompt in enumerate(many):
        alone = sample(model, [prompt], seeds=[2 * i, 2 * i + 1], **options)
        assert lists(alone) == lists(together)[2 * i : 2 * i + 2]
        for mine, other in zip(alone.entropies, together.entropies[2 * i : 2 * i + 2]):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("vocabulary", [3, 5, 512, 513, 3000])
def test_tokens_follow_the_exact_softmax(vocabulary):
    """With evenly spaced uniforms: no top-k, no top-p, no other temperature, no banned id.

    Each uniform lies between the running sums of softmax(logits / T) before and at its token,
    computed in fp64.
    """
    logits = 4 * torch.randn(3, vocabulary).repeat_interleave(200, 0) + 20
    banned = torch.rand(vocabulary) < 0.3
    banned[: vocabulary // 3] = banned[-vocabulary // 4 :] = True
    banned[vocabulary // 2] = False
    uniforms = torch.cat([torch.arange(199) / 199, torch.tensor([1 - 2**-24])]).repeat(3)
    options = {"temperature": 0.7, "banned": banned}
    ids, logprobs, _ = sample_tokens(logits, uniforms=uniforms, **options)
    expected = torch.log_softmax(logits.double().masked_fill(banned, -torch.inf) / 0.7, -1)
    at = expected.exp().cumsum(-1).gather(1, ids[:, None])[:, 0]
    sampled = expected.gather(1, ids[:, None])[:, 0]
    assert (uniforms < at + 1e-6).all() and (uniforms > at - sampled.exp() - 1e-6).all()
    assert not banned[ids].any()
    # logits / 0.7 reach 50, where fp32 has steps of 4e-6
    torch.testing.assert_close(logprobs.double(), sampled, atol=1e-5, rtol=0)


def test_prompt_starts_as_soon_as_a_slot_is_free(model, prompts):
    """It does not wait for the other slot: with one slot free the next prompt is taken."""
    options = {"slots": 2, "group_size": 1, "prompt_room": 40, "max_new_tokens": 60, "end_id": 7}
    sampler, order = Sampler(model, banned=only(model, 10), **options), ""

    def arriving():
        nonlocal order
        for number in range(6):
            order += "a"
            yield prompts[number % 3], [number]

    for _ in sampler.run(arriving()):
        order += "d"
    assert order.startswith("aad") and sorted(order) == sorted("ad" * 6)
    under_way = [order[:i].count("a") - order[:i].count("d") for i in range(len(order))]
    assert max(under_way) <= 2
    assert order != "aadd" * 3  # the order if both slots were filled together


def test_logits_are_penalised_in_fp32(model):
    """20 / 1.05 is more than 19, but equals 19 in bf16."""
    options = {"slots": 1, "group_size": 1, "prompt_room": 4, "max_new_tokens": 3, "end_id": -1}
    sampler = Sampler(model, temperature=0, repetition_penalty=1.05, **options)
    sampler.done.fill_(False)
    logits = torch.zeros(1, model.config.text_config.vocab_size, dtype=torch.bfloat16)
    logits[0, 3], logits[0, 5] = 19, 20
    sampler.written[0, 0, 5] = True
    sampler.sample_next(torch.tensor([0]), logits)
    assert sampler.ids[0, 0, 0] == 5


def test_sampler_can_be_used_again(model, prompts):
    """A trainer does so in each step; here also after an unfinished run."""
    options = {"group_size": 2, "max_new_tokens": 12, "end_id": 7}
    sampler = Sampler(model, slots=2, prompt_room=40, **options)
    broken = sampler.run(zip(prompts, [[1, 2], [3, 4], [5, 6]]))
    next(broken)
    broken.close()
    for step in range(3):
        seeds = list(range(6 * step, 6 * step + 6))
        found = lists(collect(sampler, prompts, seeds))
        assert found == lists(sample(model, prompts, seeds=seeds, **options))
