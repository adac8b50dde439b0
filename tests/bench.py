"""How fast it is: ours against a named baseline in the same run.

    python -m tests.bench update                # a toy's width, anywhere
    python -m tests.bench step --model-size 3b  # the 3B's shape, on a GPU
    python -m tests.bench step --peer trl       # against TRL's GRPOTrainer
    python -m tests.bench fits                  # which options fit on a GPU
    python -m tests.bench guard                 # have figures moved?

Prints our time, the baseline's, their ratio, peak memory and, on a GPU whose peaks are known, the
floor: the time that the work's bytes and operations take at the device's measured rates. Weights
are random; nothing is downloaded. The figures that were measured are in tests/BENCH.md.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import grpo
import hicodet
import hoi_r1
from engine.data.examples import Example
from engine.model.attention import use_group_attention
from engine.model.optimizer import ClippedAdamW
from engine.model.packing import head_logprobs, pack, token_logprobs
from engine.model.policy import (
    checkpoint_activations,
    compute_dtype,
    refresh,
    shard_policy,
    shard_reference,
)
from engine.options import Config, option, parse_config, required
from engine.ranks import start_ranks
from engine.sampling.sampler import Sampler
from tests import bench_cpu
from tests.bench_fits import bench_fits
from tests.bench_guard import guard
from tests.bench_measure import Result, Runs, measure, report, result
from tests.bench_models import (
    ORDINARY,
    SIZES,
    Size,
    Work,
    generate,
    library_attention,
    padded_loss,
    peaks,
    random_completions,
    random_model,
    random_prompts,
    separate_logprobs,
    separate_step,
)
from tests.bench_peer import Unavailable, bench_peer
from tests.bench_text_first import bench_text_first

# tokens of trace and answer on the real annotations: 32 quantiles over images
ANSWER_LENGTHS = [100, 101, 102, 103, 104, 105, 106, 106, 107, 108, 109, 110, 111, 113, 115, 116,
                  118, 122, 127, 157, 163, 167, 171, 174, 180, 197, 228, 246, 298, 365, 499, 888]
TEST_IMAGES = 9658


def with_library(model, function: Callable) -> Callable:
    """The function, run with the library's own attention in the model."""

    def run():
        library_attention(model)
        try:
            return function()
        finally:
            use_group_attention(model)

    return run


def bench_sampler(size: Size, device: torch.device, runs: Runs) -> Result:
    """G completions of each prompt: Sampler against transformers' generate(), which samples too."""
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
    work, rates = Work(model, size), peaks(device)
    details = {"prefill": measured["prefill"][0], "ms_a_step": 1e3 * step,
               "tokens_per_second": rows * size.sampled / measured["ours"][0]}
    if rates:
        details["floor_ms_a_step"] = 1e3 * work.decode_bytes() / rates[1]
    floor = work.sampling(rates) if rates else None
    return result(device, measured, "Sampler / generate()", floor, **details)


def bench_update(size: Size, device: torch.device, runs: Runs) -> Result:
    """Forward and backward of one group's log-probs: packed against G separate rows."""
    group = 4
    model = random_model(size, device, compute_dtype(device)).train()
    prompts = random_prompts(model, size, 1)
    completions = random_completions(1, group, size.trained)
    advantages = torch.randn(group, 1, device=device)
    gradients = {"ours": [], "baseline": []}

    def step(name, logprobs):
        model.zero_grad()
        (logprobs * advantages).mean().backward()
        if device.type == "cpu":  # in fp32, so that they can be compared
            gradients[name] = [p.grad.clone() for p in model.parameters()]

    def ours():
        step("ours", token_logprobs(model, pack(model, prompts, completions)))

    def baseline():
        step("baseline", separate_logprobs(model, prompts[0], torch.stack(completions[0])))

    measured = measure(device, runs, ours=ours, baseline=with_library(model, baseline))
    scale = max((g.abs().max().item() for g in gradients["ours"]), default=1.0)
    pairs = zip(gradients["ours"], gradients["baseline"])
    off = max(((a - b).abs().max().item() for a, b in pairs), default=None)
    details = {} if off is None else {"gradient_off_relative": off / scale}
    one = Work(model, replace(size, prompts=1, group_size=group))
    rates = peaks(device)
    floor = one.update(rates) if rates else None
    what = f"update / {group} separate rows, vision {group} times"
    return result(device, measured, what, floor, **details)


