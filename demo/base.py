"""The toy's base model: it can describe a drawing, but not in the format of the task.

    python -m demo.toy runs/grounding --train 20000 --left-out 0 --seed 1000
    torchrun --nproc_per_node 2 -m demo.base runs/grounding --out runs/base

From random weights it learns to list all people and objects, then the pairs, in a format that the
task does not read (demo/grounding.py). So its HOI mAP is 0. The loop and the loss are those of SFT.
The base model is the folder model/ in --out.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from demo.grounding import PAIRS_PROMPT, PROMPT, pair_lines
from engine.data.annotations import load_split
from engine.data.examples import END_OF_TURN, Examples, PromptOptions
from engine.data.loader import batches
from engine.model.model_files import weights_fingerprint
from engine.model.optimizer import ClippedAdamW, learning_rate
from engine.model.policy import load_policy
from engine.options import Config, option, parse_config, required
from engine.ranks import Ranks, start_ranks
from engine.runs.run_folder import open_run
from engine.signals import RESUME, StopSignal, one_line
from engine.traces.trace_file import read_traces
from hicodet import HOI
from sft import SFT
from train import Parts, fit

TOKENS_PER_MICROBATCH = 16384
SAVE_EVERY = 250  # steps between checkpoints


def base_examples(folder: Path, boxes_only: bool) -> Examples:
    """The training drawings of `python -m demo.toy`, each with its prompt and text.

    folder: with data/, model/ and grounding.jsonl. boxes_only: no lines of pairs after the text of
    grounding.jsonl. Raises InputError or OSError if a file is missing.
    """

    def target_text(hois: tuple[HOI, ...], grounding: str) -> str:
        return grounding + ("" if boxes_only else f"\n{pair_lines(hois)}") + END_OF_TURN

    return Examples(
        str(folder / "model"),
        load_split(folder / "data", "train"),
        PromptOptions(task_description=False),  # as in the demo's SFT and GRPO
        thinks=read_traces(folder / "grounding.jsonl"),
        target_text=target_text,
        prompt_text=lambda thinking: PROMPT if boxes_only else PAIRS_PROMPT,
    )


@dataclass(frozen=True, kw_only=True)
class BaseConfig(Config):
    """Options of the command."""

    FILES, TRAINING = "input and output", "training"
    dir: Path = required("folder that python -m demo.toy wrote", positional=True, group=FILES)
    out: str = required("folder for all that the run writes", group=FILES)
    resume: bool = option(False, "continue the run in --out", group=FILES)
    boxes_only: bool = option(False, "teach only boxes, without lines of pairs", group=TRAINING)
    steps: int = option(3000, "optimizer steps", least=1, group=TRAINING)
    seed: int = option(0, "seed of the data order", least=0, group=TRAINING)


def make_base(config: BaseConfig, ranks: Ranks) -> None:
    """Train the base model."""
    model, examples = str(config.dir / "model"), base_examples(config.dir, config.boxes_only)
    settings = {"seed": config.seed, "steps": config.steps, "examples": examples.fingerprint()}
    settings |= {"model": model, "weights": weights_fingerprint(model)}
    settings |= {"stage": "sft", "command": sys.argv}  # for the page of the run
    run = open_run(config.out, config, settings, ranks)
    policy = load_policy(model, ranks.device, gradient_checkpointing=False)
    optimizer = ClippedAdamW(policy, beta2=0.98, weight_decay=0.0, max_grad_norm=1.0)
    done = run.load(policy, optimizer.adamw)
    order = {"batch_size": 16, "steps": config.steps, "seed": config.seed}
    stream = batches(examples, ranks, done=done, workers=0, **order)
    limits = {"highest": 1.5e-3, "warmup": 50, "schedule": SFT.schedule}
    rate = partial(learning_rate, steps=config.steps, **limits)
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
