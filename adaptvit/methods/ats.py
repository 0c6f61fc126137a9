"""ATS: patches sampled by how much the class token attends to them; no parameters, and no training needed.

Fayyaz, Abbasi Koohpayegani, Rezaei Jafari, Sengupta, Vaezi Joze, Sommerlade, Pirsiavash, Gall: Adaptive Token Sampling
for Efficient Vision Transformers, ECCV 2022.

Letters: B images, N token slots (prefix tokens first, then P patches), L blocks, H heads, K sampling points.
Symbols of the paper: A attention, V values, S significance score.
"""

import hashlib
import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal, TypeGuard

import torch
from torch import Tensor, nn

from adaptvit.backbones.base import model_name, patch_grid
from adaptvit.backbones.door import Look, Projected, attention_received
from adaptvit.checks import Ascending, In, check_fields
from adaptvit.methods.base import DEITS, MethodConfig, Published, Role, around_deits
from adaptvit.model import AdaptiveViT, Knob, Left, once
from adaptvit.process import widest
from adaptvit.tokens import Slab, Tokens, fused, kernels
from adaptvit.usage import Usage

MOST_POINTS = 65536
"""Sampling points of an image, where a sampler handles them one by one."""


@dataclass(frozen=True, kw_only=True)
class ATSConfig(MethodConfig):
    """Adaptive token sampling (Fayyaz et al., ECCV 2022).

    A block that samples scores its patches by the attention they receive times the size of their values, and hands on
    those that K sampling points of the scores' distribution fall on: few where few patches hold most of the score. All
    patches are still attended to in that block. The kept ones stay in slot order, which is raster order.
    """

    method: ClassVar[str] = "ats"
    title: ClassVar[str] = "ATS"
    needs: ClassVar[Set[str]] = frozenset({"attention"})
    knob: ClassVar[Knob | None] = Knob("rate", sign=1, lowest=0.0, highest=64.0, step=0.05)
    published: ClassVar[Published] = Published(
        names=around_deits("ats", dict.fromkeys(DEITS, " whose blocks from the fourth on sample their patches."))
    )

    blocks: Annotated[Sequence[int] | None, Ascending()] = None
    """The blocks that sample, 0-based; None is all but the first quarter, 3 to 11 of 12 as released."""
    tokens: Annotated[int | Sequence[int] | None, In("[1, 65536]", hint="rate=0.5 takes half of them")] = None
    """K, the sampling points: a number for all these blocks, or one for each, not growing. None is the number of
    patches, as released. An image keeps at most K patches."""
    rate: Annotated[float, In("[0, 1e9]")] = 1.0
    """K is taken times this: the one number by which a model is steered to a budget."""
    sampler: Literal["inverse_transform", "gumbel"] = "inverse_transform"
    """`inverse_transform`: the K midpoint quantiles of the scores (the paper). `gumbel`: K draws with replacement in
    training, and where a generator is given; otherwise the quantiles, so that evaluation repeats."""

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.tokens, Sequence) and list(self.tokens) != sorted(self.tokens, reverse=True):
            raise ValueError(f"{type(self).__name__}.tokens must not grow from block to block, got {self.tokens}")

    def schedule(self, blocks: int) -> tuple[int | None, ...]:
        """K of so many sampling blocks; a schedule is returned as it is."""
        return (self.tokens,) * blocks if self.tokens is None or isinstance(self.tokens, int) else tuple(self.tokens)

    def build(self, vit: nn.Module) -> "ATS":
        """Wrap `vit`, sharing its weights; no parameter is added.

        Raises:
            TypeError: the ViT is not one that this library reproduces, or has no attention.
            ValueError: `blocks` names a block that the ViT lacks, or `tokens` has another length than `blocks`.
        """
        return ATS(vit, self)


