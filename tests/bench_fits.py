"""What fits on a GPU: options of a step of GRPO with the 3B, and slots of a prediction.

    python -m tests.bench fits [--lora-rank 16]

Estimated from the models' shapes and the longest prompt of the test split. A step has G = 4
completions of 1,024 tokens and 16 images. `step --model-size 3b-24gb` and the like run a step on a
GPU with the options that fit this size, and take no more memory.
"""

from dataclasses import dataclass
from itertools import product

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from engine.model.lora import Adapter, add_adapters, trained
from engine.model.packing import HEAD_CHUNK
from engine.model.quantized import pack_layers
from engine.sampling.sampler import PREFILL_PROMPTS
from engine.sampling.slots import FOR_SLOTS, MOST_SLOTS, slot_bytes
from tests.bench_models import SIZES, model_config

GIGABYTES = (24, 48, 80, 141)
GPUS = (1, 2, 8)
PROMPT, IMAGE_TOKENS = 2499, 529  # tokens of the longest prompt
BATCH, GROUP, NEW = 16, 4, 1024
LONGEST_ANSWER = 2048  # of a prediction
HEADROOM = 0.05  # share of a GPU's memory left for what is not counted
BF16 = torch.bfloat16
# the models of Table 1: width, layers, heads, key-value heads, width of the MLP
MODELS = {
    "3B": (2048, 36, 16, 2, 11008),
    "7B": (3584, 28, 28, 4, 18944),
    "32B-AWQ": (5120, 64, 40, 8, 27648),
    "72B-AWQ": (8192, 80, 64, 8, 29696),  # as Qwen pads the MLP of its AWQ folders
}


@dataclass(frozen=True)
class Options:
    """Options of `hoi_r1.py grpo` that change memory."""

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


