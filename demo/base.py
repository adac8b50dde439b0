"""The toy's base model: where things are, and nothing of who does what with them.

    python -m demo.toy DIR --complete --seed 1000
    torchrun --nproc_per_node 2 -m demo.base DIR --out FOLDER

It learns from random weights to list every person and object of a drawing (demo/grounding.py). So
it stands for what Qwen2.5-VL-3B knows before it meets HOI, and its HOI mAP is 0. The loop and the
loss are those of SFT. FOLDER is the folder of a run; its model/ is the base model.
"""

import argparse
import sys
from pathlib import Path

import torch.distributed as dist

from demo.grounding import PROMPT
from engine.examples import END_OF_TURN, Examples
from engine.policy import ClippedAdamW, Ranks, load_policy, start_ranks, weights_fingerprint
from engine.run import open_run
from engine.signals import Stop
from engine.traces import read_traces
from hicodet import InputError, load_split
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


def make_base(args: argparse.Namespace, ranks: Ranks) -> None:
    """Train the base model. args: of the command line."""
    model = str(args.model or args.dir / "model")
    examples = grounding_examples(args.dir, model)
    settings = {"model": model, "seed": args.seed, "steps": args.steps}
    settings |= {"examples": examples.fingerprint(), "weights": weights_fingerprint(model)}
    settings |= {"stage": "sft", "command": sys.argv}
    run = open_run(args.out, settings, resume=args.resume, ranks=ranks)
    policy = load_policy(model, ranks.device, gradient_checkpointing=False)
    optimizer = ClippedAdamW(policy, beta2=0.98, weight_decay=0.0, max_grad_norm=1.0)
    done = run.load(policy, optimizer.adamw)
    with Stop() as stop:
        fit(
            SFT(policy, optimizer, ranks, TOKENS_PER_MICROBATCH),
            Parts(run, policy, optimizer, replica=None, evaluation=None, done=done),
            examples,
            ranks,
            stop,
            steps=args.steps,
            batch_size=16,
            seed=args.seed,
            workers=0,
            peak_learning_rate=1.5e-3,
            warmup_steps=50,
            save_every=SAVE_EVERY,
            eval_every=0,
        )


def main(argv: list[str] | None = None) -> None:
    """Train a base model; --help lists the options."""
    parser = argparse.ArgumentParser(description="Teach random weights where things are.")
    add = parser.add_argument
    add("dir", type=Path, help="folder that python -m demo.toy wrote")
    add("--out", required=True, help="folder for all that the run writes")
    add("--model", type=Path, help="the weights to start from (default: DIR/model)")
    add("--steps", type=int, default=1000, help="optimizer steps (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the data order (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be at least 1")
    try:
        make_base(args, start_ranks())
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
