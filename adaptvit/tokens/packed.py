"""The layout that stores the live tokens end to end, image after image, and computes nothing else: the speed.

Letters: B images, N token slots, T live tokens over the batch, D channels, H heads, d channels per head.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from adaptvit.tokens import kernels
from adaptvit.tokens.base import Tokens, merge_to_grid
from adaptvit.tokens.kernels import (
    PLAIN,
    AttentionOptions,
    add_rows,
    attend_dense,
    attend_ragged,
    by_place,
    mean_received,
    slots_of,
)

FEW = 2
"""Queries whose attention is held for all tokens of a batch at once."""


@dataclass(frozen=True, eq=False)
class Packed(Tokens):
    """Live tokens end to end, image after image, in slot order. x is (T, D): no padding, ever."""

    x: Tensor
    shape: tuple[int, int]
    slots: Tensor
    """(T,) each token's place in the flattened (B, N) grid, ascending."""
    each: int | None = None
    """Tokens of every image, where some were dropped and the host knows that all images have as many."""
    where: Tensor | None = None
    source: Any = None
    _known: dict[str, Any] = field(default_factory=dict, repr=False)
    """What `slots` say, once it was asked for: the same for tokens with other features."""

    @classmethod
    def of(cls, x: Tensor) -> Self:
        images, slots = x.shape[:2]
        return cls(x.flatten(0, 1), (images, slots), torch.arange(images * slots, device=x.device))

    @property
    def full(self) -> bool:
        """Every slot of every image is live."""
        return self.slots.shape[0] == self.shape[0] * self.shape[1]

    @property
    def even(self) -> int | None:
        """Tokens of every image, where all are known to have as many: they make a dense batch."""
        return self.shape[1] if self.full else self.each

    @property
    def spare(self) -> bool:
        return False

    @property
    def real(self) -> None:
        """Every row holds a token."""

    @property
    def live(self) -> Tensor:
        """(B, N) bool, the slots that hold a token."""
        if "live" not in self._known:
            self._known["live"] = self.grid(torch.ones_like(self.slots, dtype=torch.bool))
        found: Tensor = self._known["live"]
        return found

    @property
    def lengths(self) -> list[int]:
        """Tokens per image, on the host."""
        images = self.shape[0]
        if images == 1:
            return [self.slots.shape[0]]
        if self.even is not None:
            return [self.even] * images
        if "lengths" not in self._known:
            self._known["lengths"] = self.offsets.diff().tolist()
        found: list[int] = self._known["lengths"]
        return found

    @property
    def offsets(self) -> Tensor:
        """(B + 1,) int32: image b's tokens are rows offsets[b] to offsets[b + 1]."""
        if "offsets" not in self._known:
            images, slots = self.shape
            starts = torch.arange(0, images * slots + 1, slots, device=self.slots.device)
            self._known["offsets"] = torch.searchsorted(self.slots, starts, out_int32=True)
        found: Tensor = self._known["offsets"]
        return found

    @property
    def at(self) -> Tensor:
        return self.slots % self.shape[1] if self.where is None else slots_of(self.where)

    @property
    def in_place(self) -> bool:
        return self.where is None and self.full

    @property
    def batch(self) -> Tensor:
        return self.x[None] if self.even is None else self.x.view(-1, self.even, *self.x.shape[1:])

    def of_batch(self, t: Tensor) -> Tensor:
        return t[0] if self.even is None else t.flatten(0, 1)

    def with_x(self, x: Tensor) -> Self:
        return type(self)(x, self.shape, self.slots, self.each, self.where, self.source, self._known)

    def _of(self, x: Tensor, rows: Tensor, each: int | None = None) -> Self:
        """These rows of the tokens, with features `x`."""
        where = None if self.where is None else self.where.index_select(0, rows)
        return type(self)(x, self.shape, self.slots.index_select(0, rows), each, where, self.source)

    def select(self, chosen: Tensor | int, *others: Tensor) -> tuple[Self, list[Tensor]]:
        if isinstance(chosen, Tensor) or self.even is None:
            return super().select(chosen, *others)
        images, each = self.shape[0], self.even
        rows = torch.arange(0, images * each, each, device=self.slots.device)[:, None]
        rows = (rows + torch.arange(chosen, device=self.slots.device)).flatten()  # none of which is ever dropped
        x, *kept = (t.index_select(0, rows) for t in (self.x, *others))
        return self._of(x, rows, chosen), kept

    def filter(self, chosen: Tensor, *others: Tensor) -> tuple[Self, list[Tensor]]:
        rows = chosen.nonzero().squeeze(1)  # waits for the device
        if rows.shape == self.slots.shape:
            return self, list(others)
        x, *kept = (t.index_select(0, rows) for t in (self.x, *others))
        return self._of(x, rows), kept

    def of_images(self, chosen: Tensor, *others: Tensor) -> tuple[Self, list[Tensor]]:
        """A batch of some images alone, (B,) bool, with `others`, token features."""
        numbers, slots = chosen.nonzero().squeeze(1), self.shape[1]
        image = self.slots // slots
        rows = chosen.index_select(0, image).nonzero().squeeze(1)
        first = slots * (chosen.cumsum(dim=0) - 1)
        at = self.slots.index_select(0, rows) % slots + first.index_select(0, image.index_select(0, rows))
        x, *kept = (t.index_select(0, rows) for t in (self.x, *others))
        where = None if self.where is None else self.where.index_select(0, rows)
        source = None if self.source is None else self.source.of_images(numbers)
        return type(self)(x, (len(numbers), slots), at, self.each, where, source), kept

    def put(self, some: Self, t: Tensor) -> Tensor:
        if some.slots is self.slots:
            return t
        places = torch.searchsorted(self.slots, some.slots)
        return t.new_zeros(len(self.slots), *t.shape[1:]).index_copy(0, places, t)

    def rows(self, t: Tensor) -> Tensor:
        return self.grid(t) if self.even is None else t.view(-1, self.even, *t.shape[1:])

    def of_rows(self, t: Tensor) -> Tensor:
        return self.spread(t) if self.even is None else t.flatten(0, 1)

    def take(self, index: Tensor) -> Self:
        assert self.even is not None
        first = torch.arange(0, len(self.slots), self.even, device=index.device)
        rows = (first[:, None] + index).flatten()
        return self._of(self.x.index_select(0, rows), rows, index.shape[1])

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
        if self.even is not None:
            return self.rows(t)[:, :count]
        if images == 1 and self._all_live(count):
            return t[None, :count]
        if t.shape[0] == 0:
            t = torch.cat([t, t.new_zeros(1, *t.shape[1:])])  # something to point at when nothing is live
        wanted = torch.arange(0, images * slots, slots, device=t.device)[:, None] + torch.arange(count, device=t.device)
        rows = torch.searchsorted(self.slots, wanted.flatten()).clamp(max=t.shape[0] - 1)
        picked = t.index_select(0, rows).view(images, count, *t.shape[1:])
        return picked.masked_fill(~self.live[:, :count].view(images, count, *[1] * (t.ndim - 1)), 0)

    def write(self, canvas: Tensor) -> Tensor:
        if self.full:
            return self.grid(self.x)
        return canvas.flatten(0, 1).index_copy(0, self.slots, self.x).view(*self.shape, -1)

    def stamp(self, t: Tensor, value: int) -> None:
        t.view(-1).index_fill_(0, self.slots, value)

    def merge(self, place: Tensor, moved: Tensor, weight: Tensor, count: int | None = None) -> tuple[Self, Tensor]:
        if not len(place):
            return self, weight
        images = self.shape[0]
        if not kernels.on_host(self.x.device):
            slots = self.shape[1] if count is None else count  # rather than wait for a number
            x, where, sums = merge_to_grid(self, None, place, moved, weight, slots)
            every = replace(type(self).of(x.view(images, slots, -1)), where=where, source=self.source)
            if count is not None:
                return every, sums
            merged, (sums,) = every.filter(sums > 0, sums)
            return merged, sums
        slots = int(self.spread(place).max()) + 1 if count is None else count
        goes = self.spread(place + slots * torch.arange(images, device=place.device)[:, None])
        leaves = self.spread(moved)
        stay, join = (~leaves).nonzero().squeeze(1), leaves.nonzero().squeeze(1)
        places, order = goes.index_select(0, stay).sort()
        stay, into = stay.index_select(0, order), torch.searchsorted(places, goes.index_select(0, join))
        own, added = weight.index_select(0, stay), weight.index_select(0, join)
        total = own.index_add(0, into, added)
        added = (added / total.index_select(0, into)).to(self.x.dtype)
        x = self.x.index_select(0, stay)  # of which most have nothing join them
        x = x.index_add_(0, into, (self.x.index_select(0, join) - x.index_select(0, into)) * added[:, None])
        where = self.at.index_select(0, stay)
        if self.where is not None and self.where.is_floating_point():
            means = self.where[:, 1:].index_select(0, stay) * (own / total)[:, None]
            joined = self.where[:, 1:].index_select(0, join) * (weight.index_select(0, join) / total[into])[:, None]
            means = means.index_add(0, into, joined.to(means.dtype))
            where = torch.cat([where[:, None].to(means.dtype), means], dim=1)
        return type(self)(x, (images, slots), places, None, where, self.source), total

    def attend(self, q: Tensor, k: Tensor, v: Tensor, queries: Self, how: AttentionOptions = PLAIN) -> Tensor:
        if q.shape[0] == 0:  # every parameter stays in the graph, as distributed training needs
            return q.new_zeros(*q.shape[:-1], v.shape[-1]) + 0 * (q.sum() + k.sum() + v.sum())
        if self.even is not None and queries.even is not None:
            images = self.shape[0]
            return attend_dense(q, k, v, images, self._mask(queries, how, images, q.dtype), how)
        counted = kernels.on_host(self.x.device)  # where reading lengths waits for nothing
        if counted:
            images = len(self.lengths) - self.lengths.count(0)
            if q.shape[0] == images * max(queries.lengths) and k.shape[0] == images * max(self.lengths):
                running = images == self.shape[0] or how.pairs is None or len(how.pairs) == 1
                if running:
                    return attend_dense(q, k, v, images, self._mask(queries, how, images, q.dtype), how)
        return attend_ragged(q, k, v, self, queries, how, counted)

    def attend_batch(self, q: Tensor, k: Tensor, v: Tensor, how: AttentionOptions = PLAIN) -> Tensor:
        if self.even is None or not q.shape[0]:
            return super().attend_batch(q, k, v, how)
        mask = self._mask(self, how, len(q), q.dtype)  # without a copy of queries that stand head by head
        return scaled_dot_product_attention(q, k, v, mask, how.dropout, scale=how.scale)

    def _mask(self, queries: Self, how: AttentionOptions, images: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the logits of so many images that have as many tokens each."""
        pairs, mask = how.pairs, None if how.bias is None else how.bias.view(images, 1, 1, -1).to(dtype)
        if pairs is None:
            return mask
        if not (self.in_place and queries.in_place):
            pairs = by_place(pairs, queries.at.view(images, -1), self.at.view(images, -1))
        return pairs.to(dtype) if mask is None else mask + pairs.to(dtype)

    def standardise(self, t: Tensor, eps: float) -> Tensor:
        wide = t.to(torch.promote_types(t.dtype, torch.float32))
        image, count = self.slots // self.shape[1], self.offsets.diff().clamp(min=1)[:, None]

        def mean(t: Tensor) -> Tensor:
            return add_rows(t.new_zeros(self.shape[0], t.shape[1]), image, t) / count

        centred = wide - mean(wide).index_select(0, image)
        scale = (mean(centred.square()) + eps).rsqrt()
        return (centred * scale.index_select(0, image)).to(t.dtype)

    def received(self, q: Tensor, k: Tensor, pairs: Tensor | None = None) -> Tensor:
        if self.shape[0] > 1 and q.shape[1] <= FEW and pairs is None and kernels.on_host(self.x.device):
            return self._received_from_few(q, k)
        if self.even is not None:
            at = self.at.view(self.shape[0], self.even)
            added = None if pairs is None else by_place(pairs, at[:, : q.shape[1]], at)
            return mean_received(q, self.rows(k), None, added).flatten(0, 1)
        if not kernels.on_host(self.x.device):
            at = self.grid(self.at)
            added = None if pairs is None else by_place(pairs, at[:, : q.shape[1]], at)
            return self.spread(mean_received(q, self.grid(k), self.live, added))
        if self.shape[0] == 1 and pairs is None and self._all_live(q.shape[1]):
            return mean_received(q, k[None], None)[0]
        rows = self.live[:, : q.shape[1]]
        parts = []
        images = zip(q, rows, k.split(self.lengths), self.at.split(self.lengths), strict=True)
        for image, (queries, alive, keys, at) in enumerate(images):
            added = None
            if pairs is not None:
                asking = at[: int(alive.sum())]  # slots are ascending: those that ask are the first of the image's
                added = by_place(pairs[image % len(pairs)][None], asking[None], at[None])
            parts.append(mean_received(queries[alive][None], keys[None], None, added)[0])
        return torch.cat(parts)

    def _received_from_few(self, q: Tensor, k: Tensor) -> Tensor:
        """By one softmax for all images, and products of each key with the queries of its image."""
        with torch.autocast(k.device.type, enabled=False):
            dtype = torch.promote_types(k.dtype, torch.float32)
            q, keys = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype)
            if self.even is not None:
                heads = self.rows(keys).unbind(2), q.unbind(2)
                logits = torch.stack([own @ asking.mT for own, asking in zip(*heads, strict=True)], dim=-1)
                return logits.softmax(dim=1).mean(dim=2).flatten(0, 1)
            image = self.slots // self.shape[1]
            logits = torch.stack([(keys * own.index_select(0, image)).sum(dim=-1) for own in q.unbind(1)], dim=-1)
            grid = logits.new_full((self.shape[0] * self.shape[1], *logits.shape[1:]), -torch.inf)
            grid = grid.index_copy(0, self.slots, logits).view(*self.shape, *logits.shape[1:])
            alive = self.live[:, : q.shape[1]].to(dtype)
            share = alive / alive.sum(dim=1, keepdim=True).clamp(min=1)
            return self.spread((grid.softmax(dim=1) * share[:, None, None]).sum(dim=3))

    def _all_live(self, count: int) -> bool:
        """Whether the first `count` slots of the one image are."""
        return self.slots.shape[0] >= count and self.slots[count - 1].item() == count - 1
