"""Group Relative Policy Optimization: Sec. 3.3, Eqs. 2-5, and one batch of it.

Axes: P prompts, G completions per prompt, B = P * G completions, C completion length.

docs/paper.md lists departures from the paper, and readings of it: the ratio per token (Eqs. 3-4),
the standard deviation of Eq. 5, and the estimator of the KL divergence.
"""

import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

import hicodet
from engine.data.examples import Example, Examples
from engine.model.attention import to_device
from engine.model.optimizer import ClippedAdamW, micro_batches
from engine.model.packing import PackedBatch, pack, shared_prefix
from engine.model.policy import gathered, refresh
from engine.ranks import Ranks
from engine.runs.rollout_metrics import group_row, rollout_metrics
from engine.sampling.sampler import Rollout, Sampler
from engine.scoring.predictions import predicted_instances
from rewards import total_reward

LOG_RATIO_LIMIT = 20.0  # e^20 is half a billion; more would overflow or dominate all gradients


# Eqs. 2-5: the objective


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """Standardise rewards within each prompt's group (Eq. 5).

    rewards: (P, G) float. Returns (P, G) float; a group of equal rewards gives zeros.
    Uses the sample std (divide by G - 1), plus eps. Raises ValueError if G < 2.
    """
    if rewards.shape[1] < 2:
        raise ValueError(f"group size {rewards.shape[1]}: Eq. 5 needs at least 2 completions")
    rewards = rewards - rewards[:, :1]  # equal rewards become exact zeros: a mean may round
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + eps)


