"""Rules for GPUs, tested on a CPU: the compiled head, cores, old GPUs, pinned memory."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from transformers import Qwen2_5_VLForConditionalGeneration

import engine.ranks
import hoi_r1
from engine.model.packing import chunk_logprobs
from hicodet import InputError
from tests.bench_models import SIZES, model_config


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_compiled_head_equals_cross_entropy_and_has_no_scalar_input(temperature):
    """The code of a CPU scalar needs a C++ compiler. Banned ids get no probability."""
    head, banned = torch.nn.Linear(8, 50, bias=False), torch.arange(50) % 5 == 1
    hidden, ids, inputs = torch.randn(7, 8), torch.arange(7) * 5, []

    def note(graph, given):
        inputs.extend(x for x in given if isinstance(x, torch.Tensor))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note)
    chunk = chunk_logprobs(temperature, compiled=False)
    found = torch.compile(chunk, dynamic=True, backend=backend)(head, hidden, ids, banned)
    logits = head(hidden).masked_fill(banned, -torch.inf) / temperature
    torch.testing.assert_close(found, -F.cross_entropy(logits, ids, reduction="none"))
    assert len(inputs) >= 4 and all(x.dim() > 0 for x in inputs)


@pytest.mark.parametrize("environ, threads", [
    ({}, [16]),
    ({"OMP_NUM_THREADS": "1"}, [16]),  # as torchrun sets it
    ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "8"}, [2]),
    ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "32"}, [1]),
    ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "8"}, []),  # the user's choice
])  # fmt: skip
def test_offloading_uses_its_share_of_the_cores(environ, threads, monkeypatch):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    engine.ranks.use_all_cores()
    assert taken == threads


def test_a_gpu_before_8_0_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(InputError, match=r"^Tesla T4 has compute capability 7\.5; .* 8\.0 or ne"):
        engine.ranks.start_ranks()
    assert not torch.distributed.is_initialized()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    engine.ranks.require_flash(torch.device("cuda", 0))


EXACT = {"PYTORCH_CUDA_ALLOC_CONF": "pinned_max_round_threshold_mb:1"}
USERS = [{"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}]


@pytest.mark.parametrize("release, environ, expected", [
    ("2.13.0+cu130", {}, EXACT),
    ("3.0.1", {}, EXACT),
    ("2.12.1", {}, {}),  # it rejects the unknown name
    *[("2.13.0", chosen, chosen) for chosen in USERS],
])  # fmt: skip
def test_pinned_memory_is_exact_unless_the_user_chose(release, environ, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(environ))
    monkeypatch.setattr(hoi_r1, "version", lambda package: release)
    hoi_r1.pin_exact_sizes()
    assert os.environ == expected


def test_pinned_memory_of_the_3b_is_what_the_docs_say():
    """PyTorch pins each parameter and each gradient on its own, and no moments of AdamW."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(model_config(SIZES["3b"]))
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    exact = 4 * sum(sizes)  # parameter, gradient and two moments
    rounded = 2 * sum(sizes) + 2 * sum(1 << (size - 1).bit_length() for size in sizes)
    assert (round(rounded / 1e9), round(exact / 1e9)) == (76, 60)
    memory = (Path(hoi_r1.__file__).parent / "docs" / "memory.md").read_text()
    assert "state needs 60 GB" in memory and "need 76 GB" in memory
