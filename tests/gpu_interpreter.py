"""Run the flex attention kernel that Inductor wrote, in Triton's interpreter on the CPU."""

import inspect
import re
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

from engine.sampling.decode_step import DecodeStep


def kernel_of(name: str, source: str):
    """A template's source as a function for Triton's interpreter, which needs it in a file."""
    source = re.sub(r"@triton_heuristics\.template\(.*?\n\)\n", "", source, flags=re.S)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.py"
        path.write_text(source)
        spec = spec_from_file_location("kernel", path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, name)
        kernel.rewrite()
    return kernel


def run_kernel(kernel, source: str, step: DecodeStep, q: torch.Tensor):
    """Flex attention by a kernel. q and the output are (slots, K, queries, D)."""

    def constant(name):
        return int(re.search(rf"{name} : tl.constexpr = (\d+)", source)[1])

    strides = re.search(r"stride_qz,.*? = ([\d, ]+)", source)[1].split(", ")
    strides = [int(strides[place]) for place in (0, 1, -2, -1)]
    q = torch.empty_strided(q.shape, strides).copy_(q)
    slots, heads, queries, _ = q.shape
    keys, values = (x[0][:slots] for x in (step.cache.own_keys, step.cache.own_values))
    filled = inspect.getclosurevars(step.mask.mask_mod).nonlocals["filled"]
    unused = torch.empty(0)
    mask = step.mask.kv_num_blocks, step.mask.kv_indices, unused, unused, filled
    blocks, nan = -(-queries // constant("BLOCK_M")), float("nan")
    if "SPLIT_KV : " not in source:
        output = torch.full(q.shape, nan)
        sums = torch.full((2, slots, heads, queries), nan)
        kernel[blocks, slots, heads](q, keys, values, *sums, *mask, output)
        return output
    split = constant("SPLIT_KV")
    highest, total = torch.full((2, slots, split, heads, queries), nan)
    outputs = torch.full((slots, split, heads, queries, q.shape[3]), nan)
    kernel[blocks, slots * heads, split](q, keys, values, highest, total, *mask, outputs)
    # a GPU adds up the parts in other kernels, which are not interpreted
    weight = (highest - highest.amax(1, keepdim=True)).exp2()
    return (outputs * weight[..., None]).sum(1) / (total * weight).sum(1)[..., None]
