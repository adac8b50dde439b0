"""Group Relative Policy Optimization: Sec. 3.3, Eqs. 2-5, and one batch of it.

Axes: P prompts, G completions per prompt, B = P * G completions, C completion length.

Departures from the paper, or readings of it:

1. Eqs. 2-4 use a ratio per token, averaged over the completion and then over the group, as GRPO
   [21] does; `ratio="sequence"` is the ratio of whole outputs, as printed.
2. Eq. 5 divides by the sample standard deviation plus 1e-4.
3. The KL divergence is the estimator of [21]: ref/theta - log(ref/theta) - 1, per token.
4. At the first update on a batch pi_old's log-probs are pi_theta's own, detached; what the sampler
   reported is logged against them and never used in the loss.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import hicodet
import rewards
from engine.attention import PackedBatch, pack, token_logprobs
from engine.examples import Example, Examples
from engine.policy import micro_batches, refresh
from engine.sampler import Rollout, Sampler

LOG_RATIO_LIMIT = 20.0  # e^20 is half a billion; more would overflow or take over all gradients


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
    log-ratio is held within +-20: that of 1,000 tokens would overflow.
    """
    log_ratio = (logprobs - old_logprobs) * completion_mask
    if kind == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio) * completion_mask
    elif kind != "token":
        raise ValueError(f'ratio {kind!r}: choose "token" or "sequence"')
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_ratio(ratio: Tensor, clip_eps: float) -> Tensor:
    """The ratio held within [1 - eps, 1 + eps], s_2 (Eq. 4). Any shape."""
    return ratio.clamp(1 - clip_eps, 1 + clip_eps)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip_eps: float) -> Tensor:
    """min[s_1 A, s_2 A], the first term of Eq. 2, with Eqs. 3-4 inside.

    ratio: (B, C). advantages: (B,). Returns (B, C), to be maximised.
    """
    advantages = advantages[:, None]
    return torch.minimum(ratio * advantages, clipped_ratio(ratio, clip_eps) * advantages)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token estimate of D_KL[pi_theta || pi_ref], the second term of Eq. 2 (estimator of [21]).

    Any equal shapes. Never negative, and 0 exactly where the policies agree. The log-ratio is held
    within +-20, where exp would take over the whole gradient.
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
    """What each output adds to the GRPO objective (Eq. 2), before the mean over outputs.

    logprobs, old_logprobs, ref_logprobs, completion_mask: (B, C); without ref_logprobs no KL term.
    advantages: (B,). Returns (B,) tensors: "objective" (to be maximised, carries the gradient), and
    for the log "kl" and "clip_fraction", the share of tokens where the clip took the gradient.
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


# One batch


def sample_seeds(seed: int, step: int, places: list[int], group_size: int) -> list[int]:
    """One seed for each completion of the prompts at these places of the global batch."""
    keys = [[seed, step, place, g] for place in places for g in range(group_size)]
    return [int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1) for key in keys]


@dataclass(frozen=True)
class Part:
    """A micro-batch of whole groups, B = prompts of the part x G."""

    packed: PackedBatch
    advantages: Tensor  # (B,)
    weights: Tensor  # (B,)
    ref_logprobs: Tensor | None  # (B, C)
    sampled_logprobs: Tensor  # (N,) what the sampler reported


class GRPOTrainer:
    """One batch of GRPO at a time: sample, reward, update, refresh (Sec. 3.3)."""

    def __init__(
        self, policy, stepper, replica, reference, examples: Examples, config, ranks
    ):
        self.policy, self.stepper, self.replica = policy, stepper, replica
        self.reference = reference  # pi_ref, or None where there is no KL term
        self.examples, self.config, self.ranks = examples, config, ranks
        banned = examples.banned(policy.config.text_config.vocab_size).to(ranks.device)
        self.distribution = {"temperature": config.temperature, "banned": banned}
        self.sampler = Sampler(  # one for all steps: a GPU compiles its step once
            replica,
            slots=min(config.slots, math.ceil(config.batch_size / ranks.world)),
            group_size=config.group_size,
            prompt_room=examples.longest_prompt(),
            max_new_tokens=config.max_new_tokens,
            end_id=examples.end_id,
            **self.distribution,
        )
        refresh(replica, policy)

    def update(
        self, step: int, batch: list[Example], weights: list[float], lr: float
    ) -> tuple[dict, dict]:
        """One batch. Returns what is logged, and the completions of its first image to be read."""
        times = [time.perf_counter()]
        rollout = self.sample(step, batch)
        times.append(time.perf_counter())
        scored = [self.score(example.hois, ids) for example, ids in self.rows(batch, rollout)]
        totals = torch.tensor([row["total"] for row in scored]).view(-1, self.config.group_size)
        advantages = group_advantages(totals)
        times.append(time.perf_counter())
        logged = self.optimize(self.parts(batch, weights, rollout, advantages), sum(weights), lr)
        refresh(self.replica, self.policy)
        times.append(time.perf_counter())
        rows = [
            {"rewards": scored[i], "ids": tuple(ids.tolist()), "finished": bool(done)}
            for i, (ids, done) in enumerate(zip(rollout.completion_ids, rollout.finished))
        ]
        rows = self.ranks.gather(rows if weights[0] else [])
        seconds = dict(zip(("sample", "reward", "update"), np.diff(times).tolist()))
        size = self.config.group_size
        first = zip(rollout.completion_ids[:size], scored)
        texts = [{"text": self.examples.decode(ids), **reward} for ids, reward in first]
        shown = {"file_name": batch[0].sample.file_name, "completions": texts}
        return logged | rollout_metrics(rows, size, seconds), shown

    def rows(self, batch: list[Example], rollout: Rollout):
        """(example, ids) of each completion."""
        groups = [example for example in batch for _ in range(self.config.group_size)]
        return zip(groups, rollout.completion_ids, strict=True)

    def sample(self, step: int, batch: list[Example]) -> Rollout:
        """G completions of each prompt from pi_old."""
        places = [self.ranks.rank + i * self.ranks.world for i in range(len(batch))]
        seeds = sample_seeds(self.config.seed, step, places, self.config.group_size)
        return self.sampler.collect([example.prompt for example in batch], seeds)

    def score(self, hois: tuple[hicodet.HOI, ...], ids: Tensor) -> dict[str, float]:
        """The rewards of one completion (Eqs. 6-23)."""
        completion = hicodet.parse_completion(self.examples.decode(ids))
        return rewards.total_reward(completion, hois, **reward_options(self.config))

    def parts(self, batch, weights, rollout, advantages) -> list[Part]:
        """The batch in micro-batches, with pi_ref's log-probs."""
        size, device = self.config.group_size, self.ranks.device
        groups = [rollout.completion_ids[i * size : (i + 1) * size] for i in range(len(batch))]
        sampled = [rollout.logprobs[i * size : (i + 1) * size] for i in range(len(batch))]
        lengths = [len(e.prompt.prompt_ids) + sum(map(len, g)) for e, g in zip(batch, groups)]
        budget, parts = self.config.tokens_per_microbatch, []
        for part, kept in micro_batches(lengths, weights, budget, self.ranks):
            prompts = [batch[i].prompt for i in part]
            packed = pack(self.policy, prompts, [groups[i] for i in part])
            with torch.no_grad():
                reference = self.reference and token_logprobs(
                    self.reference, packed, **self.distribution
                )
            parts.append(
                Part(
                    packed,
                    advantages[part].flatten().to(device),
                    torch.tensor(kept, device=device).repeat_interleave(size),
                    reference,
                    torch.cat([row for i in part for row in sampled[i]]).to(device),
                )
            )
        return parts

    def optimize(self, parts: list[Part], prompts: float, lr: float) -> dict:
        """`updates_per_batch` optimizer steps on one batch of completions. Returns their means."""
        count = self.ranks.sum(prompts) * self.config.group_size
        old_logprobs, logged = None, []  # before the first step pi_old is pi_theta
        for _ in range(self.config.updates_per_batch):
            logprobs, values = self.optimizer_step(parts, old_logprobs, count, lr)
            old_logprobs = old_logprobs or logprobs
            logged.append(values)
        gaps = [
            (logprobs[part.packed.completion_mask] - part.sampled_logprobs).abs().max().item()
            for part, logprobs in zip(parts, old_logprobs)
        ]
        means = {name: float(np.mean([values[name] for values in logged])) for name in logged[0]}
        return means | {"logprob_gap": max(self.ranks.gather(gaps))}

    def optimizer_step(self, parts, old_logprobs, count: float, lr: float) -> tuple[list, dict]:
        """One step on the objective (Eqs. 2-5), a mean over the `count` outputs of all ranks.

        old_logprobs: (B, C) of each part, or None where they are pi_theta's own. Returns
        pi_theta's log-probs of each part, detached, and what is logged.
        """
        config, ranks = self.config, self.ranks
        options = {name: getattr(config, name) for name in ("clip_eps", "kl_coef", "ratio")}
        found: list[Tensor] = []
        sums = {"objective": 0.0, "kl": 0.0, "clip_fraction": 0.0}
        for k, part in enumerate(parts):
            logprobs = self.policy.token_logprobs(part.packed, **self.distribution)
            found.append(logprobs.detach())
            old, mask = (old_logprobs or found)[k], part.packed.completion_mask
            terms = grpo_objective(
                logprobs, old, part.ref_logprobs, part.advantages, mask, **options
            )
            terms = {name: (term * part.weights).sum() / count for name, term in terms.items()}
            (-terms["objective"] * ranks.world).backward()  # FSDP takes the mean over ranks
            sums = {name: sums[name] + term.detach() for name, term in terms.items()}
        # read here, not in the loop, where Python would wait for the GPU after each part
        sums = {name: ranks.sum(float(value)) for name, value in sums.items()}
        loss = -sums.pop("objective")
        return found, {"loss": loss, **sums, "grad_norm": self.stepper.step(lr, loss)}


