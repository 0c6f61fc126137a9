"""Steer a model to a budget by the one number that its method's config calls its knob.

meet_target     find the knob's value that meets a target on images
measure_dial    what its values cost, so that `model.compute` sets other budgets without images
"""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from adaptvit.checks import In, checked, valid
from adaptvit.macs import dense_macs, macs
from adaptvit.model import AdaptiveViT, Dial, Knob
from adaptvit.process import in_float64
from adaptvit.terminal import progress_bar
from adaptvit.tokens import Plan
from adaptvit.usage import check_finite, join

BATCH = 32
FINEST = 1e-3
"""Of a knob's small move: values that lie nearer are not told apart."""

Unit = Literal["share", "gmacs", "images_per_s"]


class OutOfReach(ValueError):
    """A budget that no value of a knob meets, though others are met."""


@dataclass(frozen=True)
class Trial:
    """What a model did on the calibration images with one value of its knob."""

    knob: float | None
    share: float
    """Executed MACs over timm's own, mean over images."""
    gmacs: float
    """Executed, in 1e9 MACs, mean over images."""
    images_per_s: float
    """Measured here and now, in batches of 32."""
    top1: float | None
    """Share of the images that were classified rightly; None without labels."""
    share_error: float | None = None
    """Standard error of `share`, by the spread over images: how far off it is to be expected on others like them. 0
    where all images cost the same, None of a single one."""


def attempt(model: AdaptiveViT, images: Tensor, labels: Tensor | None = None) -> Trial:
    """Run a model on calibration images.

    Raises:
        ValueError: it is in training mode, where the same knob may compute more; or logits that are not finite, of an
            image that is named by its place.
    """
    if model.training:
        raise ValueError("the model is in training mode, in which it does not compute what it will: call eval() first")
    config = model.config
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the search passes through gates that halt everything
        start = time.perf_counter()
        outputs = [model(batch, detailed=True) for batch in in_batches(images, f"measuring {_set_to(config)}")]
        logits = torch.cat([output.logits for output in outputs])
        check_finite(logits, "logits")
        top1 = None if labels is None else in_float64(logits.argmax(dim=1) == labels).mean().item()
        usage = join([output.usage for output in outputs])
        executed = in_float64(macs(usage, model.shape))  # an accelerator is waited for here
        seconds = time.perf_counter() - start
    knob = None if config.knob is None else getattr(config, config.knob.field)
    mean, dense = executed.mean().item(), dense_macs(model.shape, usage.grid)
    error = (executed.std() / len(images) ** 0.5).item() / dense if len(images) > 1 else None
    return Trial(knob, mean / dense, mean / 1e9, len(images) / seconds, top1, error)


def in_batches(images: Tensor, words: str) -> Iterable[Tensor]:
    """Images in batches, with a bar where they take more than a second.

    Args:
        words: what is done with them.
    """
    return progress_bar(images.split(BATCH), words, unit="batch", delay=1)


def _set_to(config: Any) -> str:
    """A model in words: where its knob stands."""
    return config.title if config.knob is None else f"{config.knob.field} {getattr(config, config.knob.field):.4g}"


def check_target(target: float, unit: Unit) -> None:
    """Refuse a target that is no amount of `unit`.

    Raises:
        ValueError: naming both.
    """
    valid("unit", unit, Unit)
    share = In("(0, 1]", "the share of the dense MACs", "60 % is 0.6")
    valid("target", target, Annotated[float, share if unit == "share" else In("(0, inf)", unit)])


@checked
def meet_target(
    model: AdaptiveViT,
    images: Tensor,
    target: float,
    unit: Unit = "share",
    tolerance: Annotated[float, In("(0, 1)")] = 0.01,
    labels: Tensor | None = None,
    tell: Callable[[Trial], object] | None = None,
    measure: Callable[[AdaptiveViT, Tensor, Tensor | None], Trial] | None = None,
) -> Any:
    """Move a model's knob so that `images` cost `target`: outwards from where it stands, then by bisection.

    Args:
        model: of a method that has a knob, in evaluation mode; its `config` is replaced.
        images: calibration batch, as the model takes them; the more, the better the budget holds on others.
        target: in `unit`, above 0; a share is at most 1.
        unit: `share` of timm's own MACs; `gmacs`, 1e9 MACs an image; `images_per_s`, measured on this machine.
        tolerance: how far from `target`, relative to it, is near enough.
        labels: classes of the images, for the accuracy of each trial.
        tell: called with each trial.
        measure: makes a trial in the place of `attempt`: processes that search together average theirs, and so take the
            same path.
    Returns:
        The model's new config. Where the cost jumps over the target, the value on the frugal side; where everything the
        method can compute costs less than the target, the value that computes it.
    Raises:
        OutOfReach: no value of the knob meets the target; the model is as it was, as after any error.
        ValueError: the method has no knob, the model is in training mode, or logits that are not finite.
    """
    check_target(target, unit)
    config, knob = model.config, _knob(model)
    try:
        value = _search(model, knob, images, target, unit, tolerance, labels, tell, measure or attempt)
    except BaseException:
        model.config = config
        raise
    model.config = replace(config, **{knob.field: value})
    return model.config


def _knob(model: AdaptiveViT) -> Knob:
    knob = model.config.knob
    if knob is None:
        raise ValueError(f"{type(model.config).__name__} has no knob to move: it always computes the same")
    return knob


