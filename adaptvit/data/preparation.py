"""How images are prepared for a model, as its record says, and as another model's record says from the same pixels.

    a model, or timm's name and the arguments -> settings, as `timm.data.create_transform` takes them

Letters: B images.
"""

import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import to_2tuple
from torch import Tensor, nn

from adaptvit.backbones.base import clip_frames, input_size, timm_config
from adaptvit.backbones.families import FAMILIES

LUMINANCE = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey, as Pillow has them."""


def preparation(model: nn.Module, who: str = "the model") -> dict[str, Any]:
    """`input_size`, `mean`, `std`, `interpolation`, `crop_pct` and `crop_mode` of a model's images.

    Of a model that takes clips `frames` too, how many: the others are of each frame.

    Args:
        model: an adaptive model, or a ViT.
        who: what a refusal calls it.
    Raises:
        ValueError: no image can be prepared so.
    """
    record = timm_config(model)
    if FAMILIES.of(model) is not None:
        record = record | {"input_size": input_size(model), "frames": clip_frames(model)}
    settings = check_settings(resolve_data_config(pretrained_cfg=record, model=model), who)
    frames = record.get("frames")
    return settings if frames is None else settings | {"frames": frames}


def preparation_of_name(name: str, arguments: dict[str, Any], origin: nn.Module | None = None) -> dict[str, Any]:
    """The same for a model that `timm.create_model` is yet to build: grey takes the mean of the colours' numbers.

    Args:
        arguments: of `timm.create_model`; `img_size` is the side, or height and width.
        origin: a ViT that it is made from, whose record holds then, not that of timm's name.
    Raises:
        ValueError: `img_size` is no size, or no image can be prepared so.
    """
    if origin is None:
        recorded = timm.get_pretrained_cfg(name)
        record = recorded.to_dict() if recorded else {"input_size": (3, 224, 224)}
    else:
        record = timm_config(origin) | {"input_size": input_size(origin)}
    settings = resolve_data_config({}, pretrained_cfg=record)
    channels, *size = settings["input_size"]
    if arguments.get("img_size") is not None:
        size = image_size(arguments["img_size"])
    channels = arguments.get("in_chans") or channels
    settings["input_size"] = (channels, *size)
    for key in ("mean", "std"):
        if len(settings[key]) != channels:
            settings[key] = (sum(settings[key]) / len(settings[key]),) * channels
    frames = None if origin is None else clip_frames(origin)
    return check_settings(settings, name) | ({} if frames is None else {"frames": frames})


def image_size(size: int | Sequence[int], what: str = "img_size") -> tuple[int, int]:
    """Height and width.

    Raises:
        ValueError: it is neither one number of pixels nor two.
    """
    pair = tuple(to_2tuple(size))
    if len(pair) != 2 or not all(type(side) is int and side >= 1 for side in pair):
        raise ValueError(f"{what} must be a number of pixels, or height and width, each at least 1; got {size!r}")
    return pair


def check_settings(settings: dict[str, Any], who: str) -> dict[str, Any]:
    """Settings under which images can be prepared, with as many means and deviations as channels.

    Raises:
        ValueError: naming what cannot be.
    """
    channels, means, deviations = settings["input_size"][0], tuple(settings["mean"]), tuple(settings["std"])
    if channels not in (1, 3) or {len(means), len(deviations)} - {1, channels}:
        raise ValueError(
            f"{who} takes images of {channels} channels and normalises {len(means)}; images are grey (1) or RGB (3)"
        )
    if not all(math.isfinite(value) for value in means) or not all(0 < value < math.inf for value in deviations):
        raise ValueError(
            f"{who} normalises by mean {means} and std {deviations}: all must be finite, and each std positive"
        )
    means, deviations = (values * (channels // len(values)) for values in (means, deviations))
    return settings | {"mean": means, "std": deviations}


def pixels(images: Tensor, settings: dict[str, Any]) -> Tensor:
    """Normalised images (B, channels, height, width) as they are looked at: values in [0, 1]."""
    of = {name: torch.tensor(settings[name], device=images.device).view(-1, 1, 1) for name in ("mean", "std")}
    return (images * of["std"] + of["mean"]).clamp(0, 1)


class Renormalise(nn.Module):
    """Images normalised one way -> the same pixels normalised as a model's own record says, grey for colour and back.

    A model without a record, or with one for other channels than it takes, gets the images as they are.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], model: nn.Module) -> None:
        """`mean` and `std` are how the images come, by channel; `model` is timm's, an adaptive model, or any other."""
        super().__init__()
        record = timm_config(model)
        own, deviations = tuple(record.get("mean") or ()), tuple(record.get("std") or ())
        takes = input_size(model)[0] if FAMILIES.of(model) is not None else record.get("input_size", [3])[0]
        known = takes in (1, 3) and {len(own), len(deviations)} <= {1, takes}
        self.mean, self.std = tuple(mean), tuple(std)
        """How they go."""
        if known:
            self.mean, self.std = own * (takes // len(own)), deviations * (takes // len(deviations))
        self.changes = (self.mean, self.std) != (tuple(mean), tuple(std))
        self.to_grey = len(self.mean) < len(mean)
        from_mean, from_std, to_mean, to_std = (
            torch.tensor(values).view(-1, 1, 1) for values in (mean, std, self.mean, self.std)
        )
        if self.to_grey:
            shares = torch.tensor(LUMINANCE).view(3, 1, 1)
            from_mean, from_std = (from_mean * shares).sum(dim=0), from_std * shares
        scale, shift = from_std / to_std, (from_mean - to_mean) / to_std
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width), or clips of these, in as many channels as the model takes."""
        if not self.changes:
            return images
        scaled = images * self.scale
        return (scaled.sum(dim=-3, keepdim=True) if self.to_grey else scaled) + self.shift