class ATS(AdaptiveViT):
    """A ViT whose blocks sample their patches.

    Attributes:
        points: K of each block that samples, by block number; None stands for the number of patches. The last block of
            a ViT whose classifier reads a class token is left out.
    """

    def __init__(self, vit: nn.Module, config: ATSConfig) -> None:
        super().__init__(vit, config)
        own = type(config).__name__
        blocks = tuple(range(self.depth // 4, self.depth)) if config.blocks is None else tuple(config.blocks)
        beyond = [block for block in blocks if block >= self.depth]
        if beyond:
            name = model_name(vit)
            raise ValueError(f"{own}.blocks names block {beyond[0]}, but {name} has blocks 0..{self.depth - 1}")
        counts = config.schedule(len(blocks))
        if len(counts) != len(blocks):
            raise ValueError(f"{own}.tokens has {len(counts)} numbers for {len(blocks)} blocks: {blocks}")
        self.points: dict[int, int | None] = dict(zip(blocks, counts, strict=True))
        if self.read is not None:
            self.points.pop(self.depth - 1, None)  # nothing would read what it keeps
        if not self.points:
            raise ValueError(f"{own}.blocks={blocks} is the last block only, of which just the class token is read")
        for block in self.points:
            self.sampling_points(block, math.prod(patch_grid(vit)))

    def run(self, tokens: Tokens, generator: torch.Generator | None = None) -> Left:
        """The blocks.

        Args:
            generator: for the draws of `gumbel`; in training None is torch's own.
        """
        grid, live, soundness = tokens.source.grid, [tokens.live], list[Tensor]()
        order = self.order(tokens)
        for number in range(self.depth):
            if number in self.points:
                points = self.points_of(number, tokens.source.own)
                decided = once(partial(self.decide, tokens, live[-1], number, points, generator, order))
                tokens = self.run_block(number, tokens, look=_chosen(decided))
                chosen, finite = decided()
                live.append(chosen)
                soundness.append(finite)
            else:
                tokens = self.run_block(number, tokens)
                live.append(tokens.live if self.reads_few(number) else live[-1])
        usage = partial(self.usage, live, grid)
        sound = torch.stack(soundness).all(dim=0)
        return self.finish(self.read_slots(tokens, tokens.x), usage, live[-1], sound=sound)

    def usage(self, live: list[Tensor], grid: tuple[int, ...]) -> Usage:
        """The record, from the slots that held a token on entry to each block, and after the last: (B, N) bool."""
        held = torch.stack(live, dim=1)
        return Usage.of_live(held, self.heads, grid, self.prefix, self.deciding(held.sum(dim=2)))

    def decide(
        self,
        tokens: Tokens,
        live: Tensor,
        block: int,
        points: Tensor | None,
        generator: torch.Generator | None,
        order: Tensor | None,
        projected: Projected,
    ) -> tuple[Tensor, Tensor]:
        """The slots that a block hands on, (B, N) bool, and which images could be decided on, (B, 1) bool."""
        if type(self) is ATS and points is None and not self.draws and self._is_fused(tokens, projected):
            received, n = attention_received(tokens, projected, self.read), tokens.shape[1]
            count = self.sampling_points(block, n - self.prefix)
            found: tuple[Tensor, Tensor] = fused.sample(
                received, projected.v, tokens.slots, tokens.offsets, n, self.prefix, count
            )
            return found
        score = self.score(tokens, projected, live)
        finite = score.isfinite().all(dim=1, keepdim=True)
        alike = normalise(torch.zeros_like(score), live[:, self.prefix :])
        return self.sample(score.where(finite, alike), live, block, generator, order, points), finite

    def _is_fused(self, tokens: Tokens, projected: Projected) -> TypeGuard[Slab]:
        """Whether a device samples in a kernel."""
        return isinstance(tokens, Slab) and kernels.fuses(projected.q, projected.v)

    def score(self, tokens: Tokens, projected: Projected, live: Tensor) -> Tensor:
        """S of the patches: (B, P), 0 where dead, each row summing to 1.

        Source: ATS, equation 3. The queries are the tokens that the classifier reads, their mean where a distillation
        token is another; of a ViT that pools its tokens they are all, so that S goes by the mean attention received.
        """
        attention = attention_received(tokens, projected, self.read)
        size = projected.v.norm(dim=-1, dtype=attention.dtype)
        return normalise(tokens.grid(self.significance(attention, size))[:, self.prefix :], live[:, self.prefix :])

    def significance(self, attention: Tensor, size: Tensor) -> Tensor:
        """S before it is normalised, token features, from attention received and the values' norms, (..., H) each."""
        return (attention * size).sum(dim=-1)

    def order(self, tokens: Tokens) -> Tensor | None:
        """(B, P) int64, where patches are not chosen by their scores: the order in which they are; else None."""
        return None

    def sample(
        self,
        score: Tensor,
        live: Tensor,
        block: int,
        generator: torch.Generator | None = None,
        order: Tensor | None = None,
        points: Tensor | None = None,
    ) -> Tensor:
        """The slots that block number `block` hands on: (B, N) bool; `points` are what `points_of` gives."""
        count = self.sampling_points(block, score.shape[1]) if points is None else points
        chosen = self.choose(score, live[:, self.prefix :], count, generator, order)
        return torch.cat([live[:, : self.prefix], chosen], dim=1)

    def choose(
        self,
        score: Tensor,
        live: Tensor,
        points: float | Tensor,
        generator: torch.Generator | None,
        order: Tensor | None,
    ) -> Tensor:
        """The patches that K = `points` sampling points choose: (B, P) bool, of scores and live patches (B, P)."""
        if self.draws and (self.training or generator is not None):
            assert not isinstance(points, Tensor)  # `points_of` refuses them
            return draw(score, gumbel_noise((len(score), round(points), score.shape[1]), score, generator))
        return inverse_transform(score, points)

    @property
    def draws(self) -> bool:
        """Whether sampling points are handled one by one, so that there may not be too many."""
        return self.config.sampler == "gumbel"

    def sampling_points(self, block: int, patches: int) -> float:
        """K of a block that samples, for images of so many patches.

        Raises:
            ValueError: more than a sampler can hold that draws each by itself.
        """
        points, config = max(1.0, self.config.rate * (self.points[block] or patches)), self.config
        if self.draws and points > MOST_POINTS:
            raise ValueError(
                f"{type(config).__name__}.rate times tokens is at most {MOST_POINTS} where each point counts by "
                f"itself, got {points:g}"
            )
        return points

    def points_of(self, block: int, patches: Tensor | None) -> Tensor | None:
        """K of each image, (B, 1), where they have different numbers of patches, (B, 1); else None.

        Raises:
            NotImplementedError: a sampler that draws each point by itself.
        """
        if patches is None:
            return None
        if self.draws:
            raise NotImplementedError(f"{self.config.title}, drawing points one by one, takes images of one shape")
        counts = [[self.sampling_points(block, count)] for count in patches.flatten().tolist()]
        return torch.tensor(counts, dtype=widest(patches.device), device=patches.device)

    def deciding(self, held: Tensor) -> Tensor:
        """MACs of the queries that were dropped and of scoring, (B, L), from the tokens before and after each block."""
        shape, before, after = self.shape, held[:, :-1], held[:, 1:]
        scoring = before if self.read is None else self.read
        dropped = (before - after) * shape.each("spares_queries", held)
        cost = (dropped * shape.dim + scoring * before) * shape.each("attention_width", held)
        return cost * held.new_tensor([block in self.points for block in range(self.depth)])


def _chosen(decided: Callable[..., tuple[Tensor, Tensor]]) -> Look:
    return lambda projected: decided(projected)[0]


@dataclass(frozen=True, kw_only=True)
class RandomConfig(ATSConfig):
    """As many patches as ATS, but any of them: what the choice of patches is worth beside their number."""

    method: ClassVar[str] = "random"
    title: ClassVar[str] = "random patches"
    role: ClassVar[Role] = "control"

    def build(self, vit: nn.Module) -> "RandomATS":
        """Wrap `vit`, sharing its weights; no parameter is added."""
        return RandomATS(vit, self)


class RandomATS(ATS):
    """A ViT that loses as many patches as ATS takes, but any; an image loses the same ones whenever it comes."""

    def order(self, tokens: Tokens) -> Tensor:
        tokens.source.check_alike(f"{self.config.title}, whose order goes by all pixels,")
        return random_order(tokens.source.images, tokens.shape[1] - self.prefix)

    def choose(
        self,
        score: Tensor,
        live: Tensor,
        points: float | Tensor,
        generator: torch.Generator | None,
        order: Tensor | None,
    ) -> Tensor:
        assert order is not None
        count = super().choose(score, live, points, generator, order).sum(dim=1, keepdim=True)
        return order.masked_fill(~live, order.shape[1]).argsort(dim=1).argsort(dim=1) < count


def normalise(score: Tensor, live: Tensor) -> Tensor:
    """Rows of (B, P) that sum to 1; all live patches alike where none has a score."""
    score = torch.where(score.sum(dim=1, keepdim=True) == 0, live.to(score.dtype), score)
    return score / score.sum(dim=1, keepdim=True)


def inverse_transform(score: Tensor, points: float | Tensor) -> Tensor:
    """Mark the patches that evenly spaced quantiles of the scores fall on, each once.

    A patch is marked for certain where its score is above 1 / `points`; of those below, about one in 1 / (score x
    `points`), spread over the image because the scores are added up in slot order.

    Args:
        score: (B, P), each row non-negative and summing to 1; dead patches hold 0.
        points: K, at least 1, or (B, 1) of each image; quantiles are (i + 1/2) / K below 1. Need not be whole.
    Returns:
        (B, P) bool, between 1 and K, rounded, true per row.
    Source: ATS, section 3.2. Differs: the patch that a quantile falls in; the released code takes, of the sorted ones,
        that of the nearest cumulative score.
    """
    below = (score.cumsum(dim=1) * points + 0.5).floor_()  # how many quantiles the cumulative score has passed
    most = (points - 0.5).ceil() if isinstance(points, Tensor) else math.ceil(points - 0.5)
    below.clamp_(max=most)  # of which there are so many: rounding errors make no more
    return below.diff(dim=1, prepend=torch.zeros_like(below[:, :1])) > 0


def draw(score: Tensor, noise: Tensor) -> Tensor:
    """Mark the patches drawn from the scores, with replacement, by the Gumbel-max trick.

    Args:
        score: (B, P), each row non-negative and summing to 1; dead patches hold 0.
        noise: (B, K, P) standard Gumbel.
    Returns:
        (B, P) bool, between 1 and K true per row.
    """
    logits = (score + 1e-6).log().masked_fill(score == 0, -torch.inf)
    drawn = (logits[:, None] + noise).argmax(dim=2)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, drawn, True)


def gumbel_noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise on the device and in the precision of `like`."""
    return -torch.empty(shape, dtype=like.dtype, device=like.device).exponential_(generator=generator).log()


def random_order(images: Tensor, patches: int) -> Tensor:
    """The place of each patch in an order drawn for each image, (B, P) int64: by its own pixels, not by its batch."""
    order = torch.empty(len(images), patches, dtype=torch.long)
    pixels = images.detach().cpu().flatten(1).contiguous().view(torch.uint8).numpy()
    for row, bytes_ in zip(order, pixels, strict=True):
        seed = int.from_bytes(hashlib.blake2b(bytes_, digest_size=8).digest(), "big")
        torch.randperm(patches, generator=torch.Generator().manual_seed(seed), out=row)
    return order.to(images.device)
