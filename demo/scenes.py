"""The scenes of the toy HICO-DET: people and objects drawn on a colour gradient.

A drawing is a row of square panels, each with at most one pair of person and object. Their relative
place decides the verbs. A person may have a second object, and a panel may hold a bystander instead
of a pair. Boxes are 0-based inclusive pixels, as in `hicodet`, on a grid of 14 pixels. A layout
(boxes of a pair in its panel, object class, verbs) is either in the training half or in the test
half. The two RARE kinds have at most eight training pairs each, so the evaluation has rare classes.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from hicodet import HOI, Box, iou

SIDE, GRID = 112, 14  # of a panel
PERSON_SIZES = ((28, 42), (28, 56))
OBJECT_SIZES = {"bicycle": (42, 28), "horse": (42, 42), "sports ball": (28, 28),
                "umbrella": (42, 28)}
RARE_SCENES = 8  # HICO-DET calls an HOI class rare below 10 training pairs
TEST_SHARE = 4  # one layout in four is kept for testing
FURTHER_PAIR = 0.75  # how often a panel after the first holds a pair
SAME_KIND = 0.5  # how often this pair is of the first pair's kind
SECOND_OBJECT = 0.1  # how often it is instead another object of the first pair's person
BYSTANDER = 0.5  # how often a panel without a pair holds a person


@dataclass(frozen=True)
class Kind:
    """One kind of pair: an object class, its verbs in HICO order, and where the object is."""
    object_class: str
    verbs: tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Scene:
    """One drawing: its width in pixels, its pairs, and the boxes of people without an object."""
    width: int
    hois: tuple[HOI, ...]
    bystanders: tuple[Box, ...]

    @property
    def people(self) -> list[Box]:
        """Every person once, however many objects the person has."""
        return list(dict.fromkeys([hoi.human for hoi in self.hois] + list(self.bystanders)))


KINDS = (
    Kind("bicycle", ("ride", "sit on"), "astride"),
    Kind("bicycle", ("hold",), "next to"),
    Kind("bicycle", ("no interaction",), "apart"),
    Kind("horse", ("ride", "straddle"), "astride"),
    Kind("horse", ("no interaction",), "apart"),
    Kind("sports ball", ("kick",), "at the feet"),
    Kind("sports ball", ("hold",), "in hand"),
    Kind("sports ball", ("no interaction",), "apart"),
    Kind("umbrella", ("hold", "stand under"), "overhead"),
)
RARE = (
    Kind("horse", ("hold",), "next to"),
    Kind("umbrella", ("no interaction",), "apart"),
)


def object_corners(human: Box, size: tuple[int, int], place: str) -> list[tuple[float, float]]:
    """All top left corners of an object of this size in this place relative to the person."""
    left, top, right, bottom = human
    width, height = size
    touching = [left - width, left - width + GRID, right - GRID, right]
    centred = [left - 2 * GRID, left - GRID, left]
    if place == "astride":
        saddle = bottom - height // 2 // GRID * GRID
        return list(product(centred, (saddle - GRID, saddle)))
    if place in ("next to", "at the feet"):
        return list(product(touching, (bottom - height, bottom - height + GRID)))
    if place == "in hand":
        return list(product(touching, (top - GRID, top)))
    if place == "overhead":
        return list(product(centred, (top - height + GRID, top - height + 2 * GRID)))
    apart = [x for x in range(0, SIDE, GRID)
             if x <= left - width - 2 * GRID or x >= right + 2 * GRID]
    return list(product(apart, range(0, SIDE, GRID)))


def people() -> list[Box]:
    """All places of a person in a panel."""
    corners = product(range(0, SIDE, GRID), range(0, SIDE, GRID), PERSON_SIZES)
    boxes = [(x, y, x + width, y + height) for x, y, (width, height) in corners]
    return [box for box in boxes if max(box) < SIDE]


def layouts(kind: Kind) -> list[HOI]:
    """All pairs of this kind whose boxes lie inside a panel, in a fixed order."""
    width, height = OBJECT_SIZES[kind.object_class]
    pairs = []
    for human in people():
        for left, top in object_corners(human, (width, height), kind.place):
            box = (left, top, left + width, top + height)
            if min(box) >= 0 and max(box) < SIDE:
                pairs.append(HOI(human, box, kind.object_class, kind.verbs))
    return pairs


def is_test_layout(hoi: HOI) -> bool:
    """Whether a layout is in the test half. A hash decides, so no seed mixes the halves."""
    return zlib.crc32(repr(hoi).encode()) % TEST_SHARE == 0


def random_kinds(split: str, count: int, rng: np.random.Generator) -> list[Kind]:
    """The kinds of `count` first pairs in random order; training has few of the rare kinds."""
    if split == "test":
        kinds = (KINDS + RARE) * (count // len(KINDS + RARE) + 1)
    else:
        rare = RARE * min(RARE_SCENES, count // 50)
        kinds = rare + KINDS * (count // len(KINDS) + 1)
    return [kinds[i] for i in rng.permutation(count)]


def pick(items: Sequence, rng: np.random.Generator):
    """One of the items, all equally likely."""
    return items[rng.integers(len(items))]


def moved(box: Box, x: int) -> Box:
    """The box of a panel in the drawing; x: the panel's left side."""
    return box[0] + x, box[1], box[2] + x, box[3]


