"""Images in a row without an acceptable trace: when they end a run of teacher.py."""

import pytest

import engine.traces.trace_file
import teacher
from engine.traces.openai_chat import Budget
from hicodet import Sample
from tests.replies import make_samples, make_teacher


def outcomes_of(fates, folder, monkeypatch, concurrency):
    """What `ask_all` returns if the images' outcomes are those that these functions make."""
    names = {f"{number}.jpg": fate for number, fate in enumerate(fates)}
    samples = [Sample(name, folder, 1, 1, (), (), frozenset()) for name in names]
    monkeypatch.setattr(teacher, "ask", lambda sample, *_: names[sample.file_name]())
    with engine.traces.trace_file.TraceFile(folder / "t.jsonl") as file:
        return teacher.ask_all(samples, make_teacher(), file, Budget((0, 0), 1), 1, concurrency)


def good():
    return teacher.Outcome("A man rides a horse.", attempts=1)


def refused():
    return teacher.Outcome(reason="is a refusal", attempts=1)


def broken():
    return teacher.Outcome(reason="not a readable image")


def test_one_refusal_in_ten_never_ends_a_run_however_late_the_others_are(tmp_path, monkeypatch):
    """All 40 refusals are there before the first trace is."""
    monkeypatch.setattr(
        teacher, "as_completed", lambda jobs: sorted(jobs, key=lambda job: bool(job.result().think))
    )
    missing, ended = outcomes_of(([good] * 9 + [refused]) * 40, tmp_path, monkeypatch, 8)
    assert (len(missing), ended) == (40, "")


@pytest.mark.parametrize("fates, ends", [
    ([broken] * 40, False), ([refused] * 29 + [good] + [refused] * 29, False),
    ([refused] * 29 + [broken] * 3, False), ([refused, broken] * 30, True),
])
def test_a_broken_image_neither_counts_nor_breaks_the_row(fates, ends, tmp_path, monkeypatch):
    _, ended = outcomes_of(fates, tmp_path, monkeypatch, 1)
    assert ended.startswith("30 images in a row") == ends


def test_a_rerun_gets_past_many_images_that_are_always_refused(tmp_path, monkeypatch):
    samples, out = make_samples(tmp_path, 150), tmp_path / "t.jsonl"
    always = {sample.file_name for sample in samples[:35]}
    monkeypatch.setattr(
        teacher, "ask", lambda sample, *_: refused() if sample.file_name in always else good())
    args = teacher.TeacherConfig(data=tmp_path, out=out, base_url="http://127.0.0.1:9/v1")
    with engine.traces.trace_file.TraceFile(out) as file:
        missing, ended = teacher.make_traces(args, {}, samples, file)
    assert (missing.keys(), ended) == (always, "")
