"""What small and old GPUs, and the hosts of offloaded training, need; on a CPU."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from transformers import Qwen2_5_VLForConditionalGeneration

import engine.model.policy
import engine.ranks
import hoi_r1
from engine.model.packing import chunk_logprobs, head_logprobs
from hicodet import InputError
from tests.bench_models import SIZES, model_config

MEMORY = Path(__file__).resolve().parents[1] / "docs" / "memory.md"


@pytest.fixture
def compiled_head(monkeypatch):
    """The inputs of the graphs that a GPU compiles of the head, on a CPU."""
    inputs = []

    def note(graph, given):
        inputs.extend(given)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=note)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(
        engine.model.packing, "chunk_logprobs", lambda t, compiled: chunk_logprobs(t, compiled=True)
    )
    chunk_logprobs.cache_clear()
    torch._dynamo.reset()
    yield inputs
    chunk_logprobs.cache_clear()
    torch._dynamo.reset()


def test_the_compiled_head_has_no_scalar_of_the_cpu(compiled_head):
    """Whose code needs a C++ compiler. At two temperatures its log-probs are PyTorch's own."""
    head, banned = torch.nn.Linear(8, 50, bias=False), torch.arange(50) % 5 == 1
    hidden, ids = torch.randn(7, 8), torch.arange(7) * 5
    for temperature in (1.0, 0.7):
        found = head_logprobs(head, hidden, ids, temperature, banned)
        logits = head(hidden).masked_fill(banned, -torch.inf) / temperature
        torch.testing.assert_close(found, -F.cross_entropy(logits, ids, reduction="none"))
    tensors = [x for x in compiled_head if isinstance(x, torch.Tensor)]
    assert len(tensors) >= 8 and all(x.dim() > 0 for x in tensors)


# Cores and GPUs


@pytest.mark.parametrize(
    "environ, threads",
    [
        ({}, [16]),
        ({"OMP_NUM_THREADS": "1"}, [16]),  # as torchrun sets it
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "8"}, [2]),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "32"}, [1]),
        ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "8"}, []),  # the user's
    ],
)
def test_offloading_takes_its_share_of_the_cores(environ, threads, monkeypatch):
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


# Pinned memory


def test_the_host_memory_of_offloading_is_what_the_documents_say():
    """PyTorch pins each parameter and each gradient on its own; AdamW's moments are not pinned."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(model_config(SIZES["3b"]))
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    exact = 4 * sum(sizes)  # parameter, gradient and two moments
    rounded = 2 * sum(sizes) + 2 * sum(1 << (size - 1).bit_length() for size in sizes)
    assert (round(rounded / 1e9), round(exact / 1e9)) == (76, 60)
    assert "76 GB for the 60 GB" in hoi_r1.pin_exact_sizes.__doc__
    assert "60 GB" in MEMORY.read_text() and "76 GB" in MEMORY.read_text()


EXACT = {"PYTORCH_CUDA_ALLOC_CONF": "pinned_max_round_threshold_mb:1"}
USERS = [{"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}]


@pytest.mark.parametrize(
    "release, environ, expected",
    [
        ("2.13.0+cu130", {}, EXACT),
        ("3.0.1", {}, EXACT),
        ("2.12.1", {}, {}),  # which stops at the name
        *[("2.13.0", chosen, chosen) for chosen in USERS],
    ],
)
def test_pinned_memory_is_exact_unless_the_user_chose(release, environ, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(environ))
    monkeypatch.setattr(hoi_r1, "version", lambda package: release)
    hoi_r1.pin_exact_sizes()
    assert os.environ == expected
