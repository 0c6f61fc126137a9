"""Merging on the grid: every row of patches gives up as many as any other, then every column. No training needed.

Gong, Lis: CubistMerge: Spatial-Preserving Token Merging For Diverse ViT Backbones, arXiv 2509.21764, 2025.

Letters: B images, N token slots (p prefix tokens first, then patches row by row), H rows, W columns, D channels.
"""

import math
from collections.abc import Set
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from adaptvit.backbones.door import Projected
from adaptvit.budget import BATCH
from adaptvit.checks import In, check_fields
from adaptvit.methods.base import DEITS, MethodConfig, Published, around_deits
from adaptvit.methods.merging import NEEDS, usage_of
from adaptvit.model import AdaptiveViT, Knob, Left, once
from adaptvit.tokens import Tokens
from adaptvit.tokens.kernels import rows_at


@dataclass(frozen=True, kw_only=True)
class GridConfig(MethodConfig):
    """Merging of neighbours (CubistMerge, 2025): what is left of the patches is a grid, of fewer rows and columns.

    Between attention and MLP every second token of a row may join the neighbour that is more like it, by the cosine of
    their keys, mean over heads; those that are most alike do, as many in every row. Then columns do the same. A token
    that others joined has in each channel the value of theirs that is farthest from 0. Prefix tokens stay as they are.

    Of a ViT whose blocks are told positions, a token is where its place in the grid that is left is when that is
    stretched over the image: of n rows in the place of H, row i is at (i + 1/2) H/n - 1/2, counted in patches. A
    relative bias, which has no rows between patches, is that of the nearest.

    Of a clip every step in time gives up as many of its rows and columns, and none is merged with another step.

    Differs: the paper gives the numbers of a few blocks; here all of them merge, evenly. A classifier that pools, pools
    for each patch the token that it is part of.
    """

    method: ClassVar[str] = "grid"
    title: ClassVar[str] = "merging on the grid"
    needs: ClassVar[Set[str]] = NEEDS
    knob: ClassVar[Knob | None] = Knob("rate", sign=-1, lowest=0.0, highest=64.0, step=0.05)
    published: ClassVar[Published] = Published(
        names=around_deits("grid", dict.fromkeys(DEITS, " whose blocks merge neighbours, so that a grid is left."))
    )

    rate: Annotated[float, In("[0, 1e9]")] = 0.3
    """The share of its rows and of its columns that the grid gives up by the end, evenly over the blocks; each at most
    halves them. A column goes half a step before its row. Above 1 nothing but a block's half is the limit."""

    def __post_init__(self) -> None:
        check_fields(self)

    def sides(self, grid: tuple[int, ...], depth: int) -> list[tuple[int, ...]]:
        """What each of `depth` blocks leaves of a grid: its steps in time, if it has these, rows and columns."""
        *steps, rows, columns = grid
        sides, left = (rows, columns), list[tuple[int, ...]]()
        for block in range(1, depth + 1):
            share = self.rate * block / depth
            gone = math.floor(sides[0] * share), math.floor(sides[1] * share + 0.5)
            rows, columns = max(sides[0] - gone[0], (rows + 1) // 2), max(sides[1] - gone[1], (columns + 1) // 2)
            left.append((*steps, rows, columns))
        return left

    def build(self, vit: nn.Module) -> "GridViT":
        """Wrap `vit`, sharing its weights; no parameter is added.

        Raises:
            TypeError: the ViT is not one that this library reproduces.
        """
        return GridViT(vit, self)

    def fit(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        if search.get("labels") is None and search.get("unit") != "images_per_s":
            images = images[:BATCH]  # all cost the same, and trials tell the speed of a batch
        return super().fit(vit, images, target, **search)


class GridViT(AdaptiveViT):
    """A ViT whose blocks merge tokens with their neighbours on the grid, between attention and MLP."""

    @property
    def even(self) -> bool:
        return True

    def run(self, tokens: Tokens) -> Left:
        tokens.source.check_alike(self.config.title)
        grid = before = tokens.source.grid
        holder = torch.arange(tokens.shape[1], device=tokens.x.device).expand(tokens.shape)
        held = [holder]  # the slot that each input token is in
        for number, sides in enumerate(self.config.sides(grid, self.depth)):
            if sides == before or self.reads_few(number):
                tokens = self.run_block(number, tokens)
            else:
                tokens, place = self.run_merging(number, tokens, before, sides)
                holder = place.gather(1, holder)
                before = sides
            held.append(holder)
        x = self.read_slots(tokens, tokens.x)
        if self.read is None:
            x = x.gather(1, holder[..., None].expand(-1, -1, x.shape[2]))
        return self.finish(x, partial(usage_of, self, held, grid))

    def run_merging(
        self, number: int, tokens: Tokens, before: tuple[int, ...], sides: tuple[int, ...]
    ) -> tuple[Tokens, Tensor]:
        """A block that leaves a grid of such sides: its tokens, and the slot where each of those before went."""
        decided = once(partial(self.joined, tokens, before, sides))

        def look(projected: Projected) -> None:
            decided(projected.k)

        def merge(tokens: Tokens) -> Tokens:
            return self.merge(tokens, before, sides, *decided())

        after = self.run_block(number, tokens, look=look, between=merge)
        rows, columns = decided()
        row = columns.place.mT.gather(-1, rows.place)
        place = row * sides[-1] + rows.place
        if len(sides) > 2:
            place = place + sides[-2] * sides[-1] * torch.arange(sides[0], device=place.device)[:, None, None]
        place = self.prefix + place.flatten(1)
        prefix = torch.arange(self.prefix, device=place.device).expand(place.shape[0], -1)
        return after, torch.cat([prefix, place], dim=1)

    def joined(
        self, tokens: Tokens, before: tuple[int, ...], sides: tuple[int, ...], keys: Tensor
    ) -> tuple["Joined", "Joined"]:
        """Who joins whom along rows, and then along columns, so that a grid of such sides is left."""
        metric = tokens.grid(keys.mean(dim=-2, dtype=torch.promote_types(keys.dtype, torch.float32)))
        metric = metric[:, self.prefix :].unflatten(1, before)
        rows = neighbours(metric, before[-1] - sides[-1])
        return rows, neighbours(join(metric, rows).transpose(-3, -2), before[-2] - sides[-2])

    def merge(
        self, tokens: Tokens, before: tuple[int, ...], sides: tuple[int, ...], rows: "Joined", columns: "Joined"
    ) -> Tokens:
        """What is left of tokens of one grid: those of one of such sides, stretched over the image."""
        x, source = tokens.grid(tokens.x), tokens.source
        patches = x[:, self.prefix :].unflatten(1, before)
        patches = join(join(patches, rows).transpose(-3, -2), columns).transpose(-3, -2)
        merged = type(tokens).of(torch.cat([x[:, : self.prefix], patches.flatten(1, -2)], dim=1)).of_source(source)
        at = source.coordinates(x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32)), sides)
        nearest = at.round().long()
        slots = nearest[:, 0]
        for axis, side in enumerate(source.grid[1:], 1):
            slots = slots * side + nearest[:, axis]
        slots = slots + self.prefix
        slots[: self.prefix] = torch.arange(self.prefix, device=x.device)
        return merged.at_coordinates(at, slots)


