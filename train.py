"""Set-up of both trainings, and the loop that they share (Secs. 3.2, 3.3, 4.2).

`sft` and `grpo` unpack the options of their stage. The functions that they call take plain
arguments.
"""

import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from tqdm import tqdm

from engine import configs
from engine.data import image_check
from engine.data.examples import PROMPT_FILE, Example, Examples
from engine.data.loader import LEAVE_OUT, batches
from engine.files import naming, replace_file
from engine.model.lora import Adapter, read_adapter
from engine.model.model_files import model_warnings
from engine.model.optimizer import ClippedAdamW, learning_rate
from engine.model.policy import load_policies
from engine.model.quantized import is_packed
from engine.ranks import Ranks, start_ranks, use_all_cores
from engine.report.dry_run import describe, picture
from engine.report.run_view import Events, model_card, update_page, verdicts
from engine.runs.run_folder import RunFolder, open_run
from engine.sampling.slots import choose_slots
from engine.signals import RESUME, StopSignal
from engine.traces.trace_file import traces_of, untraced_line
from grpo import GRPO
from hicodet import InputError
from predict import Evaluation, asked_options, settings_of, text_reward, with_base
from sft import SFT, supervised_text

SHOWN = ("loss", "reward_total", "reward_iou", "kl", "completion_length", "eval_map")
FOR_SLOTS = 0.25  # share for sampling slots of the memory that is free before the first step
FEW_STEPS, PAPER_RATE = 100, 1e-6  # a training with fewer steps at this rate changes little


def sft(config: configs.SFTConfig) -> None:
    """Thinking distillation and answer supervision (Sec. 3.2)."""
    ranks = start_ranks(timedelta(minutes=config.timeout))
    config = with_rate(with_base(config))
    options = asked_options(config)
    samples, thinks, untraced = image_check.annotated_samples(config.data), {}, []
    if options.thinking:
        thinks = traces_of(config.traces, config.data, samples)
        untraced = [sample.file_name for sample in samples if sample.file_name not in thinks]
        ranks.print(untraced_line(len(untraced), len(samples), config.untraced))
        if config.untraced != "answer":
            samples = [sample for sample in samples if sample.file_name in thinks]
    elif config.traces:
        raise InputError("--no-thinking takes no --traces: there is no reasoning to train on")
    examples = Examples(config.model, samples, options, thinks=thinks, target_text=supervised_text)
    excluded = image_check.excluded_images(config.exclude, samples)
    if config.dry_run:
        return ranks.print(describe(examples, first_example(examples, excluded)))
    needs = {"replica": config.eval_every > 0, "reference": False}
    parts = set_up(config, examples, excluded, ranks, SFT.name, needs)
    if ranks.rank == 0 and thinks:
        replace_file(parts.run.path / "untraced.txt", "".join(f"{name}\n" for name in untraced))
    stage = SFT(parts.policy, parts.optimizer, ranks, config.tokens_per_microbatch)
    train(config, stage, parts, ranks)


def grpo(config: configs.GRPOConfig) -> None:
    """Reinforcement learning with the HOI rewards (Sec. 3.3)."""
    ranks = start_ranks(timedelta(minutes=config.timeout))
    config = with_rate(with_base(config))
    samples, rewards = image_check.annotated_samples(config.data), config.group(configs.REWARDS)
    examples = Examples(config.model, samples, asked_options(config))
    excluded = image_check.excluded_images(config.exclude, samples)
    if config.dry_run:
        first = first_example(examples, excluded)
        return ranks.print(describe(examples, first, partial(text_reward, **rewards)))
    needs = {"replica": True, "reference": config.kl_coef > 0}
    parts = set_up(config, examples, excluded, ranks, GRPO.name, needs)
    images = math.ceil(config.batch_size / ranks.world)
    room = {"group_size": config.group_size, "prompt_room": examples.longest_prompt()}
    room |= {"new": config.max_new_tokens, "share": FOR_SLOTS}
    stage = GRPO(
        parts.policy,
        parts.optimizer,
        parts.replica,
        parts.reference,
        examples,
        ranks,
        slots=choose_slots(parts.replica, ranks, config.slots, images, **room),
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        updates_per_batch=config.updates_per_batch,
        tokens_per_microbatch=config.tokens_per_microbatch,
        objective=config.group(configs.OBJECTIVE),
        rewards=rewards,
    )
    train(config, stage, parts, ranks)


def with_rate(config: configs.TrainConfig) -> configs.TrainConfig:
    """The config with its learning rate: as given, or the default for all weights or LoRA."""
    if config.learning_rate is not None:
        return config
    rate = config.LORA_RATE if config.lora_rank or config.adapter else configs.FULL_RATE
    return dataclasses.replace(config, learning_rate=rate)


