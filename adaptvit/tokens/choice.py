"""Which layout a model takes by itself: the rule, in one place. It is derived, not measured: no device has run it yet.

On a host `Packed`, which was measured there. On a device nobody waits where it need not: images that keep as many
tokens each are `Dense`, whatever they cost. Others are `Slab` where a plan is there and the rows in reserve, which
are computed for nothing, take less time than a block's wait for the device in `Packed`; else `Packed`, which is exact.
So small batches and small ViTs are planned for, and large blocks wait, as a wait is little beside them.
"""

import torch

from adaptvit.tokens import kernels
from adaptvit.tokens.base import Tokens
from adaptvit.tokens.dense import Dense
from adaptvit.tokens.packed import Packed
from adaptvit.tokens.slab import Plan, Slab

WAIT = 25e-6
"""Seconds, an estimate: the host learns how many tokens are left, and a device without work begins anew."""
RATE = {torch.bfloat16: 300e12, torch.float16: 300e12}
"""MACs a second, an estimate for a large GPU's matrix products; in other precisions `SLOW`."""
SLOW = 30e12


def choose_layout(
    device: torch.device, dtype: torch.dtype, even: bool, plan: Plan | None, images: int, macs: float
) -> type[Tokens]:
    """The layout of a forward of so many images, which nobody chose.

    Args:
        dtype: of the features.
        even: all images keep as many tokens, and Python knows how many.
        macs: of a block, for one token.
    """
    if kernels.on_host(device):
        return Packed
    if even:
        return Dense
    if plan is None:
        return Packed
    reserve = sum(rows - images * mean for rows, mean in zip(plan.rows(images), plan.means, strict=True))
    return Slab if reserve / len(plan.means) * macs / RATE.get(dtype, SLOW) < WAIT else Packed
