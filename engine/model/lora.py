"""Low-rank adapters (LoRA): a few trained numbers next to each frozen linear layer.

A layer computes W x + s B A x in place of W x, with s = alpha / r. A (r, in) and B (out, r) are
trained, W is frozen. B starts at 0, so the adapter changes nothing at first. The three policies
share one base in memory: pi_theta has fp32 adapters, pi_old has copies of them in the compute
dtype, and pi_ref has none, or the frozen adapter that the run starts from. Files have the layout of
the peft library. Not in the paper, which trains all weights.
"""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.model.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from hicodet import InputError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)"
MORE_THAN_LORA = ("use_rslora", "use_dora", "alpha_pattern")  # each changes the computation
PREFIX = "base_model.model."  # of names in peft's files


@dataclass(frozen=True)
class Adapter:
    """An adapter: its hyperparameters and weights."""

    rank: int
    alpha: float
    base: str  # the model it belongs to
    weights: dict[str, Tensor] | None = None  # by parameter name; None: not yet initialised


def share(model: nn.Module) -> nn.Module:
    """A second model that shares all parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def add_adapters(model: nn.Module, adapter: Adapter, dtype: torch.dtype, seed: int) -> nn.Module:
    """Freeze a model, add adapters to its language model's linear layers, and return it.

    seed: for A, if the adapter has no weights yet. Raises InputError if the weights do not fit.
    """
    model.requires_grad_(False)
    generator, left = torch.Generator().manual_seed(seed), dict(adapter.weights or {})
    for name, layer in list(model.named_modules()):
        is_target = name.rpartition(".")[2] in TARGETS and ".language_model.layers." in name
        named = f"{name}.lora_A.weight" in left
        if not is_target or (adapter.weights and not named):
            continue
        if named:
            a, b = (left.pop(f"{name}.lora_{part}.weight") for part in "AB")
        else:  # as in peft
            bound = 1 / math.sqrt(layer.in_features)
            a = torch.rand(adapter.rank, layer.in_features, generator=generator) * 2 * bound - bound
            b = torch.zeros(layer.out_features, adapter.rank)
        if a.shape != (len(a), layer.in_features) or b.shape != (layer.out_features, len(a)):
            raise InputError(f"--adapter: {name} does not fit that layer of the model")
        for part, value in (("lora_A", a), ("lora_B", b)):
            linear = nn.Linear(*reversed(value.shape), bias=False, dtype=dtype, device=model.device)
            linear.weight.data.copy_(value)
            layer.add_module(part, linear)
        layer.lora_scale = adapter.alpha / adapter.rank
        layer.register_forward_hook(_add_low_rank)
    if left:
        raise InputError(f"--adapter: {min(left)} belongs to no linear layer of the language model")
    return model


def _add_low_rank(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + layer.lora_B(layer.lora_A(inputs[0]) * layer.lora_scale)


def whole(parameter: Tensor) -> Tensor:
    """The whole parameter, gathered from all ranks if it is sharded; a collective call."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and fp32 value of each parameter, adapters merged; a collective call."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight, (owner, _, kind) = whole(parameter).float(), name.rpartition(".")
        layer = model.get_submodule(owner)
        if kind == "weight" and "lora_A" in layer._modules:
            a, b = (whole(part.weight).float() for part in (layer.lora_A, layer.lora_B))
            weight = weight + layer.lora_scale * b @ a
        yield name, weight


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """A and B of each adapter by parameter name; a collective call."""
    return {n: whole(p).cpu() for n, p in model.named_parameters() if ".lora_" in n}


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write an adapter in the layout of peft."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.base,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": 0.0, "bias": "none",
        # a pattern, as peft would also find plain names in the vision tower
        "target_modules": rf"{LAYERS}\.({'|'.join(TARGETS)})",
        "inference_mode": True, "fan_in_fan_out": False, "init_lora_weights": True,
    }  # fmt: skip
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    named = {PREFIX + name: value.contiguous() for name, value in adapter.weights.items()}
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter, ours or peft's. Raises InputError naming what cannot be read."""
    folder = Path(folder)
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        weights = load_file(folder / ADAPTER_WEIGHTS)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        base = str(config.get("base_model_name_or_path") or "")
    except Exception as error:  # safetensors has its own exceptions for damaged weights
        raise InputError(f"{folder}: no LoRA adapter that can be read ({error})") from None
    if more := [key for key in MORE_THAN_LORA if config.get(key)]:
        raise InputError(f"{folder}: only plain LoRA adapters are read, and this one has {more[0]}")
    named = {name.removeprefix(PREFIX): value for name, value in weights.items()}
    for name, value in named.items():
        if not name.endswith(("lora_A.weight", "lora_B.weight")):
            raise InputError(f"{folder}: {name} is more than a plain LoRA adapter has")
        if (has := value.shape[-1 if "lora_B" in name else 0]) != rank:
            raise InputError(f"{folder}: {name} has rank {has}, and {ADAPTER_CONFIG} says {rank}")
        if (twin := name.replace("lora_A", "lora_B")) not in named:
            raise InputError(f"{folder}: {twin} is missing")
    return Adapter(rank, alpha, base, named)
