"""A run's folder: lock, settings, checkpoints, logs, final model."""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch.distributed as dist
from safetensors import SafetensorError

from engine import files
from engine.model.lora import Adapter, adapter_weights, merged_weights, write_adapter
from engine.model.quantized import is_packed
from engine.options import flag_of
from engine.ranks import Ranks, end_all, on_first, require_agreement
from engine.runs.checkpoints import checkpoints, read_checkpoint, steps_of, write_checkpoint
from hicodet import InputError

LOGS = ("metrics.jsonl", "rollouts.jsonl")
# results of a run; another run may use a folder without them
RESULTS = ("checkpoint-*", "model*", "adapter*", "part-*.jsonl", "predictions.jsonl", *LOGS)
FINAL = ("model", "adapter", "predictions.jsonl")  # results of a finished run
# settings that are not options, with their names in errors
CONTENTS = {
    **{"examples": "content of --data or --traces", "weights": "content of --model"},
    **{"excluded": "content of --exclude", "steps": "number of steps"},
}
KEPT = {"stage", "command", "reward_parts", "steps", "excluded"}
NOTED = {"steps", "excluded"}  # may change on --resume; config.json notes it


class RunFolder:
    """The folder of one run, locked until `finish` or the end of the process."""

    def __init__(self, path: Path, lock_file: TextIO | None, ranks: Ranks):
        self.path, self.lock_file, self.ranks = path, lock_file, ranks

    def finish(self, complete: bool = True) -> None:
        """Unlock the folder, and mark a complete run as finished in config.json."""
        if self.lock_file:
            path = self.path / "config.json"
            if complete:
                files.write_json(path, files.read_object(path) | {"finished": True})
            self.lock_file.close()

    def load(self, policy, optimizer) -> int:
        """Restore the last checkpoint. Returns the number of steps done, 0 without a checkpoint.

        Raises InputError naming a checkpoint that cannot be read.
        """
        found = checkpoints(self.path)
        if found:
            read_checkpoint(found[-1], policy, optimizer)
        done = steps_of(found[-1]) if found else 0
        logs = [self.path / name for name in LOGS] if self.ranks.rank == 0 else []
        for path in filter(Path.exists, logs):  # drop later steps, which will run again
            rows = [row for _, row in files.json_lines(path, cut_last=True)]
            kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= done]
            files.replace_file(path, "".join(kept))
        return done

    def save(self, policy, optimizer, done: int, keep: int) -> None:
        """Write a checkpoint, rename it when it is complete, and keep the `keep` newest.

        If writing fails, removes the rest and raises OSError or InputError naming the file.
        """
        folder = self.path / f"checkpoint-{done:06d}"
        new = folder.with_suffix(".tmp")
        try:
            write_checkpoint(new, policy, optimizer)
        except (OSError, InputError):
            if self.ranks.rank == 0:
                files.remove(new)
            raise
        if self.ranks.rank == 0:
            files.move(new, folder)
            for path in checkpoints(self.path)[:-keep]:
                files.remove(path)
        dist.barrier()

    def log(self, name: str, step: int, values: dict) -> None:
        """Append a line to metrics.jsonl or rollouts.jsonl; non-finite numbers become null."""
        if self.ranks.rank == 0:
            row = {"step": step}
            for key, value in values.items():
                odd = isinstance(value, float) and not math.isfinite(value)
                row[key] = None if odd else value
            path = self.path / f"{name}.jsonl"
            with files.naming(path), open(path, "a") as file:
                file.write(json.dumps(row) + "\n")

    def export(
        self, policy, name: str, parts: list, notes: dict[str, str], adapter: Adapter | None
    ) -> None:
        """Write a folder for `from_pretrained`, with fp32 weights, complete or not at all.

        bf16 would round away most changes of a short run at 1e-6. parts: tokenizer and image
        processor. notes: texts of further files. adapter: of a LoRA training; it gets a separate
        folder. Packed weights are not written, as an adapter cannot be merged into them.
        """
        state = {}
        for key, weight in merged_weights(policy):  # collective, so on all ranks
            if self.ranks.rank == 0:
                state[key] = weight.cpu()
        trained = replace(adapter, weights=adapter_weights(policy)) if adapter else None

        def write() -> None:
            if not is_packed(policy.config):
                with files.aside(self.path / name) as new:
                    try:
                        policy.save_pretrained(new, state_dict=state)
                    except SafetensorError as error:
                        raise OSError(f"{new}: {error}") from None
                    for part in parts:
                        part.save_pretrained(new)
                    _write_texts(new, notes)
            if trained:
                with files.aside(self.path / name.replace("model", "adapter", 1)) as new:
                    write_adapter(new, trained)
                    _write_texts(new, notes)

        on_first(self.ranks, write, patient=True)  # slow disks take longer than --timeout


