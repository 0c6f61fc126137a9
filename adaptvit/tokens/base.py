"""What every layout of tokens can do.

Letters: B images, N token slots, T live tokens over the batch, D channels, H heads, d channels per head.

"Token features" are tensors laid out as the layout lays out its own: (B, N, ...) masked, (T, ...) packed.
"""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from adaptvit.tokens.kernels import PLAIN, AttentionOptions, add_rows


class Tokens(ABC):
    """The tokens of a batch. Immutable; every verb returns new tokens or a tensor.

    Attributes:
        x: features, laid out by the layout.
        shape: images and slots, (B, N).
        slots: of a layout that stores live tokens alone, where these stand among all; None where all slots are stored.
        where: int64 token features (...,), the slot that each token had when it was embedded, which is its position;
            a token that others were merged into stays where it was. Or floating point, (..., 1 + axes): that slot, and
            the coordinates, which merged tokens have the mean of. None while all tokens are in their first slots.
        source: what they were embedded from; whoever runs blocks on them knows what it is.
    """

    x: Tensor
    shape: tuple[int, int]
    slots: Tensor | None
    where: Tensor | None
    source: Any

    @classmethod
    @abstractmethod
    def of(cls, x: Tensor) -> Self:
        """Lay out dense (B, N, D) features; every slot is live."""

    def of_source(self, source: Any) -> Self:
        """The same tokens, embedded from `source`."""
        return replace(self, source=source)  # type: ignore[type-var]

    @property
    def at_first(self) -> Tensor | None:
        """(B, N) bool, the slots that held a token when they were embedded, as `source` says; None is all."""
        return None if self.source is None else self.source.live

    @property
    @abstractmethod
    def at(self) -> Tensor:
        """The slots of `where`, int64, whether tokens moved or not; of a layout with all slots (1 or B, N)."""

    @property
    @abstractmethod
    def in_place(self) -> bool:
        """Whether every slot has the token that was embedded there, or nobody's, so that tables by slot fit."""

    def at_coordinates(self, coordinates: Tensor, places: Tensor | None = None) -> Self:
        """The same tokens, whose positions are coordinates: (N, axes), by slots.

        Args:
            places: (N,) the slots that stand for these where there is nothing in between; None is every token's own.
        """
        if places is None:
            places = torch.arange(len(coordinates), device=coordinates.device)
        where = torch.cat([places[:, None].to(coordinates.dtype), coordinates], dim=1)
        where = self.spread(where.expand(self.shape[0], -1, -1))
        return replace(self, where=where)  # type: ignore[type-var]

    @property
    @abstractmethod
    def batch(self) -> Tensor:
        """The features as a ViT's own modules take them, (b, n, D): images of equal length, or all packed as one."""

    @abstractmethod
    def of_batch(self, t: Tensor) -> Tensor:
        """What such a module gave -> token features."""

    def refilled(self) -> Self:
        """The same tokens in their slots, and in every other one a token of 0."""
        return type(self).of(self.grid(self.x)).of_source(self.source)

    @property
    @abstractmethod
    def live(self) -> Tensor:
        """(B, N) bool, the slots that hold a token."""

    @abstractmethod
    def with_x(self, x: Tensor) -> Self:
        """The same tokens with other features."""

    @property
    def bare(self) -> Self:
        """The same tokens without features, for who asks later which they were."""
        return self.with_x(self.x.new_empty(*self.x.shape[:-1], 0))

    def select(self, chosen: Tensor | int, *others: Tensor) -> tuple[Self, list[Tensor]]:
        """Drop every token whose slot is not in `chosen`, and take `others`, token features, along.

        Args:
            chosen: (B, N) or (1, N) bool; or the first so many slots. Dead ones stay dead.
        """
        if isinstance(chosen, int):
            chosen = torch.arange(self.shape[1], device=self.x.device)[None] < chosen
        return self.filter(self.spread(chosen.expand(self.shape)), *others)

    def keep(self, chosen: Tensor | int) -> Self:
        """`select`, with nothing else."""
        return self.select(chosen)[0]

    @abstractmethod
    def filter(self, chosen: Tensor, *others: Tensor) -> tuple[Self, list[Tensor]]:
        """Drop every token that is not `chosen`, bool token features, and take `others`, token features, along."""

    @abstractmethod
    def put(self, some: Self, t: Tensor) -> Tensor:
        """Token features of what `filter` left of these tokens -> those of these, 0 where it left none."""

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
        """Keep as many tokens of every image, where they have as many: (B, n) places of `rows`, ascending.

        Those that the classifier reads are always among them.
        """

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
    def write(self, canvas: Tensor) -> Tensor:
        """A canvas (B, N, D) with the features of these tokens in their slots; dead slots keep what they have there."""

    @abstractmethod
    def stamp(self, t: Tensor, value: int) -> None:
        """Write `value` into the live slots of a (B, N) tensor, in place."""

    @abstractmethod
    def merge(self, place: Tensor, moved: Tensor, weight: Tensor, count: int | None = None) -> tuple[Self, Tensor]:
        """Replace tokens that go to one place by their weighted mean.

        Args:
            place: (B, N) int64, the slot that each live slot's token goes to; from 0 on, without gaps in an image.
            moved: (B, N) bool, tokens that join another in its place; the others have a place each.
            weight: positive token features (...,), without gradients.
            count: places, where all images have as many; None is to be found out.
        Returns:
            tokens of as many slots as the fullest image has places, or more, and the sums of the weights in them.
        """

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, queries: Self, how: AttentionOptions = PLAIN) -> Tensor:
        """Scaled dot-product attention within each image.

        Args:
            q: features (..., H, d) of the tokens `queries`, which are these tokens or some of them.
            k, v: features (..., H, d) of these tokens.
            queries: `self`, or what `self.keep(...)` gave.
            how: what is added to the logits, their scale, dropout.
        Returns:
            features (..., H, d) of `queries`; what stands in dead slots has no meaning.
        """

    def attend_batch(self, q: Tensor, k: Tensor, v: Tensor, how: AttentionOptions = PLAIN) -> Tensor:
        """`attend` of all tokens to all, of and to what a ViT's own attention has of `batch`: (b, H, n, d)."""
        q, k, v = (self.of_batch(t.transpose(1, 2)) for t in (q, k, v))
        out = self.attend(q, k, v, self, how)
        return self.with_x(out).batch.transpose(1, 2)

    @abstractmethod
    def standardise(self, t: Tensor, eps: float) -> Tensor:
        """Token features (..., D) with mean 0 and variance 1 over each image's live tokens, by channel; dead slots 0.

        Args:
            eps: added to the variance.
        """

    @abstractmethod
    def received(self, q: Tensor, k: Tensor, pairs: Tensor | None = None) -> Tensor:
        """Attention that each token receives from the image's first R slots: the mean of the softmax over live ones.

        Args:
            q: queries of these slots, (B, R, H, d), none of them dead where `rows` has none; or the `rows` of all.
            k: features (..., H, d) of these tokens.
            pairs: as in `AttentionOptions`.
        Returns:
            features (..., H) of these tokens, in float32 or wider.
        """