def second_objects(first: HOI, pool: dict[Kind, list[HOI]]) -> list[HOI]:
    """Other pairs of the person of `first`, with an object that does not touch the first object."""
    return [hoi for kind in KINDS if kind.object_class != first.object_class
            and kind.place != "apart" for hoi in pool[kind]
            if hoi.human == first.human and iou(hoi.object, first.object) == 0]


def make_scene(kind: Kind, pool: dict[Kind, list[HOI]], pairs: int,
               rng: np.random.Generator) -> Scene:
    """A scene of 1 to `pairs` pairs, the first of this kind, in panels in random order."""
    columns = [SIDE * int(i) for i in rng.permutation(pairs)]
    first = pick(pool[kind], rng)
    placed, bystanders = [(first, columns[0])], []
    for x in columns[1:]:
        others = second_objects(first, pool) if rng.random() < SECOND_OBJECT else []
        if rng.random() >= FURTHER_PAIR:
            if rng.random() < BYSTANDER:
                bystanders.append(moved(pick(people(), rng), x))
        elif others:
            placed.append((pick(others, rng), columns[0]))
        else:
            same = kind not in RARE and rng.random() < SAME_KIND
            placed.append((pick(pool[kind if same else pick(KINDS, rng)], rng), x))
    hois = [HOI(moved(hoi.human, x), moved(hoi.object, x), hoi.object_class, hoi.verbs)
            for hoi, x in placed]
    return Scene(SIDE * pairs, tuple(hois), tuple(bystanders))


def make_scenes(split: str, count: int, seed: int, pairs: int = 2) -> list[Scene]:
    """`count` scenes of the "train" or "test" half; the same seed gives the same scenes."""
    rng = np.random.default_rng([seed, split == "test"])
    pool = {kind: [hoi for hoi in layouts(kind) if is_test_layout(hoi) == (split == "test")]
            for kind in KINDS + RARE}
    return [make_scene(kind, pool, pairs, rng) for kind in random_kinds(split, count, rng)]


SHIRTS = ((255, 255, 255), (40, 40, 220), (230, 230, 40), (20, 20, 20))
COATS = ((96, 52, 12), (60, 30, 10), (140, 80, 30))
FRAMES = ((0, 0, 0), (0, 0, 160), (120, 0, 0))


def background(width: int) -> np.ndarray:
    """(SIDE, width, 3) uint8: red grows with x and green with y, so a colour shows its place."""
    image = np.full((SIDE, width, 3), 128.0)
    image[:, :, 0] = np.linspace(0, 255, width)
    image[:, :, 1] = np.linspace(0, 255, SIDE)[:, None]
    return image.round().astype(np.uint8)


