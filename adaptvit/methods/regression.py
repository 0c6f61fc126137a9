"""Linear regression on more tokens than memory holds, to what patches are worth: fits gates and policies to a ViT."""

from functools import partial

import torch
from torch import Tensor

from adaptvit.backbones.door import Projected, attention_received
from adaptvit.model import AdaptiveViT
from adaptvit.process import in_float64
from adaptvit.tokens import Tokens

SPREAD = 2.0
"""Standard deviation of the fitted log-odds of what to keep, less what the maps do not explain."""
RIDGE = 1e-4
"""Of the mean square of the features: keeps the solution small where they are collinear."""


class Regression:
    """Sums over the samples seen so far."""

    def __init__(self, features: int, device: torch.device) -> None:
        """`features` channels and a constant, in float64."""
        size = features + 1
        self.gram = in_float64(torch.zeros(size, size, device=device))
        self.moment = in_float64(torch.zeros(size, device=device))
        self.squares = in_float64(torch.zeros((), device=device))

    def add(self, features: Tensor, wanted: Tensor) -> None:
        """See features (..., D) and the values (...) that they are to tell."""
        x, y = in_float64(features).flatten(0, -2), in_float64(wanted).flatten()
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        self.gram += x.T @ x
        self.moment += x.T @ y
        self.squares += y.square().sum()

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (D,), constant (1,), and the share of the squares that they explain, in [0, 1]."""
        gram, moment = self.gram, self.moment
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        solution = torch.linalg.solve(gram + ridge, moment)
        explained = (2 * solution @ moment - solution @ gram @ solution) / self.squares
        return solution[:-1], solution[-1:], explained


def importance(seen: Tensor) -> Tensor:
    """Logarithm of what `see` saw of patches, (B, P) in float64, with mean 0 and variance 1 over all of them.

    Raises:
        ValueError: it is the same of all.
    """
    matters = seen.clamp(min=torch.finfo(torch.float32).tiny).log()  # what underflowed is finite too
    spread = matters.std()
    if not spread > 1e-6:  # what rounding in float32 leaves
        raise ValueError("all patches receive the same attention, so that nothing tells which of them matter")
    return (matters - matters.mean()) / spread


def see(seen: list[Tensor], tokens: Tokens, model: AdaptiveViT, projected: Projected) -> None:
    """Note how much the class token attends to each patch times the length of its value, mean over heads: (B, P).

    Where the classifier reads no class token, all tokens. Attention alone takes for important what has hardly a value
    to give.

    Source: ATS, equation 3.
    """
    attention = attention_received(tokens, projected, 1 if model.read else None)
    length = projected.v.norm(dim=-1, dtype=attention.dtype)
    seen.append((attention * length).mean(dim=-1)[:, model.prefix :])


def read_by_block(model: AdaptiveViT, tokens: Tokens) -> Tensor:
    """What each block of the dense ViT reads of patches, as `see` has it: (B, L, P)."""
    seen = list[Tensor]()
    for number in range(model.depth):
        tokens = model.run_block(number, tokens, look=partial(see, seen, tokens, model), every=True)
    return torch.stack(seen, dim=1)
