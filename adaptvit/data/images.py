"""One picture: decoded, turned into the channels that a model takes, or named as unreadable."""

from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

NOT_FINITE = "the model's logits for it are not finite"
"""Why an image that can be decoded is treated like one that cannot."""


class Unreadable(NamedTuple):
    """What stands in a data set where an image cannot be decoded."""

    name: str
    """Of the file."""
    reason: str
    """What the decoder said."""


def read_image(file: Any, channels: int = 3) -> Image.Image:
    """The first frame of an image as 8-bit grey (1 channel) or RGB (3), whatever its own mode.

    Differs from timm's `convert`, which turns 16-bit grey to white and warns of transparent palettes.

    Raises:
        Exception: of several kinds, where Pillow cannot decode it.
    """
    return in_channels(open_image(file), channels)


def open_image(file: Any) -> Image.Image:
    """The first frame of an image, of which no pixel is decoded yet.

    Raises:
        Exception: of several kinds, where Pillow does not know it.
    """
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        raise OSError("not an image, or of a kind that Pillow does not know") from None


def in_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image as 8-bit grey (1 channel) or RGB (3)."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("RGB" if channels == 3 else "L")
