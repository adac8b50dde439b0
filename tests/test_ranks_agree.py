"""What must be the same on all ranks is compared before anything is written."""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.model.model_files import weights_fingerprint
from engine.ranks import Ranks, on_first, require_agreement
from engine.runs.run_folder import open_run
from hicodet import InputError
from tests.runs import config_of, free_port

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Thread(Ranks):
    """One of two ranks in threads of this process, which exchange what they gather."""

    barrier: threading.Barrier
    parts: list

    def gather(self, rows, group=None):
        self.parts[self.rank] = rows
        self.barrier.wait()
        gathered = [row for part in self.parts for row in part]
        self.barrier.wait()
        return gathered


def on_both(act) -> list:
    """What act(ranks) returns on each of two ranks, or the exception that ends it."""
    shared = torch.device("cpu"), threading.Barrier(2, timeout=30), [None, None]

    def one(rank):
        try:
            return act(Thread(rank, 2, *shared))
        except (InputError, SystemExit) as end:
            return end

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(one, (0, 1)))


def refusal(ends: list) -> str:
    """The line of the first rank. The other one ends in silence."""
    first, second = ends
    assert type(first) is InputError and type(second) is SystemExit and second.code == 1, ends
    return str(first)


def test_first_difference_is_named():
    one = {"data": "/a", "seed": 0, "weights": "1"}

    def compared(**changes):
        both = one, one | changes
        names = {"weights": "content of --model"}
        return on_both(lambda r: require_agreement(both[r.rank], {"data"}, r, names))

    assert compared(data="/b") == [None, None]
    said = refusal(compared(seed=1, weights="2"))
    assert said.startswith("ranks must agree: --seed 0 on rank 0 (")
    assert ", 1 on rank 1 (" in said and "weights" not in said
    assert "content of --model 1 on rank 0 (" in refusal(compared(weights="2"))


def test_fault_of_the_first_rank_ends_all():
    def act():
        raise PermissionError(13, "Permission denied", "/out")

    assert refusal(on_both(lambda ranks: on_first(ranks, act))) == (
        "[Errno 13] Permission denied: '/out'"
    )
    assert on_both(lambda ranks: on_first(ranks, lambda: "made")) == ["made", None]


def test_folder_of_each_host_is_refused(folder, tmp_path):
    """As where --out is on a disk of each host."""
    config = config_of("sft", folder, tmp_path)
    settings = {"model": config.model, "stage": "sft"}

    def opened(*outs):
        return on_both(lambda r: open_run(str(tmp_path / outs[r.rank]), config, settings, r))

    said = refusal(opened("one", "two"))
    assert said == f"--out {tmp_path / 'one'} must be one folder that all hosts share"
    assert not (tmp_path / "one" / "config.json").exists() and not (tmp_path / "two").exists()
    runs = opened("one", "one")
    runs[0].finish()
    assert (tmp_path / "one" / "config.json").exists()


def test_first_values_of_all_weights_count(folder, tmp_path):
    """Here those of one bias."""
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    before = weights_fingerprint(str(tmp_path / "model"))
    assert before == weights_fingerprint(str(folder / "model"))
    name = max(name for name in weights if name.endswith("bias"))
    weights[name][0] += 1e-3
    (tmp_path / "model" / "model.safetensors").unlink()
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert weights_fingerprint(str(tmp_path / "model")) != before


def test_options_in_which_hosts_may_differ(folder):
    """Where files are and how they are read; nothing that changes the result."""
    for stage in ("sft", "grpo", "predict"):
        differ = config_of(stage, folder, "x").per_host()
        traces = {"traces"} if stage == "sft" else set()
        assert differ == {"model", "adapter", "data", "exclude", "out", "workers"} | traces


@pytest.mark.slow
def test_rank_that_waits_in_vain_ends_with_the_reason():
    """The other one has joined and then stops, like a host whose link is cut."""
    code = (
        "import sys; from datetime import timedelta; from engine.ranks import start_ranks; "
        "ranks = start_ranks(timedelta(seconds=2)); print('joined', flush=True); "
        "ranks.rank and sys.stdin.read(); ranks.gather([0])"
    )
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    waits, silent = (
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **place, "RANK": rank},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    )  # fmt: skip
    try:
        assert [one.stdout.readline() for one in (waits, silent)] == ["joined\n"] * 2
        _, errors = waits.communicate(timeout=60)
        assert waits.returncode == 1 and "Timed out waiting 2000ms" in errors
    finally:
        waits.kill()
        silent.communicate("")
