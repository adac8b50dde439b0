"""How fast it is: ours against a named baseline in the same run.

    python -m tests.bench update                # a toy's width, anywhere
    python -m tests.bench step --model-size 3b  # the 3B's shape, on a GPU
    python -m tests.bench step --peer trl       # against TRL's GRPOTrainer
    python -m tests.bench step --lora-rank 16   # with adapters
    python -m tests.bench fits                  # which options fit on a GPU

Prints our time, the baseline's, their ratio and peak memory. On a GPU whose peaks are known it also
prints the floor: the time that the work's bytes and operations take at the measured rates. Weights
are random, and nothing is downloaded. docs/speed.md has measured figures.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import hoi_r1

if __name__ == "__main__":
    hoi_r1.pin_exact_sizes()  # torch reads it when it is imported

import torch

import engine.sampling.decode_step
import hicodet
from engine.data.examples import Example
from engine.model.attention import use_group_attention
from engine.model.packing import pack, token_logprobs
from engine.model.policy import compute_dtype, refresh
from engine.options import Config, flag_of, option, parse_config, required
from engine.sampling.sampler import Sampler
from tests import bench_cpu
from tests.bench_fits import bench_fits
from tests.bench_measure import Result, Runs, measure, report, result
from tests.bench_models import (
    ORDINARY,
    SIZES,
    Size,
    decode_bytes,
    floors,
    generate,
    library_attention,
    peaks,
    random_completions,
    random_model,
    random_prompts,
    separate_logprobs,
    separate_step,
)
from tests.bench_peer import Unavailable, bench_peer
from tests.bench_text_first import bench_text_first
from tests.bench_trainer import BenchExamples, make_trainer, random_weights

TEST_IMAGES = 9658


def with_library(model, function: Callable) -> Callable:
    """The function with the library's own attention in the model."""

    def run():
        library_attention(model)
        try:
            return function()
        finally:
            use_group_attention(model)

    return run


def bench_sampler(size: Size, device: torch.device, runs: Runs) -> Result:
    """Sample G completions of each prompt: Sampler against transformers' generate()."""
    model = random_model(size, device, compute_dtype(device))
    prompts, rows = random_prompts(model, size, size.prompts), size.prompts * size.group_size
    seeds = torch.arange(rows).view(size.prompts, -1).tolist()
    vocabulary = model.config.text_config.vocab_size
    banned = (torch.arange(vocabulary) >= ORDINARY).to(device)
    samplers = {
        new: Sampler(
            model, slots=size.prompts, group_size=size.group_size, prompt_room=size.prompt_length,
            max_new_tokens=new, end_id=-1, banned=banned)
        for new in (1, size.sampled)
    }
    with torch.no_grad():
        measured = measure(
            device, runs,
            prefill=lambda: samplers[1].collect(prompts, seeds),
            ours=lambda: samplers[size.sampled].collect(prompts, seeds),
            baseline=with_library(
                model, lambda: generate(model, prompts, size.group_size, size.sampled)))
    step = (measured["ours"][0] - measured["prefill"][0]) / (size.sampled - 1)
    details = {"prefill": measured["prefill"][0], "ms_a_step": 1e3 * step,
               "tokens_per_second": rows * size.sampled / measured["ours"][0]}
    if rates := peaks(device):
        details["floor_ms_a_step"] = 1e3 * decode_bytes(model, size) / rates[1]
    floor = floors(model, size, rates).get("sampling")
    return result(device, measured, "Sampler / generate()", floor, **details)


