"""One picture: decoded, turned as the camera says, in the channels that a model takes; or named as unreadable.

file -> open_image: its header, its kind and its size checked -> decode_image: its pixels, 8-bit grey or RGB
"""

import re
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
"""What is decoded, by Pillow's names, whatever a file is called; HEIF where a plugin is registered. No others: EPS, for
one, starts Ghostscript."""
PIXELS = 40_000_000
"""Most pixels that are decoded; a JPEG of more is decoded at a half, a quarter or an eighth of its size."""
SLIMMEST = 100
"""Most times that one side is the other: scaled until the shorter one fits a model, the longer would have no bound."""
GROUND = "white"
"""What is seen through transparent pixels."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation."""
GREY_STEPS = {"L;2": 85, "L;4": 17}
"""By what Pillow multiplies the grey of a PNG of 2 and 4 bits, but not the grey that stands for transparency."""
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")

NOT_FINITE = "the model's logits for it are not finite"
"""Why an image that can be decoded is treated like one that cannot."""


class Unreadable(NamedTuple):
    """What stands in a data set where an image cannot be decoded, or a model's answer to it is not finite."""

    name: str
    """Of the file."""
    reason: str
    """What the decoder said, or `NOT_FINITE`."""

    @property
    def kind(self) -> str:
        """What it would be one of."""
        return "images"

    @property
    def decoded(self) -> bool:
        """Whether it is the model that failed on it."""
        return self.reason == NOT_FINITE

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.decoded else f"cannot read {self.name}: {self.reason}"


def not_finite(name: str) -> Unreadable:
    """An image whose logits are not finite, to be named with those that cannot be decoded."""
    return Unreadable(name, NOT_FINITE)


def first_of(unreadable: Sequence[Unreadable]) -> str:
    """The first of them as the end of a sentence; nothing where there is none."""
    if not unreadable:
        return ""
    return f", the first being {unreadable[0].name!r}: {' '.join(unreadable[0].reason.split())}"


def read_image(file: Any, channels: int = 3) -> Image.Image:
    """The first frame of an image file as 8-bit grey (1 channel) or RGB (3), upright, transparency over `GROUND`.

    Raises:
        Exception: of several kinds, where Pillow cannot decode it, it has too many pixels or values of unknown range.
    """
    return decode_image(open_image(file), channels)


def open_image(file: Any) -> Image.Image:
    """The first frame of an image file, of which no pixel is decoded yet.

    Raises:
        OSError: it is none of `FORMATS`.
        ValueError: it has more pixels than `PIXELS`, as a JPEG even at an eighth of its size.
        Exception: of several kinds, where its header is damaged.
    """
    Image.init()  # loads the plugins, once
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of many pixels, of which the limit here is lower
        try:
            image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
        except UnidentifiedImageError:
            raise OSError(f"not an image, or of none of the kinds that are read: {', '.join(FORMATS)}") from None
        except Image.DecompressionBombError as error:
            told = re.search(r"\d+ pixels", str(error))
            raise ValueError(_too_many(told[0] if told else str(error))) from None
    if not _fitting(image):
        raise ValueError(_too_many(f"{image.width} x {image.height} pixels"))
    return image


