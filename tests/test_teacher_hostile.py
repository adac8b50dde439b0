"""teacher.py against servers that do harm: endless replies, drips, odd numbers, control codes."""

import contextlib
import itertools
import json
import math
import socket
import threading
import time

import pytest

import engine.traces.acceptance
import engine.traces.openai_chat
import teacher
from engine.traces.acceptance import accept_trace
from engine.traces.openai_chat import Budget, Stop, Transient
from tests.replies import THINK, make_samples, make_teacher, reply, write

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@contextlib.contextmanager
def raw_server(pieces, pause=0.0):
    """The URL of a server that answers one request with these bytes, a pause between them."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):  # the client hangs up
            connection.recv(65536)
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        thread.join(10)
    assert not thread.is_alive()


def failure(pieces, pause=0.0, **changes):
    """What `post` raises."""
    with raw_server(pieces, pause) as url, pytest.raises((Transient, Stop)) as failed:
        engine.traces.openai_chat.post(make_teacher(base_url=url, **changes), {})
    return failed.value


DRIPS = {"header": b"X: ", "body": b"\r\n", "body of known length": b"Content-Length: 99\r\n\r\n"}


@pytest.mark.parametrize("start", DRIPS.values(), ids=DRIPS)
def test_a_server_that_drips_is_cut_off(start, monkeypatch):
    """A byte before each time-out, so that none comes; 0.4 s are given to it all."""
    monkeypatch.setattr(engine.traces.openai_chat, "MAX_TIMEOUTS", 2)
    drops = iter([b"x"] * 40)  # 4 s
    error = failure(itertools.chain([HEAD + start], drops), 0.1, timeout=0.2)
    assert any(drops)  # it did not get to the last one
    assert isinstance(error, Transient) and error.billed
    # a body without a length ends as if it were whole
    assert "no whole reply in 0.4 s" in str(error) or "no chat completion" in str(error)


@pytest.mark.parametrize("length", [b"", b"Content-Length: 99999999999\r\n"])
def test_an_endless_reply_is_not_kept(length, monkeypatch):
    monkeypatch.setattr(engine.traces.openai_chat, "MAX_REPLY", 1_000_000)
    error = failure(itertools.chain([HEAD + length + b"\r\n"], [b"x" * 65536] * 99))
    assert isinstance(error, Transient) and error.billed and "more than 1000000 bytes" in str(error)


def test_a_reply_of_16_mb_is_the_longest():
    assert engine.traces.openai_chat.MAX_REPLY == 16 * 1024 * 1024


def test_a_servers_words_do_not_reach_the_terminal_as_codes():
    """ESC, BEL, a C1 control, DEL, and U+202E, behind which text runs backwards."""
    said = "no \x1b[2J\x07\x9b1m\x7f\u202e such\nmodel".encode()
    head = b"HTTP/1.1 404 \x1b[2J\r\nContent-Length: %d\r\n\r\n" % len(said)
    error = failure([head + said])
    assert isinstance(error, Stop) and str(error).endswith(": 404: no  [2J  1m   such model")
    assert str(failure([b"\x1b[2J\r\n"])).isprintable()  # no HTTP at all


def test_the_words_of_a_batch_are_printable_too(tmp_path):
    path = write(tmp_path / "r.jsonl", {"custom_id": "a.jpg", "error": "\x1b[2J \x7f \u202e"})
    ((_, _, _, said),) = engine.traces.openai_chat.batch_results([path])
    assert said.isprintable()


@pytest.mark.parametrize("count", [10**400, 10**4000, 10_000_001, -1, True, 1.5, math.nan, "9", []])
def test_a_count_that_cannot_be_is_reckoned_as_the_most(count):
    """As where a server reports nothing: 0.5 USD of 1e6 tokens at the most are set aside."""
    budget = Budget((0.5, 0.0), max_cost=9.0)
    bound = budget.reserve(1_000_000, 0)
    usage = budget.settle(bound, {"prompt_tokens": count, "completion_tokens": 1})
    assert (usage["cost"], budget.spent, budget.tokens, budget.reserved) == (0.5, 0.5, 0, 0.0)


def test_max_cost_says_what_is_spent_and_in_flight():
    budget = Budget((1.0, 0.0), max_cost=0.01)
    budget.settle(budget.reserve(2000, 0), {"prompt_tokens": 2000, "completion_tokens": 0})
    budget.reserve(7000, 0)
    with pytest.raises(Stop, match=r"^\$0.0020 are spent, those in flight can cost \$0.0070, and"):
        budget.reserve(2000, 0)


def test_the_end_says_what_is_spent_in_all(tmp_path, monkeypatch):
    """One request is in flight when another one meets the limit; it ends, and counts."""
    refused = threading.Event()

    def complete(one, body, budget, stop):
        try:
            bound = budget.reserve(6000, 0)
        except Stop:
            refused.set()
            raise
        assert refused.wait(10)
        used = budget.settle(bound, {"prompt_tokens": 5000, "completion_tokens": 0})
        return reply(f"<think>{THINK}</think>"), used

    monkeypatch.setattr(teacher, "complete", complete)
    budget = Budget((1.0, 0.0), max_cost=0.01)
    with engine.traces.trace_file.TraceFile(tmp_path / "t.jsonl") as file:
        samples = make_samples(tmp_path, 2)
        _, ended = teacher.ask_all(samples, make_teacher(), file, budget, 1, 2)
    assert ended.startswith("$0.0000 are spent, those in flight can cost $0.0060")  # no image
    assert ended.endswith("; $0.0050 are spent in all")


@pytest.mark.parametrize("cost", ["NaN", "Infinity", "-1", "1" + "0" * 400, '"9"', "null", "true"])
def test_a_cost_in_the_file_is_a_number(cost, tmp_path):
    """NaN would end the watch over --max-cost."""
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"file_name": "a", "think": "A", "usage": {{"cost": {cost}}}}}\n')
    with pytest.raises(engine.traces.trace_file.InputError, match=f'{path}, line 1: "cost" must be a number'):
        engine.traces.trace_file.TraceFile(path)


def test_a_last_line_of_deep_nesting_is_dropped(tmp_path):
    path = write(tmp_path / "t.jsonl", {"file_name": "a", "think": "A"})
    whole = path.read_text()
    path.write_text(whole + "[" * 100_000)
    with engine.traces.trace_file.TraceFile(path) as file:
        assert file.names == {"a"}
    assert path.read_text() == whole


def test_a_very_long_text_is_no_trace():
    """The patterns take the square of its length: minutes for a megabyte."""
    longest = "<think>" + "person " * 1425 + "</think>"  # 7 + 9975 + 8 characters
    assert accept_trace(reply(longest))[0] is not None
    assert accept_trace(reply(longest + "." * 11)) == (
        None, "has more than 10000 characters")


@pytest.mark.parametrize("part", ["<think>", "</think>", "<think> </think>", "<", "a"])
def test_the_tags_of_a_megabyte_are_found_at_once(part, monkeypatch):
    """A pattern that takes the square of the length would need minutes."""
    monkeypatch.setattr(engine.traces.acceptance, "MAX_CHARACTERS", 1_000_000)
    assert "no text within" in accept_trace(reply(part * (999_999 // len(part))))[1]


def test_deep_nesting_and_lone_surrogates_are_no_reply():
    long = '{"choices": ' + "9" * 5000 + "}"
    for text in ("[" * 100_000, json.dumps({"choices": "\ud800"}), long):
        error = failure([HEAD + b"\r\n" + text.encode()])
        assert isinstance(error, Transient) and error.billed
