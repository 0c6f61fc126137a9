"""A pretrained ViT made adaptive without training: what a method can find out from images alone, then its budget."""

from collections.abc import Callable
from typing import Annotated

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from adaptvit.budget import Trial, Unit, check_target
from adaptvit.checks import In, checked
from adaptvit.methods import DEFAULT, METHODS, MethodConfig
from adaptvit.model import AdaptiveViT


@checked
def adapt(
    vit: VisionTransformer,
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
        vit: A-ViT has a copy of it, turned to carry the fitted gate.
        images: calibration batch, as the model takes them; the more, the better the budget holds on others.
        config: the method; None merges patches that are alike, at the thresholds that ToMe's schedule leads to.
        target, unit, tolerance, labels, tell: as `meet_target` takes them.
    Raises:
        TypeError: the method cannot run on this ViT.
        ValueError: the method has to be trained, or a target that cannot be met.
    """
    check_target(target, unit)
    config = METHODS[DEFAULT]() if config is None else config
    if config.trained:
        raise ValueError(
            f"{config.title} decides by what training gives it, which images alone cannot: train it, and then give it "
            "a budget with meet_target"
        )
    return config.fit(vit, images, target, unit=unit, tolerance=tolerance, labels=labels, tell=tell)