def decode_image(image: Image.Image | np.ndarray, channels: int = 3, side: int | None = None) -> Image.Image:
    """What `open_image` gave, an image of Pillow's or an array, as 8-bit grey (1 channel) or RGB (3), upright.

    Args:
        side: scaled down until neither side is longer; a JPEG may be decoded at less than its size then. None decodes
            none that is slimmer than `SLIMMEST`.
    Raises:
        Exception: of several kinds, where Pillow cannot decode it.
        TypeError: it is neither an image nor an array.
        ValueError: the range of its values is not known, or it is too slim.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"it is a {type(image).__name__}, neither an image of Pillow's nor an array")
    if side is None and max(image.size) > SLIMMEST * min(image.size):
        raise ValueError(f"of its {image.width} x {image.height} pixels one side is over {SLIMMEST} times the other")
    _check_values(image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged metadata, which name no file
        scale = _scale(image, side)
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        image.load()  # first, for some formats tell the orientation behind the pixels, and TIFF turns by itself
        turn = TURNS.get(_orientation(image))
        image = in_channels(image, channels)
        if side is not None and max(image.size) > side:
            image.thumbnail((side, side), reducing_gap=2.0)
    return image if turn is None else image.transpose(turn)


def in_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image as 8-bit grey (1 channel) or RGB (3), transparency over `GROUND`; 16 bits are rounded down to 8.

    Differs from Pillow's `convert`, which turns 16-bit grey white, other ranges black or white, and shows the colours
    that transparent pixels hide.

    Raises:
        ValueError: other channels are asked for, or the range of its values is not known.
    """
    if channels not in (1, 3):
        raise ValueError(f"images are read as grey (1 channel) or RGB (3), not with {channels} channels")
    wanted = "RGB" if channels == 3 else "L"
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # which Pillow scales to 16 bits
        image = _eight_bits(image)
    if image.mode in TRANSPARENT or "transparency" in image.info:
        image = _on_ground(image)
    if image.mode not in OPAQUE:
        raise ValueError(
            f"its pixels are of Pillow's mode {image.mode} (32 bits a pixel), whose range is not told: "
            "save it with 8 or 16 bits a channel"
        )
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")  # LAB, for one, does not turn grey by itself
    return image if image.mode == wanted else image.convert(wanted)


def _check_values(image: Image.Image) -> None:
    """Refuse an image, not decoded yet, whose values Pillow would change without a word, or put its colour right."""
    if image.mode == "L" and 2 in getattr(image, "tag_v2", {}).get(339, ()):  # SampleFormat of a TIFF
        raise ValueError("its values are signed, and their range is not told: save it with 8 or 16 bits, unsigned")
    tiles = getattr(image, "tile", None)  # of a file
    key, stored = image.info.get("transparency"), tiles[0].args if tiles else None
    if isinstance(key, tuple) and (stored == "RGB;16B" or max(key) > 255):
        raise ValueError("it names a transparent colour with 16 bits a channel, of which 8 are read: save it with 8")
    if image.format == "PNG" and stored in GREY_STEPS and key is not None:
        image.info["transparency"] = key * GREY_STEPS[stored]


def _fitting(image: Image.Image) -> list[int]:
    """By what its sides may be divided as it is decoded, to stay within `PIXELS`; only a JPEG by more than 1."""
    scales = (1, 2, 4, 8) if image.format in ("JPEG", "MPO") else (1,)
    return [scale for scale in scales if -(-image.width // scale) * -(-image.height // scale) <= PIXELS]


def _scale(image: Image.Image, side: int | None) -> int:
    """By what they are divided: as little as fits, or as much as leaves `side` pixels of both."""
    fitting = _fitting(image) or [1]  # a data set may hand out larger ones that are decoded already
    enough = [scale for scale in fitting if side is not None and min(image.size) // scale >= side]
    return (enough or fitting[:1])[-1]


def _too_many(pixels: str) -> str:
    return f"its {pixels} are more than {PIXELS // 10**6} million, the most that are decoded"


def _orientation(image: Image.Image) -> Any:
    """EXIF's number for how a picture is stored; None where it has none or its EXIF is damaged."""
    try:
        return image.getexif().get(Base.Orientation)
    except Exception:  # Pillow raises half a dozen kinds, and an image is not worse for it
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, or the 12 bits of a TIFF, rounded down to 8; a colour that stands for transparency becomes alpha."""
    values, tags = np.asarray(image).astype(np.uint32), getattr(image, "tag_v2", {})
    most = 4095 if tags.get(258) == (12,) else 65535  # BitsPerSample
    key = image.info.get("transparency")
    dark = most - values if tags.get(262) == 0 else values  # PhotometricInterpretation 0: white, which Pillow ignores
    grey = Image.fromarray((255 * dark // most).astype(np.uint8))
    if key is not None:
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def _on_ground(image: Image.Image) -> Image.Image:
    """The image as RGB, where it is transparent over `GROUND`."""
    if image.mode == "La":
        image = image.convert("LA")
    image = image.convert("RGBA")
    ground = Image.new("RGB", image.size, GROUND)
    ground.paste(image, mask=image)
    return ground