def draw_person(draw: ImageDraw.ImageDraw, box: Box, shirt: tuple[int, int, int]) -> None:
    """A head, a shirt with two arms and two legs that fill the box."""
    left, top, right, bottom = box
    waist = top + (bottom - top) * 3 // 5
    middle = (left + right) // 2
    draw.ellipse((middle - 6, top, middle + 6, top + 12), fill=(255, 200, 160))
    draw.rectangle((left + 5, top + 13, right - 5, waist), fill=shirt)
    draw.rectangle((left, top + 13, left + 4, waist + 2), fill=(255, 200, 160))
    draw.rectangle((right - 4, top + 13, right, waist + 2), fill=(255, 200, 160))
    draw.rectangle((left + 5, waist + 1, middle - 2, bottom), fill=(30, 30, 110))
    draw.rectangle((middle + 2, waist + 1, right - 5, bottom), fill=(30, 30, 110))


def draw_bicycle(draw: ImageDraw.ImageDraw, box: Box, color: tuple[int, int, int]) -> None:
    """Two wheels, a frame and a handlebar."""
    left, top, right, bottom = box
    size = (right - left) * 9 // 20
    middle = (left + right) // 2
    hub = bottom - size // 2
    for x in (left, right - size):
        draw.ellipse((x, bottom - size, x + size, bottom), outline=color, width=3)
    rear, front = (left + size // 2, hub), (right - size // 2, hub)
    bar = (right - size // 2 - 4, top + 2)
    draw.line((rear, (middle, bottom - 4), bar, (left + size // 2 + 5, top + 6), rear),
              fill=color, width=3)
    draw.line((front, bar), fill=color, width=3)
    draw.rectangle((bar[0] - 6, top, bar[0] + 4, top + 3), fill=color)


def draw_horse(draw: ImageDraw.ImageDraw, box: Box, color: tuple[int, int, int]) -> None:
    """A body on four legs with neck, head and tail; it looks to the right."""
    left, top, right, bottom = box
    middle = (top + bottom) // 2
    draw.ellipse((left + 2, middle - 9, right - 6, middle + 9), fill=color)
    for x in (left + 5, left + 12, right - 18, right - 12):
        draw.rectangle((x, middle, x + 4, bottom), fill=color)
    draw.polygon(((right - 18, middle), (right - 8, middle + 2), (right - 3, top + 4),
                  (right - 12, top)), fill=color)
    draw.ellipse((right - 12, top, right, top + 10), fill=color)
    draw.line((left, middle + 10, left + 5, middle - 3), fill=color, width=3)


def draw_ball(draw: ImageDraw.ImageDraw, box: Box, color: tuple[int, int, int]) -> None:
    """A white ball with a dark rim and a patch."""
    left, top, right, bottom = box
    x, y = (left + right) // 2, (top + bottom) // 2
    draw.ellipse(box, fill=(250, 250, 250), outline=color, width=2)
    draw.regular_polygon((x, y, 7), 5, fill=color)


def draw_umbrella(draw: ImageDraw.ImageDraw, box: Box, color: tuple[int, int, int]) -> None:
    """A half disc above a stick."""
    left, top, right, bottom = box
    middle = (left + right) // 2
    draw.rectangle((middle - 1, top + 8, middle + 1, bottom), fill=(0, 0, 0))
    draw.pieslice((left, top, right, 2 * bottom - top - 16), 180, 360, fill=color)


PAINTERS = {"bicycle": (draw_bicycle, FRAMES), "horse": (draw_horse, COATS),
            "sports ball": (draw_ball, FRAMES),
            "umbrella": (draw_umbrella, ((200, 0, 200), (220, 0, 60), (120, 0, 255)))}


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene, people in front of objects; rng picks the colours of both."""
    image = Image.fromarray(background(scene.width))
    draw = ImageDraw.Draw(image)
    for hoi in scene.hois:
        paint, colors = PAINTERS[hoi.object_class]
        paint(draw, hoi.object, pick(colors, rng))
    for person in scene.people:
        draw_person(draw, person, pick(SHIRTS, rng))
    return image
