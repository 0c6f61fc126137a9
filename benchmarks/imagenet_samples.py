"""ViT-Tiny with its weights and the images of a folder of ImageNet's classes, as several scripts here take them."""

from pathlib import Path
from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import Tensor

from adaptvit.data import DataConfig, open_split, spread_over
from adaptvit.weights.opening import start_from


def prepared(weights: Path, folder: Path) -> tuple[Any, Tensor, Tensor]:
    """The model, all images as it takes them, and their labels."""
    vit = timm.create_model("vit_tiny_patch16_224").eval()
    start_from(vit, weights)
    return vit, *opened(vit, folder)


def opened(vit: Any, folder: Path, step: int = 1) -> tuple[Tensor, Tensor]:
    """Every `step`-th image of a folder of class folders as a ViT takes them, and their labels."""
    settings = resolve_model_data_config(vit) | {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9}
    split = open_split(DataConfig(root=folder), settings, "validation")
    images, labels, _ = spread_over(split, len(split) // step)
    return images, labels


def paired(difference: Tensor) -> tuple[float, float]:
    """Mean and standard error."""
    return round(difference.mean().item(), 4), round((difference.std() / len(difference) ** 0.5).item(), 4)
