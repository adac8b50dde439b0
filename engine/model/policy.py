"""The three policies: loading, sharding over the ranks with FSDP2, and pi_old's refresh."""

import types
from collections.abc import Iterable, Iterator, Set

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from transformers.utils import logging

import engine.model.quantized  # noqa: F401  reads AWQ folders
from engine.model import model_files
from engine.model.attention import use_group_attention
from engine.model.families import FAMILIES
from engine.model.lora import Adapter, add_adapters, share, trained
from engine.model.packing import token_logprobs

logging.disable_progress_bar()  # the library's, for loading and saving

MOST_GRAPHS = 32  # per function; beyond the limit, 8 by default, it runs uncompiled
# Parameters; FSDP gathers smaller parts with the root. These are all parts of the toy, whose step
# then takes 0.87 of the time (two processes on a CPU).
SMALLEST_PART = 1_000_000


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of forward and backward: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(path: str, device: torch.device, dtype: torch.dtype | None = None):
    """A model with group attention, in eval mode; from safetensors only.

    Raises InputError if weights are missing, or do not fit config.json.
    """
    config = model_files.read_model_config(path)
    family = FAMILIES[config.model_type]
    options = {"dtype": dtype or compute_dtype(device), "use_safetensors": True}
    options |= {"config": config, "ignore_mismatched_sizes": True}

    def read(path: str):
        model_files.weight_files(path)  # to name what is missing; the library points to its hub
        with model_files.quiet():  # about what `require_complete` refuses
            return family.model.from_pretrained(path, **options, output_loading_info=True)

    model, report = model_files.read_from_model(read, path, "weights in safetensors")
    model_files.require_complete(report, path)
    return use_group_attention(model).to(device).eval()


def checkpoint_activations(model) -> None:
    """Recompute activations in backward. transformers 5.23 renamed the method."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def compile_layers(model, device: torch.device) -> None:
    """Compile each layer on a GPU, which saves an eighth of an update's time.

    Graphs are counted per function of the library. The layers of both towers, in pi_theta and in
    pi_ref, with and without gradient, for the first shape and for any shape, need ten.
    """
    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        for layer in [*model.model.visual.blocks, *model.model.language_model.layers]:
            layer.compile(fullgraph=True)  # checkpointing forbids graph breaks


def shard(
    model, device: torch.device, offload: bool, ignored: Set[nn.Parameter] = frozenset(), **options
) -> None:
    """Shard a model over all ranks, part by part. options: of fully_shard.

    offload: parameters and gradients stay in pinned host memory. ignored: parameters that are not
    sharded, and are on the device already.
    """
    options["mesh"] = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    options["offload_policy"] = fsdp.CPUOffloadPolicy() if offload else fsdp.OffloadPolicy()
    # smaller parts, such as a block of the vision tower, would wait to be gathered
    for part in [model.model.visual, *model.model.language_model.layers, model]:
        size = sum(x.numel() for x in part.parameters() if x not in ignored)
        if part is model or (size and size >= SMALLEST_PART):
            # also moves it to the device, except offloaded parameters
            fsdp.fully_shard(part, ignored_params=ignored, **options)
    # as a method of the root, so that FSDP gathers the root's parameters as it does for forward
    model.token_logprobs = types.MethodType(token_logprobs, model)
    fsdp.register_fsdp_forward_method(model, "token_logprobs")


def load_policies(
    path: str,
    device: torch.device,
    adapter: Adapter | None,
    *,
    replica: bool,
    reference: bool,
    seed: int = 0,
    gradient_checkpointing: bool = True,
    offload: bool = False,
) -> tuple:
    """pi_theta; pi_old if `replica`, else None; pi_ref if `reference`, else None.

    adapter: what to train, initialised from `seed` if it has no weights; the policies then share
    one base. None: all weights are trained.
    """
    dtype, pi_old, pi_ref = compute_dtype(device), None, None
    memory = {"gradient_checkpointing": gradient_checkpointing, "offload": offload}
    if adapter is None:
        policy = load_policy(path, device, **memory)
        pi_old = load_model(path, device) if replica else None
        if reference:
            pi_ref = load_model(path, torch.device("cpu"), dtype)
            shard_reference(pi_ref, device, offload=offload)
        return policy, pi_old, pi_ref
    base = load_model(path, device).requires_grad_(False)
    if replica:
        pi_old = add_adapters(share(base), adapter, dtype, seed)
    if reference:
        pi_ref = share(base)
        if adapter.weights:
            add_adapters(pi_ref, adapter, dtype, seed).requires_grad_(False)
        compile_layers(pi_ref, device)
        pi_ref.token_logprobs = types.MethodType(token_logprobs, pi_ref)
    policy = add_adapters(base, adapter, torch.float32, seed)
    return shard_policy(policy, device, **memory), pi_old, pi_ref


def load_policy(path: str, device: torch.device, **options):
    """pi_theta: fp32 parameters sharded over all ranks, computing in compute_dtype.

    At lr 1e-6 a step moves a weight by less than half a bf16 ulp: bf16 parameters would not move.
    options: of `shard_policy`.
    """
    return shard_policy(load_model(path, torch.device("cpu"), torch.float32), device, **options)


def shard_policy(
    policy, device: torch.device, *, gradient_checkpointing: bool = True, offload: bool = False
):
    """pi_theta from a model in fp32, which it changes: sharded, on the device, in train mode.

    If both options are off, gathered parameters stay gathered until the last backward: 7.5 GB for a
    3B model on a GPU. offload: parameters, gradients and AdamW's state and step stay in host
    memory. The GPU then holds the parameters of the root and of one layer.
    """
    if gradient_checkpointing:
        checkpoint_activations(policy)
    compile_layers(policy, device)
    # a cast of inputs would make the vision tower's rotary angles coarser than pi_old's
    precision = fsdp.MixedPrecisionPolicy(
        param_dtype=compute_dtype(device), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    policy.gathered_once = not gradient_checkpointing and not offload
    reshard = False if policy.gathered_once else None  # None: all parts but the root
    frozen = {p for p in policy.parameters() if not p.requires_grad}  # all but LoRA's adapters
    shard(policy, device, offload, frozen, mp_policy=precision, reshard_after_forward=reshard)
    return policy.train()


def shard_reference(reference, device: torch.device, *, offload: bool = False):
    """pi_ref, the policy that RL starts from: a model, which is frozen and sharded in place."""
    compile_layers(reference.requires_grad_(False), device)
    # True: the root too, as no backward would free it
    shard(reference, device, offload, reshard_after_forward=True)
    return reference


def gathered(policy, micro_batches: Iterable) -> Iterator:
    """The micro-batches of one step; the last backward frees a policy that stays gathered."""
    micro_batches = list(micro_batches)
    for number, micro in enumerate(micro_batches, start=1):
        if policy.gathered_once:
            policy.set_reshard_after_backward(number == len(micro_batches))
        yield micro


@torch.no_grad()
def refresh(replica, policy) -> None:
    """Copy pi_theta's weights into pi_old, in place and parameter by parameter."""
    for copy, parameter in zip(trained(replica), trained(policy), strict=True):
        # first to the copy's device and dtype: GPUs gather, with half the traffic in bf16
        copy.copy_(parameter.to(copy.device, copy.dtype).full_tensor())
