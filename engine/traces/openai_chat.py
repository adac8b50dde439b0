"""One OpenAI-compatible chat request: its price, its retries, the Batch API's request files."""

import base64
import contextlib
import email.utils
import http.client
import io
import json
import math
import random
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from engine.files import json_lines, read_image, replace_file
from hicodet import InputError, Sample

OPENAI_URL = "https://api.openai.com/v1"
# Model: USD per million tokens in and out; tokens billed for an image and, at high detail, for each
# 512-pixel tile. From OpenAI's price list (openai.com/api/pricing) and its guide to vision.
PRICES = {
    "gpt-4o-mini": (0.15, 0.60, 2833, 5667),
    "gpt-4o": (2.50, 10.00, 85, 170),
    "gpt-4o-2024-05-13": (5.00, 15.00, 85, 170),
}
BATCH_DISCOUNT, BATCH_REQUESTS, BATCH_BYTES = 0.5, 50_000, 200_000_000  # of OpenAI's Batch API
MAX_BACKOFF, MAX_RETRY_AFTER = 60.0, 3600.0  # seconds
MAX_REPLY = 16 * 2**20  # bytes
MAX_TIMEOUTS = 10  # times --timeout: for a request as a whole, whose bytes may come one by one
# In small letters, what OpenAI, Azure and proxies say of an image that they do not let through.
FILTERED = re.compile(r"content[ _]?(?:management[ _])?(?:filter|policy)|moderation|safety system")
MAX_TOKENS = 10_000_000  # of a request: what a server reports beyond is no count


class Stop(Exception):
    """Ends the run: what the server refuses, the budget. Empty message: another thread already
    stopped the run."""


class Refused(Stop):
    """A wrong key, or a request that the server does not take."""


class Filtered(Exception):
    """The server's content filter refuses this image; others may pass."""


class Transient(Exception):
    """A failed request that is worth another; `billed`: the server may have done the work."""

    def __init__(self, reason: str, billed: bool = False, retry_after: float = 0.0):
        super().__init__(reason)
        self.billed, self.retry_after = billed, retry_after


@dataclass(frozen=True)
class Teacher:
    """Whom to ask, and how."""

    model: str
    base_url: str  # without the closing /
    key: str = field(repr=False)  # "" sends none
    prompt: str
    max_tokens: int  # of a reply
    max_side: int  # pixels of the longer side, as sent
    timeout: float  # seconds without a byte
    retries: int
    backoff: float  # seconds before the first retry, doubled with each

    @property
    def detail(self) -> str:
        """OpenAI sees 512 x 512 pixels at low detail; high would bill tiles that show no more."""
        return "low" if self.max_side <= 512 else "high"


def request_body(sample: Sample, teacher: Teacher) -> dict:
    """The chat-completions request for an image. Raises InputError as `read_image`."""
    image = read_image(sample)
    image.thumbnail((teacher.max_side, teacher.max_side))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=90)
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
    # The text comes first: servers cache the prefix that all requests have in common.
    content = [{"type": "text", "text": teacher.prompt},
               {"type": "image_url", "image_url": {"url": url, "detail": teacher.detail}}]
    return {"model": teacher.model, "max_tokens": teacher.max_tokens,
            "messages": [{"role": "user", "content": content}]}


def known_prices(model: str) -> tuple | None:
    """The entry of PRICES for a model; for a dated one without its own, that of its name."""
    return PRICES.get(model) or PRICES.get(re.sub(r"-\d{4}-\d\d-\d\d$", "", model))


def input_tokens(teacher: Teacher) -> int:
    """The most input tokens of a request: one for 3 characters, and those of a square image.

    That is OpenAI's rule for the models of PRICES, else Qwen2.5-VL's patches of 28 x 28 pixels.
    """
    text, known = len(teacher.prompt) // 3 + 20, known_prices(teacher.model)
    if known is None:
        return text + math.ceil(teacher.max_side / 28) ** 2
    tiles = math.ceil(min(teacher.max_side, 768) / 512) * math.ceil(teacher.max_side / 512)
    return text + known[2] + (0 if teacher.detail == "low" else tiles * known[3])


