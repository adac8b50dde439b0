"""Reasoning traces from a teacher model, for thinking distillation (Sec. 3.2).

    export OPENAI_API_KEY=... D=hico_20160224_det
    python teacher.py --data $D --out traces.jsonl --dry-run  # what it costs
    python teacher.py --data $D --out traces.jsonl --max-cost 60
    # a local teacher, served by vLLM or `transformers serve`: no key, no cost
    python teacher.py --data $D --out traces.jsonl --teacher NAME \\
        --base-url http://127.0.0.1:8000/v1
    # OpenAI's Batch API, half the price: write request files, collect results
    python teacher.py --data $D --out traces.jsonl --backend batch
    python teacher.py --data $D --out traces.jsonl --collect results/*.jsonl
    # without a teacher: sentences from the ground truth, as in the demo
    python teacher.py --data $D --out traces.jsonl --backend template

Every training image with ground truth gets one line of traces.jsonl, in any order:

    {"file_name": "HICO_train2015_00000001.jpg", "think": "There is one ...",
     "teacher": "gpt-4o-mini", "attempts": 1,
     "usage": {"prompt_tokens": 2950, "completion_tokens": 96, "cost": 0.0005}}

You can stop it at any time, even by kill -9. The same command then requests only missing traces. At
the end it lists the images without an accepted trace, with the reason.

docs/teacher.md describes the prompt, which traces are accepted, their cost, and what happens on
errors.
"""

import json
import math
import os
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

import hicodet
from engine.checks import at, value_of
from engine.data import annotations
from engine.files import json_lines
from engine.options import Config, option, parse_config, required
from engine.signals import one_line
from engine.traces import openai_chat
from engine.traces.acceptance import accept_trace
from engine.traces.openai_chat import OPENAI_URL, Refused, Teacher, complete, request_body, usage_of
from engine.traces.template import template_trace
from engine.traces.trace_file import TraceFile, read_traces
from hicodet import InputError, Sample

ATTEMPTS = 3  # most requests per image in one run
FAILURES_IN_A_ROW = 20  # images without a trace before the run ends: the server or teacher fails

TASK = "Look at the image and reason about how its people interact with objects.\n"
REQUEST = """\
Answer the four questions in order, in a few plain sentences, between <think> and </think>. Name \
object classes and verbs literally. No coordinates, no lists, no <answer>."""


def ask(
    sample: Sample, teacher: Teacher, stop: threading.Event
) -> tuple[str | None, str, int, dict] | None:
    """Request an image's trace, at most ATTEMPTS times, until one is accepted.

    Returns the trace (or None), why there is none, the number of requests, and the usage of all
    replies. Returns None if the run ended before the first request. Raises Refused.
    """
    if stop.is_set():
        return None
    think, reason, attempt, usage = None, "", 0, Counter()
    try:
        body = request_body(sample, teacher)
        for attempt in range(1, ATTEMPTS + 1):
            reply = complete(teacher, body, stop)
            usage.update(usage_of(reply, teacher))
            think, reason = accept_trace(reply)
            if think or stop.is_set():
                break
    except Refused:
        stop.set()  # before this thread takes the next image
        raise
    except InputError as error:
        reason = str(error)
    return think, reason, attempt, dict(usage)


def ask_all(
    samples: Sequence[Sample], teacher: Teacher, file: TraceFile, concurrency: int, max_cost: float
) -> tuple[dict[str, str], str]:
    """Request the traces of all samples, `concurrency` at a time, and append the accepted ones.

    max_cost: USD, with the traces already in the file. Requests in flight may exceed it. Returns
    why images have no trace, by file name, and why the run ended early ("" if it did not).
    """
    missing, ends, failures, spent, stop = {}, [], 0, file.cost, threading.Event()
    bar, pool = tqdm(total=len(samples), desc="traces"), ThreadPoolExecutor(concurrency)
    try:
        jobs = {pool.submit(ask, sample, teacher, stop): sample.file_name for sample in samples}
        for job in as_completed(jobs):
            name = jobs.pop(job)
            try:
                outcome = job.result()
            except Refused as error:
                ends.append(f"{name}: {error}")
                continue
            if outcome is None:
                continue
            think, reason, attempts, usage = outcome
            spent += usage.get("cost", 0.0)
            failures = 0 if think else failures + 1
            if think:
                file.append(name, think, teacher.model, attempts, usage)
            else:
                missing[name] = reason
            if failures >= FAILURES_IN_A_ROW:
                ends.append(f"{failures} images in a row without a trace, the last for {reason}")
            if spent >= max_cost:
                ends.append(f"--max-cost {max_cost:g} is reached: raise it to go on")
            if ends:
                stop.set()
            bar.set_postfix_str(f"rejected {len(missing)}, ${spent:.4f}", refresh=False)
            bar.update()
    finally:  # also after Ctrl-C or on a full disk
        stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()
    return missing, f"{ends[0]}; ${spent:.4f} are spent in all" if ends else ""


