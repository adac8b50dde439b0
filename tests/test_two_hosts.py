"""A run on two hosts, of which one is stopped, killed, or cut off: the same bits in the end.

Two agents of torchrun on this machine stand for the hosts; for the cut link, in two network
namespaces.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.runs import metrics, weights
from tests.test_ranks_agree import free_port

ROOT = Path(__file__).resolve().parents[1]
PAUSE, CUT = 30.0, 5.0  # seconds that a rank stands still, and that a link is cut
HERE = [[], []]  # what the agents are started by

pytestmark = pytest.mark.slow


class Hosts:
    """An SFT on two hosts under way."""

    def __init__(self, folder, out: Path, *flags: str, inside=HERE, address="127.0.0.1", **names):
        self.out, port = out, free_port()
        line = f"hoi_r1.py sft --model {folder}/model --data {folder}/data --out {out} --traces "
        line += f"{folder}/traces.jsonl --untraced skip --no-task-description --batch-size 4 "
        line += "--learning-rate 1e-3 --max-steps 12 --save-every 1"
        place = f"--nnodes 2 --nproc_per_node 1 --master_addr {address} --master_port {port}"
        self.agents = [
            subprocess.Popen(
                [*before, sys.executable, "-m", "torch.distributed.run", *place.split(),
                 "--node_rank", str(host), *line.split(), *flags],
                cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **names})
            for host, before in enumerate(inside)
        ]  # fmt: skip

    def wait_for_step(self) -> None:
        while not ((self.out / "metrics.jsonl").exists() and metrics(self.out)):
            assert all(agent.poll() is None for agent in self.agents), self.end()
            time.sleep(0.02)

    def rank(self, host: int) -> int:
        """The process of the trainer on a host."""
        agent = self.agents[host].pid
        return int(Path(f"/proc/{agent}/task/{agent}/children").read_text())

    def end(self) -> tuple[list[int], str]:
        """Exit codes and what was printed, when both have ended."""
        errors = [agent.communicate()[1] for agent in self.agents]
        return [agent.returncode for agent in self.agents], "".join(errors)


def assert_ends_well(hosts: Hosts, whole: dict) -> None:
    codes, errors = hosts.end()
    assert codes == [0, 0], errors
    assert all(torch.equal(whole[name], found) for name, found in weights(hosts.out).items())


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The weights of the run that nothing disturbs."""
    hosts = Hosts(folder, tmp_path_factory.mktemp("whole"))
    codes, errors = hosts.end()
    assert codes == [0, 0], errors
    return weights(hosts.out)


def test_a_rank_that_stands_still_for_a_while_is_waited_for(folder, whole, tmp_path):
    hosts = Hosts(folder, tmp_path)
    hosts.wait_for_step()
    rank = hosts.rank(1)
    os.kill(rank, signal.SIGSTOP)
    time.sleep(PAUSE)
    assert len(metrics(tmp_path)) < 12 and hosts.agents[0].poll() is None
    os.kill(rank, signal.SIGCONT)
    assert_ends_well(hosts, whole)


@pytest.mark.parametrize("host", [0, 1])
def test_a_killed_rank_ends_both_and_the_run_goes_on(host, folder, whole, tmp_path):
    hosts = Hosts(folder, tmp_path)
    hosts.wait_for_step()
    os.kill(hosts.rank(host), signal.SIGKILL)
    codes, errors = hosts.end()
    assert all(codes), errors
    assert not (tmp_path / "model").exists()
    assert_ends_well(Hosts(folder, tmp_path, "--resume"), whole)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def two_namespaces():
    """Two hosts joined by a cable: what starts a program there, and what pulls the cable."""
    if os.geteuid() or subprocess.run(["ip", "netns", "add", "hoi0"]).returncode:
        pytest.skip("needs root and network namespaces (ip netns)")
    try:
        ip("netns", "add", "hoi1")
        ends = ["cable", "netns", "hoi0", "type", "veth", "peer", "cable", "netns", "hoi1"]
        ip("link", "add", *ends)
        for host in "01":
            ip("-n", f"hoi{host}", "addr", "add", f"10.77.0.{int(host) + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", f"hoi{host}", "link", "set", device, "up")
        yield [["ip", "netns", "exec", f"hoi{host}"] for host in "01"]
    finally:
        for host in "01":
            subprocess.run(["ip", "netns", "delete", f"hoi{host}"])


@pytest.mark.parametrize("seconds", [CUT, None])
def test_a_link_that_is_cut(seconds, two_namespaces, folder, whole, tmp_path):
    """For a while it is waited for; without an end both end by --timeout, and the run goes on."""
    net = {"inside": two_namespaces, "address": "10.77.0.1", "GLOO_SOCKET_IFNAME": "cable"}
    hosts = Hosts(folder, tmp_path, "--timeout", "10" if seconds else "0.5", **net)
    hosts.wait_for_step()
    ip("-n", "hoi1", "link", "set", "cable", "down")
    if seconds:
        time.sleep(seconds)
        ip("-n", "hoi1", "link", "set", "cable", "up")
        return assert_ends_well(hosts, whole)
    codes, errors = hosts.end()
    assert all(codes) and "Timed out" in errors, errors
    ip("-n", "hoi1", "link", "set", "cable", "up")
    assert_ends_well(Hosts(folder, tmp_path, "--resume", **net), whole)
