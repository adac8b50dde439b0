"""HICO-DET and its language: classes, HOI instances, the prompt, the answer and its parser.

Follows Sec. 3.1 (prompt of Fig. 4, answers as JSON text) and Sec. 4.2 (merging) of the paper.

1. Boxes are (x1, y1, x2, y2) in 0-based pixels of the original image. Boxes in prompts and answers
   are in the model frame: integer pixels of the resized image.
2. HICO-DET annotates each HOI class separately, so one person-object pair has different boxes for
   each verb. merge_pairs joins such pairs by overlap.
3. An answer need not be strict JSON. The parser accepts other quotes, brackets and spaces, missing
   or doubled marks, and labels in another case or with underscores, wherever only one meaning is
   possible. Such answers earn rewards in training too. Eq. 12 counts the keys as written.

engine/data/annotations.py reads the official files.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

Box = tuple[float, float, float, float]

# All 600 HOI classes in HICO's order, one object class per line, as Fig. 4 prints them.
INTERACTIONS = """\
airplane: board, direct, exit, fly, inspect, load, ride, sit on, wash, no interaction
bicycle: carry, hold, inspect, jump, hop on, park, push, repair, ride, sit on, straddle, walk, \
wash, no interaction
bird: chase, feed, hold, pet, release, watch, no interaction
boat: board, drive, exit, inspect, jump, launch, repair, ride, row, sail, sit on, stand on, tie, \
wash, no interaction
bottle: carry, drink with, hold, inspect, lick, open, pour, no interaction
bus: board, direct, drive, exit, inspect, load, ride, sit on, wash, wave, no interaction
car: board, direct, drive, hose, inspect, jump, load, park, ride, wash, no interaction
cat: dry, feed, hold, hug, kiss, pet, scratch, wash, chase, no interaction
chair: carry, hold, lie on, sit on, stand on, no interaction
couch: carry, lie on, sit on, no interaction
cow: feed, herd, hold, hug, kiss, lasso, milk, pet, ride, walk, no interaction
dining table: clean, eat at, sit at, no interaction
dog: carry, dry, feed, groom, hold, hose, hug, inspect, kiss, pet, run, scratch, straddle, train, \
walk, wash, chase, no interaction
horse: feed, groom, hold, hug, jump, kiss, load, hop on, pet, race, ride, run, straddle, train, \
walk, wash, no interaction
motorcycle: hold, inspect, jump, hop on, park, push, race, ride, sit on, straddle, turn, walk, \
wash, no interaction
person: carry, greet, hold, hug, kiss, stab, tag, teach, lick, no interaction
potted plant: carry, hold, hose, no interaction
sheep: carry, feed, herd, hold, hug, kiss, pet, ride, shear, walk, wash, no interaction
train: board, drive, exit, load, ride, sit on, wash, no interaction
tv: control, repair, watch, no interaction
apple: buy, cut, eat, hold, inspect, peel, pick, smell, wash, no interaction
backpack: carry, hold, inspect, open, wear, no interaction
banana: buy, carry, cut, eat, hold, inspect, peel, pick, smell, no interaction
baseball bat: break, carry, hold, sign, swing, throw, wield, no interaction
baseball glove: hold, wear, no interaction
bear: feed, hunt, watch, no interaction
bed: clean, lie on, sit on, no interaction
bench: inspect, lie on, sit on, no interaction
book: carry, hold, open, read, no interaction
bowl: hold, stir, wash, lick, no interaction
broccoli: cut, eat, hold, smell, stir, wash, no interaction
cake: blow, carry, cut, eat, hold, light, make, pick up, no interaction
carrot: carry, cook, cut, eat, hold, peel, smell, stir, wash, no interaction
cell phone: carry, hold, read, repair, talk on, text on, no interaction
clock: check, hold, repair, set, no interaction
cup: carry, drink with, hold, inspect, pour, sip, smell, fill, wash, no interaction
donut: buy, carry, eat, hold, make, pick up, smell, no interaction
elephant: feed, hold, hose, hug, kiss, hop on, pet, ride, walk, wash, watch, no interaction
fire hydrant: hug, inspect, open, paint, no interaction
fork: hold, lift, stick, lick, wash, no interaction
frisbee: block, catch, hold, spin, throw, no interaction
giraffe: feed, kiss, pet, ride, watch, no interaction
hair drier: hold, operate, repair, no interaction
handbag: carry, hold, inspect, no interaction
hot dog: carry, cook, cut, eat, hold, make, no interaction
keyboard: carry, clean, hold, type on, no interaction
kite: assemble, carry, fly, hold, inspect, launch, pull, no interaction
knife: cut with, hold, stick, wash, wield, lick, no interaction
laptop: hold, open, read, repair, type on, no interaction
microwave: clean, open, operate, no interaction
mouse: control, hold, repair, no interaction
orange: buy, cut, eat, hold, inspect, peel, pick, squeeze, wash, no interaction
oven: clean, hold, inspect, open, repair, operate, no interaction
parking meter: check, pay, repair, no interaction
pizza: buy, carry, cook, cut, eat, hold, make, pick up, slide, smell, no interaction
refrigerator: clean, hold, move, open, no interaction
remote: hold, point, swing, no interaction
sandwich: carry, cook, cut, eat, hold, make, no interaction
scissors: cut with, hold, open, no interaction
sink: clean, repair, wash, no interaction
skateboard: carry, flip, grind, hold, jump, pick up, ride, sit on, stand on, no interaction
skis: adjust, carry, hold, inspect, jump, pick up, repair, ride, stand on, wear, no interaction
snowboard: adjust, carry, grind, hold, jump, ride, stand on, wear, no interaction
spoon: hold, lick, wash, sip, no interaction
sports ball: block, carry, catch, dribble, hit, hold, inspect, kick, pick up, serve, sign, spin, \
throw, no interaction
stop sign: hold, stand under, stop at, no interaction
suitcase: carry, drag, hold, hug, load, open, pack, pick up, zip, no interaction
surfboard: carry, drag, hold, inspect, jump, lie on, load, ride, stand on, sit on, wash, no \
interaction
teddy bear: carry, hold, hug, kiss, no interaction
tennis racket: carry, hold, inspect, swing, no interaction
tie: adjust, cut, hold, inspect, pull, tie, wear, no interaction
toaster: hold, operate, repair, no interaction
toilet: clean, flush, open, repair, sit on, stand on, wash, no interaction
toothbrush: brush with, hold, wash, no interaction
traffic light: install, repair, stand under, stop at, no interaction
truck: direct, drive, inspect, load, repair, ride, sit on, wash, no interaction
umbrella: carry, hold, lose, open, repair, set, stand under, no interaction
vase: hold, make, paint, no interaction
wine glass: fill, hold, sip, toast, lick, wash, no interaction
zebra: feed, hold, pet, watch, no interaction
"""
HOI_CLASSES = tuple(
    (verb, name)
    for name, verbs in (line.split(": ") for line in INTERACTIONS.splitlines())
    for verb in verbs.split(", ")
)  # (verb, object class) at index hoi_id, from 0
HOI_IDS = {hoi_class: hoi_id for hoi_id, hoi_class in enumerate(HOI_CLASSES)}
VERBS = tuple(sorted({verb for verb, _ in HOI_CLASSES}))  # HICO's order is alphabetical

# COCO's order, in which Fig. 4 lists the object classes.
OBJECTS = tuple(
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, "
    "bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, "
    "sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, "
    "bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, "
    "dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, "
    "toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, "
    "toothbrush".split(", ")
)
MERGE_IOU = 0.5  # a larger overlap means the same person or object (Sec. 4.2, our reading)


class InputError(ValueError):
    """A fault that the user must fix in a file, folder or value. Programs print it as one line."""


@dataclass(frozen=True)
class HOI:
    """One person-object pair with all its verbs."""

    human: Box
    object: Box
    object_class: str
    verbs: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """One visible row of the annotation's `connection`."""

    human: Box
    object: Box
    hoi_id: int  # index of HOI_CLASSES


