"""`adaptvit.tokens.fused` by Triton: the same names, arguments and results.

Letters: B images, N token slots, T rows, C rows that are left, R slots that are read, D channels, H heads, d channels
per head, A and P patches. A program has the mask of all rows of an image, which is a few thousand bits.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from adaptvit.tokens.fused import LEAST, width

ROWS = 16
"""Rows that a program copies."""


@triton.jit
def _bounds(offsets, image, N: tl.constexpr):
    """The first row of an image and the one behind its last; without offsets all have N."""
    if offsets is None:
        start, end = image * N, image * N + N
    else:
        start, end = tl.load(offsets + image), tl.load(offsets + image + 1)
    return start, end


@triton.jit
def _taken(chosen, slots, row, end, total, BY_SLOT: tl.constexpr):
    """Whether rows are chosen, and their slots."""
    slot = tl.load(slots + row, mask=row < end, other=total)
    held = slot < total
    found = tl.load(chosen + (slot if BY_SLOT else row), mask=held, other=0)
    return held & (found != 0), slot


@triton.jit
def _count(chosen, slots, offsets, counts, total, BY_SLOT: tl.constexpr, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    start, end = tl.load(offsets + image), tl.load(offsets + image + 1)
    taken, _ = _taken(chosen, slots, start + tl.arange(0, BLOCK), end, total, BY_SLOT)
    tl.store(counts + image, tl.sum(taken.to(tl.int32), axis=0))


@triton.jit
def _copy(source, target, rows, places, mask, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = mask[:, None] & (column < WIDTH)[None]
        values = tl.load(source + rows.to(tl.int64)[:, None] * stride + column[None], mask=inside, other=0)
        tl.store(target + places.to(tl.int64)[:, None] * WIDTH + column[None], values, mask=inside)


@triton.jit
def _clear(target, places, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = mask[:, None] & (column < WIDTH)[None]
        zeros = tl.zeros((mask.shape[0], BLOCK), dtype=target.dtype.element_ty)
        tl.store(target + places.to(tl.int64)[:, None] * WIDTH + column[None], zeros, mask=inside)


@triton.jit
def _compact(
    chosen,
    slots,
    offsets,
    counts,
    x,
    other,
    left,
    bounded,
    new_slots,
    new_rows,
    new_x,
    new_other,
    images,
    count,
    total,
    chunks,
    x_stride,
    other_stride,
    BY_SLOT: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
    BW: tl.constexpr,
):
    program = tl.program_id(0)
    image, chunk = program // chunks, program % chunks
    number = tl.arange(0, IMAGES)
    each = tl.load(counts + number, mask=number < images, other=0)
    local = tl.arange(0, ROWS)
    if image < images:
        base = tl.sum(tl.where(number < image, each, 0), axis=0)
        start, end = tl.load(offsets + image), tl.load(offsets + image + 1)
        every = tl.arange(0, BLOCK)
        taken, _ = _taken(chosen, slots, start + every, end, total, BY_SLOT)
        before = tl.sum((taken & (every < chunk * ROWS)).to(tl.int32), axis=0)
        row = start + chunk * ROWS + local
        some, slot = _taken(chosen, slots, row, end, total, BY_SLOT)
        place = base + before + tl.cumsum(some.to(tl.int32), axis=0) - 1
        kept = some & (place < count)
        tl.store(new_slots + place, slot, mask=kept)
        tl.store(new_rows + place, row.to(tl.int64), mask=kept)
        _copy(x, new_x, row, place, kept, x_stride, D, BD)
        _copy(other, new_other, row, place, kept, other_stride, W, BW)
        if chunk == 0:
            tl.store(left + image, base)
            tl.store(bounded + image, tl.minimum(base, count))
            if image == images - 1:
                last = base + tl.sum(tl.where(number == image, each, 0), axis=0)
                tl.store(left + images, last)
                tl.store(bounded + images, tl.minimum(last, count))
    else:
        place = (program - images * chunks) * ROWS + local
        empty = (place >= tl.sum(each, axis=0)) & (place < count)
        tl.store(new_slots + place, tl.zeros((ROWS,), tl.int64) + total, mask=empty)
        tl.store(new_rows + place, tl.zeros((ROWS,), tl.int64), mask=empty)
        _clear(new_x, place, empty, D, BD)
        _clear(new_other, place, empty, W, BW)


def _whole(t: Tensor) -> Tensor:
    """(T, ...) whose rows are each in one piece, as they are of queries beside keys."""
    size = 1
    for length, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if length > 1 and stride != size:
            return t.contiguous()
        size *= length
    return t


def compact(
    chosen: Tensor, slots: Tensor, offsets: Tensor, x: Tensor, other: Tensor, count: int, total: int, by_slot: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    images = len(offsets) - 1
    n = max(1, total // max(1, images))
    x, other = _whole(x), _whole(other)
    width, other_width = (math.prod(t.shape[1:]) for t in (x, other))
    chosen, counts = chosen.contiguous(), offsets.new_empty(images)
    left, bounded = torch.empty_like(offsets), torch.empty_like(offsets)
    places, rows = slots.new_empty(count), slots.new_empty(count)
    new_x, new_other = x.new_empty(count, *x.shape[1:]), other.new_empty(count, *other.shape[1:])
    block, chunks = next_power_of_2(n), cdiv(n, ROWS)
    _count[(images,)](chosen, slots, offsets, counts, total, BY_SLOT=by_slot, BLOCK=block)
    _compact[(images * chunks + cdiv(count, ROWS),)](
        chosen,
        slots,
        offsets,
        counts,
        x,
        other,
        left,
        bounded,
        places,
        rows,
        new_x,
        new_other,
        images,
        count,
        total,
        chunks,
        x.stride(0),
        other.stride(0),
        BY_SLOT=by_slot,
        D=width,
        W=other_width,
        BLOCK=block,
        IMAGES=next_power_of_2(images),
        ROWS=ROWS,
        BD=min(256, next_power_of_2(max(1, width))),
        BW=min(256, next_power_of_2(max(1, other_width))),
    )
    return left, bounded, places, rows, new_x, new_other


@triton.jit
def _halt(
    x,
    state,
    remainder,
    output,
    slots,
    offsets,
    new_output,
    going,
    left,
    scale,
    center,
    epsilon,
    state_stride,
    N: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    STAYS: tl.constexpr,
    BLOCK: tl.constexpr,
    BD: tl.constexpr,
):
    image = tl.program_id(0)
    start, end = tl.load(offsets + image), tl.load(offsets + image + 1)
    row = start + tl.arange(0, BLOCK)
    real = row < end
    place = (tl.load(slots + row, mask=real, other=N - 1) % N).to(tl.int32)
    reading = real & (place < R)
    score = 1 / (1 + tl.exp(center - scale * tl.load(state + row * state_stride, mask=real, other=0.0)))
    if STAYS:
        score = tl.where(reading, 0.0, score)
    before = tl.load(remainder + row, mask=real, other=0.0)
    after = before - score
    goes = real & ((after <= epsilon) == 0)
    weight = tl.where(goes, score, before)
    on = tl.sum((goes & reading).to(tl.int32), axis=0) > 0
    tl.store(going + row, goes & on, mask=real)
    tl.store(left + row, after, mask=real)
    for one in range(0, R):
        mine = reading & (place == one)
        there = tl.sum(mine.to(tl.int32), axis=0) > 0
        share = tl.sum(tl.where(mine, weight, 0.0), axis=0)
        which = tl.sum(tl.where(mine, row, 0), axis=0).to(tl.int64)
        for first in range(0, D, BD):
            column = first + tl.arange(0, BD)
            inside = column < D
            at = (image * R + one) * D + column
            value = tl.load(x + which * D + column, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(there, share * value, 0.0)
            tl.store(new_output + at, tl.load(output + at, mask=inside, other=0.0) + value, mask=inside)


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
    x, remainder, output = (t.contiguous() for t in (x, remainder, output))
    new_output, left = torch.empty_like(output), torch.empty_like(remainder)
    going = torch.empty_like(remainder, dtype=torch.bool)
    images, read, width = output.shape
    _halt[(images,)](
        x,
        state,
        remainder,
        output,
        slots,
        offsets,
        new_output,
        going,
        left,
        scale,
        center,
        epsilon,
        state.stride(0),
        N=n,
        R=read,
        D=width,
        STAYS=stays,
        BLOCK=next_power_of_2(n),
        BD=min(256, next_power_of_2(max(1, width))),
    )
    return new_output, going, left


@triton.jit
def _asks(slots, row, end, N: tl.constexpr, R: tl.constexpr):
    """1 of a row whose token is in the first R slots, else 0."""
    asks = row < end
    if slots is not None:
        asks = asks & (tl.load(slots + tl.maximum(tl.minimum(row, end - 1), 0)) % N < R)
    return asks.to(tl.int32)


@triton.jit
def _received(
    q,
    k,
    slots,
    offsets,
    out,
    scale,
    query_stride,
    query_head_stride,
    row_stride,
    head_stride,
    N: tl.constexpr,
    R: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    image, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(offsets + image), tl.load(offsets + image + 1)
    column = tl.arange(0, BD)
    inside = column < D
    many = 0
    for one in range(0, R):
        many += _asks(slots, start + one, end, N, R)
    share = 1.0 / tl.maximum(many, 1).to(tl.float32)
    for one in range(0, R):
        asked = _asks(slots, start + one, end, N, R).to(tl.float32) * share
        at = tl.maximum(tl.minimum(start + one, end - 1), 0).to(tl.int64) * query_stride
        query = tl.load(q + at + head * query_head_stride + column, mask=inside, other=0.0).to(tl.float32) * scale
        query = tl.where(asked > 0, query, 0.0)
        most, total = -float("inf"), 0.0
        for first in range(0, N, BN):
            row = start + first + tl.arange(0, BN)
            keys = tl.load(
                k + row.to(tl.int64)[:, None] * row_stride + head * head_stride + column[None],
                mask=(row < end)[:, None] & inside[None],
                other=0.0,
            ).to(tl.float32)
            logits = tl.where(row < end, tl.sum(keys * query[None], axis=1), -float("inf"))
            now = tl.maximum(most, tl.max(logits, axis=0))
            safe = tl.where(now == -float("inf"), 0.0, now)
            total = total * tl.exp(most - safe) + tl.sum(tl.exp(logits - safe), axis=0)
            most = now
        most = tl.where(total > 0, most, 0.0)
        total = tl.where(total > 0, total, 1.0)
        for first in range(0, N, BN):
            row = start + first + tl.arange(0, BN)
            keys = tl.load(
                k + row.to(tl.int64)[:, None] * row_stride + head * head_stride + column[None],
                mask=(row < end)[:, None] & inside[None],
                other=0.0,
            ).to(tl.float32)
            weight = tl.exp(tl.sum(keys * query[None], axis=1) - most) / total * asked
            place = out + row.to(tl.int64) * H + head
            if one > 0:
                weight += tl.load(place, mask=row < end, other=0.0)
            tl.store(place, weight, mask=row < end)


def received(q: Tensor, k: Tensor, slots: Tensor, offsets: Tensor, n: int, read: int) -> Tensor:
    images, (_, heads, size) = len(offsets) - 1, k.shape
    q, k = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k))
    out = torch.empty(k.shape[:2], dtype=torch.float32, device=k.device)
    _received[(images, heads)](
        q,
        k,
        slots,
        offsets,
        out,
        size**-0.5,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        N=n,
        R=read,
        H=heads,
        D=size,
        BN=64,
        BD=next_power_of_2(size),
    )
    return out


@triton.jit
def _attended(
    q,
    k,
    slots,
    offsets,
    logits,
    out,
    scale,
    query_stride,
    query_head_stride,
    row_stride,
    head_stride,
    N: tl.constexpr,
    R: tl.constexpr,
    ASKED: tl.constexpr,
    PREFIX: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    BD: tl.constexpr,
):
    image = tl.program_id(0)
    start, end = _bounds(offsets, image, N)
    head, column = tl.arange(0, BH), tl.arange(0, BD)
    inside = (head < H)[:, None] & (column < D)[None]
    row = start + tl.arange(0, BLOCK)
    every = row.to(tl.int64)[:, None] * H + head[None]
    there = (row < end)[:, None] & (head < H)[None]
    many = 0
    for one in range(0, R):
        many += _asks(slots, start + one, end, N, R)
    mean = tl.zeros((BLOCK,), tl.float32)
    for one in range(0, ASKED):
        if R > 0:
            asked = _asks(slots, start + one, end, N, R).to(tl.float32) / tl.maximum(many, 1).to(tl.float32)
            asking = q + tl.maximum(tl.minimum(start + one, end - 1), 0).to(tl.int64) * query_stride
            asking += head[:, None] * query_head_stride + column[None]
            query = tl.load(asking, mask=inside, other=0.0).to(tl.float32) * scale
        else:
            asked = 1.0
            query = tl.zeros((BH, BD), tl.float32)
            for first in range(0, N, BN):
                some = start + first + tl.arange(0, BN)
                asking = q + some.to(tl.int64)[:, None, None] * query_stride
                asking += (head[:, None] * query_head_stride + column[None])[None]
                mask = (some < end)[:, None, None] & inside[None]
                query += tl.sum(tl.load(asking, mask=mask, other=0.0).to(tl.float32), axis=0)
            query = query / tl.maximum(end - start, 1).to(tl.float32) * scale
        for first in range(0, N, BN):
            some = start + first + tl.arange(0, BN)
            keys = k + some.to(tl.int64)[:, None, None] * row_stride
            keys += (head[:, None] * head_stride + column[None])[None]
            mask = (some < end)[:, None, None] & inside[None]
            products = tl.sum(tl.load(keys, mask=mask, other=0.0).to(tl.float32) * query[None], axis=2)
            places = logits + some.to(tl.int64)[:, None] * H + head[None]
            tl.store(places, products, mask=(some < end)[:, None] & (head < H)[None])
        tl.debug_barrier()  # other threads have written what is read now
        own = tl.load(logits + every, mask=there, other=-float("inf"))
        most = tl.max(own, axis=0)
        weight = tl.exp(own - tl.where(most == -float("inf"), 0.0, most)[None])
        total = tl.sum(weight, axis=0)
        mean += tl.sum(weight / tl.where(total == 0, 1.0, total)[None], axis=1) * (asked / H)
        tl.debug_barrier()
    if PREFIX is not None:
        patches = tl.sum(tl.where((row >= start + PREFIX) & (row < end), mean, 0.0), axis=0)
        patches = patches / tl.maximum(end - start - PREFIX, 1).to(tl.float32)
        mean = mean / tl.where(patches == 0, 1.0, patches)
    tl.store(out + row, mean, mask=row < end)


def attended(
    q: Tensor, k: Tensor, slots: Tensor | None, offsets: Tensor | None, n: int, read: int, prefix: int | None
) -> Tensor:
    rows, heads, size = k.shape
    images = rows // n if offsets is None else len(offsets) - 1
    q, k = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k))
    logits = torch.empty(rows, heads, dtype=torch.float32, device=k.device)
    out = torch.empty(rows, dtype=torch.float32, device=k.device)
    wide, long = next_power_of_2(heads), next_power_of_2(size)
    _attended[(images,)](
        q,
        k,
        slots,
        offsets,
        logits,
        out,
        size**-0.5,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        N=n,
        R=read,
        ASKED=max(read, 1),
        PREFIX=prefix,
        H=heads,
        D=size,
        BLOCK=next_power_of_2(n),
        BN=max(1, min(64, 8192 // (wide * long))),
        BH=wide,
        BD=long,
        num_warps=8,
    )
    return out


@triton.jit
def _on(x, weight, bias, least, D: tl.constexpr, BD: tl.constexpr):
    """Whether the product of one row is not `least` or less; without weights it is on."""
    if weight is None:
        on = least == least
    else:
        total = tl.zeros((BD,), tl.float32)
        for first in range(0, D, BD):
            column = first + tl.arange(0, BD)
            own = tl.load(x + column, mask=column < D, other=0.0).to(tl.float32)
            total += own * tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
        on = (tl.sum(total, axis=0) + tl.load(bias).to(tl.float32) <= least) == 0
    return on


@triton.jit
def _gates(
    normed,
    state,
    patch,
    patch_bias,
    sublayer,
    sublayer_bias,
    head,
    head_bias,
    patches,
    heads,
    sublayers,
    attended,
    updated,
    stride,
    state_stride,
    patch_least,
    least,
    N: tl.constexpr,
    PREFIX: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
):
    image, place = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    own = state + image.to(tl.int64) * state_stride
    attention = _on(own, sublayer, sublayer_bias, least, D, BD)
    mlp = _on(
        own,
        None if sublayer is None else sublayer + D,
        None if sublayer is None else sublayer_bias + 1,
        least,
        D,
        BD,
    )
    if tl.program_id(1) == 0:
        tl.store(sublayers + 2 * image, attention)
        tl.store(sublayers + 2 * image + 1, mlp)
        for one in range(0, H):
            on = _on(
                own, None if head is None else head + one * D, None if head is None else head_bias + one, least, D, BD
            )
            tl.store(heads + image * H + one, on)
    on = place < N
    if patch is not None:
        total = tl.zeros((ROWS,), tl.float32)
        row = (image * N + place).to(tl.int64)
        for first in range(0, D, BD):
            column = first + tl.arange(0, BD)
            inside = (place < N)[:, None] & (column < D)[None]
            values = tl.load(normed + row[:, None] * stride + column[None], mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(patch + column, mask=column < D, other=0.0).to(tl.float32)
            total += tl.sum(values * weight[None], axis=1)
        on = (place < PREFIX) | ((total + tl.load(patch_bias).to(tl.float32) <= patch_least) == 0)
    at = image * N + place
    tl.store(patches + at - (image + 1) * PREFIX, on, mask=(place >= PREFIX) & (place < N))
    tl.store(attended + at, on & attention, mask=place < N)
    tl.store(updated + at, (on & mlp) if BOTH else ((place < N) & mlp), mask=place < N)


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
    images, width = state.shape
    state = state if state.stride(1) == 1 else state.contiguous()
    normed = normed if normed is None or normed.stride(1) == 1 else normed.contiguous()
    maps = (patch, patch_bias, sublayer, sublayer_bias, head, head_bias)
    patches, on, sublayers, attended, updated = (
        torch.empty(images, width, dtype=torch.bool, device=state.device) for width in (n - prefix, heads, 2, n, n)
    )
    _gates[(images, cdiv(n, ROWS))](
        normed,
        state,
        *(None if t is None else t.contiguous() for t in maps),
        patches,
        on,
        sublayers,
        attended,
        updated,
        0 if normed is None else normed.stride(0),
        state.stride(0),
        patch_least,
        least,
        N=n,
        PREFIX=prefix,
        H=heads,
        D=width,
        BOTH=both,
        ROWS=ROWS,
        BD=min(256, next_power_of_2(width)),
    )
    return patches, on, sublayers, attended, updated


@triton.jit
def _gated(
    x,
    heads,
    offsets,
    out,
    rows,
    images,
    image_stride,
    head_stride,
    W: tl.constexpr,
    H: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BW: tl.constexpr,
):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BW + tl.arange(0, BW)
    number = tl.arange(0, IMAGES)
    ends = tl.load(offsets + 1 + number, mask=number < images, other=rows + 1)
    image = tl.sum((ends[None] <= row[:, None]).to(tl.int32), axis=1)
    inside = (row < rows)[:, None] & (column < W)[None]
    head = image[:, None] * image_stride + (column // (W // H))[None] * head_stride
    on = tl.load(heads + head, mask=inside & (image < images)[:, None], other=0) != 0
    at = row.to(tl.int64)[:, None] * W + column[None]
    tl.store(out + at, tl.load(x + at, mask=inside & on, other=0.0), mask=inside)


def gated(x: Tensor, heads: Tensor, offsets: Tensor) -> Tensor:
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    (rows, width), (images, count) = x.shape, heads.shape
    size = min(128, next_power_of_2(width))
    _gated[(cdiv(rows, ROWS), cdiv(width, size))](
        x,
        heads,
        offsets,
        out,
        rows,
        images,
        heads.stride(0),
        heads.stride(1),
        W=width,
        H=count,
        IMAGES=next_power_of_2(images),
        ROWS=ROWS,
        BW=size,
    )
    return out


@triton.jit
def _put(out, rows, t, count, total, W: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr):
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + number, mask=number < count, other=total)
    _copy(t, out, number, row, row < total, W, W, BW)


def put(x: Tensor, rows: Tensor, t: Tensor) -> Tensor:
    out, (count, width) = x.clone(memory_format=torch.contiguous_format), t.shape
    if count:
        _put[(cdiv(count, ROWS),)](
            out, rows, t.contiguous(), count, len(x), W=width, ROWS=ROWS, BW=min(256, next_power_of_2(width))
        )
    return out


@triton.jit
def _with_mean(
    x,
    slots,
    offsets,
    out,
    stride,
    N: tl.constexpr,
    W: tl.constexpr,
    PREFIX: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    image = tl.program_id(0)
    start, end = _bounds(offsets, image, N)
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    total, count = tl.zeros((BW,), tl.float32), 0
    for first in range(0, N, BN):
        row = start + first + tl.arange(0, BN)
        if slots is None:
            patch = (row < end) & (row >= start + PREFIX)
        else:
            patch = (row < end) & (tl.load(slots + row, mask=row < end, other=0) % N >= PREFIX)
        at = row.to(tl.int64)[:, None] * stride + W + column[None]
        total += tl.sum(tl.load(x + at, mask=patch[:, None] & (column < W)[None], other=0.0).to(tl.float32), axis=0)
        count += tl.sum(patch.to(tl.int32), axis=0)
    mean = (total / tl.maximum(count, 1).to(tl.float32)).to(out.dtype.element_ty)
    for first in range(0, N, BN):
        row = start + first + tl.arange(0, BN)
        inside = (row < end)[:, None] & (column < W)[None]
        own = tl.load(x + row.to(tl.int64)[:, None] * stride + column[None], mask=inside, other=0.0)
        at = out + row.to(tl.int64)[:, None] * (2 * W) + column[None]
        tl.store(at, own, mask=inside)
        tl.store(at + W, tl.zeros((BN, BW), mean.dtype) + mean[None], mask=inside)


def with_mean(x: Tensor, slots: Tensor | None, offsets: Tensor | None, n: int, prefix: int) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    images = len(x) // n if offsets is None else len(offsets) - 1
    width, out = x.shape[1] // 2, torch.empty_like(x, memory_format=torch.contiguous_format)
    size = min(64, next_power_of_2(width))
    _with_mean[(images, cdiv(width, size))](
        x, slots, offsets, out, x.stride(0), N=n, W=width, PREFIX=prefix, BN=64, BW=size
    )
    return out


@triton.jit
def _score(received, v, out, rows, row_stride, head_stride, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0) * 32 + tl.arange(0, 32)
    column = tl.arange(0, BD)
    score = tl.zeros((32,), tl.float32)
    for head in range(0, H):
        at = row.to(tl.int64)[:, None] * row_stride + head * head_stride + column[None]
        value = tl.load(v + at, mask=(row < rows)[:, None] & (column < D)[None], other=0.0).to(tl.float32)
        size = tl.sqrt(tl.sum(value * value, axis=1))
        score += size * tl.load(received + row.to(tl.int64) * H + head, mask=row < rows, other=0.0)
    tl.store(out + row, score, mask=row < rows)


@triton.jit
def _write(chosen, kept, slot, start, end, image, N: tl.constexpr, BLOCK: tl.constexpr):
    """`kept` of the rows of an image into its (N,) slots, which are no others'."""
    place = tl.arange(0, BLOCK)
    tl.store(chosen + image * N + place, place < 0, mask=place < N)
    tl.debug_barrier()
    row = start + place
    tl.store(chosen + slot, kept, mask=row < end)


