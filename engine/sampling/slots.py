"""How many images are decoded at a time."""

import torch

from engine.model.families import head_size
from engine.ranks import Ranks
from engine.sampling.decode_step import whole_blocks
from hicodet import InputError

MOST_SLOTS = 64  # the default, if all of them fit
FOR_SLOTS = 0.75  # share of the free memory; the rest is for prefills


def slot_bytes(config, dtype: torch.dtype, group_size: int, prompt_room: int, new: int) -> int:
    """Bytes of the keys and values of one slot. config: of the language model.

    prompt_room, new: tokens of the longest prompt, and of the longest completion.
    """
    heads = config.num_hidden_layers * config.num_key_value_heads
    token = 2 * heads * head_size(config) * dtype.itemsize
    return (whole_blocks(prompt_room) + group_size * whole_blocks(new)) * token


def choose_slots(
    model,
    ranks: Ranks,
    asked: int,
    images: int,
    *,
    group_size: int,
    prompt_room: int,
    new: int,
    share: float = FOR_SLOTS,
) -> int:
    """The number of slots of this rank: as many as fit into the memory that is free.

    asked: most slots, 0 for MOST_SLOTS. images: of this rank, which need no more slots. share: of
    the free memory, for the slots; a CPU's memory is not checked. Raises InputError if not one slot
    fits.
    """
    wanted = max(min(asked or MOST_SLOTS, images), 1)
    if ranks.device.type == "cpu":
        return wanted
    torch.cuda.empty_cache()  # after a training step, PyTorch holds memory that it does not use
    free = torch.cuda.mem_get_info(ranks.device)[0]
    slot = slot_bytes(model.config.text_config, model.dtype, group_size, prompt_room, new)
    fitting = int(free * share) // slot
    figures = f"{free / 1e9:.1f} GB are free, and an image takes {slot / 1e9:.2f} GB"
    if not fitting:
        raise InputError(f"not one image fits at a time: {figures}; take a smaller model")
    if fitting < wanted:
        ranks.print(f"{fitting} images at a time: {figures}")
    return min(wanted, fitting)
