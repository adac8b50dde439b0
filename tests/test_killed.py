"""kill -9 at random moments, also while saving and exporting; the run is resumed each time.

After twenty kills in three stages the results equal those of an undisturbed run to the bit. Image
workers of a killed run must release its folder.
"""

import multiprocessing
import random
import secrets
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import hoi_r1
from tests.runs import SERVER, same_weights

FLAGS = {
    "sft": "--traces {folder}/traces.jsonl --untraced skip --batch-size 4 --max-steps 14",
    "grpo": "--batch-size 3 --max-steps 10 --max-new-tokens 12",
    "predict": "--split train --max-new-tokens 30 --slots 2",
}
TRAINING = " --learning-rate 1e-3 --save-every 1 --export-every 2"
# how often a run is killed at each moment: 20 times in all
KILLS = {
    "sft": {"starting": 1, "logging": 2, "saving": 3, "exporting": 2},
    "grpo": {"starting": 1, "logging": 2, "saving": 2, "exporting": 2},
    "predict": {"starting": 1, "logging": 3, "ending": 1},
}
FILES = {  # files that exist at a moment
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
    """Number of lines in a run's logs, or of predictions."""
    logs = [*out.glob("metrics.jsonl"), *out.glob("part-*.jsonl")]
    return sum(len(log.read_bytes().splitlines()) for log in logs)


def locked(out: Path) -> int:
    """Time at which a run wrote its settings; it has removed *.tmp by then."""
    config = out / "config.json"
    return config.stat().st_mtime_ns if config.exists() else 0


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
    moments.sort(key="ending".__eq__)  # last, as all lines are written by then
    line = command(stage, folder, tmp_path / "killed") + ["--resume"]
    for moment in moments:
        kill_at(moment, line, tmp_path / "killed", rng)
    finish(line)
    assert not list((tmp_path / "killed").glob("*.tmp"))
    outs = [tmp_path / name for name in ("whole", "killed")]
    for model in (path.name for path in outs[0].glob("model*")):
        assert same_weights(*(load_file(out / model / "model.safetensors") for out in outs)), model
    if stage == "predict":
        assert len({(out / "predictions.jsonl").read_text() for out in outs}) == 1
    assert logged(outs[0]) == logged(outs[1])
