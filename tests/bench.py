"""How fast it is: ours against a named baseline in the same run.

    python -m tests.bench update                # a toy's width, on any machine
    python -m tests.bench step --model-size 3b  # the 3B's shape, on a GPU

Prints our time, the baseline's, their ratio, peak memory and, on a GPU whose peaks are known, the
floor: the time that the work's bytes and operations take at the device's measured rates. Weights
are random; nothing is downloaded. The figures that were measured are in tests/BENCH.md.
"""

import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import grpo
import hicodet
import hoi_r1
from engine.attention import head_logprobs, pack, token_logprobs, use_group_attention
from engine.examples import Example
from engine.options import Config, option, parse_config, required
from engine.policy import (
    ClippedAdamW,
    checkpoint_activations,
    compile_layers,
    compute_dtype,
    refresh,
    shard_policy,
    start_ranks,
)
from engine.sampler import Sampler
from tests import bench_cpu
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

# tokens of trace and answer on the real annotations: 32 quantiles over images
ANSWER_LENGTHS = [100, 101, 102, 103, 104, 105, 106, 106, 107, 108, 109, 110, 111, 113, 115, 116,
                  118, 122, 127, 157, 163, 167, 171, 174, 180, 197, 228, 246, 298, 365, 499, 888]
TEST_IMAGES = 9658


@dataclass(frozen=True)
class Result:
    """Seconds, and what they are of; peak_memory in bytes, of ours (on a CPU of the process)."""

    ours: float
    baseline: float | None
    ratio: float | None
    peak_memory: int
    floor: float | None
    what: str
    details: dict
    device: str


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU since the last reset; on a CPU the most this process ever had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Runs:
    """How often each function is called, and whether the baseline is."""

    repeats: int
    baseline: bool


def measure(device: torch.device, runs: Runs, **functions: Callable) -> dict:
    """The best time of each function, called in turn so that a busy machine hits all alike.

    Each is called once before, for compiling and warming up. Returns {name: (seconds, bytes)}.
    """
    functions = {name: f for name, f in functions.items() if runs.baseline or name != "baseline"}
    times: dict[str, list[tuple[float, int]]] = {name: [] for name in functions}
    for repeat in range(runs.repeats + 1):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            print(f"  {name}: {seconds:.4g} s{'' if repeat else ', warming up'}", flush=True)
            if repeat:
                times[name].append((seconds, peak_memory(device)))
    return {name: min(found) for name, found in times.items()}


def result(device, measured: dict, what: str, floor: float | None = None, **details) -> Result:
    """Ours against the baseline."""
    ours, memory = measured["ours"]
    baseline = measured["baseline"][0] if "baseline" in measured else None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    ratio = baseline / ours if baseline else None
    return Result(ours, baseline, ratio, memory, floor, what, details, name)


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
        gradient_checkpointing=config.gradient_checkpointing)
    replica, reference = (random_model(size, device, compute_dtype(device)) for _ in range(2))
    compile_layers(reference, device)
    optimizer = ClippedAdamW(policy, beta2=0.999, weight_decay=0.0, max_grad_norm=1.0)
    same = ("slots", "group_size", "max_new_tokens", "temperature", "seed", "updates_per_batch",
            "tokens_per_microbatch")
    trainer = grpo.GRPO(
        policy, optimizer, replica, reference, BenchExamples(size), ranks,
        objective={}, rewards={}, **{name: getattr(config, name) for name in same})
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


MODEL_BENCHES = {"sampler": bench_sampler, "update": bench_update, "logprobs": bench_logprobs,
                 "vision": bench_vision, "sft": bench_sft, "step": bench_step,
                 "predict": bench_predict}


@dataclass(frozen=True, kw_only=True)
class BenchConfig(Config):
    """Options of the command."""

    GROUPS = {"what to measure": "what model_size repeats baseline json"}
    what: Literal[*MODEL_BENCHES, *bench_cpu.BENCHES] = required("a bench", positional=True)
    model_size: Literal[*SIZES] = option("tiny", "tiny, or for a GPU the 3B's shape, 80 GB or more")
    repeats: int = option(3, "runs of each", least=1)
    baseline: bool = option(True, "ours only")
    json: Path | None = option(None, "file for the figures", metavar="FILE")

    def __post_init__(self):
        super().__post_init__()
        if self.model_size != "tiny" and not torch.cuda.is_available():
            raise ValueError("--model-size 3b needs a GPU, and torch finds none here")


def main(argv: list[str] | None = None) -> None:
    config = parse_config(BenchConfig, __doc__, argv, prog="python -m tests.bench")
    runs = Runs(config.repeats, config.baseline)
    if config.what in bench_cpu.BENCHES:
        found = bench_without_model(config.what, runs)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        found = MODEL_BENCHES[config.what](SIZES[config.model_size], device, runs)
    print(report(found))
    if config.json:
        config.json.write_text(json.dumps(asdict(found), indent=2) + "\n")


def report(found: Result) -> str:
    """The figures, a line each."""
    rows = {"device": found.device, "ours": f"{found.ours:.4g} s"}
    if found.baseline is not None:
        rows |= {"baseline": f"{found.baseline:.4g} s", "ratio": f"{found.ratio:.2f}"}
    if found.floor is not None:
        rows["floor"] = f"{found.floor:.4g} s, {found.ours / found.floor:.2f} times that"
    rows["peak memory"] = f"{found.peak_memory / 2**30:.2f} GiB"
    rows |= {name: f"{value:.4g}" for name, value in found.details.items()}
    return "\n".join([found.what, *(f"  {name}: {value}" for name, value in rows.items())])


if __name__ == "__main__":
    main()
