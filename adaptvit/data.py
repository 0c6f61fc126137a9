"""Images to train and to evaluate on: scikit-learn's handwritten digits, which are installed with it.

Every item is (image, label): a normalised float32 tensor (channels, height, width) and an int.
"""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset
from torchvision.transforms import v2

HELD_OUT = 360
"""Digits of the test split, of 1797."""


@dataclass(frozen=True)
class Data:
    """A classification problem: two splits and how their images were normalised."""

    name: str
    """What it is, in words that tell it from any other: runs and reports are known by it."""
    train: Dataset
    """Items change from visit to visit where training is augmented, by torch's global random state."""
    test: Dataset
    """Items never change."""
    classes: tuple[str, ...]
    """Names of the labels 0, 1, ..."""
    channels: int
    """Channels of an image."""
    size: int
    """Height and width of an image in pixels."""
    mean: float
    """What was subtracted from pixels in [0, 1]."""
    std: float
    """What the difference was divided by."""

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images as they are looked at: values in [0, 1]."""
        return (images * self.std + self.mean).clamp(0, 1)


class Images(Dataset):
    """Images in memory, each passed through `augment` when it is visited."""

    def __init__(self, images: Tensor, labels: Tensor, augment: v2.Transform | None = None) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return (image if self.augment is None else self.augment(image)), int(self.labels[index])


def digits(size: int = 32, margin: int = 4, seed: int = 0) -> Data:
    """Handwritten digits, 8 x 8 pixels enlarged to `size` - 2 `margin` on black; the training split moves them about.

    Args:
        size: height and width of the images, in pixels.
        margin: black pixels around the digit, at least 0 and below half of `size`.
        seed: decides which digits are held out for the test.
    Raises:
        ValueError: the margin leaves no room for a digit.
    """
    if not 0 <= margin < size / 2:
        raise ValueError(f"digits' margin must lie in [0, {size / 2:g}), half its size of {size}, got {margin}")
    bunch = load_digits()
    small = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    large = interpolate(small, size=size - 2 * margin, mode="bicubic", antialias=True).clamp(0, 1)
    images = torch.nn.functional.pad(large, (margin,) * 4)
    labels = torch.as_tensor(bunch.target)
    train, test = train_test_split(range(len(labels)), test_size=HELD_OUT, stratify=bunch.target, random_state=seed)
    std, mean = torch.std_mean(images[train])
    images = (images - mean) / std
    black = float(-mean / std)
    augment = v2.RandomAffine(
        degrees=10,
        translate=(0.08, 0.08),
        scale=(0.85, 1.15),
        fill=black,
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    return Data(
        name=f"scikit-learn's digits ({size} pixels with {margin} of margin, {HELD_OUT} held out by seed {seed})",
        train=Images(images[train], labels[train], augment),
        test=Images(images[test], labels[test]),
        classes=tuple(str(name) for name in bunch.target_names),
        channels=1,
        size=size,
        mean=float(mean),
        std=float(std),
    )
