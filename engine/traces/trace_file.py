"""traces.jsonl: reading it, and appending to it."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from engine.checks import at, expect, value_of
from engine.files import json_lines, lock, naming
from hicodet import InputError, Sample

MAX_UNTRACED = 0.05  # share of images without a trace that SFT leaves out without --untraced
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<|")  # "<|" opens Qwen's special tokens


def read_trace_lines(path: str | Path) -> Iterator[dict]:
    """The lines of traces.jsonl. Raises InputError naming file and line of a malformed one."""
    names: set[str] = set()
    for where, trace in json_lines(path):
        with at(where):
            name, think = value_of(trace, "file_name", str), value_of(trace, "think", str)
            text = think.strip() and not any(tag in think for tag in TAGS)
            expect(text, "'think'", "the text between <think> tags, without any tag", think)
            expect(name not in names, "'file_name'", "on one line only", name)
        names.add(name)
        yield trace


def read_traces(path: str | Path) -> dict[str, str]:
    """{file_name: think} in the file's order. Raises InputError for a malformed or cut line."""
    return {trace["file_name"]: trace["think"] for trace in read_trace_lines(path)}


def traces_of(path: str, data: str, samples: list[Sample]) -> dict[str, str]:
    """The traces of --traces by file name.

    Raises InputError if the file is missing, or if none of its images is in --data.
    """
    if not path:
        raise InputError("--traces: give the file of teacher.py, or --no-thinking")
    if not Path(path).is_file():
        raise InputError(f"--traces {path}: no such file; teacher.py writes it")
    thinks = read_traces(path)
    if not any(sample.file_name in thinks for sample in samples):
        raise InputError(f"--traces {path}: none of its {len(thinks)} images is in --data {data}")
    return thinks


def untraced_line(missing: int, total: int, untraced: str | None) -> str:
    """SFT's line on images without a trace. Raises InputError if there are many and no choice."""
    if missing > MAX_UNTRACED * total and untraced is None:
        raise InputError(
            f"{missing} of {total} annotated images have no trace: run teacher.py again, or choose "
            "--untraced skip (leave them out) or --untraced answer (train on their answers alone)"
        )
    if not missing:
        return f"all {total} annotated images have a trace"
    fate = "trained on their answer alone" if untraced == "answer" else "left out"
    return f"{missing} of {total} annotated images have no trace: {fate}"


class TraceFile(AbstractContextManager):
    """traces.jsonl, open for appending by one process at a time; use it in a with statement.

    A kill -9 or a full disk can cut only the last line; opening removes such a line. The lock ends
    with the process. Raises InputError if another process has the file open, or for a malformed
    line.
    """

    def __init__(self, path: Path):
        self.file = open(path, "ab+", buffering=0)
        lock(self.file)
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)
        traces = list(read_trace_lines(path))
        self.names = {trace["file_name"] for trace in traces}
        usages = [trace.get("usage") or {} for trace in traces]
        self.cost = sum(usage.get("cost") or 0.0 for usage in usages)  # USD

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def append(self, name: str, think: str, teacher: str, attempts: int, usage: dict) -> None:
        """Append the trace of an image. Raises OSError if the disk is full."""
        line = {"file_name": name, "think": think, "teacher": teacher, "attempts": attempts}
        rest = json.dumps(line | {"usage": usage}).encode() + b"\n"
        with naming(self.file.name):
            while rest:  # a write may be partial
                rest = rest[self.file.write(rest) :]
        self.names.add(name)
