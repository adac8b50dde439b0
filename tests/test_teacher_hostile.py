"""One request of teacher.py: faults, errors, redirects, proxies, and servers that do harm."""

import contextlib
import itertools
import json
import math
import re
import socket
import threading
import time

import pytest

import engine.traces.openai_chat
from engine.traces.openai_chat import (
    MAX_RETRY_AFTER,
    Filtered,
    Refused,
    Transient,
    batch_results,
    complete,
    estimated_tokens,
    post,
    usage_of,
)
from tests.faulty_server import FAULTS, Server
from tests.replies import THINK, USAGE, make_teacher, reply, write

KEY = "sk-loopback-0123456789"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@contextlib.contextmanager
def raw_server(pieces, pause=0.0):
    """The URL of a server that answers one request with these bytes, a pause between them."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):  # the client hangs up
            while not connection.recv(65536).endswith(b"{}"):  # the body
                pass
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        thread.join(10)
    assert not thread.is_alive()


def failure(url, **changes):
    """What `post` raises, with an environment's key that no error may show."""
    with pytest.raises((Transient, Filtered, Refused)) as failed:
        post(make_teacher(base_url=url, **{"key": KEY} | changes), {})
    assert KEY not in str(failed.value) and str(failed.value).isprintable()
    return failed.value


def raw_failure(pieces, pause=0.0, **changes):
    with raw_server(pieces, pause) as url:
        return failure(url, **changes)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_worth_another_try(fault):
    error = failure(Server(lambda: fault).url, timeout=0.3)
    assert isinstance(error, Transient) and error.retry_after == (0.01 if fault == "429" else 0)


@pytest.mark.parametrize("header, expected", [
    ("", 0), ("2.5", 2.5), ("-3", 0), ("soon", 0), ("1e300", MAX_RETRY_AFTER), ("nan", 0),
    ("Fri, 31 Dec 9999 23:59:59 GMT", 0),
])
def test_retry_after(header, expected):
    error = failure(Server(lambda: (429, {}, {"Retry-After": header})).url)
    assert error.retry_after == expected


def test_retries_end_with_the_last_fault_or_a_reply():
    replies = iter(["429", "stall", "500", f"<think>{THINK}</think>"])
    server, go_on = Server(lambda: next(replies)), threading.Event()
    one = make_teacher(base_url=server.url, retries=3, timeout=0.3, backoff=0.001)
    assert complete(one, {}, go_on) == reply(f"<think>{THINK}</think>")
    server.answer = lambda: "500"
    with pytest.raises(Transient, match="500.*oops"):
        complete(one, {}, go_on)
    assert len(server.bodies) == 8
    go_on.set()  # the run ends: no further try
    with pytest.raises(Transient):
        complete(one, {}, go_on)
    assert len(server.bodies) == 9


@pytest.mark.parametrize("error, kind", [
    ({"code": 429, "message": "busy"}, Transient), ({"code": "502", "message": "busy"}, Transient),
    ({"code": None, "message": "busy"}, Transient), ("busy", Transient),
    ({"code": 400, "message": "busy"}, Refused), ({"code": 401, "message": "busy"}, Refused),
    ({"code": "content_filter", "message": "busy"}, Filtered),
])
@pytest.mark.parametrize("choices", [{}, {"choices": None}, {"choices": []}])
def test_error_with_status_200_is_treated_by_its_code(error, kind, choices):
    failed = failure(Server(lambda: (200, {"error": error, **choices})).url)
    assert type(failed) is kind and "busy" in str(failed)


@pytest.mark.parametrize("body", [
    {"choices": None, "detail": "busy"}, {"choices": [{"error": {"message": "busy"}}]},
    {"choices": [{"message": {"content": ""}, "error": {"code": 502, "message": "busy"}}]},
    {"choices": [{"message": "busy"}]}, ["busy"],
])
def test_reply_without_completion_is_shown_and_retried(body):
    failed = failure(Server(lambda: (200, body)).url)
    assert type(failed) is Transient and "no chat completion: " in str(failed)
    assert "busy" in str(failed)


@pytest.mark.parametrize("status", [200, 502])
def test_page_of_html_is_retried_and_its_words_shown(status):
    page = b"<!DOCTYPE html>\n<html><head><title>502 Bad Gateway</title></head>\n<body>nginx</body>"
    failed = failure(Server(lambda: (status, page)).url)
    assert type(failed) is Transient and str(failed).endswith(": 502 Bad Gateway nginx")


@pytest.mark.parametrize("status, said, kind, hint", [
    (400, "Use 'max_completion_tokens' instead.", Refused, "--max-tokens-field max_completion_tok"),
    (429, "insufficient_quota", Refused, "insufficient_quota"), (404, KEY, Refused, r"\(key\)"),
    (408, "late", Transient, "late"), (403, "moderation_blocked", Filtered, "moderation_blocked"),
    (404, "content_filter", Refused, "404"), (204, "", Refused, "204"),
])
def test_status_says_whether_to_go_on(status, said, kind, hint):
    failed = failure(Server(lambda: (status, said.encode())).url)
    assert type(failed) is kind and re.search(hint, str(failed))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_does_not_take_the_key_to_another_host(status):
    other = Server()
    to = {"Location": f"{other.url}/chat/completions?{KEY}"}
    error = failure(Server(lambda: (status, {}, to)).url)
    assert type(error) is Refused and f"redirects to {other.url}" in str(error)
    assert not other.bodies


