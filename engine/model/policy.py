"""Ranks, the three policies, FSDP2, the optimizer step and micro-batches."""

import hashlib
import math
import os
import types
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

import engine.model.quantized  # noqa: F401  reads AWQ folders
from engine.files import read_from_model
from engine.model.attention import token_logprobs, use_group_attention
from engine.model.model_files import read_config, require_tensors, weight_files
from hicodet import InputError

logging.disable_progress_bar()  # of the library's loading and saving

MOST_GRAPHS = 32  # of a function; behind torch's own 8 it would run uncompiled
SMALLEST_PART = 1_000_000  # parameters of a part that FSDP gathers by a call of its own
MAX_BAD_STEPS = 10  # steps in a row with a non-finite loss or gradient before a run stops


# Ranks


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    world: int
    device: torch.device

    def share(self, batch: list) -> tuple[list, list[float]]:
        """This rank's part of a batch, and weights of 1.

        A rank without a part takes the first item with weight 0: every rank takes part in every
        collective call.
        """
        mine = batch[self.rank :: self.world]
        return (mine, [1.0] * len(mine)) if mine else (batch[:1], [0.0])

    def gather(self, rows: list, group=None) -> list:
        """The rows of all ranks, rank after rank, on every rank. group: see `patient_group`."""
        parts = [None] * self.world
        dist.all_gather_object(parts, rows, group)
        return [row for part in parts for row in part]

    def numbers(self, value: float) -> list[float]:
        """A number of each rank, rank after rank, on every rank: `gather` without its pickling."""
        mine = torch.tensor(value, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine)
        return [float(number) for number in found]

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks, in rank order."""
        return sum(self.numbers(value))

    def print(self, *values) -> None:
        """print on the first rank."""
        if self.rank == 0:
            print(*values, flush=True)


def require_flash(device: torch.device) -> None:
    """Raise InputError for a GPU on which PyTorch's flash attention, in bf16, does not run."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise InputError(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}."
            f"{capability[1]}; this needs 8.0 or newer, as A100, RTX 3090, 4090 and H100 have"
        )


def use_all_cores() -> None:
    """Let AdamW on the host (`--offload`) use this rank's share of the cores.

    torchrun sets OMP_NUM_THREADS=1 for each rank. Any other value is the user's, and stays.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(cores // ranks, 1))


def start_ranks(timeout: timedelta = timedelta(weeks=1)) -> Ranks:
    """Join torchrun's process group, or open one of a single process.

    timeout: how long a rank waits for the others before it gives up, as when a host is gone. By
    default longer than any work that a rank may have left where another has none.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else "cpu"
    if cuda:
        require_flash(device)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(device))


def patient_group():
    """A process group that waits for weeks, for ranks that wait while the first one writes."""
    return dist.new_group(backend="gloo", timeout=timedelta(weeks=1))


# The three policies


def compute_dtype(device: torch.device) -> torch.dtype:
    """What forward and backward compute in: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(path: str, device: torch.device, dtype: torch.dtype | None = None):
    """A Qwen2.5-VL with group attention, in eval mode; from safetensors only.

    Raises InputError if there are no weights, not all, or others than config.json says.
    """
    config = read_config(path)
    options = {"dtype": dtype or compute_dtype(device), "use_safetensors": True, "config": config}

    def read(path: str):
        require_tensors(weight_files(path), config)
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, **options, output_loading_info=True
        )

    model, found = read_from_model(read, path, "weights in safetensors")
    assert not found["missing_keys"], found["missing_keys"]  # the library would draw them
    return use_group_attention(model).to(device).eval()


def weights_fingerprint(path: str) -> str:
    """A hash of the names and first values of a model's weights, of which little is read.

    Raises InputError if there are none in safetensors.
    """
    return read_from_model(_hash_first_values, path, "weights in safetensors")


def _hash_first_values(path: str) -> str:
    digest = hashlib.sha256()
    for file in weight_files(path):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                values = tensors.get_slice(name)[:1].float().flatten()
                digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def checkpoint_activations(model) -> None:
    """Recompute activations in backward; under this name from transformers 5.23 on."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def compile_layers(model, device: torch.device) -> None:
    """Let a GPU fuse what lies between a layer's matrix products: an eighth of an update's time.

    Both towers' layers of pi_theta and pi_ref run the same code of the library, where graphs are
    counted: with and without gradient, for the first shape and for any, they are ten.
    """
    if device.type == "cuda":
        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        for layer in [*model.model.visual.blocks, *model.model.language_model.layers]:
            layer.compile(fullgraph=True)  # checkpointing forbids a break in what is compiled


def load_policy(path: str, device: torch.device, **options):
    """pi_theta: fp32 parameters sharded over all ranks, computing in compute_dtype.

    At lr 1e-6 a step moves a weight by less than half a bf16 ulp: bf16 parameters would stay put.
    options: of `shard_policy`.
    """
    return shard_policy(load_model(path, torch.device("cpu"), torch.float32), device, **options)


def sharded_parts(policy) -> list:
    """What FSDP gathers by calls of their own: the whole vision tower, and each layer of the text.

    A block of the tower alone would wait for the gathering. So would a part of fewer than
    SMALLEST_PART parameters, which goes with the root: all of the toy, where two processes on a CPU
    take 0.87 of the time for a step so.
    """
    parts = [policy.model.visual, *policy.model.language_model.layers]
    return [p for p in parts if sum(x.numel() for x in p.parameters()) >= SMALLEST_PART]


