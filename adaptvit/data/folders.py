"""Images in a folder: which files they are, in what order, and a data set of them."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from adaptvit.data.images import Unreadable, read_image

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif"),
    *(".tiff", ".webp"),
)
"""Of the files that count as images in a folder without classes, readable or not."""


def find_images(folder: Path) -> list[str]:
    """Paths of the images in a folder, from there, with / between names: `a2.png` before `a10.png`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"PredictConfig.folder is {str(folder)!r}, which is not a folder")
    found = [
        Path(root, name).relative_to(folder).as_posix()
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not found:
        raise ValueError(f"PredictConfig.folder is {str(folder)!r}, which holds no images ({' '.join(IMAGE_SUFFIXES)})")
    return sorted(found, key=_natural)


class FolderImages(Dataset):
    """Images prepared as a model expects them; an item is (image, index) or `Unreadable`."""

    def __init__(self, folder: Path, names: Sequence[str], preparation: dict[str, Any]) -> None:
        """`preparation` is what `timm.data.resolve_model_data_config` says."""
        self.folder, self.names = folder, names
        self.channels, self.transform = preparation["input_size"][0], create_transform(**preparation)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        try:
            with open(self.folder / self.names[index], "rb") as file:
                image = read_image(file, self.channels)
        except Exception as error:  # Pillow raises half a dozen kinds
            return Unreadable(self.names[index], str(error) or type(error).__name__)
        return self.transform(image), index


def _natural(name: str) -> tuple[list[str | int], str]:
    """A key that orders numbers in names by value; the name itself tells those that differ in nothing else."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
