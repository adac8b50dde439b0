"""The folder of a run: its lock, settings, checkpoints, logs and the final model."""

import dataclasses
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import TextIO

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from engine.examples import Examples, picture
from engine.files import lock as lock_file
from engine.files import read_rows, write_aside, write_json
from engine.policy import Ranks

# what does not change the weights a run comes to, beyond the rounding of sums
FREE_ON_RESUME = {
    *("resume", "out", "data", "traces", "workers", "dry_run", "save_every", "slots"),
    *("tokens_per_microbatch", "gradient_checkpointing"),
    *("eval_every", "eval_images", "eval_max_new_tokens"),
}


# what a run has in its folder before its first result
BEFORE_RESULTS = {"config.json", "run.lock", "first_sample.png"}


def claim_folder(config, examples: Examples, ranks: Ranks) -> tuple[Path, TextIO | None]:
    """Make --out the folder of this run, and lock it until the returned file is closed.

    Raises ValueError if another process writes to it, if it holds anything that is not of a run,
    or a run, unless it is this one and to be resumed.
    """
    folder, lock, refusal = Path(config.out), None, ""
    if ranks.rank == 0:
        try:
            lock = _lock_folder(folder)
            _write_config(config, examples, folder)
        except (ValueError, OSError) as error:
            refusal = f"--out {folder}: {error}"
    if refusal := ranks.gather([refusal])[0]:
        if ranks.rank:
            sys.exit(1)  # the first rank says why
        raise ValueError(refusal)
    return folder, lock


def _lock_folder(folder: Path) -> TextIO:
    """Make the folder and lock it for this process. Raises ValueError if it is in use."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.lock"
    if not path.exists() and any(folder.iterdir()):
        raise ValueError("holds files that are not of a run; choose another folder")
    lock = open(path, "w")
    lock_file(lock)
    return lock


def _write_config(config, examples: Examples, folder: Path) -> None:
    """Write config.json. Raises ValueError if the folder holds a run, or to resume another one."""
    path, mine = folder / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    mine["examples"] = examples.fingerprint()
    if Path(config.model).is_dir():
        mine["model"] = os.path.realpath(config.model)
    if any(found.name not in BEFORE_RESULTS for found in folder.iterdir()):
        if not config.resume:
            raise ValueError("holds a run: --resume it, or choose another folder")
        try:
            stored = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"config.json is damaged ({error}); choose another folder") from None
        for name in mine.keys() - FREE_ON_RESUME:
            if stored.get(name) != mine[name]:
                raise ValueError(
                    f"the run has {name} = {stored.get(name)!r}, not {mine[name]!r}; --resume may "
                    f"change only {', '.join(sorted(FREE_ON_RESUME))}"
                )
    write_json(path, mine)


class Run:
    """The folder of a training: config.json, metrics.jsonl, checkpoints and the final model."""

    def __init__(self, config, examples: Examples, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.folder, self.lock = claim_folder(config, examples, ranks)
        if ranks.rank == 0:
            picture(examples[0]).save(self.folder / "first_sample.png")

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(p for p in self.folder.glob("checkpoint-*") if p.suffix != ".tmp")

    def load(self, policy, optimizer) -> int:
        """Restore the last checkpoint, if there is one. Returns the number of steps done."""
        done = 0
        for path in self.folder.glob("*.tmp") if self.ranks.rank == 0 else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()  # what a crash cut short
        if self.checkpoints():
            latest = self.checkpoints()[-1]
            model, moments = get_state_dict(policy, optimizer)
            try:
                dcp.load({"model": model, "optimizer": moments}, checkpoint_id=latest)
            except (CheckpointException, OSError) as error:
                cause = str(error).strip().splitlines()[-1]
                raise ValueError(
                    f"{latest} cannot be read ({cause}): remove it to start from the first step"
                ) from None
            set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=moments)
            done = int(latest.name.split("-")[1])
        elif self.config.resume:
            self.ranks.print(f"{self.folder}: no checkpoint yet, starting from the first step")
        for path in self.folder.glob("*.jsonl") if self.ranks.rank == 0 else ():
            # without steps that will be run again
            kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= done]
            write_aside(path, "".join(kept))
        return done

    def save(self, policy, optimizer, done: int) -> None:
        """Write a checkpoint aside, rename it when it is whole, then drop those before it."""
        old, folder = self.checkpoints(), self.folder / f"checkpoint-{done:06d}"
        aside = folder.with_suffix(".tmp")
        model, moments = get_state_dict(policy, optimizer)
        dcp.save({"model": model, "optimizer": moments}, checkpoint_id=aside)
        if self.ranks.rank == 0:
            aside.rename(folder)
            for path in old:
                shutil.rmtree(path)
        dist.barrier()

    def log(self, name: str, step: int, values: dict) -> None:
        """One line of metrics.jsonl or rollouts.jsonl; what is not finite is null there."""
        values = {k: None if v in (math.inf, -math.inf) or v != v else v for k, v in values.items()}
        if self.ranks.rank == 0:
            with open(self.folder / f"{name}.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def export(self, policy, examples: Examples) -> None:
        """Write model/ for `from_pretrained`, weights in fp32; whole or absent.

        In bf16 most of what a short run at 1e-6 has moved would be rounded away.
        """
        state = {}
        for name, parameter in policy.named_parameters():
            full = parameter.full_tensor()  # from all ranks, so all of them pass here
            if self.ranks.rank == 0:
                state[name] = full.detach().cpu()
        if self.ranks.rank == 0:
            folder, aside = self.folder / "model", self.folder / "model.tmp"
            policy.save_pretrained(aside, state_dict=state)
            for part in (examples.tokenizer, examples.processor):
                part.save_pretrained(aside)
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        dist.barrier()
