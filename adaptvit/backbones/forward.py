"""A ViT's own forward, with something else in the place of its blocks.

    run      images -> tokens as the first block receives them -> what is left of them -> the ViT's own norm, pool, head
    embedded images -> tokens as the first block receives them, and whatever is made of them
    enter    the first half of it

Letters: B images, N token slots (prefix tokens first, then P patches), R slots that are read, D channels.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from inspect import signature
from math import prod
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from adaptvit.backbones.base import (
    Placed,
    check_images,
    family_of,
    patch_grid,
    pieces_of,
    placed,
    prefix_tokens,
    read_slots,
)
from adaptvit.backbones.door import OfLive
from adaptvit.backbones.families import Family, Table, find, get, value_of
from adaptvit.backbones.standin import stand_in, with_parts
from adaptvit.tokens import Tokens

T = TypeVar("T")


@dataclass(eq=False)
class Canvas:
    """What every slot last had: of a token that is gone, what it was when it went."""

    blocks: Set[int]
    """Those after which it is kept, in `after`."""
    x: Tensor = field(init=False)
    """(B, N, D); to begin with, as the first block receives tokens."""
    after: dict[int, Tensor] = field(default_factory=dict)

    def note(self, number: int, tokens: Tokens, live: Tensor | None = None) -> None:
        """Write what block `number` left.

        Args:
            live: (B, N) bool, the slots whose token is still there, where the layout does not know it; None is all.
        """
        images, slots = tokens.shape
        before = self.x if self.x.shape[1] == slots else self.x.new_zeros(images, slots, self.x.shape[2])  # merged
        before = before.to(tokens.x.dtype)
        x = tokens.write(before)
        self.x = x if live is None else torch.where(live[..., None], x, before)
        if number in self.blocks:
            self.after[number] = self.x.clone()  # a block under gates overwrites what it reads


@dataclass(eq=False)
class Source:
    """What tokens were embedded from, and what the ViT tells its blocks beside features."""

    family: Family
    images: Any
    grid: tuple[int, ...]
    """Rows and columns of patches."""
    prefix: int
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    """Arguments of each block after the features."""
    blocks: Sequence[Placed]
    live: Tensor | None = None
    """(B, N) bool, of images in pieces the slots that hold a token at first; else None, which is all."""
    rows: Tensor | None = None
    """Numbers of the images, of those that blocks are told of; None is all."""
    plan: Sequence[int] | None = None
    """Rows that `Slab` leaves whenever it drops tokens."""
    left: list[tuple[Tensor, int]] = field(default_factory=list)
    """What `Slab` left: where its tokens are, and the rows there were."""
    canvas: Canvas | None = None
    """Where blocks write what they leave, if somebody wants it."""
    _found: dict[str, tuple[Tensor, Any, Any]] = field(default_factory=dict)

    def told(self, number: int) -> dict[str, Any]:
        """What block `number` is called with beside features, by name."""
        args, kwargs = self.calls[number]
        names = argument_names(type(self.blocks[number].core).forward)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        if self.rows is None:
            return given
        tables = self.family.tables.items()
        return given | {name: self._of_rows(kind, given[name]) for name, kind in tables if name in given}

    def wants(self, number: int) -> bool:
        """Whether somebody wants what block `number` leaves in every slot."""
        return self.canvas is not None and number in self.canvas.blocks

    def of_images(self, rows: Tensor) -> "Source":
        """That of some of the images, by their numbers among these: what blocks are told of them."""
        live = None if self.live is None else self.live[rows]
        return replace(self, rows=rows if self.rows is None else self.rows[rows], live=live, _found={})

    def _of_rows(self, kind: Table, table: Any) -> Any:
        if isinstance(table, tuple):
            return tuple(self._of_rows(kind, one) for one in table)
        of_each_image = table is not None and table.ndim == (3 if kind == "each" else 4) and len(table) > 1
        return table[self.rows] if of_each_image else table

    def laid(self, x: Tensor, layout: type[Tokens]) -> Tokens:
        """Tokens of (B, N, D) features as the first block receives them."""
        tokens = layout.of(x).of_source(self)
        return tokens if self.live is None else tokens.keep(self.live)

    @property
    def own(self) -> Tensor | None:
        """(B, 1) int64, the patches that each image has; None where all have as many as there are slots for."""
        return None if self.live is None else self.live.sum(dim=1, keepdim=True) - self.prefix

    def check_alike(self, who: str) -> None:
        """Refuse images in pieces, of different shapes.

        Raises:
            NotImplementedError: they are.
        """
        if self.live is not None:
            raise NotImplementedError(f"{who} takes images of one shape, and not in pieces")

    def tables(self, given: dict[str, Any], tokens: Tokens) -> dict[str, Any]:
        """Those of a block's arguments that are tables of positions, with a row for each token of `tokens.batch`."""
        kinds = {
            name: kind
            for name, kind in self.family.tables.items()
            if given.get(name) is not None or (kind == "places" and name in given)
        }
        if not kinds or tokens.in_place:
            return {}
        return {name: self._rows(name, kind, given[name], tokens) for name, kind in kinds.items()}

    def _rows(self, name: str, kind: Table, table: Any, tokens: Tokens) -> Any:
        places = tokens.slots if tokens.where is None else tokens.where
        assert places is not None
        known = self._found.get(name)
        if known is None or known[0] is not places or known[1] is not table:
            known = self._found[name] = (places, table, self._look_up(kind, table, tokens))
        return known[2]

    def _look_up(self, kind: Table, table: Any, tokens: Tokens) -> Any:
        at = tokens.at.flatten()
        images, length = tokens.batch.shape[:2]
        if kind == "places":
            return (at - self.prefix).view(-1, length).expand(images, -1)
        image = (
            tokens.spread(torch.arange(tokens.shape[0], device=at.device)[:, None]).expand(tokens.at.shape).flatten()
        )

        def rows(one: Tensor, missing: tuple[float, ...]) -> Tensor:
            """(b, H or 1, n, ...) of a table (P or N, ...), (H, P or N, ...) or (B, H, P or N, ...)."""
            one = one.view(*[1] * (4 - one.ndim), *one.shape)
            if one.shape[2] == self.patches:
                parts = [
                    one.new_full((*one.shape[:2], self.prefix, part.shape[-1]), value)
                    for part, value in zip(one.chunk(len(missing), -1), missing, strict=True)
                ]
                one = torch.cat([torch.cat(parts, dim=-1), one], dim=2)
            place = at if one.shape[0] == 1 else image * one.shape[2] + at
            found = one.transpose(0, 1).flatten(1, 2).index_select(1, place)
            return found.view(found.shape[0], images, length, -1).transpose(0, 1)

        where = tokens.where
        if where is not None and where.is_floating_point() and kind != "each":
            sin, cos = table.chunk(2, -1) if kind == "sin cos" else reversed(table)
            sin, cos = turned_at(sin, cos, where[..., 1:].flatten(0, -2), self.grid)
            sin, cos = (t.view(*t.shape[:-2], images, length, t.shape[-1]) for t in (sin, cos))
            if sin.ndim == 4:
                sin, cos = sin.transpose(0, 1), cos.transpose(0, 1)
            else:
                sin, cos = sin[:, None], cos[:, None]
            return torch.cat([sin, cos], dim=-1) if kind == "sin cos" else (cos, sin)
        if kind == "sin cos":
            return rows(table, (0.0, 1.0))
        if kind == "cos, sin":
            return rows(table[0], (1.0,)), rows(table[1], (0.0,))
        return rows(table[:, None], (0.0,))[:, 0]

    def coordinates(self, like: Tensor, sides: tuple[int, ...] | None = None) -> Tensor:
        """Row, column and whatever the grid has beside of each slot, (N, axes); -1 of tokens before the patches.

        Args:
            sides: of another grid, which is stretched over the image; None is that of the patches.
        """
        self.check_alike('position="mean"')
        axes = [
            (torch.arange(side, device=like.device, dtype=like.dtype) + 0.5) * (whole / side) - 0.5
            for side, whole in zip(sides or self.grid, self.grid, strict=True)
        ]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
        return torch.cat([places.new_full((self.prefix, len(self.grid)), -1), places])

    @property
    def patches(self) -> int:
        return prod(self.grid)


