"""teacher.py without a server: template traces, traces.jsonl, prices, batch files."""

import json
import random

import pytest

import hicodet
import teacher
from engine.traces.acceptance import trace_fault
from engine.traces.openai_chat import estimated_tokens, known_prices, request_body, write_requests
from engine.traces.template import count_people, template_trace
from engine.traces.trace_file import TraceFile, read_traces
from hicodet import HOI
from tests.replies import THINK, USAGE, make_samples, make_teacher, reply, write
from tests.test_disk_full import no_file_above

MAN, BIKE, CAR = (10, 10, 30, 60), (5, 40, 45, 70), (50, 0, 90, 30)
WOMAN = (60, 10, 80, 60)

# ---- template traces


def test_template_answers_the_four_questions_in_order():
    trace = template_trace([HOI(MAN, BIKE, "bicycle", ("ride", "sit on"))])
    assert trace == ("There is 1 person. The person is riding and sitting on the bicycle. The "
                     "object class is bicycle. The verb classes are, for bicycle: ride, sit on.")
    moved = (11, 10, 31, 61)  # overlaps MAN by 19 * 50 of 20 * 50 + 20 * 51 - 950: 0.89
    hois = [HOI(MAN, BIKE, "bicycle", ("ride",)), HOI(moved, CAR, "car", ("no interaction",)),
            HOI(WOMAN, BIKE, "bicycle", ("hold", "ride"))]
    assert template_trace(hois) == (
        "There are 2 people. They are riding and holding the bicycle and not interacting with the "
        "car. The object classes are bicycle and car. The verb classes are, for bicycle: ride, "
        "hold; for car: no interaction.")


def test_people_at_iou_one_half_are_two():
    assert count_people([HOI(MAN, WOMAN, "person", ("hug",))]) == 2
    # 20 x 50 inside 20 x 100 is exactly 0.5, which is not more than 0.5.
    tall = HOI((0, 0, 20, 100), BIKE, "bicycle", ("ride",))
    for height, people in ((50, 2), (51, 1)):
        other = HOI((0, 0, 20, height), BIKE, "bicycle", ("hold",))
        assert count_people([tall, other]) == people


def test_template_traces_are_accepted():
    for verb, name in hicodet.HOI_CLASSES:
        trace = template_trace([HOI(MAN, CAR, name, (verb,))])
        assert 18 <= len(trace.split()) <= 40 and trace_fault(trace) == "", trace
    hois = [HOI((40 * i, 0, 40 * i + 30, 60), CAR, "boat", ("row", "sit on")) for i in range(80)]
    trace = template_trace(hois)
    assert trace.startswith("There are 80 people. They are rowing and sitting on the boat.")
    assert len(trace.split()) < 40


# ---- traces.jsonl


def test_read_traces_keeps_the_order_and_ignores_other_keys(tmp_path):
    path = write(tmp_path / "t.jsonl", {"file_name": "b.jpg", "think": "B\n\u2028", "teacher": "x"},
                 {"file_name": "a.jpg", "think": "A"})
    assert list(read_traces(path).items()) == [("b.jpg", "B\n\u2028"), ("a.jpg", "A")]
    path.write_text(path.read_text().rstrip("\n"))  # some editors drop the last line break
    assert list(read_traces(path)) == ["b.jpg", "a.jpg"]


@pytest.mark.parametrize("line, said", [
    ("", "not JSON"), ("[" * 100_000, "not JSON"),
    ('{"think": "x"}', "'file_name' of the line must be a text"),
    ('{"file_name": "b", "think": "x <|im_end|>"}', "without any tag"),
    ('{"file_name": "a", "think": "x"}', "on one line only; found 'a'"),
])
def test_malformed_line_is_named(line, said, tmp_path):
    path = write(tmp_path / "t.jsonl", {"file_name": "a", "think": "A"})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="line 2") as error:
        read_traces(path)
    assert str(path) in str(error.value) and said in str(error.value)


def test_cut_last_line_is_an_error_to_read_and_dropped_on_resume(tmp_path):
    path = write(tmp_path / "t.jsonl", {"file_name": "a", "think": "A", "usage": {"cost": 0.25}},
                 {"file_name": "b", "think": "B {} \u00e4", "usage": {"cost": 0.5}})
    text = path.read_bytes()
    first = text.index(b"\n") + 1
    for end in range(first + 1, len(text) - 1):
        path.write_bytes(text[:end])
        with pytest.raises(ValueError, match="line 2.*cut off"):
            read_traces(path)
        with TraceFile(path) as file:
            assert file.names == {"a"} and file.cost == 0.25
        assert path.read_bytes() == text[:first]


