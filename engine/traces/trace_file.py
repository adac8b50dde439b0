"""Traces: traces.jsonl, written line by line and read, and sentences from the ground truth."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from engine.files import json_lines, lock, naming
from hicodet import HOI, Box, InputError, Sample, iou

MAX_COST = 1e6  # USD of a trace: what stands for more is no cost
SAME_PERSON_IOU = 0.5  # as in merging: one person is annotated anew for every verb
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<|")  # "<|" opens Qwen's special tokens


def read_lines(path: str | Path) -> Iterator[dict]:
    """The lines of a traces.jsonl. Raises InputError naming file and line for what is no trace."""
    names: set[str] = set()
    for where, trace in json_lines(path):
        for key in ("file_name", "think"):
            value = trace.get(key) if isinstance(trace, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise InputError(f'{where}: "{key}" must be a text, not {value!r}')
        if held := [tag for tag in TAGS if tag in trace["think"]]:
            raise InputError(f'{where}: "think" holds {held[0]!r}; it is the text between tags')
        if trace["file_name"] in names:
            raise InputError(f"{where}: {trace['file_name']} comes twice; delete one line")
        names.add(trace["file_name"])
        if not 0 <= cost_of(trace) <= MAX_COST:
            raise InputError(f'{where}: "cost" must be a number of USD')
        yield trace


def cost_of(trace: dict) -> float:
    """What a trace cost in USD, 0.0 where that is not said; NaN for what is no number."""
    usage = trace.get("usage")
    cost = usage.get("cost", 0.0) if isinstance(usage, dict) else 0.0
    return cost if type(cost) in (int, float) else math.nan


def read_traces(path: str | Path) -> dict[str, str]:
    """The traces of a file, {file_name: think}, in the file's order.

    Raises InputError naming file and line for a malformed line or an image that comes twice; so
    does a last line cut by a kill -9, until teacher.py resumes the file and drops that line.
    """
    return {trace["file_name"]: trace["think"] for trace in read_lines(path)}


class TraceFile:
    """traces.jsonl, open for appending by one process at a time; use it in a with statement.

    A line reaches the file in one write, so kill -9 can cut only the last one; opening drops it.
    The lock goes with the process, however it ends. Raises InputError if another process has the
    file open, or for a malformed line.
    """

    def __init__(self, path: Path):
        self.file = open(path, "ab+", buffering=0)
        lock(self.file)
        self._mend_last_line()
        self.names, self.cost = set(), 0.0
        for trace in read_lines(path):
            self.names.add(trace["file_name"])
            self.cost += cost_of(trace)

    def __enter__(self) -> "TraceFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def _mend_last_line(self) -> None:
        self.file.seek(0)
        text = self.file.read()
        last = text[text.rfind(b"\n") + 1 :]
        try:
            if last:
                json.loads(last)
                self.file.write(b"\n")  # whole, and written by hand
        except (ValueError, RecursionError):
            self.file.truncate(len(text) - len(last))

    def append(self, sample: Sample, think: str, teacher: str, attempts: int, usage: dict) -> None:
        """Writes the trace of an image. Raises OSError if the disk is full."""
        line = json.dumps({"file_name": sample.file_name, "think": think, "teacher": teacher,
                           "attempts": attempts, "usage": usage}).encode() + b"\n"
        with naming(self.file.name):
            written = self.file.write(line)
        if written != len(line):
            raise OSError(f"{self.file.name}: the disk is full; make room and run this again")
        self.names.add(sample.file_name)


def gerund(verb: str) -> str:
    """The -ing form of one of the 117 verbs: "hop on" -> "hopping on"."""
    head, _, rest = verb.partition(" ")
    if head == "no":
        return "not interacting with"
    if head.endswith("ie"):
        head = head[:-2] + "y"
    elif head.endswith("e"):
        head = head[:-1]
    elif head[-1] not in "aeiouwxy" and head[-2] in "aeiou" and head[-3:-2] not in "aeiou":
        # One vowel between consonants doubles the last: hop -> hopping, but lift -> lifting.
        head = head if head in ("open", "exit") else head + head[-1]
    return f"{head}ing {rest}".rstrip()


def join_words(words: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def count_people(hois: Iterable[HOI]) -> int:
    """Distinct people, annotated as humans or as objects; boxes with IoU > 0.5 are one person."""
    people: list[Box] = []
    for hoi in hois:
        for box in (hoi.human, hoi.object) if hoi.object_class == "person" else (hoi.human,):
            if all(iou(box, seen) <= SAME_PERSON_IOU for seen in people):
                people.append(box)
    return len(people)


def template_trace(hois: Sequence[HOI]) -> str:
    """A trace written from the ground truth: one sentence for each question of Fig. 4.

    hois: the merged instances of one image, boxes in any frame. Returns the text that goes inside
    <think>, without tags; object classes and verbs come in their order of first appearance, each
    verb once a class, so the text grows with what there is to say and not with the instances.
    """
    if not hois:
        return "There is no person who interacts with an object."
    verbs_of: dict[str, list[str]] = {}
    for hoi in hois:
        known = verbs_of.setdefault(hoi.object_class, [])
        known += [verb for verb in dict.fromkeys(hoi.verbs) if verb not in known]
    number = count_people(hois)
    who = ("There is 1 person. The person is" if number == 1
           else f"There are {number} people. They are")
    doing = [f"{join_words([gerund(verb) for verb in verbs])} the {name}"
             for name, verbs in verbs_of.items()]
    plural = "es are" if len(verbs_of) > 1 else " is"
    pairs = [f"for {name}: {', '.join(verbs)}" for name, verbs in verbs_of.items()]
    return (f"{who} {join_words(doing)}. The object class{plural} {join_words(list(verbs_of))}. "
            f"The verb classes are, {'; '.join(pairs)}.")
