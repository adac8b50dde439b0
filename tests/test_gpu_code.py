"""A GPU's code compiles without a GPU; tests/gpu_emulation.py says what is real and what is fake.

    python -m pytest -m slow tests/test_gpu_code.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
GPUS = ("h200", "a100", "4090")
PARTS = ("text layer", "vision block", "head")
MOST_SPILLED = 64  # bytes per thread


@pytest.fixture(scope="module")
def emulation():
    """The module, after it has installed what it needs."""
    from tests import gpu_emulation  # slow: it imports all of Inductor

    try:
        gpu_emulation.prepare()
    except gpu_emulation.Unavailable as reason:
        pytest.skip(str(reason))
    return gpu_emulation


def emulate(*words: str) -> list[dict]:
    """Run the emulation in a process of its own. Returns the lines that it prints."""
    command = [sys.executable, "-m", "tests.gpu_emulation", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)  # pytest shows it when the test fails
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fit(kernels: list[dict], gpu) -> None:
    """No kernel spills much or needs more shared memory than the GPU has."""
    assert [kernel for kernel in kernels if kernel["spills"] > MOST_SPILLED] == []
    assert max(kernel["shared"] for kernel in kernels) <= gpu.shared_memory


@pytest.mark.parametrize("gpu", GPUS)
def test_decoding_steps_compile(gpu, emulation):
    """Greedy and sampling, of three models and of LoRA, with 5 to 128 queries per slot."""
    kernels = emulate("decode", "--gpu", gpu)
    attention = [row["part"] for row in kernels if row["kernel"].startswith(emulation.ATTENTION)]
    assert attention == list(emulation.STEPS)
    assert_fit(kernels, emulation.GPUS[gpu])


@pytest.mark.parametrize("gpu", GPUS)
def test_update_compiles(gpu, emulation):
    kernels = emulate("train", "--gpu", gpu)
    parts = {f"{part} {way}" for part in PARTS for way in ("forward", "backward")}
    assert {kernel["part"] for kernel in kernels} == parts
    assert_fit(kernels, emulation.GPUS[gpu])


def test_attention_kernel_equals_scores_in_memory(emulation):
    found = emulate("interpret")
    assert [row["part"] for row in found] == list(emulation.INTERPRETED)
    assert max(row["off"] for row in found) < 1e-5