def collect_batch(
    paths: Iterable[Path], todo: set[str], teacher: Teacher, file: TraceFile
) -> dict[str, str]:
    """Append the accepted traces of a batch's result files; an image's first one counts.

    todo: names of the images without a trace; results of other images are ignored. Returns why
    images have no trace, by file name. Raises InputError naming a line that is no result.
    """
    missing: dict[str, str] = {}
    for where, result in (found for path in paths for found in json_lines(path)):
        with at(where):
            name = value_of(result, "custom_id", str)
        if name not in todo or name in file.names:
            continue
        think, missing[name] = None, openai_chat.first_words(json.dumps(result))
        response = result.get("response")
        reply = response.get("body") if isinstance(response, dict) else None
        if openai_chat.is_completion(reply):
            think, missing[name] = accept_trace(reply)
        if think:
            file.append(name, think, teacher.model, 1, usage_of(reply, teacher))
    return {name: reason for name, reason in missing.items() if name not in file.names}


FILES, TEACHER, ASKED, COST = "input and output", "teacher (Sec. 3.2)", "requests", "cost"


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Config):
    """Options of the command."""

    data: Path = required("HICO-DET's folder, with anno_bbox.mat and images", group=FILES)
    out: Path = required("file of traces to write or continue", group=FILES)
    limit: int | None = option(None, "only the first N training images", least=1, group=FILES)
    dry_run: bool = option(False, "print the prompt and the estimated cost, and stop", group=FILES)
    backend: Literal["openai", "batch", "template"] = option(
        "openai", "a server, request files for OpenAI's Batch API, or no teacher", group=TEACHER
    )
    collect: tuple[Path, ...] = option((), "result files of a batch", metavar="FILE", group=TEACHER)
    teacher: str = option("gpt-4o-mini", "teacher model's name", paper="Sec. 4.2", group=TEACHER)
    base_url: str = option(OPENAI_URL, "an OpenAI-compatible server", metavar="URL", group=TEACHER)
    concurrency: int = option(16, "requests at a time", least=1, group=TEACHER)
    timeout: float = option(60.0, "seconds to wait for a byte", least=0.001, group=TEACHER)
    lists: bool = option(False, "add Fig. 4's lists of valid classes to the prompt", group=ASKED)
    max_side: int = option(
        512, "longest side of a sent image; OpenAI sees 512", least=1, metavar="PIXELS", group=ASKED
    )
    max_tokens: int = option(512, "longest reply; reasoning needs more", least=1, group=ASKED)
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = option(
        "max_tokens", "field of --max-tokens; OpenAI's reasoning models use the second", group=ASKED
    )
    extra_body: str = option("{}", "more fields for each request", metavar="JSON", group=ASKED)
    max_cost: float = option(
        math.inf, "end the run when this sum is spent", least=0, metavar="USD", group=COST
    )
    prices: tuple[float, ...] = option(
        (), "prices per million input and output tokens", metavar="USD", group=COST
    )

    def __post_init__(self):
        super().__post_init__()
        if self.max_cost < math.inf and (self.backend != "openai" or self.collect):
            raise ValueError("--max-cost watches replies: for a batch use --dry-run and --limit")
        if self.prices and not (len(self.prices) == 2 and all(p >= 0 for p in self.prices)):
            raise ValueError("--prices: give two, for input and output")