def test_second_writer_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    with TraceFile(path) as first:
        with pytest.raises(ValueError, match="being written by another"):
            TraceFile(path)
        first.append("a", "A \ud800", "template", 1, {})  # half a surrogate pair
        assert read_traces(path) == {"a": "A \ud800"}
    with TraceFile(path) as second:
        assert second.names == {"a"}


def test_trace_that_does_not_fit_on_the_disk_is_dropped(tmp_path):
    path = tmp_path / "t.jsonl"
    with TraceFile(path) as file, no_file_above(150):
        file.append("a", "A", "template", 1, {})
        with pytest.raises(OSError, match=f"File too large: '{path}'"):
            file.append("b", "B" * 150, "template", 1, {})
        assert file.names == {"a"}
    with TraceFile(path) as file:
        assert file.names == {"a"}


# ---- prices


@pytest.mark.parametrize("model, image, prices", [
    ("gpt-4o-mini-2024-07-18", 2833, (0.15, 0.6)), ("gpt-4o-2024-05-13", 85, (5, 15)),
    ("Qwen", 19 * 19, ()),  # 512 / 28 is 18.3
])
def test_price_of_a_dated_model(model, image, prices):
    """Its own, or that of its name without the date."""
    assert (known_prices(model) or ())[:2] == prices
    # Text: 6 // 3 + 20 = 22.
    assert estimated_tokens(make_teacher(prompt="prompt", model=model)) == (22 + image, 150)


# ---- batch files


def result(name, content=f"<think>{THINK}</think>"):
    return json.dumps({"id": "r", "custom_id": name, "error": None, "response": {
        "status_code": 200, "body": reply(content)}}) + "\n"


def test_request_files_have_each_image_once(tmp_path):
    samples, out = make_samples(tmp_path, 17), tmp_path / "traces.jsonl"
    samples[2].path.write_bytes(samples[2].path.read_bytes()[:300])  # a cut image is listed
    missing = write_requests(samples, make_teacher(), out, size=5)
    assert list(missing) == [samples[2].file_name] and str(samples[2].path) in str(missing)
    files = sorted(tmp_path.glob("traces.requests-*.jsonl"))
    requests = [[json.loads(line) for line in path.read_text().splitlines()] for path in files]
    assert [len(part) for part in requests] == [4, 5, 5, 2] and not list(tmp_path.glob("*.tmp"))
    for request, sample in zip(sum(requests, []), samples[:2] + samples[3:], strict=True):
        assert (request["method"], request["url"]) == ("POST", "/v1/chat/completions")
        assert request["custom_id"] == sample.file_name
        assert request["body"] == request_body(sample, make_teacher())


def test_results_are_collected_in_any_order(tmp_path):
    names = [f"{number}.jpg" for number in range(30)]
    results = [result(name) for name in names] + [result("other.jpg")]
    results[3] = result(names[3], "no")
    results[4] = json.dumps({"custom_id": names[4], "response": None,
                             "error": {"code": "expired", "message": "too late \x1b"}}) + "\n"
    results[5] = json.dumps({"custom_id": names[5], "response": ["odd"]}) + "\n"
    results += [results[7], result(names[8], "no")]  # 7 twice; 8 rejected and accepted
    random.shuffle(results)
    paths = [tmp_path / "one", tmp_path / "two"]
    for path, part in zip(paths, (results[:11], results[11:])):
        path.write_text("".join(part))
    out, half = tmp_path / "t.jsonl", make_teacher(prices=(0.075, 0.3))
    with TraceFile(out) as file:
        missing = teacher.collect_batch(paths, set(names), half, file)
        assert missing.keys() == {names[3], names[4], names[5]}
        assert "too late" in missing[names[4]] and missing[names[4]].isprintable()
        traces = [json.loads(line) for line in out.read_text().splitlines()]
        assert len(traces) == 27 and {t["file_name"] for t in traces} == {*names} - missing.keys()
        # 1000 * 0.075 + 100 * 0.3 = 105 millionths of a dollar each
        assert traces[0]["usage"] == USAGE | {"cost": pytest.approx(105e-6)}
        assert teacher.collect_batch(paths, set(names), half, file) == missing
    assert len(out.read_text().splitlines()) == 27
