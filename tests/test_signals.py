"""Signals: a run saves, stops and continues."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate
import hoi_r1
import teacher
from demo.run import run_command
from engine.signals import StopSignal
from tests.runs import SFT_LINE, free_port, metrics, same_weights, weights

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def default_handler():
    """Python's own handler of Ctrl-C. Commands that a script starts with `&` ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def start(folder, out, *flags, **environment) -> subprocess.Popen:
    """A small SFT without regular checkpoints, with image workers, in a process of its own."""
    line = f"{SFT_LINE.format(folder=folder)} --out {out} --epochs 4"
    return subprocess.Popen(
        [sys.executable, *line.split(), *flags], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment},
    )  # fmt: skip


def wait_for_step(process: subprocess.Popen, out: Path) -> None:
    while not ((out / "metrics.jsonl").exists() and metrics(out)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The weights of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    process = start(folder, out)
    assert process.wait() == 0, process.stderr.read()
    return weights(out)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_saves_and_says_how_to_continue(number, code, folder, whole, tmp_path):
    """Resumed, it ends with the weights of the uninterrupted run."""
    process = start(folder, tmp_path)
    wait_for_step(process, tmp_path)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors, errors
    done = len(metrics(tmp_path))
    said = f"stopped after step {done}; to continue, add --resume to the same command"
    assert printed.splitlines()[-1] == said and done < 20
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{done:06d}"]
    assert start(folder, tmp_path, "--resume").wait() == 0
    assert same_weights(whole, tmp_path)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_the_image_workers_too(folder, tmp_path):
    """A batch system's SIGTERM also kills them. The run finishes the step without them."""
    process = start(folder, tmp_path)
    wait_for_step(process, tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    for number in (signal.SIGINT, signal.SIGTERM):
        for pid in [process.pid, *map(int, children)]:
            os.kill(pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors


@pytest.mark.slow
def test_signal_to_one_rank_stops_all(folder, tmp_path):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [start(folder, tmp_path, "--workers", "0", RANK=rank, **place) for rank in "01"]
    wait_for_step(both[0], tmp_path)
    both[1].send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert "stopped after step" in ends[0][0] and "stopped" not in ends[1][0]


@pytest.mark.slow
def test_second_signal_ends_at_once():
    """A copy within a second does not: torchrun passes signals on."""
    code = (
        "import signal, time; from engine.signals import StopSignal\n"
        "with StopSignal() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        time.sleep(0.01)\n"
        "        if stop.signal and time.monotonic() - stop.since > 1.2:\n"
        "            print('waits', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.terminate()
    process.terminate()
    assert process.stdout.readline() == b"waits\n"
    process.terminate()
    assert process.wait(timeout=30) == -signal.SIGTERM


def test_signal_that_is_ignored_stays_ignored():
    """A script that starts `python ... &` ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


@pytest.fixture
def ctrl_c(monkeypatch):
    """Ctrl-C at the start of a program's work."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hoi_r1, "run_stage", interrupted)
    monkeypatch.setattr(evaluate, "load_split", interrupted)
    monkeypatch.setattr(teacher, "run", interrupted)


ADD_RESUME = "interrupted; to continue, add --resume to the same command"


@pytest.mark.parametrize("program, line, said", [
    (hoi_r1, "predict --model m --out o --data d", ADD_RESUME),
    (hoi_r1, "predict --model m --out o --data d --dry-run", "interrupted"),
    (hoi_r1, "predict --model m --out o --image a.jpg", "interrupted"),
    (hoi_r1, "sft --model m --out o --data d", ADD_RESUME),
    (evaluate, "p.jsonl --data d", "evaluate.py: interrupted"),
    (teacher, "--data d --out t.jsonl",
     "teacher.py: interrupted; run the same command again to go on"),
])  # fmt: skip
def test_ctrl_c_outside_of_the_steps_is_one_line(program, line, said, ctrl_c, monkeypatch, capsys):
    """Under torchrun the first rank prints it."""
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(BaseException) as ended:
            program.main(line.split())
        assert ended.type is SystemExit and ended.value.code == 130
        assert capsys.readouterr().err == ("" if rank == "1" else f"\n{said}\n")


# Both processes receive Ctrl-C, as in a terminal. The child needs a while to end, as torchrun does.
AS_TORCHRUN = """
import os, signal, time
print(os.getpid(), flush=True)
try:
    os.kill(os.getppid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
"""


def test_ctrl_c_in_the_demo_waits_for_its_command(tmp_path, capfd):
    (tmp_path / "torchrun.py").write_text(AS_TORCHRUN)
    with pytest.raises(KeyboardInterrupt):
        run_command([str(tmp_path / "torchrun.py")])
    with pytest.raises(ProcessLookupError):
        os.kill(int(capfd.readouterr().out.splitlines()[-1]), 0)
