"""Image files as RGB with 8 bits a channel, decoded to the last byte."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hicodet import InputError, Sample

# Pillow's exceptions for broken, hostile and huge files; TypeError comes from EXIF data
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, RuntimeError, AttributeError, TypeError, struct.error),
    Image.DecompressionBombError,
)
LONGEST = 200  # largest aspect ratio that Qwen2.5-VL's processor takes


def open_image(path: Path, *, upright: bool = False) -> Image.Image:
    """An image file as RGB. Raises InputError naming a broken one.

    upright: rotate it by its EXIF data.
    """
    try:
        with Image.open(path) as file:
            return to_rgb(ImageOps.exif_transpose(file) if upright else file)
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as RGB: transparency on white, 16-bit and float grey scaled to 8 bits.

    Raises ValueError for grey values of an unknown range, which Pillow would clip silently.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("float pixels outside of 0 to 1")
        image = Image.fromarray(np.rint(255 * values).astype(np.uint8))
    elif image.mode == "I":
        raise ValueError("pixels of 32-bit integers; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def too_long(width: int, height: int) -> bool:
    """Whether an image of this size is too narrow for the model."""
    return max(width, height) > LONGEST * min(width, height)


def read_image(sample: Sample, upright: bool = False) -> Image.Image:
    """A sample's image.

    Raises InputError naming a file that is broken, not of its annotated size, or too narrow.
    """
    image = open_image(sample.path, upright=upright)
    if image.size != (sample.width, sample.height):
        raise InputError(
            f"{sample.path} is {image.width} x {image.height}, annotated as {sample.width} x "
            f"{sample.height}: images and annotations belong to different data"
        )
    if too_long(*image.size):
        raise InputError(f"{sample.path}: one side is more than {LONGEST} times the other")
    return image
