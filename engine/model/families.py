"""The supported model families, and how they differ."""

from dataclasses import dataclass
from inspect import signature

import transformers


@dataclass(frozen=True)
class Family:
    """A model family: all models with one model_type."""

    model: type[transformers.PreTrainedModel]
    box_frame: str  # in which the family was trained to write boxes
    packed: bool = False  # whether its AWQ weights are supported


FAMILIES = {
    "qwen2_5_vl": Family(transformers.Qwen2_5_VLForConditionalGeneration, "model", packed=True),
    "qwen2_vl": Family(transformers.Qwen2VLForConditionalGeneration, "thousand"),
    "qwen3_vl": Family(transformers.Qwen3VLForConditionalGeneration, "thousand"),
}
# transformers 5.24 renames the argument for the cache of keys and values
NAMES = signature(transformers.Qwen2_5_VLTextModel.forward).parameters
CACHE = "cache" if "cache" in NAMES else "past_key_values"


def head_size(text) -> int:
    """Width of an attention head. text: config of the language model."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
