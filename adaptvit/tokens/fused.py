"""Steps of decisions that a CUDA device takes in a kernel or two, `adaptvit.tokens.triton_kernels`, and others in many.

Each is a function of plain tensors and an operator of torch, which `torch.compile` takes as it is. `kernels.fuses` says
where they are used: on a device, without gradients. Where Triton is not there, or on another device, they are torch's.

Letters: B images, N token slots, T rows, of which those of image b are offsets[b] to offsets[b + 1] in slot order, C
rows that are left, R slots that are read, D channels, H heads, d channels per head, A and P patches.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid, normalize, pad

QUERIES = 4
"""So many of an image are asked for the attention that tokens receive in one kernel, at most."""


@cache
def _triton() -> Any:
    return import_module("adaptvit.tokens.triton_kernels") if find_spec("triton") else None


def _fused(like: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """An operator of torch with this code, and on CUDA Triton's of its name; `like` has the shapes of its results."""

    def make(plain: Callable[..., Any]) -> Any:
        name = plain.__name__
        op = torch.library.custom_op(f"adaptvit::{name}", plain, mutates_args=())
        op.register_fake(like)
        op.register_kernel("cuda")(lambda *given: getattr(_triton() or PLAIN, name)(*given))
        setattr(PLAIN, name, plain)
        return op

    return make


class PLAIN:
    """The steps by torch's arithmetic."""


def _places(offsets: Tensor, rows: int, n: int) -> Tensor:
    """(T,) of each row, its place in a grid of B times n; B n of rows behind the last image's."""
    row, images = torch.arange(rows, device=offsets.device), len(offsets) - 1
    image = torch.searchsorted(offsets[1:], row, right=True)
    start = offsets.index_select(0, image.clamp(max=images - 1))
    return torch.where(image < images, image * n + row - start, images * n)


def _starts(offsets: Tensor | None, rows: Tensor, n: int) -> Tensor:
    """`offsets`, or where these are None those of images that have n of the rows each."""
    if offsets is not None:
        return offsets
    return torch.arange(0, len(rows) + 1, n, device=rows.device, dtype=torch.int32)


def _grid(t: Tensor, places: Tensor, images: int, n: int) -> Tensor:
    """(T, ...) -> (B, n, ...), 0 where there is no row."""
    return t.new_zeros(images * n + 1, *t.shape[1:]).index_copy_(0, places, t)[:-1].view(images, n, *t.shape[1:])


