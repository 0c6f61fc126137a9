"""Target distributions of the halting depth, over blocks 1..L.

Each is the logarithm of a density that peaks at the target depth. `PRIORS` names them; a new prior is one function and
one row, and need not be normalised.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LogDensity = Callable[[Tensor, float, float], Tensor]

QUASI = math.sqrt(2 / math.log(3))
"""Diversity of the quasi-Laplace at scale 1."""
FREEDOM = 30.0
"""Degrees of freedom of Student's t."""
SKEW = -4.0
"""Shape of the skew-normal: below 0 the long tail lies before the peak."""
SKEW_PEAK = -0.4169729949738887
"""Where the standard skew-normal of that shape peaks."""


def gaussian(depths: Tensor, target: float, scale: float) -> Tensor:
    """Normal of standard deviation `scale`."""
    return -0.5 * ((depths - target) / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi))


def laplace(depths: Tensor, target: float, scale: float) -> Tensor:
    """Laplace of diversity `scale`."""
    return -(depths - target).abs() / scale - math.log(2 * scale)


def quasi_laplace(depths: Tensor, target: float, scale: float) -> Tensor:
    """Laplace of diversity `QUASI` times `scale`."""
    return laplace(depths, target, QUASI * scale)


def student_t(depths: Tensor, target: float, scale: float) -> Tensor:
    """Student's t of `FREEDOM` degrees of freedom, stretched by `scale`: near a normal, its tails a little thicker."""
    beta = math.lgamma((FREEDOM + 1) / 2) - math.lgamma(FREEDOM / 2) - 0.5 * math.log(FREEDOM * math.pi)
    return beta - math.log(scale) - (FREEDOM + 1) / 2 * torch.log1p(((depths - target) / scale) ** 2 / FREEDOM)


def cauchy(depths: Tensor, target: float, scale: float) -> Tensor:
    """Cauchy, half as high as at its peak `scale` away from it: of all these the thickest tails."""
    return -torch.log1p(((depths - target) / scale) ** 2) - math.log(math.pi * scale)


def log_normal(depths: Tensor, target: float, scale: float) -> Tensor:
    """Log-normal, at its peak as curved as a normal of standard deviation `scale`; the long tail lies behind it."""
    sigma = scale / target
    mu = math.log(target) + sigma**2
    return gaussian(depths.log(), mu, sigma) - depths.log()


def skew_normal(depths: Tensor, target: float, scale: float) -> Tensor:
    """Skew-normal of shape `SKEW`: the normal of standard deviation `scale`, cut short behind the peak."""
    z = (depths - target) / scale + SKEW_PEAK
    return gaussian(z, 0.0, 1.0) + torch.special.log_ndtr(SKEW * z) + math.log(2 / scale)


PRIORS: dict[str, LogDensity] = {
    "gaussian": gaussian,
    "laplace": laplace,
    "quasi_laplace": quasi_laplace,
    "log_normal": log_normal,
    "skew_normal": skew_normal,
    "student_t": student_t,
    "cauchy": cauchy,
}


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
    return log_density(name, depth, target, scale).softmax(dim=0)


def released_target(name: str, depth: int, target: float, scale: float = 1.0, buffer: float | None = 0.02) -> Tensor:
    """The target that released code trains with: not a distribution, and so weighing its loss by what it sums to.

    Args:
        target: 1-based; with a `buffer` at least 2, and counted as a whole block.
        buffer: A-ViT's code scales the density so that the blocks before `target` carry 1 - `buffer`, which makes a sum
            of 3.26 for 12 blocks and target 9. None leaves the density as it is, as alessioborgi/AdaViT does.
    Returns:
        (L,) float64.
    Raises:
        ValueError: as `halting_prior`, and a target without a block before it.
    """
    density = log_density(name, depth, target, scale).exp()
    if buffer is None:
        return density
    if target < 2:
        raise ValueError(f"the released target scales by the blocks before its peak: 2 or more, got {target}")
    return density * (1 - buffer) / density[: int(target) - 1].sum()


def log_density(name: str, depth: int, target: float, scale: float) -> Tensor:
    """The logarithm of the density at blocks 1..`depth`; arguments and errors as of `halting_prior`."""
    if name not in PRIORS:
        raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {name!r}")
    if not 1 <= target <= depth:
        raise ValueError(f"the prior's target depth must lie in 1..{depth}, the blocks of this ViT, got {target}")
    if not scale > 0:
        raise ValueError(f"the prior's scale must be positive, got {scale}")
    return PRIORS[name](torch.arange(1, depth + 1, dtype=torch.float64), target, scale)


def mixture(priors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of several priors (L,), each weighing its share of the sum of `weights`.

    Raises:
        ValueError: a weight that is not positive, or not one weight for each prior.
    """
    if len(priors) != len(weights):
        raise ValueError(f"a mixture needs one weight for each prior, got {len(weights)} for {len(priors)}")
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"the weights of a mixture must be positive and finite, got {tuple(weights)}")
    return torch.stack(list(priors), dim=1) @ torch.tensor(weights, dtype=priors[0].dtype) / sum(weights)
