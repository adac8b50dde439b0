"""What the tests of hoi_r1.py build: configs of small runs, their parts, and what they wrote."""

import json
from pathlib import Path

from safetensors.torch import load_file

import engine.examples
import engine.policy
import hicodet
import hoi_r1
import teacher


def write_traces(folder, count=None):
    """traces.jsonl from the ground truth of the first `count` training images."""
    samples = hicodet.load_split(folder / "data", "train")[:count]
    rows = [{"file_name": s.file_name, "think": teacher.template_trace(s.hois)} for s in samples]
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
        values |= {"traces": str(folder / "traces.jsonl"), "batch_size": 4, "learning_rate": 1e-3}
    if stage == "grpo":
        values |= {"batch_size": 3, "learning_rate": 1e-3, "max_new_tokens": 12, "max_steps": 3}
    return hoi_r1.STAGES[stage](**values | changes)


def examples_of(config, samples, thinks=None):
    return engine.examples.Examples(config.model, samples, thinks, **config.prompt_switches())


def policy_of(config, ranks):
    checkpointing = config.gradient_checkpointing
    return engine.policy.load_policy(config.model, ranks.device, gradient_checkpointing=checkpointing)


def stepper_of(policy, config):
    limits = {"weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm}
    return engine.policy.Stepper(policy, beta2=config.adam_beta2, **limits)


def weights(out):
    return load_file(Path(out) / "model" / "model.safetensors")


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
