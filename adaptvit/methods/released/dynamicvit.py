"""DynamicViT as its released code trains it."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from adaptvit.methods.base import Role
from adaptvit.methods.dynamicvit import DynamicViT, DynamicViTConfig


@dataclass(frozen=True, kw_only=True)
class ReleasedDynamicViTConfig(DynamicViTConfig):
    """Dynamic token sparsification (Rao et al., NeurIPS 2021) as its released code trains it.

    Differs from `DynamicViTConfig`, whose evaluation it has:

    - 1e-6 is added to the masked softmax, in all blocks; there: it is over the patches kept and oneself;
    - none of an image's patches may be kept, and what the next predictor reads is then 0 / 0; there: one at least is;
    - predictors' log-odds are drawn by as they are; there: with `top-k`, as many patches as are asked for, and with
      `threshold` those above it, however much attention would have more of all;
    - a batch that is asked for its share is that of one process; there: of all.
    """

    method: ClassVar[str] = "dynamicvit_released"
    title: ClassVar[str] = "DynamicViT as released"
    role: ClassVar[Role] = "released"

    def build(self, vit: nn.Module) -> "ReleasedDynamicViT":
        """Wrap `vit`, sharing its weights, with predictors that have yet to be trained."""
        return ReleasedDynamicViT(vit, self)


class ReleasedDynamicViT(DynamicViT):
    """A ViT with predictors that are trained as the released code does."""

    epsilon: ClassVar[float] = 1e-6

    def as_asked(self, score: Tensor, live: Tensor, stage: int, patches: Tensor | None) -> Tensor:
        return score

    def compared(self, score: Tensor, live: Tensor) -> Tensor:
        return score

    def kept_of(self, drawn: Tensor, live: Tensor) -> Tensor:
        return drawn > 0

    def shares_kept(self, decided: list[Tensor], patches: Tensor | None = None) -> dict[str, Tensor]:
        means = super().shares_kept(decided, patches)
        return {"ratio": self.distance(means["shares"])} if "shares" in means else means