def test_key_is_removed_from_what_the_server_says():
    assert KEY not in repr(make_teacher(key=KEY))
    server = Server(lambda: f"<think>Your key is {KEY}. None of them rides.</think>")
    said = post(make_teacher(base_url=server.url, key=KEY), {})["choices"][0]["message"]["content"]
    assert said == "<think>Your key is (key). None of them rides.</think>"
    assert server.keys == {f"Bearer {KEY}"}
    # what people set for a server that wants no key is no secret, and traces hold such words
    said = post(make_teacher(base_url=server.url, key="None"), {})["choices"][0]["message"]
    assert "None of them rides" in said["content"]


@pytest.fixture
def proxy(monkeypatch):
    """A proxy on loopback that HTTP_PROXY and HTTPS_PROXY name."""
    server = Server()
    for name in ("http_proxy", "https_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://user:password@127.0.0.1:{server.server_port}")
    return server


def test_http_proxy_is_used(proxy):
    teacher = make_teacher(base_url="http://teacher.invalid/v1")
    assert post(teacher, {}) == reply(f"<think>{THINK}</think>")
    assert proxy.paths == {"http://teacher.invalid/v1/chat/completions"}
    proxy.answer = lambda: "500"
    said = str(failure("http://teacher.invalid/v1"))
    assert f"through the proxy 127.0.0.1:{proxy.server_port}: 500" in said


def test_https_proxy_is_asked_to_connect_and_does_not_get_the_key(proxy):
    error = failure("https://teacher.invalid/v1")
    assert type(error) is Transient and "Tunnel connection failed: 403" in str(error)
    assert "password" not in str(error)
    assert (proxy.paths, proxy.keys) == ({"teacher.invalid:443"}, {None})


def test_no_proxy_and_this_machine_are_asked_directly(proxy, monkeypatch):
    assert post(make_teacher(base_url=Server().url), {}) == reply(f"<think>{THINK}</think>")
    monkeypatch.setenv("NO_PROXY", "teacher.invalid")
    assert "proxy" not in str(failure("http://teacher.invalid/v1"))  # there is no such host
    assert not proxy.bodies


def test_proxy_variable_that_is_no_address_is_one_line(proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http:/127.0.0.1")
    assert "proxy URL with no authority" in str(failure("http://teacher.invalid/v1"))


@pytest.mark.parametrize("start", [b"X: ", b"\r\n", b"Content-Length: 99\r\n\r\n"])
def test_reply_that_stops_ends_by_the_timeout(start):
    error = raw_failure([HEAD + start, b"x", b""], 0.7, timeout=0.2)
    assert isinstance(error, Transient) and "timed out" in str(error)


def test_spaces_that_keep_a_connection_alive_are_read():
    text = json.dumps(reply(THINK)).encode()
    with raw_server([HEAD + b"\r\n", *[b" "] * 8, text], 0.1) as url:
        assert post(make_teacher(base_url=url, timeout=0.4), {}) == reply(THINK)


@pytest.mark.parametrize("length", [b"", b"Content-Length: 99999999999\r\n"])
def test_endless_reply_is_read_to_its_limit(length, monkeypatch):
    monkeypatch.setattr(engine.traces.openai_chat, "MAX_REPLY", 1_000_000)
    error = raw_failure(itertools.chain([HEAD + length + b"\r\n"], [b"x" * 65536] * 99))
    assert isinstance(error, Transient) and "no chat completion: xxx" in str(error)


def test_servers_words_do_not_reach_the_terminal_as_codes(tmp_path):
    """ESC, BEL, a C1 control, DEL, and U+202E, after which text runs backwards."""
    said = "no \x1b[2J\x07\x9b1m\x7f\u202e such\nmodel".encode()
    error = failure(Server(lambda: (404, said)).url)
    assert isinstance(error, Refused) and str(error).endswith(": 404: no [2J 1m such model")
    raw_failure([b"\x1b[2J\r\n"])  # no HTTP at all
    raw_failure([HEAD + b'\r\n{"error": "\\ud800"}'])
    path = write(tmp_path / "r.jsonl", {"custom_id": "a.jpg", "error": "\x1b[2J \x7f \u202e"})
    ((_, _, _, said),) = batch_results([path])
    assert said.isprintable()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"choices": ' + "9" * 5000 + "}", ""])
def test_odd_json_is_no_reply(text):
    assert isinstance(raw_failure([HEAD + b"\r\n" + text.encode()]), Transient)


@pytest.mark.parametrize("count", [10**400, 10_000_001, -1, True, 1.5, math.nan, "9", [], None])
def test_usage_that_cannot_be_is_estimated(count):
    teacher = make_teacher(prices=(1.0, 2.0))
    tokens_in, tokens_out = estimated_tokens(teacher)
    usage = usage_of({"usage": {"prompt_tokens": count, "completion_tokens": 1}}, teacher)
    assert usage == usage_of({}, teacher) == {
        "prompt_tokens": tokens_in, "completion_tokens": tokens_out,
        "cost": (tokens_in + 2 * tokens_out) / 1e6}
    assert usage_of({"usage": USAGE}, teacher)["cost"] == pytest.approx(0.0012)
