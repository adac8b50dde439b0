"""teacher.py without a server: template traces, traces.jsonl, cost, batch files."""

import json
import random
from pathlib import Path

import pytest

import hicodet
import teacher
from engine.traces.acceptance import trace_fault
from engine.traces.openai_chat import estimated_tokens, known_prices, request_body, write_requests
from engine.traces.template import count_people, gerund, template_trace
from engine.traces.trace_file import TAGS, TraceFile, read_traces
from hicodet import HOI, Sample
from tests.replies import THINK, USAGE, make_samples, make_teacher, reply, write

MAN, BIKE, CAR = (10, 10, 30, 60), (5, 40, 45, 70), (50, 0, 90, 30)
WOMAN = (60, 10, 80, 60)


def test_one_pair_answers_the_four_questions_in_order():
    trace = template_trace([HOI(MAN, BIKE, "bicycle", ("ride", "sit on"))])
    assert trace == ("There is 1 person. The person is riding and sitting on the bicycle. The "
                     "object class is bicycle. The verb classes are, for bicycle: ride, sit on.")


def test_people_are_counted_by_overlap_and_verbs_joined_by_class():
    moved = (11, 10, 31, 61)  # overlaps MAN by 19 * 50 of 20 * 50 + 20 * 51 - 950: 0.89
    hois = [HOI(MAN, BIKE, "bicycle", ("ride",)), HOI(moved, CAR, "car", ("no interaction",)),
            HOI(WOMAN, BIKE, "bicycle", ("hold", "ride"))]
    assert template_trace(hois) == (
        "There are 2 people. They are riding and holding the bicycle and not interacting with the "
        "car. The object classes are bicycle and car. The verb classes are, for bicycle: ride, "
        "hold; for car: no interaction.")
    assert count_people([HOI(MAN, WOMAN, "person", ("hug",))]) == 2


def test_people_at_iou_one_half_are_two():
    # 20 x 50 inside 20 x 100 is exactly 0.5, which is not more than 0.5.
    tall = HOI((0, 0, 20, 100), BIKE, "bicycle", ("ride",))
    for height, people in ((50, 2), (51, 1)):
        other = HOI((0, 0, 20, height), BIKE, "bicycle", ("hold",))
        assert count_people([tall, other]) == people


def test_every_pair_makes_a_trace_that_would_be_accepted():
    for verb, name in hicodet.HOI_CLASSES:
        trace = template_trace([HOI(MAN, CAR, name, (verb,))])
        assert not any(tag in trace for tag in TAGS)
        assert 18 <= len(trace.split()) <= 40
        assert trace_fault(trace) == "", trace


def test_crowd_does_not_make_a_long_trace():
    hois = [HOI((40 * i, 0, 40 * i + 30, 60), CAR, "boat", ("row", "sit on")) for i in range(80)]
    trace = template_trace(hois)
    assert trace.startswith("There are 80 people. They are rowing and sitting on the boat.")
    assert len(trace.split()) < 40


def test_gerunds():
    for verb, expected in {"ride": "riding", "hop on": "hopping on", "lie on": "lying on",
                           "tie": "tying", "open": "opening", "exit": "exiting", "stir": "stirring",
                           "row": "rowing", "control": "controlling", "inspect": "inspecting",
                           "no interaction": "not interacting with"}.items():
        assert gerund(verb) == expected


def test_read_traces_keeps_the_order_and_ignores_other_keys(tmp_path):
    path = write(tmp_path / "t.jsonl", {"file_name": "b.jpg", "think": "B\n\u2028", "teacher": "x"},
                 {"file_name": "a.jpg", "think": "A"})
    assert list(read_traces(path).items()) == [("b.jpg", "B\n\u2028"), ("a.jpg", "A")]
    path.write_text(path.read_text().rstrip("\n"))  # an editor may leave out the last newline
    assert list(read_traces(path)) == ["b.jpg", "a.jpg"]