class Joined(NamedTuple):
    """What becomes of lines of W tokens: every second may join the one before or behind it."""

    back: Tensor
    """(..., W // 2) bool, of every second, whether it joins the one before it."""
    ahead: Tensor
    """(..., W // 2) bool, whether it joins the one behind it."""
    left: Tensor
    """(..., w) int64, the tokens that are left, in order."""
    place: Tensor
    """(..., W) int64, the place among these where each token goes."""


def neighbours(x: Tensor, count: int) -> Joined:
    """The `count` of every second token, at most all, that are most like a neighbour: of lines (..., W, D)."""
    unit = normalize(x, dim=-1)
    alike = (unit[..., 1:, :] * unit[..., :-1, :]).sum(dim=-1)
    before, behind = alike[..., ::2], pad(alike[..., 1::2], (0, 1 - x.shape[-2] % 2), value=-torch.inf)
    leaves = torch.zeros_like(before, dtype=torch.bool)
    leaves = leaves.scatter(-1, torch.maximum(before, behind).topk(count, dim=-1).indices, True)
    back, ahead = leaves & ~(behind > before), leaves & (behind > before)
    stays = torch.ones_like(x[..., 0], dtype=torch.bool)
    stays[..., 1::2] = ~leaves
    place = stays.cumsum(dim=-1) - 1
    number, rest = torch.arange(x.shape[-2], device=x.device).expand_as(place), x.shape[-2] - count
    goes = place.masked_fill(~stays, rest)  # a place of its own for those that go
    left = place.new_zeros(*place.shape[:-1], rest + 1).scatter(-1, goes, number)[..., :rest]
    place[..., 1::2] += ahead
    return Joined(back, ahead, left, place)


def join(x: Tensor, joined: Joined) -> Tensor:
    """Lines (..., W, D) -> what is left of them, (..., w, D): of those that join, the larger value of each channel."""
    if joined.left.shape[-1] == x.shape[-2]:
        return x
    first, second = x[..., ::2, :], x[..., 1::2, :]
    odd = x.shape[-2] % 2
    for some, sides in ((joined.back, (0, odd)), (joined.ahead, (1, odd - 1))):
        others, some = pad(second, (0, 0, *sides)), pad(some, sides)[..., None]
        first = torch.where((others.detach().abs() > first.detach().abs()) & some, others, first)
    return rows_at(torch.cat([first, second], dim=-2), joined.left // 2 + joined.left % 2 * first.shape[-2])
