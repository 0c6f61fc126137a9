"""The layout for a device: as many rows as the host chose beforehand, counts that stay on the device. Nobody waits.

Letters: B images, N token slots, C rows, D channels, H heads, d channels per head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from adaptvit.tokens import fused, kernels
from adaptvit.tokens.base import Tokens, merge_to_grid
from adaptvit.tokens.kernels import (
    PLAIN,
    AttentionOptions,
    attend_dense,
    attend_ragged,
    by_place,
    mean_received,
    slots_of,
)

TILE = 128
"""Rows are rounded up to so many, which matrix products take together."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many tokens are left wherever a model drops some, as counted on images, from which follows how many rows."""

    means: Sequence[float]
    """Tokens of an image, on average, by call of `filter` or `merge`."""
    spreads: Sequence[float]
    """Their standard deviations over images."""
    images: int
    """How many were counted; the more, the fewer rows are kept in reserve."""

    def rows(self, batch: int) -> tuple[int, ...]:
        """Rows for a batch of so many images: three deviations of its sum, and of the means themselves, in reserve."""
        reserve = 3 * (math.sqrt(batch) + batch / math.sqrt(self.images))
        wanted = (batch * mean + reserve * spread for mean, spread in zip(self.means, self.spreads, strict=True))
        return tuple(TILE * math.ceil(rows / TILE) for rows in wanted)


