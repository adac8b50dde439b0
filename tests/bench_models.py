"""Models, prompts and baselines of `tests/bench.py`, all with random weights.

Axes are those of grpo.py: P prompts, G completions per prompt, S prompt and C completion length.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import grpo
from engine.model.attention import use_group_attention
from engine.model.packing import Prompt

IMAGE_ID, START_ID, END_ID = 151655, 151652, 151645  # of the real tokenizer
ORDINARY = 3000  # smaller ids are ordinary tokens in every model here


@dataclass(frozen=True)
class Size:
    """A model and the shape of its work."""

    text: dict
    vision: dict
    prompts: int
    group_size: int
    text_tokens: int
    grid: tuple[int, int]  # image tokens, rows x columns
    sampled: int  # tokens per completion in sampling
    trained: int  # tokens per completion in the update
    step: dict  # options of `hoi_r1.py grpo` in a whole step
    memory: int = 0  # most GB of a GPU's memory; 0: all

    @property
    def prompt_length(self) -> int:
        return self.text_tokens + self.grid[0] * self.grid[1]


SIZES = {
    # a toy's width and depth, the 3B's heads and proportions; most of the work is in the prompts
    "tiny": Size(
        text={"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2,
              "num_key_value_heads": 1, "intermediate_size": 1376, "vocab_size": 4096,
              "rope_parameters": {"rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
        vision={"hidden_size": 160, "depth": 4, "num_heads": 2, "intermediate_size": 428,
                "fullatt_block_indexes": [3]},
        prompts=8, group_size=8, text_tokens=936, grid=(8, 8), sampled=100, trained=150, step={}),
    # config.json of Qwen2.5-VL-3B-Instruct; the prompt of Fig. 4 and an image of the mean size
    "3b": Size(
        text={"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
              "num_key_value_heads": 2, "intermediate_size": 11008, "vocab_size": 151936,
              "rope_parameters": {"rope_theta": 1e6, "mrope_section": [16, 24, 24]},
              "max_position_embeddings": 128000, "rms_norm_eps": 1e-6},
        vision={"hidden_size": 1280, "depth": 32, "num_heads": 16, "intermediate_size": 3420,
                "fullatt_block_indexes": [7, 15, 23, 31]},
        prompts=16, group_size=4, text_tokens=1970, grid=(16, 23), sampled=400, trained=400,
        step={"tokens_per_microbatch": 12288, "gradient_checkpointing": False}),
}


SIZES["tiny-short"] = replace(SIZES["tiny"], text_tokens=35, grid=(4, 4))  # a prompt of 51
# the real lengths of prompt and answer, in a toy's width
SIZES["tiny-long"] = replace(
    SIZES["tiny"], text_tokens=1956, grid=(16, 23), group_size=4, sampled=24, trained=243)
# a whole step on a GPU with this many GB; `python -m tests.bench fits` gives the options
for gigabytes, step in {
    24: {"offload": True},
    48: {"offload": True},
    80: {"offload": True, "gradient_checkpointing": False, "tokens_per_microbatch": 8192},
    141: {"gradient_checkpointing": False, "tokens_per_microbatch": 8192},
}.items():
    SIZES[f"3b-{gigabytes}gb"] = replace(
        SIZES["3b"], sampled=1024, trained=1024, step=step, memory=gigabytes)


def model_config(size: Size) -> Qwen2_5_VLConfig:
    """The configuration of a Qwen2.5-VL of this size."""
    rope = {"rope_type": "default", **size.text["rope_parameters"]}
    large = size.text["vocab_size"] > IMAGE_ID
    image, start, end = (IMAGE_ID, START_ID, END_ID) if large else (4000, 4001, 4002)
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return Qwen2_5_VLConfig(
        text_config={**size.text, "rope_parameters": rope, **ids},
        vision_config={**size.vision, "patch_size": 14, "window_size": 112,
                       "out_hidden_size": size.text["hidden_size"]},
        tie_word_embeddings=True, image_token_id=image, video_token_id=image + 3,
        vision_start_token_id=start, vision_end_token_id=start + 4)


def random_model(size: Size, device: torch.device, dtype: torch.dtype):
    """A Qwen2.5-VL of this size in eval mode, initialised on the device."""
    config = model_config(size)
    torch.manual_seed(0)
    with device:
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype)
    return use_group_attention(model.eval())


def library_attention(model) -> None:
    """Give the model the library's own SDPA and convolution back."""
    model.set_attn_implementation("sdpa")
    vars(model.model.visual.patch_embed).pop("forward", None)


def random_prompts(model, size: Size, count: int) -> list[Prompt]:
    """Prompts with one random text, each with an image of its own."""
    rows, columns = size.grid
    image = torch.full((rows * columns,), model.config.image_token_id)
    start = torch.tensor([model.config.vision_start_token_id])
    text = torch.randint(ORDINARY, (size.text_tokens - 1,))
    ids = torch.cat([text[:14], start, image, text[14:]])
    grid = torch.tensor([[1, 2 * rows, 2 * columns]])
    pixels = torch.randn(count, 4 * rows * columns, 3 * 2 * 14 * 14)
    return [Prompt(ids, patches, grid) for patches in pixels]


