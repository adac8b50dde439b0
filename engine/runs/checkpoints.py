"""Checkpoints: a policy and its optimizer as DCP writes them, under a manifest of SHA-256 sums.

DCP restores them on any number of ranks. Its .metadata is a pickle, and unpickling runs code: so
nothing is read before every file is found as it was written. The sums tell of damage, not of
forgery: only folders of one's own may be resumed.
"""

import hashlib
import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from engine.ranks import on_first
from engine.files import naming, write_json
from engine.model.policy import Ranks

CHECKPOINT = re.compile(r"checkpoint-\d{6,}")
MANIFEST = "manifest.json"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in the folder of a run, oldest first."""
    return sorted((p for p in folder.iterdir() if CHECKPOINT.fullmatch(p.name)), key=steps_of)


def steps_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def write_checkpoint(path: Path, policy, optimizer, ranks: Ranks) -> None:
    """Write a checkpoint to a new folder. Every rank writes and hashes files of its own.

    Raises OSError on every rank, naming the file, if one of them cannot write.
    """
    model, moments = get_state_dict(policy, optimizer)
    writer = dcp.FileSystemWriter(path)
    writer.fs = _NamingFiles()
    try:
        dcp.save({"model": model, "optimizer": moments}, checkpoint_id=path, storage_writer=writer)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
        raise (causes or [error])[0] from None
    mine = [*path.glob(f"__{ranks.rank}_*"), *([path / ".metadata"] if ranks.rank == 0 else [])]
    sums = dict(ranks.gather([(file.name, _sha256(file)) for file in mine]))
    on_first(ranks, "", lambda: write_json(path / MANIFEST, sums))


def read_checkpoint(path: Path, policy, optimizer) -> None:
    """Restore a checkpoint in which `faults` finds none."""
    model, moments = get_state_dict(policy, optimizer)
    dcp.load({"model": model, "optimizer": moments}, checkpoint_id=path)
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=moments)


def faults(path: Path, ranks: Ranks) -> list[str]:
    """What in a checkpoint is not as it was written, on every rank; each reads its share of it."""
    sums, found = ranks.gather([_listed(path)])[0]
    if not sums:
        return [f"{MANIFEST} is missing or damaged"]
    mine = sorted(sums.keys() | found)[ranks.rank :: ranks.world]
    return [fault for fault in ranks.gather([_fault(path / n, sums.get(n)) for n in mine]) if fault]


def _listed(path: Path) -> tuple[dict[str, str], set[str]]:
    """The sums that the manifest lists, and the files that are there; ({}, set()) without one."""
    try:
        sums = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return {}, set()
    return sums if isinstance(sums, dict) else {}, {p.name for p in path.iterdir()} - {MANIFEST}


def _fault(file: Path, expected: str | None) -> str:
    """What is wrong with a file; "" if nothing. expected: its sum, None if it has none."""
    if expected is None:
        return f"{file.name} is not in {MANIFEST}"
    try:
        return "" if _sha256(file) == expected else f"{file.name} has changed"
    except OSError as error:
        return f"{file.name}: {error.strerror}"


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class _NamingFiles(FileSystem):
    """DCP's files, whose errors name the file; torch.save hides them behind a RuntimeError."""

    @contextmanager
    def create_stream(self, path, mode):
        with naming(path):
            try:
                with super().create_stream(path, mode) as stream:
                    yield stream
            except RuntimeError as error:
                raise error.__context__ if isinstance(error.__context__, OSError) else error
