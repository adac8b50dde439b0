"""hicodet.py, the files beside the annotations that keep what was read from them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import hicodet
from tests.test_hicodet import HICO_DET, box, hoi, image, struct, write, write_labels

CACHE = "anno_bbox.test.cache.json"


@pytest.fixture
def reads(monkeypatch):
    """The names of the .mat files that are parsed, in order."""
    names, read = [], hicodet._read_mat

    def noted(path, variables):
        names.append(path.name)
        return read(path, variables)

    monkeypatch.setattr(hicodet, "_read_mat", noted)
    return names


@pytest.fixture
def root(tmp_path):
    """Two images: several pairs, an invisible entry, a name and a box that are odd."""
    a = hoi(1, connection=[[1, 1], [1, 1]]), hoi(3), hoi(600, invis=1)
    b = hoi(2, humans=[box(1.1, 2, 30, 1e300, float)])
    return write(tmp_path, image("a.jpg", *a), image("ü b.jpg", b))


def test_the_second_time_equals_the_first(root, reads):
    first = [hicodet.load_split(root, split) for split in ("train", "test")]
    counts = hicodet.training_counts(root)
    assert len(reads) == 3
    assert [hicodet.load_split(root, split) for split in ("train", "test")] == first
    assert hicodet.training_counts(root) == counts and sum(counts) == 4
    assert len(reads) == 3
    (a, b), _ = first
    assert len(a.pairs) == 3 and b.pairs[0].human == (1.1 - 1, 1, 29, 1e300)
    assert a.known_objects == {"airplane", "zebra"} and b.path.name == "ü b.jpg"


def test_paths_are_those_of_the_folder_as_it_is_called_now(root, reads):
    hicodet.load_split(root, "test")
    del reads[:]
    moved = root.rename(root.with_name("moved"))
    assert hicodet.load_split(moved, "test")[0].path == moved / "images" / "test2015" / "a.jpg"
    assert not reads


def test_a_changed_mat_is_read_again(root, reads):
    hicodet.load_split(root, "test"), hicodet.training_counts(root)
    write(root, image("c.jpg", hoi(5)))
    (sample,) = hicodet.load_split(root, "test")
    assert sample.file_name == "c.jpg" and hicodet.training_counts(root)[4] == 1
    # The image-level labels come, change and go.
    for known in ({"airplane"}, {"zebra"}):
        labels = np.zeros((len(hicodet.PAIRS), 1))
        labels[[pair[1] in known for pair in hicodet.PAIRS]] = 1
        write_labels(root, ["c.jpg"], labels)
        for _ in range(2):
            assert hicodet.load_split(root, "test")[0].known_objects == known
    (root / "anno.mat").unlink()
    assert hicodet.load_split(root, "test") == [sample]
    (root / "anno.mat").write_bytes(b"")  # an empty file is not the same as none
    with pytest.raises(ValueError, match="anno.mat is not a readable"):
        hicodet.load_split(root, "test")


def test_another_format_is_read_again(root, reads, monkeypatch):
    hicodet.load_split(root, "test")
    monkeypatch.setattr(hicodet, "CACHE_FORMAT", hicodet.CACHE_FORMAT + 1)
    hicodet.load_split(root, "test")
    assert len(reads) == 2


def test_without_the_mat_nothing_is_loaded(root):
    hicodet.load_split(root, "test")
    (root / "anno_bbox.mat").unlink()
    with pytest.raises(FileNotFoundError, match="anno_bbox.mat is missing"):
        hicodet.load_split(root, "test")


SPOILS = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "last byte": lambda whole: whole[:-1],
    "seal alone": lambda whole: whole[:65],
    "longer": lambda whole: whole + b" ",
    "another number": lambda whole: whole.replace(b"640", b"641", 1),
    "foreign JSON": lambda whole: b'[["c.jpg",640,480,[],[]]]',
    "foreign bytes": lambda whole: b"\x80\x04\x95\n\xff" * 100,
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_spoilt_cache_is_replaced(root, reads, spoil):
    samples = hicodet.load_split(root, "test")
    whole = (root / CACHE).read_bytes()
    (root / CACHE).write_bytes(SPOILS[spoil](whole))
    assert (root / CACHE).read_bytes() != whole
    for _ in range(2):
        assert hicodet.load_split(root, "test") == samples
    assert len(reads) == 2 and (root / CACHE).read_bytes() == whole


def test_the_cache_of_another_split_is_not_taken(root):
    write(root, image("a.jpg"), bbox_train=struct(image("b.jpg")))
    (train,) = hicodet.load_split(root, "train")
    shutil.copy(root / "anno_bbox.train.cache.json", root / CACHE)
    (test,) = hicodet.load_split(root, "test")
    assert (train.file_name, test.file_name) == ("b.jpg", "a.jpg")


def test_a_folder_without_write_permission_stays_as_it_is(root):
    before = sorted(root.iterdir())
    root.chmod(0o555)  # root could write all the same
    try:
        assert hicodet.load_split(root, "test") == hicodet.load_split(root, "test")
        assert sorted(root.iterdir()) == before
    finally:
        root.chmod(0o755)


def test_a_cache_that_cannot_be_written_is_done_without(root, reads):
    (root / CACHE).mkdir()  # neither read nor replaced by a file
    before = sorted(root.iterdir())
    assert hicodet.load_split(root, "test") == hicodet.load_split(root, "test")
    assert len(reads) == 2 and sorted(root.iterdir()) == before


def test_a_process_killed_in_writing_leaves_a_cut_file_and_no_other(root, reads, monkeypatch):
    write = Path.write_bytes

    def killed(path, content):
        write(path, content[: len(content) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_bytes", killed)
        hicodet.load_split(root, "test")
    assert {path.name for path in root.iterdir()} == {"anno_bbox.mat", CACHE}
    for _ in range(2):
        assert len(hicodet.load_split(root, "test")) == 2
    assert len(reads) == 2


def test_a_full_disk_leaves_no_file(root, monkeypatch):
    write = Path.write_bytes

    def full(path, content):
        write(path, content[: len(content) // 2])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert len(hicodet.load_split(root, "test")) == 2
    assert {path.name for path in root.iterdir()} == {"anno_bbox.mat"}


def test_real_annotations_are_kept_as_read(real_samples, tmp_path, reads):
    for name in ("anno_bbox.mat", "anno.mat"):
        (tmp_path / name).symlink_to(HICO_DET / name)
    folder = HICO_DET / "images" / "test2015"
    for _ in range(2):
        samples = hicodet.load_split(tmp_path, "test")
        assert len(samples) == len(real_samples)
        for sample, expected in zip(samples, real_samples, strict=True):
            assert replace(sample, path=folder / sample.path.name) == expected
    assert reads == ["anno_bbox.mat", "anno.mat"]


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "anno_bbox.mat").write_bytes(b"x")
    read = Path.read_bytes

    def denied(path):
        if path.suffix == ".mat":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ValueError, match="anno_bbox.mat is not a readable .mat file"):
        hicodet.load_split(tmp_path, "train")
