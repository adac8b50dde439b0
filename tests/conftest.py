"""Settings of all tests, made before torch is imported, and shared fixtures."""

import copy
import os
from pathlib import Path

import pytest

from engine.data import annotations

os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, and two ranks fit on two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask a hub


def pytest_configure(config):
    """Hide GPUs from all but the cuda tests: equality to the bit is promised for the CPU."""
    if config.getoption("-m") != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


HICO_DET = Path(__file__).resolve().parents[2] / "shared" / "hico_det"
PHOTO = Path(__file__).parent / "data" / "coco_000000000785.jpg"


@pytest.fixture(scope="session")
def real_samples():
    """The real test annotations of HICO-DET, 9,658 images."""
    if not (HICO_DET / "anno_bbox.mat").is_file():
        pytest.skip("the annotations of HICO-DET are not next to the repository")
    return annotations.load_split(HICO_DET, "test")


@pytest.fixture(scope="session")
def photo():
    """A real photograph, 640 x 425."""
    return PHOTO


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Toy data, a tiny model and traces, smaller than those of the demo."""
    from tests import runs  # imports torch, which must come after the settings above

    folder = tmp_path_factory.mktemp("toy")
    runs.write_toy(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def sharded_in_parts():
    """Shard small models in parts, as large ones are; not in processes that tests start."""
    import engine.model.policy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.model.policy, "SMALLEST_PART", 0)
        yield


@pytest.fixture(scope="session", autouse=True)
def locked_means_locked():
    """Do not wait for locks that nobody will release; also in forked processes."""
    import engine.files

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.files, "LOCK_SECONDS", 0.0)
        yield


@pytest.fixture
def ranks():
    """A process group with one rank."""
    import torch

    from engine.ranks import start_ranks

    yield start_ranks()
    torch.distributed.destroy_process_group()


@pytest.fixture
def any_reward(monkeypatch):
    """A reward that random text earns too; answers of an untrained model all earn 0."""
    import grpo
    from tests.runs import score_tokens

    monkeypatch.setattr(grpo.GRPO, "score", score_tokens)


@pytest.fixture(scope="module")
def seed():
    """One seed for every run, as tests compare sampled ids.

    The last bits of a row's logits depend on the other rows. With random weights that changes a
    token about once in a thousand runs.
    """
    return 20


@pytest.fixture(scope="module")
def model(seed):
    """The tiny model with group attention."""
    from demo.toy import tiny_model
    from engine.model.attention import use_group_attention

    return use_group_attention(tiny_model(seed))


@pytest.fixture(scope="module")
def reference(model):
    """The same weights with the library's own attention and convolution."""
    from tests.bench_models import library_attention

    reference = copy.deepcopy(model)
    library_attention(reference)
    assert "forward" not in vars(reference.model.visual.patch_embed)
    return reference


@pytest.fixture(scope="module")
def prompts(model, seed):
    """Three prompts of unequal lengths and images."""
    import torch

    from tests.tiny import make_prompt

    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, 3, 5), (4, 2, 1, 9), (3, 3, 6, 2)]
    return [make_prompt(model, *shape, generator) for shape in shapes]


@pytest.fixture(scope="module")
def completions(model, prompts, seed):
    """Completions of unequal lengths, one to three a prompt."""
    import torch

    from tests.tiny import text_ids

    generator = torch.Generator().manual_seed(seed + 1)
    lengths = [(4, 7, 1), (5,), (3, 3, 8)]
    return [[text_ids(model, n, generator) for n in group] for group in lengths]
