"""Ranks: the processes of one run, what they exchange, and what they must agree on."""

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from engine.options import flag_of
from hicodet import InputError


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int
    world: int
    device: torch.device

    def share(self, batch: list) -> tuple[list, list[float]]:
        """This rank's part of a batch, and weights of 1.

        A rank without a part takes the first item with weight 0, as every rank must join every
        collective call.
        """
        mine = batch[self.rank :: self.world]
        return (mine, [1.0] * len(mine)) if mine else (batch[:1], [0.0])

    def gather(self, rows: list, group=None) -> list:
        """The rows of all ranks, rank after rank, on every rank. group: a process group."""
        parts = [None] * self.world
        dist.all_gather_object(parts, rows, group)
        return [row for part in parts for row in part]

    def numbers(self, value: float) -> list[float]:
        """A number from each rank, in rank order, on every rank; `gather` without pickling."""
        mine = torch.tensor(value, dtype=torch.float64)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine)
        return [float(number) for number in found]

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks, in rank order."""
        return sum(self.numbers(value))

    def print(self, *values) -> None:
        """Print on the first rank."""
        if self.rank == 0:
            print(*values, flush=True)


def start_ranks(timeout: timedelta = timedelta(weeks=1)) -> Ranks:
    """Join torchrun's process group, or open one of a single process.

    timeout: how long a rank waits for the others before it gives up, for instance when a host is
    gone. The default is longer than any rank's remaining work.
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


def require_flash(device: torch.device) -> None:
    """Raise InputError for a GPU without PyTorch's flash attention in bf16."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise InputError(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}."
            f"{capability[1]}; this needs 8.0 or newer, as A100, RTX 3090, 4090 and H100 have"
        )


def use_all_cores() -> None:
    """Let AdamW on the host (`--offload`) use this rank's share of the cores.

    torchrun sets OMP_NUM_THREADS=1. Any other value is the user's choice, and stays.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(cores // ranks, 1))


def on_first(ranks: Ranks, act: Callable, *, patient: bool = False):
    """act() on the first rank, None on the others. Its InputError or OSError ends all ranks.

    patient: the others may wait for weeks, longer than --timeout.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(weeks=1)) if patient else None
    result, refusal = None, ""
    if ranks.rank == 0:
        try:
            result = act()
        except (InputError, OSError) as error:
            refusal = str(error)
    if refusal := ranks.gather([refusal], group)[0]:
        end_all(refusal, ranks)
    return result


def end_all(reason: str, ranks: Ranks) -> None:
    """End all ranks; all must call it. The first one raises InputError with the reason."""
    if ranks.rank:
        sys.exit(1)
    raise InputError(reason)


def require_agreement(settings: dict, free: set[str], ranks: Ranks, names: dict[str, str]) -> None:
    """End all ranks, naming the first difference, if their settings differ.

    settings: options, and hashes of what they name. free: settings that may differ. names: what
    errors call settings that are not options.
    """
    found = ranks.gather([(settings, socket.gethostname())])
    first, first_host = found[0]
    for rank, (other, host) in enumerate(found):
        for name in sorted(first.keys() - free):
            if other.get(name) != first[name]:
                end_all(
                    f"ranks must agree: {names.get(name, flag_of(name))} {first[name]} on rank 0 "
                    f"({first_host}), {other.get(name)} on rank {rank} ({host})",
                    ranks,
                )
