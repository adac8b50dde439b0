"""Requests to an OpenAI-compatible server: retries, costs, and the Batch API's request files."""

import base64
import http.client
import io
import json
import math
import random
import re
import sys
import threading
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from engine.data.images import read_image
from engine.files import replace_file
from hicodet import InputError, Sample

OPENAI_URL = "https://api.openai.com/v1"
# Model: USD per million tokens in and out, and tokens of an image at low detail. Sources: OpenAI's
# price list (openai.com/api/pricing) and its guide to vision.
PRICES = {
    "gpt-4o-mini": (0.15, 0.60, 2833),
    "gpt-4o": (2.50, 10.00, 85),
    "gpt-4o-2024-05-13": (5.00, 15.00, 85),
}
TRACE_TOKENS = 150  # tokens of a trace, for estimates
BATCH_DISCOUNT, BATCH_SIZE = 0.5, 1000  # requests per file; OpenAI takes files of 200 MB
MAX_BACKOFF, MAX_RETRY_AFTER = 60.0, 3600.0  # seconds
SHORTEST_SECRET = 8  # characters; a shorter key such as "none" may be a word of a trace
LOOPBACK = {"localhost", "127.0.0.1", "::1"}
# In lower case, what OpenAI, Azure and proxies answer for an image that they block.
FILTERED = re.compile(r"content[ _]?(?:management[ _])?(?:filter|policy)|moderation|safety system")


class Refused(Exception):
    """The server refuses the key or the request, and would refuse any other request too."""


class NoReply(InputError):
    """An image without a reply. retry_after: seconds to wait before a retry; None: do not retry."""

    def __init__(self, reason: str, retry_after: float | None = 0.0):
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A server, its model, and what a request contains."""

    model: str
    base_url: str  # without a final /
    key: str = field(repr=False)  # "" sends none
    prompt: str
    more_fields: dict  # further fields of a request, such as max_tokens
    max_side: int  # pixels of a sent image's longer side
    timeout: float  # seconds without a byte
    prices: tuple[float, float]  # USD per million tokens, in and out
    retries: int = 8
    backoff: float = 1.0  # seconds before the first retry, doubled with each

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """The cost of these tokens in USD."""
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6


def request_body(sample: Sample, teacher: Teacher) -> dict:
    """The chat-completions request for an image. Raises InputError as `read_image`."""
    image = read_image(sample)
    image.thumbnail((teacher.max_side, teacher.max_side))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    # The text is first, as servers cache the common prefix of requests.
    content = [{"type": "text", "text": teacher.prompt},
               {"type": "image_url", "image_url": {"url": url, "detail": "low"}}]
    messages = [{"role": "user", "content": content}]
    return {"model": teacher.model, "messages": messages, **teacher.more_fields}


def known_prices(model: str) -> tuple | None:
    """The entry of PRICES for a model. A dated model may use the entry of its undated name."""
    return PRICES.get(model) or PRICES.get(re.sub(r"-\d{4}-\d\d-\d\d$", "", model))


def estimated_tokens(teacher: Teacher) -> tuple[int, int]:
    """Estimated tokens of a request and of its reply; a token is 3 characters of the prompt.

    For an unknown model, an image has as many tokens as for Qwen2.5-VL: one per 28 x 28 pixels.
    """
    known = known_prices(teacher.model)
    image = known[2] if known else math.ceil(teacher.max_side / 28) ** 2
    return len(teacher.prompt) // 3 + 20 + image, TRACE_TOKENS


def usage_of(reply: dict, teacher: Teacher) -> dict:
    """Tokens and cost of a reply, for traces.jsonl; estimated if the server reports none."""
    usage = reply.get("usage")
    names = ("prompt_tokens", "completion_tokens")
    tokens = [usage.get(name) if isinstance(usage, dict) else None for name in names]
    if not all(type(count) is int for count in tokens):
        tokens = estimated_tokens(teacher)
    return dict(zip(names, tokens)) | {"cost": teacher.cost(*tokens)}


class EveryStatus(urllib.request.HTTPErrorProcessor):
    """Return every reply as it is: following a redirect would send the key to another host."""

    def http_response(self, request, response):
        return response

    https_response = http_response


def post(teacher: Teacher, body: dict) -> dict:
    """One chat completion. Raises NoReply, or Refused if requests for other images would fail too.

    It uses HTTP_PROXY, HTTPS_PROXY and NO_PROXY, except for a server on this machine.
    """
    # some hosts refuse urllib's own User-Agent
    headers = {"Content-Type": "application/json", "User-Agent": "hoi-r1-teacher"}
    if teacher.key:
        headers["Authorization"] = f"Bearer {teacher.key}"
    url, place = f"{teacher.base_url}/chat/completions", urlsplit(teacher.base_url)
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    proxies = {} if place.hostname in LOOPBACK else None  # None: from the environment
    try:
        opener = urllib.request.build_opener(EveryStatus, urllib.request.ProxyHandler(proxies))
        with opener.open(request, timeout=teacher.timeout) as response:
            text, status = response.read().decode(errors="replace"), response.status
            headers = response.headers
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an odd proxy
        text, status, headers = repr(getattr(error, "reason", error)), 0, {}
    if len(teacher.key) >= SHORTEST_SECRET:
        text = text.replace(teacher.key, "(key)")  # the server may echo it
    if status == 200 and is_completion(reply := parse(text)):
        return reply
    through = "" if request.host == place.netloc else f" through the proxy {request.host}"
    raise failure_of(status, text, teacher.base_url + through, headers.get("Retry-After", ""))


def parse(text: str) -> object:
    """The value of a JSON text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_completion(reply: object) -> bool:
    """Whether a reply contains a message and no error."""
    try:
        choice = reply["choices"][0]
        error = reply.get("error") or choice.get("error")
        return isinstance(choice["message"], dict) and not error
    except (LookupError, TypeError, AttributeError):
        return False