@triton.jit
def _sample(
    score,
    slots,
    offsets,
    chosen,
    finite,
    points,
    most,
    N: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, number = tl.program_id(0), tl.arange(0, BLOCK)
    start, end = tl.load(offsets + image), tl.load(offsets + image + 1)
    row = start + number
    slot = tl.load(slots + row, mask=row < end, other=0)
    patch = (row < end) & (slot % N >= PREFIX)
    own = tl.where(patch, tl.load(score + row, mask=row < end, other=0.0), 0.0)
    total = tl.sum(own, axis=0)
    patches = tl.sum(patch.to(tl.int32), axis=0)
    sound = (total >= 0) & (total < float("inf")) & (patches > 0)
    by_score = (total > 0) & sound
    alike = patch.to(tl.float32) / tl.maximum(patches, 1).to(tl.float32)
    share = tl.where(by_score, own / tl.where(by_score, total, 1.0), alike)
    below = tl.minimum(tl.floor(tl.cumsum(share, axis=0) * points + 0.5), most)
    before = tl.where(number > 0, tl.gather(below, tl.maximum(number - 1, 0), 0), 0.0)
    kept = (row < end) & ((slot % N < PREFIX) | (patch & (below > before)))
    _write(chosen, kept, slot, start, end, image, N, BLOCK)
    tl.store(finite + image, sound)


def sample(
    received: Tensor, v: Tensor, slots: Tensor, offsets: Tensor, n: int, prefix: int, points: float
) -> tuple[Tensor, Tensor]:
    images, (rows, heads, size) = len(offsets) - 1, v.shape
    v = v if v.stride(2) == 1 else v.contiguous()
    score = torch.empty(rows, dtype=torch.float32, device=v.device)
    chosen = torch.empty(images, n, dtype=torch.bool, device=v.device)
    finite = chosen.new_empty(images, 1)
    _score[(cdiv(rows, 32),)](
        received.contiguous(), v, score, rows, v.stride(0), v.stride(1), H=heads, D=size, BD=next_power_of_2(size)
    )
    _sample[(images,)](
        score,
        slots,
        offsets,
        chosen,
        finite,
        float(points),
        float(math.ceil(points - 0.5)),
        N=n,
        PREFIX=prefix,
        BLOCK=next_power_of_2(n),
    )
    return chosen, finite


@triton.jit
def _above(logits, slots, offsets, chosen, sums, least, N: tl.constexpr, PREFIX: tl.constexpr, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    start, end = tl.load(offsets + image), tl.load(offsets + image + 1)
    row = start + tl.arange(0, BLOCK)
    slot = tl.load(slots + row, mask=row < end, other=0)
    patch = (row < end) & (slot % N >= PREFIX)
    own = tl.load(logits + 2 * row, mask=row < end, other=0.0).to(tl.float32)
    own -= tl.load(logits + 2 * row + 1, mask=row < end, other=0.0).to(tl.float32)
    logarithm = tl.minimum(own, 0.0) - tl.log(1 + tl.exp(-tl.abs(own)))
    likeliest = tl.max(tl.where(patch, own, -float("inf")), axis=0)
    kept = (row < end) & ((slot % N < PREFIX) | (patch & ((logarithm > least) | (own == likeliest))))
    _write(chosen, kept, slot, start, end, image, N, BLOCK)
    tl.store(sums + image, tl.sum(own, axis=0))


def above(logits: Tensor, slots: Tensor, offsets: Tensor, n: int, prefix: int, least: float) -> tuple[Tensor, Tensor]:
    images = len(offsets) - 1
    chosen = torch.empty(images, n, dtype=torch.bool, device=logits.device)
    sums = torch.empty(images, 1, dtype=torch.float32, device=logits.device)
    _above[(images,)](
        logits.contiguous(), slots, offsets, chosen, sums, least, N=n, PREFIX=prefix, BLOCK=next_power_of_2(n)
    )
    return chosen, sums


@triton.jit
def _match(
    keys,
    importance,
    sizes,
    offsets,
    score,
    target,
    row_stride,
    head_stride,
    protection,
    size_cost,
    A: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    EACH: tl.constexpr,
    D: tl.constexpr,
    TOTAL: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    BA: tl.constexpr,
    BB: tl.constexpr,
    BW: tl.constexpr,
):
    image = tl.program_id(0)
    start, end = _bounds(offsets, image, N)
    number = tl.program_id(1) * BA + tl.arange(0, BA)
    a = start + EVEN + 2 * number
    column = tl.arange(0, BW)
    products = tl.zeros((BA,), tl.float32)
    totals = tl.zeros((BA,), tl.float32)
    if importance is not None:
        products = tl.sqrt(protection * tl.load(importance + a, mask=a < end, other=0.0))
    if TOTAL:
        totals = size_cost * tl.log(tl.load(sizes + a, mask=a < end, other=1.0))
    highest = tl.full((BA,), -float("inf"), tl.float32)
    which = tl.zeros((BA,), tl.int32)
    for first in range(0, (N - ODD + 1) // 2, BB):
        other = first + tl.arange(0, BB)
        b = start + ODD + 2 * other
        alike = tl.zeros((BA, BB), tl.float32)
        for first_head in range(0, H, EACH):
            dot = tl.zeros((BA, BB), tl.float32)
            long = tl.zeros((BA,), tl.float32)
            wide = tl.zeros((BB,), tl.float32)
            for at in range(0, D, BW):
                left = tl.zeros((BA, BW), tl.float32)
                right = tl.zeros((BW, BB), tl.float32)
                for head in range(first_head, first_head + EACH):
                    left += tl.load(
                        keys + a.to(tl.int64)[:, None] * row_stride + head * head_stride + at + column[None],
                        mask=(a < end)[:, None] & (at + column < D)[None],
                        other=0.0,
                    ).to(tl.float32)
                    right += tl.load(
                        keys + b.to(tl.int64)[None] * row_stride + head * head_stride + at + column[:, None],
                        mask=(b < end)[None] & (at + column < D)[:, None],
                        other=0.0,
                    ).to(tl.float32)
                left, right = left / EACH, right / EACH
                dot += tl.dot(left, right, input_precision="ieee")
                long += tl.sum(left * left, axis=1)
                wide += tl.sum(right * right, axis=0)
            alike += dot / (tl.maximum(tl.sqrt(long), 1e-12)[:, None] * tl.maximum(tl.sqrt(wide), 1e-12)[None])
        alike = alike / (H // EACH)
        if importance is not None:
            others = tl.sqrt(protection * tl.load(importance + b, mask=b < end, other=0.0))
            alike -= products[:, None] * others[None]
        if TOTAL:
            alike -= totals[:, None] + size_cost * tl.log(tl.load(sizes + b, mask=b < end, other=1.0))[None]
        alike = tl.where((b < end)[None], alike, -float("inf"))
        most = tl.max(alike, axis=1)
        found = first + tl.argmax(alike, axis=1)
        which = tl.where(most > highest, found, which)
        highest = tl.maximum(highest, most)
    highest = tl.where(a < end, highest, -float("inf"))
    tl.store(score + image * A + number, highest, mask=number < A)
    tl.store(target + image * A + number, which.to(tl.int64), mask=number < A)


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
    images = len(keys) // n if offsets is None else len(offsets) - 1
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    count = (n - even + 1) // 2
    keys = keys if keys.stride(2) == 1 else keys.contiguous()
    score = torch.empty(images, count, dtype=torch.float32, device=keys.device)
    target = torch.empty_like(score, dtype=torch.int64)
    _match[(images, cdiv(count, 32))](
        keys,
        None if importance is None else importance.contiguous(),
        size.contiguous(),
        offsets,
        score,
        target,
        keys.stride(0),
        keys.stride(1),
        protection,
        size_cost,
        A=count,
        N=n,
        H=keys.shape[1],
        EACH=keys.shape[1] if mean_key else 1,
        D=keys.shape[2],
        TOTAL=size_cost != 0,
        EVEN=even,
        ODD=odd,
        BA=32,
        BB=32,
        BW=64,
    )
    return score, target


@triton.jit
def _score_at(chosen, score, at, mask, COUNT: tl.constexpr):
    """What tokens of A are ranked by: those already chosen last, what is no number first where they are counted."""
    own = tl.load(score + at, mask=mask, other=-float("inf"))
    own = tl.where(own == own, own, -float("inf") if COUNT is None else float("inf"))
    if chosen is not None:
        own = tl.where(tl.load(chosen + at, mask=mask, other=0) != 0, -float("inf"), own)
    return own


@triton.jit
def _arrange(
    chosen,
    score,
    target,
    offsets,
    place,
    moved,
    lengths,
    least,
    relative,
    COUNT: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
    PREFIX: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    image = tl.program_id(0)
    start, end = _bounds(offsets, image, N)
    length = end - start
    number = tl.arange(0, BLOCK)
    there = number < A
    live = there & (EVEN + 2 * number < length)
    rank = tl.zeros((BLOCK,), tl.int32)
    if PREFIX == 0 or COUNT is not None:
        own = _score_at(chosen, score, image * A + number, there, COUNT)
        for first in range(0, A, STEP):
            other = first + tl.arange(0, STEP)
            counts = other < A
            theirs = _score_at(chosen, score, image * A + other, counts, COUNT)
            if chosen is not None:
                counts = counts & (tl.load(chosen + image * A + other, mask=counts, other=1) == 0)
            before = (theirs[None] > own[:, None]) | ((theirs[None] == own[:, None]) & (other[None] < number[:, None]))
            rank += tl.sum((before & counts[None]).to(tl.int32), axis=1)
    if chosen is not None:
        goes = tl.load(chosen + image * A + number, mask=there, other=0) != 0
    elif COUNT is not None:
        goes = live & (rank < COUNT) & (own > -float("inf"))
    else:
        raw = tl.load(score + image * A + number, mask=there, other=-float("inf"))
        known = raw > -float("inf")
        mean = tl.sum(tl.where(known, raw, 0.0), axis=0) / tl.maximum(tl.sum(known.to(tl.int32), axis=0), 1)
        goes = live & (raw - relative * mean >= least)
    gone = tl.sum(goes.to(tl.int32), axis=0)
    staying = live & (goes == 0)
    stay = tl.sum(staying.to(tl.int32), axis=0)
    if PREFIX > 0:
        rank = tl.cumsum(staying.to(tl.int32), axis=0) - 1
    elif chosen is None:  # those that go are the first
        rank -= gone
    into = tl.load(target + image * A + number, mask=there, other=0).to(tl.int32)
    at = image * N + EVEN + 2 * number
    even = there & (EVEN + 2 * number < N)
    tl.store(place + at, tl.where(goes, PREFIX + stay + into, PREFIX + rank).to(tl.int64), mask=even)
    tl.store(moved + at, goes, mask=even)
    odd = ODD + 2 * number < N
    tl.store(place + image * N + ODD + 2 * number, (PREFIX + stay + number).to(tl.int64), mask=odd)
    tl.store(moved + image * N + ODD + 2 * number, number < 0, mask=odd)
    tl.store(place + image * N + number, number.to(tl.int64), mask=number < PREFIX)
    tl.store(moved + image * N + number, number < 0, mask=number < PREFIX)
    tl.store(lengths + image, length - gone)


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
    images, of = target.shape
    place = target.new_empty(images, n)
    moved = torch.empty_like(place, dtype=torch.bool)
    lengths = place.new_empty(images, dtype=torch.int32)
    _arrange[(images,)](
        None if chosen is None else chosen.contiguous(),
        score.contiguous(),
        target.contiguous(),
        offsets,
        place,
        moved,
        lengths,
        float(least),
        float(relative),
        COUNT=count,
        A=of,
        N=n,
        PREFIX=prefix,
        EVEN=prefix + prefix % 2,
        ODD=prefix + 1 - prefix % 2,
        BLOCK=next_power_of_2(max(of, prefix, (n + 1) // 2)),
        STEP=16,
    )
    return place, moved, lengths


@triton.jit
def _merge(
    x,
    at,
    size,
    importance,
    place,
    moved,
    offsets,
    lengths,
    new_x,
    new_at,
    sums,
    added,
    new_slots,
    left,
    bounded,
    images,
    count,
    slots,
    total,
    power,
    N: tl.constexpr,
    D: tl.constexpr,
    KEEPS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
    IMAGES: tl.constexpr,
    BD: tl.constexpr,
):
    program = tl.program_id(0)
    image, goal = program // N, program % N
    number = tl.arange(0, IMAGES)
    if lengths is None:
        each = tl.where(number < images, slots, 0)
    else:
        each = tl.load(lengths + number, mask=number < images, other=0)
    column = tl.arange(0, BD)
    if image < images:
        base = tl.sum(tl.where(number < image, each, 0), axis=0)
        mine = tl.sum(tl.where(number == image, each, 0), axis=0)
        start, end = _bounds(offsets, image, N)
        slot = tl.arange(0, BLOCK)
        here = slot < end - start
        here = here & (tl.load(place + image * N + slot, mask=here, other=-1) == goal)
        row = base + goal
        if (goal < mine) & (row < count):
            weights = tl.load(size + start + slot, mask=here, other=0.0)
            patches = tl.sum(weights, axis=0)
            tl.store(sums + row, patches)
            tl.store(added + row, (power * tl.log(patches)).to(added.dtype.element_ty))
            if importance is not None:
                important = tl.load(importance + start + slot, mask=here, other=0.0)
                weights = weights * tl.where(important > LEAST, important, LEAST)
            all_of_it = tl.sum(weights, axis=0)
            stays = here & (tl.load(moved + image * N + slot, mask=here, other=1) == 0)
            if at is None:
                own = tl.sum(tl.where(stays, slot, 0), axis=0).to(tl.int64)
            else:
                own = tl.sum(tl.where(stays, tl.load(at + start + slot, mask=stays, other=0), 0), axis=0)
            tl.store(new_at + row, own)
            tl.store(new_slots + row, (image * slots + goal).to(tl.int64))
            mean = tl.zeros((BD,), tl.float32)
            length = 0.0
            for _ in range(0, tl.sum(here.to(tl.int32), axis=0)):
                one = tl.min(tl.where(here, slot, BLOCK), axis=0)
                share = tl.sum(tl.where(slot == one, weights, 0.0), axis=0) / all_of_it
                source = x + (start + one).to(tl.int64) * D + column
                part = tl.load(source, mask=column < D, other=0.0).to(tl.float32)
                mean += share * part
                if KEEPS:
                    length += share * tl.sqrt(tl.sum(part * part, axis=0))
                here = here & (slot != one)
            if KEEPS:
                mean = mean / tl.maximum(tl.sqrt(tl.sum(mean * mean, axis=0)), 1e-12) * length
            tl.store(new_x + row.to(tl.int64) * D + column, mean.to(new_x.dtype.element_ty), mask=column < D)
        if goal == 0:
            tl.store(left + image, base)
            tl.store(bounded + image, tl.minimum(base, count))
            if image == images - 1:
                tl.store(left + images, base + mine)
                tl.store(bounded + images, tl.minimum(base + mine, count))
    else:
        row = program - images * N
        if row >= tl.sum(each, axis=0):
            tl.store(sums + row, 1.0)
            tl.store(added + row, tl.zeros((), added.dtype.element_ty))
            tl.store(new_at + row, tl.zeros((), tl.int64))
            tl.store(new_slots + row, tl.zeros((), tl.int64) + total)
            nothing = tl.zeros((BD,), dtype=new_x.dtype.element_ty)
            tl.store(new_x + row.to(tl.int64) * D + column, nothing, mask=column < D)


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
    images, n = place.shape
    new_x, new_at, sums = x.new_empty(count, x.shape[1]), place.new_empty(count), size.new_empty(count)
    new_slots, added = torch.empty_like(new_at), torch.empty_like(sums, dtype=bias)
    left = place.new_empty(images + 1, dtype=torch.int32)
    bounded = torch.empty_like(left)
    _merge[(images * n + (0 if lengths is None else count),)](
        x.contiguous(),
        None if at is None else at.contiguous(),
        size.contiguous(),
        None if importance is None else importance.contiguous(),
        place.contiguous(),
        moved.contiguous(),
        offsets,
        lengths,
        new_x,
        new_at,
        sums,
        added,
        new_slots,
        left,
        bounded,
        images,
        count,
        slots,
        images * slots,
        float(power),
        N=n,
        D=x.shape[1],
        KEEPS=keeps_length,
        LEAST=LEAST,
        BLOCK=next_power_of_2(n),
        IMAGES=next_power_of_2(images),
        BD=next_power_of_2(x.shape[1]),
    )
    return new_x, new_at, sums, added, new_slots, left, bounded


@triton.jit
def _score_of(score, number, stride, mask, PAIRS: tl.constexpr):
    """A row's score, or the difference of two."""
    own = tl.load(score + number * stride, mask=mask, other=-float("inf")).to(tl.float32)
    if PAIRS:
        own -= tl.load(score + number * stride + 1, mask=mask, other=0.0).to(tl.float32)
    return own


@triton.jit
def _best(
    score,
    slots,
    index,
    held,
    last,
    sums,
    stride,
    count,
    N: tl.constexpr,
    PREFIX: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    image = tl.program_id(0)
    score += image * N * stride
    number = tl.arange(0, BLOCK)
    patch = (number >= PREFIX) & (number < N)
    raw = _score_of(score, number, stride, number < N, PAIRS)
    tl.store(sums + image, tl.sum(tl.where(number < N, raw, 0.0), axis=0))
    own = tl.where(raw == raw, raw, float("inf"))
    rank = tl.zeros((BLOCK,), tl.int32)
    for first in range(PREFIX, N, STEP):
        other = first + tl.arange(0, STEP)
        theirs = _score_of(score, other, stride, other < N, PAIRS)
        theirs = tl.where(theirs == theirs, theirs, float("inf"))
        before = (theirs[None] > own[:, None]) | ((theirs[None] == own[:, None]) & (other[None] < number[:, None]))
        rank += tl.sum((before & (other < N)[None]).to(tl.int32), axis=1)
    taken = (number < PREFIX) | (patch & (rank < count))
    at = image * (PREFIX + count) + tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(index + at, number.to(tl.int64), mask=taken)
    slot = number.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + image * N + number, mask=taken, other=0)
    tl.store(held + at, slot, mask=taken)
    tl.store(last + image, tl.sum(tl.where(patch & (rank == count - 1), number, 0), axis=0).to(tl.int64))


def best(score: Tensor, slots: Tensor | None, count: int, prefix: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, n = score.shape[:2]
    index = torch.empty(images, prefix + count, dtype=torch.int64, device=score.device)
    held, last = torch.empty_like(index), index.new_empty(images, 1)
    sums = torch.empty(images, 1, dtype=torch.float32, device=score.device)
    _best[(images,)](
        score.contiguous(),
        None if slots is None else slots.contiguous(),
        index,
        held,
        last,
        sums,
        score.ndim - 1,
        count,
        N=n,
        PREFIX=prefix,
        PAIRS=score.ndim == 3,
        BLOCK=next_power_of_2(n),
        STEP=16,
    )
    return index, held, last, sums


@triton.jit
def _take(
    x,
    index,
    score,
    last,
    out,
    count,
    N: tl.constexpr,
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    image, chunk = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * BD + tl.arange(0, BD)
    if chunk * ROWS < count:
        number = chunk * ROWS + tl.arange(0, ROWS)
        row = tl.load(index + image * count + number, mask=number < count, other=0)
        inside = number < count
        if score is not None:
            inside = inside & (row != tl.load(last + image))
        mask = inside[:, None] & (column < D)[None]
        values = tl.load(x + (image * N + row)[:, None] * D + column[None], mask=mask, other=0.0)
        tl.store(out + (image * count + number)[:, None].to(tl.int64) * D + column[None], values, mask=mask)
    elif score is not None:
        fused = tl.load(last + image)
        every = tl.arange(0, BK)
        kept = tl.load(index + image * count + every, mask=every < count, other=-1)
        place = tl.sum(tl.where(kept == fused, every, 0), axis=0)
        total = tl.zeros((BD,), tl.float32)
        for first in range(0, N, BN):
            row = first + tl.arange(0, BN)
            stays = tl.sum(((row[:, None] == kept[None]) & (kept != fused)[None]).to(tl.int32), axis=1) > 0
            some = (row >= PREFIX) & (row < N) & (stays == 0)
            share = tl.load(score + image * N + row, mask=some, other=0.0).to(tl.float32)
            values = tl.load(
                x + (image * N + row)[:, None].to(tl.int64) * D + column[None],
                mask=some[:, None] & (column < D)[None],
                other=0.0,
            )
            total += tl.sum(share[:, None] * values.to(tl.float32), axis=0)
        tl.store(
            out + (image * count + place).to(tl.int64) * D + column, total.to(out.dtype.element_ty), mask=column < D
        )


def take(x: Tensor, index: Tensor, score: Tensor | None, last: Tensor | None, prefix: int) -> Tensor:
    images, n, width = x.shape
    count = index.shape[1]
    out = x.new_empty(images, count, width)
    size = min(64, next_power_of_2(width))
    _take[(images, cdiv(count, ROWS) + (score is not None), cdiv(width, size))](
        x.contiguous(),
        index.contiguous(),
        None if score is None else score.contiguous(),
        None if last is None else last.contiguous(),
        out,
        count,
        N=n,
        PREFIX=prefix,
        D=width,
        ROWS=ROWS,
        BN=16,
        BK=next_power_of_2(count),
        BD=size,
    )
    return out


@triton.jit
def _lay(source, target, rows, places, there, inside, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows into places of `target`, 0 where nothing is `there`."""
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        within = (column < WIDTH)[None]
        at = source + rows.to(tl.int64)[:, None] * stride + column[None]
        values = tl.load(at, mask=there[:, None] & within, other=0.0)
        tl.store(target + places.to(tl.int64)[:, None] * WIDTH + column[None], values, mask=inside[:, None] & within)


@triton.jit
def _padded(
    q,
    k,
    v,
    bias,
    queries,
    offsets,
    new_q,
    new_k,
    new_v,
    mask,
    q_stride,
    k_stride,
    v_stride,
    mask_stride,
    N: tl.constexpr,
    W: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BW: tl.constexpr,
):
    image, place = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside, at = place < N, image * N + place
    start, end = tl.load(queries + image), tl.load(queries + image + 1)
    _lay(q, new_q, start + place, at, start + place < end, inside, q_stride, W, BW)
    start, end = tl.load(offsets + image), tl.load(offsets + image + 1)
    there = start + place < end
    _lay(k, new_k, start + place, at, there, inside, k_stride, W, BW)
    _lay(v, new_v, start + place, at, there, inside, v_stride, V, BW)
    added = tl.zeros((ROWS,), tl.float32)
    if bias is not None:
        added = tl.load(bias + start + place, mask=there, other=0.0).to(tl.float32)
    added = tl.where(there | (start == end), added, -float("inf"))
    tl.store(mask + image * mask_stride + place, added.to(mask.dtype.element_ty), mask=inside)


def padded(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, queries: Tensor, offsets: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, (q, k, v) = len(offsets) - 1, (_whole(t) for t in (q, k, v))
    new_q, new_k, new_v = (t.new_empty(images, n, *t.shape[1:]) for t in (q, k, v))
    mask = q.new_empty(images, 1, 1, (n + 7) // 8 * 8)[..., :n]
    _padded[(images, cdiv(n, ROWS))](
        q,
        k,
        v,
        None if bias is None else bias.contiguous(),
        queries,
        offsets,
        new_q,
        new_k,
        new_v,
        mask,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        mask.stride(0),
        N=n,
        W=q.shape[1] * q.shape[2],
        V=v.shape[1] * v.shape[2],
        ROWS=ROWS,
        BW=min(256, next_power_of_2(q.shape[1] * q.shape[2])),
    )
    return new_q, new_k, new_v, mask


@triton.jit
def _lines(t, row, head, mask, stride, head_stride, D: tl.constexpr, BW: tl.constexpr):
    """Heads of rows, and 0 behind their channels."""
    column = tl.arange(0, BW)
    at = row.to(tl.int64)[:, None] * stride + head[:, None] * head_stride + column[None]
    return tl.load(t + at, mask=mask[:, None] & (column < D)[None], other=0.0)


@triton.jit
def _with_bias(
    q,
    k,
    v,
    bias,
    new_q,
    new_k,
    new_v,
    queries,
    rows,
    scale,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    LINES: tl.constexpr,
    BW: tl.constexpr,
):
    line, column = tl.program_id(0) * LINES + tl.arange(0, LINES), tl.arange(0, BW)
    row, head = line // H, line % H
    at = line.to(tl.int64)[:, None] * W + column[None]
    within = (column < W)[None]
    one = tl.full((LINES,), 1.0, tl.float32)
    mask = row < queries
    values = _lines(q, row, head, mask, q_stride, q_head_stride, D, BW)
    values = tl.where((column >= D)[None], one[:, None].to(values.dtype), values)
    tl.store(new_q + at, values, mask=mask[:, None] & within)
    mask = row < rows
    added = tl.load(bias + row, mask=mask, other=0.0).to(tl.float32) / scale
    values = _lines(k, row, head, mask, k_stride, k_head_stride, D, BW)
    rounded = added.to(values.dtype)
    values = tl.where((column == D)[None], rounded[:, None], values)
    values = tl.where((column == D + 1)[None], (added - rounded.to(tl.float32)).to(values.dtype)[:, None], values)
    tl.store(new_k + at, values, mask=mask[:, None] & within)
    values = _lines(v, row, head, mask, v_stride, v_head_stride, V, BW)
    tl.store(new_v + at, values, mask=mask[:, None] & within)


def with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    wide, heads = width(q.shape[2]), q.shape[1]
    new_q, new_k, new_v = (t.new_empty(*t.shape[:2], wide) for t in (q, k, v))
    _with_bias[(cdiv(max(len(q), len(k)) * heads, 2 * ROWS),)](
        q,
        k,
        v,
        bias.contiguous(),
        new_q,
        new_k,
        new_v,
        len(q),
        len(k),
        scale,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        H=heads,
        D=q.shape[2],
        V=v.shape[2],
        W=wide,
        LINES=2 * ROWS,
        BW=next_power_of_2(wide),
    )
    return new_q, new_k, new_v


@triton.jit
def _unpadded(
    t,
    offsets,
    out,
    rows,
    images,
    offsets_stride,
    image_stride,
    stride,
    head_stride,
    W: tl.constexpr,
    D: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BW: tl.constexpr,
):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BW + tl.arange(0, BW)
    number = tl.arange(0, IMAGES)
    ends = tl.load(offsets + (1 + number) * offsets_stride, mask=number < images, other=rows + 1)
    image = tl.sum((ends[None] <= row[:, None]).to(tl.int32), axis=1)
    there = (row < rows) & (image < images)
    place = row - tl.load(offsets + image * offsets_stride, mask=there, other=0)
    at = image.to(tl.int64) * image_stride + place.to(tl.int64) * stride
    at = t + at[:, None] + (column // D * head_stride + column % D)[None]
    values = tl.load(at, mask=there[:, None] & (column < W)[None], other=0.0)
    tl.store(
        out + row.to(tl.int64)[:, None] * W + column[None], values, mask=(row < rows)[:, None] & (column < W)[None]
    )


def unpadded(t: Tensor, offsets: Tensor, rows: int) -> Tensor:
    t = t if t.stride(3) == 1 else t.contiguous()
    images, _, heads, size = t.shape
    out, block = t.new_empty(rows, heads, size), min(128, next_power_of_2(heads * size))
    _unpadded[(cdiv(rows, ROWS), cdiv(heads * size, block))](
        t,
        offsets,
        out,
        rows,
        images,
        offsets.stride(0),
        t.stride(0),
        t.stride(1),
        t.stride(2),
        W=heads * size,
        D=size,
        IMAGES=next_power_of_2(images),
        ROWS=ROWS,
        BW=block,
    )
    return out
