"""Loss terms that several methods share."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def mean_over_processes(t: Tensor) -> Tensor:
    """Mean of a batch statistic over the processes of a distributed run, with gradients; itself in a single process.

    With it a loss that is not linear in the batch mean has the same gradients on two processes as on one with twice
    the batch.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return t
    return all_reduce(t) / dist.get_world_size()
