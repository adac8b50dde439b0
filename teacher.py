"""Reasoning traces from a teacher model, for thinking distillation (Sec. 3.2).

    export OPENAI_API_KEY=...
    # what it will cost; then do it, and spend no more than that
    python teacher.py --data hico_20160224_det --out traces.jsonl --dry-run
    python teacher.py --data hico_20160224_det --out traces.jsonl --max-cost 60
    # a local teacher behind vLLM or `transformers serve`: no key, no cost
    python teacher.py --data hico_20160224_det --out traces.jsonl \\
        --base-url http://127.0.0.1:8000/v1 --teacher NAME
    # OpenAI's Batch API, half the price: writes traces.requests-001.jsonl etc.;
    # hand them in (purpose "batch", endpoint /v1/chat/completions), and later
    # collect the result files
    python teacher.py --data hico_20160224_det --out traces.jsonl \\
        --backend batch
    python teacher.py --data hico_20160224_det --out traces.jsonl \\
        --backend batch --collect results/*.jsonl
    # no teacher at all: sentences from the ground truth, as the demo uses them
    python teacher.py --data hico_20160224_det --out traces.jsonl \\
        --backend template

Every training image with ground truth gets one line of traces.jsonl, in any order:

    {"file_name": "HICO_train2015_00000001.jpg", "think": "There is one ...",
     "teacher": "gpt-4o-mini", "attempts": 1,
     "usage": {"prompt_tokens": 2950, "completion_tokens": 96, "cost": 0.0005}}

Stop it whenever you like, kill -9 included, and run the same command again: it asks only for what
is missing. Images without an accepted trace are listed at the end with the reason.

1. The teacher gets the image and the Reasoning Guidance of Fig. 4, as in the paper. The guidance
   points to the lists of valid classes; --lists sends them along (about 1,800 tokens more).
2. A trace is refused only for what would hurt training (`accept_trace`): cut at --max-tokens, not
   within <think>, an <answer> or special tokens in it, a refusal, nothing said of the image.
3. Cost is reckoned at list price: cached tokens in full, replies lost on the way at the most they
   can have cost. --max-cost includes what earlier runs paid for the traces in the file. A server
   behind http is taken for a local one, and free unless a price is known or given.
4. Connections are direct: proxy variables are not read, redirects are not followed.
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
from itertools import count, takewhile
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
    Budget,
    Filtered,
    Refused,
    Stop,
    Teacher,
    Transient,
    batch_results,
    complete,
    input_tokens,
    known_prices,
    request_body,
    write_requests,
)
from engine.traces.template import template_trace
from engine.traces.trace_file import TraceFile, read_trace_lines
from hicodet import InputError, Sample

GIVEN_UP_IN_A_ROW = 10  # images, one after the other: the server is gone
UNTRACED_IN_A_ROW = 30  # images, in the order asked: this teacher makes no traces
NO_TRACES = ("{} images in a row without an acceptable trace, the last for {}; the teacher must "
             "write <think> and </think> itself (vLLM: no --reasoning-parser); or take another one")
PRICE_NOT_KNOWN = "price not known: give --input-price and --output-price"

TASK = "Look at the image and reason about how its people interact with objects.\n"
REQUEST = """\
Answer the four questions in order, in a few plain sentences, between <think> and </think>. Name \
object classes and verbs literally. No coordinates, no lists, no <answer>."""


# ---- asking the teacher


@dataclass(frozen=True)
class Outcome:
    """What became of the request for one image."""

    think: str | None = None  # the accepted trace
    reason: str = ""  # why there is none
    attempts: int = 0  # that the server answered
    usage: dict = field(default_factory=dict)  # of all attempts
    given_up: bool = False  # the server did not serve
    stopped: bool = False  # the run ends; without a reason, another thread ended it


def ask(
    sample: Sample, teacher: Teacher, attempts: int, budget: Budget, stop: threading.Event
) -> Outcome:
    """Ask for an image's trace, again if it is rejected, at most `attempts` times."""
    usage, attempt = Counter(), 0
    try:
        if stop.is_set():
            raise Stop
        body = request_body(sample, teacher)
        for attempt in range(1, attempts + 1):
            reply, used = complete(teacher, body, budget, stop)
            usage.update(used)
            think, reason = accept_trace(reply)
            if think:
                break
        return Outcome(think, reason, attempt, dict(usage))
    except Stop as error:
        stop.set()  # here, before this thread takes the next image
        named = f"{sample.file_name}: " if isinstance(error, Refused) else ""
        return Outcome(reason=f"{named}{error}", stopped=True)
    except Transient as error:
        return Outcome(reason=str(error), given_up=True)
    except (InputError, Filtered) as error:  # the image is broken, or not let through
        return Outcome(reason=str(error), attempts=attempt)


def in_a_row(untraced: dict[int, bool], number: int) -> int:
    """How many images around this one, in the order asked, have no trace; one in flight is a gap,
    or quick refusals would add up. untraced: by place; False neither counts nor is a gap."""
    sides = count(number, -1), count(number + 1)
    return sum(untraced[n] for side in sides for n in takewhile(untraced.__contains__, side))