@dataclass(frozen=True)
class Sample:
    """One image with its annotation; boxes in 0-based pixels of the original image."""

    file_name: str
    path: Path
    width: int
    height: int
    hois: tuple[HOI, ...]  # merged (Sec. 4.2)
    pairs: tuple[Pair, ...]  # as annotated
    known_objects: frozenset[str]  # object classes for which Known Object includes this image


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, width x2 - x1; 0 if either is empty or inverted."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    # A model may write sides so long or short that an area becomes infinite or zero.
    return both / union if 0 < union < math.inf else 0.0


def merge_pairs(pairs: Iterable[Pair]) -> tuple[HOI, ...]:
    """Merge pairs of the same person and object into instances with several verbs (Sec. 4.2).

    A pair joins an instance that has its object class but not its verb, if both boxes of the
    instance (those of its first pair) overlap the pair's boxes by IoU > 0.5. It joins the instance
    with the largest min(IoU human, IoU object), or the earliest of equals. If none fits, it starts
    a new instance. Pairs with the same verb are never merged: the annotators meant two people or
    two objects. Boxes may be in any frame.
    """
    merged: list[tuple[Pair, str, list[str]]] = []
    for pair in pairs:
        verb, object_class = HOI_CLASSES[pair.hoi_id]
        best, best_overlap = None, MERGE_IOU
        for first, name, verbs in merged:
            if name == object_class and verb not in verbs:
                overlap = min(iou(first.human, pair.human), iou(first.object, pair.object))
                if overlap > best_overlap:
                    best, best_overlap = verbs, overlap
        if best is None:
            merged.append((pair, object_class, [verb]))
        else:
            best.append(verb)
    return tuple(HOI(first.human, first.object, c, tuple(verbs)) for first, c, verbs in merged)


