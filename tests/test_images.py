"""Image files: modes, shapes, damage, real photographs."""

import numpy as np
import pytest
from PIL import Image

from engine.data.images import open_image, read_image
from hicodet import InputError, Sample
from tests.runs import config_of, examples_of


def sample_of(path, size):
    return Sample(path.name, path, *size, (), (), frozenset())


def saved(path, pixels, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


GREY = np.array([[0, 102 * 257, 65535]], np.uint16)


@pytest.mark.parametrize("name, pixels", [
    ("grey.png", GREY), ("grey.tif", GREY), ("grey.tif", np.array([[0, 0.4, 1]], np.float32)),
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


@pytest.mark.parametrize("size, seen", [
    ((9, 5), (56, 28)), ((27, 300), (28, 308)), ((690, 15420), (28, 896)),
])  # fmt: skip
def test_small_and_long_images_are_seen(size, seen, folder, tmp_path):
    """Their sides become multiples of 28, within the processor's number of pixels."""
    path = saved(tmp_path / "a.png", Image.new("RGB", size))
    examples = examples_of(config_of("predict", folder, "x"), [sample_of(path, size)])
    assert examples[0].model_size == seen
    assert examples.longest_prompt() >= len(examples[0].prompt.prompt_ids)


def test_image_that_is_too_long_is_refused(tmp_path):
    for width in (400, 402):
        path = saved(tmp_path / f"{width}.png", Image.new("RGB", (width, 2)))
    assert read_image(sample_of(tmp_path / "400.png", (400, 2))).size == (400, 2)
    with pytest.raises(InputError, match=f"^{path}: one side is more than 200 times the other"):
        read_image(sample_of(path, (402, 2)))


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


# Photographs of HICO-DET: not in the repository

NAMES = ["HICO_test2015_00000001.jpg", "HICO_test2015_00003124.jpg"]


def test_photographs_of_hico_det_have_their_annotated_size(real_samples):
    samples = [sample for sample in real_samples if sample.file_name in NAMES]
    if not all(sample.path.is_file() for sample in samples):
        pytest.skip("photographs of HICO-DET are not next to the repository")
    for sample in samples:
        assert read_image(sample).size == (sample.width, sample.height)
