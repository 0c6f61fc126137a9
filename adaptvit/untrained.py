"""A pretrained ViT made adaptive without training: what a method can find out from images alone, then its budget."""

import copy
from collections.abc import Callable
from typing import Annotated, Literal, get_args

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from adaptvit.budget import BATCH, Trial, Unit, check_target, meet_target
from adaptvit.checks import In, checked
from adaptvit.losses import distillation
from adaptvit.methods.ats import ATSConfig
from adaptvit.methods.avit import AViT, AViTConfig
from adaptvit.methods.avit_gate import fit_gate
from adaptvit.methods.evit import EViTConfig
from adaptvit.methods.full import FullConfig
from adaptvit.methods.tome import MergeConfig, MergingViT, ToMeConfig, fit_thresholds
from adaptvit.model import AdaptiveViT
from adaptvit.usage import check_finite

Untrained = Literal["merge", "tome", "ats", "evit", "avit", "random"]
"""Methods that need no training; `random` is ATS that keeps any patches, which the others are held against."""
UNTRAINED: tuple[Untrained, ...] = get_args(Untrained)
INFLECTIONS = (0.0, 0.5, 1.0)
"""ToMe's schedules that merging's thresholds are fitted to: even, and rising with depth by half or from nothing."""
SHARPNESS = 6.0
"""How far the logits of A-ViT's scores spread: patches halt neither all at similar depths nor some at once."""


@checked
def adapt(
    vit: VisionTransformer,
    method: Untrained,
    images: Tensor,
    target: float,
    unit: Unit = "share",
    tolerance: Annotated[float, In("(0, 1)")] = 0.01,
    labels: Tensor | None = None,
    tell: Callable[[Trial], object] | None = None,
) -> AdaptiveViT:
    """Make a pretrained ViT adaptive, without training, so that `images` cost `target`.

    Merging by similarity gets the thresholds of ToMe at that cost, the schedule being found too: `fit_merging`.

    Args:
        vit: in evaluation mode; the model shares its weights. A-ViT has a copy, turned to carry the fitted gate.
        images: calibration batch, as the model takes them; the more, the better the budget holds on others.
        target, unit, tolerance, labels, tell: as `meet_target` takes them.
    Raises:
        TypeError: the method cannot run on this ViT.
        ValueError: A-ViT and a ViT without a class token, or a target that cannot be met.
    """
    check_target(target, unit)
    model: AdaptiveViT
    match method:
        case "tome":
            model = ToMeConfig().build(vit)
            if labels is None and unit != "images_per_s":
                images = images[:BATCH]  # all cost the same, and trials tell the speed of a batch
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

    Of ToMe's schedules at that target, even and rising with depth, it is the one at which predictions for `images` are
    nearest to the dense model's, in mean KL divergence. Labels are not needed.

    Raises:
        TypeError: the model is of another method.
        ValueError: no number of merged tokens meets the target, or logits that are not finite.
    """
    some = images if unit == "images_per_s" else images[:1]  # all cost the same
    dense = _logits(FullConfig().build(model.vit), images)
    check_finite(dense, "logits")
    found: list[tuple[float, MergeConfig]] = []
    for inflection in INFLECTIONS:
        like = ToMeConfig(inflection=inflection).build(model.vit)
        try:
            merged = meet_target(like, some, target, unit, tolerance).schedule(model.depth)
        except ValueError:
            if found:
                continue  # rising schedules do not reach as low as even ones
            raise
        config = fit_thresholds(model, images, ToMeConfig(r=[max(1, r) for r in merged]))  # at 0 no shift would merge
        found.append((distillation(_logits(model, images), dense, "soft", 1.0).item(), config))
    _, model.config = min(found, key=lambda candidate: candidate[0])


@torch.inference_mode()
def _logits(model: AdaptiveViT, images: Tensor) -> Tensor:
    return torch.cat([model(batch).logits.float() for batch in images.split(BATCH)])


def gated(vit: VisionTransformer, images: Tensor) -> AViT:
    """A-ViT around a copy of `vit`, turned to carry the gate fitted to `images`; not yet at any budget.

    Raises:
        TypeError: the ViT's residual stream cannot be turned.
        ValueError: it has no class token.
    """
    turned = copy.deepcopy(vit)
    scale, _ = fit_gate(turned, images)
    return AViTConfig(gate_scale=SHARPNESS * scale, class_token="stays").build(turned)