@pytest.mark.parametrize("line, said", [
    ("", "not JSON"), ("{", "not JSON"), ("[" * 100_000, "not JSON"),
    ("[]", '"file_name"'), ('{"think": "x"}', '"file_name"'), ('{"file_name": "b"}', '"think"'),
    ('{"file_name": "b", "think": " "}', '"think"'), ('{"file_name": "b", "think": 3}', "3"),
    ('{"file_name": "b", "think": "x </think>"}', "tag"),
    ('{"file_name": "b", "think": "x <|im_end|>"}', "'<|'"),
    ('{"file_name": "b", "think": "<|image_pad|> x"}', "'<|'"),
    ('{"file_name": "a", "think": "x"}', "comes twice"),
])
def test_malformed_lines_are_named(line, said, tmp_path):
    path = write(tmp_path / "t.jsonl", {"file_name": "a", "think": "A"})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="line 2") as error:
        read_traces(path)
    assert str(path) in str(error.value) and said in str(error.value)


def test_line_cut_anywhere_is_an_error_to_read_and_dropped_on_resume(tmp_path):
    path = write(tmp_path / "t.jsonl", {"file_name": "a", "think": "A", "usage": {"cost": 0.25}},
                 {"file_name": "b", "think": "B {} \u00e4", "usage": {"cost": 0.5}})
    text = path.read_bytes()
    first = text.index(b"\n") + 1
    for end in range(first + 1, len(text) - 1):
        path.write_bytes(text[:end])
        with pytest.raises(ValueError, match="line 2.*cut off"):
            read_traces(path)
        file = TraceFile(path)
        assert file.names == {"a"} and file.cost == 0.25
        file.file.close()
        assert path.read_bytes() == text[:first]
    path.write_bytes(text[:first] + b"[" * 100_000)  # too deep to be read
    with TraceFile(path) as file:
        assert file.names == {"a"}
    path.write_bytes(text[:-1])  # whole but for the newline
    file = TraceFile(path)
    assert file.names == {"a", "b"} and file.cost == 0.75 and path.read_bytes() == text


def test_second_writer_is_refused(tmp_path):
    path, (sample,) = tmp_path / "t.jsonl", make_samples(tmp_path, 1)
    first = TraceFile(path)
    with pytest.raises(ValueError, match="being written by another"):
        TraceFile(path)
    first.append(sample, "A \ud800", "template", 1, {})  # half a surrogate pair too
    assert read_traces(path) == {sample.file_name: "A \ud800"}
    first.file.close()
    assert TraceFile(path).names == {sample.file_name}


def test_full_disk_is_an_error():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    file = object.__new__(TraceFile)
    file.file, file.names = open("/dev/full", "ab", buffering=0), set()
    sample = Sample("a", Path("a"), 1, 1, (), (), frozenset())
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        file.append(sample, "A", "template", 1, {})
    assert not file.names


@pytest.mark.parametrize("usage", [
    *('{"cost": NaN}', '{"cost": -1}', '{"cost": 1%s}' % ("0" * 400), '{"cost": "9"}', "[]"),
    *('{"cost": null}', '{"cost": Infinity}', "null"),
])
def test_cost_that_cannot_be_counts_as_nothing(usage, tmp_path):
    """NaN would end the watch over --max-cost."""
    path = write(tmp_path / "t.jsonl", {"file_name": "a", "think": "A", "usage": {"cost": 0.5}})
    path.write_text(path.read_text() + f'{{"file_name": "b", "think": "B", "usage": {usage}}}\n')
    with TraceFile(path) as file:
        assert file.cost == 0.5


@pytest.mark.parametrize("changes, image", [
    ({}, 2833), ({"model": "gpt-4o"}, 85), ({"model": "Qwen"}, 19 * 19),  # 512 / 28 is 18.3
    # High detail has 2 x 2 tiles at 768 pixels, and at 1024, whose shorter side becomes 768.
    ({"max_side": 768}, 9 * 2833), ({"max_side": 1024}, 9 * 2833),
    ({"max_side": 768, "model": "gpt-4o"}, 85 + 4 * 170),
])
def test_estimated_tokens(changes, image):
    # Text: 6 // 3 + 20 = 22.
    assert estimated_tokens(make_teacher(prompt="prompt", **changes)) == (22 + image, 150)


