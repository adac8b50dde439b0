"""Shared by tests of whole runs: small configs, the parts of a run, two ranks, results."""

import gc
import json
import multiprocessing
import os
import shutil
import socket
from pathlib import Path

import torch
from safetensors.torch import load_file

import grpo
import hicodet
import hoi_r1
import predict
import sft
from demo import toy
from engine import configs
from engine.data import annotations
from engine.data.examples import Examples
from engine.model.optimizer import ClippedAdamW
from engine.model.policy import load_policy
from engine.traces.template import template_trace
from engine.traces.trace_file import read_traces

# forks of a process that has imported everything and runs no threads, which a fork would lose
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["hoi_r1", "predict", "train"])
# command line of a small SFT, without --out and --max-steps
SFT_LINE = (
    "hoi_r1.py sft --model {folder}/model --data {folder}/data --traces {folder}/traces.jsonl "
    "--untraced skip --no-task-description --batch-size 4 --learning-rate 1e-3"
)


def write_toy(folder):
    """Write 24 and 6 drawings, a tiny model with random weights, and 20 traces."""
    toy.main([str(folder), "--train", "24", "--test", "6"])
    toy.tiny_model(3).save_pretrained(folder / "model")
    write_traces(folder, 20)


def write_traces(folder, count=None):
    """Write traces.jsonl from the ground truth of the first `count` training images."""
    samples = annotations.load_split(folder / "data", "train")[:count]
    rows = [{"file_name": s.file_name, "think": template_trace(s.hois)} for s in samples]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(stage, folder, out, **changes):
    """A small config of a stage."""
    values = {"model": str(folder / "model"), "data": str(folder / "data"), "out": str(out)}
    values |= {"task_description": False, "workers": 0}
    if stage == "sft":
        values |= {"traces": str(folder / "traces.jsonl"), "untraced": "skip"}
        values |= {"batch_size": 4, "learning_rate": 1e-3}
    if stage == "grpo":
        values |= {"batch_size": 3, "learning_rate": 1e-3, "max_new_tokens": 12, "max_steps": 3}
    return configs.STAGES[stage](**values | changes)


def run(config):
    """Run a stage in this process."""
    try:
        hoi_r1.run_stage(config)
    except SystemExit as end:  # finished before, or stopped by a signal
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
    """The samples as a stage reads them; thinks: the traces of an SFT."""
    target = None if thinks is None else sft.supervised_text
    options = predict.asked_options(config)
    return Examples(config.model, samples, options, thinks=thinks, target_text=target)


def training_examples(config):
    """All annotated training images of a config; in an SFT those with traces."""
    samples = [s for s in annotations.load_split(config.data, "train") if s.hois]
    if not hasattr(config, "traces"):
        return examples_of(config, samples)
    thinks = read_traces(config.traces)
    return examples_of(config, [s for s in samples if s.file_name in thinks], thinks)


def policy_of(config, ranks):
    checkpointing = config.gradient_checkpointing
    return load_policy(config.model, ranks.device, gradient_checkpointing=checkpointing)


def optimizer_of(policy, config):
    limits = {"weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm}
    return ClippedAdamW(policy, beta2=config.adam_beta2, **limits)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_two_ranks(act, *arguments) -> list:
    """Run act(*arguments) on two ranks, each in its own process. Returns both results."""
    results, port = SERVER.SimpleQueue(), free_port()
    given = [(results, rank, port, act, arguments) for rank in (0, 1)]
    ranks = [SERVER.Process(target=_act_on, args=one) for one in given]
    for rank in ranks:
        rank.start()
    try:
        for rank in ranks:
            rank.join(100)
            assert rank.exitcode == 0
    finally:
        for rank in ranks:
            rank.kill()
    return [results.get() for _ in ranks]


def _act_on(results, rank: int, port: int, act, arguments: tuple) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank}
    os.environ.update({name: str(value) for name, value in place.items()})
    results.put(act(*arguments))


def score_tokens(stage, example, rollout):
    """Replaces GRPO.score: a reward that random text earns too."""
    texts = [stage.examples.decode(ids) for ids in rollout.completion_ids]
    values = [float((ids % 7).float().mean()) for ids in rollout.completion_ids]
    parts = [{"format": v, "object": 0.0, "verb": 0.0, "iou": 0.0, "total": v} for v in values]
    return [grpo.Scored(t, hicodet.parse_completion(t), p) for t, p in zip(texts, parts)]


def as_killed(out, amid):
    """Turn a finished run into what kill -9 leaves. amid: the folder that was being written."""
    (out / amid).rename(new := (out / amid).with_suffix(".tmp"))
    largest = max(new.iterdir(), key=lambda path: path.stat().st_size)
    half = largest.read_bytes()[:1000]
    largest.unlink()  # not cut in place: `weights` has it mapped
    largest.write_bytes(half)
    shutil.rmtree(out / "model", ignore_errors=True)
    config = json.loads((out / "config.json").read_text())
    del config["finished"]
    (out / "config.json").write_text(json.dumps(config))
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"step": 9, "lo')


def weights(out):
    return load_file(Path(out) / "model" / "model.safetensors")


def same_weights(one, other):
    """Whether two sets of weights, or the models in two folders of runs, are equal to the bit."""
    one, other = (found if isinstance(found, dict) else weights(found) for found in (one, other))
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