def to_model_frame(box: Box, image_size: tuple[int, int], model_size: tuple[int, int]) -> Box:
    """Scale a box from the original to the resized image, unrounded. Sizes: (width, height)."""
    x, y = model_size[0] / image_size[0], model_size[1] / image_size[1]
    return box[0] * x, box[1] * y, box[2] * x, box[3] * y


def to_image_frame(box: Box, image_size: tuple[int, int], model_size: tuple[int, int]) -> Box:
    """Inverse of to_model_frame, clipped to pixels [0, width - 1] x [0, height - 1]."""
    sides = zip(to_model_frame(box, model_size, image_size), image_size * 2, strict=True)
    return tuple(min(max(side, 0.0), size - 1.0) for side, size in sides)


def in_frame(hoi: HOI, old_size: tuple[int, int], new_size: tuple[int, int]) -> HOI:
    """Scale an HOI's boxes to another size of the image. Sizes: (width, height)."""
    human, obj = (to_model_frame(box, old_size, new_size) for box in (hoi.human, hoi.object))
    return replace(hoi, human=human, object=obj)


ROLE = "You are an HOI detection model. "
STRUCTURE = "Follow this exact structure:\n\n"
TASK_DESCRIPTION = f"""\
<VALID OBJECT CLASSES>:
<object class>:{", ".join(OBJECTS)}.

<VALID INTERACTIONS> (object: allowed_verbs):
<object class>: <verb class>, <verb class>, ...
{INTERACTIONS}
"""
THINKING_PROCESS = """\
Thinking Process:
1. How many people are in the image?
2. What are those people doing?
3. What <object class> in <VALID OBJECT CLASSES> are each people interacting with?
4. Find existing <verb class> combinations from <VALID INTERACTIONS> for each <object class>.

"""
THINK_EXAMPLE = "<think>\nreasoning process here\n</think>\n"
# The two spaces and the dots are the authors'.
ANSWER_EXAMPLE = """\
<answer>
[
    {
        "human":  [x1, y1, x2, y2],
        "object": [x1, y1, x2, y2],
        "object class": "<object class>",
        "verb class": "<verb class>, <verb class>, ... "
    },
    ...
]
</answer>"""


def prompt_text(*, thinking: bool = True, task_description: bool = True) -> str:
    """The text of the user turn (Fig. 4). The two switches are the ablations of Table 2.

    With both it is the authors' prompt, character by character. Without `thinking` it lacks the
    Thinking Process and the example's <think> part. Without `task_description` it lacks the role
    and both lists of classes.
    """
    role, classes = (ROLE, TASK_DESCRIPTION) if task_description else ("", "")
    process, think = (THINKING_PROCESS, THINK_EXAMPLE) if thinking else ("", "")
    return f"{role}{STRUCTURE}{classes}{process}EXAMPLE OUTPUT FORMAT:\n{think}{ANSWER_EXAMPLE}"


ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"


