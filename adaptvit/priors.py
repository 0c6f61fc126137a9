"""Target distributions of the halting depth, over blocks 1..L.

Each density is a function of the depths; `PRIORS` names them. A new prior is one function and one row.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Density = Callable[[Tensor, float, float], Tensor]


def gaussian(depths: Tensor, target: float, scale: float) -> Tensor:
    """Normal density with mean `target` and standard deviation `scale`."""
    return torch.exp(-0.5 * ((depths - target) / scale) ** 2) / (scale * math.sqrt(2 * math.pi))


def laplace(depths: Tensor, target: float, scale: float) -> Tensor:
    """Laplace density with mean `target` and diversity `scale`."""
    return torch.exp(-(depths - target).abs() / scale) / (2 * scale)


PRIORS: dict[str, Density] = {"gaussian": gaussian, "laplace": laplace}


def halting_prior(name: str, depth: int, target: float, scale: float = 1.0) -> Tensor:
    """The prior `name` over blocks 1..`depth`, summing to 1.

    Args:
        name: a key of `PRIORS`.
        depth: number of blocks L.
        target: where the density peaks, in blocks, 1-based; it may lie between two blocks.
        scale: width in blocks, above 0.
    Returns:
        (L,) float64.
    Raises:
        ValueError: unknown name, or a target outside 1..L, or a scale that is not positive.
    Source: A-ViT (Yin et al., CVPR 2022), section 3.2. Differs: their released target is not normalised; see
        `released_target`.
    """
    if name not in PRIORS:
        raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {name!r}")
    if not 1 <= target <= depth:
        raise ValueError(f"the prior's target depth must lie in 1..{depth}, the blocks of this ViT, got {target}")
    if not scale > 0:
        raise ValueError(f"the prior's scale must be positive, got {scale}")
    density = PRIORS[name](torch.arange(1, depth + 1, dtype=torch.float64), target, scale)
    return density / density.sum()


def released_target(name: str, depth: int, target: float, scale: float = 1.0, buffer: float = 0.02) -> Tensor:
    """The target that the released A-ViT code trains with: the blocks before `target` carry 1 - `buffer` of mass.

    It sums to more than 1 (3.26 for 12 blocks and target 9) and so weighs its loss by that much.

    Args:
        target: 1-based whole block, at least 2.
    Returns:
        (L,) float64.
    """
    density = PRIORS[name](torch.arange(1, depth + 1, dtype=torch.float64), target, scale)
    return density * (1 - buffer) / density[: int(target) - 1].sum()
