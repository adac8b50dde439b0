"""traces.jsonl: written line by line, and read."""

import json
from collections.abc import Iterator
from pathlib import Path

from engine.files import json_lines, lock, naming
from hicodet import InputError, Sample

MAX_COST = 1e6  # USD of a trace
MAX_UNTRACED = 0.05  # share of images without a trace that SFT leaves out unasked
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<|")  # "<|" opens Qwen's special tokens


def read_trace_lines(path: str | Path) -> Iterator[dict]:
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
        yield trace


def cost_of(trace: dict) -> float:
    """What a trace cost in USD; 0.0 if its line does not say, or says what cannot be."""
    usage = trace.get("usage")
    cost = usage.get("cost") if isinstance(usage, dict) else None
    return cost if isinstance(cost, (int, float)) and 0 <= cost <= MAX_COST else 0.0


def read_traces(path: str | Path) -> dict[str, str]:
    """The traces of a file, {file_name: think}, in the file's order.

    Raises InputError naming file and line for a malformed line or an image that comes twice; so
    does a last line cut by a kill -9, until teacher.py resumes the file and drops that line.
    """
    return {trace["file_name"]: trace["think"] for trace in read_trace_lines(path)}


def traces_of(path: str, data: str, samples: list[Sample]) -> dict[str, str]:
    """The teacher's traces by file name, from the file of --traces.

    Raises InputError if there is no such file, or if none of its traces is of an image of --data.
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
    """What SFT says of images without a trace. Raises InputError for many if none chose."""
    if missing > MAX_UNTRACED * total and untraced is None:
        raise InputError(
            f"{missing} of {total} annotated images have no trace: run teacher.py again, or choose "
            "--untraced skip (leave them out) or --untraced answer (train on their answers alone)"
        )
    if not missing:
        return f"all {total} annotated images have a trace"
    fate = "trained on their answer alone" if untraced == "answer" else "left out"
    return f"{missing} of {total} annotated images have no trace: {fate}"


class TraceFile:
    """traces.jsonl, open for appending by one process at a time; use it in a with statement.

    A line reaches the file in one write, so kill -9 can cut only the last one; opening drops it.
    The lock goes with the process, however it ends. Raises InputError if another process has the
    file open, or for a malformed line.
    """

    def __init__(self, path: Path):
        self.file = open(path, "ab+", buffering=0)
        lock(self.file)
        self._fix_last_line()
        self.names, self.cost = set(), 0.0
        for trace in read_trace_lines(path):
            self.names.add(trace["file_name"])
            self.cost += cost_of(trace)

    def __enter__(self) -> "TraceFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def _fix_last_line(self) -> None:
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
