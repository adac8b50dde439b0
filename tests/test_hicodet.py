"""hicodet.py, the data set: annotations, merging, box frames."""

import random
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

import hicodet
from engine.data import annotations
from hicodet import HOI, Pair

SHARED = Path(__file__).resolve().parents[2] / "shared"
HICO_DET = SHARED / "hico_det"
HOLD_BICYCLE, RIDE_BICYCLE, SIT_ON_BICYCLE, RIDE_HORSE = map(
    hicodet.HOI_CLASSES.index,
    [("hold", "bicycle"), ("ride", "bicycle"), ("sit on", "bicycle"), ("ride", "horse")],
)
PERSON, BICYCLE = (10.0, 10.0, 50.0, 90.0), (20.0, 50.0, 80.0, 100.0)


def test_vocabulary():
    assert len(hicodet.OBJECTS) == len(set(hicodet.OBJECTS)) == 80
    assert hicodet.OBJECTS[:2] + hicodet.OBJECTS[-2:] == (
        "person", "bicycle", "hair drier", "toothbrush",
    )  # fmt: skip
    assert len(hicodet.VERBS) == len(set(hicodet.VERBS)) == 117
    assert hicodet.VERBS[57] == "no interaction"  # 58th of the official list of verbs
    assert len(hicodet.HOI_CLASSES) == len(set(hicodet.HOI_CLASSES)) == 600
    assert {name for _, name in hicodet.HOI_CLASSES} == set(hicodet.OBJECTS)
    assert sum(verb == "no interaction" for verb, _ in hicodet.HOI_CLASSES) == 80
    assert hicodet.HOI_CLASSES[0] == ("board", "airplane")
    assert hicodet.HOI_CLASSES[245] == ("sit on", "bench")
    assert hicodet.HOI_CLASSES[599] == ("no interaction", "zebra")


# What MATLAB writes, from dicts: a struct array is an object array with named fields.


def struct(*records):
    names = list(records[0]) if records else ["x1", "x2", "y1", "y2"]
    array = np.empty((1, len(records)), dtype=[(name, object) for name in names])
    for index, record in enumerate(records):
        for name in names:
            array[0, index][name] = record[name]
    return array


def box(x1, y1, x2, y2, dtype=np.uint8):
    sides = {"x1": x1, "x2": x2, "y1": y1, "y2": y2}
    return {name: np.array([[side]], dtype=dtype) for name, side in sides.items()}


def hoi(number, connection=((1, 1),), humans=None, objects=None, invis=0):
    return {
        "id": np.array([[number]], dtype=np.uint16 if isinstance(number, int) else float),
        "bboxhuman": struct(*(humans or [box(1, 2, 30, 40)])),
        "bboxobject": struct(*(objects or [box(5, 6, 70, 80)])),
        "connection": np.array(connection, dtype=np.uint8),
        "invis": np.array([[invis]], dtype=np.uint8),
    }


def image(name, *hois, size=(640, 480)):
    width, height = (np.array([[side]], dtype=np.uint16) for side in size)
    size = struct({"width": width, "height": height, "depth": np.uint8(3)})
    empty = np.zeros((0, 0))
    return {"filename": name, "size": size, "hoi": struct(*hois) if hois else empty}


def write(root, *images, actions=hicodet.HOI_CLASSES, **changes):
    """anno_bbox.mat with the images as both halves."""
    rows = [{"nname": n.replace(" ", "_"), "vname": v.replace(" ", "_")} for v, n in actions]
    variables = {"bbox_test": struct(*images), "bbox_train": struct(*images)}
    variables |= {"list_action": struct(*rows).T} | changes
    savemat(root / "anno_bbox.mat", {k: v for k, v in variables.items() if v is not None})
    return root


def write_labels(root, names, labels):
    files = np.array([[name] for name in names], dtype=object)
    savemat(root / "anno.mat", {"list_test": files, "anno_test": labels})


def test_boxes_are_moved_to_zero_once_and_do_not_wrap(tmp_path):
    # The corner pixel (1, 1) becomes (0, 0); a 0 in unsigned bytes becomes -1 and not 255.
    entry = hoi(1, humans=[box(1, 1, 255, 200)], objects=[box(0, 3, 4, 5)])
    (sample,) = annotations.load_split(write(tmp_path, image("a.jpg", entry)), "test")
    assert sample.pairs == (Pair((0, 0, 254, 199), (-1, 2, 3, 4), 0),)
    assert sample.hois == (HOI((0, 0, 254, 199), (-1, 2, 3, 4), "airplane", ("board",)),)
    assert (sample.width, sample.height) == (640, 480)
    assert sample.path == tmp_path / "images" / "test2015" / "a.jpg"