def bench_update(size: Size, device: torch.device, runs: Runs) -> Result:
    """Forward and backward of one group's log-probs: packed against G separate rows."""
    group = 4
    model = random_model(size, device, compute_dtype(device)).train()
    prompts = random_prompts(model, size, 1)
    completions = random_completions(1, group, size.trained)
    advantages = torch.randn(group, 1, device=device)
    gradients = {}

    def step(name, logprobs):
        model.zero_grad()
        (logprobs * advantages).mean().backward()
        if device.type == "cpu":  # where they are fp32 and can be compared
            gradients[name] = [p.grad.clone() for p in model.parameters()]

    def ours():
        step("ours", token_logprobs(model, pack(model, prompts, completions)))

    def baseline():
        step("baseline", separate_logprobs(model, prompts[0], torch.stack(completions[0])))

    measured = measure(device, runs, ours=ours, baseline=with_library(model, baseline))
    details = {}
    if len(gradients) == 2:
        scale = max(g.abs().max().item() for g in gradients["ours"])
        off = max((a - b).abs().max().item() for a, b in zip(*gradients.values()))
        details["gradient_off_relative"] = off / scale
    floor = floors(model, replace(size, prompts=1, group_size=group), peaks(device)).get("update")
    what = f"update / {group} separate rows, vision {group} times"
    return result(device, measured, what, floor, **details)


def bench_step(size: Size, device: torch.device, runs: Runs) -> Result:
    """A whole step of GRPO: sample, reward, pi_ref, update, AdamW, refresh.

    The baseline is generate(), separate rows in pi_ref and pi_theta, and the same AdamW and
    refresh. It computes no rewards, which take milliseconds.
    """
    with random_weights(size, device):
        trainer = make_trainer("", BenchExamples(size), size)
    policy, replica, reference = trainer.policy, trainer.replica, trainer.reference
    name, hois = "random.jpg", bench_cpu.HOIS
    sample = hicodet.Sample(name, Path(name), 640, 480, hois, (), frozenset())
    batch = [
        Example(sample, prompt, (640, 480), (640, 480), hois, None)
        for prompt in random_prompts(replica, size, size.prompts)
    ]
    logged = {}

    def ours():
        logged.update(trainer.update(0, batch, [1.0] * len(batch), 1e-6)[0])

    def baseline():
        separate_step(policy, replica, reference, [e.prompt for e in batch], size)
        trainer.optimizer.step(1e-6, 0.0)
        refresh(replica, policy)

    measured = measure(device, runs, ours=ours, baseline=baseline)
    floor = floors(replica, size, peaks(device)).get("step")
    shown = ("seconds_sample", "seconds_reward", "seconds_update", "logprob_gap", "kl", "grad_norm")
    details = {name: logged[name] for name in shown}
    return result(device, measured, "GRPO step / generate() and separate rows", floor, **details)


def bench_predict(size: Size, device: torch.device, runs: Runs) -> Result:
    """Completions of unequal length: a stream through slots against batches of generate().

    Each token is the end with probability 1/243. So lengths are geometric with the mean of the
    real answers, and cut at 2,048 (tiny: a tenth of both).
    """
    model = random_model(size, device, compute_dtype(device))
    large = device.type == "cuda"
    mean, longest, count, slots = (243, 2048, 256, 64) if large else (24, 204, 32, 8)
    compared = slots if large else count  # images of the baseline
    vocabulary = model.config.text_config.vocab_size
    allowed = torch.arange(1, mean + 1)  # without 0, which is generate()'s padding
    banned = torch.ones(vocabulary, dtype=torch.bool).index_fill(0, allowed, False).to(device)
    prompts = random_prompts(model, size, count)
    sampler = Sampler(
        model, slots=slots, group_size=1, prompt_room=size.prompt_length, max_new_tokens=longest,
        end_id=7, banned=banned)
    tokens = []

    def ours():
        found = sampler.collect(prompts, [[i] for i in range(count)])
        tokens.append(sum(len(group.completion_ids[0]) for group in found))

    def baseline():
        options = {"eos_token_id": 7, "suppress_tokens": banned.nonzero()[:, 0].tolist()}
        for i in range(0, compared, slots):
            generate(model, prompts[i : i + slots], 1, longest, min_new_tokens=0, **options)

    with torch.no_grad():
        measured = measure(device, runs, ours=ours, baseline=with_library(model, baseline))
    seconds = measured["ours"][0] / count
    details = {"tokens_per_second": tokens[-1] / measured["ours"][0],
               "images_per_second": 1 / seconds, "test_set_minutes": TEST_IMAGES * seconds / 60}
    if runs.baseline:  # for as many images as ours
        each, memory = measured["baseline"]
        measured["baseline"] = (each * count / compared, memory)
    return result(device, measured, "prediction / generate() in batches", **details)


