"""A run that is ended from outside: what it leaves, and how it goes on."""

import fcntl
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A trainer whose images are so large that its workers wait for it to take them.
READER = """
import sys

import torch

from engine.attention import Prompt
from engine.examples import Example, read_ahead
from engine.files import lock

class Examples:
    def __getitem__(self, index):
        return Example("x" * 10**6, Prompt(*torch.zeros(3, 1)), (1, 1), (), None)

file = open(sys.argv[1], "w")
lock(file)
images = read_ahead(Examples(), list(range(100)), workers=2)
next(images)
print("reading", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's signal at a parent's end")
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