def bench_logprobs(size: Size, device: torch.device, runs: Runs) -> Result:
    """The head: completion tokens in chunks against full fp32 logits of every token."""
    vocabulary, width = 151936, size.text["hidden_size"]
    own = 4 * size.trained
    total = size.prompt_length + own
    dtype = compute_dtype(device)
    head = torch.nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype)
    hidden = torch.randn(total, width, device=device, dtype=dtype, requires_grad=True)
    ids = torch.randint(vocabulary, (total,), device=device)

    def ours():
        head_logprobs(head, hidden[-own:], ids[-own:], 1.0, None).sum().backward()

    def baseline():
        logprobs = torch.log_softmax(head(hidden).float(), dim=-1)
        logprobs.gather(1, ids[:, None])[-own:].sum().backward()

    measured = measure(device, runs, ours=ours, baseline=baseline)
    details = {}
    if device.type == "cuda":
        details = {f"peak_memory_of_{name}": memory for name, (_, memory) in measured.items()}
    return result(device, measured, "chunks of completion tokens / full fp32 logits", **details)


def bench_vision(size: Size, device: torch.device, runs: Runs) -> Result:
    """The vision tower forward and backward: windows together against a loop over them."""
    model = random_model(size, device, compute_dtype(device)).train()
    visual, prompts = model.model.visual, random_prompts(model, size, 4)
    pixels = torch.cat([p.pixel_values for p in prompts]).to(device, model.dtype)
    grid = torch.cat([p.image_grid_thw for p in prompts]).to(device)

    def run():
        visual.zero_grad()
        visual(pixels, grid).pooler_output.sum().backward()

    measured = measure(device, runs, ours=run, baseline=with_library(model, run))
    return result(device, measured, f"vision, {len(prompts)} images / the library's loop")


def bench_sft(size: Size, device: torch.device, runs: Runs) -> Result:
    """SFT's forward and backward on 32 samples: packed rows against the library's padded batches.

    Answers are as long as on the real annotations, both have 8 samples a forward.
    """
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    lengths = [ANSWER_LENGTHS[i] for i in order.tolist()]
    model = random_model(size, device, compute_dtype(device)).train()
    checkpoint_activations(model)
    prompts = random_prompts(model, size, 8)
    batches = [[torch.randint(3000, (n,)) for n in lengths[i : i + 8]] for i in range(0, 32, 8)]
    losses = {}

    def run(name, loss_of):
        model.zero_grad()
        total = 0.0
        for targets in batches:
            loss = loss_of(targets) / sum(lengths)
            loss.backward()
            total += loss.item()
        losses[name] = total

    def ours(targets):
        return -token_logprobs(model, pack(model, prompts, [[t] for t in targets])).sum()

    measured = measure(
        device, runs,
        ours=lambda: run("ours", ours),
        baseline=with_library(
            model, lambda: run("baseline", lambda targets: padded_loss(model, prompts, targets))))
    return result(device, measured, "SFT packed / padded batches of 8", **losses)


class BenchExamples:
    """What GRPO asks of Examples."""

    def __init__(self, size: Size):
        self.size, self.end_id = size, -1  # no completion ends by itself

    def banned(self, vocabulary: int) -> torch.Tensor:
        return torch.arange(vocabulary) >= ORDINARY

    def longest_prompt(self) -> int:
        return self.size.prompt_length

    def decode(self, ids: torch.Tensor) -> str:
        return bench_cpu.ANSWERS[int(ids[0]) % len(bench_cpu.ANSWERS)]


def bench_step(size: Size, device: torch.device, runs: Runs) -> Result:
    """A whole step of GRPO: sample, reward, pi_ref, update, AdamW, refresh.

    Against generate(), separate rows in pi_ref and pi_theta, and the same AdamW and refresh;
    without rewards, which take milliseconds.
    """
    ranks = start_ranks()
    options = {"batch_size": size.prompts, "group_size": size.group_size,
               "max_new_tokens": size.sampled, **size.step}
    config = hoi_r1.GRPOConfig(model="random", data="", out="", **options)
    policy = shard_policy(
        random_model(size, device, torch.float32), device,
        gradient_checkpointing=config.gradient_checkpointing, offload=config.offload)
    replica, reference = random_model(size, device, compute_dtype(device)), None
    if config.kl_coef:
        reference = shard_reference(random_model(size, device, compute_dtype(device)), device)
    optimizer = ClippedAdamW(policy, beta2=0.999, weight_decay=0.0, max_grad_norm=1.0)
    same = ("group_size", "max_new_tokens", "temperature", "seed", "updates_per_batch",
            "tokens_per_microbatch")
    trainer = grpo.GRPO(
        policy, optimizer, replica, reference, BenchExamples(size), ranks,
        objective={}, rewards={}, slots=min(config.slots, size.prompts),
        **{name: getattr(config, name) for name in same})
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
        optimizer.step(1e-6, 0.0)
        refresh(replica, policy)

    measured = measure(device, runs, ours=ours, baseline=baseline)
    rates = peaks(device)
    floor = Work(replica, size).step(rates) if rates else None
    shown = ("seconds_sample", "seconds_reward", "seconds_update", "logprob_gap", "kl", "grad_norm")
    details = {name: logged[name] for name in shown}
    return result(device, measured, "GRPO step / generate() and separate rows", floor, **details)


