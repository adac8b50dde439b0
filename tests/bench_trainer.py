"""The GRPO trainer of `bench step`, ours in both comparisons."""

from contextlib import contextmanager
from unittest.mock import patch

import torch

import engine.model.policy
import grpo
from engine.configs import GRPOConfig
from engine.model.lora import Adapter
from engine.model.optimizer import ClippedAdamW
from engine.model.policy import compute_dtype, load_policies
from engine.ranks import start_ranks
from tests import bench_cpu
from tests.bench_models import ORDINARY, Size, random_model


class BenchExamples:
    """The part of Examples that GRPO uses."""

    def __init__(self, size: Size):
        self.size, self.end_id = size, -1  # no completion ends early

    def banned(self, vocabulary: int) -> torch.Tensor:
        return torch.arange(vocabulary) >= ORDINARY

    def longest_prompt(self) -> int:
        return self.size.prompt_length

    def decode(self, ids: torch.Tensor) -> str:
        return bench_cpu.ANSWERS[int(ids[0]) % len(bench_cpu.ANSWERS)]


@contextmanager
def random_weights(size: Size, device: torch.device):
    """Models of this size with random weights, instead of those of a folder."""

    def load_model(path, host, dtype=None):
        return random_model(size, device, dtype or compute_dtype(device))

    with patch.object(engine.model.policy, "load_model", load_model):
        yield


def make_trainer(model: str, examples, size: Size) -> grpo.GRPO:
    """GRPO as `hoi_r1.py grpo` makes it, with the size's options of a step."""
    ranks = start_ranks()
    options = {"batch_size": size.prompts, "group_size": size.group_size,
               "max_new_tokens": size.sampled, **size.step}
    config = GRPOConfig(model=model, data="", out="", **options)
    adapter = Adapter(config.lora_rank, 2 * config.lora_rank, "") if config.lora_rank else None
    policy, *others = load_policies(
        model, ranks.device, adapter, replica=True, reference=config.kl_coef > 0,
        gradient_checkpointing=config.gradient_checkpointing, offload=config.offload)
    optimizer = ClippedAdamW(policy, beta2=0.999, weight_decay=0.0, max_grad_norm=1.0)
    same = ("group_size", "max_new_tokens", "temperature", "seed", "updates_per_batch",
            "tokens_per_microbatch")
    return grpo.GRPO(
        policy, optimizer, *others, examples, ranks,
        objective={"kl_coef": config.kl_coef}, rewards={}, slots=min(config.slots, size.prompts),
        **{name: getattr(config, name) for name in same})