def ask_all(
    samples: Sequence[Sample], teacher: Teacher, file: TraceFile, budget: Budget, attempts: int,
    concurrency: int,
) -> tuple[dict[str, str], str]:
    """Ask for the traces of all samples, `concurrency` at a time, and append those accepted.

    Returns why images have none, by file name, and why the run ended early ("" if it did not);
    what is in flight then is still waited for.
    """
    missing, untraced, ended, given_up, stop = {}, {}, "", 0, threading.Event()
    bar, pool = tqdm(total=len(samples), desc="traces"), ThreadPoolExecutor(concurrency)
    try:
        jobs = {pool.submit(ask, sample, teacher, attempts, budget, stop): (number, sample)
                for number, sample in enumerate(samples)}
        for job in as_completed(jobs):
            (number, sample), outcome = jobs.pop(job), job.result()
            if outcome.stopped:
                ended = ended or outcome.reason
                continue
            if outcome.think:
                file.append(sample, outcome.think, teacher.model, outcome.attempts, outcome.usage)
            else:
                missing[sample.file_name] = outcome.reason
                untraced[number] = outcome.attempts > 0
            given_up = given_up + 1 if outcome.given_up else 0
            if given_up == GIVEN_UP_IN_A_ROW:
                ended = f"{given_up} images given up in a row, the last for {outcome.reason}"
            elif untraced.get(number) and (row := in_a_row(untraced, number)) >= UNTRACED_IN_A_ROW:
                ended = ended or NO_TRACES.format(row, outcome.reason)
            if ended:
                stop.set()
            bar.set_postfix_str(f"rejected {len(missing)}, tokens {budget.tokens:,}, "
                                f"${budget.spent:.4f}", refresh=False)
            bar.update()
    finally:  # also after Ctrl-C or on a full disk
        stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()
    return missing, ended and f"{ended}; ${budget.spent:.4f} are spent in all"


def collect(
    paths: Iterable[Path], wanted: dict[str, Sample], teacher: Teacher, file: TraceFile,
    budget: Budget,
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
            usage = budget.settle(0.0, reply.get("usage"))
            file.append(wanted[name], think, teacher.model, 1, usage)
        else:
            missing[name] = reason
    return {name: reason for name, reason in missing.items() if name not in file.names}


# ---- the command


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Config):
    """Options of the command."""

    GROUPS = {
        "what to read and write": "data out limit dry_run",
        "the teacher (Sec. 3.2)": "teacher backend base_url collect",
        "what is asked": "lists max_side max_tokens attempts",
        "what may be spent": "max_cost input_price output_price",
        "the connection": "concurrency timeout retries backoff",
    }
    data: Path = required("HICO-DET's folder, with anno_bbox.mat and images")
    out: Path = required("traces.jsonl, begun or continued")
    backend: Literal["openai", "batch", "template"] = option(
        "openai", "a server, files for OpenAI's Batch API, or no teacher"
    )
    teacher: str = option("gpt-4o-mini", "name of the model", paper="Sec. 4.2")
    base_url: str = option(OPENAI_URL, "an OpenAI-compatible server", metavar="URL")
    lists: bool = option(False, "send the lists of valid classes of Fig. 4 too")
    max_side: int = option(
        512, "shrink images to this; up to 512 OpenAI bills low detail", least=1, metavar="PIXELS"
    )
    max_tokens: int = option(512, "longest reply", least=1)
    attempts: int = option(3, "ask so often for a trace that can be accepted", least=1)
    concurrency: int = option(16, "requests in flight", least=1)
    timeout: float = option(60.0, "seconds to wait for the next byte", least=0.001)
    retries: int = option(
        8, "further tries after 408, 429, 5xx, time-outs and cut connections", least=0
    )
    backoff: float = option(1.0, "seconds before the first retry, then doubled", least=0.001)
    max_cost: float = option(math.inf, "spend no more in all", least=0, metavar="USD")
    input_price: float | None = option(
        None, "per million tokens, of a model whose price is not known here", least=0, metavar="USD"
    )
    output_price: float | None = option(None, "the same of its output", least=0, metavar="USD")
    limit: int | None = option(None, "only the first so many images of the training set", least=1)
    collect: tuple[Path, ...] = option((), "result files of a batch", metavar="FILE")
    dry_run: bool = option(False, "print a request and what it all will cost; stop")

    def __post_init__(self):
        super().__post_init__()
        if self.collect and self.backend != "batch":
            raise ValueError("--collect takes the results of a batch: give --backend batch with it")
        if self.dry_run and self.backend == "template":
            raise ValueError("--dry-run shows a request; the template makes none")
        if not (folder := self.out.absolute().parent).is_dir():
            raise ValueError(f"--out {self.out}: there is no folder {folder}")