def bench_predict(size: Size, device: torch.device, runs: Runs) -> Result:
    """Completions of unequal length: a stream through slots against a batch of generate().

    An end is drawn with probability 1/243 at each token, so lengths are geometric around the mean
    of the real answers, and cut at 2,048 (tiny: a tenth of both).
    """
    model = random_model(size, device, compute_dtype(device))
    large = device.type == "cuda"
    mean, longest, count, slots = (243, 2048, 512, 128) if large else (24, 204, 32, 8)
    compared = slots if large else count  # images that the baseline gets
    vocabulary = model.config.text_config.vocab_size
    allowed = torch.arange(1, mean + 1)  # without 0, which pads what generate() returns
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


def bench_without_model(name: str, runs: Runs) -> Result:
    """One of tests/bench_cpu.py."""
    make, what = bench_cpu.BENCHES[name]
    cpu = torch.device("cpu")
    return result(cpu, measure(cpu, runs, **make()), what)


def guarded_results(device: torch.device, runs: Runs) -> dict[str, Result]:
    """What `guard` compares: parts of a step of the 3B on a GPU, else what needs no model."""
    names = GUARDED[device.type]
    if device.type == "cuda":
        return {name: MODEL_BENCHES[name](SIZES["3b"], device, runs) for name in names}
    runs = replace(runs, clock=time.process_time)  # other processes may share the machine
    return {name: bench_without_model(name, runs) for name in names}


MODEL_BENCHES = {"sampler": bench_sampler, "update": bench_update, "logprobs": bench_logprobs,
                 "vision": bench_vision, "sft": bench_sft, "step": bench_step,
                 "predict": bench_predict, "text-first": bench_text_first}
GUARDED = {"cuda": ("sampler", "update", "vision", "sft"), "cpu": ("evaluate", "rewards")}


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Config):
    """Options of the command."""

    what: Literal[*MODEL_BENCHES, *bench_cpu.BENCHES, "fits", "guard"] = required(
        f"{', '.join([*MODEL_BENCHES, *bench_cpu.BENCHES])}, fits or guard",
        positional=True, metavar="WHAT", group="what to measure")
    model_size: Literal[*SIZES] = option("tiny", "tiny, or for a GPU the 3B's shape, 80 GB or more", group="what to measure")
    repeats: int = option(3, "runs of each", least=1, group="what to measure")
    baseline: bool = option(True, "ours only", group="what to measure")
    json: Path | None = option(None, "file for the figures", metavar="FILE", group="what to measure")
    peer: Literal["trl"] | None = option(None, "of step: another program as the baseline", group="what to measure")
    write: bool = option(False, "of guard: write tests/BENCH.json instead of comparing with it", group="what to measure")

    def __post_init__(self):
        super().__post_init__()
        if self.model_size.startswith("3b") and not torch.cuda.is_available():
            raise ValueError("--model-size 3b needs a GPU, and torch finds none here")
        if self.peer and self.what != "step":
            raise ValueError(f"--peer {self.peer}: only of step")


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchConfig, __doc__, argv, prog="python -m tests.bench")
    runs = Runs(config.repeats, config.baseline)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if memory := SIZES[config.model_size].memory:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory * 1e9 / total))
    if config.what == "fits":
        return bench_fits()
    if config.what == "guard":
        lines = guard(guarded_results(device, runs), config.write)
        print("\n".join(lines) or "nothing moved")
        sys.exit(bool(lines))
    bench = {**MODEL_BENCHES, "step": bench_peer} if config.peer else MODEL_BENCHES
    try:
        if config.what in bench_cpu.BENCHES:
            found = bench_without_model(config.what, runs)
        else:
            found = bench[config.what](SIZES[config.model_size], device, runs)
    except Unavailable as error:
        return print(f"skipped: TRL cannot be installed here ({error})")
    print(report(found))
    if config.json:
        config.json.write_text(json.dumps(asdict(found), indent=2) + "\n")


if __name__ == "__main__":
    main()
