"""Batches of Examples in a fixed order, read ahead by worker processes."""

import ctypes
import dataclasses
import math
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator
from functools import partial

import numpy as np
from torch.utils.data import DataLoader

from engine.data.examples import Example, Examples
from engine.model.packing import Prompt
from engine.ranks import Ranks
from hicodet import InputError

LEAVE_OUT = (  # what to do about an image that cannot be used
    "`hoi_r1.py check --out bad.txt` lists all such images, and --resume with --exclude bad.txt "
    "leaves them out"
)
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when its parent ends
LAST_SECONDS = 10  # an image worker lives this long after SIGTERM, which torchrun sends to it too


def batch_order(
    count: int, batch_size: int, steps: int, seed: int, excluded: Collection[int] = ()
) -> list[list[int]]:
    """The samples of every step. An epoch takes each sample once; its last batch may be short.

    excluded: samples to leave out, which does not change the order of the others.
    """
    order: list[list[int]] = []
    kept = count - len(excluded)
    for epoch in range(math.ceil(steps * batch_size / kept) + 1):
        samples = np.random.default_rng([seed, epoch]).permutation(count).tolist()
        samples = [sample for sample in samples if sample not in excluded]
        order += [samples[i : i + batch_size] for i in range(0, kept, batch_size)]
    return order[:steps]


def _example_or_error(examples: Examples, index: int) -> Example | InputError:
    """An example, or its error as a value: DataLoader adds a traceback to what a worker raises."""
    try:
        return examples[index]
    except InputError as error:
        return error


def _start_worker(parent: int, worker: int) -> None:
    """Let a worker survive a signal, so that its parent can finish a step, but end with the parent.

    A worker without its parent would wait for ever, and keep the run's lock. Only on Linux can this
    be prevented.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST_SECONDS))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os.kill(os.getpid(), signal.SIGKILL)


def read_ahead(
    examples: Examples, indices: list[int], workers: int
) -> Iterator[Example | InputError]:
    """The examples in this order, read and resized ahead by worker processes.

    Yields the InputError for an image that cannot be used.
    """
    options = {"num_workers": workers, "multiprocessing_context": "fork", "prefetch_factor": 16}
    options["worker_init_fn"] = partial(_start_worker, os.getpid())
    loader = DataLoader(
        indices,
        batch_size=None,
        collate_fn=partial(_example_or_error, examples),
        **(options if workers else {}),
    )
    for example in loader:
        if isinstance(example, Example):
            # copies, as tensors of a worker hold shared memory and an open file
            prompt = Prompt(*(part.clone() for part in vars(example.prompt).values()))
            example = dataclasses.replace(example, prompt=prompt)
        yield example


def batches(
    examples: Examples,
    ranks: Ranks,
    *,
    batch_size: int,
    steps: int,
    done: int,
    seed: int,
    workers: int,
    excluded: Collection[int] = (),
) -> Iterator[tuple[int, list[Example], list[float], float]]:
    """This rank's share of each batch, from step `done` on.

    Yields step, share, weights, and the seconds spent waiting for images. Raises InputError naming
    an image that cannot be used, and how to continue.
    """
    order = batch_order(len(examples), batch_size, steps, seed, excluded)
    shares = [ranks.share(batch) for batch in order[done:]]
    stream = read_ahead(examples, [i for share, _ in shares for i in share], workers)
    for step, (share, weights) in enumerate(shares, start=done):
        started = time.perf_counter()
        batch = [next(stream) for _ in share]
        if error := next((e for e in batch if isinstance(e, InputError)), None):
            raise InputError(f"{error}; {LEAVE_OUT}")
        yield step, batch, weights, time.perf_counter() - started
