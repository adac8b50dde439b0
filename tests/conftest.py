"""Settings of all tests, made before torch is imported, and what several of them share."""

import os
from pathlib import Path

import pytest

import hicodet

os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, and two ranks fit on two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask a hub

def pytest_configure(config):
    """No GPU for the tests that are not about one: bit for bit is a promise for the CPU."""
    if config.getoption("-m") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


HICO_DET = Path(__file__).resolve().parents[2] / "shared" / "hico_det"


@pytest.fixture(scope="session")
def real_samples():
    """The real test annotations of HICO-DET, 9,658 images."""
    if not (HICO_DET / "anno_bbox.mat").is_file():
        pytest.skip("the annotations of HICO-DET are not beside the repository")
    return hicodet.load_split(HICO_DET, "test")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The toy data, a tiny model and traces, as the demo has them but smaller."""
    from demo import toy  # torch, which must not be imported before the settings above
    from tests import runs

    folder = tmp_path_factory.mktemp("toy")
    toy.main([str(folder), "--train", "24", "--test", "6"])
    toy.tiny_model(3).save_pretrained(folder / "model")
    runs.write_traces(folder, 20)
    return folder


@pytest.fixture
def ranks():
    """A process group of this process alone."""
    import torch

    import engine.policy

    ranks = engine.policy.start_ranks()
    yield ranks
    torch.distributed.destroy_process_group()