def reward_options(config) -> dict:
    """The reading and the ablation of the rewards."""
    return {"duplicate_rule": config.duplicate_rule, "without": config.without}


def rollout_metrics(rows: list[dict], group_size: int, seconds: dict[str, float]) -> dict:
    """Means over the completions of all ranks, G rows a group: "rewards", "ids", "finished"."""
    groups = [rows[i : i + group_size] for i in range(0, len(rows), group_size)]
    logged = {f"seconds_{name}": value for name, value in seconds.items()}
    for name in rows[0]["rewards"]:
        values = np.array([[row["rewards"][name] for row in group] for group in groups])
        within = values.std(1, ddof=1)  # between images it would hide that groups are all alike
        logged[f"reward_{name}"], logged[f"reward_{name}_std"] = values.mean(), within.mean()
        if name == "total":
            logged["zero_variance_groups"] = np.mean(within < 1e-3)
    # a sampler that is all but greedy shows here first
    distinct = [len({row["ids"] for row in group}) for group in groups]
    logged["distinct_completions"] = np.mean(distinct) / group_size
    lengths = [len(row["ids"]) for row in rows]
    logged["completion_length"] = np.mean(lengths)
    logged["truncated"] = np.mean([not row["finished"] for row in rows])
    for name in ("sample", "update"):
        logged[f"{name}_tokens_per_second"] = sum(lengths) / seconds[name]
    return {name: float(value) for name, value in logged.items()}
