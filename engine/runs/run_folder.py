"""The folder of a run: its lock, settings, checkpoints, logs and the final model."""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch.distributed as dist
from safetensors import SafetensorError

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
from engine.model.lora import Adapter, adapter_weights, merged_weights, write_adapter
from engine.model.quantized import is_packed
from engine.options import flag_of
from engine.ranks import Ranks, end_all, on_first, patient_group, require_agreement
from engine.runs.checkpoints import checkpoints, read_checkpoint, steps_of, write_checkpoint
from hicodet import InputError

LOGS = ("metrics.jsonl", "rollouts.jsonl")
# what a run leaves; a folder that has none of it may be used by another run
RESULTS = ("checkpoint-*", "model*", "adapter*", "part-*.jsonl", "predictions.jsonl", *LOGS)
FINAL = ("model", "adapter", "predictions.jsonl")  # a finished run has one of them
# settings that are no options: hashes of what the options name, and how the run was started
CONTENTS = {
    **{"examples": "content of --data or --traces", "weights": "content of --model"},
    **{"excluded": "content of --exclude", "steps": "number of steps"},
}
KEPT = {"stage", "command", "reward_parts", "steps", "excluded"}
NOTED = {"steps", "excluded"}  # these may change on --resume, and changes are noted


class RunFolder:
    """The folder of one run, locked until `finish` or the end of the process."""

    def __init__(self, path: Path, lock_file: TextIO | None, ranks: Ranks):
        self.path, self.lock_file, self.ranks = path, lock_file, ranks

    def finish(self, complete: bool = True) -> None:
        """Release the folder, and note in config.json whether nothing is left to do."""
        if self.lock_file:
            path = self.path / "config.json"
            if complete:
                write_json(path, read_object(path) | {"finished": True})
            self.lock_file.close()

    def load(self, policy, optimizer) -> int:
        """Restore the last checkpoint. Returns the number of steps done, 0 without a checkpoint.

        Raises InputError naming a checkpoint that cannot be read.
        """
        found = checkpoints(self.path)
        if found:
            read_checkpoint(found[-1], policy, optimizer)
        done = steps_of(found[-1]) if found else 0
        if self.ranks.rank == 0:
            self._cut_logs(done)
        return done

    def _cut_logs(self, done: int) -> None:
        """Leave out of every log the steps that will be run again."""
        for path in filter(Path.exists, (self.path / name for name in LOGS)):
            rows = [row for _, row in json_lines(path, cut_last=True)]
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= done]
            replace_file(path, "".join(kept))

    def save(self, policy, optimizer, done: int, keep: int) -> None:
        """Write a checkpoint aside, rename it when it is complete, leave the `keep` newest.

        Raises OSError or InputError naming what cannot be written; then nothing of it stays.
        """
        folder = self.path / f"checkpoint-{done:06d}"
        new = folder.with_suffix(".tmp")
        try:
            write_checkpoint(new, policy, optimizer)
        except (OSError, InputError):
            if self.ranks.rank == 0:
                remove(new)
            raise
        if self.ranks.rank == 0:
            move(new, folder)
            for path in checkpoints(self.path)[:-keep]:
                remove(path)
        dist.barrier()

    def log(self, name: str, step: int, values: dict) -> None:
        """One line of metrics.jsonl or rollouts.jsonl; a number that is not finite is null."""
        if self.ranks.rank == 0:
            row = {"step": step} | {name: _finite_or_none(value) for name, value in values.items()}
            path = self.path / f"{name}.jsonl"
            with naming(path), open(path, "a") as file:
                file.write(json.dumps(row) + "\n")

    def export(
        self, policy, name: str, parts: list, notes: dict[str, str], adapter: Adapter | None
    ) -> None:
        """Write a folder for `from_pretrained`, weights in fp32; complete or absent.

        parts: tokenizer and image processor. notes: texts of further files. In bf16 most of what a
        short run at 1e-6 has moved would be rounded away. adapter: the one that is trained; it gets
        a folder of its own, and packed weights, which it cannot be merged into, get none.
        """
        state = {}
        for key, weight in merged_weights(policy):  # from all ranks, so all of them pass here
            if self.ranks.rank == 0:
                state[key] = weight.cpu()
        trained = replace(adapter, weights=adapter_weights(policy)) if adapter else None

        def write() -> None:
            if not is_packed(policy.config):
                self._write_model(policy, state, name, parts, notes)
            if trained:
                with aside(self.path / name.replace("model", "adapter", 1)) as new:
                    write_adapter(new, trained)
                    _write_texts(new, notes)

        on_first(self.ranks, write, patient_group())  # --timeout is too short for slow disks

    def exported(self) -> Path:
        """The folder of the final model; of an adapter that cannot be merged, its folder."""
        model = self.path / "model"
        return model if model.is_dir() else self.path / "adapter"

    def _write_model(self, policy, state: dict, name: str, parts: list, notes: dict) -> None:
        with aside(self.path / name) as new:
            try:
                policy.save_pretrained(new, state_dict=state)
            except SafetensorError as error:
                raise OSError(f"{new}: {error}") from None
            for part in parts:
                part.save_pretrained(new)
            _write_texts(new, notes)