@dataclass(frozen=True, eq=False)
class Slab(Tokens):
    """Live tokens end to end, image after image, as `Packed`, in C rows; those behind the last token hold nothing.

    How many rows `filter` and `merge` leave, `source.plan` says, in the order in which they are called; None leaves as
    many as there were. They note in `source.left` where tokens then are and how many rows there were for them: what
    comes of a batch that had too few is worthless.
    """

    x: Tensor
    """(C, D)."""
    shape: tuple[int, int]
    slots: Tensor
    """(C,) each token's place in the flattened (B, N) grid, ascending; B N of rows that hold nothing."""
    offsets: Tensor
    """(B + 1,) int32: image b's tokens are rows offsets[b] to offsets[b + 1]."""
    calls: int = 0
    """How often tokens were filtered or merged."""
    where: Tensor | None = None
    source: Any = None
    full: bool = False
    """Every slot of every image is known to hold a token: they make a dense batch."""

    @classmethod
    def of(cls, x: Tensor) -> Self:
        images, slots = x.shape[:2]
        at = torch.arange(images * slots, device=x.device)
        offsets = torch.arange(0, images * slots + 1, slots, device=x.device, dtype=torch.int32)
        return cls(x.flatten(0, 1), (images, slots), at, offsets, full=True)

    def refilled(self) -> Self:
        return replace(type(self).of(self.grid(self.x)), calls=self.calls, source=self.source)

    @property
    def spare(self) -> bool:
        return not self.full

    @property
    def real(self) -> Tensor | None:
        """(C,) bool, the rows that hold a token; None is all."""
        return None if self.full else self.slots < self.shape[0] * self.shape[1]

    @property
    def live(self) -> Tensor:
        return self.grid(torch.ones_like(self.slots, dtype=torch.bool))

    @property
    def lengths(self) -> list[int]:
        """Tokens per image: to ask for them is to wait."""
        return self.offsets.diff().tolist()

    @property
    def at(self) -> Tensor:
        return self._held % self.shape[1] if self.where is None else slots_of(self.where)

    @property
    def in_place(self) -> bool:
        return self.where is None and self.full

    @property
    def batch(self) -> Tensor:
        return self.x.view(*self.shape, *self.x.shape[1:]) if self.full else self.x[None]

    def of_batch(self, t: Tensor) -> Tensor:
        return t.flatten(0, 1) if self.full else t[0]

    def with_x(self, x: Tensor) -> Self:
        return type(self)(x, self.shape, self.slots, self.offsets, self.calls, self.where, self.source, self.full)

    def with_those(self, some: Self) -> Self:
        """The same tokens, of which those that `filter` or `select` left have the features that they have in `some`."""
        if some.full:
            return some
        rows = self._rows_of(some)
        if kernels.fuses(self.x, some.x):
            return replace(self, x=fused.put(self.x, rows, some.x), calls=some.calls)
        x = torch.cat([self.x, self.x.new_zeros(1, *self.x.shape[1:])]).index_copy_(0, rows, some.x)
        return replace(self, x=x[:-1], calls=some.calls)

    def by_heads(self, t: Tensor, heads: Tensor) -> Tensor:
        """Token features (C, D), with 0 in the channels of heads that are off in their image, (B, H) bool."""
        if kernels.fuses(t):
            found: Tensor = fused.gated(t, heads, self.offsets)
            return found
        return t * self.spread(heads.repeat_interleave(t.shape[-1] // heads.shape[1], dim=1)[:, None])

    @property
    def _held(self) -> Tensor:
        """`slots`, where rows that hold nothing point at some slot."""
        return self.slots if self.full else self.slots.clamp(max=self.shape[0] * self.shape[1] - 1)

    def _rows_of(self, some: Self) -> Tensor:
        """(C',) where the rows of what was left of these tokens stand among them; behind all, where they hold none."""
        if self.full:
            return some.slots
        empty = some.slots == self.shape[0] * self.shape[1]
        return torch.searchsorted(self.slots, some.slots).masked_fill(empty, self.x.shape[0])

    def _some(
        self, chosen: Tensor, count: int, *others: Tensor, by_slot: bool = False
    ) -> tuple[Self, list[Tensor], Tensor]:
        """Those that are `chosen`, in so many rows, and offsets as if there were enough of them.

        Args:
            by_slot: `chosen` is (B, N) instead of token features.
        """
        if kernels.fuses(self.x, *others):
            return self._fused_some(chosen, count, *others, by_slot=by_slot)
        if by_slot:
            chosen = self.spread(chosen)
        if self.real is not None:
            chosen = chosen & self.real
        end = chosen.cumsum(0, dtype=torch.int32)
        offsets = torch.cat([end.new_zeros(1), end]).index_select(0, self.offsets.long())
        rows = torch.nonzero_static(chosen, size=count, fill_value=0).squeeze(1)
        held = torch.arange(count, device=rows.device) < offsets[-1]
        slots = self.slots.index_select(0, rows).masked_fill(~held, self.shape[0] * self.shape[1])
        where = None if self.where is None else self.where.index_select(0, rows)
        x, *kept = (t.index_select(0, rows) for t in (self.x, *others))
        bounded = offsets.clamp(max=count)
        return type(self)(x, self.shape, slots, bounded, self.calls, where, self.source), kept, offsets

    def _fused_some(
        self, chosen: Tensor, count: int, *others: Tensor, by_slot: bool
    ) -> tuple[Self, list[Tensor], Tensor]:
        other, *more = others or (self.slots,)
        total = self.shape[0] * self.shape[1]
        left, offsets, slots, rows, x, other = fused.compact(
            chosen.flatten(), self.slots, self.offsets, self.x, other, count, total, by_slot
        )
        where = None if self.where is None else self.where.index_select(0, rows)
        kept = [other, *(t.index_select(0, rows) for t in more)] if others else []
        return type(self)(x, self.shape, slots, offsets, self.calls, where, self.source), kept, left

    def _planned(self, chosen: Tensor, *others: Tensor, by_slot: bool = False) -> tuple[Self, list[Tensor]]:
        """Those that are `chosen`, as in `_some`, in as many rows as are planned."""
        plan = None if self.source is None else self.source.plan
        count = self.x.shape[0] if plan is None else min(plan[self.calls], self.x.shape[0])
        some, kept, left = self._some(chosen, count, *others, by_slot=by_slot)
        if self.source is not None:
            self.source.left.append((left, count))
        return replace(some, calls=self.calls + 1), kept

    def select(self, chosen: Tensor | int, *others: Tensor) -> tuple[Self, list[Tensor]]:
        if isinstance(chosen, Tensor):
            return self._planned(chosen.expand(self.shape), *others, by_slot=True)
        leading = self.slots % self.shape[1] < chosen
        some, kept, _ = self._some(leading, min(self.shape[0] * chosen, self.x.shape[0]), *others)
        return some, kept

    def filter(self, chosen: Tensor, *others: Tensor) -> tuple[Self, list[Tensor]]:
        return self._planned(chosen, *others)

    def put(self, some: Self, t: Tensor) -> Tensor:
        rows = self.x.shape[0]
        return t.new_zeros(rows + 1, *t.shape[1:]).index_copy(0, self._rows_of(some), t)[:rows]

    def rows(self, t: Tensor) -> Tensor:
        return self.grid(t)

    def of_rows(self, t: Tensor) -> Tensor:
        return self.spread(t)

    def take(self, index: Tensor) -> Self:
        return self.keep(torch.zeros(self.shape, dtype=torch.bool, device=index.device).scatter(1, index, True))

    def grid(self, t: Tensor) -> Tensor:
        total = self.shape[0] * self.shape[1]
        if not self.full:
            t = t.new_zeros(total + 1, *t.shape[1:]).index_copy_(0, self.slots, t)[:total]
        return t.view(*self.shape, *t.shape[1:])

    def spread(self, t: Tensor) -> Tensor:
        if self.full:
            return t.expand(*self.shape, *t.shape[2:]).flatten(0, 1)
        if t.shape[1] == 1:
            return t.squeeze(1).index_select(0, self._held // self.shape[1])
        return t.flatten(0, 1).index_select(0, self._held)

    def first(self, t: Tensor, count: int) -> Tensor:
        return self.grid(t)[:, :count]

    def write(self, canvas: Tensor) -> Tensor:
        if self.full:
            return self.grid(self.x)
        flat = canvas.flatten(0, 1)
        flat = torch.cat([flat, flat.new_zeros(1, flat.shape[1])]).index_copy(0, self.slots, self.x)
        return flat[:-1].view(*self.shape, -1)

    def stamp(self, t: Tensor, value: int) -> None:
        total = t.numel()
        t.view(-1).copy_(torch.cat([t.view(-1), t.new_zeros(1)]).index_fill(0, self.slots, value)[:total])

    def merge(self, place: Tensor, moved: Tensor, weight: Tensor, count: int | None = None) -> tuple[Self, Tensor]:
        images, slots = self.shape[0], self.shape[1] if count is None else count
        if kernels.fuses(self.x) and (self.where is None or not self.where.is_floating_point()):
            lengths = self.offsets.diff() - moved.sum(dim=1, dtype=torch.int32)
            return self.join(place, moved, lengths, weight, None, False, count, 0.0)[:2]
        x, where, sums = merge_to_grid(self, self.real, place, moved, weight, slots)
        every = type(self).of(x.view(images, slots, -1))
        every = replace(every, calls=self.calls, where=where, source=self.source)
        if count is not None:
            return every, sums
        merged, (sums,) = every._planned(sums > 0, sums)
        return merged, sums if merged.real is None else sums.where(merged.real, 1)

    def join(
        self,
        place: Tensor,
        moved: Tensor,
        lengths: Tensor,
        size: Tensor,
        importance: Tensor | None,
        keeps_length: bool,
        count: int | None,
        power: float,
    ) -> tuple[Self, Tensor, Tensor]:
        """`merge` in a kernel; tokens count by `importance` too, and are as long as before, as `fused.merge` has it.

        Args:
            lengths: (B,) int32, the tokens that are left of each image.
        Returns:
            Beside tokens and sums, the logarithms of these times `power`, in float32.
        """
        images, rows, calls = self.shape[0], self.x.shape[0], self.calls
        slots = self.shape[1] if count is None else count
        plan = None if self.source is None else self.source.plan
        if count is not None:
            rows = images * count
        elif plan is not None:
            rows = min(plan[calls], rows)
        x, where, sums, bias, places, left, offsets = fused.merge(
            self.x,
            None if self.where is None and self.full else self.at,
            size,
            importance,
            place,
            moved,
            self.offsets,
            lengths,
            rows,
            slots,
            keeps_length,
            power,
            torch.float32,
        )
        if count is None and self.source is not None:
            self.source.left.append((left, rows))
            calls += 1
        full = count is not None
        return type(self)(x, (images, slots), places, offsets, calls, where, self.source, full), sums, bias

    def attend(self, q: Tensor, k: Tensor, v: Tensor, queries: Self, how: AttentionOptions = PLAIN) -> Tensor:
        if self.full and queries.full:
            return attend_dense(q, k, v, self.shape[0], self._mask(queries, how, q.dtype), how)
        return attend_ragged(q, k, v, self, queries, how, counted=False)

    def _mask(self, queries: Self, how: AttentionOptions, dtype: torch.dtype) -> Tensor | None:
        """What is added to the logits of a dense batch."""
        pairs, mask = how.pairs, None if how.bias is None else self.grid(how.bias)[:, None, None].to(dtype)
        if pairs is None:
            return mask
        if not (self.in_place and queries.in_place):
            pairs = by_place(pairs, queries.grid(queries.at), self.grid(self.at))
        return pairs.to(dtype) if mask is None else mask + pairs.to(dtype)

    def received_from(self, q: Tensor, k: Tensor, read: int) -> Tensor:
        """Attention that each token receives, in a kernel, as `fused.received` has it: (C, H)."""
        found: Tensor = fused.received(q, k, self.slots, self.offsets, self.shape[1], read)
        return found

    def attended_from(self, q: Tensor, k: Tensor, read: int, prefix: int | None = None) -> Tensor:
        """The mean of that over heads, as `fused.attended` has it: (C,)."""
        found: Tensor = fused.attended(q, k, self.slots, self.offsets, self.shape[1], read, prefix)
        return found

    def with_mean(self, t: Tensor, prefix: int) -> Tensor:
        """Token features (C, D), in the second half of whose channels is the mean over their image's patches, from
        slot `prefix` on, in a kernel."""
        found: Tensor = fused.with_mean(t, self.slots, self.offsets, self.shape[1], prefix)
        return found

    def standardise(self, t: Tensor, eps: float) -> Tensor:
        wide, live = self.grid(t.to(torch.promote_types(t.dtype, torch.float32))), self.live[..., None]
        count = live.sum(dim=1, keepdim=True).clamp(min=1)
        centred = (wide - wide.sum(dim=1, keepdim=True) / count) * live
        variance = centred.square().sum(dim=1, keepdim=True) / count
        return self.spread(centred * (variance + eps).rsqrt()).to(t.dtype)

    def received(self, q: Tensor, k: Tensor, pairs: Tensor | None = None) -> Tensor:
        at = self.grid(self.at) if pairs is not None else None
        added = None if pairs is None or at is None else by_place(pairs, at[:, : q.shape[1]], at)
        return self.spread(mean_received(q, self.grid(k), self.live, added))