def first_example(examples: Examples, excluded: Collection[int]) -> Example:
    """The first example that is not excluded. Raises InputError if its image cannot be used."""
    try:
        return examples[next(i for i in range(len(examples)) if i not in excluded)]
    except InputError as error:
        raise InputError(f"{error}; {LEAVE_OUT}") from None


@dataclass(frozen=True)
class Parts:
    """Everything that a training works with."""

    run: RunFolder
    examples: Examples
    excluded: Collection[int]  # indices of examples that are left out
    policy: object  # pi_theta
    optimizer: ClippedAdamW
    replica: object | None  # pi_old, which samples
    reference: object | None  # pi_ref
    adapter: Adapter | None  # with LoRA, the only part that is trained
    evaluation: Evaluation | None
    steps: int  # of the whole run
    done: int  # steps done before this process started


def set_up(
    config: configs.TrainConfig,
    examples: Examples,
    excluded: Collection[int],
    ranks: Ranks,
    stage: str,
    needs: dict[str, bool],
) -> Parts:
    """Open the run's folder, load the policies and the optimizer; restore a resumed run.

    needs: whether to load a "replica", pi_old, and a "reference", pi_ref.
    """
    require_trainable(config, examples, ranks)
    adapter = adapter_of(config)
    kept = len(examples) - len(excluded)
    steps = config.max_steps or config.epochs * math.ceil(kept / config.batch_size)
    evaluation = Evaluation(config, examples.options, ranks) if config.eval_every else None
    settings = settings_of(config, examples, stage)
    settings |= {"steps": steps, "excluded": image_check.excluded_fingerprint(excluded)}
    run = open_run(config.out, config, settings, ranks)
    notes = [f"{len(excluded)} of {len(examples)} images are excluded"] if config.exclude else []
    notes += filter(None, [image_check.odd_boxes(examples.samples)])
    notes += model_warnings(config.model, examples.config)
    for line in [*notes, *small_change(steps, config.learning_rate)]:
        ranks.print(line)
    if ranks.rank == 0:
        path = run.path / "first_sample.png"
        with naming(path):
            picture(first_example(examples, excluded)).save(path)
    needs = needs | {n: getattr(config, n) for n in ("gradient_checkpointing", "offload", "seed")}
    policy, replica, reference = load_policies(config.model, ranks.device, adapter, **needs)
    limits = {"weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm}
    optimizer = ClippedAdamW(policy, beta2=config.adam_beta2, **limits)
    done = run.load(policy, optimizer.adamw)
    if config.resume and not done:
        ranks.print(f"{run.path}: no checkpoint yet, starting from the first step")
    return Parts(
        run, examples, excluded, policy, optimizer, replica, reference, adapter, evaluation, steps,
        done,
    )  # fmt: skip


def adapter_of(config: configs.TrainConfig) -> Adapter | None:
    """The LoRA adapter to train; None trains all weights.

    Raises InputError if --lora-rank or --lora-alpha contradict the adapter of --adapter.
    """
    base = os.path.realpath(config.model) if Path(config.model).is_dir() else config.model
    if not config.adapter:
        alpha = config.lora_alpha or 2 * config.lora_rank
        return Adapter(config.lora_rank, alpha, base) if config.lora_rank else None
    found = read_adapter(config.adapter)
    if config.lora_rank not in (0, found.rank):
        raise InputError(f"--lora-rank {config.lora_rank}: the adapter has rank {found.rank}")
    if config.lora_alpha not in (None, found.alpha):
        asked = f"--lora-alpha {config.lora_alpha:g}"
        raise InputError(f"{asked}: the adapter has alpha {found.alpha:g}")
    return dataclasses.replace(found, base=base)


def require_trainable(config: configs.TrainConfig, examples: Examples, ranks: Ranks) -> None:
    """Raise InputError for quantised weights without LoRA, and for --offload without a GPU."""
    if is_packed(examples.config) and not (config.lora_rank or config.adapter):
        raise InputError(
            f"--model {config.model}: its weights are quantised and cannot be trained; train "
            "adapters on them with --lora-rank 16"
        )
    if config.offload and ranks.device.type == "cpu":
        raise InputError("--offload saves GPU memory, and torch finds no GPU here")
    if config.offload:
        use_all_cores()


def small_change(steps: int, rate: float) -> list[str]:
    """A warning that this training will hardly change its model; [] if it will."""
    if steps >= FEW_STEPS or rate > PAPER_RATE:
        return []
    most = steps * rate  # a step of Adam moves a weight by about the learning rate
    return [f"{steps} steps at --learning-rate {rate:g} move a weight by at most {most:.0e}"]


def train(config: configs.TrainConfig, stage, parts: Parts, ranks: Ranks) -> None:
    """Run the training loop with the options of a config. stage: SFT or GRPO."""
    stream = batches(
        parts.examples,
        ranks,
        batch_size=config.batch_size,
        steps=parts.steps,
        done=parts.done,
        seed=config.seed,
        workers=config.workers,
        excluded=parts.excluded,
    )
    rate = partial(
        learning_rate,
        steps=parts.steps,
        highest=config.learning_rate,
        warmup=config.warmup_steps,
        schedule=stage.schedule,
    )
    saving = config.group(configs.CHECKPOINTS) | {"eval_every": config.eval_every}
    with StopSignal() as stop:
        fit(stage, parts, stream, rate, ranks, stop, **saving)


def fit(
    stage,
    parts: Parts,
    stream: Iterator[tuple],
    rate: Callable[[int], float],
    ranks: Ranks,
    stop: StopSignal,
    *,
    save_every: int = 0,
    keep: int = 2,
    export_every: int = 0,
    eval_every: int = 0,
) -> None:
    """The training loop.

    stage: SFT or GRPO, whose `update` trains on one batch. stream: from `batches`. rate: maps a
    step to its learning rate.
    """
    run, optimizer, log = parts.run, parts.optimizer, StepLog(parts, stage.name, ranks)
    for step, batch, weights, waited in stream:
        started, done = time.perf_counter() - waited, step + 1
        values, rollout = stage.update(step, batch, weights, rate(step))
        seconds = time.perf_counter() - started
        values |= {"seconds": seconds, "seconds_waiting": waited}
        values |= {"share_waiting": waited / seconds}  # if large, raise --workers
        values |= {"learning_rate": rate(step), "skipped": optimizer.bad_in_a_row > 0}
        if eval_every and done % eval_every == 0:
            values |= parts.evaluation(parts.policy, parts.replica)
        log(done, values, rollout)
        # before the checkpoint, so that a run killed here exports again when it is resumed
        if export_every and done % export_every == 0:
            export(parts, f"model-{done:06d}")
        asked = stop.on_any(ranks)
        due = save_every and done % save_every == 0
        # a policy whose loss is not finite must not replace an earlier one
        if (asked or due) and not values["skipped"]:
            run.save(parts.policy, optimizer.adamw, done, keep)
            if ranks.rank == 0:
                update_page(run.path)
            # a signal during the save ends the image workers too, so no further step can run
            asked = asked or stop.on_any(ranks)
        if asked:
            log.bar.close()
            ranks.print(f"stopped after step {done}; {RESUME}")
            # SIGTERM comes from a batch system and is no failure; otherwise exit as a shell does
            sys.exit(0 if asked == signal.SIGTERM else 128 + asked)
    log.bar.close()
    export(parts, "model")
    if ranks.rank == 0:
        update_page(run.path)
        # an adapter of packed weights is alone, as it cannot be merged
        final = run.path / ("model" if (run.path / "model").is_dir() else "adapter")
        ranks.print(f"report: {run.path / 'report.html'}\nmodel: {final}")
        ranks.print(verdicts(run.path))
    run.finish()


class StepLog:
    """Writes and shows each step: logs, TensorBoard events, progress bar."""

    def __init__(self, parts: Parts, name: str, ranks: Ranks):
        self.run, first = parts.run, ranks.rank == 0
        self.events = Events(parts.run.path, parts.done + 1) if first else None
        self.bar = tqdm(
            total=parts.steps, initial=parts.done, disable=not first, desc=name, unit="step"
        )

    def __call__(self, step: int, values: dict, rollout: dict | None) -> None:
        """Log one step. rollout: completions of one image; None in SFT."""
        if rollout:
            self.run.log("rollouts", step, rollout)
        self.run.log("metrics", step, values)
        if self.events:
            self.events.log(step, values)
        self.bar.set_postfix({name: f"{values[name]:.3g}" for name in SHOWN if name in values})
        self.bar.update()


def export(parts: Parts, name: str) -> None:
    """Export a folder that `from_pretrained` reads; it also records the prompt options."""
    options = dataclasses.asdict(parts.examples.options)
    notes = {PROMPT_FILE: json.dumps(options, indent=2) + "\n"}
    notes["README.md"] = model_card(parts.run.path) if parts.run.ranks.rank == 0 else ""
    processors = [parts.examples.tokenizer, parts.examples.processor]
    parts.run.export(parts.policy, name, processors, notes, parts.adapter)