def merge_to_grid(
    tokens: Tokens, real: Tensor | None, place: Tensor, moved: Tensor, weight: Tensor, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`Tokens.merge` of tokens that are stored end to end, without a wait: all places of all images, held or not.

    Args:
        real: (T,) bool, the rows that hold a token; None is all.
        slots: places of an image.
    Returns:
        features (B * slots, D), `where`, and the sums of the weights, 0 where nothing went.
    """
    images = tokens.shape[0]
    total = images * slots  # one more takes what holds nothing
    goes = tokens.spread(place + slots * torch.arange(images, device=place.device)[:, None])
    if real is not None:
        goes = goes.masked_fill(~real, total)
    sums = add_rows(weight.new_zeros(total + 1), goes, weight)
    share = weight / sums.index_select(0, goes)
    if real is not None:
        share = share.masked_fill(~real, 0)

    def mean(t: Tensor) -> Tensor:
        return add_rows(t.new_zeros(total + 1, t.shape[1]), goes, t * share[:, None].to(t.dtype))[:total]

    at = tokens.at
    where = at.new_zeros(total + 1).index_copy(0, goes.masked_fill(tokens.spread(moved), total), at)[:total]
    if tokens.where is not None and tokens.where.is_floating_point():
        means = mean(tokens.where[:, 1:])
        where = torch.cat([where[:, None].to(means.dtype), means], dim=1)
    return mean(tokens.x), where, sums[:total]
