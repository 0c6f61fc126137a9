"""Multiply-accumulates of what a forward pass executed: arithmetic on counts and the sizes of the ViT, nothing else.

Counted: every matrix product and convolution, as `torch.utils.flop_counter` counts them (one MAC is two of its FLOPs).
Not counted, there or here: norms, activations, softmax, additions.
"""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Counts(Protocol):
    """What was computed, image by image and block by block: `adaptvit.Usage`, which says what each of these is."""

    @property
    def attended(self) -> Tensor: ...
    @property
    def updated(self) -> Tensor: ...
    @property
    def heads(self) -> Tensor: ...
    @property
    def attention(self) -> Tensor: ...
    @property
    def mlp(self) -> Tensor: ...
    @property
    def grid(self) -> tuple[int, ...]: ...
    @property
    def patches(self) -> Tensor | None: ...
    @property
    def executed(self) -> Tensor | None: ...
    @property
    def deciding(self) -> Tensor | None: ...


class BlockShape(NamedTuple):
    """The sizes of a block that its MACs depend on."""

    heads: int
    head_dim: int
    gated: bool
    """Attention has an output gate, one more linear map."""
    mlp_per_token: int
    """MACs of the MLP for one token."""
    mixing: int = 0
    """MACs of what stands in the place of attention, for an image with any tokens; `heads` is then 0."""
    norms_over_tokens: bool = False
    """The MLP's norm is over all tokens attended to, so that attention updates them all, whatever is kept."""
    maps: int = 0
    """MACs of attention's linear maps for one token, where all tokens attended to go through them, whichever are
    updated; 0 where queries and outputs are made of those that are updated."""
    query_dim: int = 0
    """Channels of a query in each head, where `head_dim` stands for products that are not all of as many; else 0."""
    whole: bool = False
    """All tokens attended to go through all of the block, whichever are handed on."""

    @property
    def spares_queries(self) -> bool:
        """Whether the queries of tokens that are attended to alone are left out."""
        return not (self.norms_over_tokens or self.maps or self.whole)

    @property
    def attention_width(self) -> int:
        """Channels of the queries."""
        return self.heads * self.key_dim

    @property
    def key_dim(self) -> int:
        """Channels of a query or key in each head."""
        return self.query_dim or self.head_dim


class Shape(NamedTuple):
    """The sizes of a ViT that its MACs depend on."""

    dim: int
    """Channels of a token."""
    blocks: tuple[BlockShape, ...]
    stem_per_patch: int
    """MACs of the patch embedding for one patch."""
    prefix: int
    """Class, distillation and register tokens."""
    head: int
    """MACs of the classifier for one image."""
    pool: int = 0
    """MACs of an attention pool for one image, beyond those of the next line; 0 where the ViT pools without one."""
    pool_per_patch: int = 0
    """MACs of an attention pool, or of a head on the map of patches, for one patch."""
    pool_per_pair: int = 0
    """MACs of an attention pool whose patches attend to each other, for each two, ordered, one with itself included."""
    stem: int = 0
    """MACs of the patch embedding for one image, beyond those by its patches and pairs of patches."""
    stem_per_pair: int = 0
    """MACs of a patch embedding that has softmax attention for each two patches, ordered, one with itself included."""

    @property
    def depth(self) -> int:
        """Blocks."""
        return len(self.blocks)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each block."""
        return tuple(block.heads for block in self.blocks)

    def each(self, size: str, like: Tensor) -> int | Tensor:
        """A size of the blocks, to multiply (B, L) by: the number itself where it is the same for all, else (L,)."""
        sizes = [int(getattr(block, size)) for block in self.blocks]
        return sizes[0] if len(set(sizes)) == 1 else torch.tensor(sizes, device=like.device)


def macs(usage: Counts, shape: Shape) -> Tensor:
    """MACs executed for each image: (B,) int64.

    Queries, output projection and MLP cost by the tokens updated; keys and values by the tokens attended; the two
    attention products by both; each scaled by the heads computed and nothing where a sub-layer was off; what the
    decision itself took is added. A method that knows its blocks' MACs better has recorded them.
    """
    blocks = block_macs(usage, shape) if usage.executed is None else usage.executed
    deciding = 0 if usage.deciding is None else usage.deciding
    patches = prod(usage.grid) if usage.patches is None else usage.patches
    stem = shape.stem + patches * (shape.stem_per_patch + patches * shape.stem_per_pair)
    pool = shape.pool + patches * (shape.pool_per_patch + patches * shape.pool_per_pair)
    return (blocks + deciding).sum(dim=1) + stem + pool + shape.head


def block_macs(usage: Counts, shape: Shape) -> Tensor:
    """MACs of every block for each image, (B, L), from the counts."""
    over = shape.each("norms_over_tokens", usage.attended)
    queries = usage.updated + over * (usage.attended - usage.updated)
    attention, mlp = sublayer_macs(shape, usage.heads, usage.attended, queries, usage.updated)
    return attention * usage.attention + mlp * usage.mlp


def sublayer_macs(
    shape: Shape, heads: Tensor, attended: Tensor, queries: Tensor, through: Tensor
) -> tuple[Tensor, Tensor]:
    """MACs of attention and MLP of every block for each image, (B, L) each.

    Args:
        heads: computed.
        attended: tokens attended to.
        queries: tokens that attention updates.
        through: tokens that go through the MLP.
    """
    sizes = ("head_dim", "gated", "mlp_per_token", "mixing", "maps", "whole")
    head_dim, gated, mlp, mixing, maps, whole = (shape.each(size, attended) for size in sizes)
    width = heads * head_dim
    queries, through = (count + whole * (attended - count) for count in (queries, through))
    linear = (2 + gated) * queries * shape.dim * width + 2 * attended * shape.dim * width
    linear = linear + (maps > 0 if isinstance(maps, Tensor) else bool(maps)) * (maps * attended - linear)
    return linear + 2 * queries * attended * width + mixing, through * mlp


def dense_macs(shape: Shape, grid: tuple[int, ...]) -> int:
    """MACs of timm's own forward for one image with `grid` patches: every token through every block, to the end."""
    return int(dense_macs_of(shape, torch.tensor([prod(grid)])))


def dense_macs_of(shape: Shape, patches: Tensor) -> Tensor:
    """The same for images of so many patches each: (B,) int64, of (B,)."""
    tokens = (shape.prefix + patches)[:, None].expand(-1, shape.depth)
    on = torch.ones_like(tokens, dtype=torch.bool)
    return macs(_Everything(tokens, tokens, tokens.new_tensor([shape.heads]), on, on, patches), shape)


@dataclass(frozen=True)
class _Everything:
    """The counts of a ViT that leaves nothing out."""

    attended: Tensor
    updated: Tensor
    heads: Tensor
    attention: Tensor
    mlp: Tensor
    patches: Tensor
    grid: tuple[int, ...] = ()
    executed: None = None
    deciding: None = None
