"""The layout that stores the live tokens end to end, image after image, and computes nothing else: the speed.

Letters: B images, N token slots, T live tokens over the batch, D channels, H heads, d channels per head.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from adaptvit.tokens.base import Tokens
from adaptvit.tokens.kernels import attend_dense, mean_received, ragged_kernel


@dataclass(frozen=True, eq=False)
class Packed(Tokens):
    """Live tokens end to end, image after image, in slot order. x is (T, D): no padding, ever."""

    x: Tensor
    shape: tuple[int, int]
    slots: Tensor
    """(T,) each token's place in the flattened (B, N) grid, ascending."""
    each: int | None = None
    """Tokens of every image, where some were dropped and the host knows that all images have as many."""

    @classmethod
    def of(cls, x: Tensor) -> Self:
        images, slots = x.shape[:2]
        return cls(x.flatten(0, 1), (images, slots), torch.arange(images * slots, device=x.device))

    @cached_property
    def full(self) -> bool:
        """Every slot of every image is live."""
        return self.slots.shape[0] == self.shape[0] * self.shape[1]

    @cached_property
    def even(self) -> int | None:
        """Tokens of every image, where all are known to have as many: they make a dense batch."""
        return self.shape[1] if self.full else self.each

    @cached_property
    def live(self) -> Tensor:
        """(B, N) bool, the slots that hold a token."""
        return self.grid(torch.ones_like(self.slots, dtype=torch.bool))

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens per image, on the host."""
        images = self.shape[0]
        if images == 1:
            return [self.slots.shape[0]]
        return self.offsets.diff().tolist() if self.even is None else [self.even] * images

    @cached_property
    def offsets(self) -> Tensor:
        """(B + 1,) int32: image b's tokens are rows offsets[b] to offsets[b + 1]."""
        images, slots = self.shape
        starts = torch.arange(0, images * slots + 1, slots, device=self.slots.device)
        return torch.searchsorted(self.slots, starts, out_int32=True)

    def with_x(self, x: Tensor) -> Self:
        return type(self)(x, self.shape, self.slots, self.each)

    def filter(self, chosen: Tensor, *others: Tensor) -> tuple[Self, list[Tensor]]:
        rows = chosen.nonzero().squeeze(1)  # waits for the device
        if rows.shape == self.slots.shape:
            return self, list(others)
        x, slots, *kept = (t.index_select(0, rows) for t in (self.x, self.slots, *others))
        return type(self)(x, self.shape, slots), kept

    def rows(self, t: Tensor) -> Tensor:
        return self.grid(t) if self.even is None else t.view(-1, self.even, *t.shape[1:])

    def of_rows(self, t: Tensor) -> Tensor:
        return self.spread(t) if self.even is None else t.flatten(0, 1)

    def take(self, index: Tensor) -> Self:
        assert self.even is not None
        first = torch.arange(0, len(self.slots), self.even, device=index.device)
        rows = (first[:, None] + index).flatten()
        x, slots = (t.index_select(0, rows) for t in (self.x, self.slots))
        return type(self)(x, self.shape, slots, index.shape[1])

    def grid(self, t: Tensor) -> Tensor:
        if not self.full:
            t = t.new_zeros(self.shape[0] * self.shape[1], *t.shape[1:]).index_copy_(0, self.slots, t)
        return t.view(*self.shape, *t.shape[1:])

    def spread(self, t: Tensor) -> Tensor:
        if t.shape[1] == 1:
            if self.shape[0] == 1:
                return t[0].expand(self.slots.shape[0], *t.shape[2:])
            return t.squeeze(1).index_select(0, self.slots // self.shape[1])
        t = t.flatten(0, 1)
        return t if self.full else t.index_select(0, self.slots)

    def first(self, t: Tensor, count: int) -> Tensor:
        images, slots = self.shape
        if self.full or count == slots:
            return self.grid(t)[:, :count]
        if images == 1 and self._all_live(count):
            return t[None, :count]
        if t.shape[0] == 0:
            t = torch.cat([t, t.new_zeros(1, *t.shape[1:])])  # something to point at when nothing is live
        wanted = torch.arange(0, images * slots, slots, device=t.device)[:, None] + torch.arange(count, device=t.device)
        rows = torch.searchsorted(self.slots, wanted.flatten()).clamp(max=t.shape[0] - 1)
        picked = t.index_select(0, rows).view(images, count, *t.shape[1:])
        return picked.masked_fill(~self.live[:, :count].view(images, count, *[1] * (t.ndim - 1)), 0)

    def stamp(self, t: Tensor, value: int) -> None:
        t.view(-1).index_fill_(0, self.slots, value)

    def merge(self, place: Tensor, moved: Tensor, weight: Tensor) -> tuple[Self, Tensor]:
        if not len(place):
            return self, weight
        images, slots = self.shape[0], int(self.spread(place).max()) + 1  # waits for the device
        goes = self.spread(place + slots * torch.arange(images, device=place.device)[:, None])
        leaves = self.spread(moved)
        stay, join = (~leaves).nonzero().squeeze(1), leaves.nonzero().squeeze(1)
        places, order = goes.index_select(0, stay).sort()
        stay, into = stay.index_select(0, order), torch.searchsorted(places, goes.index_select(0, join))
        own, added = weight.index_select(0, stay), weight.index_select(0, join)
        total = own.index_add(0, into, added)
        share, added = (own / total).to(self.x.dtype), (added / total.index_select(0, into)).to(self.x.dtype)
        x = self.x.index_select(0, stay) * share[:, None]
        x = x.index_add(0, into, self.x.index_select(0, join) * added[:, None])
        return type(self)(x, (images, slots), places), total

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Self, dropout: float = 0.0, bias: Tensor | None = None
    ) -> Tensor:
        if q.shape[0] == 0:
            return q + 0 * (k.sum() + v.sum())  # every parameter stays in the graph, as distributed training needs
        if self.even is not None and queries.even is not None:
            return attend_dense(q, k, v, self.shape[0], dropout, bias)
        if self.x.device.type == "cpu":  # where lengths are on the host already, and reading them waits for nothing
            images = len(self.lengths) - self.lengths.count(0)
            if q.shape[0] == images * max(queries.lengths) and k.shape[0] == images * max(self.lengths):
                return attend_dense(q, k, v, images, dropout, bias)
        kernel = ragged_kernel(q.device, q.dtype, dropout, bias is not None)
        return kernel(q, k, v, self, queries, dropout, bias)

    def standardise(self, t: Tensor, eps: float) -> Tensor:
        wide = t.to(torch.promote_types(t.dtype, torch.float32))
        image, count = self.slots // self.shape[1], self.offsets.diff().clamp(min=1)[:, None]

        def mean(t: Tensor) -> Tensor:
            return t.new_zeros(self.shape[0], t.shape[1]).index_add(0, image, t) / count

        centred = wide - mean(wide).index_select(0, image)
        scale = (mean(centred.square()) + eps).rsqrt()
        return (centred * scale.index_select(0, image)).to(t.dtype)

    def received(self, q: Tensor, k: Tensor) -> Tensor:
        if self.even is not None:
            return mean_received(q, self.rows(k), None).flatten(0, 1)
        if self.x.device.type != "cpu":
            return self.spread(mean_received(q, self.grid(k), self.live))
        if self.shape[0] == 1 and self._all_live(q.shape[1]):
            return mean_received(q, k[None], None)[0]
        rows = self.live[:, : q.shape[1]]
        images = zip(q, rows, k.split(self.lengths), strict=True)
        parts = [mean_received(queries[alive][None], keys[None], None)[0] for queries, alive, keys in images]
        return torch.cat(parts)

    def _all_live(self, count: int) -> bool:
        """Whether the first `count` slots of the one image are."""
        return self.slots.shape[0] >= count and self.slots[count - 1].item() == count - 1
