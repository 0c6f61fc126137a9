"""Images whose every pixel has a class: folders of images beside folders of masks.

    root/train/images/a.jpg, root/train/masks/a.png, root/val/...

A mask is an 8-bit grey or palette image as large as its image, and the value of a pixel is its class.
An item is (image, mask), a normalised float32 tensor (channels, height, width) and an int64 one (height, width), or
`Unreadable`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from adaptvit.checks import In, check_fields
from adaptvit.data.folders import find_split, list_images
from adaptvit.data.images import Unreadable, open_image, read_image
from adaptvit.data.sets import IGNORED, Data
from adaptvit.terminal import progress_bar


@dataclass(frozen=True, kw_only=True)
class MasksConfig:
    """Where images and masks are and how they are prepared; what is left out comes with the model's weights."""

    root: Path
    """Folder with a folder for each split, and in it `images` and `masks`, whose files are named alike."""
    classes: tuple[str, ...]
    """Names of the values 0, 1, ... of masks."""
    ignored: Annotated[tuple[int, ...], In("[0, 255]", empty=True)] = (255,)
    """Values of pixels that are of no class: they are neither learnt nor counted."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "validation"
    """Split to evaluate on."""
    scale: Annotated[tuple[float, float], In("(0, 1]")] = (0.35, 1.0)
    """Area of a random training crop, over that of the image."""
    hflip: Annotated[float, In("[0, 1]")] = 0.5
    """Probability of mirroring a training image."""
    color_jitter: Annotated[float, In("[0, 1]")] = 0.0
    """Strength in brightness, contrast and saturation."""
    workers: Annotated[int, In("[0, 1024]")] = 2
    """Processes that decode, for each loader."""

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.classes) < 2:
            raise ValueError(f"MasksConfig.classes must be the names of two classes or more, got {self.classes}")
        if both := [value for value in self.ignored if value < len(self.classes)]:
            raise ValueError(
                f"MasksConfig.ignored has {both[0]}, which is the class {self.classes[both[0]]!r}: values beyond the "
                f"{len(self.classes)} classes"
            )
        if self.scale[0] > self.scale[1]:
            raise ValueError(
                f"MasksConfig.scale must be the least and the largest area, in this order, got {self.scale}"
            )


class Masks(Dataset):
    """The pairs of a split, both brought to the size that a model takes; masks by the nearest pixel.

    The whole image is squashed to that size, or, where it is augmented, a random crop of it.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], config: MasksConfig, settings: dict[str, Any], augment: bool = False
    ) -> None:
        """Take what `find_masks` found.

        Args:
            settings: input_size, mean, std and interpolation of the model.
        """
        self.folder, self.names, self.channels = folder, names, settings["input_size"][0]
        self.transform = _transform(config, settings, augment)
        self.number = torch.full((256,), IGNORED)
        self.number[: len(config.classes)] = torch.arange(len(config.classes))

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Of the image's file, from the split's folder on."""
        return f"images/{self.names[index]}"

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | Unreadable:
        try:
            with (self.folder / self.name(index)).open("rb") as file:
                image = read_image(file, self.channels)
            values = _values(_mask_of(self.folder, self.names[index]))
        except Exception as error:  # Pillow raises half a dozen kinds
            return Unreadable(self.name(index), str(error) or type(error).__name__)
        seen, told = self.transform(image, tv_tensors.Mask(torch.from_numpy(values)))
        return seen, self.number[told.as_subclass(Tensor).long()]


def find_masks(config: MasksConfig, split: str) -> tuple[Path, list[str]]:
    """The folder of a split and the names of its images, every mask looked at.

    Raises:
        FileNotFoundError: there is no such folder or split.
        ValueError: there are no images; or one has no mask, or one that cannot be read, of another size, or with values
            that are neither a class nor ignored: the sentence names the file.
    """
    where = repr(str(config.root))
    if not config.root.is_dir():
        raise FileNotFoundError(f"{where} is no folder: images and masks are in folders of its splits")
    found = find_split(config.root, split, where)
    folder = config.root / (found or split)
    if not (folder / "images").is_dir():
        raise FileNotFoundError(f"{str(folder)!r} has no folder 'images', beside which 'masks' are")
    names = list(list_images(folder / "images").names)
    if not names:
        raise ValueError(f"{str(folder / 'images')!r} has no images")
    known = np.zeros(256, dtype=bool)
    known[[*range(len(config.classes)), *config.ignored]] = True
    for name in progress_bar(names, f"masks of {split}"):
        _check(folder / "images" / name, _mask_of(folder, name), known, len(config.classes))
    return folder, names


def _mask_of(folder: Path, name: str) -> Path:
    return (folder / "masks" / name).with_suffix(".png")


def _check(image: Path, mask: Path, known: np.ndarray, classes: int) -> None:
    """Refuse a mask that is not its image's; `known` says which of 256 values are allowed."""
    if not mask.is_file():
        raise ValueError(f"{str(image)!r} has no mask, which would be {str(mask)!r}")
    try:
        values = _values(mask)
    except Exception as error:  # as above
        raise ValueError(f"{str(mask)!r} cannot be read: {error}") from error
    odd = np.unique(values)[~known[np.unique(values)]].tolist()
    if odd:
        raise ValueError(
            f"{str(mask)!r} has the value {odd[0]}, but the classes are 0 to {classes - 1}: name it among `classes` or "
            "`ignored`"
        )
    try:
        with image.open("rb") as file:
            width, height = open_image(file).size
    except Exception:  # an image that cannot be read is told when it is its turn
        return
    if values.shape != (height, width):
        raise ValueError(
            f"{str(mask)!r} has {values.shape[1]} x {values.shape[0]} pixels, but its image {width} x {height}"
        )


def _values(mask: Path) -> np.ndarray:
    """(height, width) uint8, the values of a mask as they are stored."""
    with Image.open(mask, formats=["PNG"]) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"a mask must be 8-bit grey or with a palette, and it is of Pillow's mode {image.mode}")
        return np.array(image)


def _transform(config: MasksConfig, settings: dict[str, Any], augment: bool) -> v2.Transform:
    """What makes tensors of an image and a mask."""
    size, mode = settings["input_size"][1:], v2.InterpolationMode(settings["interpolation"])
    steps: Sequence[Any] = [v2.Resize(size, mode)]
    if augment:
        jitter, aspect = [config.color_jitter] * 3, size[1] / size[0]
        steps = [
            v2.RandomResizedCrop(size, config.scale, ratio=(0.9 * aspect, 1.1 * aspect), interpolation=mode),
            v2.RandomHorizontalFlip(config.hflip),
            *([v2.ColorJitter(*jitter)] if config.color_jitter else []),
        ]
    mean, std = list(settings["mean"]), list(settings["std"])
    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def open_masks(config: MasksConfig, settings: dict[str, Any]) -> Data:
    """Both splits; raises as `find_masks`."""
    training, testing = (find_masks(config, split) for split in (config.train_split, config.test_split))
    height, width = settings["input_size"][1:]
    many = f"{len(training[1])} training and {len(testing[1])} test images"
    return Data(
        name=f"{config.root.name} ({many} with masks of {len(config.classes)} classes)",
        train=Masks(*training, config, settings, augment=True),
        calibration=Masks(*training, config, settings),
        test=Masks(*testing, config, settings),
        classes=config.classes,
        channels=settings["input_size"][0],
        size=height if height == width else (height, width),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        preparation=repr((replace(config, root=Path(), workers=0), sorted(settings.items()))),
        workers=config.workers,
        task="pixels",
    )
