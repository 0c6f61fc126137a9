"""The layout of images that all have as many tokens, which Python knows: nothing hidden, nothing waited for.

It compiles and exports whole. One image alone has as many as itself, whatever it keeps: that has to be waited for, and
an exported file has shapes that depend on the image.

Letters: B images, N token slots, n tokens of each image, D channels, H heads, d channels per head.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from adaptvit.tokens import fused, kernels
from adaptvit.tokens.base import Tokens
from adaptvit.tokens.kernels import PLAIN, AttentionOptions, by_place, mean_received, rows_at, slots_of


@dataclass(frozen=True, eq=False)
class Dense(Tokens):
    """As many tokens of every image, in slot order: x is (B, n, D). `filter`, which counts, is for one image alone.

    `merge` sums by a product with a table of who joins whom, as exporters know no better: for r of n tokens it takes
    r (n - r) D MACs, 0.2 % of a block of DeiT-S that merges 8, which no `Usage` counts.
    """

    x: Tensor
    count: int
    """N."""
    slots: Tensor | None = None
    """(B, n) each token's slot, ascending; None while every slot has one."""
    where: Tensor | None = None
    source: Any = None
    filtered: bool = False
    """Whether the one image was asked what it keeps, so that leading slots may be dead."""

    @classmethod
    def of(cls, x: Tensor) -> Self:
        return cls(x, x.shape[1])

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.x.shape[0], self.count

    @property
    def live(self) -> Tensor:
        return self.grid(torch.ones(self.x.shape[:2], dtype=torch.bool, device=self.x.device))

    @property
    def at(self) -> Tensor:
        return self._slots if self.where is None else slots_of(self.where)

    @property
    def in_place(self) -> bool:
        return self.where is None and self.slots is None

    @property
    def _slots(self) -> Tensor:
        """(1 or B, n)."""
        return torch.arange(self.x.shape[1], device=self.x.device)[None] if self.slots is None else self.slots

    @property
    def batch(self) -> Tensor:
        return self.x

    def of_batch(self, t: Tensor) -> Tensor:
        return t

    def with_x(self, x: Tensor) -> Self:
        return replace(self, x=x)

    def select(self, chosen: Tensor | int, *others: Tensor) -> tuple[Self, list[Tensor]]:
        if isinstance(chosen, Tensor) or self.filtered:
            return super().select(chosen, *others)
        x, *kept = (t[:, :chosen] for t in (self.x, *others))  # none of which is ever dropped
        where = None if self.where is None else self.where[:, :chosen]
        return replace(self, x=x, slots=self._slots[:, :chosen].expand(x.shape[0], -1), where=where), kept

    def filter(self, chosen: Tensor, *others: Tensor) -> tuple[Self, list[Tensor]]:
        if self.x.shape[0] != 1:
            raise NotImplementedError("Dense has as many tokens of every image, but these keep what each of them needs")
        rows = chosen[0].nonzero().squeeze(1)  # waits for the device
        x, slots, *kept = (t.index_select(1, rows) for t in (self.x, self._slots, *others))
        where = None if self.where is None else self.where.index_select(1, rows)
        return replace(self, x=x, slots=slots, where=where, filtered=True), kept

    def of_images(self, chosen: Tensor, *others: Tensor) -> tuple[Self, list[Tensor]]:
        """A batch of some images alone, (B,) bool, with `others`, token features."""
        numbers = chosen.nonzero().squeeze(1)

        def some(t: Tensor) -> Tensor:
            return t.index_select(0, numbers) if t.shape[0] == chosen.shape[0] else t

        slots, where = (None if t is None else some(t) for t in (self.slots, self.where))
        source = None if self.source is None else self.source.of_images(numbers)
        kept = replace(self, x=self.x.index_select(0, numbers), slots=slots, where=where, source=source)
        return kept, [t.index_select(0, numbers) for t in others]

    def put(self, some: Self, t: Tensor) -> Tensor:
        if some.x.shape[1] == self.x.shape[1]:
            return t
        return torch.cat([t, t.new_zeros(t.shape[0], self.x.shape[1] - t.shape[1], *t.shape[2:])], dim=1)

    def rows(self, t: Tensor) -> Tensor:
        return t

    def of_rows(self, t: Tensor) -> Tensor:
        return t

    def take(self, index: Tensor) -> Self:
        where = None if self.where is None else _gather(self.where, index)
        slots = index if self.slots is None else self.slots.gather(1, index)
        return replace(self, x=_gather(self.x, index), slots=slots, where=where)

    def grid(self, t: Tensor) -> Tensor:
        if self.slots is None:
            return t
        grid = t.new_zeros(*self.shape, *t.shape[2:])
        return grid.scatter(1, self._slots.view(*self._slots.shape, *[1] * (t.ndim - 2)).expand_as(t), t)

    def spread(self, t: Tensor) -> Tensor:
        return t if self.slots is None or t.shape[1] == 1 else _gather(t, self._slots.expand(t.shape[0], -1))

    def first(self, t: Tensor, count: int) -> Tensor:
        if self.slots is None:
            return t[:, :count]
        return self.grid(t)[:, :count] if self.filtered or count == self.count else t[:, :count]

    def write(self, canvas: Tensor) -> Tensor:
        if self.slots is None:
            return self.x
        return canvas.scatter(1, self._slots[..., None].expand_as(self.x), self.x)

    def stamp(self, t: Tensor, value: int) -> None:
        t.scatter_(1, self._slots.expand(t.shape[0], -1), value)

    def merge(self, place: Tensor, moved: Tensor, weight: Tensor, count: int | None = None) -> tuple[Self, Tensor]:
        if count is None:
            raise NotImplementedError("Dense merges as many tokens in every image, but these merge what is alike")
        if self.slots is None and kernels.fuses(self.x) and (self.where is None or not self.where.is_floating_point()):
            return self.join(place, moved, None, weight, None, False, count, 0.0)[:2]
        goes, moved = self.spread(place), self.spread(moved)
        stays, going = _held(goes, ~moved, count), _held(moved.cumsum(dim=1) - 1, moved, goes.shape[1] - count)
        merged, (total,) = self.join_pairs(None, stays, going, goes.gather(1, going), weight)
        return merged, total

    def join_pairs(
        self, stay: Tensor | None, others: Tensor | slice, go: Tensor, into: Tensor, weight: Tensor, *sums: Tensor
    ) -> tuple[Self, list[Tensor]]:
        """`merge` by who stays and who joins whom: `stay`, then `others`, in their order, and `go` is gone.

        Args:
            stay: (B, a) places that nothing joins; None is none.
            others: (B, o) places, or a slice of all.
            go: (B, r) places of the tokens that join one of `others`.
            into: (B, r) the number of that among these.
            weight: (B, n), positive, without gradients.
            sums: (B, n), to be summed too.
        Returns:
            tokens of a + o slots, and the sums of `weight` and `sums` in them.
        """

        def rest(t: Tensor) -> Tensor:
            return t[:, others] if isinstance(others, slice) else _gather(t, others)

        def staying(t: Tensor, joined: Tensor) -> Tensor:
            return joined if stay is None else torch.cat([_gather(t, stay), joined], dim=1)

        own, gone = rest(weight), _gather(weight, go)
        joins = (torch.arange(own.shape[1], device=go.device)[:, None] == into[:, None]).to(weight.dtype)  # (B, o, r)
        added = [rest(t) + (joins * _gather(t, go)[:, None]).sum(dim=2) for t in (weight, *sums)]
        own, gone = (own / added[0])[..., None], (gone / added[0].gather(1, into))[..., None]

        def mean(t: Tensor) -> Tensor:
            joined = joins.to(t.dtype) @ (_gather(t, go) * gone.to(t.dtype))
            return staying(t, rest(t) * own.to(t.dtype) + joined)

        at = self.at.expand(self.x.shape[:2])
        where = staying(at, rest(at))
        if self.where is not None and self.where.is_floating_point():
            means = mean(self.where[..., 1:])
            where = torch.cat([where[..., None].to(means.dtype), means], dim=2)
        x = mean(self.x)
        totals = [staying(t, total) for t, total in zip((weight, *sums), added, strict=True)]
        return type(self)(x, x.shape[1], None, where, self.source), totals

    def join(
        self,
        place: Tensor,
        moved: Tensor,
        lengths: Tensor | None,
        size: Tensor,
        importance: Tensor | None,
        keeps_length: bool,
        count: int | None,
        power: float,
    ) -> tuple[Self, Tensor, Tensor]:
        """`merge` in a kernel; tokens count by `importance` too, and are as long as before, as `fused.merge` has it.

        Args:
            lengths: what `fused.arrange` gave, which is known here.
        Returns:
            Beside tokens and sums, the logarithms of these times `power`, in the precision of the features.
        """
        assert count is not None
        images, rows = self.x.shape[0], self.x.shape[0] * count
        x, where, sums, bias, *_ = fused.merge(
            self.x.flatten(0, 1),
            None if self.where is None else self.where.flatten(),
            size.flatten(),
            None if importance is None else importance.flatten(),
            place,
            moved,
            None,
            None,
            rows,
            count,
            keeps_length,
            power,
            self.x.dtype,
        )
        x, where, sums, bias = (t.view(images, count, *t.shape[1:]) for t in (x, where, sums, bias))
        return type(self)(x, count, None, where, self.source), sums, bias

    def best(self, score: Tensor, count: int, prefix: int, fuse: bool) -> tuple[Self, Tensor, Tensor]:
        """`take` of the patches that score highest, in two kernels, as `fused.best` and `fused.take` have it.

        Args:
            fuse: the lowest of them becomes the sum of those that are left out, and itself.
        Returns:
            Beside tokens, the place of the lowest, (B, 1), and sums of scores, (B, 1).
        """
        index, slots, last, sums = fused.best(score, self.slots, count, prefix)
        x = fused.take(self.x, index, *((score, last) if fuse else (None, None)), prefix)
        where = None if self.where is None else _gather(self.where, index)
        return replace(self, x=x, slots=slots, where=where), last, sums

    def attend(self, q: Tensor, k: Tensor, v: Tensor, queries: Self, how: AttentionOptions = PLAIN) -> Tensor:
        pairs, mask = how.pairs, None if how.bias is None else how.bias[:, None, None].to(q.dtype)
        if pairs is not None:
            if not (self.in_place and queries.in_place):
                pairs = by_place(pairs, queries.at, self.at)
            mask = pairs.to(q.dtype) if mask is None else mask + pairs.to(q.dtype)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v, mask, how.dropout, scale=how.scale).transpose(1, 2)

    def attended_from(self, q: Tensor, k: Tensor, read: int, prefix: int | None = None) -> Tensor:
        """Attention that each token receives, in a kernel, as `fused.attended` has it: (B, n)."""
        found = fused.attended(q.flatten(0, 1), k.flatten(0, 1), None, None, k.shape[1], read, prefix)
        return found.view(k.shape[:2])

    def with_mean(self, t: Tensor, prefix: int) -> Tensor:
        """(B, n, D), in the second half of whose channels is the mean over patches, from place `prefix` on, in a
        kernel."""
        found: Tensor = fused.with_mean(t.flatten(0, 1), None, None, t.shape[1], prefix)
        return found.view(t.shape)

    def standardise(self, t: Tensor, eps: float) -> Tensor:
        wide = t.to(torch.promote_types(t.dtype, torch.float32))
        centred = wide - wide.mean(dim=1, keepdim=True)
        return (centred * (centred.square().mean(dim=1, keepdim=True) + eps).rsqrt()).to(t.dtype)

    def received(self, q: Tensor, k: Tensor, pairs: Tensor | None = None) -> Tensor:
        at = self.at
        return mean_received(q, k, None, None if pairs is None else by_place(pairs, at[:, : q.shape[1]], at))


def _gather(t: Tensor, index: Tensor) -> Tensor:
    """The places (B, n) of (B, R, ...)."""
    if t.ndim == 3:
        return rows_at(t, index)
    return t.gather(1, index.view(*index.shape, *[1] * (t.ndim - 2)).expand(*index.shape, *t.shape[2:]))


def _held(place: Tensor, some: Tensor, count: int) -> Tensor:
    """(B, count) the token in each of so many places, where `some` of (B, n) go, one to each."""
    goes = place.masked_fill(~some, count)  # a place of its own for the others
    number = torch.arange(place.shape[1], device=place.device).expand_as(place)
    return number.new_zeros(place.shape[0], count + 1).scatter(1, goes, number)[:, :count]
