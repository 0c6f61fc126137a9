"""Two layouts for the tokens of a batch whose images keep different numbers of them: `Masked` and `Packed`.

Letters: B images, N token slots, T live tokens over the batch, D channels, H heads, d channels per head.

A method is written once against the verbs below and runs in both layouts with the same meaning. `Masked` computes every
slot and hides the dead ones: it is the definition, and what gates need whose gradients pass through the mask. `Packed`
stores the live tokens end to end, image after image, and computes nothing else: it is the speed.

"Token features" below are tensors laid out as the layout lays out its own: (B, N, ...) masked, (T, ...) packed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class Tokens(ABC):
    """The tokens of a batch. Immutable; every verb returns new tokens or a tensor.

    Attributes:
        x: features, laid out by the layout.
        shape: images and slots, (B, N).
    """

    x: Tensor
    shape: tuple[int, int]

    @classmethod
    @abstractmethod
    def of(cls, x: Tensor) -> Self:
        """Lay out dense (B, N, D) features; every slot is live."""

    @property
    @abstractmethod
    def live(self) -> Tensor:
        """(B, N) bool, the slots that hold a token."""

    @abstractmethod
    def with_x(self, x: Tensor) -> Self:
        """The same tokens with other features."""

    def keep(self, chosen: Tensor) -> Self:
        """Drop every token whose slot is not in `chosen`, (B, N) or (1, N) bool; dead slots stay dead."""
        return self.filter(self.spread(chosen.expand(self.shape)))[0]

    @abstractmethod
    def filter(self, chosen: Tensor, *others: Tensor) -> tuple[Self, list[Tensor]]:
        """Drop every token that is not `chosen`, bool token features, and take `others`, token features, along."""

    @abstractmethod
    def rows(self, t: Tensor) -> Tensor:
        """Token features -> (B, R, ...) in slot order: the live tokens where all images are known to have as many.

        Otherwise R is N, and dead slots hold 0.
        """

    @abstractmethod
    def of_rows(self, t: Tensor) -> Tensor:
        """What `rows` gave -> token features."""

    @abstractmethod
    def take(self, index: Tensor) -> Self:
        """Keep as many tokens of every image, where they have as many: (B, n) places of `rows`, ascending."""

    @abstractmethod
    def grid(self, t: Tensor) -> Tensor:
        """Token features -> (B, N, ...), 0 where a slot is dead."""

    @abstractmethod
    def spread(self, t: Tensor) -> Tensor:
        """(B, 1, ...) or (B, N, ...) -> something that broadcasts against token features."""

    @abstractmethod
    def first(self, t: Tensor, count: int) -> Tensor:
        """Token features -> those of the first `count` slots, (B, count, ...), 0 where a slot is dead."""

    @abstractmethod
    def stamp(self, t: Tensor, value: int) -> None:
        """Write `value` into the live slots of a (B, N) tensor, in place."""

    @abstractmethod
    def merge(self, place: Tensor, moved: Tensor, weight: Tensor) -> tuple[Self, Tensor]:
        """Replace tokens that go to one place by their weighted mean.

        Args:
            place: (B, N) int64, the slot that each live slot's token goes to; from 0 on, without gaps in an image.
            moved: (B, N) bool, tokens that join another in its place; the others have a place each.
            weight: positive token features (...,), without gradients.
        Returns:
            tokens of as many slots as the fullest image has places, and the sums of the weights in them.
        """

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Self, dropout: float = 0.0, bias: Tensor | None = None
    ) -> Tensor:
        """Scaled dot-product attention within each image.

        Args:
            q: features (..., H, d) of the tokens `queries`, which are these tokens or some of them.
            k, v: features (..., H, d) of these tokens.
            queries: `self`, or what `self.keep(...)` gave.
            dropout: probability of dropping an attention weight.
            bias: features (...,) of these tokens, added to the logits of each as a key.
        Returns:
            features (..., H, d) of `queries`; what stands in dead slots has no meaning.
        """

    @abstractmethod
    def standardise(self, t: Tensor, eps: float) -> Tensor:
        """Token features (..., D) with mean 0 and variance 1 over each image's live tokens, by channel; dead slots 0.

        Args:
            eps: added to the variance.
        """

    @abstractmethod
    def received(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention that each token receives from the image's first R slots: the mean of the softmax over live ones.

        Args:
            q: queries of these slots, (B, R, H, d), none of them dead where `rows` has none; or the `rows` of all.
            k: features (..., H, d) of these tokens.
        Returns:
            features (..., H) of these tokens, in float32 or wider.
        """


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
        return t if self.mask is None else t.masked_fill(~self.mask.view(*self.shape, *[1] * (t.ndim - 2)), 0)

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
        mask = None
        if self.mask is not None:
            visible = self.mask | ~self.mask.any(dim=1, keepdim=True)  # an image without tokens attends to all: no 0/0
            mask = visible[:, None, None, :]
        if bias is not None:
            bias = bias[:, None, None, :].to(q.dtype)
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)

    def standardise(self, t: Tensor, eps: float) -> Tensor:
        wide = t.to(torch.promote_types(t.dtype, torch.float32))
        count = self.live.sum(dim=1).clamp(min=1)[:, None, None]
        centred = self.grid(wide - self.grid(wide).sum(dim=1, keepdim=True) / count)
        variance = centred.square().sum(dim=1, keepdim=True) / count
        return (centred * (variance + eps).rsqrt()).to(t.dtype)

    def received(self, q: Tensor, k: Tensor) -> Tensor:
        return _received(q, k, self.mask)


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
            return _attend_dense(q, k, v, self.shape[0], dropout, bias)
        if self.x.device.type == "cpu":  # where lengths are on the host already, and reading them waits for nothing
            images = len(self.lengths) - self.lengths.count(0)
            if q.shape[0] == images * max(queries.lengths) and k.shape[0] == images * max(self.lengths):
                return _attend_dense(q, k, v, images, dropout, bias)
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
            return _received(q, self.rows(k), None).flatten(0, 1)
        if self.x.device.type != "cpu":
            return self.spread(_received(q, self.grid(k), self.live))
        if self.shape[0] == 1 and self._all_live(q.shape[1]):
            return _received(q, k[None], None)[0]
        rows = self.live[:, : q.shape[1]]
        images = zip(q, rows, k.split(self.lengths), strict=True)
        parts = [_received(queries[alive][None], keys[None], None)[0] for queries, alive, keys in images]
        return torch.cat(parts)

    def _all_live(self, count: int) -> bool:
        """Whether the first `count` slots of the one image are."""
        return self.slots.shape[0] >= count and self.slots[count - 1].item() == count - 1


