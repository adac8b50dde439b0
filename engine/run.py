"""The folder of a run: its lock, settings, checkpoints, logs and the final model."""

import json
import math
import os
import pickle
import re
import secrets
import shutil
from pathlib import Path
from typing import TextIO

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from engine.agreement import agree, on_first
from engine.files import json_lines, lock, replace_file, write_json
from engine.policy import Ranks
from hicodet import InputError

# options that --resume may change and that change what comes next: config.json says where
NOTED_ON_RESUME = ("learning_rate", "max_steps")
# these, and others on which the final weights do not depend, but for rounding
FREE_ON_RESUME = {
    *NOTED_ON_RESUME,
    *("resume", "out", "data", "traces", "workers", "dry_run", "slots", "timeout"),
    *("save_every", "keep", "export_every"),
    *("tokens_per_microbatch", "gradient_checkpointing"),
    *("eval_every", "eval_images", "eval_max_new_tokens"),
}
# how the run was started, kept to be looked at; no options
KEPT = {"stage", "command"}
# what reading a damaged checkpoint raises
UNREADABLE = (CheckpointException, OSError, EOFError, ValueError, pickle.UnpicklingError)
# what a training has in its folder; beside each, while it is written, the same with .tmp
LOGS = ("metrics.jsonl", "rollouts.jsonl")
WRITTEN = {"run.lock", "config.json", "first_sample.png", "untraced.txt", "model", *LOGS}
CHECKPOINT = re.compile(r"checkpoint-\d{6,}")
EXPORTED = re.compile(r"model-\d{6,}")
# what a run has in its folder before its first result
BEFORE_RESULTS = {"config.json", "run.lock", "first_sample.png", "untraced.txt", "report.html"}