def turned_at(sin: Tensor, cos: Tensor, places: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Sines and cosines between those of a grid of patches, whose angles are linear in their coordinates.

    Args:
        sin, cos: ([H,] P, d), as tables have them, whose angles grow by less than half a turn from patch to patch.
        places: (T, axes), coordinates in patches; below 0 of tokens that are not turned.
    Returns:
        ([H,] T, d) each.
    """
    angle = torch.atan2(sin, cos).unflatten(-2, grid)
    first = angle.ndim - 1 - len(grid)
    base = [places[:, axis].floor().clamp(0, max(0, side - 2)).long() for axis, side in enumerate(grid)]
    index = (slice(None),) * first + tuple(base)
    found = angle[index]
    for axis, side in enumerate(grid):
        if side > 1:
            step = angle.narrow(first + axis, 1, side - 1) - angle.narrow(first + axis, 0, side - 1)
            step = torch.atan2(step.sin(), step.cos())
            found = found + step[(slice(None),) * first + tuple(base)] * (places[:, axis] - base[axis])[:, None]
    found = found.masked_fill((places < 0).all(dim=1)[:, None], 0)
    return found.sin(), found.cos()


@cache
def argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """What a module's forward takes, by name."""
    return tuple(signature(forward).parameters)[1:]


Inside = Callable[[Tensor, Source], tuple[Tensor, Tensor | None]]
"""What stands for the blocks: (B, N, D) as the first of them receives it -> (B, R, D) as the last leaves it, and which
of these slots hold a token, (B, R) bool; None is all."""


GoOn = Callable[[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]], Any]


