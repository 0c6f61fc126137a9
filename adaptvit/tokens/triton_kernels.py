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

from adaptvit.tokens.fused import LEAST

ROWS = 16
"""Rows that a program copies."""


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
def _copy(source, target, rows, places, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = mask[:, None] & (column < WIDTH)[None]
        values = tl.load(source + rows.to(tl.int64)[:, None] * WIDTH + column[None], mask=inside, other=0)
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
        _copy(x, new_x, row, place, kept, D, BD)
        _copy(other, new_other, row, place, kept, W, BW)
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


def compact(
    chosen: Tensor, slots: Tensor, offsets: Tensor, x: Tensor, other: Tensor, count: int, total: int, by_slot: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    images = len(offsets) - 1
    n = max(1, total // max(1, images))
    x, other = x.contiguous(), other.contiguous()
    width, other_width = (max(1, t[:1].numel()) for t in (x, other))
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
        BY_SLOT=by_slot,
        D=width,
        W=other_width,
        BLOCK=block,
        IMAGES=next_power_of_2(images),
        ROWS=ROWS,
        BD=min(256, next_power_of_2(width)),
        BW=min(256, next_power_of_2(other_width)),
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
    score = 1 / (1 + tl.exp(center - scale * tl.load(state + row, mask=real, other=0.0)))
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
    x, state, remainder, output = (t.contiguous() for t in (x, state, remainder, output))
    new_output, left = torch.empty_like(output), torch.empty_like(remainder)
    going = torch.empty_like(state, dtype=torch.bool)
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
        N=n,
        R=read,
        D=width,
        STAYS=stays,
        BLOCK=next_power_of_2(n),
        BD=min(256, next_power_of_2(width)),
    )
    return new_output, going, left


@triton.jit
def _asks(slots, row, end, BY_SLOT: tl.constexpr, N: tl.constexpr, R: tl.constexpr):
    """1 of a row whose token is in the first R slots, else 0."""
    asks = row < end
    if BY_SLOT:
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
    BY_SLOT: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    ASKED: tl.constexpr,
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
        many += _asks(slots, start + one, end, BY_SLOT, N, R)
    share = 1.0 / tl.maximum(many, 1).to(tl.float32)
    for one in range(0, ASKED):
        if R > 0:
            asked = _asks(slots, start + one, end, BY_SLOT, N, R).to(tl.float32) * share
            at = tl.maximum(tl.minimum(start + one, end - 1), 0).to(tl.int64) * query_stride
            query = tl.load(q + at + head * query_head_stride + column, mask=inside, other=0.0).to(tl.float32) * scale
            query = tl.where(asked > 0, query, 0.0)
        else:
            asked = 1.0
            query = tl.zeros((BD,), tl.float32)
            for first in range(0, N, BN):
                row = start + first + tl.arange(0, BN)
                at = row.to(tl.int64)[:, None] * query_stride + head * query_head_stride + column[None]
                some = tl.load(q + at, mask=(row < end)[:, None] & inside[None], other=0.0).to(tl.float32)
                query += tl.sum(some, axis=0)
            query = query / tl.maximum(end - start, 1).to(tl.float32) * scale
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
            at = out + row.to(tl.int64) * H + head
            if one > 0:
                weight += tl.load(at, mask=row < end, other=0.0)
            tl.store(at, weight, mask=row < end)


def received(q: Tensor, k: Tensor, slots: Tensor | None, offsets: Tensor, n: int, read: int) -> Tensor:
    images, (_, heads, size) = len(offsets) - 1, k.shape
    q, k = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k))
    out = torch.zeros(k.shape[:2], dtype=torch.float32, device=k.device)
    _received[(images, heads)](
        q,
        k,
        offsets if slots is None else slots,
        offsets,
        out,
        size**-0.5,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        BY_SLOT=slots is not None,
        N=n,
        R=read,
        ASKED=max(read, 1),
        H=heads,
        D=size,
        BN=64,
        BD=next_power_of_2(size),
    )
    return out