def test_connection_names_the_boxes_of_each_pair(tmp_path):
    humans = [box(1, 1, 11, 11), box(101, 101, 111, 111)]
    objects = [box(21, 21, 31, 31), box(41, 41, 51, 51), box(61, 61, 71, 71)]
    entry = hoi(2, connection=[[2, 3], [1, 1], [2, 1]], humans=humans, objects=objects)
    (sample,) = annotations.load_split(write(tmp_path, image("a.jpg", entry)), "train")
    far, near = (100, 100, 110, 110), (0, 0, 10, 10)
    first, last = (20, 20, 30, 30), (60, 60, 70, 70)
    assert sample.pairs == (Pair(far, last, 1), Pair(near, first, 1), Pair(far, first, 1))
    assert sample.path.parent.name == "train2015"


def test_invisible_and_empty_entries(tmp_path):
    nothing = np.zeros((0, 0))
    hidden = hoi(RIDE_HORSE + 1, invis=1) | dict.fromkeys(
        ("bboxhuman", "bboxobject", "connection"), nothing
    )
    bare = hoi(1) | {"connection": nothing}
    images = image("a.jpg", hidden), image("b.jpg"), image("c.jpg", hoi(1), hidden, bare)
    a, b, c = annotations.load_split(write(tmp_path, *images), "test")
    assert a.pairs == a.hois == b.pairs == b.hois == ()
    assert a.known_objects == {"horse"} and b.known_objects == frozenset()
    assert [pair.hoi_id for pair in c.pairs] == [0]
    assert c.known_objects == {"airplane", "horse"}


def test_known_objects_come_from_the_image_level_labels(tmp_path):
    root = write(tmp_path, image("a.jpg", hoi(1)), image("b.jpg", hoi(2)))
    labels = np.full((600, 2), np.nan)  # not asked
    labels[0] = [-1, 1]  # airplane: no, yes
    labels[RIDE_HORSE] = [1, 0]  # horse: yes, ambiguous
    write_labels(root, ["b.jpg", "a.jpg"], labels)  # another order than anno_bbox.mat's
    a, b = annotations.load_split(root, "test")
    assert a.known_objects == {"airplane"} and b.known_objects == {"horse"}


def test_training_counts(tmp_path):
    entry = hoi(3, connection=[[1, 1], [1, 1]])
    hidden = hoi(3, invis=1)
    counts = annotations.training_counts(write(tmp_path, image("a", entry), image("b", hidden, entry)))
    assert counts[2] == 4 and sum(counts) == 4 and len(counts) == 600


NO_ID = {name: value for name, value in hoi(1).items() if name != "id"}
WRONG_IMAGES = {
    "field id: 0 ": image("a", hoi(0)),
    "field id: 601 ": image("a", hoi(601)),
    "field id: 1.5 ": image("a", hoi(1.5)),
    "no field of name id": image("a", NO_ID),
    r"field connection: \(2, 1\) points beyond 1 human and 1 object": image("a", hoi(1, [[2, 1]])),
    r"field connection: \(1, 0\) points": image("a", hoi(1, [[1, 0]])),
    r"field connection: \(1.5, 1\)": image("a", hoi(1) | {"connection": np.array([[1.5, 1]])}),
    r"field connection: uint8 \(1, 3\)": image("a", hoi(1, [[1, 1, 1]])),
    "field y1: nan is not finite": image("a", hoi(1, humans=[box(1, np.nan, 2, 2, float)])),
    "field x1": image("a", hoi(1) | {"bboxhuman": np.array([[1.0, 2.0, 3.0, 4.0]])}),
    "field size": image("a", hoi(1), size=(0, 480)),
    "no field of name size": {"filename": "a", "hoi": struct(hoi(1))},
    "field filename": image(np.zeros((0, 0)), hoi(1)),
    "field width": image("a", hoi(1)) | {"size": np.array([[640, 480]])},
}


@pytest.mark.parametrize("message", WRONG_IMAGES)
def test_wrong_annotation_is_named(tmp_path, message):
    with pytest.raises(ValueError, match=message) as caught:
        annotations.load_split(write(tmp_path, WRONG_IMAGES[message]), "test")
    where = f"{tmp_path / 'anno_bbox.mat'}, bbox_test(1): "
    assert str(caught.value).startswith(where) and "hico_20160224_det" in str(caught.value)