def random_completions(prompts: int, group_size: int, length: int) -> list[list[Tensor]]:
    """Random ordinary ids."""
    return [list(torch.randint(ORDINARY, (group_size, length))) for _ in range(prompts)]


# The baselines: what TRL and VLM-R1 do


def library_inputs(model, prompts: list[Prompt], copies: int) -> dict[str, Tensor]:
    """`copies` rows of each prompt, with its image in every row. Prompts have equal lengths."""
    ids = torch.stack([prompt.prompt_ids for prompt in prompts for _ in range(copies)])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([p.pixel_values for p in prompts for _ in range(copies)]),
        "image_grid_thw": torch.cat([p.image_grid_thw for p in prompts for _ in range(copies)]),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
    }
    return {name: value.to(model.device) for name, value in inputs.items()}


def generate(model, prompts: list[Prompt], group_size: int, new: int, **options) -> Tensor:
    """transformers' generate(), sampling from the whole distribution. Returns ids (B, C)."""
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    options = {"eos_token_id": -1, "min_new_tokens": new} | options
    inputs = library_inputs(model, prompts, group_size)
    output = model.generate(**inputs, **sampling, max_new_tokens=new, pad_token_id=0, **options)
    return output[:, inputs["input_ids"].shape[1] :]


def separate_logprobs(model, prompt: Prompt, completions: Tensor) -> Tensor:
    """Log-probs (G, C) of one prompt's completions as G whole rows, the vision tower G times."""
    inputs = library_inputs(model, [prompt], len(completions))
    completions = completions.to(model.device)
    for name, added in (
        ("input_ids", completions),
        ("attention_mask", torch.ones_like(completions)),
        ("mm_token_type_ids", torch.zeros_like(completions, dtype=torch.int32)),
    ):
        inputs[name] = torch.cat([inputs[name], added], dim=1)
    kept = completions.shape[1] + 1
    logits = model(**inputs, logits_to_keep=kept, use_cache=False).logits[:, :-1].float()
    return torch.log_softmax(logits, dim=-1).gather(2, completions[..., None])[..., 0]


def separate_step(policy, replica, reference, prompts: list[Prompt], size: Size) -> None:
    """Sampling, pi_ref and the update's gradient by generate() and G rows per prompt."""
    models = [model for model in (policy, replica, reference) if model]
    special = list(range(ORDINARY, replica.config.text_config.vocab_size))
    for model in models:
        library_attention(model)
    options = {"suppress_tokens": special}  # an image token would be read as an image
    ids = generate(replica, prompts, size.group_size, size.sampled, **options)
    for prompt, group in zip(prompts, ids.split(size.group_size)):
        with torch.no_grad():
            ref = separate_logprobs(reference, prompt, group) if reference else None
        logprobs = separate_logprobs(policy, prompt, group)
        advantages = torch.randn(len(group), device=logprobs.device)
        mask = torch.ones_like(logprobs)
        terms = grpo.grpo_objective(logprobs, logprobs.detach(), ref, advantages, mask)
        (-terms["objective"].sum() / len(ids)).backward()
    for model in models:
        use_group_attention(model)


# Floors: the least time in which the work can be done, from bytes and operations


# measured: operations per second of bf16 matrix products, bytes per second of device copies
PEAKS = {"H200": (790e12, 4.3e12)}


def peaks(device: torch.device) -> tuple[float, float] | None:
    """Operations and bytes per second that were measured on this device, or None."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rates for part, rates in PEAKS.items() if part in name), None)


def forward_operations(model, size: Size, completion: int) -> float:
    """Operations of one forward over all groups, each prompt read once."""
    head, parts = model.lm_head.weight.numel(), model.model
    language, vision = (
        sum(p.numel() for p in part.parameters()) for part in (parts.language_model, parts.visual)
    )
    config, own = model.config.text_config, size.group_size * completion
    seen = size.prompt_length**2 / 2 + own * (size.prompt_length + completion / 2)
    attention = 4 * seen * config.hidden_size * config.num_hidden_layers
    patches, tokens = 4 * size.grid[0] * size.grid[1], size.prompt_length + own
    products = 2 * (tokens * (language - head) + own * head + patches * vision)
    return size.prompts * (products + attention)


def decode_bytes(model, size: Size) -> float:
    """Bytes in bf16 that a decoding step reads, at the mean length."""
    config = model.config.text_config
    language = sum(p.numel() for p in model.model.language_model.parameters())  # with the tied head
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    cached = size.prompts * (size.prompt_length + size.group_size * size.sampled / 2)
    return 2 * language + cached * config.num_hidden_layers * 2 * width * 2


def floors(model, size: Size, rates: tuple[float, float] | None) -> dict[str, float]:
    """Least seconds of sampling, an update without recomputation, and a step.

    rates: of `peaks`; if None, the result is empty.
    """
    if rates is None:
        return {}
    operations, copied = rates
    forward = forward_operations(model, size, size.trained) / operations
    prefill = forward_operations(model, size, 0) / operations
    sampling = prefill + size.sampled * decode_bytes(model, size) / copied
    adam = 28 * sum(p.numel() for p in model.parameters()) / copied
    step = sampling + forward + 3 * forward + adam  # with pi_ref
    return {"sampling": sampling, "update": 3 * forward, "step": step}
