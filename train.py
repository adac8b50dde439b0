"""Both trainings (Secs. 3.2, 3.3, 4.2): their parts are made here, and they share one loop.

`sft` and `grpo` take the options of a stage, SFTConfig or GRPOConfig of hoi_r1.py, and unpack them;
what they call takes plain arguments.
"""

import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from tqdm import tqdm

import evaluate
import hicodet
from engine.data import annotations
from engine.data.examples import FRAME_FILE, Examples, batches, describe, picture
from engine.data.image_check import bad_images, odd_boxes
from engine.files import naming, read_object, replace_file, write_json
from engine.model.policy import (
    ClippedAdamW,
    Ranks,
    learning_rate,
    load_model,
    load_policy,
    load_reference,
    refresh,
    start_ranks,
    use_all_cores,
    weights_fingerprint,
)
from engine.model.quantized import is_packed
from engine.report.events import Events
from engine.report.run_view import model_card, update_page, verdicts
from engine.runs.run_folder import BAD_IMAGES, Run, open_run
from engine.signals import Stop, exit_code, resume_command
from engine.traces.trace_file import read_traces
from grpo import GRPO
from hicodet import InputError
from predict import predict_rows, prompt_options, summarise, text_reward
from sft import SFT, supervised_text, traced_samples

# of GRPOConfig, what the rewards are told; of both configs, what `fit` is told
REWARD_OPTIONS = ("duplicate_rule", "duplicates_earn", "label_reward", "without")
LOOP_OPTIONS = (
    *("batch_size", "seed", "workers", "warmup_steps"),
    *("save_every", "keep", "export_every", "eval_every"),
)
MAX_UNTRACED = 0.05  # share of images without a trace that SFT leaves out unasked
SHOWN = ("loss", "reward_total", "reward_iou", "kl", "completion_length", "eval_map")


def sft(config) -> None:
    """Thinking distillation and answer supervision (Sec. 3.2). config: hoi_r1.SFTConfig."""
    ranks = start_ranks(timedelta(minutes=config.timeout))
    samples, thinks = annotated_samples(config.data, ranks), {}
    if config.thinking:
        thinks = traces_of(config.traces, config.data, samples)
        untraced = [sample.file_name for sample in samples if sample.file_name not in thinks]
        ranks.print(untraced_line(len(untraced), len(samples), config.untraced))
        samples = traced_samples(samples, thinks, config.untraced or "skip")
    elif config.traces:
        raise InputError("--no-thinking takes no --traces: there is no reasoning to train on")
    options = prompt_options(config) | {"thinks": thinks, "target_text": supervised_text}
    bad = images_left_out(config, samples, ranks)
    examples = Examples(config.model, samples, bad=bad, **options)
    require_trainable(examples, config.model)
    if config.dry_run:
        return ranks.print(describe(examples))
    parts = set_up(config, examples, ranks, SFT.name, needs_replica=config.eval_every > 0)
    if ranks.rank == 0 and thinks:
        text = "".join(f"{name}\n" for name in untraced)
        replace_file(parts.run.folder / "untraced.txt", text)
    stage = SFT(parts.policy, parts.optimizer, ranks, config.tokens_per_microbatch)
    with Stop() as stop:
        fit(stage, parts, examples, ranks, stop, **loop_options(config))


def grpo(config) -> None:
    """Reinforcement learning with the HOI rewards (Sec. 3.3). config: hoi_r1.GRPOConfig."""
    ranks = start_ranks(timedelta(minutes=config.timeout))
    samples = annotated_samples(config.data, ranks)
    bad = images_left_out(config, samples, ranks)
    examples = Examples(config.model, samples, bad=bad, **prompt_options(config))
    require_trainable(examples, config.model)
    reward_options = {name: getattr(config, name) for name in REWARD_OPTIONS}
    if config.dry_run:
        return ranks.print(describe(examples, partial(text_reward, **reward_options)))
    parts = set_up(config, examples, ranks, GRPO.name, needs_replica=True)
    stage = GRPO(
        parts.policy,
        parts.optimizer,
        parts.replica,
        load_reference(config.model, ranks.device, offload=config.offload)
        if config.kl_coef
        else None,
        examples,
        ranks,
        slots=min(config.slots, math.ceil(config.batch_size / ranks.world)),
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        updates_per_batch=config.updates_per_batch,
        tokens_per_microbatch=config.tokens_per_microbatch,
        objective={name: getattr(config, name) for name in ("clip_eps", "kl_coef", "ratio")},
        rewards=reward_options,
    )
    with Stop() as stop:
        fit(stage, parts, examples, ranks, stop, **loop_options(config))


def annotated_samples(data: str, ranks: Ranks) -> list[hicodet.Sample]:
    """The training images with ground truth; others have nothing to train on.

    Says in a line how many boxes of it are odd, if any are.
    """
    samples = [sample for sample in annotations.load_split(data, "train") if sample.hois]
    if odd := odd_boxes(samples):
        ranks.print(odd)
    return samples


