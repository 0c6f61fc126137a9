"""Loss terms that several methods share."""

from typing import Literal

import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce
from torch.nn.functional import cross_entropy, kl_div, log_softmax


def mean_over_processes(t: Tensor) -> Tensor:
    """Mean of a batch statistic over the processes of a distributed run, with gradients; itself in a single process.

    With it a loss that is not linear in the batch mean has the same gradients on two processes as on one with twice
    the batch.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return t
    group = dist.group.WORLD
    assert group is not None  # once initialised
    return all_reduce(t, "sum", group) / dist.get_world_size()


def distillation(student: Tensor, teacher: Tensor, kind: Literal["soft", "hard"], temperature: float = 1.0) -> Tensor:
    """What a teacher's (B, classes) logits ask of the student's: its distribution (soft) or its first choice (hard).

    Source: Touvron et al., Training data-efficient image transformers, section 4. Differs from DeiT's code: the soft
    divergence is a mean over images, not over images times classes.
    """
    if kind == "hard":
        return cross_entropy(student, teacher.argmax(dim=1))
    given, wanted = (log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return kl_div(given, wanted, reduction="batchmean", log_target=True) * temperature**2
