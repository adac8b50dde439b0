"""Optimizer step, learning-rate schedule, and the split of a batch into micro-batches."""

import math

import torch

from engine.model.lora import trained
from engine.ranks import Ranks
from hicodet import InputError

MAX_BAD_STEPS = 10  # steps in a row with a non-finite loss or gradient before a run stops


class ClippedAdamW:
    """AdamW with clipping; skips a step whose loss or gradient is not finite."""

    def __init__(self, policy, *, beta2: float, weight_decay: float, max_grad_norm: float):
        self.max_grad_norm, self.bad_in_a_row = max_grad_norm, 0
        self.parameters = trained(policy)
        self.adamw = torch.optim.AdamW(
            self.parameters,
            betas=(0.9, beta2),
            weight_decay=weight_decay,
            fused=True,  # no temporary copy of the parameters
        )
        for parameter in self.parameters:
            # at once: a save would otherwise create it by an extra step
            self.adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def step(self, lr: float, loss: float) -> float:
        """Apply the accumulated gradient at this rate. Returns its norm before clipping.

        loss: of the global batch, so that all ranks decide alike. Raises InputError after
        MAX_BAD_STEPS skipped steps in a row.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        norm = float(norm.full_tensor())
        if math.isfinite(norm) and math.isfinite(loss):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self.bad_in_a_row = 0
        else:
            self.bad_in_a_row += 1
        self.adamw.zero_grad()
        if self.bad_in_a_row == MAX_BAD_STEPS:
            raise InputError(
                f"{MAX_BAD_STEPS} steps in a row had a loss or gradient that is not finite: "
                "--resume with a lower --learning-rate; see the last lines of metrics.jsonl"
            )
        return norm


def learning_rate(step: int, steps: int, highest: float, warmup: int, schedule: str) -> float:
    """Warm-up, then "cosine" or "linear" down to 0 (Sec. 4.2). step counts from 0."""
    if step < warmup:
        return highest * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return highest * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)


def micro_batches(
    lengths: list[int], weights: list[float], budget: int, ranks: Ranks, shared: int = 0
) -> list[tuple[list[int], list[float]]]:
    """Split items into micro-batches of at most `budget` tokens: indices and weights of each.

    The longest items come first: if memory runs out, it does so at once. An item over the budget
    gets its own micro-batch. All ranks get the same number; extra ones hold item 0 with weight 0.
    shared: tokens that all items begin with; a micro-batch holds them once.
    """
    micros: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not micros or lengths[index] - shared > room:
            micros.append([])
            room = budget
        micros[-1].append(index)
        room -= lengths[index] - (shared if len(micros[-1]) > 1 else 0)
    extra = int(max(ranks.numbers(len(micros)))) - len(micros)
    weighted = [(indices, [weights[i] for i in indices]) for indices in micros]
    return weighted + [([0], [0.0])] * extra