class Budget:
    """What was spent, in USD, and what requests in flight may still cost; shared by the threads.

    prices: USD per million tokens, in and out.
    """

    def __init__(self, prices: tuple[float, float], max_cost: float, spent: float = 0.0):
        self.prices, self.max_cost, self.spent = prices, max_cost, spent
        self.reserved, self.tokens, self.largest = 0.0, 0, 0
        self.lock = threading.Lock()

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6

    def reserve(self, tokens_in: int, tokens_out: int) -> float:
        """Sets aside the most that a request can cost. Raises Stop if max_cost could be passed."""
        with self.lock:
            bound = self.cost(max(tokens_in, self.largest), tokens_out)
            if self.spent + self.reserved + bound > self.max_cost:
                raise Stop(f"${self.spent:.4f} are spent, those in flight can cost "
                           f"${self.reserved:.4f}, and one more request could pass --max-cost "
                           f"{self.max_cost:g}: raise it to go on")
            self.reserved += bound
            return bound

    def settle(self, bound: float, usage: object, billed: bool = True) -> dict:
        """Puts what the server reports in place of a reservation; `bound` if it reports nothing."""
        counts = [usage.get(key) if isinstance(usage, dict) else None
                  for key in ("prompt_tokens", "completion_tokens")]
        reported = all(type(count) is int and 0 <= count <= MAX_TOKENS for count in counts)
        tokens_in, tokens_out = counts if reported else (0, 0)
        cost = self.cost(tokens_in, tokens_out) if reported else bound * billed
        with self.lock:
            self.reserved -= bound
            self.spent += cost
            self.tokens += tokens_in + tokens_out
            self.largest = max(self.largest, tokens_in)
        return {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "cost": cost}


def post(teacher: Teacher, body: dict) -> dict:
    """One chat completion. Raises Transient if another try may help, else Filtered or Stop."""
    url, sent = urlsplit(teacher.base_url), False
    limit = min(MAX_TIMEOUTS * teacher.timeout, threading.TIMEOUT_MAX)
    secure = url.scheme == "https"
    connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    server = connect(url.netloc, timeout=teacher.timeout)
    headers = {"Content-Type": "application/json"}
    if teacher.key:
        headers["Authorization"] = f"Bearer {teacher.key}"
    until = time.monotonic() + limit
    try:
        server.connect()
        with cut_after(server.sock, limit):
            server.request("POST", f"{url.path}/chat/completions", json.dumps(body), headers)
            sent = True
            with server.getresponse() as response:  # closed: it holds the connection
                text = without_key(read_reply(response).decode(errors="replace"), teacher)
    except (OSError, http.client.HTTPException) as error:
        late = f"no whole reply in {limit:g} s" if time.monotonic() >= until else repr(error)
        reason = without_key(f"{teacher.base_url}: {late}", teacher)
        raise Transient(reason, billed=sent) from None
    finally:
        server.close()
    if response.status != 200:
        raise refusal(response, teacher.base_url, text)
    try:
        return checked_reply(json.loads(text))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Transient(f"no chat completion in the reply: {error!r}", billed=True) from None


@contextlib.contextmanager
def cut_after(connection: socket.socket, seconds: float) -> Iterator[None]:
    """Shut a connection down, and so end what reads from it, if the block takes longer."""

    def cut() -> None:
        with contextlib.suppress(OSError):  # it is closed already
            socket.socket.shutdown(connection, socket.SHUT_RDWR)  # below TLS, which may be reading

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def read_reply(response: http.client.HTTPResponse) -> bytes:
    """The body of a response. Raises HTTPException if it is cut short or beyond MAX_REPLY."""
    body = response.read(MAX_REPLY + 1)
    if len(body) > MAX_REPLY:
        raise http.client.HTTPException(f"more than {MAX_REPLY} bytes")
    if response.length:  # that were announced and did not come
        raise http.client.IncompleteRead(body, response.length)
    return body


