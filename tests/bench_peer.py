"""A step of GRPO by TRL's GRPOTrainer and by ours: same model folder, prompts, lengths, rewards.

TRL is installed into an environment of its own, which uses our torch and transformers. Neither side
samples the end token, so all completions have the full length. Our code computes the gradient of
TRL's first step again.
"""

import json
import os
import subprocess
import sysconfig
import time
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import grpo
import hicodet
import rewards
from demo import toy
from engine.data.examples import Example, Examples
from engine.sampling.sampler import Rollout
from tests import bench_cpu
from tests.bench_measure import Result, Runs, measure, result
from tests.bench_models import Size
from tests.bench_trainer import make_trainer

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "peer"  # git ignores runs/
VERSION = "1.16.0"
AROUND = 13  # tokens of the chat template around the text, without the image
LEARNING_RATE = 1e-6
OPTIONS = {"kl_coef": 0.04, "gradient_checkpointing": False, "tokens_per_microbatch": 16384}


class Unavailable(Exception):
    """TRL cannot be installed; the message says why."""


def environment(folder: Path) -> Path:
    """The python of an environment with TRL, which is made if missing. Raises Unavailable."""
    python = folder / "bin" / "python"
    check = [python, "-c", f"import trl; assert trl.__version__ == '{VERSION}'"]
    if python.exists() and subprocess.run(check, capture_output=True).returncode == 0:
        return python
    print(f"  installing TRL {VERSION} into {folder}", flush=True)
    venv.create(folder, clear=True, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [python, "-m", "pip", "install", "-q", f"trl=={VERSION}"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise Unavailable((found.stderr.strip().splitlines() or ["pip failed"])[-1])
    return python


def write_task(folder: Path, size: Size, repeats: int) -> list[hicodet.Sample]:
    """Write model, images and task.json for both sides. Returns the samples."""
    tokenizer, (rows, columns) = toy.toy_tokenizer(), size.grid
    config = toy.model_config(tokenizer, {"text": size.text, "vision": size.vision})
    config.text_config.vocab_size = max(config.text_config.vocab_size, size.text["vocab_size"])
    toy.random_model(config, 0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    processor = toy.IMAGE_PROCESSOR | {"max_pixels": 28 * 28 * 16384}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    noise, samples = np.random.default_rng(0), []
    for number in range(size.prompts):
        path = folder / f"{number}.png"
        pixels = noise.integers(256, size=(28 * rows, 28 * columns, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        sides = (28 * columns, 28 * rows)
        samples.append(
            hicodet.Sample(path.name, path, *sides, bench_cpu.HOIS, (), frozenset()))
    ids = tokenizer(hicodet.prompt_text())["input_ids"][: size.text_tokens - AROUND]
    parsed = [hicodet.parse_completion(answer) for answer in bench_cpu.ANSWERS]
    task = size.step | {
        "lr": LEARNING_RATE, "text": tokenizer.decode(ids),
        "images": [sample.file_name for sample in samples], "group_size": size.group_size,
        "new_tokens": size.sampled, "repeats": repeats,
        "rewards": [rewards.total_reward(one, bench_cpu.HOIS)["total"] for one in parsed],
        "banned": [*tokenizer.convert_tokens_to_ids(list(toy.SPECIAL_TOKENS)),
                   *range(len(tokenizer), config.text_config.vocab_size)]}
    (folder / "task.json").write_text(json.dumps(task))
    return samples


class PeerExamples(Examples):
    """Examples whose completions never end, each decoded as one of three answers."""

    def __init__(self, model: str, samples: list[hicodet.Sample], task: dict):
        super().__init__(model, samples)
        self.questions = dict.fromkeys((True, False), self.question(task["text"], model))
        self.end_id, self.refused = -1, torch.tensor(task["banned"])

    def banned(self, vocabulary: int) -> Tensor:
        return torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, self.refused, True)

    def decode(self, ids: Tensor) -> str:
        return bench_cpu.ANSWERS[int(ids[0]) % len(bench_cpu.ANSWERS)]


def gradient_norm(trainer: grpo.GRPO, batch: list[Example], completions: list) -> float:
    """Take a step on TRL's completions, pairs of a place in the batch and ids.

    TRL's log-probs are over the whole vocabulary, so no id is banned here.
    """
    groups = []
    for place in range(len(batch)):
        ids = [torch.tensor(own) for at, own in completions if at == place]
        zeros = [torch.zeros(len(own)) for own in ids]
        groups.append(Rollout(ids, zeros, torch.zeros(len(ids), dtype=torch.bool), zeros))
    scored = [trainer.score(*pair) for pair in zip(batch, groups)]
    totals = [[one.rewards["total"] for one in group] for group in scored]
    advantages = grpo.group_advantages(torch.tensor(totals))
    sampled = trainer.distribution
    trainer.distribution = {"temperature": 1.0, "banned": None}
    micros = trainer.micro_batches(batch, [1.0] * len(batch), groups, advantages)
    norm = trainer.optimize(micros, len(completions), LEARNING_RATE)["grad_norm"]
    trainer.distribution = sampled
    return norm


def bench_peer(size: Size, device: torch.device, runs: Runs) -> Result:
    """A step of GRPO by ours against one of TRL's. Raises Unavailable without TRL.

    On a CPU it counts CPU seconds of each process, as other programs may share the machine. There
    it uses 4 prompts and G = 4, as TRL needs minutes for more.
    """
    size = replace(size, step=OPTIONS | size.step)
    if device.type == "cpu":
        size = replace(size, prompts=4, group_size=4)
    python = environment(FOLDER / "trl")
    samples = write_task(FOLDER, size, runs.repeats)
    environ = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([python, ROOT / "tests" / "peer_trl.py", FOLDER], check=True, env=environ)
    theirs = json.loads((FOLDER / "trl.json").read_text())
    task = json.loads((FOLDER / "task.json").read_text())
    examples = PeerExamples(str(FOLDER / "model"), samples, task)
    batch = [examples[i] for i in range(len(examples))]
    trainer = make_trainer(str(FOLDER / "model"), examples, size)
    details = {
        "prompt": len(batch[0].prompt.prompt_ids), "peak_memory_of_trl": theirs["peak_memory"],
        "grad_norm_of_trl": theirs["grad_norm"],
        "grad_norm_on_its_completions": gradient_norm(trainer, batch, theirs["completions"])}
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    measured = measure(
        device, replace(runs, baseline=False, clock=clock),
        ours=lambda: trainer.update(0, batch, [1.0] * len(batch), LEARNING_RATE))
    measured["baseline"] = (min(theirs["seconds"][1:]), theirs["peak_memory"])
    return result(device, measured, f"GRPO step / TRL {VERSION}", **details)
