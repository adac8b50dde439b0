"""The command teacher.py: faulty servers on loopback, kill -9, flags; a real server (slow)."""

import base64
import io
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import hicodet
import teacher
from demo import toy
from engine.data import annotations
from engine.traces.template import template_trace
from engine.traces.trace_file import read_traces
from tests.faulty_server import FAULTS, Server
from tests.programs import end_of
from tests.replies import THINK, USAGE, reply

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-loopback-0123456789"
COST = (1000 * 0.15 + 100 * 0.60) / 1e6  # of a request with this usage, gpt-4o-mini


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A toy HICO-DET of 300 training images that all differ."""
    root = tmp_path_factory.mktemp("teacher")
    toy.write_data(root, 300, 1, seed=random.randrange(1000))
    return root


def command(data, out, server, *more):
    return [str(part) for part in (
        "--data", data, "--out", out, "--base-url", server.url, "--backoff", 0.002, *more)]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def run_main(*arguments):
    return end_of(teacher.main, *arguments)


def call(*arguments):
    return run_main(*command(*arguments))


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
    server = Server(lambda: random.choice(answers))
    assert call(data, out, server, "--concurrency", 24, "--timeout", 0.5, "--retries", 25) == 0
    check_complete(out, data)
    assert all(server.outcomes[fault] for fault in FAULTS), server.outcomes
    assert server.most_in_flight <= 24
    assert server.keys == {f"Bearer {KEY}"} and server.paths == {"/v1/chat/completions"}
    assert server.agents == {"hoi-r1-teacher"}  # some hosts refuse urllib's own
    assert all(trace["teacher"] == "gpt-4o-mini" and trace["attempts"] == 1
               and trace["usage"] == USAGE | {"cost": pytest.approx(COST)} for trace in lines(out))


def test_as_many_requests_are_in_flight_as_asked_for(data, tmp_path):
    server = Server(delay=0.05)
    call(data, tmp_path / "traces.jsonl", server, "--concurrency", 7, "--limit", 60)
    assert server.most_in_flight == 7


@pytest.mark.slow
def test_runs_killed_at_random_moments_add_up(data, tmp_path):
    out, server = tmp_path / "traces.jsonl", Server(delay=0.04)
    arguments = [sys.executable, str(ROOT / "teacher.py"),
                 *command(data, out, server, "--concurrency", 4)]
    environment = os.environ | {"OPENAI_API_KEY": KEY}
    kept = []
    for _ in range(10):
        server.asked.clear()
        with subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as process:
            assert server.asked.wait(30)
            time.sleep(random.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        kept.append(out.read_bytes().count(b"\n"))
        if random.random() < 0.5:  # as if the kill had come in the middle of a write
            with open(out, "ab") as file:
                file.write(b'{"file_name": "HICO_tra')
    assert kept == sorted(kept) and kept[-1] < 300
    before = server.outcomes["ok"]
    finished = subprocess.run(arguments, env=environment, capture_output=True, text=True,
                              timeout=60)
    assert finished.returncode == 0, finished.stderr
    check_complete(out, data)
    # Only what was missing is asked for; the last kill may have lost up to 4 replies.
    assert 0 <= server.outcomes["ok"] - before - (300 - kept[-1]) <= 4
    assert KEY not in finished.stdout + finished.stderr + out.read_text()


def test_rejected_traces_are_asked_again_then_listed(data, tmp_path, capsys):
    out, rng = tmp_path / "traces.jsonl", random.Random()
    bad = [None, f"<think>{THINK}</think> <answer>[]</answer>", "<think>Nice.</think>"]
    replies = iter([*(rng.choice(bad) for _ in range(2)), f"<think>{THINK}</think>",
                    rng.choice(bad), rng.choice(bad), f"no tags, your key is {KEY}"])
    server = Server(lambda: next(replies) or "")
    assert call(data, out, server, "--limit", 2, "--concurrency", 1) == 1
    (trace,) = lines(out)
    assert trace["attempts"] == 3
    assert trace["usage"] == {"prompt_tokens": 3000, "completion_tokens": 300,
                              "cost": pytest.approx(3 * COST)}
    names = {path.name for path in (data / "images/train2015").iterdir()} - {trace["file_name"]}
    listed = capsys.readouterr().err.splitlines()[-1]
    assert listed.split(":")[0] in names and "no tags, your key is (key)" in listed
    server.answer = lambda: f"<think>{THINK}</think>"
    assert call(data, out, server, "--limit", 2) == 0 and len(lines(out)) == 2


@pytest.mark.parametrize("status", [400, 401, 404])
def test_refused_request_ends_the_run_with_the_servers_words(status, data, tmp_path, capsys):
    server = Server(lambda: (status, {"error": {"message": f"wrong key {KEY}"}}))
    assert call(data, tmp_path / "t.jsonl", server, "--concurrency", 4) == 1
    printed = "".join(capsys.readouterr())
    assert str(status) in printed and "wrong key (key)" in printed and KEY not in printed
    assert 1 <= len(server.bodies) <= 4
    assert re.search(r"\(HICO_train2015_\d+\.jpg: http", printed)  # the image it was asked for


@pytest.mark.parametrize("status, error", [
    (400, {"message": "Content is not allowed by our safety system.", "code": None}),
    (400, {"message": "Filtered by Azure OpenAI's content management policy.", "code": None}),
    (400, {"message": "", "code": "content_filter"}), (403, {"code": "moderation_blocked"}),
    (400, {"code": "content_policy_violation"}), (400, "litellm.ContentPolicyViolationError"),
])
def test_filtered_image_costs_itself_alone(status, error, data, tmp_path, capsys):
    replies = iter([(status, {"error": error})])
    server = Server(lambda: next(replies, f"<think>{THINK}</think>"))
    out = tmp_path / "traces.jsonl"
    assert call(data, out, server, "--limit", 3, "--concurrency", 1) == 1
    assert len(lines(out)) == 2 and len(server.bodies) == 3  # it is asked for once
    name, reason = capsys.readouterr().err.splitlines()[-1].split(": ", 1)
    assert name not in out.read_text() and f": {status}: " in reason
    assert call(data, out, server, "--limit", 3) == 0


def test_server_that_is_gone_ends_the_run(data, tmp_path, capsys):
    server = Server()
    server.shutdown()
    server.server_close()
    assert call(data, tmp_path / "t.jsonl", server, "--retries", 2) == 1
    printed = capsys.readouterr()
    assert "20 images in a row without a trace, the last for" in printed.out
    assert "Connection refused" in printed.out and "Connection refused" in printed.err


@pytest.mark.parametrize("failures, ends", [(19, False), (20, True)])
def test_20_failures_of_any_kind_in_a_row_end_the_run(failures, ends, data, tmp_path, capsys):
    """No trace, a server that does not serve, a content filter; the traces before stay."""
    out, good = tmp_path / "traces.jsonl", f"<think>{THINK}</think>"
    kinds = ["", "500", (403, {"code": "moderation_blocked"})]
    round_ = [good, *(random.choice(kinds) for _ in range(failures - 1)), ""]
    replies = itertools.cycle(round_)
    server = Server(lambda: next(replies))
    options = ("--concurrency", 1, "--attempts", 1, "--retries", 0)
    assert call(data, out, server, *options) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    if ends:
        assert 21 <= len(server.bodies) <= 23 and len(lines(out)) <= 2  # with those in flight
        assert re.search(r"\(20 images in a row without a trace, the last for no text", last)
    else:
        assert len(lines(out)) == 15 and len(server.bodies) == 300 and "in a row" not in last


def test_max_cost_ends_a_run_and_its_reruns(data, tmp_path, capsys):
    out, limit = tmp_path / "traces.jsonl", random.uniform(0.015, 0.04)
    replies = ["half a body", *[f"<think>{THINK}</think>"] * 9]
    server = Server(lambda: random.choice(replies), delay=0.01)
    arguments = (data, out, server, "--max-cost", limit, "--concurrency", 4)
    assert call(*arguments) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    spent = sum(trace["usage"]["cost"] for trace in lines(out))
    assert f"--max-cost {limit:g} is reached" in last and f"; ${spent:.4f} are spent in all" in last
    # 4 are in flight then, and 4 may begin before the others stop
    assert limit <= spent <= limit + 8 * COST
    asked = len(server.bodies)
    assert f"the traces cost ${spent:.4f} so far" in call(*arguments)
    assert len(server.bodies) == asked


def test_fields_of_a_request_can_be_chosen(data, tmp_path):
    """As reasoning models need them."""
    server = Server()
    call(data, tmp_path / "t.jsonl", server, "--limit", 1, "--max-tokens", 4096,
         "--max-tokens-field", "max_completion_tokens", "--extra-body", '{"temperature": 1}')
    (body,) = server.bodies
    assert body.keys() == {"model", "messages", "max_completion_tokens", "temperature"}
    assert (body["max_completion_tokens"], body["temperature"]) == (4096, 1)


def test_images_are_shrunk_jpegs_and_the_text_is_the_guidance(data, tmp_path):
    server = Server()
    call(data, tmp_path / "t.jsonl", server, "--limit", 1, "--max-side", 50)
    (body,) = server.bodies
    text, image = body["messages"][0]["content"]
    prefix, code = image["image_url"]["url"].split(",")
    picture = Image.open(io.BytesIO(base64.b64decode(code)))
    assert (prefix, picture.format, picture.size) == ("data:image/jpeg;base64", "JPEG", (50, 25))
    assert "1. How many people are in the image?" in text["text"] and "<think>" in text["text"]
    assert body.keys() == {"model", "messages", "max_tokens"}  # and no temperature
    assert body["model"] == "gpt-4o-mini" and body["max_tokens"] == 512


def test_cut_image_is_listed_and_the_others_go_on(data, tmp_path, capsys):
    names = sorted(path.name for path in (data / "images/train2015").iterdir())
    cut = data / "images/train2015" / random.choice(names[:20])
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    try:
        out = tmp_path / "traces.jsonl"
        assert call(data, out, Server(), "--limit", 20) == 1
    finally:
        cut.write_bytes(whole)
    assert len(lines(out)) == 19
    assert f"{cut}: cannot be read as an image" in capsys.readouterr().err


def test_template_backend_writes_every_image_and_resumes(data, tmp_path):
    out = tmp_path / "t.jsonl"
    assert run_main("--data", data, "--out", out, "--backend", "template", "--limit", 2) == 0
    first = out.read_text()
    assert first.count("\n") == 2
    assert run_main("--data", data, "--out", out, "--backend", "template") == 0
    assert out.read_text().startswith(first)
    samples = annotations.load_split(data, "train")
    assert read_traces(out) == {s.file_name: template_trace(s.hois) for s in samples}
    assert json.loads(first.splitlines()[0]).keys() == {
        "file_name", "think", "teacher", "attempts", "usage"}


def test_dry_run_shows_a_request_without_its_image_and_the_cost(data, tmp_path, capsys):
    out = tmp_path / "t.jsonl"
    assert run_main("--data", data, "--out", out, "--dry-run", "--lists", "--max-cost", 1) == 0
    printed = capsys.readouterr().out
    request, estimate = json.loads(printed[: printed.rindex("}") + 1]), printed.splitlines()[-1]
    text, image = request["messages"][0]["content"]
    assert hicodet.TASK_DESCRIPTION in text["text"] and len(image["image_url"]["url"]) < 60
    tokens = 300 * (len(text["text"]) // 3 + 20 + 2833)
    cost = (tokens * 0.15 + 300 * 150 * 0.60) / 1e6
    assert f"300 images: about {tokens:,} input" in estimate and estimate.endswith(f"${cost:.2f}")
    assert not out.exists()
    # of the first 50 images those that have no trace yet; what there is stays as it is
    run_main("--data", data, "--out", out, "--backend", "template", "--limit", 20)
    before = out.read_bytes()
    capsys.readouterr()
    assert run_main("--data", data, "--out", out, "--dry-run", "--limit", 50) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("30 images: ")
    assert out.read_bytes() == before


@pytest.mark.parametrize("flags, end, known", [
    ([], "$0.00", False), (["--input-price", 1], "$0.17", False),
    (["--input-price", 0, "--output-price", 1], "$0.04", True),  # 300 x 150 of the output
    (["--base-url", "http://127.0.0.1:9/v1"], "$0.00", True),  # free
])
def test_price_that_is_not_known_is_said(flags, end, known, data, tmp_path, capsys):
    given = ["--data", data, "--out", tmp_path / "t.jsonl", "--teacher", "gpt-new", *flags]
    assert run_main(*given, "--dry-run") == 0
    printed = capsys.readouterr()
    assert printed.out.endswith(f"tokens: {end}\n")
    said = "gpt-new: price not known: give --input-price and --output-price"
    assert (said in printed.err) != known


@pytest.mark.parametrize("flags, key, said", [
    ([], "", "OPENAI_API_KEY is not set"), ([], "sk with space", "OPENAI_API_KEY holds"),
    (["--base-url", "http://user:pass@host/v1"], "", "expected http(s)://host[:port]/v1"),
    (["--base-url", "ftp://host"], "", "ftp://host"),
    (["--extra-body", "[]"], "", "--extra-body []: expected a JSON object"),
    (["--extra-body", "{"], "", "--extra-body {: expected a JSON object"),
    (["--out", "nowhere/t.jsonl"], "", "No such file or directory: 'nowhere/t.jsonl'"),
    (["--teacher", "local", "--max-cost", "1"], "", "--max-cost 1: local: price not known: give"),
    (["--backend", "batch", "--collect", "nowhere.jsonl"], "", "nowhere.jsonl"),
])
def test_wrong_use_is_an_error_with_a_way_out(flags, key, said, data, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    code = run_main("--data", data, "--out", tmp_path / "t.jsonl", *flags)
    assert said in code and (not key or key not in code)


@pytest.mark.parametrize("flags, said", [
    (["--retries", "-1"], "--retries -1: must be at least 0"),
    (["--collect", "r"], "--collect takes the results of a batch"),
    (["--backend", "template"], "the template makes none"),
    (["--backend", "batch", "--max-cost", "1"], "for a batch use --dry-run and --limit"),
])
def test_flags_are_refused_before_anything_is_read(flags, said, tmp_path, capsys):
    """With --dry-run, so that nothing is asked for if they are not."""
    given = ["--data", tmp_path / "none", "--out", tmp_path / "t.jsonl", "--dry-run"]
    assert run_main(*given, *flags) == 2
    assert said in capsys.readouterr().err


def test_missing_image_and_traces_of_other_data_are_errors(data, tmp_path):
    out, image = tmp_path / "t.jsonl", next((data / "images/train2015").iterdir())
    image.rename(image.with_suffix(".away"))
    try:
        assert image.name in run_main("--data", data, "--out", out, "--backend", "batch")
    finally:
        image.with_suffix(".away").rename(image)
    out.write_text(json.dumps({"file_name": "other.jpg", "think": THINK}) + "\n")
    assert "other.jpg" in run_main("--data", data, "--out", out, "--backend", "template")


def test_batch_backend_writes_once_and_collects(data, tmp_path):
    out = tmp_path / "t.jsonl"
    batch = ["--data", data, "--out", out, "--backend", "batch"]
    assert run_main(*batch) == 1  # nothing has a trace yet
    requests = (tmp_path / "t.requests-001.jsonl").read_text().splitlines()
    response = {"status_code": 200, "body": reply(f"<think>{THINK}</think>")}
    results = [json.dumps({"custom_id": json.loads(request)["custom_id"], "response": response})
               for request in requests]
    (tmp_path / "r").write_text("\n".join(results))
    assert "is there already" in run_main(*batch)
    assert run_main(*batch, "--collect", tmp_path / "r") == 0
    assert len(read_traces(out)) == len(requests) == 300
    assert lines(out)[0]["usage"]["cost"] == pytest.approx(COST / 2)


@pytest.mark.slow
def test_real_server(data, tmp_path, capsys):
    """litellm's proxy with a mocked model, installed into an environment of its own."""
    programs = tmp_path / "env" / "bin"
    subprocess.run([sys.executable, "-m", "venv", str(programs.parent)], check=True)
    installed = subprocess.run([programs / "pip", "install", "-q", "litellm[proxy]"],
                               capture_output=True, text=True, timeout=900)
    if installed.returncode:
        pytest.skip(f"litellm[proxy] cannot be installed: {installed.stderr[-300:]}")
    mock = {"model": "openai/mock", "api_key": "none", "mock_response": f"<think>{THINK}</think>"}
    config = {"general_settings": {"master_key": KEY},
              "model_list": [{"model_name": "mock-teacher", "litellm_params": mock}]}
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [programs / "litellm", "--config", "config.yaml", "--host", "127.0.0.1", "--port",
             str(port)], cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"})
    try:
        wait_for(port, process, tmp_path / "log")
        server = SimpleNamespace(url=f"http://127.0.0.1:{port}/v1")
        model = ["--teacher", "mock-teacher", "--input-price", 1, "--output-price", 1]
        out = tmp_path / "traces.jsonl"
        assert call(data, out, server, *model) == 0
        check_complete(out, data)
        usage = lines(out)[0]["usage"]
        assert usage["completion_tokens"] == 20 and usage["cost"] > 0  # litellm mocks usage too
        out = tmp_path / "other.jsonl"
        assert call(data, out, server, "--teacher", "no-such-model") == 1
        assert "no-such-model" in capsys.readouterr().out and out.read_text() == ""
    finally:
        process.terminate()
        process.wait(60)


def wait_for(port, process, log):
    """Waits until something listens on the port."""
    for _ in range(1200):
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"no server on port {port}: {log.read_text()[-2000:]}")