def printable(text: str) -> str:
    """A server's words on one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def without_key(text: str, teacher: Teacher) -> str:
    """What a server said, in which it may have quoted the key."""
    return text.replace(teacher.key, "(key)") if teacher.key else text


def refusal(response: http.client.HTTPResponse, url: str, said: str) -> Exception:
    """What a status other than 200 means: Transient for 408, 429 and 5xx, Filtered for 400 and 403
    of a content filter, else Refused."""
    reason = f"{url}: {response.status}: {printable(said[:500])}"
    # OpenAI also says 429 to an account without money; waiting does not help that.
    if response.status in (408, 429) or response.status >= 500:
        if "insufficient_quota" not in reason:
            return Transient(reason, retry_after=seconds(response.getheader("Retry-After")))
    if response.status in (400, 403) and FILTERED.search(said.lower()):
        return Filtered(reason)
    if response.status == 400 and "max_completion_tokens" in said:
        reason += "; a model that takes no max_tokens (OpenAI's o-series, gpt-5) cannot be the " \
                  "teacher yet; --teacher gpt-4o-mini can"
    return Refused(reason)


def seconds(retry_after: str | None) -> float:
    """The header Retry-After, a number or a date, as seconds from now; 0 if there is none."""
    try:
        wanted = float(retry_after or 0)
    except ValueError:
        date = email.utils.parsedate_tz(retry_after)
        wanted = email.utils.mktime_tz(date) - time.time() if date else 0.0
    return max(0.0, min(wanted, MAX_RETRY_AFTER))


def complete(
    teacher: Teacher, body: dict, budget: Budget, stop: threading.Event
) -> tuple[dict, dict]:
    """A chat completion and its usage, with retries. Raises the last Transient, Filtered, Stop."""
    pause = 0.0
    for retry in range(teacher.retries + 1):
        if stop.wait(pause):
            raise Stop
        bound = budget.reserve(input_tokens(teacher), teacher.max_tokens)
        try:
            reply = post(teacher, body)
            return reply, budget.settle(bound, reply.get("usage"))
        except Filtered:
            budget.settle(bound, None)  # Azure bills it, output too
            raise
        except Transient as error:
            budget.settle(bound, None, error.billed)
            failure = error
        backoff = min(MAX_BACKOFF, teacher.backoff * 2**retry) * random.uniform(0.5, 1.0)
        pause = max(backoff, failure.retry_after)
    raise failure


def write_requests(
    samples: Sequence[Sample], teacher: Teacher, out: Path, budget: Budget,
    max_requests: int = BATCH_REQUESTS, max_bytes: int = BATCH_BYTES,
) -> tuple[dict[str, str], str]:
    """Writes the request files of a batch beside `out`; returns as ask_all does.

    Raises InputError if some are there already: handing them in twice would cost twice.
    """
    old = sorted(out.parent.glob(f"{out.stem}.requests-*.jsonl"))
    if old:
        raise InputError(f"{old[0]} is there already: --collect its results if it was handed in, "
                         "then delete it")
    missing, ended, part, size, parts = {}, "", [], 0, []
    for sample in tqdm(samples, desc="requests", unit="img"):
        try:
            body = request_body(sample, teacher)
            budget.reserve(input_tokens(teacher), teacher.max_tokens)
        except InputError as error:
            missing[sample.file_name] = str(error)
            continue
        except Stop as error:
            ended = str(error)
            break
        line = json.dumps({"custom_id": sample.file_name, "method": "POST",
                           "url": "/v1/chat/completions", "body": body}) + "\n"
        if part and (len(part) == max_requests or size + len(line) > max_bytes):
            parts.append(write_part(out, len(parts) + 1, part))
            part, size = [], 0
        part.append(line)
        size += len(line)  # characters are bytes: the JSON is ASCII
    if part:
        parts.append(write_part(out, len(parts) + 1, part))
    print("request files:", *parts)
    return missing, ended


def write_part(out: Path, number: int, lines: list[str]) -> Path:
    """Writes one request file; renamed when whole, so that no half file can be handed in."""
    path = out.with_name(f"{out.stem}.requests-{number:03d}.jsonl")
    replace_file(path, "".join(lines))
    return path


def checked_reply(reply: dict) -> dict:
    """The reply, if it has the shape of a chat completion; otherwise what indexing raises."""
    reply["choices"][0]["message"].get("content")
    return reply


def batch_results(paths: Iterable[Path]) -> Iterator[tuple[str, str, dict | None, str]]:
    """The result lines of a batch: their place, custom_id, the reply, and what was said instead.

    The reply is None where the server answered with an error. Raises InputError naming the line
    that is no result.
    """
    for path in paths:
        for where, result in json_lines(path):
            if not isinstance(result, dict) or not isinstance(result.get("custom_id"), str):
                raise InputError(f"{where}: no result of a batch")
            try:
                reply = checked_reply(result["response"]["body"])
            except (LookupError, TypeError, AttributeError):
                reply = None
            yield where, result["custom_id"], reply, printable(json.dumps(result)[:300])
