"""A pretrained ViT made adaptive without training: what a method can find out from images alone, then its budget."""

import copy
from bisect import bisect_left
from collections.abc import Callable
from typing import Literal, get_args

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from adaptvit.budget import Trial, Unit, attempt, check_target, meet_target
from adaptvit.methods.ats import ATSConfig
from adaptvit.methods.avit import AViT, AViTConfig
from adaptvit.methods.avit_gate import fit_gate
from adaptvit.methods.evit import EViTConfig
from adaptvit.methods.tome import MergeConfig, MergingViT, ToMeConfig, fit_thresholds
from adaptvit.model import AdaptiveViT
from adaptvit.vit import patch_grid

Untrained = Literal["merge", "tome", "ats", "evit", "avit", "random"]
"""Methods that need no training; `random` is ATS that keeps any patches, which the others are held against."""
UNTRAINED: tuple[Untrained, ...] = get_args(Untrained)
SHARPNESS = 6.0
"""How far the logits of A-ViT's scores spread: patches halt neither all at similar depths nor some at once."""


def adapt(
    vit: VisionTransformer,
    method: Untrained,
    images: Tensor,
    target: float,
    unit: Unit = "share",
    tolerance: float = 0.01,
    labels: Tensor | None = None,
    tell: Callable[[Trial], object] | None = None,
) -> AdaptiveViT:
    """Make a pretrained ViT adaptive, without training, so that `images` cost `target`.

    Merging by similarity gets the thresholds of ToMe at that cost. ToMe itself, which has no knob, merges as few tokens
    as meet the target, equally many in every block but for the first few, which merge one more.

    Args:
        vit: in evaluation mode; the model shares its weights. A-ViT has a copy, turned to carry the fitted gate.
        images: calibration batch, as the model takes them; the more, the better the budget holds on others.
        target, unit, tolerance, labels, tell: as `meet_target` takes them.
    Raises:
        TypeError: the method cannot run on this ViT.
        ValueError: A-ViT and a ViT without a class token, or a target that cannot be met.
    """
    check_target(target, unit)
    if method not in UNTRAINED:
        raise ValueError(f"method must be one of {', '.join(UNTRAINED)}, got {method!r}")
    model: AdaptiveViT
    match method:
        case "tome":
            return schedule(vit, images, target, unit, tolerance).build(vit)
        case "merge":
            model = MergeConfig().build(vit)
            fit_merging(model, images, target, unit, tolerance)
        case "avit":
            model = gated(vit, images)
        case "ats":
            model = ATSConfig().build(vit)
        case "random":
            model = ATSConfig(sampler="random").build(vit)
        case "evit":
            model = EViTConfig().build(vit)
    meet_target(model, images, target, unit, tolerance, labels, tell)
    return model


def fit_merging(
    model: MergingViT, images: Tensor, target: float, unit: Unit = "share", tolerance: float = 0.01
) -> None:
    """Give a model of `MergeConfig` the thresholds at which `images` merge, on average, what ToMe would at a target.

    Raises:
        TypeError: the model is of another method.
        ValueError: merging half of the tokens in every block does not meet the target.
    """
    like = schedule(model.vit, images, target, unit, tolerance)
    merged = [max(1, r) for r in like.schedule(model.depth)]  # or no shift would merge anything there
    fit_thresholds(model, images, ToMeConfig(r=merged))


def gated(vit: VisionTransformer, images: Tensor) -> AViT:
    """A-ViT around a copy of `vit`, turned to carry the gate fitted to `images`; not yet at any budget.

    Raises:
        TypeError: the ViT's residual stream cannot be turned.
        ValueError: it has no class token.
    """
    turned = copy.deepcopy(vit)
    scale, _ = fit_gate(turned, images)
    return AViTConfig(gate_scale=SHARPNESS * scale, class_token="stays").build(turned)


def schedule(
    vit: VisionTransformer, images: Tensor, target: float, unit: Unit = "share", tolerance: float = 0.01
) -> ToMeConfig:
    """ToMe's numbers of merged tokens that meet a target with the fewest merges, as even over the blocks as can be.

    Raises:
        TypeError: the ViT cannot merge.
        ValueError: merging half of the tokens in every block does not meet the target.
    """
    model = ToMeConfig(r=0).build(vit)
    rows, columns = patch_grid(vit, images)
    most = model.depth * (rows * columns // 2)
    few = images if unit == "images_per_s" else images[:1]  # all images cost the same

    def evenly(merged: int) -> ToMeConfig:
        each, more = divmod(merged, model.depth)
        return ToMeConfig(r=[each + (block < more) for block in range(model.depth)])

    def reached(merged: int) -> float:
        model.config = evenly(merged)
        return getattr(attempt(model, few), unit)

    def meets(merged: int) -> bool:
        cost = reached(merged)
        return cost * (1 + tolerance) >= target if unit == "images_per_s" else cost <= target * (1 + tolerance)

    merged = bisect_left(range(most), True, key=meets)
    if merged == most and not meets(most):
        raise ValueError(
            f"no number of merged tokens meets the target of {target:g} ({unit}): the nearest is {reached(most):.3g}, "
            "with half of the tokens merged in every block"
        )
    return evenly(merged)
