"""The plain ViT through the same machinery: nothing is dropped. What every other method is compared with."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from adaptvit.model import AdaptiveViT, Knob
from adaptvit.tokens import Packed, Tokens
from adaptvit.usage import Output, Usage
from adaptvit.vit import classify, embed, run_block


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """Every token through every block; of the last block only what the classifier reads."""

    method: ClassVar[str] = "full"
    knob: ClassVar[Knob | None] = None

    def build(self, vit: VisionTransformer) -> "Full":
        """Wrap `vit`, sharing its weights."""
        return Full(vit, self)


class Full(AdaptiveViT):
    """timm's own forward, block by block."""

    def forward(self, images: Tensor, layout: type[Tokens] | None = None) -> Output:
        """Logits equal to `vit(images)`."""
        x, grid = embed(self.vit, images)
        tokens = (layout or Packed).of(x)
        depth = torch.full(tokens.shape, self.depth, device=x.device)
        for block in self.vit.blocks[:-1]:
            tokens = run_block(block, tokens)
        if self.read is None:
            x = tokens.grid(run_block(self.vit.blocks[-1], tokens).x)
        else:
            slots = torch.arange(x.shape[1], device=x.device) < self.read
            tokens = run_block(self.vit.blocks[-1], tokens, slots[None])
            x = tokens.first(tokens.x, self.read)
        logits, distilled = classify(self.vit, x)
        usage = Usage.of_depth(depth, self.heads, grid, self.prefix, last_reads=self.read)
        return Output(logits, usage, distilled=distilled)