class _Blocks(nn.Module):
    """Stands for every block: notes what they are called with, and goes on from the last one."""

    def __init__(self, count: int, go_on: GoOn, tuples: bool) -> None:
        super().__init__()
        self.count, self.go_on, self.tuples = count, go_on, tuples
        self.calls: list[Any] = []

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        out = x if len(self.calls) < self.count else self.go_on(x, self.calls)
        return (out, None) if self.tuples else out


def run(vit: nn.Module, images: Any, inside: Inside) -> Any:
    """A ViT's own forward, with `inside` in the place of its blocks: what the ViT returns.

    An image that is not finite has no finite token, so that whatever a method leaves out of it, its logits are NaN.
    Where the ViT pools all tokens it pools those that are there.

    Raises:
        ValueError: the images' shape or device does not fit the model.
        TypeError: the images are not floating point, or of another precision than the weights.
    """
    check_images(vit, images)
    family, reads, pieces = family_of(vit), read_slots(vit), pieces_of(vit, images)
    blocks = get(vit, family.blocks)
    held: list[Tensor] = []

    def go_on(x: Tensor, calls: list[Any]) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise TypeError("has blocks that take something else than tokens (batch, tokens, channels)")
        places = [placed(block) for block in blocks]
        source = Source(family, images, patch_grid(vit, images), prefix_tokens(vit), calls, places)
        if pieces is not None:
            source.live = pad(images[pieces.valid].bool(), (source.prefix, 0), value=True)
            source.calls = _without(pieces.mask, blocks, calls)
            x = x.masked_fill(~source.live[..., None], 0)
        spoilt = 0 * x.sum(dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))  # 0, or NaN
        slots = x.shape[1]
        x, live = inside(x + spoilt.to(x.dtype), source)
        if family.needs_grid and x.shape[1] < slots:
            live = x.new_ones(x.shape[:2], dtype=torch.bool) if live is None else live
            x, live = (pad(t, (*[0] * (2 * t.ndim - 4), 0, slots - t.shape[1])) for t in (x, live))
        if live is not None:
            held.append(live)
            if reads is None:
                x = _fill(x, live, _pooled_from(vit))
        return x

    stood = with_blocks(vit, family, go_on, {} if reads is not None else _pooling(vit, family, held))
    if pieces is None:
        return stood(images, **family.told)
    return stood(**images, **family.told) if pieces.alone else stood(dict(images), **family.told)