def _write_texts(folder: Path, texts: dict[str, str]) -> None:
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")


def open_run(out: str, config, settings: dict, ranks: Ranks) -> RunFolder:
    """Create or reopen the folder `out` of a run, lock it, and write settings to config.json.

    config: the stage's options. settings: JSON values for config.json: the options, "examples" and
    "weights" (hashes of the inputs), and those of KEPT. Raises InputError on every rank if the
    ranks disagree, another process writes to the folder, or it holds other files or a run without
    --resume. Resuming a finished run ends the program.
    """
    folder = Path(out)
    require_agreement(settings, config.per_host() | {"command"}, ranks, CONTENTS)
    lock_file = on_first(ranks, lambda: _lock_folder(folder, config.resume))
    run = RunFolder(folder, lock_file, ranks)
    try:
        if not all(ranks.gather([(folder / "run.lock").exists()])):
            end_all(f"--out {folder} must be one folder that all hosts share", ranks)
        finished = on_first(ranks, lambda: _write_settings(folder, config, settings))
        if any(ranks.gather([finished])):
            ranks.print(f"{folder}: the run is finished, there is nothing to continue")
            sys.exit(0)
    except (InputError, SystemExit):
        run.finish(complete=False)
        raise
    return run


def _lock_folder(folder: Path, resume: bool) -> TextIO:
    """Create and lock the folder, if it is free. On --resume, remove unfinished files."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / "run.lock").exists():
        raise InputError(f"--out {folder}: holds other files; choose an empty folder")
    file = open(folder / "run.lock", "a")
    files.lock(file)
    for unfinished in list(folder.glob("*.tmp")) if resume else []:
        files.remove(unfinished)
    return file


def _write_settings(folder: Path, config, settings: dict) -> bool:
    """Write config.json, unless the run is finished. Returns whether it is finished."""
    path, mine = folder / "config.json", json.loads(json.dumps(settings))  # as JSON stores them
    if Path(mine["model"]).is_dir():
        mine["model"] = os.path.realpath(mine["model"])
    if any(next(folder.glob(pattern), None) for pattern in RESULTS):
        if not config.resume:
            raise InputError(f"--out {folder}: holds a run; --resume it, or choose another folder")
        stored = files.read_object(path)
        if (stage := stored.get("stage")) != mine["stage"]:
            raise InputError(f"--out {folder}: holds a run of {stage}; choose another folder")
        changed = {n: [stored.get(n), mine[n]] for n in mine if stored.get(n) != mine[n]}
        may_change = config.on_resume("allow") | config.on_resume("note") | KEPT
        different = [
            f"{CONTENTS.get(name, flag_of(name))} was {old}, is {new}"
            for name, (old, new) in changed.items()
            if name not in may_change
        ]
        if different:
            raise InputError(f"--resume: the run in --out differs: {'; '.join(different)}")
        # "finished" was removed if a longer run has begun; the older result is still there
        done = max(map(steps_of, checkpoints(folder)), default=0)
        if stored.get("finished") and any((folder / name).exists() for name in FINAL):
            if stored.get("steps") == mine.get("steps"):
                return True
            # the last checkpoint may be older than the model
            done = max(done, stored.get("steps", 0))
        if mine.get("steps", done) < done:
            raise InputError(f"{folder}: the run has done {done} steps, more than {mine['steps']}")
        names = changed.keys() & (config.on_resume("note") | NOTED)
        noted = [{"step": done} | {n: changed[n] for n in sorted(names)}] if names else []
        if changes := stored.get("changes", []) + noted:
            mine["changes"] = changes
    files.write_json(path, mine)
    return False
