"""What a prediction needs of a GPU's memory, and how many slots fit into it.

Reckoned from a model's configuration before its weights are read: the weights, the keys and values
of a slot, and what a prefill holds at its peak.
"""

import math
from dataclasses import dataclass

import torch

from engine.data.examples import Examples
from engine.files import read_from_model
from engine.model.model_files import outline
from engine.model.policy import Ranks, compute_dtype
from engine.model.quantized import is_packed
from engine.sampling.decode_step import whole_blocks
from engine.sampling.sampler import PREFILL_PROMPTS
from hicodet import InputError

MOST_SLOTS = 64  # taken where nothing else is asked for, and all of them fit
HEADROOM = 0.05  # of the memory: workspaces, and what the allocator cannot hand out


@dataclass(frozen=True)
class Need:
    """Bytes of the parts of a prediction."""

    weights: int
    slot: int  # keys and values of a prompt and its completion
    prompt: int  # activations of one prompt of a prefill
    prefill_prompts: int  # prompts of a prefill, or fewer where there are fewer slots
    unpacking: int = 0  # the largest layer of a packed model, once unpacked

    def prefill(self, slots: int) -> int:
        """Bytes of a prefill's activations with so many slots."""
        return min(slots, self.prefill_prompts) * self.prompt + self.unpacking

    def total(self, slots: int) -> int:
        """Bytes of everything with so many slots."""
        return self.weights + slots * self.slot + self.prefill(slots)

    def parts(self, slots: int) -> str:
        """The total as a sum in words."""
        weights, slot, prefill = (n / 1e9 for n in (self.weights, self.slot, self.prefill(slots)))
        return (
            f"{weights:.1f} GB of weights + {slots} x {slot:.2f} GB of keys and values + "
            f"{prefill:.1f} GB for a prefill"
        )


def weight_bytes(config, dtype: torch.dtype) -> int:
    """Bytes of a Qwen2.5-VL's weights, those that are not packed in this dtype."""
    model = outline(config)
    plain = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    return plain + sum(buffer.nbytes for buffer in model.buffers())


def cache_bytes(text, dtype: torch.dtype) -> int:
    """Bytes of a token's keys and values in all layers. text: config of the language model."""
    head_size = text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * dtype.itemsize


def activation_bytes(text, dtype: torch.dtype) -> int:
    """Bytes of a prompt's token at the peak of a layer without gradients, which is in its MLP.

    There are the residual, the MLP's input and its output; gate, up and their product.
    """
    return 3 * (text.hidden_size + text.intermediate_size) * dtype.itemsize


def vision_bytes(vision, dtype: torch.dtype) -> int:
    """Bytes of an image's patch at the peak of the vision tower, where it turns keys by position.

    There are the residual, the attention's input, queries, keys and values; in fp32 queries, keys,
    turned queries and three of their size for turned keys; angles; the pixels, also in fp32. In
    bf16 with Qwen2.5-VL's widths they are 40 bytes a number of the hidden size, 51,216.
    """
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    angles = 2 * 4 * vision.hidden_size // vision.num_heads
    widths = 5 * dtype.itemsize + 6 * 4
    return widths * vision.hidden_size + angles + (dtype.itemsize + 4) * pixels


def unpacking_bytes(text) -> int:
    """Bytes in which the largest layer of a packed model is unpacked: twice in 4 bytes a weight."""
    return 2 * 4 * text.hidden_size * text.intermediate_size


def reckon(
    config,
    dtype: torch.dtype,
    *,
    prompt_room: int,
    patches: int,
    max_new_tokens: int,
    prefill_prompts: int,
) -> Need:
    """What greedy prediction with this model needs.

    prompt_room: tokens of the longest prompt, of which the image has so many patches.
    """
    text, weights = config.text_config, weight_bytes(config, dtype)
    seen = patches * vision_bytes(config.vision_config, dtype)  # all of a prefill at once
    return Need(
        weights=weights,
        slot=(whole_blocks(prompt_room) + whole_blocks(max_new_tokens)) * cache_bytes(text, dtype),
        prompt=max(prompt_room * activation_bytes(text, dtype), seen),
        prefill_prompts=prefill_prompts,
        unpacking=unpacking_bytes(text) if is_packed(config) else 0,
    )


def choose_slots(asked: int, images: int, need: Need, memory: int) -> tuple[int, str]:
    """The number of slots to take, and a line that says why.

    asked: --slots, 0 for as many as fit up to MOST_SLOTS; no more are taken than there are images.
    memory: free bytes of the GPU before the weights are there. Raises InputError if not one slot
    fits, or fewer than were asked for.
    """
    most, least = min(asked or MOST_SLOTS, images), min(asked or 1, images)
    usable = memory * (1 - HEADROOM)
    fitting = next((n for n in range(most, 0, -1) if need.total(n) <= usable), 0)
    limit = f"{1 - HEADROOM:.0%} of the {memory / 1e9:.1f} GB that are free"
    if fitting < least:
        hint = f"--slots {fitting} would fit" if fitting else "take a smaller model or a larger GPU"
        raise InputError(f"--slots {least}: {need.parts(least)} exceed {limit}; {hint}")
    return fitting, f"--slots {fitting}: {need.parts(fitting)} are within {limit}"


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a GPU; None for a CPU, on which nothing is reckoned."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def slots_that_fit(
    examples: Examples, ranks: Ranks, asked: int, images: int, max_new_tokens: int
) -> int:
    """The number of slots that a prediction takes on each rank; on a GPU a line says why.

    images: of all ranks. Raises InputError as `choose_slots` does, or naming the model's folder if
    its packed weights cannot be read.
    """
    memory = free_memory(ranks.device)
    if memory is None:
        return asked or MOST_SLOTS
    options = {
        "prompt_room": examples.longest_prompt(),
        "patches": examples.most_patches(),
        "max_new_tokens": max_new_tokens,
        "prefill_prompts": PREFILL_PROMPTS,
    }
    need = read_from_model(
        lambda _: reckon(examples.config, compute_dtype(ranks.device), **options),
        examples.config.name_or_path,
        "weights",
    )
    images = max(math.ceil(images / ranks.world), 1)
    slots, line = choose_slots(asked, images, need, min(ranks.gather([memory])))
    ranks.print(line)
    return slots
