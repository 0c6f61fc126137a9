"""A block of which only parts run: its sub-layers, heads and tokens switched on and off by gates.

`Masked` computes everything and multiplies by the gates, which is the definition and passes their gradients. `Packed`
computes what is on and nothing else. `Slab` computes the sub-layers and tokens that are on, in as many rows as are
planned for attention and for the MLP, and multiplies by the gates of heads: it waits for nobody.

Letters: B images, N token slots, T tokens of a part of the batch, D channels, H heads, d channels per head, F hidden
channels of the MLP.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from itertools import cycle, pairwise
from operator import and_
from typing import Any, Literal

import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from adaptvit.backbones.base import cores, family_of, model_name
from adaptvit.backbones.door import Acts, Projected
from adaptvit.backbones.families import FAMILIES, Parts, get
from adaptvit.backbones.fast import MLP_ROWS, drops_paths, has_maps, is_watched, on_tokens, project_normed, through
from adaptvit.backbones.maps import is_plain, of_nothing, some_inputs, some_outputs
from adaptvit.backbones.split import attention, chain
from adaptvit.backbones.standin import stand_in, with_parts
from adaptvit.macs import Shape
from adaptvit.tokens import AttentionOptions, Masked, Packed, Slab, Tokens

Takes = Literal["input", "hidden", "identity"]
"""What else a head that is off switches off: `input`, its channels of what the MLP reads; `hidden`, its share of the
MLP's hidden channels. With `identity` its attention matrix becomes the identity and nothing else changes."""

Runs = tuple[tuple[int, int], ...]
"""Heads that are on, as ranges (first, one past the last)."""


@dataclass(frozen=True, eq=False)
class Gates:
    """What of a block is on: 0 or 1, with gradients, where `Masked` runs; bool where others do; None is all."""

    attention: Tensor | None = None
    """(B,) the attention sub-layer."""
    mlp: Tensor | None = None
    """(B,) the MLP sub-layer."""
    heads: Tensor | None = None
    """(B, H)."""
    attention_tokens: Tensor | None = None
    """(B, N) tokens that are attended to and updated by attention."""
    mlp_tokens: Tensor | None = None
    """(B, N) tokens that are updated by the MLP."""

    def like(self, x: Tensor) -> "Gates":
        """These gates in the precision of `x`, which does not change a 0 or a 1."""
        found = (getattr(self, field.name) for field in fields(self))
        return Gates(*(None if gate is None else gate.to(x.dtype) for gate in found))


ByHeads = Callable[[Tensor], Tensor]
"""Multiplies token features (..., channels) by each head's gate for its consecutive channels."""
Attend = Callable[[Tensor, Tensor, Tensor, Gates, float], Tensor]
"""Queries, keys and values (B, N, H, d), the gates, and the dropout of attention -> (B, N, H, d)."""


NEEDS = frozenset({"attention", "token norms", "named parts"})
"""What blocks need that run under gates, as `adaptvit.backbones.base.OFFERS` has it."""
HEADS_NEED = frozenset({"equal heads", "timm's plain blocks"})
"""What they need beside where heads have gates."""


def check_gated(vit: nn.Module, takes: Takes | None) -> None:
    """Refuse a ViT that offers `NEEDS`, but whose heads cannot take along what they are to.

    Args:
        takes: what an off head takes along; None where heads have no gates.
    Raises:
        TypeError: `hidden`, and the MLP is not fc1, activation of 0 at 0, fc2.
        ValueError: the heads do not divide the channels that they take along.
    """
    if takes is not None:
        for block in cores(vit):
            _check_takes(block.attn, block.mlp, get(vit, family_of(vit).width), takes, model_name(vit))


def _check_takes(attn: Attention, mlp: Any, dim: int, takes: Takes, name: str) -> None:
    if takes == "input" and dim != attn.attn_dim:
        raise ValueError(
            f"{name} has {dim} channels, but its heads span {attn.attn_dim}: "
            "heads that take along the MLP's input need as many; choose 'hidden' or 'identity'"
        )
    if takes == "hidden":
        if type(mlp) is not Mlp or not isinstance(mlp.norm, nn.Identity) or mlp.act(torch.zeros(1)).item() != 0:
            raise TypeError(f"{name} has another MLP than fc1, activation, fc2: heads cannot take hidden ones along")
        if mlp.fc1.out_features % attn.num_heads:
            raise ValueError(
                f"{name} has {mlp.fc1.out_features} hidden channels, which its {attn.num_heads} heads cannot share"
            )


