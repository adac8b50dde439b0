"""Pictures of HOIs."""

import textwrap
from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from hicodet import HOI, to_model_frame

HUMAN_COLOUR = (30, 144, 255)


OBJECT_COLOURS = ((214, 39, 40), (44, 140, 44), (148, 84, 190), (200, 100, 10), (0, 128, 128))


def draw_hois(
    image: Image.Image, hois: Iterable[HOI], *, caption: str = "", min_side: int = 480
) -> Image.Image:
    """A new picture with both boxes of every HOI, a line between their centres, and its label.

    Boxes are in pixels of `image`. People are blue; an HOI's object, line and label share another
    colour. An image whose shorter side is below `min_side` is enlarged to it, so that labels can
    be read. `caption` is written below.
    """
    scale = max(1.0, min_side / min(image.size))
    size = round(image.width * scale), round(image.height * scale)
    picture = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(14, min(size) // 32))
    labels, line_width = [], max(2, min(size) // 200)
    for index, hoi in enumerate(hois):
        colour = OBJECT_COLOURS[index % len(OBJECT_COLOURS)]
        human, obj = (to_model_frame(box, image.size, size) for box in (hoi.human, hoi.object))
        for (x1, y1, x2, y2), outline in ((human, HUMAN_COLOUR), (obj, colour)):
            corners = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
            draw.rectangle(corners, outline=outline, width=line_width)
        centres = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in (human, obj)]
        draw.line(centres, fill=colour, width=line_width)
        lines = _wrap(f"{', '.join(hoi.verbs)} {hoi.object_class}", font, size[0])
        labels.append((lines, (centres[1][0], obj[3]), colour))
    _draw_labels(draw, size, font, labels)  # last, so that no line crosses them
    return _with_caption(picture, _wrap(caption, font, size[0]), font) if caption else picture


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    columns = max(1, int(width / font.getlength("n")) - 2)
    return [row for line in text.splitlines() for row in textwrap.wrap(line, columns) or [""]]


def _draw_labels(draw, size: tuple[int, int], font: ImageFont.FreeTypeFont, labels: list) -> None:
    """Writes each (lines, (x, y), colour) in the free rows nearest below y, else above it."""
    step, taken = round(font.size * 1.5), []
    for lines, (x, y), colour in labels:
        width = max(map(font.getlength, lines)) + font.size
        left = min(max(x - width / 2, 0), max(size[0] - width, 0))
        last = max(size[1] // step - len(lines), 0)
        first = min(max(int(y // step) + 1, 0), last)
        busy = {row for row, start, end in taken if start < left + width and left < end}
        rows = (*range(first, last + 1), *range(first - 1, -1, -1))
        free = (row for row in rows if busy.isdisjoint(range(row, row + len(lines))))
        row = next(free, first)
        taken += [(row + line, left, left + width) for line in range(len(lines))]
        bottom = (row + len(lines)) * step
        draw.rectangle((left, row * step, left + width, bottom - 1), fill=colour)
        middle = left + width / 2, (row * step + bottom) / 2
        draw.text(middle, "\n".join(lines), fill="white", font=font, anchor="mm", align="center")


def _with_caption(picture: Image.Image, lines: list[str], font) -> Image.Image:
    step = round(font.size * 1.4)
    height = picture.height + step * len(lines) + step // 2
    result = Image.new("RGB", (picture.width, height), "white")
    result.paste(picture)
    draw = ImageDraw.Draw(result)
    for index, line in enumerate(lines):
        top = picture.height + index * step + step // 4
        draw.text((font.size / 2, top), line, fill="black", font=font)
    return result
