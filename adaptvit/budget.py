"""After training: find the value of a method's knob at which a model executes a given share of the dense MACs."""

import warnings
from dataclasses import replace
from typing import Any, TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from adaptvit.macs import dense_macs, macs
from adaptvit.model import MethodConfig
from adaptvit.usage import join

MAX_STEPS = 40
BATCH = 32

Config = TypeVar("Config", bound=MethodConfig)


def executed_share(config: MethodConfig, vit: VisionTransformer, images: Tensor) -> float:
    """Executed MACs over dense MACs, averaged over `images`, of `config` around `vit` in its present mode.

    In training mode no image leaves its batch early, so that the same knob executes more.
    """
    model = config.build(vit)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the search passes through gates that halt everything
        usage = join([model(batch).usage for batch in images.split(BATCH)])
    return macs(usage, model.shape).double().mean().item() / dense_macs(model.shape, usage.grid)


def meet_target(
    config: Config, vit: VisionTransformer, images: Tensor, target: float, tolerance: float = 0.005
) -> Config:
    """The config with its knob moved so that `images` cost `target` of the dense MACs.

    Args:
        config: a method's config that has a knob.
        images: calibration batch, as the model takes them; the more, the better the budget holds on others.
        target: share of timm's own MACs, in (0, 1].
        tolerance: how far from `target`, as a share of the dense MACs, is near enough.
    Returns:
        A copy of `config`. Where the executed MACs jump over the target, the value just under it.
    Raises:
        ValueError: the method has no knob, or no value of it comes down to the target.
    """
    knob = getattr(config, "knob", None)
    if knob is None:
        raise ValueError(f"{type(config).__name__} has no knob to move: it always computes the same")
    if not 0 < target <= 1:
        raise ValueError(f"target must lie in (0, 1], the share of the dense MACs, got {target}")

    def at(value: float) -> Any:
        return replace(config, **{knob.field: value})  # type: ignore[type-var]

    frugal, generous = (knob.lowest, knob.highest) if knob.sign > 0 else (knob.highest, knob.lowest)
    if executed_share(at(generous), vit, images) <= target + tolerance:
        return at(generous)
    for step in range(MAX_STEPS):
        middle = frugal if step == 0 else (frugal + generous) / 2
        trial = at(middle)
        share = executed_share(trial, vit, images)
        if abs(share - target) <= tolerance:
            return trial
        if share <= target:
            frugal = middle
        elif step == 0:
            raise ValueError(f"no {knob.field} comes down to target {target:g}: the least is {share:.3f} of dense MACs")
        else:
            generous = middle
    return at(frugal)