def run_gated(
    block: Any,
    number: int,
    tokens: Tokens,
    gates: Gates,
    takes: Takes,
    normed: Tensor | None = None,
    read: int | None = None,
    attend: Attend | None = None,
    drop_path: bool = True,
) -> Tokens:
    """Block `number` of a ViT under gates; a token or image that is off passes unchanged.

    Args:
        tokens: all live. `Packed` features are overwritten, and those of `Slab` carry no gradients either.
        takes: what an off head takes along.
        normed: what the block's first norm gives of `tokens`, where it is known.
        read: `Packed` and `Slab`: leading slots that are all anyone will read of the result; None is every slot.
        attend: `Masked`: attention under the gates; None attends to the tokens that are on.
        drop_path: stochastic depth is as the block has it.
    """
    if isinstance(tokens, Masked):
        return _mask(block, number, tokens, gates.like(tokens.x), takes, normed, attend, drop_path)
    assert isinstance(tokens, Packed | Slab)
    if not is_watched(block):
        if isinstance(tokens, Packed):
            return _skip(block, number, tokens, gates, takes, normed, read)
        return _compact(block, number, tokens, gates, takes, normed, read)
    grid = Masked(tokens.grid(tokens.x), source=tokens.source)  # somebody is to see all of it, once
    normed = None if normed is None else tokens.grid(normed)
    masked = _mask(block, number, grid, gates.like(grid.x), takes, normed, None, drop_path)
    if isinstance(tokens, Slab):  # a plan counts them whoever looks on
        tokens = tokens.with_those(_updated(tokens, gates.attention, gates.attention_tokens, None)[0])
        tokens = tokens.with_those(_updated(tokens, gates.mlp, gates.mlp_tokens, read)[0])
    return tokens.with_x(masked.x.flatten(0, 1))


def _mask(
    block: Any,
    number: int,
    tokens: Masked,
    gates: Gates,
    takes: Takes,
    normed: Tensor | None,
    attend: Attend | None,
    drop_path: bool,
) -> Tokens:
    parts = FAMILIES.parts_of(block)
    assert parts is not None
    if normed is None:
        normed = chain(block, parts.into_attention, tokens.x, tokens)
    acts = Acts(attend=partial(_attend_under, gates, takes, attend))
    if has_maps(block) and not is_watched(block):
        out = _by_maps(block, tokens, gates, takes, normed, acts)
    else:
        _check_called(block, gates, takes)
        out, _ = attention(block, parts, tokens, normed, acts, number)
    added = _add(block, parts.out_of_attention, tokens, out, gates.attention_tokens, gates.attention, drop_path)
    read = chain(block, parts.into_mlp, added.x, added)
    out = _masked_mlp(block, parts, added, read, _by_heads(gates), takes)
    return _add(block, parts.out_of_mlp, added, out, gates.mlp_tokens, gates.mlp, drop_path)


def _check_called(block: Any, gates: Gates, takes: Takes) -> None:
    """Refuse heads that are off where something in attention follows them, and attention is to be called whole."""
    attn = getattr(block, "attn", None)
    follows = (
        not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity) or getattr(attn, "gate", None) is not None
    )
    if gates.heads is not None and takes != "identity" and follows:
        raise NotImplementedError(
            f"{type(attn).__name__} has a norm or gate behind its heads, so that with a hook on it heads cannot be off"
        )


def _by_maps(block: Block, tokens: Tokens, gates: Gates, takes: Takes, normed: Tensor, acts: Acts) -> Tensor:
    """Attention of timm's plain block, whose inner norm and gate see heads that are off."""
    attn = block.attn
    assert acts.attend is not None
    mixed = acts.attend(Projected(*project_normed(block, tokens, normed)), attn.attn_drop.p if attn.training else 0.0)
    return _projected(attn, mixed, normed, None if takes == "identity" else _by_heads(gates))


