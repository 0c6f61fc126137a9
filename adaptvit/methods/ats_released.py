"""The grid on which the released code of ATS samples; `adaptvit.methods.ats` reads without this file.

Letters: B images, P patches, K points.
"""

from typing import Literal

import torch
from torch import Tensor


def significance(attention: Tensor, size: Tensor) -> Tensor:
    """S before it is normalised: attention summed over heads times the norm of the value over all heads together."""
    return attention.sum(dim=-1) * size.norm(dim=-1)


def sample(score: Tensor, live: Tensor, points: int, mode: Literal["mask", "single", "prune"]) -> Tensor:
    """Mark the patches nearest, by cumulative score, to evenly spaced values from the least positive one to 1.

    Args:
        score: (B, P), each row non-negative and summing to 1; dead patches hold 0.
        live: (B, P) bool.
        points: K; only the K patches of the highest scores can be chosen.
        mode: as `ATSConfig.mode`.
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
