"""Pictures of ground truth and prediction side by side."""

from dataclasses import replace

import numpy as np
from PIL import Image

from engine.report import drawing
from hicodet import HOI

RIDE = HOI((0.0, 0.0, 10.0, 10.0), (10.0, 0.0, 20.0, 10.0), "bicycle", ("ride", "sit on"))
HOLD = HOI((0.0, 20.0, 10.0, 30.0), (10.0, 20.0, 20.0, 30.0), "bicycle", ("hold",))
FIRST, SECOND, GREY = (
    tuple(bytes.fromhex(colour[1:])) for colour in (*drawing.COLOURS[:2], drawing.UNMATCHED)
)


def moved(hoi, right):
    boxes = ((x1 + right, y1, x2 + right, y2) for x1, y1, x2, y2 in (hoi.human, hoi.object))
    return HOI(*boxes, hoi.object_class, hoi.verbs)


def test_match_takes_the_free_pair_with_the_largest_overlap():
    # moved by 3 of 10 pixels two boxes share 7 of 13, above one half; by 4 only 6 of 14
    assert drawing.match_pairs([RIDE, HOLD], [moved(HOLD, 3), RIDE, RIDE]) == [1, 0, None]
    assert drawing.match_pairs([RIDE], [moved(RIDE, 4)]) == [None]
    assert drawing.match_pairs([moved(RIDE, 3), RIDE], [RIDE]) == [1]
    assert drawing.match_pairs([RIDE], [replace(RIDE, object_class="motorcycle")]) == [None]


def test_missed_pairs_counts_verbs():
    assert drawing.missed_pairs([RIDE, HOLD], []) == 3
    assert drawing.missed_pairs([RIDE, HOLD], [replace(moved(RIDE, 1), verbs=("ride",))]) == 2
    assert drawing.missed_pairs([RIDE, HOLD], [RIDE, HOLD]) == 0


def test_labels_of_one_place_do_not_cover_each_other():
    pair = HOI((0, 0, 4, 4), (99, 99, 103, 103), "dog", ("pet",))
    drawn = drawing.draw_pairs(Image.new("RGB", (200, 200)), [pair] * 2, range(2), width=200)
    first, second = (  # the rows of the picture in which at least 20 pixels have a label's colour
        set(np.flatnonzero((np.asarray(drawn) == colour).all(axis=2).sum(axis=1) > 20))
        for colour in (FIRST, SECOND)
    )
    assert min(len(first), len(second)) > 20 and not first & second


def test_labels_without_room_are_written_below():
    long = replace(RIDE, verbs=tuple(f"verb {i}" for i in range(40)))  # wider than the picture
    image = Image.new("RGB", (100, 50))
    assert drawing.draw_pairs(image, [long], [0], width=200).height > 100
    many = drawing.draw_pairs(image, [RIDE] * 100, range(100), width=200)
    once = drawing.draw_pairs(image, [RIDE] * 90, range(90), width=200)
    assert many.size == once.size > (200, 100)  # equal lines are one


def test_caption_is_written_below():
    image = Image.new("RGB", (100, 50))
    for caption in ("two people", "Two people.\n自転車 \ud800\x00" * 9):
        picture = drawing.draw_pairs(image, [], [], width=200, caption=caption)
        below = picture.crop((0, 100, 200, picture.height)).convert("L")
        assert picture.width == 200 and below.getextrema() == (0, 255)  # black on white


def test_pair_is_drawn_where_it_is_and_the_object_is_labelled():
    image = Image.new("RGB", (600, 500), "white")
    hoi = HOI((50, 60, 200, 400), (300, 100, 500, 300), "bicycle", ("ride", "sit on"))
    drawn = drawing.draw_pairs(image, [hoi], [0], width=600)
    corners = [(50, 60), (200, 400), (300, 200), (400, 100)]  # and places on the sides
    assert {drawn.getpixel(place) for place in corners} == {FIRST}
    # the line runs from (125, 230), where it has a dot, to (400, 200)
    assert drawn.getpixel((125, 235)) == FIRST == drawn.getpixel((262, 215))
    label = drawn.crop((310, 304, 490, 325))  # below the object: its colour, white letters
    counts = {rgb: count for count, rgb in label.getcolors(maxcolors=10**5)}
    assert counts[FIRST] > 1500 and counts[255, 255, 255] > 100
    assert drawn.getpixel((20, 480)) == (255, 255, 255)


def test_matched_pairs_share_a_colour_and_others_are_grey():
    image = Image.new("RGB", (100, 50))
    left, right = drawing.compare(image, [HOLD, RIDE], [RIDE, moved(HOLD, 50)], width=300)
    colours = [{colour for _, colour in p.getcolors(10**6)} for p in (left, right)]
    assert {FIRST, SECOND} <= colours[0] and GREY not in colours[0]
    assert {SECOND, GREY} <= colours[1] and FIRST not in colours[1]
    named, missed = (drawing.compare(image, [RIDE], found)[0] for found in ([RIDE], []))
    assert named.tobytes() != missed.tobytes()  # its label says so


def test_inverted_box_is_drawn_and_the_image_is_not_changed():
    image, wrong = Image.new("RGB", (100, 50)), HOI((30, 30, 5, 5), (9, 9, 9, 9), "dog", ())
    drawing.draw_pairs(image, [wrong], [None])
    assert image.getcolors() == [(5000, (0, 0, 0))]
