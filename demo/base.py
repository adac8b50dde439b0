"""The toy's base model: where things are, and nothing of who does what with them.

    python -m demo.toy runs/grounding --complete --seed 1000
    torchrun --nproc_per_node 2 -m demo.base runs/grounding --out runs/base

It learns from random weights to list every person and object of a drawing (demo/grounding.py). So
it stands for what Qwen2.5-VL-3B knows before it meets HOI, and its HOI mAP is 0. The loop and the
loss are those of SFT. --out gets what a run writes; its model/ is the base model.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from demo.grounding import PROMPT
from engine.data.annotations import load_split
from engine.data.examples import END_OF_TURN, Examples
from engine.data.loader import batches
from engine.model.model_files import weights_fingerprint
from engine.model.optimizer import ClippedAdamW, learning_rate
from engine.model.policy import load_policy
from engine.options import Config, option, parse_config, required
from engine.ranks import Ranks, start_ranks
from engine.runs.run_folder import open_run
from engine.signals import RESUME, StopSignal, one_line
from engine.traces.trace_file import read_traces
from hicodet import InputError
from sft import SFT
from train import Parts, fit

TOKENS_PER_MICROBATCH = 16384
SAVE_EVERY = 250  # steps between checkpoints


def grounding_examples(folder: Path, model: str) -> Examples:
    """The training drawings of `python -m demo.toy`, each with PROMPT and grounding.jsonl's text.

    folder: with data/ and grounding.jsonl. Raises InputError if a file is missing.
    """
    texts = folder / "grounding.jsonl"
    if not texts.is_file():
        raise InputError(f"{texts}: no such file; python -m demo.toy writes it")
    return Examples(
        model,
        load_split(folder / "data", "train"),
        thinks=read_traces(texts),
        prompt_text=lambda thinking: PROMPT,
        target_text=lambda hois, grounding: grounding + END_OF_TURN,
    )


@dataclass(frozen=True, kw_only=True)
class BaseConfig(Config):
    """Options of the command."""

    dir: Path = required(
        "folder that python -m demo.toy wrote", positional=True, group="what to read and write"
    )
    out: str = required("folder for all that the run writes", group="what to read and write")
    model: Path | None = option(
        None, "the weights to start from (default: DIR/model)", group="what to read and write"
    )
    steps: int = option(1000, "optimizer steps", least=1, group="the training")
    seed: int = option(0, "of the data order", least=0, group="the training")
    resume: bool = option(False, "go on with the run in --out", group="what to read and write")


def make_base(config: BaseConfig, ranks: Ranks) -> None:
    """Train the base model."""
    model = str(config.model or config.dir / "model")
    examples = grounding_examples(config.dir, model)
    settings = {"model": model, "seed": config.seed, "steps": config.steps}
    settings |= {"examples": examples.fingerprint(), "weights": weights_fingerprint(model)}
    settings |= {"stage": "sft", "command": sys.argv}
    run = open_run(config.out, config, settings, ranks)
    policy = load_policy(model, ranks.device, gradient_checkpointing=False)
    optimizer = ClippedAdamW(policy, beta2=0.98, weight_decay=0.0, max_grad_norm=1.0)
    done = run.load(policy, optimizer.adamw)
    order = {"batch_size": 16, "steps": config.steps, "seed": config.seed}
    stream = batches(examples, ranks, done=done, workers=0, **order)
    rate = partial(
        learning_rate, steps=config.steps, highest=1.5e-3, warmup=50, schedule=SFT.schedule
    )
    parts = Parts(
        run, examples, (), policy, optimizer, None, None, None, None, config.steps, done
    )
    stage = SFT(policy, optimizer, ranks, TOKENS_PER_MICROBATCH)
    with StopSignal() as stop:
        fit(stage, parts, stream, rate, ranks, stop, save_every=SAVE_EVERY)


def main(argv: list[str] | None = None) -> None:
    """Train a base model; --help lists the options."""
    config = parse_config(BaseConfig, __doc__, argv, prog="python -m demo.base")
    with one_line("", RESUME):
        make_base(config, start_ranks())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
