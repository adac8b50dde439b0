"""One OpenAI-compatible chat request: its retries, its cost, the Batch API's request files."""

import base64
import http.client
import io
import json
import math
import random
import re
import threading
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from email.message import Message
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from engine.data.images import read_image
from engine.files import json_lines, replace_file
from hicodet import InputError, Sample

OPENAI_URL = "https://api.openai.com/v1"
# Model: USD per million tokens in and out, and tokens of an image at low detail. From OpenAI's
# price list (openai.com/api/pricing) and its guide to vision.
PRICES = {
    "gpt-4o-mini": (0.15, 0.60, 2833),
    "gpt-4o": (2.50, 10.00, 85),
    "gpt-4o-2024-05-13": (5.00, 15.00, 85),
}
LOW_DETAIL = 512  # pixels of the longer side
TRACE_TOKENS = 150  # of a trace, for estimates
BATCH_DISCOUNT, BATCH_BYTES = 0.5, 200_000_000  # of OpenAI's Batch API, for a file of requests
MAX_BACKOFF, MAX_RETRY_AFTER = 60.0, 3600.0  # seconds
MAX_REPLY = 16 * 2**20  # bytes that are read of a reply
MOST_TOKENS = 10_000_000  # of a request: a larger count in "usage" is no count
SHORTEST_SECRET = 8  # characters; local servers take keys like "none", which traces may contain
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
# In small letters, what OpenAI, Azure and proxies say of an image that they do not let through.
FILTERED = re.compile(r"content[ _]?(?:management[ _])?(?:filter|policy)|moderation|safety system")


class Refused(Exception):
    """The server refuses the key or the request, and would refuse the next one too."""


class Filtered(Exception):
    """The server's content filter refuses this image; others may pass."""


class Transient(Exception):
    """A failed request that is worth another one, at the earliest after `retry_after` seconds."""

    def __init__(self, reason: str, retry_after: float = 0.0):
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Teacher:
    """Whom to ask, and how."""

    model: str
    base_url: str  # without the closing /
    key: str = field(repr=False)  # "" sends none
    prompt: str
    more_fields: dict  # of a request, the limit of tokens among them
    max_side: int  # pixels of the longer side, as sent
    timeout: float  # seconds without a byte
    retries: int
    backoff: float  # seconds before the first retry, doubled with each
    prices: tuple[float, float]  # USD per million tokens, in and out

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """What these tokens cost, in USD."""
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6


def request_body(sample: Sample, teacher: Teacher) -> dict:
    """The chat-completions request for an image. Raises InputError as `read_image`."""
    image = read_image(sample)
    image.thumbnail((teacher.max_side, teacher.max_side))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    # OpenAI sees 512 x 512 pixels at low detail; high would bill tiles that show no more.
    detail = "low" if teacher.max_side <= LOW_DETAIL else "high"
    # The text comes first: servers cache the prefix that all requests have in common.
    content = [{"type": "text", "text": teacher.prompt},
               {"type": "image_url", "image_url": {"url": url, "detail": detail}}]
    messages = [{"role": "user", "content": content}]
    return {"model": teacher.model, "messages": messages, **teacher.more_fields}


def known_prices(model: str) -> tuple | None:
    """The entry of PRICES for a model; for a dated one without its own, that of its name."""
    return PRICES.get(model) or PRICES.get(re.sub(r"-\d{4}-\d\d-\d\d$", "", model))


def estimated_tokens(teacher: Teacher) -> tuple[int, int]:
    """About how many tokens a request and its reply have.

    One token for 3 characters of the prompt, 150 of a trace, and a square image: by OpenAI's rule
    for the models of PRICES, else Qwen2.5-VL's patches of 28 x 28 pixels.
    """
    text, known = len(teacher.prompt) // 3 + 20, known_prices(teacher.model)
    if known is None:
        return text + math.ceil(teacher.max_side / 28) ** 2, TRACE_TOKENS
    if teacher.max_side <= LOW_DETAIL:
        return text + known[2], TRACE_TOKENS
    # At high detail each tile of 512 x 512 pixels costs twice the base of low detail.
    tiles = math.ceil(min(teacher.max_side, 768) / 512) * math.ceil(teacher.max_side / 512)
    return text + known[2] * (1 + 2 * tiles), TRACE_TOKENS


