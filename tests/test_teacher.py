"""teacher.py without a server: template traces, traces.jsonl, cost, batch files."""

import json
import math
import random
from pathlib import Path

import pytest

import engine.traces.openai_chat
import engine.traces.template
import engine.traces.trace_file
import hicodet
import teacher
from engine.traces.acceptance import trace_fault
from engine.traces.openai_chat import MAX_RETRY_AFTER
from hicodet import HOI, Sample
from tests.replies import THINK, USAGE, make_samples, make_teacher, reply, write

MAN, BIKE, CAR = (10, 10, 30, 60), (5, 40, 45, 70), (50, 0, 90, 30)
WOMAN = (60, 10, 80, 60)


# ---- template


def test_one_pair_answers_the_four_questions_in_order():
    trace = engine.traces.template.template_trace([HOI(MAN, BIKE, "bicycle", ("ride", "sit on"))])
    assert trace == ("There is 1 person. The person is riding and sitting on the bicycle. The "
                     "object class is bicycle. The verb classes are, for bicycle: ride, sit on.")


def test_people_are_counted_by_overlap_and_verbs_joined_by_class():
    moved = (11, 10, 31, 61)  # overlaps MAN by 19 * 50 of 20 * 50 + 20 * 51 - 950: 0.89
    hois = [HOI(MAN, BIKE, "bicycle", ("ride",)), HOI(moved, CAR, "car", ("no interaction",)),
            HOI(WOMAN, BIKE, "bicycle", ("hold", "ride"))]
    assert engine.traces.template.template_trace(hois) == (
        "There are 2 people. They are riding and holding the bicycle and not interacting with the "
        "car. The object classes are bicycle and car. The verb classes are, for bicycle: ride, "
        "hold; for car: no interaction.")
    assert engine.traces.template.count_people([HOI(MAN, WOMAN, "person", ("hug",))]) == 2


def test_people_at_iou_one_half_are_two():
    # 20 x 50 inside 20 x 100 is exactly 0.5, which is not more than 0.5.
    tall = HOI((0, 0, 20, 100), BIKE, "bicycle", ("ride",))
    assert engine.traces.template.count_people([tall, HOI((0, 0, 20, 50), BIKE, "bicycle", ("hold",))]) == 2
    assert engine.traces.template.count_people([tall, HOI((0, 0, 20, 51), BIKE, "bicycle", ("hold",))]) == 1


def test_every_pair_makes_a_trace_that_would_be_accepted():
    for verb, name in hicodet.HOI_CLASSES:
        trace = engine.traces.template.template_trace([HOI(MAN, CAR, name, (verb,))])
        assert not any(tag in trace for tag in engine.traces.trace_file.TAGS)
        assert 18 <= len(trace.split()) <= 40
        assert trace_fault(trace) is None, trace


def test_a_crowd_does_not_make_a_long_trace():
    hois = [HOI((40 * i, 0, 40 * i + 30, 60), CAR, "boat", ("row", "sit on")) for i in range(80)]
    trace = engine.traces.template.template_trace(hois)
    assert trace.startswith("There are 80 people. They are rowing and sitting on the boat.")
    assert len(trace.split()) < 40


def test_gerunds():
    for verb, expected in {"ride": "riding", "hop on": "hopping on", "lie on": "lying on",
                           "tie": "tying", "open": "opening", "exit": "exiting", "stir": "stirring",
                           "row": "rowing", "control": "controlling", "inspect": "inspecting",
                           "no interaction": "not interacting with"}.items():
        assert engine.traces.template.gerund(verb) == expected


# ---- traces.jsonl


def test_read_traces_keeps_the_order_and_ignores_other_keys(tmp_path):
    path = write(tmp_path / "t.jsonl", {"file_name": "b.jpg", "think": "B\n\u2028", "teacher": "x"},
                 {"file_name": "a.jpg", "think": "A"})
    assert list(engine.traces.trace_file.read_traces(path).items()) == [("b.jpg", "B\n\u2028"), ("a.jpg", "A")]
    path.write_text(path.read_text().rstrip("\n"))  # an editor may leave out the last newline
    assert list(engine.traces.trace_file.read_traces(path)) == ["b.jpg", "a.jpg"]


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
        engine.traces.trace_file.read_traces(path)
    assert str(path) in str(error.value) and said in str(error.value)