def images_left_out(config, samples: list[hicodet.Sample], ranks: Ranks) -> dict[str, str]:
    """Why images are left out of a training, by file name: what --skip-bad-images found first.

    A resumed run leaves out the same. The ranks share the reading. Raises InputError if there is
    nothing to train on, FileNotFoundError for missing images that are not left out.
    """
    if not samples:
        raise InputError(f"no image of {config.data} to train on (annotated, with a trace)")
    mine, path = {}, Path(config.out) / BAD_IMAGES
    if config.resume and path.exists():
        mine = read_object(path)
    elif config.skip_bad_images:
        mine = bad_images(samples[ranks.rank :: ranks.world], config.workers, quiet=ranks.rank > 0)
    bad = dict(ranks.gather(list(mine.items())))
    if bad or config.skip_bad_images:
        ranks.print(f"{len(bad)} of {len(samples)} images cannot be used: left out, see {path}")
    annotations.require_images(sample for sample in samples if sample.file_name not in bad)
    if len(bad) == len(samples):
        raise InputError(f"none of {len(bad)} images can be used, as {next(iter(bad.values()))}")
    return bad


def untraced_line(missing: int, total: int, untraced: str | None) -> str:
    """What SFT says of images without a trace. Raises InputError for many if none chose."""
    if missing > MAX_UNTRACED * total and untraced is None:
        raise InputError(
            f"{missing} of {total} annotated images have no trace: run teacher.py again, or choose "
            "--untraced skip (leave them out) or --untraced answer (train on their answers alone)"
        )
    fate = "trained on their answer alone" if untraced == "answer" else "left out"
    return f"{missing} of {total} annotated images have no trace: {fate if missing else 'good'}"


def require_trainable(examples: Examples, model: str) -> None:
    """Raise InputError for a model with quantised weights, which have no gradient."""
    if is_packed(examples.config):
        raise InputError(
            f"--model {model}: its weights are quantised (quantization_config of config.json), and "
            "only predict takes such a model; train one in bf16 or fp32"
        )


def traces_of(path: str, data: str, samples: list[hicodet.Sample]) -> dict[str, str]:
    """The teacher's traces by file name, from the file of --traces.

    Raises InputError if there is no such file, or if none of its traces is of an image of --data.
    """
    if not path:
        raise InputError("--traces: give the file of teacher.py, or --no-thinking")
    if not Path(path).is_file():
        raise InputError(f"--traces {path}: no such file; teacher.py writes it")
    thinks = read_traces(path)
    if thinks and samples and not any(sample.file_name in thinks for sample in samples):
        raise InputError(
            f"--traces {path}: none of its {len(thinks)} images is in --data {data}; are they of "
            "another data set?"
        )
    return thinks


def step_count(config, images: int) -> int:
    """How many steps a training on so many images has."""
    return config.max_steps or config.epochs * math.ceil(images / config.batch_size)


def loop_options(config) -> dict:
    """What `fit` takes of a config."""
    options = {name: getattr(config, name) for name in LOOP_OPTIONS}
    return options | {"peak_learning_rate": config.learning_rate}


@dataclass(frozen=True)
class Parts:
    """What a training works with."""

    run: Run
    policy: object  # pi_theta
    optimizer: ClippedAdamW
    replica: object | None  # in the dtype of computation, for sampling
    evaluation: "Evaluation | None"
    steps: int  # of the whole run
    done: int  # of them, before this process


