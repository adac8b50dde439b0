"""Checkpoints of policy and optimizer, by torch.distributed.checkpoint (DCP).

DCP restores them on any number of ranks. One of its files is a pickle, and unpickling runs code:
resume only folders that you trust.
"""

import re
import textwrap
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from engine.files import naming
from hicodet import InputError

CHECKPOINT = re.compile(r"checkpoint-\d{6,}")
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # LoRA: adapters only


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in the folder of a run, oldest first."""
    return sorted((p for p in folder.iterdir() if CHECKPOINT.fullmatch(p.name)), key=steps_of)


def steps_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def _states(policy, optimizer) -> dict[str, dict]:
    """The content of a checkpoint: each trained parameter once, and the optimizer's state."""
    model, moments = get_state_dict(policy, optimizer, options=TRAINED)
    # without the second name of a tied head, which the state has even if it is frozen
    named = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    return {"model": {name: model[name] for name in named}, "optimizer": moments}


def write_checkpoint(path: Path, policy, optimizer) -> None:
    """Write a checkpoint to a new folder; every rank writes its own files.

    Raises OSError on every rank, naming the file, if one of them cannot write.
    """
    states = _states(policy, optimizer)
    writer = dcp.FileSystemWriter(path)
    writer.fs = _NamingFiles()
    try:
        dcp.save(states, checkpoint_id=path, storage_writer=writer)
    except CheckpointException as error:
        raise _cause(error) from None


def read_checkpoint(path: Path, policy, optimizer) -> None:
    """Restore a checkpoint. Raises InputError naming an unreadable one and the one before it."""
    states = _states(policy, optimizer)
    try:
        dcp.load(states, checkpoint_id=path)
    except CheckpointException as error:
        before = [p for p in checkpoints(path.parent) if steps_of(p) < steps_of(path)]
        start = before[-1].name if before else "the first step"
        cause = _cause(error)
        said = textwrap.shorten(str(cause), 200) or type(cause).__name__
        raise InputError(
            f"{path} cannot be read ({said}): remove it to continue from {start}"
        ) from None
    named = {"model_state_dict": states["model"], "optim_state_dict": states["optimizer"]}
    set_state_dict(policy, optimizer, **named, options=TRAINED)


def _cause(error: CheckpointException) -> BaseException:
    """The cause on one of the ranks, preferably an OSError."""
    causes = [cause for cause, _ in error.failures.values()]
    return next((c for c in causes if isinstance(c, OSError)), causes[0] if causes else error)


class _NamingFiles(FileSystem):
    """DCP's file access with errors that name the file; torch.save raises a RuntimeError."""

    @contextmanager
    def create_stream(self, path, mode):
        with naming(path):
            try:
                with super().create_stream(path, mode) as stream:
                    yield stream
            except RuntimeError as error:
                raise error.__context__ if isinstance(error.__context__, OSError) else error