def with_blocks(vit: nn.Module, family: Family, go_on: GoOn, parts: Mapping[str, Any] | None = None) -> Any:
    """A stand-in of a ViT, with something else in the place of its blocks, and of other parts by their names.

    Args:
        go_on: what the first block receives, and the arguments of each after it -> what the last leaves.
    """
    blocks = get(vit, family.blocks)
    stand = _Blocks(len(blocks), go_on, family.tuples)
    others = {family.blocks: stand_in(blocks, _modules=dict.fromkeys(blocks._modules, stand)), **(parts or {})}
    inside_blocks = family.checkpointing.startswith(f"{family.blocks}.")
    if not inside_blocks and find(vit, family.checkpointing) is True:  # which blocks are by themselves
        others[family.checkpointing] = False
    return with_parts(vit, others)


def _without(mask: str, blocks: Any, calls: list[Any]) -> list[Any]:
    """The calls of blocks without a mask that hides slots."""
    found = []
    for block, (args, kwargs) in zip(blocks, calls, strict=True):
        names = argument_names(type(placed(block).core).forward)[1:]
        found.append(((), dict(zip(names, args, strict=False)) | kwargs | {mask: None}))
    return found


def _pooling(vit: nn.Module, family: Family, held: list[Tensor]) -> dict[str, nn.Module]:
    """What stands for norm and pool, so that slots without a token have no part in what is pooled."""
    parts: dict[str, nn.Module] = {}
    pool, norm = find(vit, family.pool), find(vit, family.norm)
    if pool is not None:

        def of_live(pool: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            with OfLive(held.pop()[:, -x.shape[1] :]) if held else nullcontext():  # and what it gives is alive
                return type(pool).forward(pool, x, *args, **kwargs)

        parts[str(family.pool)] = stand_in(pool, of_live)
    if norm is not None:

        def filled(norm: nn.Module, x: Tensor) -> Tensor:
            x = type(norm).forward(norm, x)
            return _fill(x, held[0], _pooled_from(vit)) if held and x.ndim == 3 else x

        parts[str(family.norm)] = stand_in(norm, filled)
    return parts


def _pooled_from(vit: nn.Module) -> int:
    """The first slot that is averaged, where all are."""
    return 0 if value_of(vit, family_of(vit).pools_prefix) else prefix_tokens(vit)


def _fill(x: Tensor, live: Tensor, start: int) -> Tensor:
    """The mean of the live slots from `start` on in dead ones, where it moves neither mean nor maximum."""
    alive = live[:, start:, None]
    mean = (x[:, start:] * alive).sum(dim=1, keepdim=True) / alive.sum(dim=1, keepdim=True)
    return torch.where(live[..., None], x, mean)


def scores(given: Any) -> tuple[Tensor, Tensor | None]:
    """Of what a ViT returned the logits, or features where it has no classes; and those of a distillation head."""
    if isinstance(given, tuple):
        return given
    for name in ("logits", "image_embeds", "pooler_output", "last_hidden_state"):
        if (found := getattr(given, name, None)) is not None:
            return found, None
    return given, None


class _Enough(Exception):
    """What is wanted of a forward is there."""


def embedded(vit: nn.Module, images: Any, inside: Callable[[Tensor, Source], T]) -> T:
    """What `inside` makes of what the first block receives; norm, pool and head are left out. Raises as `run`."""
    made: list[T] = []

    def enough(x: Tensor, source: Source) -> NoReturn:
        made.append(inside(x, source))
        raise _Enough

    with suppress(_Enough):
        run(vit, images, enough)
    return made[0]


def enter(vit: nn.Module, images: Any, layout: type[Tokens]) -> Tokens:
    """Images -> tokens, as the first block receives them; raises as `run`."""
    return embedded(vit, images, lambda x, source: source.laid(x, layout))


def final_norm(vit: nn.Module, x: Tensor) -> Tensor:
    """What the ViT makes of features (..., D) of its last block before it pools them."""
    name = family_of(vit).norm
    return x if name is None else get(vit, name)(x)