@dataclass(frozen=True)
class Prediction:
    """One object of the answer. A field that is missing or unreadable is None or ()."""

    human: Box | None  # as written, even if inverted; None: key missing, or not four finite numbers
    object: Box | None
    object_class: str | None  # in HICO's spelling if HICO has it, else as written
    verbs: tuple[str, ...]  # spelled likewise; split at commas, repeats kept, empty ones dropped
    key_count: int  # keys as written, with repeats (Eq. 12)
    span: tuple[int, int]  # its first character in the text, and the one after its last

    @property
    def has_boxes(self) -> bool:
        """Whether both boxes are present and have a finite area above 0."""
        boxes = self.human, self.object
        return None not in boxes and all(iou(box, box) > 0 for box in boxes)


@dataclass(frozen=True)
class Completion:
    """A parsed model text, from parse_completion."""

    has_think: bool
    has_answer: bool  # False: every reward is 0, but prediction may still use the instances
    instances: tuple[Prediction, ...]


def format_answer(hois: Iterable[HOI]) -> str:
    """The answer of Fig. 4 on one line, coordinates rounded; inverse of parse_completion."""
    instances = [
        {
            "human": [round(side) for side in hoi.human],
            "object": [round(side) for side in hoi.object],
            "object class": hoi.object_class,
            "verb class": ", ".join(hoi.verbs),
        }
        for hoi in hois
    ]
    return f"{ANSWER_OPEN} {json.dumps(instances)} {ANSWER_CLOSE}"


def format_completion(hois: Iterable[HOI], think: str | None) -> str:
    """The trace in <think> tags, then the answer (Sec. 3.2). think: None for the answer alone."""
    answer = format_answer(hois)
    return answer if think is None else f"<think> {think.strip()} </think> {answer}"


def parse_completion(text: str) -> Completion:
    """Parse a model's text: its tags, and the objects of its answer, one per instance.

    The answer is the text from the last `<answer>` with instances to the next `</answer>`. Without
    `<answer>`, it is the text after `</think>`, or the whole text; only prediction uses this, as
    the rewards require the tag. An unreadable field is None or (). Never raises. Time is linear in
    the length of the text.
    """
    tagged = [found.span(1) for found in _TAGGED.finditer(text)]
    # ASCII marks, and spaces in place of escapes and comments, so that spans stay as they are
    plain, instances = text.translate(_ASCII_MARKS), ()
    plain = _NOISE.sub(lambda found: found[1] or " " * len(found[0]), plain)
    for start, stop in reversed(tagged or [_UNTAGGED.match(text).span(1)]):
        instances = tuple(_read_instances(plain, start, stop))
        if instances:
            break
    return Completion("<think>" in text, bool(tagged), instances)


# No pattern backtracks ("*+") or looks past the next quote or brace, so the time is linear.
_TAGGED = re.compile(rf"{ANSWER_OPEN}(.*?)(?={ANSWER_OPEN}|{ANSWER_CLOSE}|\Z)", re.DOTALL)
_UNTAGGED = re.compile(rf"(?:.*</think>)?+(.*?)(?={ANSWER_CLOSE}|\Z)", re.DOTALL)
_ASCII_MARKS = str.maketrans(
    "“”„«»＂‘’‚＇`：，；［］（）｛｝\xa0\u3000\u200b\u200c\u200d\u2060\ufeff",
    "\"\"\"\"\"\"'''''" + ":,;[](){}       ",
)
# A comment mark inside a string is kept. Escapes occur where the list was written as a string.
_NOISE = re.compile(r"""("[^"\\\n]*+")|(?://|\#)[^\n{}]*+|\\(?:[nrt]|(?=["']))""")