def usage_of(reply: dict, teacher: Teacher) -> dict:
    """Tokens and cost of a reply, as traces.jsonl has them; estimated if the server says none."""
    usage = reply.get("usage")
    counts = [usage.get(key) if isinstance(usage, dict) else None
              for key in ("prompt_tokens", "completion_tokens")]
    reported = all(type(count) is int and 0 <= count <= MOST_TOKENS for count in counts)
    tokens_in, tokens_out = counts if reported else estimated_tokens(teacher)
    return {"prompt_tokens": tokens_in, "completion_tokens": tokens_out,
            "cost": teacher.cost(tokens_in, tokens_out)}


class EveryStatus(urllib.request.HTTPErrorProcessor):
    """Returns the reply whatever its status; so no redirect takes the key to another host."""

    def http_response(self, request, response):
        return response

    https_response = http_response


def post(teacher: Teacher, body: dict) -> dict:
    """One chat completion. Raises Transient if another try may help, else Filtered or Refused.

    HTTP_PROXY, HTTPS_PROXY and NO_PROXY are honoured, but not for a server on this machine.
    """
    # some hosts refuse urllib's own User-Agent
    headers = {"Content-Type": "application/json", "User-Agent": "hoi-r1-teacher"}
    if teacher.key:
        headers["Authorization"] = f"Bearer {teacher.key}"
    url = f"{teacher.base_url}/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        # None: the proxies that the environment names
        proxies = {} if urlsplit(teacher.base_url).hostname in LOOPBACK else None
        opener = urllib.request.build_opener(EveryStatus, urllib.request.ProxyHandler(proxies))
        with opener.open(request, timeout=teacher.timeout) as response:
            text = response.read(MAX_REPLY).decode(errors="replace")
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an odd proxy
        said = without_key(repr(getattr(error, "reason", error)), teacher)
        raise Transient(f"{address(request, teacher)}: {said}") from None
    status = response.status
    if 300 <= status < 400:
        text = f"redirects to {response.headers['Location']}: correct --base-url"
    text = without_key(text, teacher)
    if status == 200:
        reply = parse(text)
        if is_completion(reply):
            return reply
        status, text = error_in(reply, text)
    raise failure_of(status, text, address(request, teacher), response.headers)


def address(request: urllib.request.Request, teacher: Teacher) -> str:
    """The server, and the proxy if the request went to one, for an error to name."""
    direct = request.host == urlsplit(teacher.base_url).netloc
    return teacher.base_url + ("" if direct else f" through the proxy {request.host}")


def without_key(text: str, teacher: Teacher) -> str:
    """What a server said, in which it may have quoted the key."""
    return text.replace(teacher.key, "(key)") if len(teacher.key) >= SHORTEST_SECRET else text


def parse(text: str) -> object:
    """The value of a JSON text, None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_completion(reply: object) -> bool:
    """Whether a reply holds a message and no error."""
    try:
        choice = reply["choices"][0]
        error = reply.get("error") or choice.get("error")
        return isinstance(choice["message"], dict) and not error
    except (LookupError, TypeError, AttributeError):
        return False


def error_in(reply: object, text: str) -> tuple[int, str]:
    """The code and the words of an error that came with status 200; the code is 0 if unknown."""
    error = reply.get("error") if isinstance(reply, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    known = int(code) if re.fullmatch("[1-5][0-9][0-9]", str(code)) else 0
    return known, json.dumps(error, ensure_ascii=False) if error else f"no chat completion: {text}"


def first_words(text: str) -> str:
    """A server's first words on one line, without HTML tags and what a terminal would obey."""
    plain = re.sub(r"<[^<>]*>", " ", text[:2000])
    plain = "".join(c if c.isprintable() else " " for c in plain)
    return " ".join(plain.split())[:300]


