"""A method kept outside the package: drop the patches of least norm, as many as a threshold says, after one block.

Run it: python examples/your_own_method.py
"""

from dataclasses import dataclass
from typing import ClassVar

import timm
import torch
from torch import Tensor

import adaptvit
from adaptvit import AdaptiveViT, Knob, Output, Packed, Usage
from adaptvit.vit import classify, embed, run_block


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Keep patches whose norm, over the image's largest, is above a threshold."""

    method: ClassVar[str] = "norm"
    knob: ClassVar[Knob] = Knob("threshold", sign=-1, lowest=0.0, highest=1.0, step=0.05)

    threshold: float = 0.9
    """Share of the image's largest norm, in [0, 1]."""
    block: int = 3
    """The block after which patches are dropped, 1-based."""

    def build(self, vit: torch.nn.Module) -> "NormViT":
        """Wrap `vit`, sharing its weights."""
        return NormViT(vit, self)


class NormViT(AdaptiveViT):
    """A ViT with a class token that drops small patches once."""

    def forward(self, images: Tensor, layout: type[adaptvit.Masked] | type[Packed] | None = None) -> Output:
        x, grid = embed(self.vit, images)
        tokens = (layout or Packed).of(x)
        depth = torch.zeros(tokens.shape, dtype=torch.long, device=x.device)
        for number, block in enumerate(self.vit.blocks, start=1):
            tokens.stamp(depth, number)
            tokens = run_block(block, tokens)
            if number == self.config.block:
                norm = tokens.grid(tokens.x.float().norm(dim=-1))
                large = norm >= self.config.threshold * norm[:, self.prefix :].amax(dim=1, keepdim=True)
                tokens = tokens.keep(large | (torch.arange(x.shape[1], device=x.device) < self.prefix))
        logits, distilled = classify(self.vit, tokens.first(tokens.x, self.read))
        return Output(logits, Usage.of_depth(depth, self.heads, grid, self.prefix), distilled=distilled)


def main() -> None:
    """Steer the method to three budgets."""
    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_patch16_224", img_size=112).eval()
    images = torch.randn(8, 3, 112, 112)
    model = NormConfig().build(vit)
    for target in (0.9, 0.7, 0.5):
        config = adaptvit.meet_target(model, images, target)
        with torch.inference_mode():
            usage = model(images).usage
        share = adaptvit.macs(usage, model.shape) / adaptvit.dense_macs(model.shape, usage.grid)
        print(
            f"threshold {config.threshold:.3f}: {share.mean():.0%} of dense MACs ({share.min():.0%}-{share.max():.0%})"
        )


if __name__ == "__main__":
    main()
