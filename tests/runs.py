"""What tests of whole runs share: configs of small runs, their parts, and what they wrote."""

import gc
import json
from pathlib import Path

from safetensors.torch import load_file

import engine.data.examples
import engine.model.optimizer
import engine.model.policy
import engine.traces.trace_file
import hicodet
import hoi_r1
import sft
from demo import toy
from engine.data import annotations
from engine.traces.template import template_trace
from predict import asked_options


def write_toy(folder):
    """What most tests work on: 24 and 6 drawings, a tiny model of random weights, 20 traces."""
    toy.main([str(folder), "--train", "24", "--test", "6"])
    toy.tiny_model(3).save_pretrained(folder / "model")
    write_traces(folder, 20)


def write_traces(folder, count=None):
    """traces.jsonl from the ground truth of the first `count` training images."""
    samples = annotations.load_split(folder / "data", "train")[:count]
    rows = [{"file_name": s.file_name, "think": template_trace(s.hois)} for s in samples]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(stage, folder, out, **changes):
    """A small config of a stage."""
    values = {
        "model": str(folder / "model"),
        "data": str(folder / "data"),
        "out": str(out),
        "task_description": False,
        "workers": 0,
    }
    if stage == "sft":
        values |= {"traces": str(folder / "traces.jsonl"), "untraced": "skip"}
        values |= {"batch_size": 4, "learning_rate": 1e-3}
    if stage == "grpo":
        values |= {"batch_size": 3, "learning_rate": 1e-3, "max_new_tokens": 12, "max_steps": 3}
    return hoi_r1.STAGES[stage](**values | changes)


def run(config):
    """Run a stage in this process."""
    try:
        hoi_r1.run_stage(config)
    except SystemExit as end:  # a finished run is resumed
        assert end.code == 0
    finally:
        hoi_r1.leave_ranks(failed=False)


def refusal(config) -> str:
    """The one line that a refused run prints."""
    try:  # not pytest.raises, which keeps the frames and with them the lock of the run
        run(config)
    except (hicodet.InputError, OSError) as error:
        message = str(error)
        assert "\n" not in message
    else:
        raise AssertionError("nothing was refused")
    gc.collect()  # frees the frames of the error, and with them the lock of the run
    return message


def examples_of(config, samples, thinks=None):
    """The samples as a stage reads them; with traces as SFT does."""
    target = None if thinks is None else sft.supervised_text
    options = {"thinks": thinks, "target_text": target}
    return engine.data.examples.Examples(config.model, samples, asked_options(config), **options)


def training_examples(config):
    """All annotated training images of a config, for SFT with their traces."""
    samples = [s for s in annotations.load_split(config.data, "train") if s.hois]
    if not hasattr(config, "traces"):
        return examples_of(config, samples)
    thinks = engine.traces.trace_file.read_traces(config.traces)
    return examples_of(config, [s for s in samples if s.file_name in thinks], thinks)


def policy_of(config, ranks):
    checkpointing = config.gradient_checkpointing
    return engine.model.policy.load_policy(
        config.model, ranks.device, gradient_checkpointing=checkpointing
    )


def optimizer_of(policy, config):
    limits = {"weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm}
    return engine.model.optimizer.ClippedAdamW(policy, beta2=config.adam_beta2, **limits)


def weights(out):
    return load_file(Path(out) / "model" / "model.safetensors")


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