def _projected(attn: Attention, mixed: Tensor, normed: Tensor, by_heads: ByHeads | None) -> Tensor:
    """What follows on the mixed values of all heads, token features (..., H, d), of tokens whose norm gave `normed`.

    Args:
        by_heads: switches the channels of heads off; None is none.
    """
    out = through(attn.norm, mixed.flatten(-2))
    if attn.gate is not None:
        out = out * attn.gate(normed).sigmoid()
    if by_heads is not None:
        out = by_heads(out)
    return attn.proj_drop(attn.proj(out))


def _attend_under(gates: Gates, takes: Takes, attend: Attend | None, projected: Projected, dropout: float) -> Tensor:
    q, k, v, pairs = projected
    heads = None if gates.heads is None else gates.heads[:, None, :, None]
    if heads is not None and takes != "identity":
        q, k, v = q * heads, k * heads, v * heads
    if attend is not None:
        if pairs is not None:
            raise NotImplementedError("this attention has no relative bias, which the ViT gives it")
        return attend(q, k, v, gates, dropout)
    on = gates.attention_tokens
    tokens = Masked(q, None if on is None else on.detach() > 0)
    mixed = tokens.attend(q, k, v, tokens, AttentionOptions(dropout, pairs=pairs))
    if heads is None:
        return mixed
    return heads * mixed + (1 - heads) * v if takes == "identity" else heads * mixed


def _masked_mlp(block: Any, parts: Parts, tokens: Tokens, x: Tensor, by_heads: ByHeads | None, takes: Takes) -> Tensor:
    if by_heads is None or takes == "identity":
        return chain(block, parts.mlp, x, tokens)
    if takes == "input":
        return chain(block, parts.mlp, by_heads(x), tokens)

    def gated(fc1: nn.Module, x: Tensor) -> Tensor:
        return by_heads(type(fc1).forward(fc1, x))

    return with_parts(block.mlp, {"fc1": stand_in(block.mlp.fc1, gated)})(x)


