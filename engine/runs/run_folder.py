"""The folder of a run: its lock, settings, checkpoints, logs and the final model."""

import json
import math
import os
import re
import secrets
import sys
from functools import partial
from pathlib import Path
from typing import TextIO

import torch.distributed as dist
from safetensors import SafetensorError

from engine.ranks import agree, on_first
from engine.runs.checkpoints import (
    CHECKPOINT,
    checkpoints,
    faults,
    read_checkpoint,
    steps_of,
    write_checkpoint,
)
from engine.files import (
    aside,
    json_lines,
    lock,
    move,
    naming,
    read_object,
    remove,
    replace_file,
    write_json,
)
from engine.model.policy import Ranks, patient_group
from hicodet import InputError

# options that --resume may change and that change what comes next: config.json says where
NOTED_ON_RESUME = ("learning_rate", "steps", "skip_bad_images")
# these, and others on which the final weights do not depend, but for rounding
FREE_ON_RESUME = {
    *NOTED_ON_RESUME,
    *("max_steps", "epochs"),  # which `steps` is reckoned from
    *("resume", "out", "data", "traces", "workers", "dry_run", "slots", "timeout"),
    *("save_every", "keep", "export_every"),
    *("tokens_per_microbatch", "gradient_checkpointing", "offload"),
    *("eval_every", "eval_images", "eval_max_new_tokens"),
}
# how the run was started, kept to be looked at; no options
KEPT = {"stage", "command"}
# what a run has in its folder; beside each, while it is written, the same with .tmp
LOGS = ("metrics.jsonl", "rollouts.jsonl")
RESULTS = ("model", "predictions.jsonl")
BAD_IMAGES = "bad_images.json"  # those that a training leaves out, and why
WRITTEN = {"run.lock", "config.json", "first_sample.png", "untraced.txt", "summary.json"}
WRITTEN |= {*LOGS, *RESULTS, BAD_IMAGES}
NUMBERED = re.compile(rf"{CHECKPOINT.pattern}|model-\d{{6,}}|part-\d{{4}}\.jsonl")
PAGE_ASIDE = re.compile(r"report\.html\.\d+\.tmp")
# what a run has in its folder before its first result
BEFORE_RESULTS = {"config.json", "run.lock", "first_sample.png", "untraced.txt", "report.html"}
BEFORE_RESULTS |= {BAD_IMAGES}


class Run:
    """The folder of one run, locked until `finish` or the end of the process."""

    def __init__(self, folder: Path, lock_file: TextIO | None, ranks: Ranks):
        self.folder, self.lock_file, self.ranks = folder, lock_file, ranks

    def finish(self, complete: bool = True) -> None:
        """Let go of the folder, and note in config.json that nothing is left to do, if so."""
        if self.lock_file:
            path = self.folder / "config.json"
            if complete:
                write_json(path, json.loads(path.read_text()) | {"finished": True})
            self.lock_file.close()

    def load(self, policy, optimizer) -> int:
        """Restore the last checkpoint that is as it was written. Returns the number of steps done.

        Without any checkpoint it is 0. Raises InputError if all of them are damaged.
        """
        done, unread = 0, []
        for path in reversed(checkpoints(self.folder)):
            if found := faults(path, self.ranks):
                unread.append(f"{path} cannot be read ({', '.join(found)})")
                continue
            read_checkpoint(path, policy, optimizer)
            done = steps_of(path)
            break
        if unread and not done:
            raise InputError("; ".join(unread) + ": remove it to start from the first step")
        for message in unread:
            self.ranks.print(f"{message}: going on from step {done}")
        if self.ranks.rank == 0:
            self._cut_logs(done)
        return done

    def _cut_logs(self, done: int) -> None:
        """Leave out of every log the steps that will be run again."""
        for path in filter(Path.exists, (self.folder / name for name in LOGS)):
            kept = []
            for where, row in json_lines(path, cut_last=True):
                if not isinstance(row, dict) or type(row.get("step")) is not int:
                    raise InputError(f"{where}: no step of a run; remove the line")
                if row["step"] <= done:
                    kept.append(json.dumps(row) + "\n")
            replace_file(path, "".join(kept))

    def save(self, policy, optimizer, done: int, keep: int) -> None:
        """Write a checkpoint aside, rename it when it is whole, leave the `keep` newest.

        Raises OSError or InputError naming what cannot be written; then nothing of it stays.
        """
        folder = self.folder / f"checkpoint-{done:06d}"
        new = folder.with_suffix(".tmp")
        try:
            write_checkpoint(new, policy, optimizer, self.ranks)
        except (OSError, InputError):
            if self.ranks.rank == 0:
                remove(new)
            raise
        if self.ranks.rank == 0:
            move(new, folder)  # there may be one that could not be read
            written = [path for path in checkpoints(self.folder) if steps_of(path) <= done]
            for path in written[:-keep]:
                remove(path)
        dist.barrier()

    def log(self, name: str, step: int, values: dict) -> None:
        """One line of metrics.jsonl or rollouts.jsonl; a number that is not finite is null."""
        if self.ranks.rank == 0:
            row = {"step": step} | {name: _finite_or_none(value) for name, value in values.items()}
            path = self.folder / f"{name}.jsonl"
            with naming(path), open(path, "a") as file:
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
        write = partial(self._write_model, policy, state, name, parts, notes)
        on_first(self.ranks, "", write, patient_group())  # --timeout is too short for slow disks

    def _write_model(self, policy, state: dict, name: str, parts: list, notes: dict) -> None:
        with aside(self.folder / name) as new:
            try:
                policy.save_pretrained(new, state_dict=state)
            except SafetensorError as error:
                raise OSError(f"{new}: {error}") from None
            for part in parts:
                part.save_pretrained(new)
            for file, text in notes.items():
                (new / file).write_text(text, encoding="utf-8")


