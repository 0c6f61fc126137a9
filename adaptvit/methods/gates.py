"""Gates: decisions of 0 or 1 that pass the gradient of a probability (straight-through), and temperatures over time.

Source: Jang, Gu, Poole: Categorical Reparameterization with Gumbel-Softmax, ICLR 2017, for two classes.
"""

import math

import torch
from torch import Tensor


def gate(logits: Tensor, threshold: float = 0.5, temperature: float = 1.0, noise: Tensor | None = None) -> Tensor:
    """1 where sigmoid(logits + noise) is above `threshold`, else 0, with the gradient of a soft decision.

    The soft decision is sigmoid((logits + noise - log-odds of the threshold) / temperature), so that the temperature
    changes the gradient alone, never how often a gate is on.

    Args:
        logits: any shape.
        threshold: in (0, 1).
        temperature: above 0.
        noise: added to the logits, as `gumbel_difference` draws it; None decides without.
    """
    margin = logits - log_odds(threshold)
    if noise is not None:
        margin = margin + noise
    return straight_through(margin > 0, torch.sigmoid(margin / temperature))


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, bool, with the gradient of `soft`: exactly 0 or 1 where `soft` is above 1/2 when on."""
    return hard.to(soft.dtype) - soft.detach() + soft


def gumbel_difference(logits: Tensor) -> Tensor:
    """The difference of two standard Gumbel draws for each logit: a logistic one."""
    exponential = [torch.empty_like(logits).exponential_().clamp_min_(torch.finfo(logits.dtype).tiny) for _ in range(2)]
    return exponential[1].log() - exponential[0].log()


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of decisions that are 1 with probability sigmoid(logits), in nats."""
    p = torch.sigmoid(logits)
    return -(p * p.clamp(min=1e-7).log() + (1 - p) * (1 - p).clamp(min=1e-7).log()).mean()


def log_odds(threshold: float) -> float:
    """The logit at which a sigmoid reaches `threshold`, in (0, 1)."""
    return math.log(threshold / (1 - threshold))


def probability(logit: float) -> float:
    """The sigmoid of one number."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else 1 - probability(-logit)


def annealed(start: float, end: float, progress: float) -> float:
    """A temperature on its way from `start` to `end`, both above 0, by equal factors; `progress` is in [0, 1]."""
    return start * (end / start) ** progress