def policy_ratio(
    logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor, kind: str = "token"
) -> Tensor:
    """Probability ratio s_1 of the new to the old policy (Eq. 3).

    logprobs, old_logprobs, completion_mask: (B, C). Returns (B, C): a ratio per token, or with
    kind="sequence" the ratio of whole outputs, repeated along the row. Padding has ratio 1. The
    log-ratio is clamped to +-20, as the sum over 1,000 tokens would overflow.
    """
    log_ratio = (logprobs - old_logprobs) * completion_mask
    if kind == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio) * completion_mask
    elif kind != "token":
        raise ValueError(f'ratio {kind!r}: choose "token" or "sequence"')
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_ratio(ratio: Tensor, clip_eps: float) -> Tensor:
    """The ratio clamped to [1 - eps, 1 + eps], s_2 (Eq. 4). Any shape."""
    return ratio.clamp(1 - clip_eps, 1 + clip_eps)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_eps: float) -> Tensor:
    """min[s_1 A, s_2 A], the first term of Eq. 2, which contains Eqs. 3-4.

    ratio: (B, C). advantages: (B,). Returns (B, C), to be maximised.
    """
    advantages = advantages[:, None]
    return torch.minimum(ratio * advantages, clipped_ratio(ratio, clip_eps) * advantages)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of D_KL[pi_theta || pi_ref], the second term of Eq. 2 (estimator of [21]).

    Any equal shapes. Never negative, and exactly 0 where the policies agree. The log-ratio is
    clamped to +-20, or one token could dominate the whole gradient.
    """
    log_ratio = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp() - log_ratio - 1


def completion_means(values: Tensor, completion_mask: Tensor) -> Tensor:
    """Mean over the tokens of each completion; 0.0 for an empty one. (B, C), (B, C) -> (B,)."""
    return (values * completion_mask).sum(1) / completion_mask.sum(1).clamp(min=1)


def grpo_objective(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    clip_eps: float = 0.2,
    kl_coef: float = 0.04,
    ratio: str = "token",
) -> dict[str, Tensor]:
    """Each output's term of the GRPO objective: the braces of Eq. 2, to be maximised.

    logprobs, old_logprobs, ref_logprobs, completion_mask: (B, C); without ref_logprobs no KL term.
    advantages: (B,). Returns (B,) tensors: "objective", which carries the gradient, and for the log
    "kl" and "clip_fraction", the share of tokens whose gradient is 0 because of the clip.
    """
    s_1 = policy_ratio(logprobs, old_logprobs, completion_mask, ratio)
    surrogate = clipped_surrogate(s_1, advantages, clip_eps)
    kl = torch.zeros_like(logprobs) if ref_logprobs is None else kl_estimate(logprobs, ref_logprobs)
    clipped = surrogate < s_1 * advantages[:, None]
    return {
        "objective": completion_means(surrogate - kl_coef * kl, completion_mask),
        "kl": completion_means(kl.detach(), completion_mask),
        "clip_fraction": completion_means(clipped.to(logprobs.dtype), completion_mask),
    }


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor,
    num_outputs: float,
    **options,
) -> dict[str, Tensor]:
    """This micro-batch's share of the loss (Eq. 2), which is minus the mean of the objective.

    old_logprobs: (B, C); None if pi_old equals pi_theta, to use logprobs, detached. weights: (B,),
    0 for an output that does not count. num_outputs: number of outputs in the global batch, so that
    the shares of all micro-batches and ranks add up to the mean. options: of `grpo_objective`.
    Returns scalars: "loss", which carries the gradient, and the means "kl" and "clip_fraction".
    """
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    terms = grpo_objective(
        logprobs, old_logprobs, ref_logprobs, advantages, completion_mask, **options
    )
    means = {name: (term * weights).sum() / num_outputs for name, term in terms.items()}
    return {"loss": -means.pop("objective"), **means}


# One batch


def sample_seeds(seed: int, step: int, place: int, group_size: int) -> list[int]:
    """One seed for each completion of the image at this place of the global batch."""
    keys = [[seed, step, place, g] for g in range(group_size)]
    return [int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1) for key in keys]


@dataclass(frozen=True)
class Scored:
    """One completion with its rewards."""

    text: str
    completion: hicodet.Completion
    rewards: dict[str, float]  # "total" and its parts (Eq. 23)


@dataclass(frozen=True)
class MicroBatch:
    """Whole groups in one packed row; B = number of images x G."""

    packed: PackedBatch
    advantages: Tensor  # (B,)
    weights: Tensor  # (B,)
    ref_logprobs: Tensor | None  # (B, C)
    sampled_logprobs: Tensor  # (N,) from the sampler; only logged as logprob_gap


class GRPO:
    """One batch of GRPO at a time: sample, score, advantages, optimize, refresh (Sec. 3.3)."""

    name, schedule = "grpo", "linear"  # schedule of the learning rate, Sec. 4.2

    def __init__(
        self,
        policy,
        optimizer: ClippedAdamW,
        replica,
        reference,
        examples: Examples,
        ranks: Ranks,
        *,
        slots: int,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        updates_per_batch: int,
        tokens_per_microbatch: int,
        objective: dict,
        rewards: dict,
    ):
        """replica: pi_old. reference: pi_ref, or None without a KL term. objective: options of
        `grpo_objective`. rewards: options of `rewards.total_reward`."""
        self.policy, self.optimizer, self.replica = policy, optimizer, replica
        self.reference, self.examples, self.ranks = reference, examples, ranks
        self.group_size, self.seed, self.updates_per_batch = group_size, seed, updates_per_batch
        self.tokens_per_microbatch = tokens_per_microbatch
        self.objective, self.rewards = objective, rewards
        banned = examples.banned(policy.config.text_config.vocab_size).to(ranks.device)
        self.distribution = {"temperature": temperature, "banned": banned}
        self.sampler = Sampler(  # one for all steps, so that a GPU compiles its step once
            replica,
            slots=slots,
            group_size=group_size,
            prompt_room=examples.longest_prompt(),
            max_new_tokens=max_new_tokens,
            end_id=examples.end_id,
            **self.distribution,
        )
        refresh(replica, policy)

    def update(
        self, step: int, batch: list[Example], weights: list[float], lr: float
    ) -> tuple[dict, dict]:
        """Train on one batch. Returns metrics, and the completions of its first image."""
        times = [time.perf_counter()]
        rollouts = self.sample(step, batch)
        times.append(time.perf_counter())
        scored = [self.score(*pair) for pair in zip(batch, rollouts, strict=True)]
        totals = [[one.rewards["total"] for one in group] for group in scored]
        advantages = group_advantages(torch.tensor(totals))
        times.append(time.perf_counter())
        micros = self.micro_batches(batch, weights, rollouts, advantages)
        logged = self.optimize(micros, self.ranks.sum(sum(weights)) * self.group_size, lr)
        refresh(self.replica, self.policy)
        times.append(time.perf_counter())
        seconds = dict(zip(("sample", "reward", "update"), np.diff(times).tolist()))
        rows = []
        for example, rollout, group in zip(batch, rollouts, scored) if weights[0] else ():
            rewards = [one.rewards for one in group]
            instances = [one.completion.instances for one in group]
            rows.append(group_row(example.text_hois, rollout, rewards, instances))
        shown = shown_group(batch[0], scored[0], advantages[0].tolist())
        return logged | rollout_metrics(self.ranks.gather(rows), seconds), shown

    def sample(self, step: int, batch: list[Example]) -> list[Rollout]:
        """G completions of each image from pi_old."""
        places = [self.ranks.rank + i * self.ranks.world for i in range(len(batch))]
        seeds = [sample_seeds(self.seed, step, place, self.group_size) for place in places]
        return self.sampler.collect([example.prompt for example in batch], seeds)

    def score(self, example: Example, rollout: Rollout) -> list[Scored]:
        """The rewards (Eqs. 6-23) of each completion of an image."""
        texts = [self.examples.decode(ids) for ids in rollout.completion_ids]
        parsed = [hicodet.parse_completion(text) for text in texts]
        return [
            Scored(text, one, total_reward(one, example.text_hois, **self.rewards))
            for text, one in zip(texts, parsed)
        ]

    @torch.no_grad()
    def micro_batches(
        self,
        batch: list[Example],
        weights: list[float],
        rollouts: list[Rollout],
        advantages: Tensor,
    ) -> list[MicroBatch]:
        """Cut the batch into micro-batches, with pi_ref's log-probs. advantages: (P, G)."""
        to, micros = partial(to_device, device=self.ranks.device), []
        prompts = [example.prompt for example in batch]
        completions = [rollout.completion_ids for rollout in rollouts]
        lengths = [len(p.prompt_ids) + sum(map(len, c)) for p, c in zip(prompts, completions)]
        shared = shared_prefix(prompts, self.policy.config.image_token_id)
        parts = micro_batches(lengths, weights, self.tokens_per_microbatch, self.ranks, shared)
        for places, kept in parts:
            groups = [prompts[i] for i in places], [completions[i] for i in places]
            packed, ref_logprobs = pack(self.policy, *groups, self.ranks.device), None
            if self.reference:
                ref_logprobs = self.reference.token_logprobs(packed, **self.distribution)
            micro = MicroBatch(
                packed,
                to(advantages[places].flatten()),
                to(torch.tensor(kept)).repeat_interleave(self.group_size),
                ref_logprobs,
                to(torch.cat([row for i in places for row in rollouts[i].logprobs])),
            )
            micros.append(micro)
        return micros

    def optimize(self, micros: list[MicroBatch], num_outputs: float, lr: float) -> dict:
        """`updates_per_batch` optimizer steps on one batch of completions (Eqs. 2-5).

        num_outputs: outputs of all ranks. Returns metrics, each a mean over the steps.
        """
        old_logprobs, logged = [None] * len(micros), []  # before the first step pi_old is pi_theta
        for number in range(self.updates_per_batch):
            found, totals = [], {}
            pairs = zip(micros, old_logprobs, strict=True)
            for micro, old in gathered(self.policy, pairs):
                logprobs = self.policy.token_logprobs(micro.packed, **self.distribution)
                terms = grpo_loss(
                    logprobs, old, micro.ref_logprobs, micro.advantages,
                    micro.packed.completion_mask, micro.weights, num_outputs, **self.objective,
                )  # fmt: skip
                (terms["loss"] * self.ranks.world).backward()  # FSDP takes the mean over ranks
                totals = {n: totals.get(n, 0.0) + term.detach() for n, term in terms.items()}
                found.append(logprobs.detach())
            # once per step, as reading a value waits for the GPU
            means = {n: self.ranks.sum(float(total)) for n, total in totals.items()}
            logged.append(means | {"grad_norm": self.optimizer.step(lr, means["loss"])})
            old_logprobs = old_logprobs if number else found
        # the largest difference between a token's log-prob in sampling and in training
        gaps = [
            (found[micro.packed.completion_mask] - micro.sampled_logprobs).abs().max().item()
            for micro, found in zip(micros, old_logprobs)
        ]
        averages = {name: float(np.mean([row[name] for row in logged])) for name in logged[0]}
        return averages | {"logprob_gap": max(self.ranks.numbers(max(gaps)))}


def shown_group(example: Example, scored: list[Scored], advantages: list[float]) -> dict:
    """An image's completions for rollouts.jsonl; boxes in pixels of the original image."""
    sizes = (example.sample.width, example.sample.height), example.text_size
    completions = [
        {
            "text": one.text,
            "rewards": one.rewards,
            "advantage": advantage,
            "instances": predicted_instances(one.completion, *sizes),
        }
        for one, advantage in zip(scored, advantages, strict=True)
    ]
    return {"file_name": example.sample.file_name, "completions": completions}
