"""The sizes in a model's config.json: what they may be, and that its weights have them.

Both are asked before anything is made that large. The library takes what it finds: it draws the
weights that are missing, and leaves out those that a smaller model has no place for.
"""

import re

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from engine.files import read_from_model
from engine.model.quantized import PackedConfig, is_packed, pack_layers
from hicodet import InputError

# the most of each, more than ten times what any Qwen2.5-VL has; the least is 1
MOST = dict.fromkeys(("num_hidden_layers", "depth", "num_attention_heads", "num_heads"), 1000)
MOST |= dict.fromkeys(("num_key_value_heads", "in_channels"), 1000)
MOST |= dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size"), 10**6)
MOST |= {"vocab_size": 10**7, "window_size": 10**4}
FLOATS = ("F32", "BF16", "F16", "F64")  # as safetensors names them; weights may have any of them
STORED = {torch.int32: "I32", torch.float16: "F16"}  # the tensors of a packed layer have these
# of a weight's name; the Hub's files have less of it
PREFIX = re.compile(r"(model\.)?(language_model\.)?")
ONE = "take both from one model"


def read_config(model: str):
    """The configuration of a Qwen2.5-VL. Raises InputError naming what it cannot be."""
    return read_from_model(_read_config, model, "configuration in config.json")


def _read_config(model: str):
    values, _ = PreTrainedConfig.get_config_dict(model)
    for part in (values, values.get("text_config"), values.get("vision_config")):
        for name, most in MOST.items():
            size = part.get(name) if isinstance(part, dict) else None
            if type(size) is int and not 1 <= size <= most:  # of other types the library speaks
                raise InputError(f"{name} is {size}: must be from 1 to {most}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # token ids beyond the vocabulary are told of below, in one line
    try:
        config = AutoConfig.from_pretrained(model)
    finally:
        logging.set_verbosity(verbosity)
    if config.model_type == "qwen2_5_vl":
        for name, size, fits, wanted in _relations(config.text_config, config.vision_config):
            if not fits:
                raise InputError(f"{name} is {size}: must be {wanted}")
    return config


def _relations(text, vision) -> list[tuple[str, object, bool, str]]:
    """What sizes must be to each other: name, value, whether it is so, and what it must be."""
    heads, kv, half = text.num_attention_heads, text.num_key_value_heads, 0
    if not text.hidden_size % (2 * heads):
        half = text.hidden_size // heads // 2
    merged, window = vision.patch_size * vision.spatial_merge_size, vision.window_size
    theta = text.rope_parameters["rope_theta"]
    sections = text.rope_parameters.get("mrope_section", [16, 24, 24])
    whole = type(sections) is list and all(type(n) is int and n >= 0 for n in sections)
    return [
        ("num_attention_heads", heads, half > 0, f"a divisor of {text.hidden_size / 2:g}"),
        ("num_key_value_heads", kv, not heads % kv, f"a divisor of {heads}"),
        ("num_heads", vision.num_heads, not vision.hidden_size % (4 * vision.num_heads),
         f"a divisor of {vision.hidden_size / 4:g}"),
        ("out_hidden_size", vision.out_hidden_size, vision.out_hidden_size == text.hidden_size,
         f"the text's hidden_size, {text.hidden_size}"),
        ("mrope_section", sections, whole and len(sections) == 3 and sum(sections) == half,
         f"three numbers with the sum {half}, half of a head"),
        ("rope_theta", theta, type(theta) in (int, float) and theta > 0, "above 0"),
        ("window_size", window, window >= merged,
         f"at least patch_size x spatial_merge_size, {merged}"),
        ("fullatt_block_indexes", vision.fullatt_block_indexes,
         all(0 <= n < vision.depth for n in vision.fullatt_block_indexes),
         f"of {vision.depth} blocks"),
        ("pad_token_id", text.pad_token_id, (text.pad_token_id or 0) < text.vocab_size,
         f"below vocab_size, {text.vocab_size}"),
        ("layer_types", text.layer_types, set(text.layer_types) == {"full_attention"},
         "full_attention alone"),
    ]  # fmt: skip


def outline(config) -> nn.Module:
    """The model of a configuration on no device, without weights; in 4 bits what is packed."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    if is_packed(config):
        pack_layers(model, PackedConfig(config.quantization_config).group_size)
    return model


def weight_files(model: str) -> list[str]:
    """The safetensors files of a folder or of a hub's model."""
    try:
        return [cached_file(model, SAFE_WEIGHTS_NAME)]
    except OSError:  # there are several, which an index lists
        index = cached_file(model, SAFE_WEIGHTS_INDEX_NAME)
        return get_checkpoint_shard_files(model, index)[0]


def require_tensors(files: list[str], config) -> None:
    """Raise InputError unless the files hold each weight of the configuration, and no other.

    Names the first that is missing, of another shape or dtype, or without a place in the model.
    """
    model = outline(config)
    weights, packed = model.state_dict(), {name for name, _ in model.named_buffers()}
    left = {PREFIX.sub("", name, 1): name for name in weights}
    for file in files:
        with safe_open(file, "pt") as stored:
            for key in stored.keys():
                if (name := left.pop(PREFIX.sub("", key, 1), None)) is None:
                    raise InputError(f"{key} has no place in the model of config.json: {ONE}")
                form, tensor = stored.get_slice(key), weights[name]
                dtypes = (STORED[tensor.dtype],) if name in packed else FLOATS
                dtype = form.get_dtype() if form.get_dtype() in dtypes else dtypes[0]
                found = f"{form.get_dtype()} {form.get_shape()}"
                needed = f"{dtype} {list(tensor.shape)}"
                if found != needed:
                    raise InputError(f"{key} is {found}, and by config.json it is {needed}: {ONE}")
    if config.tie_word_embeddings:
        left.pop("lm_head.weight", None)
    if left:
        raise InputError(
            f"{len(left)} weights are missing, as {min(left.values())}: fetch all files"
        )