def make_teacher(args: TeacherConfig) -> Teacher:
    """The teacher that the flags and the environment describe. Raises InputError."""
    host = r"(\[[0-9A-Fa-f:]+\]|[^\s/?#@:\[]+)(:[0-9]+)?"
    if not re.fullmatch(rf"https?://{host}(/[^\s?#@]*)?", args.base_url):
        raise InputError(f"--base-url {args.base_url}: expected http(s)://host[:port]/v1, without "
                         "user or password; a key goes into OPENAI_API_KEY")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise InputError("OPENAI_API_KEY holds characters that no key has: set it anew")
    lists = hicodet.TASK_DESCRIPTION if args.lists else ""
    return Teacher(
        args.teacher, args.base_url.rstrip("/"), key,
        TASK + lists + hicodet.THINKING_PROCESS + REQUEST,
        args.max_tokens, args.max_side, args.timeout, args.retries, args.backoff)


def make_budget(args: TeacherConfig, spent: float) -> tuple[Budget, str]:
    """The teacher's prices and what may be spent; and what is to be said if prices are not known.

    Raises InputError for --max-cost without prices.
    """
    known = known_prices(args.teacher) or (None, None)
    given = (args.input_price, args.output_price)
    prices = [known[i] if given[i] is None else given[i] for i in range(2)]
    unknown = f"{args.teacher}: {PRICE_NOT_KNOWN}" if None in prices else ""
    if args.max_cost < math.inf and unknown:
        raise InputError(f"--max-cost {args.max_cost:g}: {unknown}")
    factor = BATCH_DISCOUNT if args.backend == "batch" else 1.0
    prices = tuple((price or 0.0) * factor for price in prices)
    paid = args.base_url.startswith("https:")
    return Budget(prices, args.max_cost, spent), unknown if paid else ""


def dry_run(samples: Sequence[Sample], teacher: Teacher, budget: Budget, unknown: str) -> None:
    """Prints the first request without its image, and what all will cost: `unknown`, or a sum."""
    if not samples:
        raise InputError("no training image needs a trace: none has ground truth without one")
    body = request_body(samples[0], teacher)
    image = body["messages"][0]["content"][1]["image_url"]
    image["url"] = f"data:image/jpeg;base64,({len(image['url'])} characters)"
    print(json.dumps(body, indent=2))
    tokens = input_tokens(teacher) * len(samples), 150 * len(samples)
    print(f"{len(samples)} images: about {tokens[0]:,} input tokens and, at 150 a trace, "
          f"{tokens[1]:,} output tokens: {unknown or f'${budget.cost(*tokens):.2f}'}")


def run(args: TeacherConfig) -> bool:
    """Makes the traces that are missing. Returns whether every image has one now."""
    every = {sample.file_name: sample for sample in annotations.load_split(args.data, "train")}
    samples = [sample for sample in every.values() if sample.hois][: args.limit]
    if args.dry_run:
        done = {trace["file_name"] for trace in read_trace_lines(args.out)} if args.out.exists() else ()
        todo = [sample for sample in samples if sample.file_name not in done]
        dry_run(todo, make_teacher(args), *make_budget(args, 0.0))
        return True
    with TraceFile(args.out) as file:
        if not file.names <= set(every):
            raise InputError(f"{args.out} has {min(file.names - set(every))}, which is no training "
                             f"image of {args.data}: give another --out")
        todo = [sample for sample in samples if sample.file_name not in file.names]
        print(f"{args.out}: {len(todo)} of {len(samples)} images have no trace yet")
        missing, ended = make_traces(args, every, todo, file) if todo else ({}, "")
        left = sum(sample.file_name not in file.names for sample in todo)
    for name, reason in sorted(missing.items()):
        print(f"{name}: {reason}", file=sys.stderr)
    print(f"{args.out}: {left} of {len(samples)} images have no trace", ended and f"({ended})")
    return left == 0


def make_traces(
    args: TeacherConfig, every: dict[str, Sample], todo: Sequence[Sample], file: TraceFile
) -> tuple[dict[str, str], str]:
    """Runs the backend that the flags ask for; returns as ask_all does."""
    if args.backend == "template":
        for sample in todo:
            file.append(sample, template_trace(sample.hois), "template", 1, {})
        return {}, ""
    teacher, (budget, unknown) = make_teacher(args), make_budget(args, file.cost)
    if unknown:
        print(f"{unknown}; without, costs count as 0, for a later --max-cost too", file=sys.stderr)
    if args.backend == "batch" and args.collect:
        return collect(args.collect, every, teacher, file, budget), ""
    annotations.require_images(todo)
    if args.backend == "batch":
        return write_requests(todo, teacher, args.out, budget)
    if not teacher.key and teacher.base_url == OPENAI_URL:
        raise InputError("OPENAI_API_KEY is not set: export it, or give a local --base-url")
    shuffled = random.sample(todo, len(todo))  # or a rerun begins with all that were refused
    return ask_all(shuffled, teacher, file, budget, args.attempts, args.concurrency)


def main(argv: list[str] | None = None) -> None:
    """The command line; exit status 1 if an image is left without a trace."""
    args = parse_config(TeacherConfig, __doc__.partition("\n1. ")[0], argv)
    with one_line("teacher.py: ", "run the same command again to go on"):
        sys.exit(0 if run(args) else 1)


if __name__ == "__main__":
    main()
