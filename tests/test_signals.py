"""A run that is ended from outside: what it leaves, and how it goes on."""

import fcntl
import inspect
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
import torch.distributed.launcher.api

import evaluate
import hoi_r1
import teacher
from demo.run import run_command
from engine.runs.run_folder import Run
from engine.signals import resume_command
from tests.runs import config_of, metrics, run, weights
from tests.test_ranks_agree import free_port

ROOT = Path(__file__).resolve().parents[1]

# A trainer whose images are so large that its workers wait for it to take them.
READER = """
import sys

import torch

from engine.model.packing import Prompt
from engine.data.examples import Example
from engine.data.loader import read_ahead
from engine.files import lock

class Examples:
    def __getitem__(self, index):
        return Example("x" * 10**6, Prompt(*torch.zeros(3, 1)), (1, 1), (1, 1), (), None)

file = open(sys.argv[1], "w")
lock(file)
images = read_ahead(Examples(), list(range(100)), workers=2)
next(images)
print("reading", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's signal at a parent's end")
@pytest.mark.slow
def test_image_workers_end_with_a_killed_trainer(tmp_path):
    """They hold its lock: left alone they would keep it from the run that goes on."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path / "lock")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert trainer.stdout.readline() == b"reading\n"
    trainer.kill()
    trainer.wait()
    assert becomes_free(tmp_path / "lock")


def becomes_free(path: Path, seconds: float = 10.0) -> bool:
    """Whether a file's lock can be had in this time."""
    with open(path) as file:
        for _ in range(int(10 * seconds)):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                time.sleep(0.1)
    return False


def start(folder, out, *flags, **environment) -> subprocess.Popen:
    """A small SFT that saves at its end alone, with image workers, in a process of its own."""
    line = f"sft --model {folder}/model --data {folder}/data --traces {folder}/traces.jsonl "
    line += "--untraced skip "
    line += f"--out {out} --no-task-description --batch-size 4 --learning-rate 1e-3 --epochs 4"
    return subprocess.Popen(
        [sys.executable, "hoi_r1.py", *line.split(), *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment})  # fmt: skip


def wait_for_step(process: subprocess.Popen, out: Path) -> None:
    while not ((out / "metrics.jsonl").exists() and metrics(out)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The weights of the run that nothing ends."""
    out = tmp_path_factory.mktemp("whole")
    process = start(folder, out)
    assert process.wait() == 0, process.stderr.read()
    return weights(out)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(number, code, folder, whole, tmp_path):
    """To the weights of the run that nothing ended."""
    process = start(folder, tmp_path)
    wait_for_step(process, tmp_path)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    done = len(metrics(tmp_path))
    said, command = printed.splitlines()[-1].split("; go on with: python ")
    assert said == f"stopped after step {done}" and done < 20
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{done:06d}"]
    subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, check=True)
    assert all(torch.equal(whole[name], found) for name, found in weights(tmp_path).items())


def test_a_signal_while_a_checkpoint_is_written_stops_behind_it(folder, tmp_path, monkeypatch):
    """A step more would wait for images of workers that have got the signal too."""
    save = Run.save

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments)

    monkeypatch.setattr(Run, "save", interrupted)
    run(config_of("sft", folder, tmp_path, max_steps=3, save_every=2))  # ends with exit 0
    assert len(metrics(tmp_path)) == 2 and (tmp_path / "checkpoint-000002").is_dir()


def test_torchrun_has_the_variable_of_the_readme():
    """Which gives its ranks longer than 30 seconds to save after a signal."""
    name = re.search(r"export (TORCH_ELASTIC_\w+)=", (ROOT / "README.md").read_text()).group(1)
    assert f'"{name}"' in inspect.getsource(torch.distributed.launcher.api)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_the_image_workers_too(folder, tmp_path):
    """And SIGTERM of a batch system, which kills them: the step is finished without them."""
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
def test_a_signal_to_one_rank_stops_all(folder, tmp_path):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    both = [start(folder, tmp_path, "--workers", "0", RANK=rank, **place) for rank in "01"]
    wait_for_step(both[0], tmp_path)
    both[1].send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert "stopped after step" in ends[0][0] and "stopped" not in ends[1][0]


@pytest.mark.slow
def test_a_second_signal_ends_at_once():
    """But not the same one again, which torchrun passes on."""
    code = (
        "import signal, time; from engine.signals import Stop\n"
        "with Stop() as stop:\n"
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


@pytest.fixture
def ctrl_c(monkeypatch):
    """Ctrl-C in the first that a program does. The tests keep their own way to end at one."""
    before = signal.getsignal(signal.SIGINT)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hoi_r1, "run_stage", interrupted)
    monkeypatch.setattr(evaluate, "load_split", interrupted)
    monkeypatch.setattr(teacher, "run", interrupted)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("program, line, said", [
    (hoi_r1, "predict --model m --out o --data d", "interrupted; go on with: python hoi --resume"),
    (hoi_r1, "predict --model m --out o --data d --dry-run", "interrupted"),
    (hoi_r1, "predict --model m --out o --image a.jpg", "interrupted"),
    (hoi_r1, "sft --model m --out o --data d", "interrupted; go on with: python hoi --resume"),
    (hoi_r1, "demo", "interrupted"),
    (evaluate, "p.jsonl --data d", "evaluate.py: interrupted"),
    (teacher, "--data d --out t.jsonl", "teacher.py: interrupted; run the same command again to go "
                                        "on"),
])  # fmt: skip
def test_ctrl_c_outside_of_the_steps_is_one_line(program, line, said, ctrl_c, monkeypatch, capsys):
    """And under torchrun that of the first rank."""
    monkeypatch.setattr(sys, "argv", ["hoi"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # `python -m pytest` has one
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(BaseException) as ended:
            program.main(line.split())
        assert ended.type is SystemExit and ended.value.code == 130
        assert capsys.readouterr().err == ("" if rank == "1" else f"\n{said}\n")


def test_the_command_that_goes_on_starts_a_module_as_it_was(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/demo/base.py", "a b", "--out", "o"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", ModuleSpec("demo.base", None))
    assert resume_command() == "python -m demo.base 'a b' --out o --resume"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    expected = "torchrun --nproc_per_node 2 -m demo.base 'a b' --out o --resume"
    assert resume_command() == expected
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert resume_command() == expected.replace("-m demo.base", "/somewhere/demo/base.py")


# as torchrun, which ends its rank, of another session, in its own time. As in a terminal: both get
# Ctrl-C
AS_TORCHRUN = """
import os, signal, subprocess, time
rank = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(rank.pid, flush=True)
try:
    os.kill(os.getppid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    rank.kill()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the rank is looked for in /proc")
def test_ctrl_c_leaves_no_command_of_the_demo_behind(tmp_path, capfd):
    (tmp_path / "torchrun.py").write_text(AS_TORCHRUN)
    with pytest.raises(KeyboardInterrupt):
        run_command([str(tmp_path / "torchrun.py")])
    assert ends(capfd.readouterr().out.splitlines()[-1])


def ends(pid: str, seconds: float = 5.0) -> bool:
    """Whether a process is gone, or waits for one that asks how it ended, in this time."""
    for _ in range(int(50 * seconds)):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False
