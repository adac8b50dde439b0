"""A run on two hosts, here two torchrun agents: the weights are equal to the bit."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runs import SFT_LINE, free_port, metrics, same_weights, weights

ROOT = Path(__file__).resolve().parents[1]
PAUSE = 20.0  # seconds for which a rank is stopped

pytestmark = pytest.mark.slow


class Hosts:
    """An SFT on two hosts. second: flags that only the second host has."""

    def __init__(self, folder, out: Path, *flags: str, second: str = ""):
        self.out = out
        place = f"--nnodes 2 --nproc_per_node 1 --master_addr 127.0.0.1 --master_port {free_port()}"
        line = f"{SFT_LINE.format(folder=folder)} --out {out} --max-steps 12 --save-every 1"
        self.agents = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *place.split(), "--node_rank",
                 str(host), *line.split(), *flags, *(second.split() if host else ())],
                cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"})
            for host in (0, 1)
        ]  # fmt: skip

    def wait_for_step(self) -> None:
        while not ((self.out / "metrics.jsonl").exists() and metrics(self.out)):
            assert all(agent.poll() is None for agent in self.agents), self.end()
            time.sleep(0.02)

    def rank(self, host: int) -> int:
        """Process id of the rank on a host."""
        agent = self.agents[host].pid
        return int(Path(f"/proc/{agent}/task/{agent}/children").read_text())

    def end(self) -> tuple[list[int], str]:
        """Wait for both hosts. Returns their exit codes and errors."""
        errors = [agent.communicate()[1] for agent in self.agents]
        return [agent.returncode for agent in self.agents], "".join(errors)


def weights_of(hosts: Hosts) -> dict:
    codes, errors = hosts.end()
    assert codes == [0, 0], errors
    return weights(hosts.out)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The weights of an undisturbed run."""
    return weights_of(Hosts(folder, tmp_path_factory.mktemp("whole")))


def test_rank_that_is_stopped_for_a_while_is_waited_for(folder, whole, tmp_path):
    hosts = Hosts(folder, tmp_path)
    hosts.wait_for_step()
    rank = hosts.rank(1)
    os.kill(rank, signal.SIGSTOP)
    time.sleep(PAUSE)
    assert len(metrics(tmp_path)) < 12 and hosts.agents[0].poll() is None
    os.kill(rank, signal.SIGCONT)
    assert same_weights(whole, weights_of(hosts))


@pytest.mark.parametrize("host", [0, 1])
def test_killed_rank_ends_both_and_the_run_resumes(host, folder, whole, tmp_path):
    hosts = Hosts(folder, tmp_path)
    hosts.wait_for_step()
    os.kill(hosts.rank(host), signal.SIGKILL)
    codes, errors = hosts.end()
    assert all(codes), errors
    assert not (tmp_path / "model").exists()
    assert same_weights(whole, weights_of(Hosts(folder, tmp_path, "--resume")))


@pytest.mark.parametrize("second, said", [
    ("--learning-rate 0.5", "--learning-rate 0.001 on rank 0 .*, 0.5 on rank 1 "),
    ("--out {out}2", "--out {out} must be one folder that all hosts share"),
])  # fmt: skip
def test_hosts_that_disagree_end(second, said, folder, tmp_path):
    out = tmp_path / "run"
    codes, errors = Hosts(folder, out, second=second.format(out=out)).end()
    assert codes == [1, 1], errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert re.search(said.format(out=out), line)
    assert not (out / "config.json").exists()
