"""Which of the teacher's replies are accepted as traces, and why others are refused."""

import pytest

from engine.traces.acceptance import accept_trace
from tests.replies import THINK, reply

ACCEPTED = """\
There is one person. The person is riding a bicycle. Bicycle: ride, sit on.
Nobody touches the elephant; four tourists look on from a jeep.
Riding a bicycle, holding an umbrella.
I can\u2019t see what the second person holds, but the first one repairs a bicycle.
I cannot help but notice three teenagers with skateboards.
A sign next to the man says "Sorry, we are closed"; he locks his bike.
""".splitlines()
REFUSED = {
    "is a refusal": """\
I'm sorry, but I can't help with that.
I can\u2019t assist with identifying the people in this photo.
There are two people. I'm sorry, but I cannot say more about them.
As an AI language model, I do not look at people.
Unfortunately, I won't be able to describe the person in the picture.
Please provide the image of the person.
Unable to process the image of a man on a horse.
""".splitlines(),
    "fewer than": ["A person", "- - - -", "\u4eba"],
    "holds <": [f"{THINK}<|im_end|>", f"<|image_pad|>{THINK}", f"<think>{THINK}"],
    "more than 10000 characters": ["person " * 1429],
}


@pytest.mark.parametrize("think", [*ACCEPTED, ("person " * 1428).strip()])
def test_accepted(think):
    assert accept_trace(reply(f"Sure: <think>\n{think} </think>")) == (think, "")


@pytest.mark.parametrize("text, said", [
    *((f"<think>\n{think}</think>", said) for said in REFUSED for think in REFUSED[said]),
    (None, "no text within"), (THINK, "no text within"), ("<think> </think>", "no text within"),
    (f"<think>{THINK}", "no text within"), ("<think></think>" * 70_000, "no text within"),
    (f"<think>{THINK}</think><answer>[]</answer>", "<answer>"),
    (f"<think>{THINK}<answer></think>", "<answer>"),
])
def test_refused(text, said):
    trace, reason = accept_trace(reply(text))
    assert trace is None and said in reason


@pytest.mark.parametrize("before", [
    "It goes between <think> tags, no <answer>. Hmm, the man eats: from a plate?</think>\n\n",
    "It goes between <think> and </think>. A man eats, I think.</think>\n\n",
    "<think>\nIt goes between <think> and </think>. A man eats.\n</think>",
])
@pytest.mark.parametrize("after", ["", "\nDone.", "<think> </think>", "<think>"])
def test_thoughts_of_a_reasoning_teacher_are_not_the_trace(before, after):
    assert accept_trace(reply(f"{before}<think>{THINK}</think>{after}")) == (THINK, "")


def test_cut_reply_is_refused():
    for cut, said in ("length", "(length); raise --max-tokens"), ("content_filter", "filter)"):
        trace, reason = accept_trace(reply(f"<think>{THINK}</think>", cut))
        assert trace is None and reason.endswith(said)


def test_text_parts_are_joined():
    texts = [f"<think>{THINK[:9]}", f"{THINK[9:]}</think>", None]
    parts = [{"type": "text", "text": text} for text in texts]
    parts += [{"type": "thinking", "thinking": []}, "odd"]
    assert accept_trace(reply(parts)) == (THINK, "")


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_separated_reasoning_says_how_to_turn_it_off(field):
    _, reason = accept_trace(reply("", **{field: THINK}))
    assert "without --reasoning-parser" in reason and '{"reasoning_effort": "none"}' in reason
    assert "--reasoning-parser" not in accept_trace(reply("", **{field: None}))[1]
