"""The plain ViT through the same machinery: nothing is dropped. What every other method is compared with."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from adaptvit.methods.base import MethodConfig, Role
from adaptvit.model import AdaptiveViT
from adaptvit.tokens import Packed, Tokens
from adaptvit.usage import Output, Usage


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """Every token through every block; of the last block only what the classifier reads."""

    method: ClassVar[str] = "full"
    title: ClassVar[str] = "dense"
    role: ClassVar[Role] = "dense"

    def build(self, vit: VisionTransformer) -> "Full":
        """Wrap `vit`, sharing its weights."""
        return Full(vit, self)


class Full(AdaptiveViT):
    """timm's own forward, block by block."""

    traces = True

    def run(self, images: Tensor, layout: type[Tokens] | None = None) -> Output:
        """Logits equal to `vit(images)`."""
        tokens, grid = self.start(images, layout or Packed)
        depth = torch.full(tokens.shape, self.depth, device=images.device)
        for number in range(self.depth):
            tokens = self.run_block(number, tokens)
        usage = Usage.of_depth(depth, self.heads, grid, self.prefix, last_reads=self.read)
        return self.finish(self.read_slots(tokens, tokens.x), usage)
