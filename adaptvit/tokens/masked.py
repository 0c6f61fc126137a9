"""The layout that computes every slot and hides the dead ones: the definition, and what gates need whose gradients pass
through the mask.

Letters: B images, N token slots, D channels, H heads, d channels per head.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from adaptvit.tokens.base import Tokens
from adaptvit.tokens.kernels import attend_masked, mean_received


@dataclass(frozen=True, eq=False)
class Masked(Tokens):
    """Every slot computed, dead ones hidden from attention. x is (B, N, D)."""

    x: Tensor
    mask: Tensor | None = None
    """(B, N) bool, the live slots; None while no slot was ever dropped, so that attention needs no mask."""

    @classmethod
    def of(cls, x: Tensor) -> Self:
        return cls(x)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.x.shape[0], self.x.shape[1]

    @property
    def live(self) -> Tensor:
        return torch.ones(self.shape, dtype=torch.bool, device=self.x.device) if self.mask is None else self.mask

    def with_x(self, x: Tensor) -> Self:
        return type(self)(x, self.mask)

    def filter(self, chosen: Tensor, *others: Tensor) -> tuple[Self, list[Tensor]]:
        kept = type(self)(self.x, chosen if self.mask is None else chosen & self.mask)
        return kept, [kept.grid(t) for t in others]

    def rows(self, t: Tensor) -> Tensor:
        return self.grid(t)

    def of_rows(self, t: Tensor) -> Tensor:
        return t

    def take(self, index: Tensor) -> Self:
        return type(self)(self.x, torch.zeros_like(self.live).scatter(1, index, True))

    def grid(self, t: Tensor) -> Tensor:
        if self.mask is None:
            return t
        mask = self.mask.view(*self.shape, *[1] * (t.ndim - 2))
        return t & mask if t.dtype == torch.bool else t.masked_fill(~mask, 0)  # onnxruntime fills no bools

    def spread(self, t: Tensor) -> Tensor:
        return t

    def first(self, t: Tensor, count: int) -> Tensor:
        return self.grid(t)[:, :count]

    def stamp(self, t: Tensor, value: int) -> None:
        t.masked_fill_(self.live, value)

    def merge(self, place: Tensor, moved: Tensor, weight: Tensor) -> tuple[Self, Tensor]:
        if not len(place):
            return self, weight
        live = self.live
        slots = int(place.masked_fill(~live, -1).max()) + 1
        place, weight = place.clamp(max=slots - 1), weight * live
        total = weight.new_zeros(len(place), slots).scatter_add(1, place, weight)
        share = weight / total.gather(1, place).masked_fill(~live, 1)
        parts = self.x * share[..., None].to(self.x.dtype)
        x = parts.new_zeros(*total.shape, parts.shape[2]).scatter_add(1, place[..., None].expand_as(parts), parts)
        return type(self)(x, total > 0), total

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Self, dropout: float = 0.0, bias: Tensor | None = None
    ) -> Tensor:
        return attend_masked(q, k, v, self.mask, dropout, bias)

    def standardise(self, t: Tensor, eps: float) -> Tensor:
        wide = t.to(torch.promote_types(t.dtype, torch.float32))
        count = self.live.sum(dim=1).clamp(min=1)[:, None, None]
        centred = self.grid(wide - self.grid(wide).sum(dim=1, keepdim=True) / count)
        variance = centred.square().sum(dim=1, keepdim=True) / count
        return (centred * (variance + eps).rsqrt()).to(t.dtype)

    def received(self, q: Tensor, k: Tensor) -> Tensor:
        return mean_received(q, k, self.mask)