def test_a_line_cut_anywhere_is_an_error_to_read_and_dropped_on_resume(tmp_path):
    path = write(tmp_path / "t.jsonl", {"file_name": "a", "think": "A", "usage": {"cost": 0.25}},
                 {"file_name": "b", "think": "B {} \u00e4", "usage": {"cost": 0.5}})
    text = path.read_bytes()
    first = text.index(b"\n") + 1
    for end in range(first + 1, len(text) - 1):
        path.write_bytes(text[:end])
        with pytest.raises(ValueError, match="line 2.*cut off"):
            engine.traces.trace_file.read_traces(path)
        file = engine.traces.trace_file.TraceFile(path)
        assert file.names == {"a"} and file.cost == 0.25
        file.file.close()
        assert path.read_bytes() == text[:first]
    path.write_bytes(text[:-1])  # whole but for the newline
    file = engine.traces.trace_file.TraceFile(path)
    assert file.names == {"a", "b"} and file.cost == 0.75 and path.read_bytes() == text


def test_a_second_writer_is_refused(tmp_path):
    path, (sample,) = tmp_path / "t.jsonl", make_samples(tmp_path, 1)
    first = engine.traces.trace_file.TraceFile(path)
    with pytest.raises(ValueError, match="being written by another"):
        engine.traces.trace_file.TraceFile(path)
    first.append(sample, "A \ud800", "template", 1, {})  # half a surrogate pair too
    assert engine.traces.trace_file.read_traces(path) == {sample.file_name: "A \ud800"}
    first.file.close()
    assert engine.traces.trace_file.TraceFile(path).names == {sample.file_name}


def test_a_full_disk_is_an_error():
    (sample,) = [Sample("a", Path("a"), 1, 1, (), (), frozenset())]
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    file = object.__new__(engine.traces.trace_file.TraceFile)
    file.file, file.names = open("/dev/full", "ab", buffering=0), set()
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        file.append(sample, "A", "template", 1, {})
    assert not file.names


# ---- requests and cost


def test_input_tokens():
    # Text: 6 // 3 + 20 = 22. Low detail 2833; high at 768: 2 x 2 tiles, 2833 + 4 * 5667 = 25501.
    assert engine.traces.openai_chat.input_tokens(make_teacher(prompt="prompt")) == 22 + 2833
    assert engine.traces.openai_chat.input_tokens(make_teacher(prompt="prompt", max_side=768)) == 22 + 25501
    # 1024 pixels: the shorter side is shrunk to 768, so 2 x 2 tiles again.
    assert engine.traces.openai_chat.input_tokens(make_teacher(prompt="prompt", max_side=1024)) == 22 + 25501
    # Qwen2.5-VL: 512 / 28 is 18.3, so 19 x 19 patches.
    assert engine.traces.openai_chat.input_tokens(make_teacher(prompt="prompt", model="Qwen")) == 22 + 361


@pytest.mark.parametrize("model, prices", [
    ("gpt-4o", (2.5, 10)), ("gpt-4o-2024-08-06", (2.5, 10)), ("gpt-4o-2024-05-13", (5, 15)),
    ("gpt-4o-mini-2024-07-18", (0.15, 0.6)),
    ("gpt-4o-min", ()), ("gpt-4o-mini-2", ()), ("gpt-4o-0513", ()), ("gpt-4o-2024-08-06-x", ()),
])
def test_a_dated_model_has_its_own_price_or_that_of_its_name(model, prices):
    assert (engine.traces.openai_chat.known_prices(model) or ())[:2] == prices


def test_budget_reserves_before_it_spends():
    budget = engine.traces.openai_chat.Budget((1.0, 2.0), max_cost=0.01)
    first = budget.reserve(2000, 1000)  # 0.002 + 0.002
    second = budget.reserve(2000, 1000)
    assert first == second == pytest.approx(0.004)
    with pytest.raises(engine.traces.openai_chat.Stop, match="--max-cost"):  # 0.008 are reserved
        budget.reserve(2000, 1000)
    used = budget.settle(first, {"prompt_tokens": 1500, "completion_tokens": 100})
    assert used["cost"] == pytest.approx(0.0017) and budget.tokens == 1600
    budget.settle(second, None, billed=False)
    assert budget.spent == pytest.approx(0.0017) and budget.reserved == pytest.approx(0)
    # 0.0017 + 0.008 <= 0.01; a reply without usage counts in full.
    assert budget.settle(budget.reserve(6000, 1000), {"prompt_tokens": "many"})["cost"] == (
        pytest.approx(0.008))


def test_budget_learns_from_the_largest_request():
    budget = engine.traces.openai_chat.Budget((1.0, 0.0), max_cost=math.inf)
    budget.settle(budget.reserve(10, 0), {"prompt_tokens": 5000, "completion_tokens": 0})
    assert budget.reserve(10, 0) == pytest.approx(0.005)


