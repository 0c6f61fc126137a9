"""A method kept outside the package: drop the patches of least norm, as many as a threshold says, after one block.

Run it: python examples/your_own_method.py
"""

from dataclasses import dataclass
from typing import ClassVar

import timm
import torch
from torch import Tensor

import adaptvit
from adaptvit import DropConfig, Knob, Tokens


@dataclass(frozen=True, kw_only=True)
class NormConfig(DropConfig):
    """Keep patches whose norm, over the image's largest, is a threshold or more."""

    method: ClassVar[str] = "norm"
    knob: ClassVar[Knob] = Knob("threshold", sign=-1, lowest=0.0, highest=1.0, step=0.05)
    threshold: float = 0.9

    def decide(self, before: Tokens, after: Tokens, block: int) -> Tensor | None:
        norm = after.grid(after.x.float().norm(dim=-1))
        return norm >= self.threshold * norm[:, 1:].amax(dim=1, keepdim=True) if block == 2 else None


def main() -> None:
    """Fit the method to a budget, and turn the dial to others."""
    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_patch16_224", img_size=112)
    images = torch.randn(8, 3, 112, 112)
    model = adaptvit.adapt(vit, images, 0.7, NormConfig())
    for share in (0.9, 0.7, 0.5):
        model.compute = share
        with torch.inference_mode():
            found = model(images, detailed=True).usage.share
        told = f"{found.mean():.0%} of dense MACs ({found.min():.0%}-{found.max():.0%})"
        print(f"threshold {model.config.threshold:.3f}: {told}")


if __name__ == "__main__":
    main()
