"""Ranks must agree before anything is written, and how long they wait for each other."""

import shutil
import time
from datetime import timedelta
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import hoi_r1
from engine.model.model_files import weights_fingerprint
from engine.ranks import on_first, require_agreement, start_ranks
from engine.runs.run_folder import open_run
from hicodet import InputError
from tests.runs import SFT_LINE, config_of, on_two_ranks


def refuse_on_a_rank(config, out: str) -> dict[str, str]:
    """How this rank ends if settings differ, if the first rank fails, and if each has its --out."""
    ranks, ends = start_ranks(), {}

    def compare(**mine):
        require_agreement(mine, {"data"}, ranks, {"weights": "content of --model"})

    def fail():
        raise PermissionError(13, "Permission denied", "/out")

    compare(data=f"/{ranks.rank}")  # may differ
    settings = {"model": config.model, "stage": "sft"}
    for name, act in {
        "options": lambda: compare(seed=ranks.rank, weights=ranks.rank),
        "content": lambda: compare(seed=0, weights=ranks.rank),
        "fault": lambda: on_first(ranks, fail),
        "folder": lambda: open_run(f"{out}{ranks.rank}", config, settings, ranks),
    }.items():
        try:
            act()
        except (InputError, SystemExit) as end:
            ends[name] = f"{type(end).__name__} {end}"
    return ends


@pytest.fixture(scope="module")
def said(folder, tmp_path_factory):
    """The error lines of the first rank. The other one ends without any."""
    out = tmp_path_factory.mktemp("runs") / "out"
    ends = on_two_ranks(refuse_on_a_rank, config_of("sft", folder, out), str(out))
    silent, first = sorted(ends, key=lambda each: "InputError" in each["fault"])
    assert set(silent.values()) == {"SystemExit 1"} and len(silent) == len(first)
    assert not Path(f"{out}0/config.json").exists() and not Path(f"{out}1").exists()
    return {name: line.removeprefix("InputError ") for name, line in first.items()}


def test_first_difference_is_named(said):
    assert said["options"].startswith("ranks must agree: --seed 0 on rank 0 (")
    assert ", 1 on rank 1 (" in said["options"] and "weights" not in said["options"]
    assert "content of --model 0 on rank 0 (" in said["content"]


def test_fault_of_the_first_rank_ends_all(said):
    assert said["fault"] == "[Errno 13] Permission denied: '/out'"


def test_folder_of_each_host_is_refused(said):
    """Each host has its own disk at --out."""
    assert said["folder"].endswith("out0 must be one folder that all hosts share")


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
    save = PreTrainedModel.save_pretrained

    def slowly(*arguments, **options):
        time.sleep(4)
        save(*arguments, **options)

    PreTrainedModel.save_pretrained = slowly
    hoi_r1.main(words)


@pytest.mark.slow
def test_export_may_take_longer_than_timeout(folder, tmp_path):
    """--timeout is 2 seconds. The other rank waits for the first without that limit."""
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
