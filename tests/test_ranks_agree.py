"""Ranks must agree before anything is written, and how long they wait for each other."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
from safetensors.torch import load_file, save_file

import hoi_r1
from engine.model.model_files import weights_fingerprint
from engine.ranks import Ranks, on_first, require_agreement, start_ranks
from engine.runs.run_folder import RunFolder, open_run
from hicodet import InputError
from tests.runs import SFT_LINE, config_of, on_two_ranks


@dataclass(frozen=True)
class Thread(Ranks):
    """One of two ranks, which are threads of this process and gather through a list."""

    barrier: threading.Barrier
    parts: list

    def gather(self, rows, group=None):
        self.parts[self.rank] = rows
        self.barrier.wait()
        gathered = [row for part in self.parts for row in part]
        self.barrier.wait()
        return gathered


def on_both(act) -> list:
    """The result of act(ranks) on each of two ranks, or the exception that ended it."""
    shared = torch.device("cpu"), threading.Barrier(2, timeout=30), [None, None]

    def one(rank):
        try:
            return act(Thread(rank, 2, *shared))
        except (InputError, SystemExit) as end:
            return end

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(one, (0, 1)))


def refusal(ends: list) -> str:
    """The error line of the first rank. The other one ends without any."""
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
    """Each host has its own disk at --out."""
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


def test_fingerprint_reads_all_weights(folder, tmp_path):
    """Another first value of one bias changes it."""
    shutil.copytree(folder / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    before = weights_fingerprint(str(tmp_path / "model"))
    assert before == weights_fingerprint(str(folder / "model"))
    name = max(name for name in weights if name.endswith("bias"))
    weights[name][0] += 1e-3
    (tmp_path / "model" / "model.safetensors").unlink()
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert weights_fingerprint(str(tmp_path / "model")) != before


def export_slowly(words: list[str]) -> None:
    """Run a command that takes 4 seconds to write its model."""
    write_model = RunFolder._write_model

    def slowly(*arguments):
        time.sleep(4)
        write_model(*arguments)

    RunFolder._write_model = slowly
    hoi_r1.main(words)


@pytest.mark.slow
def test_export_may_take_longer_than_timeout(folder, tmp_path):
    """--timeout is 2 seconds. The other rank waits in `patient_group` for the first."""
    line = SFT_LINE.format(folder=folder).removeprefix("hoi_r1.py ")
    line += f" --out {tmp_path} --max-steps 1 --workers 0 --timeout 0.0334"
    on_two_ranks(export_slowly, line.split())
    assert (tmp_path / "model" / "model.safetensors").exists()


def wait_for_silent_rank() -> str:
    """The error that ends the first rank. The other one joins, and then does nothing."""
    ranks = start_ranks(timedelta(seconds=2))
    if ranks.rank:
        time.sleep(5)
        return ""
    with pytest.raises(RuntimeError) as ended:
        ranks.gather([0])
    return str(ended.value)


@pytest.mark.slow
def test_rank_that_waits_in_vain_ends_with_the_reason():
    """The other rank is silent, like a host whose link is cut."""
    assert "Timed out waiting 2000ms" in "".join(on_two_ranks(wait_for_silent_rank))
