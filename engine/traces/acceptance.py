"""Is a teacher's reply a trace? What SFT may learn from, and what is asked for again."""

import re
from collections.abc import Iterable, Iterator

from engine.traces.template import gerund
from engine.traces.trace_file import TAGS
from hicodet import OBJECTS, VERBS

MIN_WORDS = 3  # of a trace
MAX_CHARACTERS = 10_000  # of a reply's text: patterns take the square of its length
# What a teacher says instead of a trace, in small letters: that it will not, or saw no image.
CANNOT = (
    r"(?:\bi (?:can ?not|can't|could not|couldn't|will not|won't|do not|don't)"
    r"|(?:\bi am |\bi'm |^|[.!?]\s)(?:unable|not able|not allowed) to)(?: be able to)?"
)
REFUSALS = (
    rf"{CANNOT} (?:help\b(?! but)|assist|comply|continue|fulfil|provide|process|answer|describe)",
    rf"{CANNOT} (?:analy[sz]e|do (?:this|that)|have (?:access|the (?:ability|capability)))",
    rf"{CANNOT} (?:see|view|access|open|interpret) (?:\w+ )?(?:image|picture|photo)",
    r"(?:^|[.!?]\s)\W*(?:(?:i'm |i am )?(?:very |so )?sorry|(?:my )?apologies|i apologi[sz]e)\b",
    r"\bas an ai\b|\blanguage model|\bi (?:must|have to) decline|\bi(?:'m| am) not comfortable",
    r"\b(?:against|violates?) (?:\w+ )?(?:guidelines|polic)|\bhow can i (?:help|assist)",
    r"\bplease (?:provide|upload|share|attach|send) (?:\w+ ){0,2}(?:image|picture|photo)",
    r"\bno (?:image|picture|photo) (?:(?:was|is|has been) )?(?:provided|given|attached|uploaded)",
    r"\b(?:image|picture|photo) (?:could not|cannot|can't) be (?:loaded|displayed|opened)",
)
REFUSAL = re.compile("|".join(REFUSALS))
UNIDENTIFIED = re.compile(  # with the rest of its clause, which says who, not what is done
    rf"{CANNOT} identify (?:\w+ )?(?:people|person|individual)(?:(?!\bbut\b)[^,.;!?])*"
)
# Who may be in an image, and everyday names of objects.
PEOPLE = r"""person people \w*man \w*men child children boy girl kid baby babies toddler infant
adult teenager lady ladies guy individual someone somebody anyone everyone he she him her his they
them their who crowd group team family families couple friend mother father parent son daughter
brother sister bride groom player athlete rider \w*cyclist biker surfer skier \w*boarder skater
driver pilot passenger batter catcher pitcher umpire referee goalie jockey cowboy farmer chef worker
officer soldier student teacher tourist pedestrian spectator customer vendor waiter waitress nurse
doctor performer dancer sailor hiker runner swimmer \w*diver racer trainer owner visitor guest
participant monk figure"""
EVERYDAY = """bike motorbike plane sofa television ski knives hair dryer ball phone plant glass bat
glove racket racquet bear table board fridge bag"""


def any_of(words: Iterable[str]) -> re.Pattern:
    """A pattern for one of these words, which are patterns of small letters themselves."""
    return re.compile(rf"\b(?:{'|'.join(words)})\b")


def doing() -> Iterator[str]:
    """The 117 verbs as words of a sentence: "riding", "rides"."""
    for head in {verb.split()[0] for verb in VERBS} - {"no"}:
        yield from (gerund(head), re.sub("y$", "(?:y|ie)", head) + "e?s")


# Words on what a HICO image shows: who, a thing of the other 79 classes, what is done with it.
PERSON = any_of(f"{word}(?:s|es)?" for word in PEOPLE.split())
THING = any_of(f"{word}(?:s|es)?" for word in {*EVERYDAY.split(), *OBJECTS} - {"person"})
DOING = any_of(doing())


def trace_fault(think: str) -> str | None:
    """What is wrong with the text of a trace, or None.

    An image without a trace is lost to SFT, so only that is refused which would hurt training:
    special tokens, refusals, fewer than three words, no word on what such an image shows. What
    ends in a question mark does not count: it repeats the guidance. Not to identify people is a
    refusal where no verb with a thing is said beside it.
    """
    text = think.lower().replace("\u2019", "'")
    statements = re.sub(r"[^.!?\n]*\?", " ", text)
    if held := [tag for tag in TAGS if tag in think]:
        return f"holds {held[0]}"
    said = UNIDENTIFIED.sub(" ", statements)
    unidentified = UNIDENTIFIED.search(text) and not (DOING.search(said) and THING.search(said))
    if REFUSAL.search(text) or unidentified:
        return "is a refusal"
    if len(re.findall(r"\w+", statements)) < MIN_WORDS:
        return f"has fewer than {MIN_WORDS} words"
    named = any(words.search(statements) for words in (PERSON, THING, DOING))
    return None if named else "names no person, object or verb"


def accept_trace(reply: dict) -> tuple[str | None, str]:
    """The accepted trace of a chat completion and "", or None and why it was refused."""
    choice = reply["choices"][0]
    text = choice["message"].get("content")
    text = text if isinstance(text, str) else ""  # None: the model declined
    if len(text) > MAX_CHARACTERS:
        return None, f"has more than {MAX_CHARACTERS} characters"
    # The last one: a reasoning teacher's own thoughts stand before it, and may name the tags.
    closed = [part.partition("<think>")[2].strip() for part in text.split("</think>")[:-1]]
    think = next(filter(None, reversed(closed)), "")
    if choice.get("finish_reason") in ("length", "content_filter"):
        return None, f"cut off ({choice['finish_reason']})"
    if "<answer>" in text:
        return None, "holds an <answer>"
    if not think:
        return None, f"no text within <think> </think>: {text[:60]!r}"
    fault = trace_fault(think)
    return (None, f"{fault}: {think[:60]!r}") if fault else (think, "")
