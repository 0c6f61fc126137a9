"""ToMe: alike patches merged, a fixed number in each block. No training needed.

Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman: Token Merging: Your ViT But Faster, ICLR 2023.

Symbols of the paper: A and B the two sets of tokens, r the tokens merged in a block, s the patches in a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from adaptvit.budget import BATCH
from adaptvit.checks import In
from adaptvit.methods.base import DEITS, Published, Role, around_deits
from adaptvit.methods.merging import MergingConfig, Rule
from adaptvit.model import AdaptiveViT, Knob


@dataclass(frozen=True, kw_only=True)
class ToMeConfig(MergingConfig):
    """Token merging (Bolya et al., ICLR 2023): every image merges as many of its tokens as any other.

    Differs: register tokens are protected as the class token is. A classifier that pools, in whatever way, pools for
    each patch the token that the patch is part of; the released code only has the mean. Where it reads a class token
    nothing is merged in the last block, since nothing would read it.
    """

    method: ClassVar[str] = "tome"
    title: ClassVar[str] = "ToMe"
    role: ClassVar[Role] = "reference"
    knob: ClassVar[Knob | None] = Knob("rate", sign=-1, lowest=0.0, highest=64.0, step=0.05)
    published: ClassVar[Published] = Published(
        names=around_deits("tome", dict.fromkeys(DEITS, " whose blocks each merge 8 tokens."))
    )

    r: Annotated[int | Sequence[int], In("[0, inf)")] = 8
    """Tokens merged in each block, at most half of the patches it has: one number for all blocks, or one for each, of
    which those left out at the end are 0."""
    inflection: Annotated[float, In("[-1, 1]")] = 0.0
    """Of one number r, in [-1, 1]: what blocks merge runs linearly from r (1 + inflection) in the last back to
    r (1 - inflection) in the first. -1 is the paper's decreasing schedule."""
    rate: Annotated[float, In("[0, 1e9]")] = 1.0
    """The numbers r are multiplied by this, rounded so that the sums up to every block are: the one number by which a
    model is steered to a budget."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.r, Sequence) and self.inflection:
            raise ValueError(
                f"{type(self).__name__}.inflection={self.inflection} is for one number r, but r is {self.r}"
            )

    def schedule(self, depth: int) -> tuple[int, ...]:
        """r of each of `depth` blocks.

        Raises:
            ValueError: `r` has more numbers than there are blocks.
        """
        if isinstance(self.r, int):
            first = int(self.r * (1 - self.inflection))
            last = 2 * self.r - first
            numbers = [int(first + block * (last - first) / max(1, depth - 1)) for block in range(depth)]
        elif len(self.r) > depth:
            raise ValueError(f"{type(self).__name__}.r has {len(self.r)} numbers for {depth} blocks: {self.r}")
        else:
            numbers = [*self.r, *[0] * (depth - len(self.r))]
        sums = [round(self.rate * merged) for merged in accumulate(numbers, initial=0)]
        return tuple(after - before for before, after in pairwise(sums))

    def merges(self, block: int, depth: int) -> bool:
        return self.schedule(depth)[block] > 0

    def choose(self, score: Tensor, patches: int | Tensor, block: int, depth: int) -> Tensor:
        if not isinstance(patches, Tensor):
            best = score.topk(self.merged(patches, block, depth), dim=1).indices
            return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, True)
        best = score.topk(min(self.schedule(depth)[block], score.shape[1]), dim=1).indices
        merged = torch.arange(best.shape[1], device=best.device) < patches // 2
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, merged)

    def rule(self, patches: int, block: int, depth: int) -> Rule:
        return Rule(most=self.merged(patches, block, depth))

    def merged(self, patches: int, block: int, depth: int) -> int:
        return min(self.schedule(depth)[block], patches // 2)

    def fit(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        if search.get("labels") is None and search.get("unit") != "images_per_s":
            images = images[:BATCH]  # all cost the same, and trials tell the speed of a batch
        return super().fit(vit, images, target, **search)
