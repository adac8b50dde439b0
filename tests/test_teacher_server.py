"""The command teacher.py: faulty servers on loopback, kill -9, flags."""

import base64
import io
import itertools
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import hicodet
import teacher
from demo import toy
from engine.data import annotations
from engine.traces.trace_file import TraceFile, read_traces
from tests.faulty_server import FAULTS, Server
from tests.programs import end_of
from tests.replies import THINK, USAGE, make_teacher, reply

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-loopback-0123456789"
COST = (1000 * 0.15 + 100 * 0.60) / 1e6  # of a request with this usage, gpt-4o-mini


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A toy HICO-DET of 300 different training images."""
    root = tmp_path_factory.mktemp("teacher")
    toy.write_data(root, 300, 1, seed=random.randrange(1000))
    return root


def command(data, out, server, *more):
    return ["--data", data, "--out", out, "--base-url", server.url, *more]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def run_main(*arguments):
    return end_of(teacher.main, *arguments)


def call(*arguments):
    return run_main(*command(*arguments))


def ask_all(data, out, server, concurrency, **changes):
    """Ask for the traces of all images, with short waits. Returns why some have none."""
    samples = annotations.load_split(data, "train")
    one = make_teacher(base_url=server.url, key=KEY, backoff=0.001, timeout=0.5, **changes)
    with TraceFile(out) as file:
        return teacher.ask_all(samples, one, file, concurrency, float("inf"))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_complete(out, data):
    names = [trace["file_name"] for trace in lines(out)]
    assert len(names) == len(set(names)) == 300
    assert set(names) == {path.name for path in (data / "images/train2015").iterdir()}
    assert all(trace["think"] == THINK for trace in lines(out))


def test_faults_in_random_order_lose_nothing_and_repeat_nothing(data, tmp_path):
    out = tmp_path / "traces.jsonl"
    answers = [f"<think>{THINK}</think>"] * 9 + list(FAULTS)  # 40 % faults
    server = Server(lambda: random.choice(answers), delay=0.01)
    assert ask_all(data, out, server, 24, retries=25) == ({}, "")
    check_complete(out, data)
    assert all(server.outcomes[fault] for fault in FAULTS), server.outcomes
    assert 1 < server.most_in_flight <= 24
    assert server.keys == {f"Bearer {KEY}"} and server.paths == {"/v1/chat/completions"}
    assert all(trace["teacher"] == "gpt-4o-mini" and trace["attempts"] == 1
               and trace["usage"] == USAGE | {"cost": pytest.approx(COST)} for trace in lines(out))


@pytest.mark.slow
def test_runs_killed_at_random_moments_add_up(data, tmp_path):
    out, server = tmp_path / "traces.jsonl", Server(delay=0.04)
    words = [sys.executable, ROOT / "teacher.py", *command(data, out, server), "--concurrency", 4]
    arguments = list(map(str, words))
    kept = []
    for _ in range(10):
        server.asked.clear()
        with subprocess.Popen(arguments, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as process:
            assert server.asked.wait(30)
            time.sleep(random.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        kept.append(out.read_bytes().count(b"\n"))
    with open(out, "ab") as file:  # as after a kill during a write
        file.write(b'{"file_name": "HICO_tra')
    assert kept == sorted(kept) and kept[-1] < 300
    before = server.outcomes["ok"]
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    check_complete(out, data)
    # It asks only for what is missing. The last kill may have lost up to 4 replies.
    assert 0 <= server.outcomes["ok"] - before - (300 - kept[-1]) <= 4
    assert KEY not in finished.stdout + finished.stderr + out.read_text()


def test_image_is_listed_after_three_rejected_traces(data, tmp_path, capsys):
    out = tmp_path / "traces.jsonl"
    bad = ["", f"<think>{THINK}</think> <answer>[]</answer>"]
    replies = iter([*bad, f"<think>{THINK}</think>", *bad, f"no tags, your key is {KEY}"])
    server = Server(lambda: next(replies))
    assert call(data, out, server, "--limit", 2, "--concurrency", 1) == 1
    (trace,) = lines(out)
    assert trace["attempts"] == 3
    assert trace["usage"] == {"prompt_tokens": 3000, "completion_tokens": 300,
                              "cost": pytest.approx(3 * COST)}
    listed = capsys.readouterr().err.splitlines()[-1]
    assert listed.startswith("HICO_train2015_") and "no tags, your key is (key)" in listed
    assert trace["file_name"] not in listed


def test_refused_request_ends_the_run_with_the_servers_words(data, tmp_path, capsys):
    server = Server(lambda: (401, {"error": {"message": f"wrong key {KEY}"}}))
    assert call(data, tmp_path / "t.jsonl", server, "--concurrency", 4) == 1
    printed = "".join(capsys.readouterr())
    assert "401" in printed and "wrong key (key)" in printed and KEY not in printed
    assert 1 <= len(server.bodies) <= 4
    assert re.search(r"\(HICO_train2015_\d+\.jpg: http", printed)  # the image


@pytest.mark.parametrize("failures, ends", [(19, False), (20, True)])
def test_20_failures_of_any_kind_in_a_row_end_the_run(failures, ends, data, tmp_path):
    """Server errors and content filters. The traces so far stay."""
    out, good = tmp_path / "traces.jsonl", f"<think>{THINK}</think>"
    kinds = ["500", (403, {"code": "moderation_blocked"})]
    replies = itertools.cycle([good, *random.choices(kinds, k=failures - 1), "500"])
    server = Server(lambda: next(replies))
    _, ended = ask_all(data, out, server, 1, retries=0)
    if ends:
        assert 21 <= len(server.bodies) <= 23 and len(lines(out)) <= 2  # with those in flight
        assert ended.startswith("20 images in a row without a trace, the last for http")
    else:
        assert len(lines(out)) == 15 and len(server.bodies) == 300 and not ended


def test_max_cost_ends_a_run_and_its_reruns(data, tmp_path, capsys):
    out, limit = tmp_path / "traces.jsonl", random.uniform(0.015, 0.04)
    server = Server(delay=0.01)
    arguments = (data, out, server, "--max-cost", limit, "--concurrency", 4)
    assert call(*arguments) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    spent = sum(trace["usage"]["cost"] for trace in lines(out))
    assert f"--max-cost {limit:g} is reached" in last and f"; ${spent:.4f} are spent in all" in last
    # 4 requests are in flight then, and 4 may begin before the run stops
    assert limit <= spent <= limit + 8 * COST
    asked = len(server.bodies)
    assert f"the traces cost ${spent:.4f} so far" in call(*arguments)
    assert len(server.bodies) == asked


def test_fields_of_a_request(data, tmp_path):
    """The defaults, and the fields that reasoning models need."""
    server = Server()
    call(data, tmp_path / "t.jsonl", server, "--limit", 1, "--max-side", 50)
    call(data, tmp_path / "u.jsonl", server, "--limit", 1, "--max-tokens", 4096,
         "--max-tokens-field", "max_completion_tokens", "--extra-body", '{"temperature": 1}')
    first, second = server.bodies
    text, image = first["messages"][0]["content"]
    prefix, code = image["image_url"]["url"].split(",")
    picture = Image.open(io.BytesIO(base64.b64decode(code)))
    assert (prefix, picture.format, picture.size) == ("data:image/jpeg;base64", "JPEG", (50, 25))
    assert "1. How many people are in the image?" in text["text"] and "<think>" in text["text"]
    del first["messages"], second["messages"]
    assert first == {"model": "gpt-4o-mini", "max_tokens": 512}  # and no temperature
    assert second == {"model": "gpt-4o-mini", "max_completion_tokens": 4096, "temperature": 1}


def test_cut_image_is_listed_and_a_missing_one_ends_the_run(tmp_path, capsys):
    out = tmp_path / "traces.jsonl"
    toy.write_data(tmp_path, 20, 1, seed=0)
    cut = random.choice(sorted((tmp_path / "images/train2015").iterdir()))
    cut.write_bytes(cut.read_bytes()[:400])
    assert call(tmp_path, out, Server()) == 1
    assert f"{cut}: cannot be read as an image" in capsys.readouterr().err
    cut.unlink()
    assert f"1 images are missing, first {cut}" in call(tmp_path, out, Server())
    assert len(lines(out)) == 19


def test_dry_run_prints_the_prompt_and_the_cost(data, tmp_path, capsys):
    out = tmp_path / "t.jsonl"
    assert run_main("--data", data, "--out", out, "--dry-run", "--lists", "--max-cost", 1) == 0
    prompt, _, estimate = capsys.readouterr().out.rpartition("\n\n")
    assert hicodet.TASK_DESCRIPTION in prompt and "1. How many people" in prompt
    tokens = 300 * (len(prompt) // 3 + 20 + 2833)
    cost = (tokens * 0.15 + 300 * 150 * 0.60) / 1e6
    assert f"300 images: about {tokens:,} input" in estimate and f"${cost:.2f}\n" in estimate
    assert not out.exists()
    # 20 of the first 50 images have a trace already
    run_main("--data", data, "--out", out, "--backend", "template", "--limit", 20)
    given = ["--limit", 50, "--teacher", "gpt-new", "--prices", 0, 2000]
    assert run_main("--data", data, "--out", out, "--dry-run", *given) == 0
    printed = capsys.readouterr().out
    assert "\n30 images: " in printed and "$9.00\n" in printed  # 30 * 150 tokens of output
    assert len(lines(out)) == 20


@pytest.mark.parametrize("flags, key, said", [
    ([], "sk with space", "OPENAI_API_KEY contains"),
    (["--base-url", "http://user:pass@host/v1"], "", "expected http(s)://host[:port]/v1"),
    (["--extra-body", "[]"], "", "--extra-body []: expected a JSON object"),
    (["--teacher", "local", "--max-cost", "1"], "", "--max-cost 1: price of local not known: give"),
    (["--concurrency", "0"], "", "--concurrency 0: must be at least 1"),
    (["--prices", "1", "nan"], "", "--prices: give two"),
    (["--collect", "r", "--max-cost", "1"], "", "for a batch use --dry-run and --limit"),
])
def test_wrong_use_is_an_error_of_one_line(flags, key, said, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert run_main("--data", data, "--out", tmp_path / "t.jsonl", *flags)
    line = capsys.readouterr().err.splitlines()[-1]
    assert said in line and (not key or key not in line)


def test_batch_backend_writes_once_and_collects(data, tmp_path):
    out = tmp_path / "t.jsonl"
    batch = ["--data", data, "--out", out, "--backend", "batch"]
    assert run_main(*batch) == 1  # no image has a trace yet
    requests = (tmp_path / "t.requests-001.jsonl").read_text().splitlines()
    response = {"status_code": 200, "body": reply(f"<think>{THINK}</think>")}
    results = [json.dumps({"custom_id": json.loads(request)["custom_id"], "response": response})
               for request in requests]
    (tmp_path / "r").write_text("\n".join(results))
    assert "is there already" in run_main(*batch)
    assert run_main("--data", data, "--out", out, "--collect", tmp_path / "r") == 0
    assert len(read_traces(out)) == len(requests) == 300
    assert lines(out)[0]["usage"]["cost"] == pytest.approx(COST / 2)
