"""The scenes of the toy HICO-DET: one drawn person and one object on a colour gradient.

Where the two stand decides the verbs. Boxes are 0-based inclusive pixels, as in `hicodet`, and lie
on a 7-pixel grid, so that a coordinate is one of sixteen numbers. A layout (boxes, object class,
verbs) belongs either to training or to testing. The two kinds of RARE have at most eight training
scenes each, so that the Rare column of the evaluation has content.
"""

import zlib
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from hicodet import Box

SIDE, GRID = 112, 7
PERSON_SIZES = ((28, 42), (28, 56))
OBJECT_SIZES = {"bicycle": (42, 28), "horse": (42, 42), "sports ball": (28, 28),
                "umbrella": (42, 28)}
RARE_SCENES = 8  # HICO-DET calls an HOI class rare below 10 training pairs
TEST_SHARE = 4  # one layout in four is kept for testing


@dataclass(frozen=True)
class Kind:
    """One sort of scene: an object class, its verbs in HICO order, and where the person stands."""
    object_class: str
    verbs: tuple[str, ...]
    place: str


@dataclass(frozen=True)
class Scene:
    """One image: its kind and the person's and the object's box."""
    kind: Kind
    human: Box
    object: Box


KINDS = (
    Kind("bicycle", ("ride", "sit on"), "astride"),
    Kind("bicycle", ("hold",), "beside"),
    Kind("bicycle", ("no interaction",), "apart"),
    Kind("horse", ("ride", "straddle"), "astride"),
    Kind("horse", ("no interaction",), "apart"),
    Kind("sports ball", ("kick",), "at the feet"),
    Kind("sports ball", ("hold",), "in hand"),
    Kind("sports ball", ("no interaction",), "apart"),
    Kind("umbrella", ("hold", "stand under"), "overhead"),
)
RARE = (
    Kind("horse", ("hold",), "beside"),
    Kind("umbrella", ("no interaction",), "apart"),
)


def object_corners(human: Box, size: tuple[int, int], place: str) -> list[tuple[float, float]]:
    """All top left corners of an object of this size that stands in this place to the person."""
    left, top, right, bottom = human
    width, height = size
    touching = [left - width, left - width + GRID, right - GRID, right]
    centred = [left - 2 * GRID, left - GRID, left]
    if place == "astride":
        saddle = bottom - height // 2 // GRID * GRID
        return list(product(centred, (saddle - GRID, saddle)))
    if place in ("beside", "at the feet"):
        return list(product(touching, (bottom - height, bottom - height + GRID)))
    if place == "in hand":
        return list(product(touching, (top - GRID, top)))
    if place == "overhead":
        return list(product(centred, (top - height + GRID, top - height + 2 * GRID)))
    apart = [x for x in range(0, SIDE, GRID)
             if x <= left - width - 2 * GRID or x >= right + 2 * GRID]
    return list(product(apart, range(0, SIDE, GRID)))


def layouts(kind: Kind) -> list[Scene]:
    """All scenes of this kind whose boxes lie inside the image, in a fixed order."""
    width, height = OBJECT_SIZES[kind.object_class]
    scenes = []
    for x, y, size in product(range(0, SIDE, GRID), range(0, SIDE, GRID), PERSON_SIZES):
        human = (x, y, x + size[0], y + size[1])
        for left, top in object_corners(human, (width, height), kind.place):
            box = (left, top, left + width, top + height)
            if min(human + box) >= 0 and max(human + box) < SIDE:
                scenes.append(Scene(kind, human, box))
    return scenes


def is_test_layout(scene: Scene) -> bool:
    """Whether a layout is kept for testing: a fixed hash, so no seed mixes the two halves."""
    return zlib.crc32(repr(scene).encode()) % TEST_SHARE == 0


def draw_kinds(split: str, count: int, rng: np.random.Generator) -> list[Kind]:
    """The kinds of `count` scenes in random order: rare kinds get few training scenes."""
    if split == "test":
        kinds = (KINDS + RARE) * (count // len(KINDS + RARE) + 1)
        return [kinds[i] for i in rng.permutation(count)]
    rare = RARE * min(RARE_SCENES, count // 50)
    common = KINDS * (count // len(KINDS) + 1)
    kinds = (rare + common)[:count]
    return [kinds[i] for i in rng.permutation(count)]


def make_scenes(split: str, count: int, seed: int) -> list[Scene]:
    """`count` scenes of the "train" or "test" half; the same seed gives the same scenes."""
    rng = np.random.default_rng([seed, split == "test"])
    pool = {kind: [scene for scene in layouts(kind) if is_test_layout(scene) == (split == "test")]
            for kind in KINDS + RARE}
    return [pool[kind][rng.integers(len(pool[kind]))] for kind in draw_kinds(split, count, rng)]


SHIRTS = ((255, 255, 255), (40, 40, 220), (230, 230, 40), (20, 20, 20))
COATS = ((96, 52, 12), (60, 30, 10), (140, 80, 30))
FRAMES = ((0, 0, 0), (0, 0, 160), (120, 0, 0))


def background() -> np.ndarray:
    """(SIDE, SIDE, 3) uint8: red grows with x and green with y, so colour tells the place."""
    ramp = np.linspace(0, 255, SIDE)
    image = np.full((SIDE, SIDE, 3), 128.0)
    image[:, :, 0], image[:, :, 1] = ramp[None, :], ramp[:, None]
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
    """The picture of a scene; rng picks the colours of the shirt and of the object."""
    image = Image.fromarray(background())
    draw = ImageDraw.Draw(image)
    paint, colors = PAINTERS[scene.kind.object_class]
    paint(draw, scene.object, colors[rng.integers(len(colors))])
    draw_person(draw, scene.human, SHIRTS[rng.integers(len(SHIRTS))])
    return image
