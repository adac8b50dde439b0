"""Which of a teacher's replies are accepted as traces for SFT."""

import re

from engine.traces.trace_file import TAGS

MIN_WORDS, MAX_CHARACTERS = 3, 10_000  # of a trace
# Refusals, and replies without an image. A trace describes others, so "I" is the teacher itself.
REFUSAL = re.compile(
    r"^(?:sorry|my apologies|unfortunately|unable)\b|\bi(?:'m| am) (?:\w+ )?(?:sorry|unable)\b"
    r"|\bi (?:can(?:no|')t|could not|won't|will not|am not able to|don't|do not) (?:be able|have"
    r"|help|assist|comply|view|open|process|analy[sz]e|identify|describe)\b(?! but)"
    r"|\bas an ai\b|\blanguage model\b|\bno image\b"
    r"|\b(?:provide|upload) (?:the|an?) (?:\w+ )?(?:image|photo|picture)\b"
)
SEPARATED = (
    "; the server moves the reasoning out of the text; vLLM: start it without --reasoning-parser; "
    """Ollama: give --extra-body '{"reasoning_effort": "none"}'"""
)


def trace_fault(think: str) -> str:
    """What is wrong with a trace, or "".

    SFT loses an image without a trace, so only faults that would harm training count.
    """
    if held := [tag for tag in TAGS if tag in think]:
        return f"holds {held[0]}"
    if len(think) > MAX_CHARACTERS:
        return f"has more than {MAX_CHARACTERS} characters"
    if len(re.findall(r"\w+", think)) < MIN_WORDS:
        return f"has fewer than {MIN_WORDS} words"
    return "is a refusal" if REFUSAL.search(think.lower().replace("\u2019", "'")) else ""


def accept_trace(reply: dict) -> tuple[str | None, str]:
    """The trace of a chat completion and "", or None and why it is not accepted."""
    choice = reply["choices"][0]
    message, cut = choice["message"], choice.get("finish_reason")
    text = message.get("content")
    if isinstance(text, list):
        parts = [part.get("text") for part in text if isinstance(part, dict)]
        text = "".join(part for part in parts if isinstance(part, str))
    text = text if isinstance(text, str) else ""  # None: the model declined
    # Take the last one: a reasoning teacher's own thoughts come first, and may contain the tags.
    closed = [part.partition("<think>")[2].strip() for part in text.split("</think>")[:-1]]
    think = next(filter(None, reversed(closed)), "")
    if cut in ("length", "content_filter"):
        return None, f"cut off ({cut}){'; raise --max-tokens' if cut == 'length' else ''}"
    if not think:
        hint = SEPARATED if message.get("reasoning") or message.get("reasoning_content") else ""
        return None, f"no text within <think> </think>: {text[:60]!r}{hint}"
    fault = trace_fault(think)
    if not fault and "<answer>" in text[text.rindex(think) :]:
        fault = "is followed by an <answer>"
    return (None, f"{fault}: {think[:60]!r}") if fault else (think, "")