@triton.jit
def _gated(
    x,
    heads,
    offsets,
    out,
    rows,
    images,
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
    head = image[:, None] * H + (column // (W // H))[None]
    on = tl.load(heads + head, mask=inside & (image < images)[:, None], other=0) != 0
    at = row.to(tl.int64)[:, None] * W + column[None]
    tl.store(out + at, tl.load(x + at, mask=inside & on, other=0.0), mask=inside)


def gated(x: Tensor, heads: Tensor, offsets: Tensor) -> Tensor:
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    (rows, width), (images, count) = x.shape, heads.shape
    size = min(128, next_power_of_2(width))
    _gated[(cdiv(rows, ROWS), cdiv(width, size))](
        x,
        heads.contiguous(),
        offsets,
        out,
        rows,
        images,
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
    _copy(t, out, number, row, row < total, W, BW)


def put(x: Tensor, rows: Tensor, t: Tensor) -> Tensor:
    out, (count, width) = x.clone(memory_format=torch.contiguous_format), t.shape
    if count:
        _put[(cdiv(count, ROWS),)](
            out, rows, t.contiguous(), count, len(x), W=width, ROWS=ROWS, BW=min(256, next_power_of_2(width))
        )
    return out


@triton.jit
def _mean_patch(
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
    start, end = tl.load(offsets + image), tl.load(offsets + image + 1)
    column = tl.program_id(1) * BW + tl.arange(0, BW)
    total, count = tl.zeros((BW,), tl.float32), 0
    for first in range(0, N, BN):
        row = start + first + tl.arange(0, BN)
        patch = (row < end) & (tl.load(slots + row, mask=row < end, other=0) % N >= PREFIX)
        at = row.to(tl.int64)[:, None] * stride + column[None]
        total += tl.sum(tl.load(x + at, mask=patch[:, None] & (column < W)[None], other=0.0).to(tl.float32), axis=0)
        count += tl.sum(patch.to(tl.int32), axis=0)
    mean = (total / tl.maximum(count, 1).to(tl.float32)).to(out.dtype.element_ty)
    for first in range(0, N, BN):
        row = start + first + tl.arange(0, BN)
        at = row.to(tl.int64)[:, None] * W + column[None]
        tl.store(out + at, tl.zeros((BN, BW), mean.dtype) + mean[None], mask=(row < end)[:, None] & (column < W)[None])


def mean_patch(x: Tensor, slots: Tensor, offsets: Tensor, n: int, prefix: int) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    images, width, out = len(offsets) - 1, x.shape[1], torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    size = min(64, next_power_of_2(width))
    _mean_patch[(images, cdiv(width, size))](
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
def _above(score, slots, offsets, chosen, sums, least, N: tl.constexpr, PREFIX: tl.constexpr, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    start, end = tl.load(offsets + image), tl.load(offsets + image + 1)
    row = start + tl.arange(0, BLOCK)
    slot = tl.load(slots + row, mask=row < end, other=0)
    patch = (row < end) & (slot % N >= PREFIX)
    own = tl.load(score + row, mask=row < end, other=0.0)
    logarithm = tl.minimum(own, 0.0) - tl.log(1 + tl.exp(-tl.abs(own)))
    likeliest = tl.max(tl.where(patch, own, -float("inf")), axis=0)
    kept = (row < end) & ((slot % N < PREFIX) | (patch & ((logarithm > least) | (own == likeliest))))
    _write(chosen, kept, slot, start, end, image, N, BLOCK)
    tl.store(sums + image, tl.sum(own, axis=0))


def above(score: Tensor, slots: Tensor, offsets: Tensor, n: int, prefix: int, least: float) -> tuple[Tensor, Tensor]:
    images = len(offsets) - 1
    chosen = torch.empty(images, n, dtype=torch.bool, device=score.device)
    sums = score.new_empty(images, 1)
    _above[(images,)](
        score.contiguous(), slots, offsets, chosen, sums, least, N=n, PREFIX=prefix, BLOCK=next_power_of_2(n)
    )
    return chosen, sums


@triton.jit
def _over_mean(
    received,
    offsets,
    out,
    H: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0)
    start, end = tl.load(offsets + image), tl.load(offsets + image + 1)
    row = start + tl.arange(0, BLOCK)
    mean = tl.zeros((BLOCK,), tl.float32)
    for head in range(0, H):
        mean += tl.load(received + row.to(tl.int64) * H + head, mask=row < end, other=0.0)
    mean = mean / H
    patches = tl.sum(tl.where((row >= start + PREFIX) & (row < end), mean, 0.0), axis=0)
    tl.store(out + row, mean / (patches / (end - start - PREFIX).to(tl.float32)), mask=row < end)


def over_mean(received: Tensor, offsets: Tensor, n: int, prefix: int) -> Tensor:
    images, (rows, heads) = len(offsets) - 1, received.shape
    out = torch.zeros(rows, dtype=received.dtype, device=received.device)
    _over_mean[(images,)](received.contiguous(), offsets, out, H=heads, PREFIX=prefix, BLOCK=next_power_of_2(n))
    return out


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
    D: tl.constexpr,
    PRODUCT: tl.constexpr,
    TOTAL: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    BA: tl.constexpr,
    BB: tl.constexpr,
    BW: tl.constexpr,
):
    image = tl.program_id(0)
    start, end = tl.load(offsets + image), tl.load(offsets + image + 1)
    number = tl.program_id(1) * BA + tl.arange(0, BA)
    a = start + EVEN + 2 * number
    column = tl.arange(0, BW)
    products = tl.zeros((BA,), tl.float32)
    totals = tl.zeros((BA,), tl.float32)
    if PRODUCT:
        products = tl.sqrt(protection * tl.load(importance + a, mask=a < end, other=0.0))
    if TOTAL:
        totals = size_cost * tl.log(tl.load(sizes + a, mask=a < end, other=1.0))
    highest = tl.full((BA,), -float("inf"), tl.float32)
    which = tl.zeros((BA,), tl.int32)
    for first in range(0, (N - ODD + 1) // 2, BB):
        other = first + tl.arange(0, BB)
        b = start + ODD + 2 * other
        alike = tl.zeros((BA, BB), tl.float32)
        for head in range(0, H):
            dot = tl.zeros((BA, BB), tl.float32)
            long = tl.zeros((BA,), tl.float32)
            wide = tl.zeros((BB,), tl.float32)
            for at in range(0, D, BW):
                left = tl.load(
                    keys + a.to(tl.int64)[:, None] * row_stride + head * head_stride + at + column[None],
                    mask=(a < end)[:, None] & (at + column < D)[None],
                    other=0.0,
                ).to(tl.float32)
                right = tl.load(
                    keys + b.to(tl.int64)[None] * row_stride + head * head_stride + at + column[:, None],
                    mask=(b < end)[None] & (at + column < D)[:, None],
                    other=0.0,
                ).to(tl.float32)
                dot += tl.dot(left, right, input_precision="ieee")
                long += tl.sum(left * left, axis=1)
                wide += tl.sum(right * right, axis=0)
            alike += dot / (tl.maximum(tl.sqrt(long), 1e-12)[:, None] * tl.maximum(tl.sqrt(wide), 1e-12)[None])
        alike = alike / H
        if PRODUCT:
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
    offsets: Tensor,
    n: int,
    prefix: int,
    protection: float,
    size_cost: float,
) -> tuple[Tensor, Tensor]:
    images, even, odd = len(offsets) - 1, prefix + prefix % 2, prefix + 1 - prefix % 2
    count = (n - even + 1) // 2
    keys = keys if keys.stride(2) == 1 else keys.contiguous()
    score = torch.empty(images, count, dtype=torch.float32, device=keys.device)
    target = torch.empty_like(score, dtype=torch.int64)
    _match[(images, cdiv(count, 32))](
        keys,
        size if importance is None else importance.contiguous(),
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
        D=keys.shape[2],
        PRODUCT=importance is not None,
        TOTAL=size_cost != 0,
        EVEN=even,
        ODD=odd,
        BA=32,
        BB=32,
        BW=64,
    )
    return score, target


@triton.jit
def _arrange(
    chosen,
    score,
    target,
    offsets,
    place,
    moved,
    A: tl.constexpr,
    N: tl.constexpr,
    PREFIX: tl.constexpr,
    EVEN: tl.constexpr,
    ODD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    image = tl.program_id(0)
    length = tl.load(offsets + image + 1) - tl.load(offsets + image)
    number = tl.arange(0, BLOCK)
    there = number < A
    goes = tl.load(chosen + image * A + number, mask=there, other=0) != 0
    staying = there & (EVEN + 2 * number < length) & (goes == 0)
    stay = tl.sum(staying.to(tl.int32), axis=0)
    if PREFIX > 0:
        rank = tl.cumsum(staying.to(tl.int32), axis=0) - 1
    else:
        own = tl.where(staying, tl.load(score + image * A + number, mask=there, other=0.0), -float("inf"))
        rank = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, A, STEP):
            other = first + tl.arange(0, STEP)
            there_too = other < A
            left = tl.load(chosen + image * A + other, mask=there_too, other=0) != 0
            stays = there_too & (EVEN + 2 * other < length) & (left == 0)
            theirs = tl.where(stays, tl.load(score + image * A + other, mask=there_too, other=0.0), -float("inf"))
            before = (theirs[None] > own[:, None]) | ((theirs[None] == own[:, None]) & (other[None] < number[:, None]))
            rank += tl.sum((before & there_too[None]).to(tl.int32), axis=1)
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


def arrange(
    chosen: Tensor, score: Tensor, target: Tensor, offsets: Tensor, n: int, prefix: int
) -> tuple[Tensor, Tensor]:
    images, count = chosen.shape
    place = target.new_empty(images, n)
    moved = torch.empty_like(place, dtype=torch.bool)
    _arrange[(images,)](
        chosen.contiguous(),
        score.contiguous(),
        target.contiguous(),
        offsets,
        place,
        moved,
        A=count,
        N=n,
        PREFIX=prefix,
        EVEN=prefix + prefix % 2,
        ODD=prefix + 1 - prefix % 2,
        BLOCK=next_power_of_2(max(count, prefix, (n + 1) // 2)),
        STEP=16,
    )
    return place, moved


@triton.jit
def _lengths(moved, offsets, counts, N: tl.constexpr, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    length = tl.load(offsets + image + 1) - tl.load(offsets + image)
    slot = tl.arange(0, BLOCK)
    gone = tl.load(moved + image * N + slot, mask=slot < length, other=1) != 0
    tl.store(counts + image, tl.sum((gone == 0).to(tl.int32), axis=0))


@triton.jit
def _merge(
    x,
    at,
    size,
    importance,
    place,
    moved,
    offsets,
    counts,
    new_x,
    new_at,
    sums,
    new_slots,
    left,
    bounded,
    images,
    count,
    slots,
    total,
    N: tl.constexpr,
    D: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    KEEPS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
    IMAGES: tl.constexpr,
    BD: tl.constexpr,
):
    program = tl.program_id(0)
    image, goal = program // N, program % N
    number = tl.arange(0, IMAGES)
    each = tl.load(counts + number, mask=number < images, other=0)
    column = tl.arange(0, BD)
    if image < images:
        base = tl.sum(tl.where(number < image, each, 0), axis=0)
        mine = tl.sum(tl.where(number == image, each, 0), axis=0)
        start = tl.load(offsets + image)
        length = tl.load(offsets + image + 1) - start
        slot = tl.arange(0, BLOCK)
        here = (slot < length) & (tl.load(place + image * N + slot, mask=slot < length, other=-1) == goal)
        row = base + goal
        if (goal < mine) & (row < count):
            weights = tl.load(size + start + slot, mask=here, other=0.0)
            tl.store(sums + row, tl.sum(weights, axis=0))
            if IMPORTANCE:
                important = tl.load(importance + start + slot, mask=here, other=0.0)
                weights = weights * tl.where(important > LEAST, important, LEAST)
            all_of_it = tl.sum(weights, axis=0)
            stays = here & (tl.load(moved + image * N + slot, mask=here, other=1) == 0)
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
            tl.store(new_at + row, tl.zeros((), tl.int64))
            tl.store(new_slots + row, tl.zeros((), tl.int64) + total)
            nothing = tl.zeros((BD,), dtype=new_x.dtype.element_ty)
            tl.store(new_x + row.to(tl.int64) * D + column, nothing, mask=column < D)


def merge(
    x: Tensor,
    at: Tensor,
    size: Tensor,
    importance: Tensor | None,
    place: Tensor,
    moved: Tensor,
    offsets: Tensor,
    count: int,
    slots: int,
    keeps_length: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, n = place.shape
    new_x, new_at, sums = x.new_empty(count, x.shape[1]), at.new_empty(count), size.new_empty(count)
    new_slots, counts = torch.empty_like(new_at), offsets.new_empty(images)
    left, bounded = torch.empty_like(offsets), torch.empty_like(offsets)
    block = next_power_of_2(n)
    place, moved = place.contiguous(), moved.contiguous()
    _lengths[(images,)](moved, offsets, counts, N=n, BLOCK=block)
    _merge[(images * n + count,)](
        x.contiguous(),
        at.contiguous(),
        size.contiguous(),
        size if importance is None else importance.contiguous(),
        place,
        moved,
        offsets,
        counts,
        new_x,
        new_at,
        sums,
        new_slots,
        left,
        bounded,
        images,
        count,
        slots,
        images * slots,
        N=n,
        D=x.shape[1],
        IMPORTANCE=importance is not None,
        KEEPS=keeps_length,
        LEAST=LEAST,
        BLOCK=block,
        IMAGES=next_power_of_2(images),
        BD=next_power_of_2(x.shape[1]),
    )
    return new_x, new_at, sums, new_slots, left, bounded


@triton.jit
def _best(
    score,
    index,
    last,
    count,
    P: tl.constexpr,
    PREFIX: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    image = tl.program_id(0)
    number = tl.arange(0, BLOCK)
    there = number < P
    own = tl.load(score + image * P + number, mask=there, other=-float("inf")).to(tl.float32)
    own = tl.where(own == own, own, float("inf"))
    rank = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, P, STEP):
        other = first + tl.arange(0, STEP)
        theirs = tl.load(score + image * P + other, mask=other < P, other=-float("inf")).to(tl.float32)
        theirs = tl.where(theirs == theirs, theirs, float("inf"))
        before = (theirs[None] > own[:, None]) | ((theirs[None] == own[:, None]) & (other[None] < number[:, None]))
        rank += tl.sum((before & (other < P)[None]).to(tl.int32), axis=1)
    taken = there & (rank < count)
    at = index + image * (PREFIX + count)
    tl.store(at + PREFIX + tl.cumsum(taken.to(tl.int32), axis=0) - 1, (number + PREFIX).to(tl.int64), mask=taken)
    tl.store(at + number, number.to(tl.int64), mask=number < PREFIX)
    tl.store(last + image, tl.sum(tl.where(there & (rank == count - 1), number + PREFIX, 0), axis=0).to(tl.int64))


def best(score: Tensor, count: int, prefix: int) -> tuple[Tensor, Tensor]:
    images, patches = score.shape
    index = torch.empty(images, prefix + count, dtype=torch.int64, device=score.device)
    last = index.new_empty(images, 1)
    _best[(images,)](
        score.contiguous(),
        index,
        last,
        count,
        P=patches,
        PREFIX=prefix,
        BLOCK=next_power_of_2(max(patches, prefix)),
        STEP=16,
    )
    return index, last


@triton.jit
def _take_fused(
    x,
    score,
    index,
    last,
    out,
    count,
    N: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    image, chunk = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * BD + tl.arange(0, BD)
    fused = tl.load(last + image)
    if chunk > 0:
        number = (chunk - 1) * ROWS + tl.arange(0, ROWS)
        row = tl.load(index + image * count + number, mask=number < count, other=0)
        mask = ((number < count) & (row != fused))[:, None] & (column < D)[None]
        values = tl.load(x + (image * N + row)[:, None] * D + column[None], mask=mask, other=0.0)
        tl.store(out + (image * count + number)[:, None].to(tl.int64) * D + column[None], values, mask=mask)
    else:
        every = tl.arange(0, BK)
        kept = tl.load(index + image * count + every, mask=every < count, other=-1)
        place = tl.sum(tl.where(kept == fused, every, 0), axis=0)
        total = tl.zeros((BD,), tl.float32)
        for first in range(0, N, BN):
            row = first + tl.arange(0, BN)
            stays = tl.sum(((row[:, None] == kept[None]) & (kept != fused)[None]).to(tl.int32), axis=1) > 0
            some = (row >= N - P) & (row < N) & (stays == 0)
            share = tl.load(score + image * P + row - (N - P), mask=some, other=0.0).to(tl.float32)
            values = tl.load(
                x + (image * N + row)[:, None].to(tl.int64) * D + column[None],
                mask=some[:, None] & (column < D)[None],
                other=0.0,
            )
            total += tl.sum(share[:, None] * values.to(tl.float32), axis=0)
        tl.store(
            out + (image * count + place).to(tl.int64) * D + column, total.to(out.dtype.element_ty), mask=column < D
        )


def take_fused(x: Tensor, score: Tensor, index: Tensor, last: Tensor) -> Tensor:
    images, n, width = x.shape
    count = index.shape[1]
    out = x.new_empty(images, count, width)
    size = min(64, next_power_of_2(width))
    _take_fused[(images, 1 + cdiv(count, ROWS), cdiv(width, size))](
        x.contiguous(),
        score.contiguous(),
        index.contiguous(),
        last.contiguous(),
        out,
        count,
        N=n,
        P=score.shape[1],
        D=width,
        ROWS=ROWS,
        BN=16,
        BK=next_power_of_2(count),
        BD=size,
    )
    return out