class Run:
    """The folder of one run, locked until `close` or the end of the process."""

    def __init__(self, folder: Path, lock_file: TextIO | None, ranks: Ranks):
        self.folder, self.lock_file, self.ranks = folder, lock_file, ranks

    def close(self) -> None:
        """Let go of the folder."""
        if self.lock_file:
            self.lock_file.close()

    def load(self, policy, optimizer) -> int:
        """Restore the last checkpoint that can be read. Returns the number of steps done.

        Without any checkpoint it is 0. Raises InputError if none of them can be read.
        """
        if self.ranks.rank == 0:
            self._remove_unfinished()
        done, unread = 0, []
        for path in reversed(checkpoints(self.folder)):
            model, moments = get_state_dict(policy, optimizer)
            try:
                dcp.load({"model": model, "optimizer": moments}, checkpoint_id=path)
            except UNREADABLE as error:
                unread.append(f"{path} cannot be read ({str(error).strip().splitlines()[-1]})")
                continue
            set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=moments)
            done = steps_of(path)
            break
        if unread and not done:
            raise InputError("; ".join(unread) + ": remove it to start from the first step")
        for message in unread:
            self.ranks.print(f"{message}: going on from step {done}")
        if self.ranks.rank == 0:
            self._cut_logs(done)
        return done

    def _remove_unfinished(self) -> None:
        """Remove what a crash cut short."""
        for path in self.folder.glob("*.tmp"):
            if _is_own(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _cut_logs(self, done: int) -> None:
        """Leave out of every log the steps that will be run again."""
        for path in filter(Path.exists, (self.folder / name for name in LOGS)):
            rows = (row for _, row in json_lines(path, cut_last=True))
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= done]
            replace_file(path, "".join(kept))

    def save(self, policy, optimizer, done: int, keep: int) -> None:
        """Write a checkpoint aside, rename it when it is whole, leave the `keep` newest."""
        folder = self.folder / f"checkpoint-{done:06d}"
        aside = folder.with_suffix(".tmp")
        model, moments = get_state_dict(policy, optimizer)
        dcp.save({"model": model, "optimizer": moments}, checkpoint_id=aside)
        if self.ranks.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # one that could not be read
            aside.rename(folder)
            written = [path for path in checkpoints(self.folder) if steps_of(path) <= done]
            for path in written[:-keep]:
                shutil.rmtree(path)
        dist.barrier()

    def log(self, name: str, step: int, values: dict) -> None:
        """One line of metrics.jsonl or rollouts.jsonl; a number that is not finite is null."""
        if self.ranks.rank == 0:
            row = {"step": step} | {name: _finite_or_none(value) for name, value in values.items()}
            with open(self.folder / f"{name}.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def export(self, policy, name: str, parts: list, notes: dict[str, str]) -> None:
        """Write a folder for `from_pretrained`, weights in fp32; whole or absent.

        parts: tokenizer and image processor. notes: texts of further files. In bf16 most of what a
        short run at 1e-6 has moved would be rounded away.
        """
        state = {}
        for key, parameter in policy.named_parameters():
            full = parameter.full_tensor()  # from all ranks, so all of them pass here
            if self.ranks.rank == 0:
                state[key] = full.detach().cpu()
        if self.ranks.rank == 0:
            folder, aside = self.folder / name, self.folder / f"{name}.tmp"
            policy.save_pretrained(aside, state_dict=state)
            for part in parts:
                part.save_pretrained(aside)
            for file, text in notes.items():
                (aside / file).write_text(text, encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        dist.barrier()


def _finite_or_none(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in the folder of a run, oldest first."""
    return sorted((p for p in folder.iterdir() if CHECKPOINT.fullmatch(p.name)), key=steps_of)


def _is_own(path: Path) -> bool:
    """Whether a training gives this name to a file, be it whole or being written."""
    name = path.name.removesuffix(".tmp")
    patterns = (CHECKPOINT, EXPORTED)
    return name in WRITTEN or any(pattern.fullmatch(name) for pattern in patterns)


def steps_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def open_run(out: str, settings: dict, *, resume: bool, ranks: Ranks) -> Run:
    """Make `out` the folder of this run, lock it, and write its settings to config.json.

    settings: the options, "examples" and "weights", hashes of what the run works on, "stage" and
    "command", which made it; all that JSON can hold. Raises InputError if another process writes to
    the folder, if it holds anything that is not of a run, or a run, unless it is this one and to be
    resumed, and on every rank if the ranks disagree.
    """
    folder = Path(out)
    lock_file = on_first(ranks, f"--out {folder}: ", lambda: _lock_folder(folder))
    try:
        agree(folder, settings, ranks)
        on_first(ranks, f"--out {folder}: ", lambda: _write_settings(folder, settings, resume))
    except InputError:
        if lock_file:
            lock_file.close()
        raise
    return Run(folder, lock_file, ranks)


def _lock_folder(folder: Path) -> TextIO:
    """Make the folder, lock it for this process and write a random word into the lock file.

    Raises InputError if the folder is in use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.lock"
    if not path.exists() and any(folder.iterdir()):
        raise InputError("holds files that are not of a run; choose another folder")
    for found in folder.iterdir():
        if found.is_symlink() and _is_own(found):
            raise InputError(f"{found.name} is a link, behind which nothing is written: remove it")
    file = open(path, "a")
    lock(file)
    file.truncate(0)
    file.write(secrets.token_hex(8))
    file.flush()
    return file


def _write_settings(folder: Path, settings: dict, resume: bool) -> None:
    """Write config.json. Raises InputError if the folder holds a run, or to resume another one."""
    path, mine = folder / "config.json", json.loads(json.dumps(settings))  # as they are read back
    if Path(mine["model"]).is_dir():
        mine["model"] = os.path.realpath(mine["model"])
    if any(found.name not in BEFORE_RESULTS for found in folder.iterdir()):
        if not resume:
            raise InputError("holds a run: --resume it, or choose another folder")
        try:
            stored = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"config.json is damaged ({error}); choose another folder") from None
        for name in mine.keys() - FREE_ON_RESUME - KEPT:
            if stored.get(name) != mine[name]:
                raise InputError(
                    f"the run has {name} = {stored.get(name)!r}, not {mine[name]!r}; --resume may "
                    f"change only {', '.join(sorted(FREE_ON_RESUME))}"
                )
        if changes := _changes(folder, stored, mine):
            mine["changes"] = changes
    write_json(path, mine)


def _changes(folder: Path, stored: dict, mine: dict) -> list[dict]:
    """The changes of NOTED_ON_RESUME since the run began: the step, and old and new values."""
    names = [name for name in NOTED_ON_RESUME if name in mine and stored.get(name) != mine[name]]
    before = stored.get("changes", [])
    if not names:
        return before
    done = max(map(steps_of, checkpoints(folder)), default=0)
    return [*before, {"step": done} | {name: [stored.get(name), mine[name]] for name in names}]