# the fastest first; those without pi_ref last, as their objective differs
CHOICES = [Options(*one) for one in
           product((0.04, 0.0), (False, True), (False, True), (16384, 8192))]


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of what FSDP gathers together; `root`: embedding and head, tied.

    adapters: of all LoRA adapters, if only these are trained.
    """

    layer: int
    layers: int
    vision: int
    root: int
    adapters: int = 0

    @property
    def total(self) -> int:
        """All but the adapters."""
        return self.layers * self.layer + self.vision + self.root


def empty_model(config: Qwen2_5_VLConfig) -> Qwen2_5_VLForConditionalGeneration:
    """A model without memory."""
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config).to(BF16)


def parameters(config: Qwen2_5_VLConfig, lora_rank: int = 0) -> Parameters:
    """The numbers of a configuration."""
    model = empty_model(config)

    def count(part):
        return sum(parameter.numel() for parameter in part.parameters())

    layers = model.model.language_model.layers
    layer, vision, every = count(layers[0]), count(model.model.visual), count(model)
    adapters = 0
    if lora_rank:
        add_adapters(model, Adapter(lora_rank, lora_rank, ""), BF16, seed=0)
        adapters = sum(parameter.numel() for parameter in trained(model))
    return Parameters(layer, len(layers), vision, every - len(layers) * layer - vision, adapters)


def block_bytes(config, compiled: bool) -> int:
    """Bytes that a block keeps for backward, per token or patch. config: of text or vision.

    Counted in tensors of the MLP's and of the residual's width, in bf16. The counts were fitted to
    the 94.0 and 73.6 GiB of an update of 4 groups (docs/speed.md), eager and with compiled layers.
    """
    mlp, residual = (3, 7) if compiled else (4, 11)
    return (mlp * config.intermediate_size + residual * config.hidden_size) * BF16.itemsize


def kept_bytes(config: Qwen2_5_VLConfig, tokens: int, patches: int, checkpointing: bool) -> int:
    """Bytes of activations that a micro-batch keeps for backward.

    With checkpointing: the input of each block, and all activations of one block at a time.
    """
    text, vision = config.text_config, config.vision_config
    a_token, a_patch = block_bytes(text, not checkpointing), block_bytes(vision, False)
    if checkpointing:
        a_token += text.num_hidden_layers * text.hidden_size * BF16.itemsize
        a_patch += vision.depth * vision.hidden_size * BF16.itemsize
    else:
        a_token, a_patch = text.num_hidden_layers * a_token, vision.depth * a_patch
    return tokens * a_token + patches * a_patch


def step_bytes(
    config: Qwen2_5_VLConfig, count: Parameters, options: Options, gpus: int
) -> dict[str, int]:
    """Bytes of the parts of a step on each GPU; their sum is the peak.

    With adapters all three policies share a base, which has no gradient; nor has the vision tower.
    """
    text, slots, frozen = config.text_config, -(-BATCH // gpus), count.adapters > 0
    tokens = max(options.tokens_per_microbatch, PROMPT + GROUP * NEW)
    images = 0 if frozen else min(max(options.tokens_per_microbatch // PROMPT, 1), slots)
    checkpointing = options.gradient_checkpointing
    kept, vision_kept = (
        kept_bytes(config, n, 4 * IMAGE_TOKENS * images, checkpointing) for n in (tokens, 0)
    )
    logits = 4 * 4 * HEAD_CHUNK * text.vocab_size  # fp32: as they are, scaled, log-probs, gradient
    # a layer: two in bf16, the gradient of one, which is also there in fp32
    backward_begins = kept + logits + (0 if frozen else 4 * count.root + 10 * count.layer)
    # parameters and gradient in bf16, and the gradient in fp32, of all but the layers
    backward_ends = 0 if frozen else vision_kept + 8 * (count.root + count.vision)
    widths = 3 * (text.hidden_size + text.intermediate_size)  # of a prompt's token in a prefill
    prefill = min(slots, PREFILL_PROMPTS) * PROMPT * widths * BF16.itemsize
    base, weights = (count.total, count.adapters) if frozen else (0, count.total)
    whole = BF16.itemsize * weights
    return {
        "frozen base": BF16.itemsize * base,
        "weights, gradient, AdamW": 0 if options.offload else 16 * weights // gpus,
        "gathered parameters": 0 if checkpointing or options.offload else whole,
        "pi_old": whole,
        "pi_ref": 0 if frozen or options.offload or not options.kl_coef else whole // gpus,
        "keys and values": slots * slot_bytes(text, BF16, GROUP, PROMPT, NEW),
        "a micro-batch": max(backward_begins, backward_ends, prefill),
    }


def choose(needs: dict[Options, dict[str, int]], gigabytes: float) -> Options | None:
    """The first options that fit into the memory of a GPU, or None."""
    limit = gigabytes * 10**9 * (1 - HEADROOM)
    return next((one for one, parts in needs.items() if sum(parts.values()) <= limit), None)


def needs_of_3b(gpus: int, lora_rank: int = 0) -> dict[Options, dict[str, int]]:
    """`step_bytes` of each of CHOICES."""
    config = model_config(SIZES["3b"])
    count = parameters(config, lora_rank)
    return {one: step_bytes(config, count, one, gpus) for one in CHOICES}


def row(needs: dict[Options, dict[str, int]], gigabytes: int, gpus: int) -> str:
    """The options that fit, and a line with the memory that they need."""
    options = choose(needs, gigabytes)
    if options is None:
        return f"{gpus} x {gigabytes} GB: none fit"
    parts = needs[options]
    named = ", ".join(f"{name} {n / 1e9:.1f}" for name, n in parts.items() if n)
    total = sum(parts.values()) / 1e9
    return f"{gpus} x {gigabytes} GB: {options.flags()}\n    {total:.1f} GB a GPU: {named}"


def prediction(name: str) -> tuple[int, int]:
    """Bytes of the weights of one of MODELS, and of a slot's keys and values."""
    width, layers, heads, kv_heads, mlp = MODELS[name]
    text = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": mlp,
            "vocab_size": 151936 if name == "3B" else 152064}
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "out_hidden_size": width,
              "intermediate_size": 3456 if name.endswith("AWQ") else 3420}
    tied = name == "3B"
    model = empty_model(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied))
    if name.endswith("AWQ"):
        pack_layers(model, 128)
    tensors = [*model.parameters(), *model.buffers()]
    slot = slot_bytes(model.config.text_config, BF16, 1, PROMPT, LONGEST_ANSWER)
    return sum(tensor.nbytes for tensor in tensors), slot


def prediction_row(name: str) -> str:
    """Weights, a slot, and the number of slots of a prediction on each GPU."""
    weights, slot = prediction(name)
    fitting = (int(max(gb * 10**9 - weights, 0) * FOR_SLOTS) // slot for gb in GIGABYTES)
    slots = ", ".join(f"{min(n, MOST_SLOTS)} on {gb} GB" for n, gb in zip(fitting, GIGABYTES))
    return f"{name}: weights {weights / 1e9:.1f} GB, a slot {slot / 1e9:.2f} GB; slots: {slots}"


def bench_fits(lora_rank: int = 0) -> None:
    """Print the estimates."""
    for gpus in GPUS:
        needs = needs_of_3b(gpus, lora_rank)
        for gigabytes in GIGABYTES:
            print(row(needs, gigabytes, gpus), flush=True)
    for name in MODELS:
        print(prediction_row(name), flush=True)