def failure_of(status: int, said: str, server: str, headers: Message) -> Exception:
    """What a reply without a completion means.

    Transient for 408, 429, 5xx and an error without a code, Filtered for a content filter, else
    Refused.
    """
    reason = f"{server}: {f'{status}: ' if status else ''}{first_words(said)}"
    if status in (0, 400, 403) and FILTERED.search(said.lower()):
        return Filtered(reason)
    # OpenAI also says 429 to an account without money; waiting does not help that.
    if (status in (0, 408, 429) or status >= 500) and "insufficient_quota" not in said:
        return Transient(reason, seconds(headers["Retry-After"]))
    if status == 400 and "max_completion_tokens" in said:
        reason += "; give --max-tokens-field max_completion_tokens"
    return Refused(reason)


def seconds(header: str | None) -> float:
    """The header Retry-After in seconds, 0 if there is none or it holds a date."""
    try:
        return max(0.0, min(float(header or 0), MAX_RETRY_AFTER))
    except ValueError:
        return 0.0


def complete(teacher: Teacher, body: dict, stop: threading.Event) -> dict:
    """A chat completion, with retries. Raises Filtered or Refused, or the last Transient."""
    for retry in count():
        try:
            return post(teacher, body)
        except Transient as error:
            backoff = min(MAX_BACKOFF, teacher.backoff * 2**retry) * random.uniform(0.5, 1.0)
            if retry == teacher.retries or stop.wait(max(backoff, error.retry_after)):
                raise


def write_requests(
    samples: Sequence[Sample], teacher: Teacher, out: Path, max_bytes: int = BATCH_BYTES
) -> dict[str, str]:
    """Write the request files of a batch next to `out`. Returns why images have no request.

    Raises InputError if there are such files already: handing them in twice would cost twice.
    """
    if old := sorted(out.parent.glob(f"{out.stem}.requests-*.jsonl")):
        raise InputError(f"{old[0]} is there already: --collect its results if it was handed in, "
                         "then delete it")
    missing, part, size, parts = {}, [], 0, []
    for sample in tqdm(samples, desc="requests", unit="img"):
        try:
            body = request_body(sample, teacher)
        except InputError as error:
            missing[sample.file_name] = str(error)
            continue
        line = json.dumps({"custom_id": sample.file_name, "method": "POST",
                           "url": "/v1/chat/completions", "body": body}) + "\n"
        if part and size + len(line) > max_bytes:
            parts.append(write_part(out, len(parts) + 1, part))
            part, size = [], 0
        part.append(line)
        size += len(line)  # characters are bytes: the JSON is ASCII
    if part:
        parts.append(write_part(out, len(parts) + 1, part))
    print("request files:", *parts)
    return missing


def write_part(out: Path, number: int, lines: list[str]) -> Path:
    """Write one request file; it gets its name when complete, so no half file is handed in."""
    path = out.with_name(f"{out.stem}.requests-{number:03d}.jsonl")
    replace_file(path, "".join(lines))
    return path


def batch_results(paths: Iterable[Path]) -> Iterator[tuple[str, str, dict | None, str]]:
    """The result lines of a batch: their place, custom_id, the reply, and what was said instead.

    The reply is None where the server answered with an error. Raises InputError naming the line
    that is no result.
    """
    for path in paths:
        for where, result in json_lines(path):
            if not isinstance(result, dict) or not isinstance(result.get("custom_id"), str):
                raise InputError(f"{where}: no result of a batch")
            response = result.get("response")
            reply = response.get("body") if isinstance(response, dict) else None
            said = first_words(json.dumps(result))
            yield where, result["custom_id"], reply if is_completion(reply) else None, said