def test_wrong_files_are_named(tmp_path):
    good = image("a.jpg", hoi(1))
    with pytest.raises(FileNotFoundError, match="anno_bbox.mat is missing"):
        annotations.load_split(tmp_path, "test")
    with pytest.raises(ValueError, match="not 'val'"):
        annotations.load_split(write(tmp_path, good), "val")
    with pytest.raises(ValueError, match=r"bbox_test\(2\): field filename: a.jpg .* second time"):
        annotations.load_split(write(tmp_path, good, good), "test")
    with pytest.raises(ValueError, match="no variable bbox_test"):
        annotations.load_split(write(tmp_path, good, bbox_test=None), "test")
    swapped = (hicodet.HOI_CLASSES[1], hicodet.HOI_CLASSES[0], *hicodet.HOI_CLASSES[2:])
    other = [("fly", "kite"), *hicodet.HOI_CLASSES[1:]]
    for actions in (swapped, hicodet.HOI_CLASSES[:599], other):
        with pytest.raises(ValueError, match="list_action: not the 600 HOI classes"):
            annotations.load_split(write(tmp_path, good, actions=actions), "test")
    whole = (write(tmp_path, good) / "anno_bbox.mat").read_bytes()
    for content in (b"", b"<html>not found</html>" * 50, whole[: len(whole) // 2], whole[:200]):
        (tmp_path / "anno_bbox.mat").write_bytes(content)
        with pytest.raises(ValueError, match="anno_bbox.mat is not a readable .mat file"):
            annotations.load_split(tmp_path, "test")


def test_labels_of_other_images_are_refused(tmp_path):
    root = write(tmp_path, image("a.jpg", hoi(1)))
    write_labels(root, ["b.jpg"], np.ones((600, 1)))
    with pytest.raises(ValueError, match="a.jpg is not in the list of anno.mat"):
        annotations.load_split(root, "test")
    write_labels(root, ["a.jpg"], np.ones((600, 2)))
    with pytest.raises(ValueError, match=r"anno.mat: anno_test has shape \(600, 2\)"):
        annotations.load_split(root, "test")


def test_require_images(tmp_path):
    samples = annotations.load_split(write(tmp_path, image("a.jpg"), image("b.jpg")), "test")
    with pytest.raises(FileNotFoundError, match="2 images are missing, first .*a.jpg"):
        annotations.require_images(samples)
    for sample in samples:
        sample.path.parent.mkdir(parents=True, exist_ok=True)
        sample.path.touch()
    annotations.require_images(samples)


def test_real_annotations(real_samples):
    assert len(real_samples) == 9658
    assert sum(bool(sample.pairs) for sample in real_samples) == 9546
    assert sum(len(sample.pairs) for sample in real_samples) == 33405
    # First image: human boxes (320, 306)-(359, 349), (270, 303)-(311, 350) and one bench, from 1.
    first = real_samples[0]
    bench = (147, 344, 375, 413)
    humans = (319, 305, 358, 348), (269, 302, 310, 349)
    assert first.pairs == tuple(Pair(human, bench, 245) for human in humans)
    assert (first.width, first.height, first.known_objects) == (640, 427, {"bench"})
    counts = annotations.training_counts(HICO_DET)
    assert sum(counts) == 117871 and sum(count < 10 for count in counts) == 138


def test_real_merging(real_samples):
    hois = [hoi for sample in real_samples for hoi in sample.hois]
    # With widths counted as x2 - x1 + 1 there would be 22,145.
    assert len(hois) == 22221
    assert sum(len(hoi.verbs) for hoi in hois) == 33405  # every pair is in one instance
    assert all(len(set(hoi.verbs)) == len(hoi.verbs) for hoi in hois)
    assert max(len(sample.hois) for sample in real_samples) == 161


def test_iou():
    # 10 x 10 and 10 x 10, shifted by 5: shared 5 x 10 = 50 of 100 + 100 - 50 = 150.
    assert hicodet.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert hicodet.iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert hicodet.iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0  # they touch
    assert hicodet.iou((5, 5, 5, 9), (0, 0, 10, 10)) == 0  # empty
    assert hicodet.iou((10, 10, 0, 0), (10, 10, 0, 0)) == 0  # inverted
    for side in (1e300, 1e-300):
        assert hicodet.iou((0, 0, side, side), (0, 0, side, side)) == 0  # area inf, and 0
    assert hicodet.iou((-1e308, -1e308, 1e308, 1e308), (0, 0, 1, 1)) == 0


def test_iou_counts_cells():
    rng = np.random.default_rng()
    for _ in range(300):
        a, b = (tuple(map(float, rng.integers(0, 12, 4))) for _ in range(2))
        rows, columns = np.mgrid[0:12, 0:12]
        in_a, in_b = (
            (columns >= x1) & (columns < x2) & (rows >= y1) & (rows < y2)
            for x1, y1, x2, y2 in (a, b)
        )
        expected = (in_a & in_b).sum() / max((in_a | in_b).sum(), 1)
        assert hicodet.iou(a, b) == hicodet.iou(b, a) == pytest.approx(expected), (a, b)


def shifted(box, by):
    return box[0] + by, box[1], box[2] + by, box[3]


def test_merging_joins_verbs_on_overlapping_boxes():
    pairs = [
        Pair(PERSON, BICYCLE, RIDE_BICYCLE),
        Pair(shifted(PERSON, 4), shifted(BICYCLE, 4), SIT_ON_BICYCLE),
        Pair(PERSON, BICYCLE, RIDE_HORSE),
    ]
    ride = HOI(PERSON, BICYCLE, "bicycle", ("ride", "sit on"))  # boxes of the first
    assert hicodet.merge_pairs(pairs) == (ride, HOI(PERSON, BICYCLE, "horse", ("ride",)))
    assert hicodet.merge_pairs([]) == ()


def test_merging_needs_both_boxes_and_another_verb():
    far = shifted(PERSON, 500), shifted(BICYCLE, 500)
    for human, obj in ((far[0], BICYCLE), (PERSON, far[1]), far):
        pairs = [Pair(PERSON, BICYCLE, RIDE_BICYCLE), Pair(human, obj, SIT_ON_BICYCLE)]
        assert len(hicodet.merge_pairs(pairs)) == 2
    assert len(hicodet.merge_pairs([Pair(PERSON, BICYCLE, RIDE_BICYCLE)] * 2)) == 2
    # (0, 0, 10, 10) and (0, 0, 10, 5) share 50 of 100: exactly 0.5 is not enough.
    half = Pair((0, 0, 10, 5), BICYCLE, SIT_ON_BICYCLE)
    assert len(hicodet.merge_pairs([Pair((0, 0, 10, 10), BICYCLE, RIDE_BICYCLE), half])) == 2


def test_merging_prefers_the_best_overlap_and_then_the_earliest():
    # Width 40, shifted by 8: 32 / 48 = 0.67; by 2: 38 / 42 = 0.90.
    left, right = shifted(PERSON, -8), shifted(PERSON, 2)
    pairs = [Pair(left, BICYCLE, RIDE_BICYCLE), Pair(right, BICYCLE, RIDE_BICYCLE)]
    pairs.append(Pair(PERSON, BICYCLE, SIT_ON_BICYCLE))
    assert [hoi.verbs for hoi in hicodet.merge_pairs(pairs)] == [("ride",), ("ride", "sit on")]
    # The next verb prefers that instance too, and a second "sit on" is left for the other.
    pairs += [Pair(PERSON, BICYCLE, HOLD_BICYCLE), Pair(PERSON, BICYCLE, SIT_ON_BICYCLE)]
    assert [hoi.verbs for hoi in hicodet.merge_pairs(pairs)] == [
        ("ride", "sit on"), ("ride", "sit on", "hold"),
    ]  # fmt: skip
    same = [Pair(PERSON, BICYCLE, RIDE_BICYCLE)] * 2 + [Pair(PERSON, BICYCLE, SIT_ON_BICYCLE)]
    assert [hoi.verbs for hoi in hicodet.merge_pairs(same)] == [("ride", "sit on"), ("ride",)]


def test_frames():
    # 640 x 427 becomes 644 x 420: x times 644 / 640, y times 420 / 427.
    size, model = (640, 427), (644, 420)
    there = hicodet.to_model_frame((320, 305, 640, 427), size, model)
    assert there == pytest.approx((322, 300, 644, 420))
    assert hicodet.to_image_frame(there, size, model) == pytest.approx((320, 305, 639, 426))
    assert hicodet.to_image_frame((-5, -1e308, 1e308, 999), size, model) == (0, 0, 639, 426)
    rng = random.Random()
    for _ in range(100):
        box = tuple(rng.uniform(0, side - 1) for side in size * 2)
        back = hicodet.to_image_frame(hicodet.to_model_frame(box, size, model), size, model)
        assert back == pytest.approx(box)
