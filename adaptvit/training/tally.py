"""What an epoch came to, counted batch by batch on the device, and read now and then: to read is to wait for it."""

from typing import Any

import torch
from torch import Tensor

from adaptvit.data import IGNORED
from adaptvit.extras import needed
from adaptvit.macs import dense_macs, macs
from adaptvit.model import AdaptiveViT
from adaptvit.process import widest
from adaptvit.training.recipe import Epoch
from adaptvit.usage import Output

with needed("training"):
    from accelerate import Accelerator  # type: ignore[import-untyped]

READ_EVERY = 10
"""Steps between two readings."""


class Tally:
    """Running sums over the images of an epoch, on the device of this process; `read` adds up those of all.

    Attributes:
        steps: counted.
        losses: of the steps since the last reading, on the device.
    """

    def __init__(self, model: AdaptiveViT, accelerator: Accelerator) -> None:
        self.model, self.accelerator = model, accelerator
        self.steps = self.images = self.unreadable = 0
        self.losses: list[Tensor] = []
        self._dense = 0
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._depths: Tensor | None = None
        self._means: dict[str, float] = {}

    def add(self, output: Output, labels: Tensor, task: Tensor, loss: Tensor, unreadable: int) -> None:
        """Count a batch, without waiting for it.

        Args:
            labels: (B,), or of pixels, on the device.
            task: the mean loss of the task.
            loss: with the method's terms.
            unreadable: images that could not be read.
        """
        usage, shape, images = output.usage, self.model.shape, len(labels)
        self.steps += 1
        self.images += images
        self.unreadable += unreadable
        self.losses.append(loss.detach())
        self._dense = self._dense or dense_macs(shape, usage.grid)
        counted = labels != IGNORED  # all, where images have the labels and not pixels
        right = self._wide((output.logits.detach().argmax(dim=1) == labels) & counted)
        found = {
            "loss": images * task.detach(),
            "accuracy": right.sum() / (self._wide(counted).sum() / images).clamp(min=1),
            "macs": self._wide(macs(usage, shape)).sum() / self._dense,
        }
        found |= {f"terms.{name}": images * term.detach() for name, term in output.terms.items()}
        if usage.live is not None:
            depth = usage.patch_depth.flatten(1)
            found["depth"] = self._wide(depth).mean(dim=1).sum()
            ends = torch.stack([-depth.min(), depth.max()])
            self._depths = ends if self._depths is None else torch.maximum(self._depths, ends)
        self._names = [*found]
        sums = torch.stack([self._wide(one) for one in found.values()])
        self._sums = sums if self._sums is None else self._sums + sums

    def _wide(self, t: Tensor) -> Tensor:
        return t.to(widest(t.device))

    def read(self, failed: bool = False) -> bool:
        """Wait for what was counted; whether all goes well: each loss is finite, and no process has failed."""
        assert self._sums is not None
        spoilt = (~torch.stack(self.losses).isfinite()).any() if self.losses else torch.zeros_like(self._sums[0])
        told = self._sums.new_tensor([failed, self.images, self.unreadable])
        amiss, failures, images, unreadable, *sums = self.accelerator.reduce(
            torch.cat([self._wide(spoilt)[None], told, self._sums])
        ).tolist()
        if amiss or failures:
            return False
        self.losses = []
        self._means = {name: one / images for name, one in zip(self._names, sums, strict=True)}
        self._means["unreadable"] = unreadable
        return True

    def kept(self) -> dict[str, Any]:
        """What was counted, of all processes, which all call this; for `go_on`."""
        assert self._sums is not None
        counts = self._sums.new_tensor([self.images, self.unreadable])
        images, unreadable, *sums = self.accelerator.reduce(torch.cat([self._wide(counts), self._sums]))
        depths = None if self._depths is None else self.accelerator.gather(self._depths[None]).amax(dim=0)
        return {
            "steps": self.steps,
            "images": int(images),
            "unreadable": int(unreadable),
            "sums": torch.stack(sums),
            "depths": depths,
        }

    def go_on(self, kept: dict[str, Any]) -> None:
        """Begin with what an earlier run has counted, in one process for all."""
        device = self.accelerator.device
        self.steps, self._depths = kept["steps"], None if kept["depths"] is None else kept["depths"].to(device)
        if self.accelerator.is_main_process:
            self.images, self.unreadable, self._sums = kept["images"], kept["unreadable"], kept["sums"].to(device)

    def line(self) -> str:
        """The means of all processes as they were read, for a progress bar."""
        means = self._means
        depth = f", depth {means['depth']:.2f}" if "depth" in means else ""
        return f"loss {means['loss']:.3f}, accuracy {means['accuracy']:.1%}, MACs {means['macs']:.1%}{depth}"

    def epoch(self, number: int, learning_rate: float, seconds: float, test: dict[str, Any] | None) -> Epoch:
        """The means over the images of all processes, as they were read."""
        means, config = self._means, self.model.config
        least = most = None
        if self._depths is not None:
            negated, most = self.accelerator.gather(self._depths[None]).amax(dim=0).tolist()
            least = -negated
        knob = getattr(config, "knob", None)
        return Epoch(
            epoch=number,
            loss=means["loss"],
            terms={name.removeprefix("terms."): mean for name, mean in means.items() if name.startswith("terms.")},
            accuracy=means["accuracy"],
            macs=means["macs"],
            depth_mean=means.get("depth"),
            depth_min=least,
            depth_max=most,
            learning_rate=learning_rate,
            knob=None if knob is None else getattr(config, knob.field),
            unreadable=round(means["unreadable"]),
            test=test,
            seconds=seconds,
        )