@pytest.mark.parametrize("model, prices", [
    ("gpt-4o", (2.5, 10)), ("gpt-4o-2024-08-06", (2.5, 10)), ("gpt-4o-2024-05-13", (5, 15)),
    ("gpt-4o-mini-2024-07-18", (0.15, 0.6)), ("gpt-4o-min", ()), ("gpt-4o-0513", ()),
])
def test_dated_model_has_its_own_price_or_that_of_its_name(model, prices):
    assert (known_prices(model) or ())[:2] == prices


def result(name, content=f"<think>{THINK}</think>"):
    return json.dumps({"id": "r", "custom_id": name, "error": None, "response": {
        "status_code": 200, "body": reply(content)}}) + "\n"


def test_request_files_keep_the_limit_and_have_every_image_once(tmp_path):
    samples, out = make_samples(tmp_path, 17), tmp_path / "traces.jsonl"
    samples[2].path.write_bytes(samples[2].path.read_bytes()[:300])  # cut: left out and listed
    most = 3 * (len(json.dumps(request_body(samples[0], make_teacher()))) + 150)
    missing = write_requests(samples, make_teacher(), out, max_bytes=most)
    assert list(missing) == [samples[2].file_name] and str(samples[2].path) in str(missing)
    files = sorted(tmp_path.glob("traces.requests-*.jsonl"))
    assert len(files) >= 4 and not list(tmp_path.glob("*.tmp"))
    names = []
    for path in files:
        requests = [json.loads(line) for line in path.read_text().splitlines()]
        assert path.stat().st_size <= most
        assert all(r["method"] == "POST" and r["url"] == "/v1/chat/completions" for r in requests)
        names += [r["custom_id"] for r in requests]
    assert names == [sample.file_name for sample in samples if sample != samples[2]]
    assert requests[-1]["body"] == request_body(samples[-1], make_teacher())
    with pytest.raises(ValueError, match="requests-001.jsonl is there already"):
        write_requests(samples, make_teacher(), out)


def test_results_are_collected_in_any_order(tmp_path):
    samples = make_samples(tmp_path, 30)
    wanted = {sample.file_name: sample for sample in samples}
    results = [result(name) for name in wanted]
    results[3] = result(samples[3].file_name, "no")
    results[4] = json.dumps({"custom_id": samples[4].file_name, "response": None,
                             "error": {"code": "expired", "message": "too late"}}) + "\n"
    results += [results[7], result(samples[8].file_name, "no")]  # twice; rejected, then accepted
    random.shuffle(results)
    paths = [tmp_path / "one", tmp_path / "two"]
    for path, part in zip(paths, (results[:11], results[11:])):
        path.write_text("".join(part))
    random.shuffle(paths)
    out, half = tmp_path / "t.jsonl", make_teacher(prices=(0.075, 0.3))
    file = TraceFile(out)
    missing = teacher.collect_batch(paths, wanted, half, file)
    assert missing.keys() == {samples[3].file_name, samples[4].file_name}
    assert "too late" in missing[samples[4].file_name]
    traces = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(traces) == 28 and {t["file_name"] for t in traces} == wanted.keys() - missing.keys()
    # 1000 * 0.075 + 100 * 0.3 = 105 millionths of a dollar each
    assert traces[0]["usage"] == USAGE | {"cost": pytest.approx(105e-6)}
    assert teacher.collect_batch(paths, wanted, half, file) == missing
    assert len(out.read_text().splitlines()) == 28


@pytest.mark.parametrize("line", ["{", "[]", "{}", result("other.jpg")])
def test_results_of_something_else_are_refused(line, tmp_path):
    (sample,) = make_samples(tmp_path, 1)
    (tmp_path / "r").write_text(result(sample.file_name) + line)
    file = TraceFile(tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match="r, line 2: (no result|not JSON|.*is no training image)"):
        teacher.collect_batch([tmp_path / "r"], {sample.file_name: sample}, make_teacher(), file)
