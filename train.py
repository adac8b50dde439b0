"""The training loop of both stages (Sec. 4.2), and evaluation in training."""

import math
import time
from pathlib import Path

from tqdm import tqdm

import evaluate
import hicodet
import teacher
from engine.examples import Examples, batches, describe
from engine.policy import (
    Ranks,
    Stepper,
    learning_rate,
    load_model,
    load_policy,
    load_reference,
    refresh,
    start_ranks,
)
from engine.run import Run
from grpo import GRPOTrainer, reward_options
from predict import predict_rows, summarise
from sft import sft_update


def training_examples(config, ranks: Ranks) -> Examples:
    """The annotated training images; for SFT with their traces."""
    samples = [sample for sample in hicodet.load_split(config.data, "train") if sample.hois]
    thinks = None
    if hasattr(config, "traces"):
        thinks = {}
        if config.traces and not config.thinking:
            raise ValueError("--no-thinking takes no --traces: there is no reasoning to train on")
        if config.thinking:
            if not config.traces:
                raise ValueError("--traces: give the file of teacher.py, or --no-thinking")
            if not Path(config.traces).is_file():
                raise ValueError(f"--traces {config.traces}: no such file; teacher.py writes it")
            thinks = teacher.read_traces(config.traces)
            traced = [sample for sample in samples if sample.file_name in thinks]
            kept = len(traced) if config.untraced == "skip" else len(samples)
            ranks.print(f"{len(traced)} of {len(samples)} images have a trace; training on {kept}")
            samples = traced if config.untraced == "skip" else samples
    if not samples:
        raise ValueError(f"no image of {config.data} to train on (annotated, with a trace)")
    hicodet.require_images(samples)
    return Examples(config.model, samples, thinks, **config.prompt_switches())


def train(config) -> None:
    """SFT or GRPO."""
    ranks, is_sft = start_ranks(), hasattr(config, "traces")
    examples = training_examples(config, ranks)
    judge = Judge(config, ranks) if config.eval_every else None
    if config.dry_run:
        options = {} if is_sft else reward_options(config)
        return ranks.print(describe(examples[0], examples, options))
    run = Run(config, examples, ranks)
    checkpointing = config.gradient_checkpointing
    policy = load_policy(config.model, ranks.device, gradient_checkpointing=checkpointing)
    replica = load_model(config.model, ranks.device) if judge or not is_sft else None
    stepper = Stepper(
        policy,
        beta2=config.adam_beta2,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    done = run.load(policy, stepper.optimizer)
    if not is_sft:
        reference = load_reference(config, ranks.device)
        trainer = GRPOTrainer(policy, stepper, replica, reference, examples, config, ranks)
    steps = config.max_steps or config.epochs * math.ceil(len(examples) / config.batch_size)
    name, schedule = ("sft", "cosine") if is_sft else ("grpo", "linear")
    stream = batches(examples, config, ranks, done=done, steps=steps)
    with tqdm(total=steps, initial=done, disable=ranks.rank > 0, desc=name, unit="step") as bar:
        for step, batch, weights, waited in stream:
            started = time.perf_counter() - waited
            lr = learning_rate(step, steps, config.learning_rate, config.warmup_steps, schedule)
            if is_sft:
                options = {"lr": lr, "budget": config.tokens_per_microbatch, "ranks": ranks}
                values = sft_update(policy, stepper, batch, weights, **options)
            else:
                values, rollout = trainer.update(step, batch, weights, lr)
                run.log("rollouts", step + 1, rollout)
            seconds = time.perf_counter() - started
            values |= {"seconds": seconds, "seconds_waiting": waited}
            values |= {"share_waiting": waited / seconds}  # for images: more --workers if large
            values |= {"learning_rate": lr, "skipped": stepper.bad_in_a_row > 0}
            if judge and (step + 1) % config.eval_every == 0:
                refresh(replica, policy)
                values |= judge(replica)
            run.log("metrics", step + 1, values)
            shown = ("loss", "reward_total", "reward_iou", "kl", "completion_length", "eval_map")
            bar.set_postfix({name: f"{values[name]:.3g}" for name in shown if name in values})
            bar.update()
            if config.save_every and (step + 1) % config.save_every == 0:
                run.save(policy, stepper.optimizer, step + 1)
    run.export(policy, examples)
    ranks.print(f"model: {run.folder / 'model'}")


class Judge:
    """Held-out images for --eval-every: mean greedy reward, and mAP over the classes they show."""

    def __init__(self, config, ranks: Ranks):
        samples = hicodet.load_split(config.data, "test")[: config.eval_images]
        hicodet.require_images(samples)
        self.examples = Examples(config.model, samples, **config.prompt_switches())
        self.ranks, self.max_new_tokens = ranks, config.eval_max_new_tokens
        self.counts = hicodet.training_counts(config.data)

    def __call__(self, model) -> dict[str, float]:
        samples = self.examples.samples
        indices, limit = list(range(len(samples))), self.max_new_tokens
        options = {"max_new_tokens": limit, "slots": 32}  # in the memory that training leaves
        mine = predict_rows(model, self.examples, indices, self.ranks, **options)
        rows = sorted(self.ranks.gather(list(mine)), key=lambda row: row["index"])
        lines, summary = [row["line"] for row in rows], summarise(rows)
        result = evaluate.evaluate(lines, samples, self.counts, classes="present")
        return {
            "eval_reward": summary["reward"].get("total", 0.0),
            "eval_map": 100 * (result["default"]["full"] or 0.0),
            "eval_length": summary["completion_length"],
        }
