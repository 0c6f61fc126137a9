"""Interleaved timing: the calls to compare take turns, so that a busy spell of the machine falls on all of them."""

import time
from collections.abc import Callable

import torch
from tqdm import tqdm


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
    for turn in tqdm(range(rounds), bar, leave=False, disable=bar is None):
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
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