def shard(model, device: torch.device, offload: bool, **options) -> None:
    """Shard a model over all ranks, part by part. options: of fully_shard.

    offload: parameters and gradients stay in pinned memory of the host.
    """
    options["mesh"] = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    options["offload_policy"] = CPUOffloadPolicy() if offload else OffloadPolicy()
    for part in [*sharded_parts(model), model]:
        fully_shard(part, **options)  # moves it to the device, all but offloaded parameters
    # as a method of the root, so that FSDP gathers the root's parameters as it does for forward
    model.token_logprobs = types.MethodType(token_logprobs, model)
    register_fsdp_forward_method(model, "token_logprobs")


def load_reference(path: str, device: torch.device, *, offload: bool = False):
    """pi_ref, the policy that RL starts from: frozen, in compute_dtype, sharded over all ranks."""
    model = load_model(path, torch.device("cpu"), compute_dtype(device))
    return shard_reference(model, device, offload=offload)


def shard_reference(reference, device: torch.device, *, offload: bool = False):
    """pi_ref from a model, which it changes: frozen, sharded, on the device."""
    compile_layers(reference.requires_grad_(False), device)
    # True: the root too, which has no backward after which it would be freed
    shard(reference, device, offload, reshard_after_forward=True)
    return reference


def shard_policy(
    policy, device: torch.device, *, gradient_checkpointing: bool = True, offload: bool = False
):
    """pi_theta from a model in fp32, which it changes: sharded, on the device, in train mode.

    With neither of both, which are for where memory is short, parameters that are gathered stay so
    until the step's last backward: 2 bytes each on a GPU, 7.5 GB of a 3B model.
    offload: parameters and gradients stay in pinned memory of the host, so AdamW's state and step
    do too; the GPU holds the parameters of the root and of the layer that is computed.
    """
    if gradient_checkpointing:
        checkpoint_activations(policy)
    compile_layers(policy, device)
    # inputs stay as they are: cast, the vision tower's rotary angles would be coarser than pi_old's
    precision = MixedPrecisionPolicy(
        param_dtype=compute_dtype(device), reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    policy.gathered_once = not gradient_checkpointing and not offload
    # None: after all parts but the root
    reshard = False if policy.gathered_once else None
    shard(policy, device, offload, mp_policy=precision, reshard_after_forward=reshard)
    return policy.train()


@torch.no_grad()
def refresh(replica, policy) -> None:
    """Copy pi_theta's weights into a replica, in place and parameter by parameter."""
    for copy, parameter in zip(replica.parameters(), policy.parameters(), strict=True):
        # on the copy's device, so that GPUs gather it, and half the traffic where it is bf16
        copy.copy_(parameter.to(copy.device, copy.dtype).full_tensor())


class ClippedAdamW:
    """AdamW with clipping, which changes nothing when the loss or the gradient is not finite."""

    def __init__(self, policy, *, beta2: float, weight_decay: float, max_grad_norm: float):
        self.max_grad_norm, self.bad_in_a_row = max_grad_norm, 0
        self.parameters = list(policy.parameters())
        self.adamw = torch.optim.AdamW(
            self.parameters,
            betas=(0.9, beta2),
            weight_decay=weight_decay,
            fused=True,  # no temporary copy of the parameters
        )
        for parameter in self.parameters:
            # before the first save, which would make them by a step of its own and count that
            self.adamw.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }

    def step(self, lr: float, loss: float) -> float:
        """Apply the accumulated gradient at this rate. Returns its norm before clipping.

        loss: of the global batch, so that all ranks decide alike. Raises InputError after
        MAX_BAD_STEPS steps in a row that had to be left out.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        norm = float(norm.full_tensor())
        if math.isfinite(norm) and math.isfinite(loss):
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self.bad_in_a_row = 0
        else:
            self.bad_in_a_row += 1
        self.adamw.zero_grad()
        if self.bad_in_a_row == MAX_BAD_STEPS:
            raise InputError(
                f"{MAX_BAD_STEPS} steps in a row had a loss or gradient that is not finite: lower "
                "--learning-rate and --resume; the last lines of metrics.jsonl show how it came"
            )
        return norm


def learning_rate(step: int, steps: int, highest: float, warmup: int, schedule: str) -> float:
    """Warm-up, then "cosine" or "linear" down to 0 (Sec. 4.2). step counts from 0."""
    if step < warmup:
        return highest * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return highest * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)


def micro_batches(
    lengths: list[int], weights: list[float], budget: int, ranks: Ranks
) -> list[tuple[list[int], list[float]]]:
    """Split items into micro-batches of at most `budget` tokens: indices and weights of each.

    The longest come first, so that memory runs out at once if it does; an item over the budget
    stands alone. Every rank gets as many micro-batches, a missing one as item 0 with weight 0.
    """
    micros: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not micros or lengths[index] > room:
            micros.append([])
            room = budget
        micros[-1].append(index)
        room -= lengths[index]
    missing = int(max(ranks.numbers(len(micros)))) - len(micros)
    weighted = [(indices, [weights[i] for i in indices]) for indices in micros]
    return weighted + [([0], [0.0])] * missing


def accumulate(
    policy, micro_batches: list, terms_of: Callable[..., dict[str, Tensor]], ranks: Ranks
) -> dict[str, float]:
    """Add up the policy's gradient of "loss" over micro-batches and ranks.

    terms_of: named scalars of a micro-batch, among them "loss", which carries the gradient. Returns
    the sum of each over micro-batches and ranks.
    """
    sums: dict[str, Tensor] = {}
    for number, micro in enumerate(micro_batches, start=1):
        if policy.gathered_once:
            policy.set_reshard_after_backward(number == len(micro_batches))
        terms = terms_of(micro)
        (terms["loss"] * ranks.world).backward()  # FSDP takes the mean over ranks
        sums = {name: sums.get(name, 0.0) + term.detach() for name, term in terms.items()}
    # read here: in the loop Python would wait for the GPU after each micro-batch
    return {name: ranks.sum(float(value)) for name, value in sums.items()}