def _by_heads(gates: Gates) -> ByHeads | None:
    heads = gates.heads
    if heads is None:
        return None
    return lambda x: x * heads.repeat_interleave(x.shape[-1] // heads.shape[1], dim=1)[:, None]


def _by_rows(heads: Tensor) -> ByHeads:
    """By the gates (T, H) of the heads of each token."""
    return lambda t: (t.unflatten(-1, (heads.shape[1], -1)) * heads[..., None]).flatten(-2)


def _add(
    block: nn.Module,
    names: tuple[str, ...],
    tokens: Masked,
    branch: Tensor,
    on: Tensor | None,
    images: Tensor | None,
    drop_path: bool,
) -> Masked:
    if not drop_path:
        names = tuple(name for name in names if not drops_paths(get(block, name)))
    branch = chain(block, names, branch, tokens)
    if on is not None:
        branch = branch * on[..., None]
    if images is not None:
        branch = branch * images[:, None, None]
    return tokens.with_x(tokens.x + branch)


@torch.no_grad()
def _compact(
    block: Any, number: int, tokens: Slab, gates: Gates, takes: Takes, normed: Tensor | None, read: int | None
) -> Slab:
    parts = FAMILIES.parts_of(block)
    assert parts is not None
    if normed is None:
        normed = chain(block, parts.into_attention, tokens.x, tokens)
    keys, (normed,) = _updated(tokens, gates.attention, gates.attention_tokens, None, normed)
    if has_maps(block):
        rows, out = _mixed(block, keys, normed, gates.heads, takes, read)
    else:
        out, _ = attention(block, parts, keys, normed, Acts(read), number)
        rows, (out,) = (keys, [out]) if read is None else keys.select(read, out)
    tokens = tokens.with_those(rows.with_x(rows.x + chain(block, parts.out_of_attention, out, rows)))
    rows, _ = _updated(tokens, gates.mlp, gates.mlp_tokens, read)
    by_heads = None if gates.heads is None else partial(rows.by_heads, heads=gates.heads)
    out = _masked_mlp(block, parts, rows, chain(block, parts.into_mlp, rows.x, rows), by_heads, takes)
    return tokens.with_those(rows.with_x(rows.x + chain(block, parts.out_of_mlp, out, rows)))


def _updated(
    tokens: Slab, images: Tensor | None, chosen: Tensor | None, read: int | None, *others: Tensor
) -> tuple[Slab, list[Tensor]]:
    """The tokens that a sub-layer updates, and `others`, token features, of them.

    Args:
        images: (B,) bool, those whose sub-layer is on; None is all.
        chosen: (B, N) bool, the tokens that are; None is all.
        read: leading slots that are; None is all.
    """
    gates = [chosen, None if images is None else images[:, None]]
    if read is not None:
        gates.append(torch.arange(tokens.shape[1], device=tokens.x.device)[None] < read)
    on = [gate for gate in gates if gate is not None]
    if not on:
        return tokens, list(others)
    return tokens.filter(tokens.spread(reduce(and_, on)), *others)


def _mixed(
    block: Block, keys: Slab, normed: Tensor, heads: Tensor | None, takes: Takes, read: int | None
) -> tuple[Slab, Tensor]:
    """The tokens that attention updates, of those that it attends to, and what it gives before `out_of_attention`."""
    q, k, v = project_normed(block, keys, normed)
    rows, own = keys, v
    if read is not None:
        rows, (q, own, normed) = keys.select(read, q, v, normed)
    mixed = keys.attend(q, k, v, rows)
    if heads is not None and takes == "identity":
        mixed = torch.where(rows.spread(heads[:, None, :, None]), mixed, own)
    by_heads = None if heads is None or takes == "identity" else partial(rows.by_heads, heads=heads)
    return rows, _projected(block.attn, mixed, normed, by_heads)


ALONE = 1e8
"""MACs that heads which are off have to save images of a batch, together in a block, for these to run by themselves.
Others run all heads, and what those that are off give is multiplied by 0: a part of a batch has its price, whatever is
in it. A batch of 32 at random decisions of ViT-Tiny on two threads, all by themselves, at 1e7, at 1e8, none: at 128
pixels 164, 137, 117 and 120 ms, at 224 pixels 343, 336, 327 and 363."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Images of a batch that use the same sub-layers, and the same heads or all, and which of their tokens run."""

    runs: Runs | None
    """Heads that run; None is all."""
    attention: bool
    mlp: bool
    shape: tuple[int, int]
    """Images of the part, and slots."""
    slots: Tensor
    """(T,) places in the part's own flattened grid, ascending."""
    rows: Tensor | None
    """(T,) rows of the batch's features; None is all of them, in order."""
    images: Tensor | None = None
    """Their numbers in the batch; None is all of it."""
    on: Tensor | None = None
    """(T, H) bool, of heads that all run, those whose result counts; None is all."""

    def of(self, t: Tensor) -> Tensor:
        """Rows of the batch's features: a copy, or the features themselves where they are all."""
        return t if self.rows is None else t.index_select(0, self.rows)

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write rows back to the batch's features."""
        if self.rows is not None:
            x.index_copy_(0, self.rows, rows)

    def first(self, count: int) -> tuple["_Part", Tensor]:
        """The part's tokens in its first `count` slots, and where they stand among its tokens."""
        inside = (self.slots % self.shape[1] < count).nonzero().squeeze(1)
        rows = inside if self.rows is None else self.rows[inside]
        on = None if self.on is None else self.on[inside]
        return replace(self, slots=self.slots[inside], rows=rows, on=on), inside


@torch.no_grad()
def _skip(
    block: Any, number: int, tokens: Packed, gates: Gates, takes: Takes, normed: Tensor | None, read: int | None
) -> Tokens:
    assert tokens.full
    x, parts, by_maps = tokens.x, FAMILIES.parts_of(block), has_maps(block)
    assert parts is not None
    on = torch.ones(tokens.shape[0], dtype=torch.bool, device=x.device)
    attention = on if gates.attention is None else gates.attention
    mlp = on if gates.mlp is None else gates.mlp
    alone = len(on) == 1 or gates.attention is None or gates.mlp is None
    if gates.attention_tokens is gates.mlp_tokens and alone:
        passes = [(attention, mlp, gates.mlp_tokens)]
    else:
        passes = [(attention, ~on, gates.attention_tokens), (~on, mlp, gates.mlp_tokens)]
    saved = (0.0, 0.0) if gates.heads is None else _saved_by_heads(block, takes)
    for attending, through_mlp, chosen in passes:
        for part in _parts(tokens, attending, through_mlp, chosen, gates.heads, saved):
            target, inside = (part, None) if read is None else part.first(read)
            rows = target.of(x)
            if part.attention:
                normed = chain(block, parts.into_attention, x, tokens) if normed is None else normed
                if by_maps:
                    rows += _attention(block, part.of(normed), part, target, inside, takes)
                else:
                    rows += _called(block, parts, number, part.of(normed), part, inside, tokens)
            if part.mlp:
                masks = [None] if target.on is None else target.on.split(MLP_ROWS)
                for some, heads in zip(rows.split(MLP_ROWS), cycle(masks)):
                    read_of = chain(block, parts.into_mlp, some, tokens)
                    if not by_maps:
                        out = chain(block, parts.mlp, read_of, tokens)
                    elif heads is None:
                        out = _mlp(block, read_of, part.runs, takes)
                    else:
                        out = _masked_mlp(block, parts, tokens, read_of, _by_rows(heads), takes)
                    some += chain(block, parts.out_of_mlp, out, tokens)
            target.put(x, rows)
    return tokens.with_x(x)


def _parts(
    tokens: Packed,
    attention: Tensor,
    mlp: Tensor,
    chosen: Tensor | None,
    heads: Tensor | None,
    saved: tuple[float, float],
) -> Iterator[_Part]:
    """The batch in parts of equal use: matrix products as large as they come.

    A head that is off is not computed where that is worth a part of its own, and never for one image.

    Args:
        saved: MACs of a token that a head which is off saves, in attention and in the MLP.
    """
    count, slots = tokens.shape
    used: dict[tuple[bool, bool, tuple[bool, ...] | None], list[int]] = defaultdict(list)
    patterns = [()] * count if heads is None else heads.tolist()
    for image, (attending, through_mlp, pattern) in enumerate(
        zip(attention.tolist(), mlp.tolist(), patterns, strict=True)
    ):
        if attending or through_mlp:
            used[attending, through_mlp, () if all(pattern) else tuple(pattern)].append(image)
    for sublayers in {key[:2] for key in used}:
        each = sum(cost for cost, runs in zip(saved, sublayers, strict=True) if runs)
        few = [
            key
            for key, group in used.items()
            if key[:2] == sublayers and _held(group, chosen, slots) * each * (key[2] or ()).count(False) < ALONE
        ]
        if len(few) > 1:
            used[*sublayers, None] = sorted(image for key in few for image in used.pop(key))
    for (attending, through_mlp, uses), group in used.items():
        runs = _runs(uses) if uses else None
        if len(group) == count:
            index, inner = None, tokens.slots if chosen is None else chosen.flatten().nonzero().squeeze(1)
            rows = None if len(inner) == count * slots else inner
        else:
            index = torch.tensor(group, device=tokens.x.device)
            places = torch.arange(len(group), device=tokens.x.device)
            if chosen is None:
                inner = torch.arange(len(group) * slots, device=tokens.x.device)
            else:
                inner = chosen.index_select(0, index).flatten().nonzero().squeeze(1)
            rows = inner + ((index - places) * slots)[inner // slots]
        on = None
        if uses is None:
            assert heads is not None
            on = (heads if index is None else heads.index_select(0, index)).index_select(0, inner // slots)
        yield _Part(runs, attending, through_mlp, (len(group), slots), inner, rows, index, on)


def _held(images: list[int], chosen: Tensor | None, slots: int) -> int:
    """Tokens of these images that are `chosen`."""
    return slots * len(images) if chosen is None else int(chosen[images].sum())


def _saved_by_heads(block: Any, takes: Takes) -> tuple[float, float]:
    """MACs of a token that a head which is off saves in attention, but for its products, and in the MLP."""
    attn, mlp = block.attn, block.mlp
    if takes == "identity":
        return 2 * attn.qkv.in_features * attn.head_dim, 0.0
    attention = 4 * attn.qkv.in_features * attn.head_dim
    if type(mlp) is not Mlp:
        return attention, 0.0
    part = mlp.fc1.in_features * mlp.fc1.out_features / attn.num_heads
    return attention, part if takes == "input" else 2 * part


def _runs(pattern: Sequence[bool]) -> Runs:
    """The heads that are on, as ranges."""
    edges = [place for place, (left, right) in enumerate(pairwise((False, *pattern, False))) if left != right]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _called(
    block: Any, parts: Parts, number: int, read: Tensor, part: _Part, inside: Tensor | None, tokens: Packed
) -> Tensor:
    """`_attention` of a block whose attention is called whole, by all heads."""
    source = tokens.source if part.images is None else tokens.source.of_images(part.images)
    keys = Packed(read, part.shape, part.slots, source=source)
    chosen = None
    if inside is not None:
        chosen = torch.zeros(part.shape[0] * part.shape[1], dtype=torch.bool, device=read.device)
        chosen[part.slots[inside]] = True
        chosen = chosen.view(part.shape)
    out, _ = attention(block, parts, keys, read, Acts(chosen), number)
    return chain(block, parts.out_of_attention, out if inside is None else out[inside], keys)


def _attention(block: Block, normed: Tensor, part: _Part, target: _Part, inside: Tensor | None, takes: Takes) -> Tensor:
    """What the attention sub-layer adds to the rows of `target`, which stand at `inside` in the part."""
    attn = block.attn
    if part.runs == () and takes != "identity":
        return through(block.ls1, of_nothing(attn.proj, normed, attn.attn_dim))
    every = ((0, attn.num_heads),)
    keys = Packed(normed, part.shape, part.slots)
    queries = keys if inside is None else Packed(normed[inside], part.shape, target.slots)
    if part.on is not None:
        return through(block.ls1, _attend_mixed(block, keys, queries, target.on, inside, takes))
    if part.runs is None and inside is None:
        q, k, v = project_normed(block, keys, normed)
        out = keys.attend(q, k, v, keys)
    else:
        out = _attend_runs(block, keys, queries, every if part.runs is None else part.runs, inside, takes)
    out = through(attn.norm, out.flatten(-2))
    runs = every if part.runs is None or takes == "identity" else part.runs
    if attn.gate is not None:
        for channels in _channels(runs, attn.head_dim):
            out[:, channels] *= some_outputs(attn.gate, queries.x, channels).sigmoid()
    return through(block.ls1, some_inputs(attn.proj, out, _channels(runs, attn.head_dim)))


def _attend_mixed(
    block: Block, keys: Packed, queries: Packed, on: Tensor | None, inside: Tensor | None, takes: Takes
) -> Tensor:
    """What attention gives, before `out_of_attention`, of all heads, those off that are not `on` for a query."""
    assert on is not None
    q, k, v = project_normed(block, keys, keys.x)
    q, own = (q, v) if inside is None else (q[inside], v[inside])
    mixed = keys.attend(q, k, v, queries)
    if takes == "identity":
        return _projected(block.attn, torch.where(on[..., None], mixed, own), queries.x, None)
    return _projected(block.attn, mixed * on[..., None], queries.x, _by_rows(on))


def _attend_runs(
    block: Block, keys: Packed, queries: Packed, runs: Runs, inside: Tensor | None, takes: Takes
) -> Tensor:
    """Attention of these heads: (T, H, d) of the queries; heads that are off give 0, or their values if `identity`."""
    attn = block.attn
    size, width = attn.head_dim, attn.attn_dim
    if not is_plain(attn.qkv):
        return _attend_whole(block, keys, queries, runs, inside, takes)
    if takes == "identity":
        values = some_outputs(attn.qkv, keys.x, slice(2 * width, None)).unflatten(-1, (-1, size))
        out = values.clone() if inside is None else values[inside]
    else:
        out = queries.x.new_zeros(len(queries.x), attn.num_heads, size)
    for run, channels in zip(runs, _channels(runs, size), strict=True):
        first, last = channels.start, channels.stop
        q = some_outputs(attn.qkv, queries.x, slice(first, last)).unflatten(-1, (-1, size))
        k = some_outputs(attn.qkv, keys.x, slice(width + first, width + last)).unflatten(-1, (-1, size))
        if takes == "identity":
            v = values[:, slice(*run)]
        else:
            v = some_outputs(attn.qkv, keys.x, slice(2 * width + first, 2 * width + last)).unflatten(-1, (-1, size))
        q, k = on_tokens(attn.q_norm, q, queries), on_tokens(attn.k_norm, k, keys)
        out[:, slice(*run)] = keys.attend(q, k, v, queries)
    return out


def _attend_whole(
    block: Block, keys: Packed, queries: Packed, runs: Runs, inside: Tensor | None, takes: Takes
) -> Tensor:
    """`_attend_runs` where queries, keys and values come of one call, so that those of all heads are there."""
    q, k, v = project_normed(block, keys, keys.x)
    mixed = keys.attend(q if inside is None else q[inside], k, v, queries)
    on = torch.zeros(mixed.shape[-2], 1, dtype=torch.bool, device=mixed.device)
    for run in runs:
        on[slice(*run)] = True
    off = (v if inside is None else v[inside]) if takes == "identity" else torch.zeros_like(mixed)
    return torch.where(on, mixed, off)


def _mlp(block: Block, x: Tensor, runs: Runs | None, takes: Takes) -> Tensor:
    """The MLP of what these heads leave of its input or hidden channels."""
    mlp, heads = block.mlp, block.attn.num_heads
    if runs is None or takes == "identity":
        return mlp(x)
    if runs == () and (takes == "hidden" or type(mlp) is Mlp):
        return _mlp_of_nothing(block, x, takes)
    if takes == "hidden":
        shares = _channels(runs, mlp.fc1.out_features // heads)
        hidden = x.new_zeros(len(x), mlp.fc1.out_features)
        whole = None if is_plain(mlp.fc1) else mlp.fc1(x)
        for share in shares:
            hidden[:, share] = mlp.act(some_outputs(mlp.fc1, x, share) if whole is None else whole[:, share])
        return some_inputs(mlp.fc2, hidden, shares)
    channels = _channels(runs, x.shape[1] // heads)
    if type(mlp) is Mlp:
        return mlp.fc2(through(mlp.norm, mlp.act(some_inputs(mlp.fc1, x, channels))))
    kept = torch.zeros_like(x)
    for some in channels:
        kept[:, some] = x[:, some]
    return mlp(kept)


def _mlp_of_nothing(block: Block, x: Tensor, takes: Takes) -> Tensor:
    """What the MLP gives when every head is off, the same for all tokens: (1, D)."""
    mlp = block.mlp
    if takes == "hidden":
        return of_nothing(mlp.fc2, x, mlp.fc1.out_features)
    hidden = of_nothing(mlp.fc1, x, x.shape[1])
    return mlp.fc2(through(mlp.norm, mlp.act(hidden)))


def _channels(runs: Runs, size: int) -> list[slice]:
    return [slice(first * size, last * size) for first, last in runs]


def gated_macs(
    shape: Shape,
    takes: Takes,
    plain_mlp: bool,
    attention: Tensor,
    mlp: Tensor,
    heads: Tensor,
    keys: Tensor,
    queries: Tensor,
    mlp_tokens: Tensor,
) -> Tensor:
    """MACs of blocks under gates, as `Packed` runs them, by image and block; integer, or with the gates' gradients.

    Args:
        plain_mlp: what `has_plain_mlp` says.
        attention, mlp: 0 or 1.
        heads: heads on.
        keys, queries: tokens attended to, and tokens updated by attention.
        mlp_tokens: tokens that go through the MLP.
    """
    all_heads, head_dim, gated, mlp_per_token, maps, mixing = (
        shape.each(size, keys) for size in ("heads", "head_dim", "gated", "mlp_per_token", "maps", "mixing")
    )
    width = heads * head_dim
    valued = all_heads * head_dim if takes == "identity" else width
    query_side = queries * shape.dim * (width + (1 + gated) * valued)
    key_side = keys * shape.dim * (width + valued)
    linear = query_side + key_side
    linear = linear + (maps > 0 if isinstance(maps, Tensor) else bool(maps)) * (maps * keys - linear)
    attending = attention * (linear + 2 * queries * keys * width + mixing)
    if takes == "hidden":
        return attending + mlp * mlp_tokens * (mlp_per_token // all_heads) * heads
    if takes == "input" and plain_mlp:
        hidden = mlp_per_token // (2 * shape.dim)
        some = mlp_tokens * hidden * (heads * (shape.dim // all_heads) + shape.dim)
        return attending + mlp * torch.where(heads > 0, some, hidden * shape.dim)  # no head: the same for all tokens
    return attending + mlp * mlp_tokens * mlp_per_token


def has_plain_mlp(vit: nn.Module) -> bool:
    """Whether the MLPs are fc1, activation, fc2, so that fewer input channels take fewer MACs."""
    return all(type(getattr(block, "mlp", None)) is Mlp for block in cores(vit))
