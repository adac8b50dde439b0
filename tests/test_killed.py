"""kill -9 at random moments, in saving and in export too, each time resumed at once.

Twenty kills over the three stages: what each run comes to is, bit for bit, what it comes to
undisturbed. With the default image workers, which must let go of the killed run's folder.
"""

import multiprocessing
import random
import secrets
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hoi_r1

# forked from a process that has all imported and has done nothing: not from this one, whose
# threads, of tests before, a fork would lack
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["hoi_r1", "predict", "train"])
FLAGS = {
    "sft": "--traces {folder}/traces.jsonl --untraced skip --batch-size 4 --max-steps 14",
    "grpo": "--batch-size 3 --max-steps 10 --max-new-tokens 12",
    "predict": "--split train --max-new-tokens 30 --slots 2",
}
TRAINING = " --learning-rate 1e-3 --save-every 1 --export-every 2"
# moments, and how often a run is killed at them: 20 in all
KILLS = {
    "sft": {"starting": 1, "logging": 2, "saving": 3, "exporting": 2},
    "grpo": {"starting": 1, "logging": 2, "saving": 2, "exporting": 2},
    "predict": {"starting": 1, "logging": 3, "ending": 1},
}
FILES = {  # that are there at a moment
    "saving": "checkpoint-*.tmp",
    "exporting": "model*.tmp",
    "ending": "summary.json*",  # before predictions.jsonl and report.html
}


def command(stage, folder, out) -> list[str]:
    line = f"{stage} --model {folder}/model --data {folder}/data --out {out} "
    line += "--no-task-description " + FLAGS[stage].format(folder=folder)
    return [*line.split(), *(TRAINING.split() if stage != "predict" else ())]


def start(line: list[str]) -> multiprocessing.process.BaseProcess:
    """The command line in a process of its own."""
    process = SERVER.Process(target=hoi_r1.main, args=(line,))
    process.start()
    return process


def finish(line: list[str]) -> None:
    process = start(line)
    process.join()
    assert process.exitcode == 0


def logged(out: Path) -> int:
    """Lines that a run has logged, or predictions."""
    logs = [*out.glob("metrics.jsonl"), *out.glob("part-*.jsonl")]
    return sum(len(log.read_bytes().splitlines()) for log in logs)


def locked(out: Path) -> int:
    """When a run took the folder, and had removed what a kill left."""
    lock = out / "run.lock"
    return lock.stat().st_mtime_ns if lock.exists() and lock.stat().st_size else 0


def kill_at(moment: str, line: list[str], out: Path, rng: random.Random) -> None:
    taken, lines = locked(out), logged(out)
    process = start(line)
    if moment == "starting":
        time.sleep(rng.random())
    else:
        while locked(out) == taken or not happens(moment, out, lines):
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(0.03 * rng.random())
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, moment


def happens(moment: str, out: Path, lines: int) -> bool:
    return logged(out) > lines if moment == "logging" else any(out.glob(FILES[moment]))


@pytest.mark.slow
@pytest.mark.parametrize("stage", KILLS)
def test_killed_again_and_again(stage, folder, tmp_path):
    rng = random.Random(seed := secrets.randbits(31))
    print("seed", seed)  # pytest shows it when the test fails
    finish(command(stage, folder, tmp_path / "whole"))
    moments = [moment for moment, count in KILLS[stage].items() for _ in range(count)]
    rng.shuffle(moments)
    moments.sort(key="ending".__eq__)  # the last line has been written by then
    line = command(stage, folder, tmp_path / "killed") + ["--resume"]
    for moment in moments:
        kill_at(moment, line, tmp_path / "killed", rng)
    finish(line)
    assert not list((tmp_path / "killed").glob("*.tmp"))
    for whole in [*(tmp_path / "whole").glob("model*"), tmp_path / "whole" / "predictions.jsonl"]:
        if whole.exists():
            assert_same(whole, tmp_path / "killed" / whole.name)
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")


def assert_same(whole: Path, killed: Path) -> None:
    """The same weights, or the same predictions."""
    if whole.is_file():
        assert killed.read_text() == whole.read_text()
        return
    expected, found = (load_file(path / "model.safetensors") for path in (whole, killed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected), whole.name
