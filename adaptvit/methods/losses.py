"""Loss terms that several methods share."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax


def over_processes(means: dict[str, Tensor]) -> dict[str, Tensor]:
    """Batch means as those of all processes of a distributed run, with gradients, all in one reduction.

    With them a loss that is not linear in a batch's mean has the same gradients on two processes as on one with twice
    the batch.
    """
    group = dist.group.WORLD
    assert group is not None  # once initialised
    wide = torch.promote_types(torch.float32, next(iter(means.values())).dtype)
    flat = torch.cat([mean.to(wide).flatten() for mean in means.values()])
    parts = (all_reduce(flat, "sum", group) / dist.get_world_size()).split([mean.numel() for mean in means.values()])
    return {name: part.view_as(means[name]).to(means[name]) for name, part in zip(means, parts, strict=True)}


def distillation(student: Tensor, teacher: Tensor, kind: Literal["soft", "hard"], temperature: float = 1.0) -> Tensor:
    """What a teacher's (B, classes, ...) logits ask of the student's: its distribution (soft) or first choice (hard).

    Source: Touvron et al., Training data-efficient image transformers, section 4. Differs from DeiT's code: the soft
    divergence is a mean over images, not over images times classes.
    """
    if kind == "hard":
        return cross_entropy(student, teacher.argmax(dim=1))
    given, wanted = (log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return kl_div(given, wanted, reduction="none", log_target=True).sum(dim=1).mean() * temperature**2


def divergence(output: Tensor, dense: Tensor, headless: bool) -> Tensor:
    """How far what a model gives is from what the dense one gives: (B, classes, ...) or, headless, (B, D).

    A mean over images, and over pixels where these have the classes.

    Of classes the divergence of the distributions, in nats; of features 1 - cosine.
    """
    return (1 - cosine_similarity(output, dense, dim=-1)).mean() if headless else distillation(output, dense, "soft")