def set_up(
    config, examples: Examples, ranks: Ranks, stage: str, *, needs_replica: bool
) -> Parts:
    """The run's folder, the policy and its optimizer, restored where a run is resumed."""
    if config.offload and ranks.device.type == "cpu":
        raise InputError("--offload: it spares a GPU's memory, and torch finds no GPU here")
    if config.offload:
        use_all_cores()
    held_out = held_out_examples(config) if config.eval_every else None
    settings = dataclasses.asdict(config) | {"examples": examples.fingerprint()}
    settings |= {"box_frame": examples.box_frame, "weights": weights_fingerprint(config.model)}
    steps = step_count(config, len(examples) - len(examples.left_out))
    settings |= {"stage": stage, "command": sys.argv, "steps": steps}
    run = open_run(config.out, settings, resume=config.resume, ranks=ranks)
    if ranks.rank == 0:
        path = run.folder / "first_sample.png"
        with naming(path):
            picture(examples.first()).save(path)
        if config.skip_bad_images or examples.bad:
            write_json(run.folder / BAD_IMAGES, examples.bad)
        else:  # of a run that was begun here before, and failed before its first result
            (run.folder / BAD_IMAGES).unlink(missing_ok=True)
    memory = {name: getattr(config, name) for name in ("gradient_checkpointing", "offload")}
    policy = load_policy(config.model, ranks.device, **memory)
    replica = load_model(config.model, ranks.device) if needs_replica else None
    optimizer = ClippedAdamW(
        policy,
        beta2=config.adam_beta2,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    done = run.load(policy, optimizer.adamw)
    if config.resume and not done:
        ranks.print(f"{run.folder}: no checkpoint yet, starting from the first step")
    evaluation = None
    if held_out:
        counts, limit = annotations.training_counts(config.data), config.eval_max_new_tokens
        evaluation = Evaluation(held_out, replica, counts, ranks, max_new_tokens=limit)
    return Parts(run, policy, optimizer, replica, evaluation, steps, done)


def fit(
    stage,
    parts: Parts,
    examples: Examples,
    ranks: Ranks,
    stop: Stop,
    *,
    batch_size: int,
    seed: int,
    workers: int,
    peak_learning_rate: float,
    warmup_steps: int,
    save_every: int = 0,
    keep: int = 2,
    export_every: int = 0,
    eval_every: int = 0,
) -> None:
    """The training loop. stage: SFT or GRPO, whose `update` does one batch."""
    run, optimizer, steps, done = parts.run, parts.optimizer, parts.steps, parts.done
    events = Events(run.folder, done + 1) if ranks.rank == 0 else None
    order = {"batch_size": batch_size, "steps": steps, "seed": seed, "workers": workers}
    bar = tqdm(
        total=steps, initial=done, disable=ranks.rank > 0, desc=stage.name, unit="step"
    )
    for step, batch, weights, waited in batches(examples, ranks, done=done, **order):
        started = time.perf_counter() - waited
        lr = learning_rate(step, steps, peak_learning_rate, warmup_steps, stage.schedule)
        values, rollout = stage.update(step, batch, weights, lr)
        seconds = time.perf_counter() - started
        values |= {"seconds": seconds, "seconds_waiting": waited}
        values |= {"share_waiting": waited / seconds}  # for images: more --workers if large
        values |= {"learning_rate": lr, "skipped": optimizer.bad_in_a_row > 0}
        if examples.left_out:
            values |= {"bad_images": len(examples.left_out)}
        if eval_every and (step + 1) % eval_every == 0:
            values |= parts.evaluation(parts.policy)
        log_step(run, events, bar, step + 1, values, rollout)
        # before the checkpoint: a run that is killed here comes to this step again
        if export_every and (step + 1) % export_every == 0:
            export(run, parts.policy, examples, f"model-{step + 1:06d}")
        asked = stop.on_any(ranks)
        due = save_every and (step + 1) % save_every == 0
        # a policy whose loss is not finite must not take the place of one before
        if (asked or due) and not values["skipped"]:
            run.save(parts.policy, optimizer.adamw, step + 1, keep)
            if ranks.rank == 0:
                update_page(run.folder)
            # a signal that came meanwhile has ended the image workers: no further step
            asked = asked or stop.on_any(ranks)
        if asked:
            bar.close()
            ranks.print(f"stopped after step {step + 1}; go on with: {resume_command()}")
            sys.exit(exit_code(asked))
    bar.close()
    if ranks.rank == 0:
        update_page(run.folder)
    export(run, parts.policy, examples, "model")
    ranks.print(f"report: {run.folder / 'report.html'}\nmodel: {run.folder / 'model'}")
    if ranks.rank == 0:
        ranks.print(verdicts(run.folder))
    run.finish()


def log_step(run: Run, events: Events | None, bar: tqdm, step: int, values: dict, rollout) -> None:
    """Write a step into the run's logs, and show it. rollout: None in SFT."""
    if rollout:
        run.log("rollouts", step, rollout)
    run.log("metrics", step, values)
    if events:
        events.log(step, values)
    bar.set_postfix({name: f"{values[name]:.3g}" for name in SHOWN if name in values})
    bar.update()


def export(run: Run, policy, examples: Examples, name: str) -> None:
    """Write a folder that `from_pretrained`, and prediction, read without being told more."""
    notes = {FRAME_FILE: json.dumps({"box_frame": examples.box_frame}) + "\n"}
    card = model_card(run.folder) if run.ranks.rank == 0 else ""
    notes |= {"README.md": card} if card else {}
    run.export(policy, name, [examples.tokenizer, examples.processor], notes)


def held_out_examples(config) -> Examples:
    """The test images of --eval-every, from the first."""
    samples = annotations.load_split(config.data, "test")[: config.eval_images]
    annotations.require_images(samples)
    return Examples(config.model, samples, **prompt_options(config))


class Evaluation:
    """Held-out images for --eval-every: mean greedy reward, and mAP over the classes they show."""

    def __init__(self, examples: Examples, replica, counts, ranks: Ranks, *, max_new_tokens: int):
        self.examples, self.replica, self.counts = examples, replica, counts
        self.ranks, self.max_new_tokens = ranks, max_new_tokens

    def __call__(self, policy) -> dict[str, float]:
        refresh(self.replica, policy)
        samples = self.examples.samples
        indices, limit = list(range(len(samples))), self.max_new_tokens
        options = {"max_new_tokens": limit, "slots": 32}  # in the memory that training leaves
        mine = predict_rows(self.replica, self.examples, indices, self.ranks, **options)
        rows = sorted(self.ranks.gather(list(mine)), key=lambda row: row["index"])
        lines, summary = [row["line"] for row in rows], summarise(rows)
        result = evaluate.evaluate(lines, samples, self.counts, classes="present")
        return {
            "eval_reward": summary["reward"].get("total", 0.0),
            "eval_map": 100 * (result["default"]["full"] or 0.0),
            "eval_length": summary["completion_length"],
        }
