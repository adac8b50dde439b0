"""Supervised fine-tuning on a teacher's reasoning and the ground truth: Sec. 3.2, Eq. 1."""

import time

import torch
from torch import Tensor

from engine.attention import pack
from engine.examples import Example
from engine.policy import Stepper, micro_batches


def sft_loss(logprobs: Tensor, weights: Tensor, num_tokens: float) -> Tensor:
    """Negative log-likelihood of trace and answer (Eq. 1), per supervised token of the batch.

    logprobs: (B, C), zeros behind each target's end. weights: (B,), 0 for a row not to count.
    num_tokens: supervised tokens of the global batch, so that a sum over parts and ranks is the
    loss. No token of the prompt or the image is among the log-probs.
    """
    return -(logprobs.sum(1) * weights).sum() / num_tokens


def sft_update(
    policy, stepper: Stepper, batch: list[Example], weights: list[float], *, lr, budget, ranks
) -> dict:
    """One optimizer step on this rank's share of a batch. Returns what is logged.

    budget: tokens of a micro-batch.
    """
    started = time.perf_counter()
    num_tokens = ranks.sum(sum(w * len(e.target_ids) for e, w in zip(batch, weights)))
    lengths = [len(e.prompt.prompt_ids) + len(e.target_ids) for e in batch]
    loss_sum = 0.0
    for part, kept in micro_batches(lengths, weights, budget, ranks):
        targets = [[batch[i].target_ids] for i in part]
        packed = pack(policy, [batch[i].prompt for i in part], targets)
        kept = torch.tensor(kept, device=ranks.device)
        loss = sft_loss(policy.token_logprobs(packed), kept, num_tokens)
        (loss * ranks.world).backward()  # FSDP takes the mean over ranks, the loss is a sum
        loss_sum += loss.detach()
    loss = ranks.sum(float(loss_sum))  # read here: in the loop Python would wait for the GPU
    norm = stepper.step(lr, loss)
    seconds = time.perf_counter() - started
    tokens = ranks.sum(sum(w * n for w, n in zip(weights, lengths)))
    rate = {"seconds_update": seconds, "tokens_per_second": tokens / seconds}
    return {"loss": loss, "grad_norm": norm, "supervised_tokens": num_tokens} | rate
