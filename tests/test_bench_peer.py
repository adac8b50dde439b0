"""A step by TRL's GRPOTrainer: the same work as ours, in an environment of its own."""

from dataclasses import replace

import pytest
import torch

from tests import bench, bench_peer
from tests.bench_measure import Runs
from tests.bench_models import SIZES


def test_without_trl_the_bench_is_skipped_and_says_so(monkeypatch, capsys):
    def refuse(folder):
        raise bench_peer.Unavailable("No matching distribution found for trl")

    monkeypatch.setattr(bench_peer, "environment", refuse)
    bench.main(["step", "--peer", "trl"])
    said = "skipped: TRL cannot be installed here (No matching distribution found for trl)\n"
    assert capsys.readouterr().out == said


def test_a_peer_is_one_of_a_step(capsys):
    with pytest.raises(SystemExit):
        bench.main(["update", "--peer", "trl"])
    assert "--peer trl: only of step" in capsys.readouterr().err


@pytest.mark.slow
def test_gradient_of_trl_is_ours():
    """On its completions; its log has four digits."""
    size = replace(SIZES["tiny"], text_tokens=33, grid=(2, 3), sampled=6)
    try:
        found = bench_peer.bench_peer(size, torch.device("cpu"), Runs(1, True))
    except bench_peer.Unavailable as error:
        pytest.skip(str(error))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    details = found.details
    assert details["prompt"] == 33 + 6
    assert details["grad_norm_on_its_completions"] == pytest.approx(
        details["grad_norm_of_trl"], rel=1e-3)