def _finite_or_none(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_own(path: Path) -> bool:
    """Whether a run gives this name to a file or folder, be it whole or being written."""
    name = path.name.removesuffix(".tmp")
    return name in WRITTEN or bool(NUMBERED.fullmatch(name) or PAGE_ASIDE.fullmatch(path.name))


def open_run(out: str, settings: dict, *, resume: bool, ranks: Ranks) -> Run:
    """Make `out` the folder of this run, lock it, and write its settings to config.json.

    settings: the options, "examples" and "weights", hashes of what the run works on, "stage" and
    "command", which made it; all that JSON can hold. Raises InputError if another process writes to
    the folder, if it holds anything that is not of a run, or a run, unless it is this one and to be
    resumed, and on every rank if the ranks disagree. To resume a finished run ends the program.
    """
    folder = Path(out)
    lock_file = on_first(ranks, f"--out {folder}: ", lambda: _lock_folder(folder, resume))
    try:
        agree(folder, settings, ranks)
        write = partial(_write_settings, folder, settings, resume)
        if ranks.gather([on_first(ranks, f"--out {folder}: ", write)])[0]:
            ranks.print(f"{folder}: the run is finished, there is nothing to go on with")
            sys.exit(0)
    except (InputError, SystemExit):
        if lock_file:
            lock_file.close()
        raise
    return Run(folder, lock_file, ranks)


def _lock_folder(folder: Path, resume: bool) -> TextIO:
    """Make the folder, lock it for this process and write a random word into the lock file.

    To resume, what a crash cut short is removed first. Raises InputError if the folder is in use.
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
    for unfinished in filter(_is_own, list(folder.glob("*.tmp")) if resume else []):
        remove(unfinished)
    with naming(path):
        file.truncate(0)
        file.write(secrets.token_hex(8))
        file.flush()
        os.fsync(file.fileno())  # or another host may read an empty one
    return file


def _write_settings(folder: Path, settings: dict, resume: bool) -> bool:
    """Write config.json, unless the run is finished, and return whether it is.

    Raises InputError if the folder holds a run, or to resume another one.
    """
    path, mine = folder / "config.json", json.loads(json.dumps(settings))  # as they are read back
    if Path(mine["model"]).is_dir():
        mine["model"] = os.path.realpath(mine["model"])
    if any(found.name not in BEFORE_RESULTS for found in folder.iterdir()):
        if not resume:
            raise InputError("holds a run: --resume it, or choose another folder")
        stored = read_object(path)
        for name in mine.keys() - FREE_ON_RESUME - KEPT:
            if stored.get(name) != mine[name]:
                raise InputError(
                    f"the run has {name} = {stored.get(name)!r}, not {mine[name]!r}; --resume may "
                    f"change only {', '.join(sorted(FREE_ON_RESUME - {'steps'}))}"
                )
        # an older result stays until a longer run replaces it: "finished" went as that began
        finished = stored.get("finished") and stored.get("steps") == mine.get("steps")
        if finished and any((folder / name).exists() for name in RESULTS):
            return True
        done = max(map(steps_of, checkpoints(folder)), default=0)
        # a finished run's last checkpoint may be older than its model
        had = max(done, stored.get("steps", 0) if stored.get("finished") else 0)
        if (steps := mine.get("steps", had)) < had:
            raise InputError(f"the run has done {had} steps, and only {steps} are asked for")
        if changes := _changes(stored, mine, done):
            mine["changes"] = changes
    write_json(path, mine)
    return False


def _changes(stored: dict, mine: dict, done: int) -> list[dict]:
    """The changes of NOTED_ON_RESUME since the run began: the step, and old and new values."""
    names = [name for name in NOTED_ON_RESUME if name in mine and stored.get(name) != mine[name]]
    before = stored.get("changes", [])
    if not isinstance(before, list):
        raise InputError("config.json is damaged (changes is no list); choose another folder")
    if not names:
        return before
    return [*before, {"step": done} | {name: [stored.get(name), mine[name]] for name in names}]
