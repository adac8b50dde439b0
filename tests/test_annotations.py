"""engine/data/annotations.py: the official .mat files, annotations.jsonl, and where images are."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import hicodet
from engine.data.annotations import SPLITS, load_split, require_images, splits, training_counts
from hicodet import HOI, InputError, Pair
from tests.annotation_files import box, hoi, image, own_line, record, write, write_labels, write_own
from tests.conftest import HICO_DET
from tests.pairs import BOX, FAR, HOLD_BICYCLE, RIDE_BICYCLE, RIDE_HORSE

REPO = Path(__file__).resolve().parents[1]

# ---- anno_bbox.mat and anno.mat


def test_boxes_become_0_based_without_overflow(tmp_path):
    # The corner pixel (1, 1) becomes (0, 0); a 0 in unsigned bytes becomes -1 and not 255.
    entry = hoi(1, humans=[box(1, 1, 255, 200)], objects=[box(0, 3, 4, 5)])
    (sample,) = load_split(write(tmp_path, image("a.jpg", entry)), "test")
    assert sample.pairs == (Pair((0, 0, 254, 199), (-1, 2, 3, 4), 0),)
    assert sample.hois == (HOI((0, 0, 254, 199), (-1, 2, 3, 4), "airplane", ("board",)),)
    assert (sample.width, sample.height) == (640, 480)


def test_connection_names_the_boxes_of_each_pair(tmp_path):
    humans = [box(1, 1, 11, 11), box(101, 101, 111, 111)]
    objects = [box(21, 21, 31, 31), box(41, 41, 51, 51), box(61, 61, 71, 71)]
    entry = hoi(2, connection=[[2, 3], [1, 1], [2, 1]], humans=humans, objects=objects)
    (sample,) = load_split(write(tmp_path, image("a.jpg", entry)), "train")
    far, near = (100, 100, 110, 110), (0, 0, 10, 10)
    first, last = (20, 20, 30, 30), (60, 60, 70, 70)
    assert sample.pairs == (Pair(far, last, 1), Pair(near, first, 1), Pair(far, first, 1))


def test_invisible_and_empty_entries(tmp_path):
    nothing = np.zeros((0, 0))
    hidden = hoi(RIDE_HORSE + 1, invis=1) | dict.fromkeys(
        ("bboxhuman", "bboxobject", "connection"), nothing
    )
    bare = hoi(1) | {"connection": nothing}
    images = image("a.jpg", hidden), image("b.jpg"), image("c.jpg", hoi(1), hidden, bare)
    a, b, c = load_split(write(tmp_path, *images), "test")
    assert a.pairs == a.hois == b.pairs == b.hois == ()
    assert a.known_objects == {"horse"} and b.known_objects == frozenset()
    assert [pair.hoi_id for pair in c.pairs] == [0]
    assert c.known_objects == {"airplane", "horse"}


def test_known_objects_come_from_the_image_level_labels(tmp_path):
    root = write(tmp_path, image("a.jpg", hoi(1)), image("b.jpg", hoi(2)))
    labels = np.full((600, 2), np.nan)  # not annotated
    labels[0] = [-1, 1]  # airplane: no, yes
    labels[RIDE_HORSE] = [1, 0]  # horse: yes, ambiguous
    write_labels(root, ["b.jpg", "a.jpg"], labels)  # not in the order of anno_bbox.mat
    a, b = load_split(root, "test")
    assert a.known_objects == {"airplane"} and b.known_objects == {"horse"}
    write_labels(root, ["b.jpg"], np.ones((600, 1)))
    with pytest.raises(InputError, match="a.jpg is not in the list of anno.mat"):
        load_split(root, "test")


WRONG_IMAGES = {
    "tuple index out of range": image("a", hoi(601)),
    "no field of name id": image("a", {k: v for k, v in hoi(1).items() if k != "id"}),
    "KeyError: 2": image("a", hoi(1, [[2, 1]])),
}


@pytest.mark.parametrize("message", WRONG_IMAGES)
def test_wrong_image_is_named(tmp_path, message):
    root = write(tmp_path, WRONG_IMAGES[message])
    with pytest.raises(InputError, match=rf"^{root}/anno_bbox.mat, bbox_test\(1\): .*{message}"):
        load_split(root, "test")


def test_wrong_files_are_named(tmp_path):
    good = image("a.jpg", hoi(1))
    with pytest.raises(FileNotFoundError, match="anno_bbox.mat is missing: .* annotations.jsonl"):
        load_split(tmp_path, "test")
    with pytest.raises(InputError, match="KeyError: 'bbox_test'"):
        load_split(write(tmp_path, good, bbox_test=None), "test")
    swapped = (hicodet.HOI_CLASSES[1], hicodet.HOI_CLASSES[0], *hicodet.HOI_CLASSES[2:])
    with pytest.raises(InputError, match="list_action: .*not the 600 HOI classes"):
        load_split(write(tmp_path, good, actions=swapped), "test")
    whole = (write(tmp_path, good) / "anno_bbox.mat").read_bytes()
    for content in (b"", b"<html>not found</html>" * 50, whole[: len(whole) // 2]):
        (tmp_path / "anno_bbox.mat").write_bytes(content)
        with pytest.raises(InputError, match="anno_bbox.mat: .*; expected the layout of hico_2016"):
            load_split(tmp_path, "test")


def test_real_annotations(real_samples):
    assert len(real_samples) == 9658
    assert sum(bool(sample.pairs) for sample in real_samples) == 9546
    assert sum(len(sample.pairs) for sample in real_samples) == 33405
    # 1-based in the file: people at (320, 306)-(359, 349) and (270, 303)-(311, 350), one bench
    first, bench = real_samples[0], (147, 344, 375, 413)
    humans = (319, 305, 358, 348), (269, 302, 310, 349)
    assert first.pairs == tuple(Pair(human, bench, 245) for human in humans)
    assert (first.width, first.height, first.known_objects) == (640, 427, {"bench"})
    counts = training_counts(HICO_DET)
    assert sum(counts) == 117871 and sum(count < 10 for count in counts) == 138


# ---- annotations.jsonl


RIDE, HOLD = (BOX, BOX, RIDE_BICYCLE), (BOX, FAR, HOLD_BICYCLE)
ELSEWHERE = (FAR, FAR, RIDE_HORSE)


def test_own_annotations_equal_official_ones(tmp_path):
    """The same pairs in both formats give the same samples and counts."""
    images = {"a.jpg": [RIDE, HOLD, HOLD], "b.jpg": [], "c.jpg": [ELSEWHERE, RIDE]}
    write(tmp_path, *(record(name, pairs) for name, pairs in images.items()))
    theirs, counts = [load_split(tmp_path, split) for split in SPLITS], training_counts(tmp_path)
    (tmp_path / "anno_bbox.mat").unlink()
    write_own(tmp_path, *(own_line(n, split, images[n]) for split in SPLITS for n in images))
    assert [load_split(tmp_path, split) for split in SPLITS] == theirs
    assert training_counts(tmp_path) == counts and len(theirs[0]) == 3


def test_own_annotations_may_have_one_split(tmp_path):
    write_own(tmp_path, own_line("a.jpg", "test", [RIDE]), own_line("b.jpg", "test"))
    assert [sample.file_name for sample in load_split(tmp_path, "test")] == ["a.jpg", "b.jpg"]
    assert splits(tmp_path) == ["test"] and not any(training_counts(tmp_path))
    with pytest.raises(InputError, match="annotations.jsonl: no image of the split 'train'"):
        load_split(tmp_path, "train")
    write(tmp_path, image("a.jpg"))
    with pytest.raises(InputError, match="has both anno_bbox.mat and annotations.jsonl; keep one"):
        load_split(tmp_path, "test")


def with_pair(**changes):
    line = own_line("b.jpg", pairs=[RIDE, HOLD])
    line["pairs"][1] |= changes
    return line


WRONG_LINES = {
    "not JSON (": '{"file_name": "b.jp',
    "'file_name' must be on one line of a split only; found 'a.jpg'": own_line("a.jpg"),
    "'split' must be \"train\" or \"test\"; found 'val'": own_line("b.jpg", "val"),
    "'width' and 'height' must be at least 1; found [0, 0]":
        own_line("b.jpg") | {"width": 0, "height": 0},
    "'height' of the line must be a whole number; found 9.5": own_line("b.jpg") | {"height": 9.5},
    "'verb' of pairs[1] must be a text; found ['ride']": with_pair(verb=["ride"]),
    "'verb' of pairs[1] must be one that HICO has with 'bike'": with_pair(object_class="bike"),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG_LINES)
def test_wrong_line_is_named(message, tmp_path):
    write_own(tmp_path, own_line("a.jpg", pairs=[RIDE]), WRONG_LINES[message])
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_split(tmp_path, "test")
    assert str(caught.value).startswith(f"{tmp_path}/annotations.jsonl, line 2: ")


# ---- where images are


@pytest.mark.parametrize("folder", ["images/test2015", "images"])
def test_images_are_in_the_folder_of_the_split_or_in_images(folder, tmp_path):
    write_own(tmp_path, own_line("a.jpg"), own_line("deep/b.jpg"))
    (tmp_path / folder).mkdir(parents=True)
    paths = [sample.path for sample in load_split(tmp_path, "test")]
    assert paths == [tmp_path / folder / "a.jpg", tmp_path / folder / "deep/b.jpg"]


def test_missing_images_are_counted_and_the_first_is_named(tmp_path):
    samples = load_split(write(tmp_path, image("a.jpg"), image("b.jpg")), "test")
    said = f"2 images are missing, first {tmp_path}/images/a.jpg .*hoi_r1.py check.*--exclude FILE"
    with pytest.raises(FileNotFoundError, match=said):
        require_images(samples)
    (tmp_path / "images").mkdir()
    for sample in samples:
        sample.path.touch()
    require_images(samples)


def test_converter_of_the_docs_writes_own_annotations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    boxes = [{"id": 5, "image_id": 1, "category_id": 7, "bbox": [0, 0, 10, 20]},
             {"id": 6, "image_id": 1, "category_id": 8, "bbox": [2.5, 3, 4, 5]}]  # fmt: skip
    images = [{"id": number, "file_name": name, "width": 64, "height": 48}
              for number, name in ((1, "a.jpg"), (2, "b.jpg"))]  # fmt: skip
    categories = [{"id": 7, "name": "person"}, {"id": 8, "name": "bicycle"}]
    coco = {"images": images, "annotations": boxes, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    (tmp_path / "hois.json").write_text('[{"human": 5, "object": 6, "verb": "ride"}]')
    page = (REPO / "docs" / "evaluation.md").read_text()
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {})
    a, b = load_split(tmp_path, "train")
    assert a.pairs == (Pair((0, 0, 9, 19), (2.5, 3, 5.5, 7), RIDE_BICYCLE),) and b.pairs == ()