def first_words(text: str) -> str:
    """The start of a server's text on one line, without HTML tags and control characters."""
    plain = re.sub(r"<[^<>]*>", " ", text[:2000])
    plain = "".join(c if c.isprintable() else " " for c in plain)
    return " ".join(plain.split())[:300]


def failure_of(status: int, said: str, server: str, retry_after: str) -> Exception:
    """The exception for a reply without a completion. status: 0 if there is no reply.

    NoReply for 408, 429, 5xx and a content filter, else Refused. retry_after: the header; a date
    is ignored.
    """
    if status == 200:  # use the code of the error in the text; without one, retry
        code = re.search(r'"code":\s*"?([1-5]\d\d)\b', said)
        status = int(code[1]) if code else 0
    reason = f"{server}: {f'{status}: ' if status else ''}{first_words(said)}"
    if status in (0, 400, 403) and FILTERED.search(said.lower()):
        return NoReply(reason, None)
    # OpenAI also answers 429 for an account without money, where waiting does not help.
    if (status in (0, 408, 429) or status >= 500) and "insufficient_quota" not in said:
        seconds = float(retry_after) if re.fullmatch(r"\d+(\.\d+)?", retry_after) else 0.0
        return NoReply(reason, min(seconds, MAX_RETRY_AFTER))
    if status == 400 and "max_completion_tokens" in said:
        reason += "; give --max-tokens-field max_completion_tokens"
    return Refused(reason + ("; it redirects: correct --base-url" if status // 100 == 3 else ""))


def complete(teacher: Teacher, body: dict, stop: threading.Event) -> dict:
    """A chat completion, with retries. Raises Refused, or the last NoReply."""
    for retry in count():
        try:
            return post(teacher, body)
        except NoReply as error:
            if error.retry_after is None or retry == teacher.retries:
                raise
            if retry == 1:
                tqdm.write(f"{error}; trying again", file=sys.stderr)
            backoff = min(MAX_BACKOFF, teacher.backoff * 2**retry) * random.uniform(0.5, 1.0)
            if stop.wait(max(backoff, error.retry_after)):
                raise


def write_requests(
    samples: Sequence[Sample], teacher: Teacher, out: Path, size: int = BATCH_SIZE
) -> dict[str, str]:
    """Write the request files of a batch next to `out`. Returns why images have no request.

    size: most requests in a file. Raises InputError if there are such files already, as sending a
    request twice would cost twice.
    """
    if old := sorted(out.parent.glob(f"{out.stem}.requests-*.jsonl")):
        raise InputError(f"{old[0]} is there already: --collect its results if it was handed in, "
                         "then delete it")
    missing = {}
    for start in tqdm(range(0, len(samples), size), desc="request files"):
        lines = []
        for sample in samples[start : start + size]:
            request = {"custom_id": sample.file_name, "method": "POST"}
            try:
                request |= {"url": "/v1/chat/completions", "body": request_body(sample, teacher)}
                lines.append(json.dumps(request) + "\n")
            except InputError as error:
                missing[sample.file_name] = str(error)
        path = out.with_name(f"{out.stem}.requests-{start // size + 1:03d}.jsonl")
        replace_file(path, "".join(lines))
    return missing
