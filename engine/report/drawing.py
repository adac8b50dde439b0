"""Ground truth and prediction of one image side by side, one colour per pair.

A predicted pair has the colour of the true pair that it finds, and is grey if it finds none. The
labels of missed true pairs say so. A line runs from the person, where it has a dot, to the object.
Labels do not cover each other. A label without room is a line of text below the picture.
Boxes are xyxy in pixels of the original image.
"""

import textwrap
from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont

from hicodet import HOI, Box, in_frame, iou

COLOURS = ("#0072b2", "#d1495b", "#00875f", "#8e44ad", "#b35900", "#00829b", "#5f6b00", "#a13d7d")
UNMATCHED = "#5c6066"
MATCH_IOU = 0.5  # Sec. 4.1


def match_pairs(truth: Sequence[HOI], predicted: Sequence[HOI]) -> list[int | None]:
    """The index of the true pair that each predicted pair finds; None if it finds none.

    In the order of the predictions, each takes the free true pair of its object class that it
    overlaps most, if the smaller of the two IoUs is at least 0.5. Verbs do not matter.
    """
    found: list[int | None] = []
    for pair in predicted:
        overlaps = [
            (min(iou(pair.human, true.human), iou(pair.object, true.object)), -index)
            for index, true in enumerate(truth)
            if true.object_class == pair.object_class and index not in found
        ]
        overlap, index = max(overlaps, default=(0.0, 0))
        found.append(-index if overlap >= MATCH_IOU else None)
    return found


def missed_pairs(truth: Sequence[HOI], predicted: Sequence[HOI]) -> int:
    """The number of (pair, verb) of the ground truth that no prediction names."""
    matches = zip(match_pairs(truth, predicted), predicted, strict=True)
    named = {(index, verb) for index, pair in matches for verb in pair.verbs}
    return len({(i, verb) for i, pair in enumerate(truth) for verb in pair.verbs} - named)


def compare(
    image: Image.Image, truth: Sequence[HOI], predicted: Sequence[HOI], *, width: int = 640
) -> tuple[Image.Image, Image.Image]:
    """The picture of the ground truth and the picture of the prediction, each `width` wide."""
    found = match_pairs(truth, predicted)
    notes = ["" if index in found else " (missed)" for index in range(len(truth))]
    left = draw_pairs(image, truth, range(len(truth)), notes, width=width)
    return left, draw_pairs(image, predicted, found, width=width)


def draw_pairs(
    image: Image.Image,
    hois: Sequence[HOI],
    colours: Sequence[int | None],
    notes: Sequence[str] = (),
    *,
    width: int = 640,
    caption: str = "",
) -> Image.Image:
    """A new picture, `width` wide, with both boxes of every pair, its line and its label.

    colours: for each pair an index into COLOURS that wraps around, or None for grey.
    notes: added to each label. caption: written below the picture.
    """
    size = width, max(1, round(width * image.height / image.width))
    picture = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(17, width // 32))
    labels = []
    for hoi, colour, note in zip(hois, colours, notes or [""] * len(hois), strict=True):
        tone = UNMATCHED if colour is None else COLOURS[colour % len(COLOURS)]
        scaled = in_frame(hoi, image.size, size)
        boxes = [  # as Pillow wants them: a model may have exchanged corners
            (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
            for x1, y1, x2, y2 in (scaled.human, scaled.object)
        ]
        _draw_pair(draw, *boxes, tone, thick=max(3, width // 200))
        # several pairs may share the larger box, so the label is at the smaller one
        smaller = min(boxes, key=lambda b: (b[2] - b[0]) * (b[3] - b[1]))
        labels.append((f"{', '.join(hoi.verbs)} {hoi.object_class}{note}", smaller, tone))
    left_out = _draw_labels(draw, size, font, labels)  # last, so that no line crosses one
    return _with_lines_below(picture, [caption] * bool(caption) + left_out, font)


def side_by_side(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """One picture of several, on white, aligned at the top."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + gap
    return sheet


def _draw_pair(draw: ImageDraw.ImageDraw, human: Box, obj: Box, tone: str, *, thick: int) -> None:
    """Both boxes and the line between their centres, with a white edge that shows on any image."""
    ends = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in (human, obj)]
    for colour, extra in (("white", 1), (tone, 0)):
        for x1, y1, x2, y2 in (human, obj):
            corners = (x1 - extra, y1 - extra, x2 + extra, y2 + extra)
            draw.rectangle(corners, outline=colour, width=thick + 2 * extra)
        draw.line(ends, fill=colour, width=thick + 2 * extra)
        draw.circle(ends[0], 2 * thick + extra, fill=colour)


def _draw_labels(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], font, labels: Iterable[tuple[str, Box, str]]
) -> list[str]:
    """Write each (text, box, colour) at the free height nearest to the lower side of its box.

    size: of the picture. Returns the texts without room.
    """
    taken: list[Box] = []
    left_out, height = [], round(font.size * 1.45)
    for text, box, tone in labels:
        width = font.getlength(text) + font.size * 0.8
        x = min(max((box[0] + box[2] - width) / 2, 0), max(size[0] - width, 0))
        heights = sorted(range(0, size[1] - height, 4), key=lambda y: abs(y - box[3] - 2))
        places = ((x, y, x + width, y + height) for y in heights if width <= size[0])
        place = next((p for p in places if not any(iou(p, other) for other in taken)), None)
        if place is None:
            left_out.append(text)
            continue
        taken.append(place)
        draw.rounded_rectangle(place, radius=height // 5, fill=tone)
        middle = x + width / 2, place[1] + height / 2
        draw.text(middle, text, fill="white", font=font, anchor="mm")
    return left_out


def _with_lines_below(picture: Image.Image, lines: Iterable[str], font) -> Image.Image:
    """The picture with lines of text below it. Equal lines are written once."""
    columns = max(1, int(picture.width / font.getlength("n")) - 2)
    rows = [row for line in dict.fromkeys(lines) for row in textwrap.wrap(line, columns)]
    step = round(font.size * 1.4)
    sheet = Image.new("RGB", (picture.width, picture.height + step * len(rows)), "white")
    sheet.paste(picture)
    for number, row in enumerate(rows):
        middle = font.size / 2, picture.height + (number + 0.5) * step
        ImageDraw.Draw(sheet).text(middle, row, fill="black", font=font, anchor="lm")
    return sheet
