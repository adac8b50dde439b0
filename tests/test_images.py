"""Image files of all kinds as the model sees them: modes, shapes, damage, real photographs."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from engine.data.image_check import check
from engine.data.images import open_image, read_image
from engine.report.pictures import show
from hicodet import InputError, Sample
from tests.annotation_files import own_line, write_own
from tests.runs import config_of, examples_of, refusal, run


def sample_of(path, size):
    return Sample(path.name, path, *size, (), (), frozenset())


def saved(path, pixels, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


# Modes


@pytest.mark.parametrize("name, pixels", [
    ("grey.png", np.array([[0, 102 * 257, 65535]], np.uint16)),
    ("grey.tif", np.array([[0, 102 * 257, 65535]], np.uint16)),
    ("grey.tif", np.array([[0, 0.4, 1]], np.float32)),
])  # fmt: skip
def test_grey_of_16_bits_or_floats_is_scaled(name, pixels, tmp_path):
    path = saved(tmp_path / name, pixels)
    assert np.asarray(open_image(path))[0].tolist() == [[0] * 3, [102] * 3, [255] * 3]


@pytest.mark.parametrize("pixels, words", [
    (np.array([[0, 1000]], np.float32), "float pixels outside of 0 to 1"),
    (np.array([[0, np.nan]], np.float32), "float pixels outside of 0 to 1"),
    (np.array([[0, 70000]], np.int32), "32-bit integers"),
])  # fmt: skip
def test_grey_of_an_unknown_range_is_refused(pixels, words, tmp_path):
    path = saved(tmp_path / "grey.tif", pixels)
    with pytest.raises(InputError, match=f"{path}: cannot be read as an image .*{words}"):
        open_image(path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_pasted_on_white(mode, tmp_path):
    """Black pixels: opaque, half transparent (not for a palette), transparent."""
    image, options = Image.new("RGBA", (3, 1)), {}
    for x, alpha in enumerate((255, 128, 0)):
        image.putpixel((x, 0), (0, 0, 0, alpha))
    if mode == "P":
        image = Image.frombytes("P", (3, 1), bytes([0, 0, 1]))
        image.putpalette([0] * 6)
        options = {"transparency": 1}
    path = saved(tmp_path / "a.png", image if mode == "P" else image.convert(mode), **options)
    middle = 0 if mode == "P" else 127
    assert [open_image(path).getpixel((x, 0)) for x in range(3)] == [
        (0, 0, 0), (middle,) * 3, (255, 255, 255)
    ]  # fmt: skip


# Shapes


@pytest.mark.parametrize("size, seen", [
    ((9, 5), (56, 28)), ((27, 300), (28, 308)), ((690, 15420), (28, 896)),
])  # fmt: skip
def test_small_and_long_images_are_seen(size, seen, folder, tmp_path):
    """In sides that are multiples of 28, within the processor's number of pixels."""
    path = saved(tmp_path / "a.png", Image.new("RGB", size))
    examples = examples_of(config_of("predict", folder, "x"), [sample_of(path, size)])
    assert examples[0].model_size == seen
    assert examples.longest_prompt() >= len(examples[0].prompt.prompt_ids)


def test_image_that_is_too_long_is_one_line(folder, tmp_path):
    """In check, and in a training, which names it; a prediction writes an empty line."""
    data, lines = tmp_path / "data", []
    (data / "images").mkdir(parents=True)
    for name, size in (("a.png", (402, 2)), ("b.png", (400, 2))):
        saved(data / "images" / name, Image.new("RGB", size))
        pair = ((0, 0, 1, 1), (1, 0, 2, 1), 151)
        for split in ("train", "test"):
            line = own_line(name, split, [pair])
            lines.append(line | {"width": size[0], "height": size[1]})
    write_own(data, *lines)
    said = f"{data / 'images' / 'a.png'}: one side is more than 200 times the other"
    found = list(said_by_check(data))
    assert found.count(said) == 2 and "test: 1 of 2 images cannot be used" in found
    options = {"data": str(data), "max_new_tokens": 2}
    assert refusal(config_of("grpo", folder, tmp_path / "rl", **options)).startswith(said)
    run(config_of("predict", folder, tmp_path / "test", **options))
    path = tmp_path / "test" / "predictions.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert texts[0] == "" and texts[1]


def said_by_check(data, **options):
    """The lines of check; the error at its end is left out."""
    try:
        yield from check(data=str(data), **options)
    except InputError:
        pass


# Damage


def test_damaged_images_are_named(photo, tmp_path, monkeypatch):
    stored = photo.read_bytes()
    files = {"cut.jpg": stored[:-300], "text.jpg": b"mine", "empty.jpg": b""}
    saved(tmp_path / "whole.png", Image.new("RGB", (9, 9)))
    files["bad.png"] = (tmp_path / "whole.png").read_bytes().replace(b"IDAT", b"IDAX")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"^{tmp_path / name}: cannot be read as an image"):
            open_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9999)
    with pytest.raises(InputError, match=f"^{photo}: .*decompression bomb"):
        open_image(photo)


def test_image_of_another_size_is_refused(photo):
    sample = sample_of(photo, (640, 425))
    assert read_image(sample).size == (640, 425)
    with pytest.raises(InputError, match="is 640 x 425, annotated as 99 x 425"):
        read_image(replace(sample, width=99))


# Photographs of HICO-DET, which may not be part of this repository

NAMES = ["HICO_test2015_00000001.jpg", "HICO_test2015_00003124.jpg"]


def test_two_photographs_of_hico_det(real_samples, folder, tmp_path):
    """Read as annotated, checked, predicted and drawn."""
    samples = [sample for sample in real_samples if sample.file_name in NAMES]
    if not all(sample.path.is_file() for sample in samples):
        pytest.skip("photographs of HICO-DET are not next to the repository")
    images = tmp_path / "data" / "images" / "test2015"
    images.mkdir(parents=True)
    lines = []
    for sample in samples:
        assert read_image(sample).size == (sample.width, sample.height)
        shutil.copy(sample.path, images)
        pairs = [(pair.human, pair.object, pair.hoi_id) for pair in sample.pairs]
        size = {"width": sample.width, "height": sample.height}
        lines.append(own_line(sample.file_name, "test", pairs) | size)
    data = write_own(tmp_path / "data", *lines)
    assert "test: 0 of 2 images cannot be used" in list(check(data=str(data)))
    run(config_of("predict", folder, tmp_path / "test", data=str(data), max_new_tokens=2))
    predictions = str(tmp_path / "test" / "predictions.jsonl")
    drawn = list(show(data=str(data), out=str(tmp_path), predictions=predictions))
    verbs = [sum(len(hoi.verbs) for hoi in sample.hois) for sample in samples]
    for line, true in zip(drawn, verbs, strict=True):
        assert line.endswith(f": {true} of {true} interactions missed, 0 predicted")
