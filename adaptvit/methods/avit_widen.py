"""Wider halting: patches beside one that has just halted are dropped with it.

Letters: B images, N token slots.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import unfold

REACH = 2
"""Patches to each side that a neighbourhood spans at most."""

NEIGHBOURHOODS: dict[str, Callable[[int, int], bool]] = {
    "nearby": lambda down, right: down == 0 and right <= 1,
    "cross": lambda down, right: down + right <= 1,
    "diag": lambda down, right: down == right <= 1,
    "dilated": lambda down, right: (down, right) in {(0, 0), (0, 2), (2, 0)},
    "square": lambda down, right: max(down, right) <= 1,
    "isotropic": lambda down, right: down + right <= 2,
    "circle": lambda down, right: down + right <= 3,
    "double_square": lambda down, right: True,
}
"""Which patches go with a halted one, by their distance from it in rows and columns, each at most `REACH`."""


def stencil(name: str) -> Tensor:
    """(5, 5) bool, the neighbourhood around its middle."""
    span = range(-REACH, REACH + 1)
    return torch.tensor([[NEIGHBOURHOODS[name](abs(row), abs(column)) for column in span] for row in span])


def beside(halted: Tensor, around: Tensor) -> Tensor:
    """The patches in the neighbourhood `around` of any that `halted`, (B, rows, columns) bool each."""
    windows = unfold(halted[:, None].float(), len(around), padding=REACH)
    near = windows[:, around.flatten()].amax(dim=1) > 0
    return near.view(halted.shape)


def soonest(candidates: Tensor, left: Tensor, share: float) -> Tensor:
    """Of each image's `candidates`, (B, N) bool, the share of them, rounded down, that have least `left` to halting."""
    count = (candidates.sum(dim=1, keepdim=True) * share).floor()
    order = left.masked_fill(~candidates, torch.inf).argsort(dim=1, stable=True)
    return candidates & (order.argsort(dim=1) < count)