def bench_evaluate(size: Size, device: torch.device, runs: Runs) -> Result:
    """mAP of 65,000 detections in both settings against a loop over detections; on the CPU."""
    cpu = torch.device("cpu")
    measured = measure(cpu, runs, **bench_cpu.mean_average_precision())
    return result(cpu, measured, "evaluate / a loop over detections")


BENCHES = {"sampler": bench_sampler, "update": bench_update, "step": bench_step,
           "predict": bench_predict, "text-first": bench_text_first, "evaluate": bench_evaluate}
WHAT = "what to measure"


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Config):
    """Options of the command."""

    what: Literal[*BENCHES, "fits"] = required(
        f"{', '.join(BENCHES)} or fits", positional=True, metavar="WHAT", group=WHAT
    )
    model_size: Literal[*SIZES] = option(
        "tiny", "width and depth of the model; the 3B's need a GPU", group=WHAT
    )
    peer: Literal["trl"] | None = option(
        None, "step only: compare with this program instead", group=WHAT
    )
    checkpointing: Literal["on", "off"] | None = option(
        None, "step only: gradient checkpointing (default: that of the size)", group=WHAT
    )
    lora_rank: int = option(
        0, "step and fits only: rank of LoRA adapters; 0 trains all weights", least=0, group=WHAT
    )
    num_stages: int | None = option(
        None, "stages of decoding's attention kernel (default: those of training)", least=1,
        group=WHAT,
    )
    repeats: int = option(3, "runs of each, after one that warms up", least=1, group=WHAT)
    baseline: bool = option(True, "measure ours only", group=WHAT)
    json: Path | None = option(None, "file for the figures", metavar="FILE", group=WHAT)

    def __post_init__(self):
        super().__post_init__()
        if self.model_size.startswith("3b") and not torch.cuda.is_available():
            raise ValueError("--model-size 3b needs a GPU, and torch finds none here")
        for name, benches in (("peer", ["step"]), ("checkpointing", ["step"]),
                              ("lora_rank", ["step", "fits"])):  # fmt: skip
            if (value := getattr(self, name)) and self.what not in benches:
                raise ValueError(f"{flag_of(name)} {value}: only of {' and '.join(benches)}")
        if self.peer and self.lora_rank:
            raise ValueError("--peer trains all weights: leave --lora-rank out")

    def size(self) -> Size:
        """The size with the options of the step."""
        size = SIZES[self.model_size]
        step = size.step | {"lora_rank": self.lora_rank}
        if self.checkpointing:
            step["gradient_checkpointing"] = self.checkpointing == "on"
        return replace(size, step=step)


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchConfig, __doc__, argv, prog="python -m tests.bench")
    if config.what == "fits":
        return bench_fits(config.lora_rank)
    runs = Runs(config.repeats, config.baseline)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if memory := config.size().memory:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory * 1e9 / total))
    decode_step = engine.sampling.decode_step
    decode_step.STAGES = config.num_stages or decode_step.STAGES
    bench = bench_peer if config.peer else BENCHES[config.what]
    try:
        found = bench(config.size(), device, runs)
    except Unavailable as error:
        return print(f"skipped: TRL cannot be installed here ({error})")
    print(report(found))
    if config.json:
        config.json.write_text(json.dumps(asdict(found), indent=2) + "\n")


if __name__ == "__main__":
    main()
