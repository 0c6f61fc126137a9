"""A pretrained ViT made adaptive without training: what a method can find out from images alone, then its budget."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Annotated, Any

from torch import Tensor, nn

from adaptvit.budget import Trial, Unit, check_target
from adaptvit.checks import In, checked, quoted
from adaptvit.methods import DEFAULT, METHODS, MethodConfig
from adaptvit.model import AdaptiveViT
from adaptvit.terminal import warn


@checked
def adapt(
    vit: nn.Module,
    images: Tensor,
    target: float,
    config: MethodConfig | None = None,
    unit: Unit = "share",
    tolerance: Annotated[float, In("(0, 1)")] = 0.01,
    labels: Tensor | None = None,
    tell: Callable[[Trial], object] | None = None,
) -> AdaptiveViT:
    """Make a pretrained ViT adaptive, without training, so that `images` cost `target`.

    The model comes in evaluation mode, and so does `vit`, which shares its weights; what it costs is measured so. It
    has a dial: `model.compute = 0.5` sets another budget later, without images.

    Args:
        vit: a plain ViT. A-ViT has a copy of it, turned to carry the fitted gate.
        images: calibration batch, as the model takes them; the more, the better the budget holds on others.
        config: the method; None merges patches that are alike, as many in every image, in the blocks where that changes
            predictions for `images` least. What it finds out from the images (A-ViT's gate, merging's numbers) replaces
            what these fields had, and a warning says so where that was no default.
        target, unit, tolerance, labels, tell: as `meet_target` takes them.
    Raises:
        TypeError: the method cannot run on this ViT, `vit` is adaptive already, or `config` is no config.
        ValueError: the method has to be trained, or a target that cannot be met.
    """
    if isinstance(vit, AdaptiveViT):
        raise TypeError(
            f"adapt takes a plain ViT, got a {type(vit).__name__}: move its budget with adaptvit.meet_target, or adapt "
            "its vit"
        )
    if config is not None and not isinstance(config, MethodConfig):
        raise TypeError(
            f"config must be a method's, such as adaptvit.EViTConfig(), got {quoted(config)}: "
            "adapt(vit, images, 0.6, adaptvit.EViTConfig())"
        )
    if isinstance(images, Mapping):
        raise TypeError(
            f"images are a {type(images).__name__}, but budgets are measured on a tensor of images of one shape: the "
            "model then takes others too"
        )
    check_target(target, unit)
    config = METHODS[DEFAULT]() if config is None else config
    if config.trained:
        raise ValueError(
            f"{config.title} decides by what training gives it, which images alone cannot: train it, and then give it "
            "a budget with meet_target"
        )
    model = config.fit(vit, images, target, unit=unit, tolerance=tolerance, labels=labels, tell=tell)
    for name, given, found in _replaced(config, model.config):
        told = f"{found!r}, not the {given!r} given"
        warn(f"{type(config).__name__}.{name} is fitted to the images: {told}", stacklevel=2)
    return model


def _replaced(given: Any, found: Any) -> Iterator[tuple[str, Any, Any]]:
    """Fields beside the knob that had no default and were fitted: name, before, after."""
    for one in fields(given):
        before, after = getattr(given, one.name), getattr(found, one.name)
        if before not in (one.default, after) and one.name != given.knob.field:
            yield one.name, before, after
