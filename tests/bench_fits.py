"""What fits on GPUs of a size: options of a step of GRPO with the 3B, and slots of a prediction.

    python -m tests.bench fits

Estimated from the models' shapes and the longest prompt of the test split. A step has G = 4
completions of 1,024 tokens and 16 images a batch. `step --model-size 3b-24gb` and its like run one
on a GPU with the options of that size, under a limit of that size.
"""

from dataclasses import dataclass
from itertools import product

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from engine.model.packing import HEAD_CHUNK
from engine.model.quantized import pack_layers
from engine.sampling.sampler import PREFILL_PROMPTS
from engine.sampling.slots import FOR_SLOTS, MOST_SLOTS, slot_bytes
from tests.bench_models import SIZES, model_config

GIGABYTES = (24, 48, 80, 141)
GPUS = (1, 2, 8)
PROMPT, IMAGE_TOKENS = 2499, 529  # of the longest prompt
BATCH, GROUP, NEW = 16, 4, 1024
LONGEST_ANSWER = 2048  # of a prediction
HEADROOM = 0.05  # of a GPU's memory, for what is not counted
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


def empty_model(config: Qwen2_5_VLConfig) -> Qwen2_5_VLForConditionalGeneration:
    """A model without memory."""
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config).to(BF16)


def parameters(config: Qwen2_5_VLConfig) -> Parameters:
    """The numbers of a configuration."""
    model = empty_model(config)

    def count(part):
        return sum(parameter.numel() for parameter in part.parameters())

    layers = model.model.language_model.layers
    layer, vision = count(layers[0]), count(model.model.visual)
    return Parameters(layer, len(layers), vision, count(model) - len(layers) * layer - vision)


def block_bytes(config, compiled: bool) -> int:
    """Bytes that a block keeps of a token, or patch, for backward. config: of text or vision.

    Widths in bf16 of the MLP and of the residual. Their numbers were fitted to 94.0 and 73.6 GiB of
    an update of 4 groups (docs/speed.md): eager, and with the language model's layers compiled.
    """
    mlp, residual = (3, 7) if compiled else (4, 11)
    return (mlp * config.intermediate_size + residual * config.hidden_size) * BF16.itemsize


def kept_bytes(config: Qwen2_5_VLConfig, tokens: int, patches: int, checkpointing: bool) -> int:
    """Bytes of activations that a micro-batch keeps for backward.

    With checkpointing they are each block's input, and of one block at a time all.
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
    widths = 3 * (text.hidden_size + text.intermediate_size)  # of a prompt's token in a prefill
    prefill = min(slots, PREFILL_PROMPTS) * PROMPT * widths * BF16.itemsize
    whole = BF16.itemsize * count.total
    return {
        "weights, gradient, AdamW": 0 if options.offload else 16 * count.total // gpus,
        "gathered parameters": 0 if checkpointing or options.offload else whole,
        "pi_old": whole,
        "pi_ref": 0 if options.offload or not options.kl_coef else whole // gpus,
        "keys and values": slots * slot_bytes(text, BF16, GROUP, PROMPT, NEW),
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


def prediction(name: str) -> tuple[int, int]:
    """Bytes of the weights of one of MODELS, and of the keys and values of a slot."""
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
    """Weights, a slot, and how many slots a prediction takes on each GPU."""
    weights, slot = prediction(name)
    fitting = (int(max(gb * 10**9 - weights, 0) * FOR_SLOTS) // slot for gb in GIGABYTES)
    slots = ", ".join(f"{min(n, MOST_SLOTS)} on {gb} GB" for n, gb in zip(fitting, GIGABYTES))
    return f"{name}: weights {weights / 1e9:.1f} GB, a slot {slot / 1e9:.2f} GB; slots: {slots}"


def bench_fits() -> None:
    """Print the estimates."""
    for gpus in GPUS:
        needs = needs_of_3b(gpus)
        for gigabytes in GIGABYTES:
            print(row(needs, gigabytes, gpus), flush=True)
    for name in MODELS:
        print(prediction_row(name), flush=True)
