"""What every layout of tokens can do.

Letters: B images, N token slots, T live tokens over the batch, D channels, H heads, d channels per head.

"Token features" are tensors laid out as the layout lays out its own: (B, N, ...) masked, (T, ...) packed.
"""

from abc import ABC, abstractmethod
from typing import Self

from torch import Tensor


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