def _write_texts(folder: Path, texts: dict[str, str]) -> None:
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")


def _finite_or_none(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_run(out: str, config, settings: dict, ranks: Ranks) -> RunFolder:
    """Make `out` the folder of this run, lock it, and write its settings to config.json.

    config: the stage's options. settings: what else describes the run, JSON values: "examples" and
    "weights", hashes of what it works on, and those of KEPT. Raises InputError on every rank if
    the ranks disagree, if another process writes to the folder, or if it holds other files, or a
    run that is not to be resumed. Resuming a finished run ends the program.
    """
    folder, found = Path(out), []
    require_agreement(settings, config.per_host() | {"command"}, ranks, CONTENTS)
    on_first(ranks, lambda: found.append(_lock_folder(folder, config.resume)))
    lock_file = found[0] if found else None
    try:
        if not all(ranks.gather([(folder / "run.lock").exists()])):
            end_all(f"--out {folder} must be one folder that all hosts share", ranks)
        finished = on_first(ranks, lambda: _write_settings(folder, config, settings))
        if any(ranks.gather([finished])):
            ranks.print(f"{folder}: the run is finished, there is nothing to continue")
            sys.exit(0)
    except (InputError, SystemExit):
        if lock_file:
            lock_file.close()
        raise
    return RunFolder(folder, lock_file, ranks)


def _lock_folder(folder: Path, resume: bool) -> TextIO:
    """Make the folder and lock it for this process.

    To resume, what a crash cut short is removed. Raises InputError if the folder is in use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / "run.lock").exists():
        raise InputError(f"--out {folder}: holds other files; choose an empty folder")
    file = open(folder / "run.lock", "a")
    lock(file)
    for unfinished in list(folder.glob("*.tmp")) if resume else []:
        remove(unfinished)
    return file


def _write_settings(folder: Path, config, settings: dict) -> bool:
    """Write config.json, unless the run is finished, and return whether it is.

    Raises InputError if the folder holds results of a run, unless this is that run and resumed.
    """
    path, mine = folder / "config.json", json.loads(json.dumps(settings))  # as they are read back
    if Path(mine["model"]).is_dir():
        mine["model"] = os.path.realpath(mine["model"])
    if any(next(folder.glob(pattern), None) for pattern in RESULTS):
        if not config.resume:
            raise InputError(f"--out {folder}: holds a run; --resume it, or choose another folder")
        stored = read_object(path)
        require_same_run(stored, mine, config)
        # an older result stays until a longer run replaces it: "finished" went as that began
        done = max(map(steps_of, checkpoints(folder)), default=0)
        if stored.get("finished") and any((folder / name).exists() for name in FINAL):
            if stored.get("steps") == mine.get("steps"):
                return True
            # the last checkpoint may be older than the model
            done = max(done, stored.get("steps", 0))
        if mine.get("steps", done) < done:
            raise InputError(f"{folder}: the run has done {done} steps, more than {mine['steps']}")
        if changes := stored.get("changes", []) + noted_changes(stored, mine, config, done):
            mine["changes"] = changes
    write_json(path, mine)
    return False


def require_same_run(stored: dict, mine: dict, config) -> None:
    """Raise InputError naming all options that differ from those of the run in the folder."""
    may_change = config.on_resume("allow") | config.on_resume("note") | KEPT
    different = [
        f"{CONTENTS.get(name, flag_of(name))} was {stored.get(name)}, is {mine[name]}"
        for name in mine
        if name not in may_change and stored.get(name) != mine[name]
    ]
    if different:
        raise InputError(f"--resume: the run in --out differs: {'; '.join(different)}")


def noted_changes(stored: dict, mine: dict, config, done: int) -> list[dict]:
    """What --resume changes and what matters for the result: the step, old and new values."""
    names = (config.on_resume("note") | NOTED) & mine.keys()
    changed = {n: [stored.get(n), mine[n]] for n in sorted(names) if stored.get(n) != mine[n]}
    return [{"step": done} | changed] if changed else []
