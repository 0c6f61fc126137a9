"""Interleaved timing: the calls to compare take turns, so that a busy spell of the machine falls on all of them.

interleaved     any calls
speeds          adaptive models beside plain ViTs: a `Speed` each
measure_speed   one of each
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from adaptvit.macs import Shape, dense_macs, macs
from adaptvit.model import AdaptiveViT
from adaptvit.process import in_float64
from adaptvit.terminal import progress_bar
from adaptvit.tokens import LAYOUTS
from adaptvit.usage import Usage


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device | None = None, bar: str | None = None
) -> dict[str, list[float]]:
    """Time every call once per round, after one untimed warm-up each; every round starts with the next call.

    Args:
        calls: what to time, by name; gradients and modes are the caller's business.
        rounds: timed turns of each call, at least 1.
        device: an accelerator to wait for before and after each call.
        bar: words beside a progress bar, which moves between rounds; None shows none.
    Returns:
        Seconds by name, one for each round, in the order of the rounds.
    Raises:
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    for call in calls.values():
        call()
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in progress_bar(range(rounds), bar, shown=bar is not None):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(_seconds(calls[name], device))
    return seconds


def _seconds(call: Callable[[], object], device: torch.device | None) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Speed:
    """Forward passes of one batch, timed in turns; medians over the rounds."""

    dense: float
    """Images per second of the timm model."""
    packed: float
    """Images per second of the adaptive model, live tokens only."""
    gain: float
    """Time of the timm model over that of the packed one."""
    ideal: float
    """Dense MACs over executed MACs."""
    masked: float = math.nan
    """Images per second of the adaptive model, every slot computed; NaN where that was not timed."""

    @classmethod
    def of(cls, seconds: Mapping[str, Sequence[float]], images: int, usage: Usage, shape: Shape) -> "Speed":
        """What the seconds of `interleaved` say, of calls named as the fields are, on so many images of that usage."""
        executed = in_float64(macs(usage, shape)).mean().item()
        return cls(
            **{name: images / median(times) for name, times in seconds.items()},
            gain=median(slow / fast for slow, fast in zip(seconds["dense"], seconds["packed"], strict=True)),
            ideal=dense_macs(shape, usage.grid) / executed,
        )

    @property
    def ratio(self) -> float:
        """What is realised of the ideal gain."""
        return self.gain / self.ideal


def speeds(
    models: Mapping[str, AdaptiveViT],
    images: Mapping[str, Tensor],
    rounds: int,
    layouts: Sequence[str] = tuple(LAYOUTS),
    dense: tuple[nn.Module, Tensor] | None = None,
    bar: str | None = None,
) -> dict[str, Speed]:
    """Time adaptive models and plain ViTs, all in turns.

    Args:
        models: in evaluation mode.
        images: the batch of each, (B, channels, height, width).
        layouts: `packed`, and `masked` where that is to be timed too.
        dense: a plain ViT, and its batch, that all are held against; None is each model's own, on its own batch.
        bar: words beside a progress bar; None shows none.
    """
    calls: dict[str, Callable[[], object]] = {}
    beside = {}
    for name, model in models.items():
        vit, batch = dense or (model.vit, images[name])
        beside[name] = f"dense {id(vit)} {id(batch)}"
        calls[beside[name]] = partial(vit, batch)
        calls |= {f"{layout} {name}": partial(model, images[name], LAYOUTS[layout]) for layout in layouts}
    device = next(iter(images.values())).device
    with torch.inference_mode():
        usages = {name: model(images[name], detailed=True).usage for name, model in models.items()}
        seconds = interleaved(calls, rounds, device, bar)
    found = {}
    for name, model in models.items():
        own = {layout: seconds[f"{layout} {name}"] for layout in layouts} | {"dense": seconds[beside[name]]}
        found[name] = Speed.of(own, len(images[name]), usages[name], model.shape)
    return found


def measure_speed(vit: nn.Module, model: AdaptiveViT, images: Tensor, rounds: int = 10) -> Speed:
    """Time the timm model and both executions of the adaptive one on the same (B, channels, height, width) images.

    The models are left in evaluation mode.
    """
    vit.eval()
    (found,) = speeds({"": model.eval()}, {"": images}, rounds, dense=(vit, images)).values()
    return found