def _of_compact(
    chosen: Tensor, slots: Tensor, offsets: Tensor, x: Tensor, other: Tensor, count: int, total: int, by_slot: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    left, other_left = x.new_empty(count, *x.shape[1:]), other.new_empty(count, *other.shape[1:])
    rows = slots.new_empty(count)
    return torch.empty_like(offsets), torch.empty_like(offsets), rows, torch.empty_like(rows), left, other_left


@_fused(_of_compact)
def compact(
    chosen: Tensor, slots: Tensor, offsets: Tensor, x: Tensor, other: Tensor, count: int, total: int, by_slot: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The rows that are chosen, moved to the front.

    Args:
        chosen: (T,) bool; of rows of no image it does not matter. Or (`total`,), `by_slot`.
        slots: (T,) int64, each row's place in a grid of `total` places.
        offsets: (B + 1,) int32.
        x, other: (T, ...), which are taken along.
        count: C; rows behind the last image's hold nothing that matters, and their place is `total`.
    Returns:
        offsets, as they would be with rows enough, and bounded by C, slots, the rows that were taken, `x` and `other`.
    """
    if by_slot:
        chosen = chosen.index_select(0, slots.clamp(max=total - 1))
    end = (chosen & (slots < total)).cumsum(0, dtype=torch.int32)
    left = torch.cat([end.new_zeros(1), end]).index_select(0, offsets)
    rows = torch.nonzero_static(chosen & (slots < total), size=count, fill_value=0).squeeze(1)
    empty = torch.arange(count, device=rows.device) >= left[-1]
    places = slots.index_select(0, rows).masked_fill(empty, total)
    return left, left.clamp(max=count), places, rows, x.index_select(0, rows), other.index_select(0, rows)


def _of_halt(x: Tensor, state: Tensor, remainder: Tensor, output: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(output), torch.empty_like(state, dtype=torch.bool), torch.empty_like(remainder)


@_fused(_of_halt)
def halt(
    x: Tensor,
    state: Tensor,
    remainder: Tensor,
    output: Tensor,
    slots: Tensor,
    offsets: Tensor,
    n: int,
    stays: bool,
    scale: float,
    center: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A-ViT's step behind a block, where an image leaves once its tokens that are read have halted.

    Args:
        x: (T, D).
        state, remainder: (T,) what the gate reads, and R, in float32.
        output: (B, R, D) the mean field so far, in float32.
        slots: (T,) int64; B N of rows that hold nothing.
        offsets: (B + 1,) int32.
        stays: tokens that are read do not halt.
    Returns:
        the output with this block's share, (T,) bool of those that go on, and R for the block after.
    """
    images, read = output.shape[:2]
    real = slots < images * n
    reading = real & (slots % n < read)
    score = torch.sigmoid(scale * state - center)
    if stays:
        score = score.masked_fill(reading, 0)
    left = remainder - score
    going = ~(left <= epsilon) & real
    weight = torch.where(going, score, remainder)
    into = torch.where(reading, slots // n * read + slots % n, images * read)
    share = output.new_zeros(images * read + 1, x.shape[1]).index_copy_(0, into, weight[:, None] * x)[:-1]
    goes = going.new_zeros(images * read + 1).index_copy_(0, into, going)[:-1]
    on = goes.view(images, read).any(dim=1).index_select(0, slots.clamp(max=images * n - 1) // n)
    return output + share.view_as(output), going & on, left


def _received(q: Tensor, k: Tensor, slots: Tensor | None, offsets: Tensor, n: int, read: int) -> Tensor:
    """`received`, or where `slots` are None of images whose first rows are their first slots."""
    images, places = len(offsets) - 1, _places(offsets, len(k), n)
    live = torch.arange(n, device=k.device) < offsets.diff()[:, None]
    queries = _grid(q, places, images, n).float()
    if read:
        first = torch.arange(n, device=k.device).expand(images, n)
        at = first if slots is None else _grid(slots % n, places, images, n)
        queries, asks = queries[:, :read], (live & (at < read))[:, :read]
    else:
        queries = queries.sum(dim=1, keepdim=True) / live.sum(dim=1).clamp(min=1).view(-1, 1, 1, 1)
        asks = live[:, :1]
    logits = torch.einsum("brhd,bnhd->brhn", queries, _grid(k, places, images, n).float()) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(~live[:, None, None], torch.finfo(torch.float32).min).softmax(dim=-1)
    mean = (weights * asks[:, :, None, None]).sum(dim=1) / asks.sum(dim=1).clamp(min=1)[:, None, None]
    return mean.mT.flatten(0, 1).index_select(0, places.clamp(max=images * n - 1))


def _of_received(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return torch.empty(k.shape[:2], dtype=torch.float32, device=k.device)


@_fused(_of_received)
def received(q: Tensor, k: Tensor, slots: Tensor, offsets: Tensor, n: int, read: int) -> Tensor:
    """Attention that each token receives, mean over the queries that ask: (T, H) in float32.

    Args:
        q, k: (T, H, d).
        slots: (T,) int64.
        offsets: (B + 1,) int32.
        read: the tokens that ask are those in the first so many slots.
    """
    return _received(q, k, slots, offsets, n, read)


def _of_attended(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return torch.empty(k.shape[0], dtype=torch.float32, device=k.device)


@_fused(_of_attended)
def attended(
    q: Tensor, k: Tensor, slots: Tensor | None, offsets: Tensor | None, n: int, read: int, prefix: int | None
) -> Tensor:
    """Attention that each token receives, mean over the queries that ask and over heads: (T,) in float32.

    Args:
        q, k: (T, H, d).
        slots: (T,) int64; None where the first rows of every image are its first slots.
        offsets: (B + 1,) int32; None where every image has n rows.
        read: the tokens that ask are those in the first so many slots; 0 is one query, the mean of all.
        prefix: divide by the mean over the image's patches, which follow its first so many rows, unless this is 0;
            None by nothing.
    """
    offsets = _starts(offsets, k, n)
    mean, images = _received(q, k, slots, offsets, n, read).mean(dim=1), len(offsets) - 1
    if prefix is None:
        return mean
    row = torch.arange(len(k), device=k.device)
    image = torch.searchsorted(offsets[1:], row, right=True)
    inside = image.clamp(max=images - 1)
    patch = (image < images) & (row >= offsets.index_select(0, inside) + prefix)
    total = mean.new_zeros(images + 1).index_add(0, image, mean * patch)[:-1]
    share = total / (offsets.diff() - prefix).clamp(min=1)
    return mean / share.masked_fill(share == 0, 1).index_select(0, inside)


def _of_like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_fused(_of_like)
def with_mean(x: Tensor, slots: Tensor | None, offsets: Tensor | None, n: int, prefix: int) -> Tensor:
    """`x` (T, D), in the second half of whose channels is the mean of its image's patches: as precise as `x`.

    Args:
        slots: (T,) int64; patches are those from slot `prefix` on. None is the number of a row in its image.
        offsets: (B + 1,) int32; None where every image has n rows.
    """
    offsets = _starts(offsets, x, n)
    own, shared = x.chunk(2, dim=1)
    rows, images = len(x), len(offsets) - 1
    at = _places(offsets, rows, n) if slots is None else slots
    image = torch.searchsorted(offsets[1:], torch.arange(rows, device=x.device), right=True)
    patch = ((image < images) & (at % n >= prefix))[:, None]
    wide = torch.where(patch, shared.float(), 0)
    total = wide.new_zeros(images + 1, shared.shape[1]).index_add(0, image, wide)
    count = wide.new_zeros(images + 1, 1).index_add(0, image, patch.float())
    mean = (total / count.clamp(min=1)).index_select(0, image).to(x.dtype)
    return torch.cat([own, mean], dim=1)


def _of_sample(
    received: Tensor, v: Tensor, slots: Tensor, offsets: Tensor, n: int, prefix: int, points: float
) -> tuple[Tensor, Tensor]:
    chosen = torch.empty(offsets.shape[0] - 1, n, dtype=torch.bool, device=v.device)
    return chosen, chosen.new_empty(chosen.shape[0], 1)


@_fused(_of_sample)
def sample(
    received: Tensor, v: Tensor, slots: Tensor, offsets: Tensor, n: int, prefix: int, points: float
) -> tuple[Tensor, Tensor]:
    """The step of ATS, by `points` quantiles of the scores, which are attention received times the size of values.

    Args:
        received, v: (T, H) float32 and (T, H, d).
        slots: (T,) int64, each row's place in the grid, B N of rows of no image; patches are from slot `prefix` on.
        offsets: (B + 1,) int32.
    Returns:
        (B, N) bool, the slots that go on, prefix tokens among them, and (B, 1) bool of images whose scores are finite:
        in others all patches count alike.
    """
    images = len(offsets) - 1
    score = _grid((received * v.norm(dim=-1, dtype=torch.float32)).sum(dim=1), slots, images, n)[:, prefix:]
    live = _grid(torch.ones_like(slots, dtype=torch.bool), slots, images, n)
    alike = live[:, prefix:].float()
    alike = alike / alike.sum(dim=1, keepdim=True)
    total = score.sum(dim=1, keepdim=True)
    score = torch.where(total == 0, alike, score / total)
    finite = score.isfinite().all(dim=1, keepdim=True)
    below = (torch.where(finite, score, alike).cumsum(dim=1) * points + 0.5).floor().clamp(max=math.ceil(points - 0.5))
    chosen = below.diff(dim=1, prepend=torch.zeros_like(below[:, :1])) > 0
    return torch.cat([live[:, :prefix], chosen], dim=1), finite


def _of_above(
    logits: Tensor, slots: Tensor, offsets: Tensor, n: int, prefix: int, least: float
) -> tuple[Tensor, Tensor]:
    chosen = torch.empty(offsets.shape[0] - 1, n, dtype=torch.bool, device=logits.device)
    return chosen, torch.empty(chosen.shape[0], 1, dtype=torch.float32, device=logits.device)


@_fused(_of_above)
def above(logits: Tensor, slots: Tensor, offsets: Tensor, n: int, prefix: int, least: float) -> tuple[Tensor, Tensor]:
    """The patches whose probability has a logarithm above `least`, and of each image the likeliest.

    Args:
        logits: (T, 2), whose differences are log-odds.
        slots: (T,) int64, each row's place in the grid, B N of rows of no image; patches are from slot `prefix` on.
        offsets: (B + 1,) int32.
    Returns:
        (B, N) bool, the slots that go on, prefix tokens among them, and the sums of log-odds, (B, 1) in float32,
        theirs included.
    """
    images, score = len(offsets) - 1, logits[:, 0].float() - logits[:, 1]
    live, grid = (_grid(t, slots, images, n) for t in (torch.ones_like(slots, dtype=torch.bool), score))
    patches = grid[:, prefix:].masked_fill(~live[:, prefix:], -torch.inf)
    likeliest = patches == patches.amax(dim=1, keepdim=True)
    chosen = live[:, prefix:] & ((logsigmoid(patches) > least) | likeliest)
    return torch.cat([live[:, :prefix], chosen], dim=1), grid.sum(dim=1, keepdim=True)


def _of_gates(
    normed: Tensor | None,
    state: Tensor,
    patch: Tensor | None,
    patch_bias: Tensor | None,
    sublayer: Tensor | None,
    sublayer_bias: Tensor | None,
    head: Tensor | None,
    head_bias: Tensor | None,
    n: int,
    prefix: int,
    heads: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    widths = (n - prefix, heads, 2, n, n)
    patches, of_heads, sublayers, attended, updated = (
        torch.empty(state.shape[0], width, dtype=torch.bool, device=state.device) for width in widths
    )
    return patches, of_heads, sublayers, attended, updated


@_fused(_of_gates)
def gates(
    normed: Tensor | None,
    state: Tensor,
    patch: Tensor | None,
    patch_bias: Tensor | None,
    sublayer: Tensor | None,
    sublayer_bias: Tensor | None,
    head: Tensor | None,
    head_bias: Tensor | None,
    n: int,
    prefix: int,
    heads: int,
    patch_least: float,
    least: float,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """AdaViT's decisions of a block: what has a logit above `least`, or none that is a number, is on.

    Args:
        normed: (B n, D), which the patches' map reads.
        state: (B, D), which the others read.
        patch, sublayer, head: weights (1, D), (2, D) and (H, D), and their biases; what has none is on.
        prefix: rows of an image before its patches.
        heads: H.
        patch_least, least: of patches, and of the others.
        both: patches that are off are left out of the MLP too.
    Returns:
        (B, P), (B, H) and (B, 2) bool; and (B, n) each, the tokens that attention and that the MLP update.
    """

    def above(x: Tensor | None, weight: Tensor | None, bias: Tensor | None, bound: float, width: int) -> Tensor:
        if x is None or weight is None or bias is None:
            return torch.ones(len(state), width, dtype=torch.bool, device=state.device)
        return ~(linear(x.float(), weight.float(), bias.float()) <= bound).view(len(state), -1)

    rows = above(normed, patch, patch_bias, patch_least, n)
    sublayers, on = above(state, sublayer, sublayer_bias, least, 2), above(state, head, head_bias, least, heads)
    rows[:, :prefix] = True
    attention, mlp = sublayers[:, :1], sublayers[:, 1:]
    return rows[:, prefix:].clone(), on, sublayers, rows & attention, rows & mlp if both else mlp.repeat(1, n)


@_fused(_of_like)
def gated(x: Tensor, heads: Tensor, offsets: Tensor) -> Tensor:
    """(T, D) times what its image has, (B, H), for as many channels each as heads share; 0 in rows of no image.

    Args:
        heads: bool.
        offsets: (B + 1,) int32.
    """
    image = torch.searchsorted(offsets[1:], torch.arange(len(x), device=x.device), right=True)
    on = torch.cat([heads, torch.zeros_like(heads[:1])]).index_select(0, image)
    return torch.where(on.repeat_interleave(x.shape[1] // heads.shape[1], dim=1), x, 0)


@_fused(_of_like)
def put(x: Tensor, rows: Tensor, t: Tensor) -> Tensor:
    """`x` (T, D), with `t` (C, D) in those of its `rows`, (C,) int64, that it has."""
    return torch.cat([x, x.new_empty(1, x.shape[1])]).index_copy_(0, rows.clamp(max=len(x)), t)[:-1].clone()


def _of_match(
    keys: Tensor,
    importance: Tensor | None,
    size: Tensor,
    offsets: Tensor | None,
    n: int,
    prefix: int,
    protection: float,
    size_cost: float,
    mean_key: bool,
) -> tuple[Tensor, Tensor]:
    images = keys.shape[0] // n if offsets is None else offsets.shape[0] - 1
    count = (n - prefix + (prefix + 1) % 2) // 2
    score = torch.empty(images, count, dtype=torch.float32, device=keys.device)
    return score, torch.empty_like(score, dtype=torch.int64)


@_fused(_of_match)
def match(
    keys: Tensor,
    importance: Tensor | None,
    size: Tensor,
    offsets: Tensor | None,
    n: int,
    prefix: int,
    protection: float,
    size_cost: float,
    mean_key: bool,
) -> tuple[Tensor, Tensor]:
    """`adaptvit.methods.merging.match`, of rows, by the mean over heads of the cosine of their keys.

    Args:
        keys: (T, H, d).
        importance: (T,) float32; `protection` times the root of the product of two is taken off their similarity.
        size: (T,) float32; `size_cost` times the sum of the logarithms of two is.
        offsets: (B + 1,) int32; None where every image has n rows.
        mean_key: by the cosine of the mean over heads of their keys instead.
    """
    offsets = _starts(offsets, keys, n)
    images, places = len(offsets) - 1, _places(offsets, len(keys), n)
    keys = keys.float().mean(dim=1, keepdim=True) if mean_key else keys.float()
    unit = normalize(keys, dim=-1).flatten(1) / keys.shape[1] ** 0.5
    grid = _grid(unit, places, images, n)
    live = torch.arange(n, device=keys.device) < offsets.diff()[:, None]
    even, odd = slice(prefix + prefix % 2, None, 2), slice(prefix + 1 - prefix % 2, None, 2)
    similarity = grid[:, even] @ grid[:, odd].mT
    if importance is not None:
        costs = _grid((protection * importance).sqrt(), places, images, n)
        similarity -= costs[:, even, None] * costs[:, None, odd]
    if size_cost:
        costs = _grid(size_cost * size.log(), places, images, n)
        similarity -= costs[:, even, None] + costs[:, None, odd]
    score, target = similarity.masked_fill_(~live[:, None, odd], -torch.inf).max(dim=2)
    return score.masked_fill_(~live[:, even], -torch.inf), target


def _of_arrange(
    chosen: Tensor | None, score: Tensor, target: Tensor, offsets: Tensor | None, n: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    place = target.new_empty(target.shape[0], n)
    return place, torch.empty_like(place, dtype=torch.bool), place.new_empty(place.shape[0], dtype=torch.int32)


@_fused(_of_arrange)
def arrange(
    chosen: Tensor | None,
    score: Tensor,
    target: Tensor,
    offsets: Tensor | None,
    n: int,
    prefix: int,
    count: int | None,
    least: float,
    relative: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`adaptvit.methods.merging.arrange`, of images whose tokens are in their first slots.

    Args:
        chosen, score, target: (B, A). Where `chosen` is None, those of A are merged that follow from the numbers.
        offsets: (B + 1,) int32; None where every image has n rows.
        count: so many of an image, those that score highest; None goes by a threshold.
        least: those that score this or more, less `relative` times the image's mean.
    Returns:
        (B, N) where each goes and whether it is merged, and (B,) int32, the tokens that are left of each image.
    """
    images = len(target)
    lengths = score.new_full((images,), n, dtype=torch.int32) if offsets is None else offsets.diff()
    live = torch.arange(n, device=score.device) < lengths[:, None]
    even, odd = slice(prefix + prefix % 2, None, 2), slice(prefix + 1 - prefix % 2, None, 2)
    if chosen is None and count is not None:
        order = score.argsort(dim=1, descending=True, stable=True)
        chosen = (order.argsort(dim=1) < count) & (score != -torch.inf) & live[:, even]
    elif chosen is None:
        there = score > -torch.inf
        mean = score.where(there, 0).sum(dim=1, keepdim=True) / there.sum(dim=1, keepdim=True).clamp(min=1)
        chosen = score - relative * mean >= least
    staying = live[:, even] & ~chosen
    if prefix:
        rank = staying.cumsum(dim=1) - 1
    else:
        order = score.masked_fill(~staying, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
    place = torch.arange(n, device=score.device).repeat(images, 1)
    moved = torch.zeros_like(live)
    moved[:, even] = chosen
    place[:, odd] = prefix + staying.sum(dim=1, keepdim=True) + torch.arange(live[:, odd].shape[1], device=live.device)
    place[:, even] = torch.where(chosen, place[:, odd].gather(1, target), prefix + rank)
    return place, moved, (lengths - chosen.sum(dim=1)).int()


LEAST = 1e-6
"""What a token's importance is at least, so that no mean is without weight."""


def _of_merge(
    x: Tensor,
    at: Tensor | None,
    size: Tensor,
    importance: Tensor | None,
    place: Tensor,
    moved: Tensor,
    offsets: Tensor | None,
    lengths: Tensor | None,
    count: int,
    slots: int,
    keeps_length: bool,
    power: float,
    bias: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, sums = place.new_empty(count), size.new_empty(count)
    left = place.new_empty(place.shape[0] + 1, dtype=torch.int32)
    added = torch.empty_like(sums, dtype=bias)
    return x.new_empty(count, x.shape[1]), rows, sums, added, torch.empty_like(rows), left, torch.empty_like(left)


@_fused(_of_merge)
def merge(
    x: Tensor,
    at: Tensor | None,
    size: Tensor,
    importance: Tensor | None,
    place: Tensor,
    moved: Tensor,
    offsets: Tensor | None,
    lengths: Tensor | None,
    count: int,
    slots: int,
    keeps_length: bool,
    power: float,
    bias: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Tokens.merge`, of images whose tokens are in their first slots.

    Args:
        x, at, size: (T, D), (T,) int64 and (T,) float32; `at` None is the number of a row in its image.
        importance: (T,) float32, by which a token counts in the mean beside its size, `LEAST` where it is less or none.
        place, moved: (B, N).
        offsets: (B + 1,) int32; None where every image has N rows.
        lengths: (B,) int32, the tokens that are left of each image; None is `slots`.
        count: C.
        slots: of an image afterwards.
        keeps_length: a mean is made as long as its parts are in the mean.
        power, bias: of the logarithms, and their type.
    Returns:
        `x` and `at`, the sums of the sizes, 1 of rows that hold nothing, the logarithms of these times `power`, slots,
        and offsets, as they would be with rows enough, and bounded by C.
    """
    images, n = place.shape
    offsets = _starts(offsets, x, n)
    places = _places(offsets, len(x), n)
    inside = places.clamp(max=images * n - 1)
    at = inside % n if at is None else at
    lengths = offsets.new_full((images,), slots) if lengths is None else lengths
    left = torch.cat([offsets.new_zeros(1), lengths.cumsum(0).int()])
    rows = (place + left[:-1, None]).flatten().index_select(0, inside).clamp(max=count)
    rows = rows.masked_fill(places == images * n, count)
    sums = size.new_zeros(count + 1).index_add(0, rows, size)
    weight = size if importance is None else size * importance.where(importance > LEAST, LEAST)
    share = weight / weight.new_zeros(count + 1).index_add(0, rows, weight).index_select(0, rows)
    mean = torch.zeros(count + 1, x.shape[1], device=x.device).index_add(0, rows, x * share[:, None])
    if keeps_length:
        length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        length = length.new_zeros(count + 1).index_add(0, rows, length * share)
        mean = normalize(mean, dim=1) * length[:, None]
    stays = rows.masked_fill(moved.flatten().index_select(0, inside), count)
    held = at.new_zeros(count + 1).index_copy(0, stays, at)[:-1]
    sums = sums[:-1].masked_fill(torch.arange(count, device=x.device) >= left[-1], 1)
    return (
        mean[:-1].to(x.dtype),
        held,
        sums,
        (power * sums.log()).to(bias),
        _places(left, count, slots),
        left,
        left.clamp(max=count),
    )


def _of_best(score: Tensor, slots: Tensor | None, count: int, prefix: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = torch.empty(score.shape[0], prefix + count, dtype=torch.int64, device=score.device)
    sums = torch.empty(score.shape[0], 1, dtype=torch.float32, device=score.device)
    return index, torch.empty_like(index), index.new_empty(score.shape[0], 1), sums


@_fused(_of_best)
def best(score: Tensor, slots: Tensor | None, count: int, prefix: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The places of the first `prefix` rows and of the `count` patches behind them that score highest: ascending.

    Args:
        score: (B, N), or (B, N, 2), whose differences are the scores.
        slots: (B, N) int64; None where they are the places.
    Returns:
        (B, prefix + count) int64, the slots there, the place of the patch of them with the lowest score, (B, 1), and
        the sums of all rows' scores, (B, 1) in float32.
    """
    wide = score.float()
    wide = wide if wide.ndim == 2 else wide[..., 0] - wide[..., 1]
    found = wide[:, prefix:].topk(count, dim=1).indices + prefix
    first = torch.arange(prefix, device=score.device).expand(score.shape[0], -1)
    index = torch.cat([first, found.sort(dim=1).values], dim=1)
    held = index.clone() if slots is None else slots.gather(1, index)
    return index, held, found[:, -1:].clone(), wide.sum(dim=1, keepdim=True)


def _of_take(x: Tensor, index: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*index.shape, x.shape[2])


@_fused(_of_take)
def take(x: Tensor, index: Tensor, score: Tensor | None, last: Tensor | None, prefix: int) -> Tensor:
    """The rows at `index`, (B, n), of `x`, (B, N, D).

    Args:
        score: (B, N); then the row at `last`, (B, 1), is the sum of the patches that are left out, and its own,
            weighted by these; patches are from row `prefix` on.
    """
    found = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    if score is None or last is None:
        return found
    weight = torch.cat([torch.zeros_like(score[:, :prefix]), score[:, prefix:]], dim=1)
    out = weight.scatter(1, index, 0).scatter(1, last, weight.gather(1, last))
    fused = (out[:, None].to(x.dtype) @ x).to(x.dtype)
    return torch.where((index == last)[..., None], fused, found)


def _of_padded(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, queries: Tensor, offsets: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images = offsets.shape[0] - 1
    mask = q.new_empty(images, 1, 1, (n + 7) // 8 * 8)[..., :n]  # aligned, or attention copies it
    of_queries, keys, values = (t.new_empty(images, n, *t.shape[1:]) for t in (q, k, v))
    return of_queries, keys, values, mask


@_fused(_of_padded)
def padded(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, queries: Tensor, offsets: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens of images of different lengths as (B, n, H, d), 0 behind an image's last.

    Args:
        q: (R, H, d).
        k, v: (T, H, d).
        bias: (T,), of the keys; None is 0.
        queries, offsets: (B + 1,) int32, of `q`, and of keys and values.
    Returns:
        `q`, `k`, `v`, and what is added to the logits, (B, 1, 1, n) as precise as `q`: the bias, -inf where there is no
        key, and 0 throughout an image that has none.
    """
    images, places = len(offsets) - 1, _places(offsets, len(k), n)
    of_queries = _grid(q, _places(queries, len(q), n), images, n)
    length = offsets.diff()[:, None]
    hidden = (torch.arange(n, device=k.device) >= length) & (length > 0)
    added = hidden.new_zeros(images, n, dtype=q.dtype) if bias is None else _grid(bias.to(q.dtype), places, images, n)
    mask = _of_padded(q, k, v, bias, queries, offsets, n)[3].copy_(added.masked_fill(hidden, -torch.inf)[:, None, None])
    return of_queries, _grid(k, places, images, n), _grid(v, places, images, n), mask


def width(head_dim: int) -> int:
    """Channels of a head that carries a bias: two more, and as many as flash attention takes, a multiple of 8."""
    return 8 * math.ceil((head_dim + 2) / 8)


def carried(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (T, H, d) whose products have the bias (T,) of the keys in them: (T, H, `width(d)`).

    Two channels of the keys have it, as they round it and what is left, and those of all queries are 1. So it is twice
    as precise as in a mask of their type.
    """
    own, wide = q.shape[-1], width(q.shape[-1])
    bias = bias.to(torch.promote_types(bias.dtype, torch.float32)) / scale
    rounded = bias.to(k.dtype)
    both = torch.stack([rounded, (bias - rounded).to(k.dtype)], dim=-1)[:, None].expand(-1, k.shape[1], -1)
    none = k.new_zeros(()).expand(*k.shape[:-1], wide - own - 2)
    k = torch.cat([k, both, none], dim=-1)
    return pad(q, (0, wide - own), value=1.0), k, pad(v, (0, wide - v.shape[-1]))


def _of_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = width(q.shape[-1])
    queries, keys, values = (t.new_empty(*t.shape[:-1], wide) for t in (q, k, v))
    return queries, keys, values


@_fused(_of_with_bias)
def with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """`carried`, without gradients."""
    return carried(q, k, v, bias, scale)


def _of_unpadded(t: Tensor, offsets: Tensor, rows: int) -> Tensor:
    return t.new_empty(rows, *t.shape[2:])


@_fused(_of_unpadded)
def unpadded(t: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """What `padded` laid out, (B, n, H, d), end to end in so many rows, 0 in those of no image.

    Args:
        offsets: (B + 1,) int32.
    """
    images, n = t.shape[:2]
    places = _places(offsets, rows, n)
    found = t.flatten(0, 1).index_select(0, places.clamp(max=images * n - 1))
    return found.masked_fill((places == images * n)[:, None, None], 0)
