"""The plain ViT through the same machinery: nothing is dropped. What every other method is compared with."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import nn

from adaptvit.methods.base import MethodConfig, Role
from adaptvit.model import AdaptiveViT, Left
from adaptvit.tokens import Tokens
from adaptvit.usage import Usage


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """Every token through every block; of the last block only what the classifier reads."""

    method: ClassVar[str] = "full"
    title: ClassVar[str] = "dense"
    role: ClassVar[Role] = "dense"

    def build(self, vit: nn.Module) -> "Full":
        """Wrap `vit`, sharing its weights."""
        return Full(vit, self)


class Full(AdaptiveViT):
    """The ViT's own forward, block by block."""

    traces = True

    @property
    def even(self) -> bool:
        return True

    def run(self, tokens: Tokens) -> Left:
        """Logits equal to `vit(images)`."""
        depth = self.deepest(tokens)
        for number in range(self.depth):
            tokens = self.run_block(number, tokens)
        usage = partial(Usage.of_depth, depth, self.heads, tokens.source.grid, self.prefix, last_reads=self.read)
        return self.finish(self.read_slots(tokens, tokens.x), usage)