ROWS = 64
"""Rows of the attention matrix that `received` holds at a time."""


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def _received(q: Tensor, k: Tensor, live: Tensor | None) -> Tensor:
    """`Tokens.received` on the grid: q (B, R, H, d), k (B, N, H, d), live (B, N) or None where all are."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    q, keys = (q.to(dtype) * q.shape[-1] ** -0.5).transpose(1, 2), k.to(dtype).permute(0, 2, 3, 1)
    total = k.new_zeros((), dtype=dtype).expand(len(k), k.shape[2], k.shape[1])
    for start in range(0, q.shape[2], ROWS):
        rows = slice(start, min(start + ROWS, q.shape[2]))
        logits = q[:, :, rows] @ keys
        if live is None:
            weights = logits.softmax(dim=-1)
        else:
            hidden = ~live[:, None, None]
            weights = logits.masked_fill(hidden, torch.finfo(dtype).min).softmax(dim=-1) * live[:, None, rows, None]
        total = total + weights.sum(dim=2)
    count = max(1, q.shape[2]) if live is None else live[:, : q.shape[2]].sum(dim=1).clamp(min=1).view(-1, 1, 1)
    return (total / count).transpose(1, 2)


LAYOUTS: dict[str, type[Tokens]] = {"masked": Masked, "packed": Packed}


Kernel = Callable[[Tensor, Tensor, Tensor, Packed, Packed, float, Tensor | None], Tensor]


def ragged_kernel(device: torch.device, dtype: torch.dtype, dropout: float, biased: bool) -> Kernel:
    """The attention kernel for images of different lengths.

    On the host a call per image beats padding, buckets of equal length and NestedTensor; on CUDA in half precision
    variable-length flash attention, which has neither dropout nor bias, does; elsewhere images are padded to the grid.
    """
    if device.type == "cpu":
        return _attend_each
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and not dropout and not biased:
        return _attend_varlen
    return _attend_padded


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, images: int, dropout: float, bias: Tensor | None) -> Tensor:
    q, k, v = (t.view(images, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    mask = None if bias is None else bias.view(images, 1, 1, -1).to(q.dtype)
    return scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(0, 1)


def _attend_each(
    q: Tensor, k: Tensor, v: Tensor, keys: Packed, queries: Packed, dropout: float, bias: Tensor | None
) -> Tensor:
    def one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        return scaled_dot_product_attention(query, key, value, mask, dropout)[0].transpose(0, 1)

    masks = [None] * len(keys.lengths) if bias is None else bias.to(q.dtype)[None].split(keys.lengths, dim=1)
    images = zip(q.split(queries.lengths), k.split(keys.lengths), v.split(keys.lengths), masks, strict=True)
    if q.requires_grad:
        return torch.cat([one(*image) for image in images if len(image[0])])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)  # a third less memory than joining the parts
    for place, image in zip(out.split(queries.lengths), images, strict=True):
        if len(place):
            place.copy_(one(*image))
    return out


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, keys: Packed, queries: Packed, dropout: float, bias: Tensor | None
) -> Tensor:
    """The longest length only bounds the launch grid: the number of slots will do, and no length goes to the host."""
    from torch.nn.attention import varlen  # needs a CUDA build to be imported on some releases

    slots = keys.shape[1]
    out = varlen.varlen_attn(q, k, v, queries.offsets, keys.offsets, slots, slots)
    assert isinstance(out, Tensor)  # a tuple only where auxiliary outputs are asked for
    return out


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, keys: Packed, queries: Packed, dropout: float, bias: Tensor | None
) -> Tensor:
    masked = Masked(keys.x, keys.live)
    bias = None if bias is None else keys.grid(bias)
    return queries.spread(masked.attend(queries.grid(q), keys.grid(k), keys.grid(v), masked, dropout, bias))
