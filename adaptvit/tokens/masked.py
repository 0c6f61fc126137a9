"""The layout that computes every slot and hides the dead ones: the definition, and what gates need whose gradients pass
through the mask.

Letters: B images, N token slots, D channels, H heads, d channels per head.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from adaptvit.tokens import kernels
from adaptvit.tokens.base import Tokens
from adaptvit.tokens.kernels import PLAIN, AttentionOptions, attend_masked, by_place, mean_received, slots_of


@dataclass(frozen=True, eq=False)
class Masked(Tokens):
    """Every slot computed, dead ones hidden from attention. x is (B, N, D)."""

    x: Tensor
    mask: Tensor | None = None
    """(B, N) bool, the live slots; None while no slot was ever dropped, so that attention needs no mask."""
    where: Tensor | None = None
    source: Any = None

    @classmethod
    def of(cls, x: Tensor) -> Self:
        return cls(x)

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.x.shape[0], self.x.shape[1]

    @property
    def live(self) -> Tensor:
        return torch.ones(self.shape, dtype=torch.bool, device=self.x.device) if self.mask is None else self.mask

    @property
    def slots(self) -> None:  # type: ignore[override]
        return None

    @property
    def in_place(self) -> bool:
        return self.where is None

    @property
    def at(self) -> Tensor:
        if self.where is None:
            return torch.arange(self.x.shape[1], device=self.x.device)[None]
        return slots_of(self.where)

    @property
    def batch(self) -> Tensor:
        return self.x

    def of_batch(self, t: Tensor) -> Tensor:
        return t

    def with_x(self, x: Tensor) -> Self:
        return type(self)(x, self.mask, self.where, self.source)

    def filter(self, chosen: Tensor, *others: Tensor) -> tuple[Self, list[Tensor]]:
        kept = replace(self, mask=chosen if self.mask is None else chosen & self.mask)
        return kept, [kept.grid(t) for t in others]

    def put(self, some: Self, t: Tensor) -> Tensor:
        return some.grid(t)

    def rows(self, t: Tensor) -> Tensor:
        return self.grid(t)

    def of_rows(self, t: Tensor) -> Tensor:
        return t

    def take(self, index: Tensor) -> Self:
        return replace(self, mask=torch.zeros_like(self.live).scatter(1, index, True))

    def grid(self, t: Tensor) -> Tensor:
        if self.mask is None:
            return t
        mask = self.mask.view(*self.shape, *[1] * (t.ndim - 2))
        return t & mask if t.dtype == torch.bool else t.masked_fill(~mask, 0)  # onnxruntime fills no bools

    def spread(self, t: Tensor) -> Tensor:
        return t

    def first(self, t: Tensor, count: int) -> Tensor:
        return self.grid(t)[:, :count]

    def write(self, canvas: Tensor) -> Tensor:
        return self.x if self.mask is None else torch.where(self.mask[..., None], self.x, canvas)

    def stamp(self, t: Tensor, value: int) -> None:
        t.masked_fill_(self.live, value)

    def merge(self, place: Tensor, moved: Tensor, weight: Tensor, count: int | None = None) -> tuple[Self, Tensor]:
        if not place.shape[0]:
            return self, weight
        live = self.live
        if count is not None:
            slots = count
        elif torch.compiler.is_compiling() or not kernels.on_host(place.device):
            slots = place.shape[1]  # rather than wait for a number
        else:
            slots = int(place.masked_fill(~live, -1).max()) + 1
        place, weight = place.clamp(max=slots - 1), weight * live
        total = _sums(place, slots, weight)
        share = weight / total.gather(1, place).masked_fill(~live, 1)
        x = _sums(place, slots, self.x * share[..., None].to(self.x.dtype))
        at = self.at.expand_as(place)
        stays = place.masked_fill(moved | ~live, slots)  # a place of its own for those that go
        where = at.new_zeros(place.shape[0], slots + 1).scatter(1, stays, at)[:, :slots]
        if self.where is not None and self.where.is_floating_point():
            means = _sums(place, slots, self.where[..., 1:] * share[..., None])
            where = torch.cat([where[..., None].to(means.dtype), means], dim=2)
        return type(self)(x, total > 0, where, self.source), total

    def attend(self, q: Tensor, k: Tensor, v: Tensor, queries: Self, how: AttentionOptions = PLAIN) -> Tensor:
        added = None if how.bias is None else how.bias[:, None, None]
        if how.pairs is not None:
            pairs = self._looked_up(how.pairs)
            added = pairs if added is None else pairs + added
        return attend_masked(q, k, v, self.mask, added, how)

    def _looked_up(self, pairs: Tensor) -> Tensor:
        return pairs if self.where is None else by_place(pairs, self.at, self.at)

    def standardise(self, t: Tensor, eps: float) -> Tensor:
        wide = t.to(torch.promote_types(t.dtype, torch.float32))
        count = self.live.sum(dim=1).clamp(min=1)[:, None, None]
        centred = self.grid(wide - self.grid(wide).sum(dim=1, keepdim=True) / count)
        variance = centred.square().sum(dim=1, keepdim=True) / count
        return (centred * (variance + eps).rsqrt()).to(t.dtype)

    def received(self, q: Tensor, k: Tensor, pairs: Tensor | None = None) -> Tensor:
        return mean_received(q, k, self.mask, None if pairs is None else self._looked_up(pairs))


def _sums(place: Tensor, slots: int, t: Tensor) -> Tensor:
    """(B, slots, ...), of what goes to each place: (B, N, ...)."""
    images = t.shape[0]
    if kernels.on_host(t.device):
        index = place.view(*place.shape, *[1] * (t.ndim - 2)).expand_as(t)
        return t.new_zeros(images, slots, *t.shape[2:]).scatter_add(1, index, t)
    rows = (place + slots * torch.arange(images, device=place.device)[:, None]).flatten()
    sums = kernels.add_rows(t.new_zeros(images * slots, *t.shape[2:]), rows, t.flatten(0, 1))
    return sums.view(images, slots, *t.shape[2:])
