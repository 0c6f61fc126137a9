"""Where the cells of `gpu.py` run, how they are timed, and what a forward asks of a device."""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_ragged import marked
from launches import count
from torch import Tensor, nn
from torch.profiler import profile

from adaptvit import AdaptiveViT, Plan, Tokens

BATCHES = 6
"""Different batches that take turns: one that comes again would find kernels planned for its number of tokens."""
MODELS: dict[str, list[tuple[str, int, tuple[int, ...]]]] = {
    "cuda": [
        ("deit_small_patch16_224", 224, (256, 32, 1)),
        ("deit_base_patch16_224", 224, (256, 32, 1)),
        ("vit_large_patch14_224", 224, (256, 32, 1)),
        ("vit_large_patch14_224", 336, (1,)),
    ],
    "cpu": [("test_vit", 64, (4, 1))],
}
"""By device: timm's name, pixels, batches."""


@dataclass
class Job:
    """Where it runs, for how long, and where its lines go."""

    device: str
    seconds: float
    out: Path
    each: float = 0.6
    """Seconds that a timing takes, warming up left out."""
    start: float = field(default_factory=time.perf_counter)
    lines: list[dict[str, Any]] = field(default_factory=list)
    plans: dict[Any, Plan] = field(default_factory=dict)
    """Of `Slab`, by what they go by."""

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def half(self) -> str:
        """The precision that speed is measured in."""
        return "bf16" if self.cuda else "fp32"

    @property
    def models(self) -> list[tuple[str, int, tuple[int, ...]]]:
        return MODELS[self.device]

    @property
    def small(self) -> tuple[str, int, int]:
        """The smallest model, at its largest batch."""
        name, size, batches = self.models[0]
        return name, size, batches[0]

    def spent(self) -> float:
        return time.perf_counter() - self.start

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def batches(self, vit: Any, method: str, share: float, batch: int, dtype: torch.dtype) -> list[Tensor]:
        return [marked(vit, method, share, batch, seed, self.device).to(dtype) for seed in range(BATCHES)]

    def clock(self, calls: dict[str, Callable[[Any], object]], given: Any) -> dict[str, Any]:
        """Milliseconds of calls that take turns, each on one of `given` after another: median, p10, p90, the first."""
        turns, least = {name: cycle(given) for name in calls}, 0.02 if self.cuda else 0.0
        taken: dict[str, list[float]] = {name: [] for name in calls}
        first, repeats = {}, {}
        for name, call in calls.items():
            few = (len(given) + 1) // 2
            first[name] = self._seconds(call, turns[name], few) * 1e3
            repeats[name] = int(least / self._seconds(call, turns[name], few)) + 1
        end = time.perf_counter() + self.each
        while time.perf_counter() < end or len(taken[name]) < 3:
            for name, call in calls.items():
                taken[name].append(self._seconds(call, turns[name], repeats[name]) * 1e3)
        found = {}
        for name, times in taken.items():
            found[name] = [round(float(one), 4) for one in (*np.quantile(times, [0.5, 0.1, 0.9]), first[name])]
        return found

    def _seconds(self, call: Callable[[Any], object], turn: Iterator[Any], repeats: int) -> float:
        self.wait()
        start = time.perf_counter()
        for one in islice(turn, repeats):
            call(one)
        self.wait()
        return (time.perf_counter() - start) / repeats

    def peak(self, call: Callable[[], object]) -> float | None:
        """MiB that a call needs at most; None on a CPU."""
        if not self.cuda:
            call()
            return None
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() / 2**20

    def compiled(self, model: nn.Module, mode: str = "default") -> Any:
        return torch.compile(model, fullgraph=True, **({"mode": mode} if self.cuda else {"backend": "eager"}))

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def asked(job: Job, model: AdaptiveViT, images: Tensor, layout: type[Tokens]) -> dict[str, int]:
    """Kernels and waits of a forward: the device's own count, or what a CPU can count."""
    if not job.cuda:
        return {name: sum(each) for name, each in count(model, images, layout).items()}
    with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(images, layout)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    with torch.inference_mode(), profile() as seen:
        model(images, layout)
        job.wait()
    return {"kernels": len(on_device(seen)), "waits": sum("synchroniz" in str(one.message) for one in caught)}


def on_device(seen: profile) -> list[Any]:
    """Kernels, of what a profiler saw."""
    return [one for one in seen.events() if one.device_type.name == "CUDA" and not one.name.startswith("Mem")]