_PART = re.compile(
    r"""
    (?P<key>  # one of the four keys, before a quote or a colon; or another key, before a colon
        ["']?+ (?<!\w) (?P<name> human | (?:object|verb)[ _]class | object ) \s*+
        (?: ["']++ \s*+ :*+ | :++ )
      | (?: "[^"\n]*+" | '[^'\n]*+' | (?<![\w"'])[^\W\d]\w*+ ) \s*+ :++
    ) \s*+
    (?:  # a whole value, which may contain keys and braces: a string, a list, a non-instance object
        (?: "[^"]*+" | '[^'"{}]*+' ) (?= \s*+ [,;}\])] ) | \[ [^][:"'{}]*+ \]
      | \{ (?! [^{}]*?(?:human|object|verb) ) [^{}]*+ \}
    )?+
    | [{}] | \] (?= [\s"']*+ \Z )  # where an object begins or ends
    """,
    re.VERBOSE | re.IGNORECASE,
)
_EXAMPLE_BOX = "[x1, y1, x2, y2]"  # of the prompt, which a model may repeat


def _read_instances(text: str, start: int, stop: int) -> Iterator[Prediction]:
    """The instances in text[start:stop]. An object ends at a brace or at the last bracket.

    An object without its opening or closing brace counts if all four fields can be read.
    """
    opened, keys = None, []
    for part in _PART.finditer(text, start, stop):
        if part["key"]:
            keys.append(part)
            continue
        if part[0] == "}" and opened is not None:
            inside = text[opened + 1 : part.start()]
            if (keys or not inside.strip()) and _EXAMPLE_BOX not in inside:
                yield _to_prediction(text, (opened, part.end()), keys)
        elif keys:
            found = _to_prediction(text, (keys[0].start(), part.start()), keys)
            if None not in (found.human, found.object, found.object_class) and found.verbs:
                yield found
        opened, keys = part.start() if part[0] == "{" else None, []


def _to_prediction(text: str, span: tuple[int, int], keys: list[re.Match]) -> Prediction:
    """The instance of an object. A value extends from its key to the next key."""
    ends = [key.start() for key in keys] + [span[1]]
    values = {
        (key["name"] or "").lower().replace("_", " "): text[key.end("key") : end]
        for key, end in zip(keys, ends[1:], strict=True)
    }
    classes = _to_labels(values.get("object class", ""))
    return Prediction(
        human=_to_box(values.get("human", "")),
        object=_to_box(values.get("object", "")),
        object_class=classes[0] if len(classes) == 1 else None,
        verbs=_to_labels(values.get("verb class", "")),
        key_count=len(keys),
        span=span,
    )


_AROUND = " \t\r\n\"'()[]{},:;"  # characters to strip from a value
_NUMBER = r"[-+]?(?:[0-9]++\.?[0-9]*+|\.[0-9]++)(?:e[-+]?[0-9]++)?+"
_SIDES = [rf"""(?:["']?{name}["']?\s*+:\s*+)?({_NUMBER})""" for name in ("x1", "y1", "x2", "y2")]
_BOX = re.compile(r"[\s,;:]++".join(_SIDES), re.IGNORECASE)


def _to_box(value: str) -> Box | None:
    """Four finite numbers. Brackets, quotes and the names x1, y1, x2, y2 are optional."""
    found = _BOX.fullmatch(value.strip(_AROUND))
    box = tuple(map(float, found.groups())) if found else (math.nan,)
    return box if all(map(math.isfinite, box)) else None


_VOCABULARY = frozenset(OBJECTS + VERBS)
_STRINGS = re.compile(r"""[\s\[(,;:]*+(?:(?:"[^"]*+"|'[^']*+')[\s,;\])}]*+)++""")


def _to_labels(value: str) -> tuple[str, ...]:
    """Labels between commas. Without proper quotes, all must be in the vocabulary."""
    labels = tuple(filter(None, (_spelled(label.strip(_AROUND)) for label in value.split(","))))
    return labels if _STRINGS.fullmatch(value) or _VOCABULARY.issuperset(labels) else ()


def _spelled(label: str) -> str:
    """The label in HICO's spelling if HICO has it, else as written."""
    plain = " ".join(label.replace("_", " ").lower().split())
    return plain if plain in _VOCABULARY else label.strip()