@pytest.mark.parametrize("header, expected", [
    (None, 0), ("", 0), ("2.5", 2.5), ("-3", 0), ("soon", 0), ("1e300", MAX_RETRY_AFTER),
    ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Fri, 31 Dec 9999 23:59:59 GMT", 3600), ("nan", 0),
])
def test_retry_after(header, expected):
    assert engine.traces.openai_chat.seconds(header) == expected


def test_the_key_is_not_in_the_teachers_text():
    assert "secret" not in repr(make_teacher(key="secret"))


# ---- batch


def result(name, content=f"<think>{THINK}</think>", status=200):
    return json.dumps({"id": "r", "custom_id": name, "error": None, "response": {
        "status_code": status, "body": reply(content)}}) + "\n"


@pytest.mark.parametrize("limit", ["requests", "bytes"])
def test_request_files_keep_the_limits_and_have_every_image_once(limit, tmp_path):
    samples, out = make_samples(tmp_path, 17), tmp_path / "traces.jsonl"
    size = len(json.dumps(engine.traces.openai_chat.request_body(samples[0], make_teacher()))) + 150
    limits = {"max_requests": 5} if limit == "requests" else {"max_bytes": 3 * size}
    budget = engine.traces.openai_chat.Budget((0.075, 0.3), math.inf)
    assert engine.traces.openai_chat.write_requests(samples, make_teacher(), out, budget, **limits) == ({}, "")
    files = sorted(tmp_path.glob("traces.requests-*.jsonl"))
    assert len(files) >= 4 and not list(tmp_path.glob("*.tmp"))
    names = []
    for path in files:
        requests = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(requests) <= limits.get("max_requests", 17)
        assert path.stat().st_size <= limits.get("max_bytes", math.inf)
        assert all(r["method"] == "POST" and r["url"] == "/v1/chat/completions" for r in requests)
        names += [r["custom_id"] for r in requests]
    assert names == [sample.file_name for sample in samples]
    assert requests[-1]["body"] == engine.traces.openai_chat.request_body(samples[-1], make_teacher())
    with pytest.raises(ValueError, match="requests-001.jsonl is there already"):
        engine.traces.openai_chat.write_requests(samples, make_teacher(), out, budget)


def test_request_files_leave_out_cut_images_and_stop_at_the_budget(tmp_path):
    samples = make_samples(tmp_path, 10)
    samples[2].path.write_bytes(samples[2].path.read_bytes()[:300])
    # A request costs at most ((1 // 3 + 20 + 2833) * 1 + 512 * 1) / 1e6 = 0.003365: two fit in.
    missing, ended = engine.traces.openai_chat.write_requests(
        samples, make_teacher(), tmp_path / "t.jsonl", engine.traces.openai_chat.Budget((1.0, 1.0), 0.0068))
    assert list(missing) == [samples[2].file_name] and str(samples[2].path) in str(missing)
    assert "--max-cost" in ended
    assert (tmp_path / "t.requests-001.jsonl").read_text().count("\n") == 2


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
    out, budget = tmp_path / "t.jsonl", engine.traces.openai_chat.Budget((0.075, 0.3), math.inf)
    file = engine.traces.trace_file.TraceFile(out)
    missing = teacher.collect(paths, wanted, make_teacher(), file, budget)
    assert missing.keys() == {samples[3].file_name, samples[4].file_name}
    assert "too late" in missing[samples[4].file_name]
    traces = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(traces) == 28 and {t["file_name"] for t in traces} == wanted.keys() - missing.keys()
    # 1000 * 0.075 + 100 * 0.3 = 105 millionths of a dollar each
    assert traces[0]["usage"] == USAGE | {"cost": pytest.approx(105e-6)}
    assert teacher.collect(paths, wanted, make_teacher(), file, budget) == missing
    assert len(out.read_text().splitlines()) == 28


@pytest.mark.parametrize("line", ["{", "[]", "{}", result("other.jpg")])
def test_results_of_something_else_are_refused(line, tmp_path):
    (sample,) = make_samples(tmp_path, 1)
    (tmp_path / "r").write_text(result(sample.file_name) + line)
    file = engine.traces.trace_file.TraceFile(tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match="r, line 2: (no result|not JSON|.*is no training image)"):
        teacher.collect([tmp_path / "r"], {sample.file_name: sample}, make_teacher(), file,
                        engine.traces.openai_chat.Budget((0.0, 0.0), math.inf))
