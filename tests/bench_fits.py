"""With which options a step of GRPO with Qwen2.5-VL-3B fits on GPUs of a size.

    python -m tests.bench fits

Reckoned from the model's configuration and the longest prompt of the test split, G = 4 completions
of 1,024 tokens, 16 images a batch. Where there is a GPU, one step is run with the options of each
size that it holds, under a limit of that size.
"""

import subprocess
import sys
from dataclasses import dataclass
from itertools import product

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from engine.attention import HEAD_CHUNK
from engine.memory import HEADROOM, activation_bytes, cache_bytes
from engine.sampler import PREFILL_PROMPTS
from tests.bench_models import SIZES, model_config

GIGABYTES = (24, 48, 80, 141)
GPUS = (1, 2, 8)
PROMPT, IMAGE_TOKENS = 2499, 529  # of the longest prompt
BATCH, GROUP, NEW = 16, 4, 1024
BF16 = torch.bfloat16.itemsize


@dataclass(frozen=True)
class Options:
    """What `hoi_r1.py grpo` is told."""

    kl_coef: float
    offload: bool
    gradient_checkpointing: bool
    tokens_per_microbatch: int

    def flags(self) -> str:
        """Those that are not the defaults."""
        flags = {"--offload": self.offload, "--kl-coef 0": not self.kl_coef,
                 "--no-gradient-checkpointing": not self.gradient_checkpointing}
        tokens = f"--tokens-per-microbatch {self.tokens_per_microbatch}"
        flags[tokens] = self.tokens_per_microbatch != 16384
        return " ".join(flag for flag, given in flags.items() if given) or "the defaults"


# the fastest first; without pi_ref last, since that is another objective
CHOICES = [Options(*one) for one in
           product((0.04, 0.0), (False, True), (False, True), (16384, 8192))]


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of what FSDP gathers together; `root`: embedding and head, tied."""

    layer: int
    layers: int
    vision: int
    root: int

    @property
    def total(self) -> int:
        return self.layers * self.layer + self.vision + self.root


def parameters(config: Qwen2_5_VLConfig) -> Parameters:
    """Counted in a model without memory."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)

    def count(part):
        return sum(parameter.numel() for parameter in part.parameters())

    layers = model.model.language_model.layers
    layer, vision = count(layers[0]), count(model.model.visual)
    return Parameters(layer, len(layers), vision, count(model) - len(layers) * layer - vision)


def block_bytes(config, compiled: bool) -> int:
    """Bytes that a block keeps of a token, or patch, for backward. config: of text or vision.

    Widths in bf16 of the MLP and of the residual. Their numbers were fitted to 94.0 and 73.6 GiB of
    an update of 4 groups (tests/BENCH.md): eager, and with the language model's layers compiled.
    """
    mlp, residual = (3, 7) if compiled else (4, 11)
    return (mlp * config.intermediate_size + residual * config.hidden_size) * BF16


def kept_bytes(config: Qwen2_5_VLConfig, tokens: int, patches: int, checkpointing: bool) -> int:
    """Bytes of activations that a micro-batch keeps for backward.

    With checkpointing they are each block's input, and of one block at a time all.
    """
    text, vision = config.text_config, config.vision_config
    a_token, a_patch = block_bytes(text, not checkpointing), block_bytes(vision, False)
    if checkpointing:
        a_token += text.num_hidden_layers * text.hidden_size * BF16
        a_patch += vision.depth * vision.hidden_size * BF16
    else:
        a_token, a_patch = text.num_hidden_layers * a_token, vision.depth * a_patch
    return tokens * a_token + patches * a_patch


def step_bytes(
    config: Qwen2_5_VLConfig, count: Parameters, options: Options, gpus: int
) -> dict[str, int]:
    """Bytes of the parts of a step on each GPU; their sum is the peak."""
    text, slots = config.text_config, -(-BATCH // gpus)
    tokens = max(options.tokens_per_microbatch, PROMPT + GROUP * NEW)
    patches = 4 * IMAGE_TOKENS * min(max(options.tokens_per_microbatch // PROMPT, 1), slots)
    checkpointing = options.gradient_checkpointing
    kept = kept_bytes(config, tokens, patches, checkpointing)
    logits = 4 * 4 * HEAD_CHUNK * text.vocab_size  # fp32: as they are, scaled, log-probs, gradient
    # a layer: two in bf16, the gradient of one, which is also there in fp32
    backward_begins = kept + logits + 4 * count.root + 10 * count.layer
    # parameters and gradient in bf16, and the gradient in fp32, of all but the layers
    vision_kept = kept_bytes(config, 0, patches, checkpointing)
    backward_ends = vision_kept + 8 * (count.root + count.vision)
    prefill = min(slots, PREFILL_PROMPTS) * PROMPT * activation_bytes(text, torch.bfloat16)
    states = 0 if options.offload else 16 * count.total // gpus
    reference = 0 if options.offload or not options.kl_coef else BF16 * count.total // gpus
    gathered = 0 if checkpointing or options.offload else BF16 * count.total
    return {
        "weights, gradient, AdamW": states,
        "gathered parameters": gathered,
        "pi_old": BF16 * count.total,
        "pi_ref": reference,
        "keys and values": slots * (PROMPT + GROUP * NEW) * cache_bytes(text, torch.bfloat16),
        "a micro-batch": max(backward_begins, backward_ends, prefill),
    }


def choose(needs: dict[Options, dict[str, int]], gigabytes: float) -> Options | None:
    """The first options whose parts fit into the memory of a GPU, or None."""
    limit = gigabytes * 10**9 * (1 - HEADROOM)
    return next((one for one, parts in needs.items() if sum(parts.values()) <= limit), None)


def needs_of_3b(gpus: int) -> dict[Options, dict[str, int]]:
    """`step_bytes` of each of CHOICES."""
    config = model_config(SIZES["3b"])
    count = parameters(config)
    return {one: step_bytes(config, count, one, gpus) for one in CHOICES}


def row(needs: dict[Options, dict[str, int]], gigabytes: int, gpus: int) -> str:
    """The options that fit, and a line of what they need."""
    options = choose(needs, gigabytes)
    if options is None:
        return f"{gpus} x {gigabytes} GB: none fit"
    parts = needs[options]
    named = ", ".join(f"{name} {n / 1e9:.1f}" for name, n in parts.items() if n)
    total = sum(parts.values()) / 1e9
    return f"{gpus} x {gigabytes} GB: {options.flags()}\n    {total:.1f} GB a GPU: {named}"


def measure_steps() -> None:
    """One step in a process of its own with the options of each size that this GPU holds."""
    total = torch.cuda.get_device_properties(0).total_memory
    for gigabytes in GIGABYTES:
        if gigabytes * 10**9 <= total:
            print(f"measured with {gigabytes} GB", flush=True)
            size = ["--model-size", f"3b-{gigabytes}gb", "--repeats", "1", "--no-baseline"]
            subprocess.run([sys.executable, "-m", "tests.bench", "step", *size])


def bench_fits() -> None:
    """Print what is reckoned, and measure it where there is a GPU."""
    for gpus in GPUS:
        needs = needs_of_3b(gpus)
        for gigabytes in GIGABYTES:
            print(row(needs, gigabytes, gpus), flush=True)
    if torch.cuda.is_available():
        measure_steps()
    else:
        print("not measured: torch finds no GPU here")
