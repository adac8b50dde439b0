"""Reasoning traces from a teacher model, for thinking distillation (Sec. 3.2).

    export OPENAI_API_KEY=... D=hico_20160224_det
    python teacher.py --data $D --out traces.jsonl --dry-run  # what it costs
    python teacher.py --data $D --out traces.jsonl --max-cost 60
    # a local teacher served by vLLM or `transformers serve`: no key, no cost
    python teacher.py --data $D --out traces.jsonl --teacher NAME \\
        --base-url http://127.0.0.1:8000/v1
    # OpenAI's Batch API, half the price: write request files, hand them in
    # (purpose "batch", endpoint /v1/chat/completions), collect the results
    python teacher.py --data $D --out traces.jsonl --backend batch
    python teacher.py --data $D --out traces.jsonl --backend batch \\
        --collect results/*.jsonl
    # no teacher: sentences from the ground truth, as the demo uses them
    python teacher.py --data $D --out traces.jsonl --backend template

Every training image with ground truth gets one line of traces.jsonl, in any order:

    {"file_name": "HICO_train2015_00000001.jpg", "think": "There is one ...",
     "teacher": "gpt-4o-mini", "attempts": 1,
     "usage": {"prompt_tokens": 2950, "completion_tokens": 96, "cost": 0.0005}}

Stop it at any time, kill -9 included, and run the same command again: it asks only for what is
missing. Images without an accepted trace are listed at the end with the reason.

1. The teacher gets the image and the Reasoning Guidance of Fig. 4, as in the paper. The guidance
   points to the lists of valid classes; --lists sends them too (about 1,800 tokens more).
2. docs/teacher.md says which traces are accepted, what they cost, and how faults end.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tqdm import tqdm

import hicodet
from engine.data import annotations
from engine.options import Config, option, parse_config, required
from engine.signals import one_line
from engine.traces.acceptance import accept_trace
from engine.traces.openai_chat import (
    BATCH_DISCOUNT,
    OPENAI_URL,
    Filtered,
    Refused,
    Teacher,
    Transient,
    batch_results,
    complete,
    estimated_tokens,
    known_prices,
    parse,
    request_body,
    usage_of,
    write_requests,
)
from engine.traces.template import template_trace
from engine.traces.trace_file import TraceFile, read_traces
from hicodet import InputError, Sample

FAILURES_IN_A_ROW = 20  # images without a trace: the server is gone, or the teacher writes none

TASK = "Look at the image and reason about how its people interact with objects.\n"
REQUEST = """\
Answer the four questions in order, in a few plain sentences, between <think> and </think>. Name \
object classes and verbs literally. No coordinates, no lists, no <answer>."""


@dataclass(frozen=True)
class Outcome:
    """What became of the request for one image."""

    think: str | None = None  # the accepted trace
    reason: str = ""  # why there is none
    attempts: int = 0  # that the server answered
    usage: dict = field(default_factory=dict)  # of all attempts
    refused: bool = False  # as every other image would be


def ask(sample: Sample, teacher: Teacher, attempts: int, stop: threading.Event) -> Outcome | None:
    """Ask for an image's trace, again if it is rejected, at most `attempts` times.

    Returns None if the run ended before the image's turn.
    """
    if stop.is_set():
        return None
    usage = Counter()
    try:
        body = request_body(sample, teacher)
        for attempt in range(1, attempts + 1):
            reply = complete(teacher, body, stop)
            usage.update(usage_of(reply, teacher))
            think, reason = accept_trace(reply)
            if think or stop.is_set():
                break
        return Outcome(think, reason, attempt, dict(usage))
    except Refused as error:
        stop.set()  # here, before this thread takes the next image
        return Outcome(reason=f"{sample.file_name}: {error}", refused=True)
    except (InputError, Filtered, Transient) as error:
        return Outcome(reason=str(error), usage=dict(usage))


def ask_all(
    samples: Sequence[Sample], teacher: Teacher, file: TraceFile, *, attempts: int,
    concurrency: int, max_cost: float,
) -> tuple[dict[str, str], str]:
    """Ask for the traces of all samples, `concurrency` at a time, and append those accepted.

    max_cost: USD, with what the traces in the file cost. Nothing is set aside for requests in
    flight, so the sum can pass it by their cost. Returns why images have no trace, by file name,
    and why the run ended early ("" if it did not); it still waits for requests in flight.
    """
    missing, ended, failures, spent, stop = {}, "", 0, file.cost, threading.Event()
    bar, pool = tqdm(total=len(samples), desc="traces"), ThreadPoolExecutor(concurrency)
    try:
        jobs = {pool.submit(ask, sample, teacher, attempts, stop): sample for sample in samples}
        for job in as_completed(jobs):
            sample, outcome = jobs.pop(job), job.result()
            if outcome is None:
                continue
            spent += outcome.usage.get("cost", 0.0)
            if outcome.think:
                file.append(sample, outcome.think, teacher.model, outcome.attempts, outcome.usage)
                failures = 0
            elif not outcome.refused:
                missing[sample.file_name] = outcome.reason
                failures += 1
            ended = ended or why_end(outcome, failures, spent, max_cost)
            if ended:
                stop.set()
            bar.set_postfix_str(f"rejected {len(missing)}, ${spent:.4f}", refresh=False)
            bar.update()
    finally:  # also after Ctrl-C or on a full disk
        stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()
    return missing, ended and f"{ended}; ${spent:.4f} are spent in all"


def why_end(outcome: Outcome, failures: int, spent: float, max_cost: float) -> str:
    """Why the run ends after this image, "" if it goes on. failures: images in a row."""
    if outcome.refused:
        return outcome.reason
    if failures >= FAILURES_IN_A_ROW:
        return f"{failures} images in a row without a trace, the last for {outcome.reason}"
    return f"--max-cost {max_cost:g} is reached: raise it to go on" if spent >= max_cost else ""


def collect_batch(
    paths: Iterable[Path], wanted: dict[str, Sample], teacher: Teacher, file: TraceFile
) -> dict[str, str]:
    """Append the accepted traces of a batch's result files, in any order; the first one counts.

    wanted: the images by file name. Returns why others were not accepted. Raises InputError naming
    the line that is no result, or one of other data.
    """
    missing: dict[str, str] = {}
    for where, name, reply, said in batch_results(paths):
        if name not in wanted:
            raise InputError(f"{where}: {name!r} is no training image of this data")
        if name in file.names:
            continue
        think, reason = accept_trace(reply) if reply else (None, said)
        if think:
            file.append(wanted[name], think, teacher.model, 1, usage_of(reply, teacher))
        else:
            missing[name] = reason
    return {name: reason for name, reason in missing.items() if name not in file.names}


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Config):
    """Options of the command."""

    data: Path = required(
        "HICO-DET's folder, with anno_bbox.mat and images", group="what to read and write"
    )
    out: Path = required("traces.jsonl, begun or continued", group="what to read and write")
    backend: Literal["openai", "batch", "template"] = option(
        "openai", "a server, files for OpenAI's Batch API, or no teacher",
        group="the teacher (Sec. 3.2)",
    )
    teacher: str = option(
        "gpt-4o-mini", "name of the model", paper="Sec. 4.2", group="the teacher (Sec. 3.2)"
    )
    base_url: str = option(
        OPENAI_URL, "an OpenAI-compatible server", metavar="URL", group="the teacher (Sec. 3.2)"
    )
    lists: bool = option(
        False, "send the lists of valid classes of Fig. 4 too", group="what is asked"
    )
    max_side: int = option(
        512, "shrink images to this; up to 512 OpenAI bills low detail", least=1, metavar="PIXELS",
        group="what is asked",
    )
    max_tokens: int = option(
        512, "longest reply; a reasoning model needs thousands", least=1, group="what is asked"
    )
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = option(
        "max_tokens", "name of that limit; OpenAI's reasoning models need the second one",
        group="what is asked",
    )
    extra_body: str = option(
        "{}", "further fields of the request, e.g. to turn reasoning off", metavar="JSON",
        group="what is asked",
    )
    attempts: int = option(
        3, "most requests for an acceptable trace", least=1, group="what is asked"
    )
    concurrency: int = option(16, "requests in flight", least=1, group="the connection")
    timeout: float = option(
        60.0, "seconds to wait for the next byte", least=0.001, group="the connection"
    )
    retries: int = option(
        8, "further tries after 408, 429, 5xx, time-outs and cut connections", least=0,
        group="the connection",
    )
    backoff: float = option(
        1.0, "seconds before the first retry, then doubled", least=0.001, group="the connection"
    )
    max_cost: float = option(
        math.inf, "stop at this sum; requests in flight may pass it", least=0, metavar="USD",
        group="what may be spent",
    )
    input_price: float | None = option(
        None, "per million tokens, for a model without a known price", least=0, metavar="USD",
        group="what may be spent",
    )
    output_price: float | None = option(
        None, "the same for its output", least=0, metavar="USD", group="what may be spent"
    )
    limit: int | None = option(
        None, "only the first N images of the training set", least=1,
        group="what to read and write",
    )
    collect: tuple[Path, ...] = option(
        (), "result files of a batch", metavar="FILE", group="the teacher (Sec. 3.2)"
    )
    dry_run: bool = option(
        False, "print a request and estimate the cost; ask nothing", group="what to read and write"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.collect and self.backend != "batch":
            raise ValueError("--collect takes the results of a batch: give --backend batch with it")
        if self.dry_run and self.backend == "template":
            raise ValueError("--dry-run shows a request; the template makes none")
        if self.max_cost < math.inf and self.backend != "openai":
            raise ValueError("--max-cost watches replies: for a batch use --dry-run and --limit")


def make_teacher(config: TeacherConfig) -> Teacher:
    """The teacher that the flags and the environment describe. Raises InputError."""
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", config.base_url):
        raise InputError(f"--base-url {config.base_url}: expected http(s)://host[:port]/v1, "
                         "without user or password; a key goes into OPENAI_API_KEY")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise InputError("OPENAI_API_KEY holds characters that no key has: set it again")
    if not isinstance(extra := parse(config.extra_body), dict):
        raise InputError(f"--extra-body {config.extra_body}: expected a JSON object")
    lists = hicodet.TASK_DESCRIPTION if config.lists else ""
    return Teacher(
        model=config.teacher, base_url=config.base_url.rstrip("/"), key=key,
        prompt=TASK + lists + hicodet.THINKING_PROCESS + REQUEST, max_side=config.max_side,
        more_fields={config.max_tokens_field: config.max_tokens, **extra}, timeout=config.timeout,
        retries=config.retries, backoff=config.backoff, prices=prices_of(config),
    )


def prices_of(config: TeacherConfig) -> tuple[float, float]:
    """USD per million tokens, in and out; 0 if not known. Raises InputError for --max-cost then."""
    known, given = known_prices(config.teacher), (config.input_price, config.output_price)
    prices = [known[i] if price is None and known else price for i, price in enumerate(given)]
    if None in prices:
        said = f"{config.teacher}: price not known: give --input-price and --output-price"
        if config.max_cost < math.inf:
            raise InputError(f"--max-cost {config.max_cost:g}: {said}")
        if config.base_url.startswith("https:"):
            print(f"{said}; until then costs count as 0", file=sys.stderr)
    factor = BATCH_DISCOUNT if config.backend == "batch" else 1.0
    return tuple((price or 0.0) * factor for price in prices)


def print_dry_run(samples: Sequence[Sample], teacher: Teacher) -> None:
    """Print the first request without its image, and about what all will cost."""
    if not samples:
        raise InputError("no training image needs a trace: none has ground truth without one")
    body = request_body(samples[0], teacher)
    image = body["messages"][0]["content"][1]["image_url"]
    image["url"] = f"data:image/jpeg;base64,({len(image['url'])} characters)"
    print(json.dumps(body, indent=2))
    tokens_in, tokens_out = (count * len(samples) for count in estimated_tokens(teacher))
    print(f"{len(samples)} images: about {tokens_in:,} input tokens and {tokens_out:,} output "
          f"tokens: ${teacher.cost(tokens_in, tokens_out):.2f}")


def make_traces(
    config: TeacherConfig, every: dict[str, Sample], todo: Sequence[Sample], file: TraceFile
) -> tuple[dict[str, str], str]:
    """Run the backend that the flags ask for. Returns as `ask_all` does."""
    if config.backend == "template":
        for sample in todo:
            file.append(sample, template_trace(sample.hois), "template", 1, {})
        return {}, ""
    teacher = make_teacher(config)
    if config.collect:
        return collect_batch(config.collect, every, teacher, file), ""
    annotations.require_images(todo)
    if config.backend == "batch":
        return write_requests(todo, teacher, config.out), ""
    if not teacher.key and teacher.base_url == OPENAI_URL:
        raise InputError("OPENAI_API_KEY is not set: export it, or give a local --base-url")
    if file.cost >= config.max_cost:
        raise InputError(f"--max-cost {config.max_cost:g}: the traces cost ${file.cost:.4f} so far")
    shuffled = random.sample(todo, len(todo))  # or a rerun begins with all that were refused
    return ask_all(shuffled, teacher, file, attempts=config.attempts,
                   concurrency=config.concurrency, max_cost=config.max_cost)


def run(config: TeacherConfig) -> bool:
    """Make the traces that are missing. Returns whether every image has one now."""
    every = {sample.file_name: sample for sample in annotations.load_split(config.data, "train")}
    samples = [sample for sample in every.values() if sample.hois][: config.limit]
    if config.dry_run:
        done = read_traces(config.out) if config.out.exists() else {}
        todo = [sample for sample in samples if sample.file_name not in done]
        print_dry_run(todo, make_teacher(config))
        return True
    with TraceFile(config.out) as file:
        if others := sorted(file.names - every.keys()):
            raise InputError(f"{config.out} has {others[0]}, which is no training image of "
                             f"{config.data}: give another --out")
        todo = [sample for sample in samples if sample.file_name not in file.names]
        print(f"{config.out}: {len(todo)} of {len(samples)} images have no trace yet")
        missing, ended = make_traces(config, every, todo, file) if todo else ({}, "")
        left = sum(sample.file_name not in file.names for sample in todo)
    for name, reason in sorted(missing.items()):
        print(f"{name}: {reason}", file=sys.stderr)
    print(f"{config.out}: {left} of {len(samples)} images have no trace", ended and f"({ended})")
    return left == 0


def main(argv: list[str] | None = None) -> None:
    """The command line; exit status 1 if an image is left without a trace."""
    config = parse_config(TeacherConfig, __doc__.partition("\n1. ")[0], argv)
    with one_line("teacher.py: ", "run the same command again to go on"):
        sys.exit(0 if run(config) else 1)


if __name__ == "__main__":
    main()