def make_teacher(config: TeacherConfig) -> Teacher:
    """The teacher of the options and of OPENAI_API_KEY. Raises InputError for a bad value."""
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", config.base_url):
        raise InputError(f"--base-url {config.base_url}: expected http(s)://host[:port]/v1, "
                         "without user or password; a key goes into OPENAI_API_KEY")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise InputError("OPENAI_API_KEY contains characters that no key has: set it again")
    if not isinstance(extra := openai_chat.parse(config.extra_body), dict):
        raise InputError(f"--extra-body {config.extra_body}: expected a JSON object")
    lists = hicodet.TASK_DESCRIPTION if config.lists else ""
    return Teacher(
        model=config.teacher, base_url=config.base_url.rstrip("/"), key=key,
        prompt=TASK + lists + hicodet.THINKING_PROCESS + REQUEST, max_side=config.max_side,
        more_fields={config.max_tokens_field: config.max_tokens, **extra}, timeout=config.timeout,
        prices=prices_of(config),
    )


def prices_of(config: TeacherConfig) -> tuple[float, float]:
    """USD per million tokens, in and out; 0 if unknown, which --max-cost refuses (InputError)."""
    prices = config.prices or openai_chat.known_prices(config.teacher)
    if not prices:
        said = f"price of {config.teacher} not known: give --prices IN OUT"
        if config.max_cost < math.inf:
            raise InputError(f"--max-cost {config.max_cost:g}: {said}")
        print(f"{said}; until then costs count as 0", file=sys.stderr)
    factor = openai_chat.BATCH_DISCOUNT if config.backend == "batch" or config.collect else 1.0
    return tuple(price * factor for price in prices[:2]) if prices else (0.0, 0.0)


def make_traces(
    config: TeacherConfig, todo: Sequence[Sample], file: TraceFile
) -> tuple[dict[str, str], str]:
    """Make traces by the backend that the options choose. Returns as `ask_all` does."""
    if config.backend == "template":
        for sample in todo:
            file.append(sample.file_name, template_trace(sample.hois), "template", 1, {})
        return {}, ""
    teacher = make_teacher(config)
    if config.collect:
        return collect_batch(config.collect, {s.file_name for s in todo}, teacher, file), ""
    annotations.require_images(todo)
    if config.backend == "batch":
        return openai_chat.write_requests(todo, teacher, config.out), ""
    if file.cost >= config.max_cost:
        raise InputError(f"--max-cost {config.max_cost:g}: the traces cost ${file.cost:.4f} so far")
    shuffled = random.sample(todo, len(todo))  # else a rerun would start with all rejected images
    return ask_all(shuffled, teacher, file, config.concurrency, config.max_cost)


def run(config: TeacherConfig) -> bool:
    """Make the missing traces. Returns whether every image has one now."""
    samples = [s for s in annotations.load_split(config.data, "train") if s.hois][: config.limit]
    if config.dry_run:
        done = read_traces(config.out) if config.out.exists() else {}
        images, teacher = sum(s.file_name not in done for s in samples), make_teacher(config)
        tokens = [count * images for count in openai_chat.estimated_tokens(teacher)]
        print(f"{teacher.prompt}\n\n{images} images: about {tokens[0]:,} input tokens and "
              f"{tokens[1]:,} output tokens: ${teacher.cost(*tokens):.2f}")
        return True
    with TraceFile(config.out) as file:
        todo = [sample for sample in samples if sample.file_name not in file.names]
        print(f"{config.out}: {len(todo)} of {len(samples)} images have no trace yet")
        missing, ended = make_traces(config, todo, file) if todo else ({}, "")
        left = sum(sample.file_name not in file.names for sample in todo)
    for name, reason in sorted(missing.items()):
        print(f"{name}: {reason}", file=sys.stderr)
    print(f"{config.out}: {left} of {len(samples)} images have no trace", ended and f"({ended})")
    return left == 0


def main(argv: list[str] | None = None) -> None:
    """The command line. Its exit status is 1 if an image has no trace."""
    config = parse_config(TeacherConfig, __doc__, argv)
    with one_line("teacher.py: ", "run the same command again to go on"):
        sys.exit(0 if run(config) else 1)


if __name__ == "__main__":
    main()
