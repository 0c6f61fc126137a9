"""ATS as its released code samples: on a grid from the least to the greatest cumulative score.

Letters: B images, P patches, K points.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from adaptvit.methods.ats import ATS, ATSConfig
from adaptvit.methods.base import Role

Mode = Literal["mask", "single", "prune"]


@dataclass(frozen=True, kw_only=True)
class ReleasedATSConfig(ATSConfig):
    """Adaptive token sampling (Fayyaz et al., ECCV 2022) as its released code chooses patches.

    Differs from `ATSConfig`: the grid of sampling points begins at the least positive cumulative score and takes the
    patch of the nearest one; the size of a value is that over all heads together; and where the least score counts as
    0, its patch is lost.
    """

    method: ClassVar[str] = "ats_released"
    title: ClassVar[str] = "ATS as released"
    role: ClassVar[Role] = "released"

    mode: Mode = "mask"
    """Where the least score counts as 0. `mask`: while an image has all its patches, as the released code does with
    masks. `single`: in every block, as it does for an image by itself. `prune`: where no image of the batch has more
    patches, as it does for a batch; the result then depends on the other images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler != ATSConfig.sampler:
            raise ValueError(f"ReleasedATSConfig.sampler is the released one, got {self.sampler!r}: leave it out")

    def build(self, vit: nn.Module) -> "ReleasedATS":
        """Wrap `vit`, sharing its weights; no parameter is added."""
        return ReleasedATS(vit, self)


class ReleasedATS(ATS):
    """A ViT whose blocks sample their patches on the released grid."""

    draws = True

    def significance(self, attention: Tensor, size: Tensor) -> Tensor:
        return attention.sum(dim=-1) * size.norm(dim=-1)

    def choose(
        self,
        score: Tensor,
        live: Tensor,
        points: float | Tensor,
        generator: torch.Generator | None,
        order: Tensor | None,
    ) -> Tensor:
        assert not isinstance(points, Tensor)  # `points_of` refuses them
        return sample(score, live, round(points), self.config.mode)


def sample(score: Tensor, live: Tensor, points: int, mode: Mode) -> Tensor:
    """Mark the patches nearest, by cumulative score, to evenly spaced values from the least positive one to 1.

    Args:
        score: (B, P), each row non-negative and summing to 1; dead patches hold 0.
        live: (B, P) bool.
        points: K; only the K patches of the highest scores can be chosen.
        mode: as `ReleasedATSConfig.mode`.
    Returns:
        (B, P) bool, between 1 and K true per row.
    Differs: an image of one patch keeps it, one of two the better; the released code fails on the next block.
    """
    slots = score.shape[1]
    scores, order = score.masked_fill(~live, -1).sort(dim=1, stable=True)
    cdf = scores.clamp(min=0).cumsum(dim=1)
    count = live.sum(dim=1, keepdim=True)
    match mode:
        case "mask":
            loses_least = count == slots
        case "single":
            loses_least = torch.ones_like(count, dtype=torch.bool)
        case "prune":
            loses_least = count == (count.max() if len(count) else 0)
    least = cdf.gather(1, slots - count).masked_fill(~loses_least | (count == 1), 0)
    cdf = ((cdf - least) / (cdf[:, -1:] - least)).clamp(min=0)
    start = cdf.masked_fill(cdf == 0, torch.inf).amin(dim=1, keepdim=True)
    cdf[:, : max(0, slots - points)] = -torch.inf  # cut off where the list is longer than the grid
    steps = torch.linspace(0, 1, points, device=score.device, dtype=score.dtype)
    grid = start + (1 - start) * steps
    above = torch.searchsorted(cdf, grid).clamp(max=slots - 1)
    below = (above - 1).clamp(min=0)
    nearer = torch.where(grid - cdf.gather(1, below) <= cdf.gather(1, above) - grid, below, above)
    nearest = torch.searchsorted(cdf, cdf.gather(1, nearer))  # the first of several with the same cumulative score
    return torch.zeros_like(live).scatter(1, order.gather(1, nearest), True)
