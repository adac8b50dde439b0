"""One request of teacher.py: faults, errors, redirects, proxies, hostile servers."""

import re
import threading

import pytest

from engine.traces.openai_chat import NoReply, Refused, complete, estimated_tokens, post, usage_of
from tests.faulty_server import Server
from tests.replies import THINK, USAGE, make_teacher, reply

KEY = "sk-loopback-0123456789"


def failure(url, **changes):
    """What `post` raises; no error may show the key."""
    with pytest.raises((NoReply, Refused)) as failed:
        post(make_teacher(base_url=url, key=KEY, **changes), {})
    assert KEY not in str(failed.value) and str(failed.value).isprintable()
    return failed.value


def kind_of(error):
    """What teacher.py does next: "retry", "skip" the image, or "end" the run."""
    if isinstance(error, Refused):
        return "end"
    return "skip" if error.retry_after is None else "retry"


@pytest.mark.parametrize("header, expected", [
    ("2.5", 2.5), ("-3", 0), ("9" * 400, 3600), ("Fri, 31 Dec 9999 23:59:59 GMT", 0),
])
def test_retry_after(header, expected):
    error = failure(Server(lambda: (429, {}, {"Retry-After": header})).url)
    assert error.retry_after == expected


def test_retries_end_with_the_last_fault_or_a_reply(capsys):
    replies = iter(["429", "stall", "500", f"<think>{THINK}</think>"])
    server, stop = Server(lambda: next(replies)), threading.Event()
    one = make_teacher(base_url=server.url, retries=3, timeout=0.3, backoff=0.001)
    assert complete(one, {}, stop) == reply(f"<think>{THINK}</think>")
    server.answer = lambda: "500"
    with pytest.raises(NoReply, match="500.*oops"):
        complete(one, {}, stop)
    assert len(server.bodies) == 8 and "; trying again" in capsys.readouterr().err
    stop.set()
    with pytest.raises(NoReply):
        complete(one, {}, stop)
    assert len(server.bodies) == 9  # no further try


@pytest.mark.parametrize("body, kind", [
    ({"error": {"code": 429, "message": "busy"}}, "retry"), ({"error": "busy"}, "retry"),
    ({"error": {"code": "502", "message": "busy"}, "choices": None}, "retry"),
    ({"error": {"code": 400, "message": "busy"}}, "end"),
    ({"error": {"code": "content_filter", "message": "busy"}, "choices": None}, "skip"),
    ({"choices": None, "detail": "busy"}, "retry"), (["busy"], "retry"),
    ({"choices": [{"message": {"content": ""}, "error": {"code": 502, "is": "busy"}}]}, "retry"),
    ({"choices": [{"message": "busy"}]}, "retry"),
])
def test_status_200_without_completion_is_treated_by_the_code_of_its_error(body, kind):
    failed = failure(Server(lambda: (200, body)).url)
    assert kind_of(failed) == kind and "busy" in str(failed)


PAGE = "<!DOCTYPE html>\n<html><head><title>502 Bad Gateway</title></head>\n<body>nginx</body>"


@pytest.mark.parametrize("status, said, kind, hint", [
    (400, "Use 'max_completion_tokens' instead.", "end", "--max-tokens-field max_completion_tok"),
    (429, "insufficient_quota", "end", "insufficient_quota"), (404, KEY, "end", r"\(key\)"),
    (408, "late", "retry", "late"), (403, "moderation_blocked", "skip", "moderation_blocked"),
    (404, "content_filter", "end", "404"), (204, "", "end", "204"),
    (400, "Content is not allowed by our safety system.", "skip", "400"),
    (400, "Filtered by Azure OpenAI's content management policy.", "skip", "400"),
    (502, PAGE, "retry", " 502 Bad Gateway nginx$"),
])
def test_status_says_whether_to_go_on(status, said, kind, hint):
    failed = failure(Server(lambda: (status, said.encode())).url)
    assert kind_of(failed) == kind and re.search(hint, str(failed))


def test_redirect_does_not_take_the_key_to_another_host():
    other = Server()
    to = {"Location": f"{other.url}/chat/completions"}
    error = failure(Server(lambda: (302, {}, to)).url)
    assert kind_of(error) == "end" and "it redirects: correct --base-url" in str(error)
    assert not other.bodies


def test_key_is_removed_from_what_the_server_says():
    assert KEY not in repr(make_teacher(key=KEY))
    server = Server(lambda: f"<think>Your key is {KEY}. None of them rides.</think>")
    said = post(make_teacher(base_url=server.url, key=KEY), {})["choices"][0]["message"]["content"]
    assert said == "<think>Your key is (key). None of them rides.</think>"
    assert server.keys == {f"Bearer {KEY}"}
    # a placeholder like "None" is no secret, and traces may hold the word
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


def test_http_proxy_is_used_and_named(proxy):
    proxy.answer = lambda: "500"
    said = str(failure("http://teacher.invalid/v1"))
    assert proxy.paths == {"http://teacher.invalid/v1/chat/completions"}
    assert f"through the proxy 127.0.0.1:{proxy.server_port}: 500" in said


def test_https_proxy_does_not_get_the_key(proxy):
    error = failure("https://teacher.invalid/v1")
    assert kind_of(error) == "retry" and "Tunnel connection failed: 403" in str(error)
    assert "password" not in str(error)
    assert (proxy.paths, proxy.keys) == ({"teacher.invalid:443"}, {None})


def test_no_proxy_and_loopback_do_not_go_through_the_proxy(proxy, monkeypatch):
    assert post(make_teacher(base_url=Server().url), {}) == reply(f"<think>{THINK}</think>")
    monkeypatch.setenv("NO_PROXY", "teacher.invalid")
    assert "proxy" not in str(failure("http://teacher.invalid/v1"))  # there is no such host
    assert not proxy.bodies


def test_control_characters_of_the_server_are_removed():
    """ESC, BEL, a C1 control, DEL, and U+202E, which turns the direction of text."""
    said = "no \x1b[2J\x07\x9b1m\x7f\u202e such\nmodel".encode()
    error = failure(Server(lambda: (404, said)).url)
    assert kind_of(error) == "end" and str(error).endswith(": 404: no [2J 1m such model")


@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"choices": ' + "9" * 5000 + "}", "", '{"error": "\\ud800"}',
])
def test_odd_json_is_no_reply(text):
    assert kind_of(failure(Server(lambda: (200, text.encode())).url)) == "retry"


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": "9", "completion_tokens": 1}])
def test_usage_that_is_not_reported_is_estimated(usage):
    teacher = make_teacher(prices=(1.0, 2.0))
    tokens_in, tokens_out = estimated_tokens(teacher)
    assert usage_of({"usage": usage}, teacher) == usage_of({}, teacher) == {
        "prompt_tokens": tokens_in, "completion_tokens": tokens_out,
        "cost": (tokens_in + 2 * tokens_out) / 1e6}
    assert usage_of({"usage": USAGE}, teacher)["cost"] == pytest.approx(0.0012)
