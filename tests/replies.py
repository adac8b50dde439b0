"""A teacher's replies, and samples for its requests."""

import json

from PIL import Image

from engine.traces.openai_chat import Teacher
from hicodet import Sample

THINK = "There is one person. The person is riding a bicycle. Bicycle: ride, sit on."
USAGE = {"prompt_tokens": 1000, "completion_tokens": 100}


def reply(content, finish_reason="stop", **message):
    """A chat completion. message: more fields of its message."""
    choice = {"message": {"content": content, **message}, "finish_reason": finish_reason}
    return {"choices": [choice], "usage": USAGE}


def make_samples(folder, count):
    """Samples with small pictures that JPEG cannot make equal."""
    paths = [folder / f"image{number:03d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        Image.new("RGB", (40, 30), (number * 7 % 256, 3 * number % 256, 90)).save(path)
    return [Sample(path.name, path, 40, 30, (), (), frozenset()) for path in paths]


def make_teacher(**changes):
    fields = {"model": "gpt-4o-mini", "base_url": "http://127.0.0.1:9/v1", "key": "", "prompt": "p",
              "more_fields": {"max_tokens": 512}, "max_side": 512, "timeout": 1.0, "retries": 0,
              "backoff": 0.0, "prices": (0.15, 0.6)}
    return Teacher(**fields | changes)


def write(path, *traces):
    path.write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    return path