def _search(
    model: AdaptiveViT,
    knob: Knob,
    images: Tensor,
    target: float,
    unit: Unit,
    tolerance: float,
    labels: Tensor | None,
    tell: Callable[[Trial], object] | None,
    measure: Callable[[AdaptiveViT, Tensor, Tensor | None], Trial],
) -> float:
    """The knob's value; the model's config is left wherever the search ends."""
    config = model.config

    def excess(value: float) -> float:
        """Cost over target, less 1."""
        model.config = replace(config, **{knob.field: value})
        trial = measure(model, images, labels)
        if tell is not None:
            tell(trial)
        reached = getattr(trial, unit)
        return (target / reached if unit == "images_per_s" else reached / target) - 1

    frugal, generous = (knob.lowest, knob.highest) if knob.sign > 0 else (knob.highest, knob.lowest)
    value = min(max(getattr(config, knob.field), knob.lowest), knob.highest)
    if unit == "images_per_s":
        measure(model, images, None)  # the first pass is slower than those that follow
    over = excess(value)
    if abs(over) <= tolerance:
        return value
    if over < 0 and excess(generous) <= tolerance:
        return generous
    end, step = (frugal, knob.step) if over > 0 else (generous, knob.step)
    while True:  # away from where the config stands, in steps that double, until the target lies between
        near, value = value, value + step if end > value else value - step
        value, step = min(max(value, knob.lowest), knob.highest), 2 * step
        there = excess(value)
        if abs(there) <= tolerance:
            return value
        if (there > 0) != (over > 0):
            break
        if value == end:
            reached = target / (1 + there) if unit == "images_per_s" else target * (1 + there)
            raise OutOfReach(
                f"no {knob.field} meets the target of {target:g} ({unit}): the nearest is {reached:.3g}; set "
                f"{type(config).__name__}'s other fields otherwise, or ask for another"
            )
    frugal, generous = (value, near) if over > 0 else (near, value)
    while abs(generous - frugal) > FINEST * knob.step:
        middle = (frugal + generous) / 2
        over = excess(middle)
        if abs(over) <= tolerance:
            return middle
        if over < 0:
            frugal = middle
        else:
            generous = middle
    return frugal


GAP = 0.1
"""Shares of neighbouring values on a dial lie no further apart, where the knob has values between."""
MOST_TRIALS = 24
"""Values of a knob that are tried for a dial."""


def measure_dial(model: AdaptiveViT, images: Tensor, known: Mapping[float, float] | None = None) -> Dial:
    """What the values of a model's knob cost, from as little as its method can compute to as much.

    Args:
        model: of a method that has a knob, in evaluation mode; its `config` is as before in the end.
        images: as the model takes them; the more, the better the dial holds on others.
        known: shares by the knob's value, where some were measured on these images before.
    Raises:
        ValueError: what `meet_target` raises of the model.
    """
    config, knob = model.config, _knob(model)
    start = min(max(getattr(config, knob.field), knob.lowest), knob.highest)
    shares = dict(known or {})

    def share(value: float) -> float:
        if value not in shares:
            model.config = replace(config, **{knob.field: value})
            shares[value] = attempt(model, images).share
        return shares[value]

    try:
        for end, direction in ((knob.lowest, -1), (knob.highest, 1)):
            step, value = knob.step, start
            while abs(share(value) - share(end)) > GAP / 2 and len(shares) < MOST_TRIALS:
                value = min(max(value + direction * step, knob.lowest), knob.highest)
                step *= 2
        while len(shares) < MOST_TRIALS:
            tried = sorted(shares)
            gaps = [
                (abs(shares[after] - shares[before]), (before + after) / 2)
                for before, after in pairwise(tried)
                if after - before > FINEST * knob.step
            ]
            widest, middle = max(gaps, default=(0.0, 0.0))
            if widest <= GAP:
                break
            share(middle)
    finally:
        model.config = config
    return _rising(shares, knob.sign, start)


def measure_plan(model: AdaptiveViT, images: Tensor) -> Plan:
    """How many tokens a model leaves wherever it drops some: by which `adaptvit.Slab` plans its rows.

        model.plan = adaptvit.measure_plan(model, images)

    Args:
        model: in evaluation mode, its knob where it is to be.
        images: as the model takes them; with 1,000 few rows are kept in reserve.
    Raises:
        ValueError: the model is in training mode, or drops nothing.
    """
    if model.training:
        raise ValueError("the model is in training mode, in which it does not compute what it will: call eval() first")
    with torch.inference_mode():
        counts = in_float64(torch.cat([model.counts(batch) for batch in images.split(BATCH)], dim=1))
    if not counts.shape[0]:
        raise ValueError(f"{model.config.title} drops no tokens, so that there is nothing to plan")
    means, spreads = (tuple(found.tolist()) for found in (counts.mean(dim=1), counts.std(dim=1)))
    return Plan(means=means, spreads=spreads, images=len(images))


def _rising(shares: dict[float, float], sign: int, start: float) -> Dial:
    """The values from the least share on; of several that cost the same, the one nearest to `start`."""
    kept: list[float] = []
    for value in sorted(shares, key=lambda value: sign * value):
        if kept and shares[value] <= shares[kept[-1]]:
            if shares[value] == shares[kept[-1]] and abs(value - start) < abs(kept[-1] - start):
                kept[-1] = value
            continue
        kept.append(value)
    return Dial(tuple(kept), tuple(shares[value] for value in kept))
