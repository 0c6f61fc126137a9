"""What an epoch came to, counted batch by batch."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from adaptvit.extras import needed
from adaptvit.macs import dense_macs, macs
from adaptvit.model import AdaptiveViT
from adaptvit.training.recipe import Epoch
from adaptvit.usage import Output

with needed("training"):
    from accelerate import Accelerator  # type: ignore[import-untyped]


class Tally:
    """Running sums over the images of an epoch, on this process; `epoch` adds up those of all."""

    def __init__(self, model: AdaptiveViT) -> None:
        self.model = model
        self.images = 0
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.depths = (model.shape.depth, 0)

    def add(self, output: Output, labels: Tensor, task: Tensor, unreadable: int) -> None:
        """Count a batch: its outputs, its (B,) labels, the mean loss of the task, images that could not be read."""
        usage, shape, images = output.usage, self.model.shape, len(labels)
        self.images += images
        self.sums["loss"] += images * task.item()
        self.sums["unreadable"] += unreadable
        self.sums["accuracy"] += (output.logits.argmax(dim=1).cpu() == labels.cpu()).sum().item()
        self.sums["macs"] += macs(usage, shape).sum().item() / dense_macs(shape, usage.grid)
        for name, term in output.terms.items():
            self.sums[f"terms.{name}"] += images * term.item()
        if usage.live is not None:
            depth = usage.patch_depth
            self.sums["depth"] += depth.double().flatten(1).mean(dim=1).sum().item()
            self.depths = (min(self.depths[0], int(depth.min())), max(self.depths[1], int(depth.max())))

    def line(self) -> str:
        """The running means, for a progress bar."""
        means = {name: total / self.images for name, total in self.sums.items()}
        depth = f", depth {means['depth']:.2f}" if "depth" in means else ""
        return f"loss {means['loss']:.3f}, accuracy {means['accuracy']:.1%}, MACs {means['macs']:.1%}{depth}"

    def epoch(
        self, number: int, learning_rate: float, seconds: float, accelerator: Accelerator, test: dict[str, Any] | None
    ) -> Epoch:
        """The means over the images of all processes."""
        sums = torch.tensor([self.images, *self.sums.values()], dtype=torch.float64, device=accelerator.device)
        images, *totals = accelerator.reduce(sums).tolist()
        depths = accelerator.gather(torch.tensor([self.depths], device=accelerator.device))
        means = {name: total / images for name, total in zip(self.sums, totals, strict=True)}
        tracked = "depth" in means
        config = self.model.config
        knob = getattr(config, "knob", None)
        return Epoch(
            epoch=number,
            loss=means["loss"],
            terms={name.removeprefix("terms."): mean for name, mean in means.items() if name.startswith("terms.")},
            accuracy=means["accuracy"],
            macs=means["macs"],
            depth_mean=means["depth"] if tracked else None,
            depth_min=int(depths[:, 0].min()) if tracked else None,
            depth_max=int(depths[:, 1].max()) if tracked else None,
            learning_rate=learning_rate,
            knob=None if knob is None else getattr(config, knob.field),
            unreadable=round(means["unreadable"] * images),
            test=test,
            seconds=seconds,
        )
