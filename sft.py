"""Supervised fine-tuning on a teacher's reasoning and the ground truth: Sec. 3.2, Eq. 1.

Axes: B completions of a micro-batch, C their length.
"""

import time

import torch
from torch import Tensor

from engine.data.examples import END_OF_TURN, Example
from engine.model.optimizer import ClippedAdamW, micro_batches
from engine.model.packing import pack, shared_prefix
from engine.model.policy import gathered
from engine.ranks import Ranks
from hicodet import HOI, format_completion


def supervised_text(hois: tuple[HOI, ...], think: str | None) -> str:
    """The supervised text (Sec. 3.2), from `<think>` to the end-of-turn token.

    hois: in the text's frame. think: None for an image without a trace. No token of the prompt or
    the image is supervised.
    """
    return format_completion(hois, think) + END_OF_TURN


def sft_loss(logprobs: Tensor, weights: Tensor, num_tokens: float) -> Tensor:
    """Negative log-likelihood of trace and answer (Eq. 1), per supervised token of the batch.

    logprobs: (B, C), zeros after each target's end. weights: (B,), 0 for a row that does not count.
    num_tokens: supervised tokens of the global batch, so that the losses of all micro-batches and
    ranks add up to the loss of the batch.
    """
    return -(logprobs.sum(1) * weights).sum() / num_tokens


class SFT:
    """One batch of SFT at a time."""

    name, schedule = "sft", "cosine"  # schedule of the learning rate, Sec. 4.2

    def __init__(self, policy, optimizer: ClippedAdamW, ranks: Ranks, tokens_per_microbatch: int):
        self.policy, self.optimizer, self.ranks = policy, optimizer, ranks
        self.tokens_per_microbatch = tokens_per_microbatch

    def update(
        self, step: int, batch: list[Example], weights: list[float], lr: float
    ) -> tuple[dict, None]:
        """One optimizer step on this rank's share of a batch. Returns what is logged."""
        started, ranks = time.perf_counter(), self.ranks
        num_tokens = ranks.sum(sum(w * len(e.target_ids) for e, w in zip(batch, weights)))
        lengths = [len(e.prompt.prompt_ids) + len(e.target_ids) for e in batch]
        shared = shared_prefix([e.prompt for e in batch], self.policy.config.image_token_id)
        micros = micro_batches(lengths, weights, self.tokens_per_microbatch, ranks, shared)
        total = 0.0
        for places, kept in gathered(self.policy, micros):
            prompts = [batch[i].prompt for i in places]
            targets = [[batch[i].target_ids] for i in places]
            packed = pack(self.policy, prompts, targets, ranks.device)
            logprobs = self.policy.token_logprobs(packed)
            loss = sft_loss(logprobs, torch.tensor(kept, device=ranks.device), num_tokens)
            (loss * ranks.world).backward()  # FSDP takes the mean over ranks
            total += loss.detach()
        loss = ranks.sum(float(total))
        norm = self.optimizer.step(lr, loss)
        seconds = time.perf_counter() - started
        tokens = ranks.sum(sum(w * n for w, n in zip(weights, lengths)))
        rate = {"seconds_update": seconds, "tokens_per_second": tokens / seconds}
        return {"loss": loss, "grad_norm": norm, "supervised_tokens": num_tokens, **rate}, None
