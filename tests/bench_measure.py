"""Timing of the benches, and their reports."""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Result:
    """Seconds of ours, the baseline and the floor; peak_memory: bytes of ours, on a CPU of all."""

    ours: float
    baseline: float | None
    ratio: float | None
    peak_memory: int
    floor: float | None
    what: str
    details: dict
    device: str


def peak_memory(device: torch.device) -> int:
    """Most bytes of the GPU since the last reset; on a CPU, of this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Runs:
    """How often functions are called, whether the baseline is one of them, and the clock."""

    repeats: int
    baseline: bool
    clock: Callable[[], float] = time.perf_counter


def measure(device: torch.device, runs: Runs, **functions: Callable) -> dict:
    """The best time of each function. They take turns, so a busy machine slows all of them.

    The first call of each warms up and is not counted. Returns {name: (seconds, bytes)}.
    """
    functions = {name: f for name, f in functions.items() if runs.baseline or name != "baseline"}
    times: dict[str, list[tuple[float, int]]] = {name: [] for name in functions}
    for repeat in range(runs.repeats + 1):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = runs.clock()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = runs.clock() - started
            print(f"  {name}: {seconds:.4g} s{'' if repeat else ', warming up'}", flush=True)
            if repeat:
                times[name].append((seconds, peak_memory(device)))
    return {name: min(found) for name, found in times.items()}


def result(device, measured: dict, what: str, floor: float | None = None, **details) -> Result:
    """The Result of `measure`."""
    ours, memory = measured["ours"]
    baseline = measured["baseline"][0] if "baseline" in measured else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    ratio = baseline / ours if baseline else None
    return Result(ours, baseline, ratio, memory, floor, what, details, name)


def report(found: Result) -> str:
    """The figures, one per line."""
    rows = {"device": found.device, "ours": f"{found.ours:.4g} s"}
    if found.baseline is not None:
        rows |= {"baseline": f"{found.baseline:.4g} s", "ratio": f"{found.ratio:.2f}"}
    if found.floor is not None:
        rows["floor"] = f"{found.floor:.4g} s, {found.ours / found.floor:.2f} times that"
    rows["peak memory"] = f"{found.peak_memory / 2**30:.2f} GiB"
    rows |= {name: f"{value:.4g}" for name, value in found.details.items()}
    return "\n".join([found.what, *(f"  {name}: {value}" for name, value in rows.items())])
