"""`adaptvit.tokens.fused` by Triton: the same names, arguments and results.

Letters: B images, N token slots, T rows, C rows that are left, R slots that are read, D channels, H heads, d channels
per head, A and P patches. A program has the mask of all rows of an image, which is a few thousand bits.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from adaptvit.tokens.fused import LEAST

ROWS = 16
"""Rows that a program copies."""


@triton.jit
def _count(chosen, slots, offsets, counts, total, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    start, end = tl.load(offsets + image), tl.load(offsets + image + 1)
    row = start + tl.arange(0, BLOCK)
    taken = (tl.load(chosen + row, mask=row < end, other=0) != 0) & (
        tl.load(slots + row, mask=row < end, other=total) < total
    )
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
    new_slots,
    new_rows,
    new_x,
    new_other,
    images,
    count,
    total,
    chunks,
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
        taken = (tl.load(chosen + start + every, mask=start + every < end, other=0) != 0) & (
            tl.load(slots + start + every, mask=start + every < end, other=total) < total
        )
        before = tl.sum((taken & (every < chunk * ROWS)).to(tl.int32), axis=0)
        row = start + chunk * ROWS + local
        slot = tl.load(slots + row, mask=row < end, other=total)
        some = (tl.load(chosen + row, mask=row < end, other=0) != 0) & (slot < total)
        place = base + before + tl.cumsum(some.to(tl.int32), axis=0) - 1
        kept = some & (place < count)
        tl.store(new_slots + place, slot, mask=kept)
        tl.store(new_rows + place, row.to(tl.int64), mask=kept)
        _copy(x, new_x, row, place, kept, D, BD)
        _copy(other, new_other, row, place, kept, W, BW)
        if chunk == 0:
            tl.store(left + image, base)
            if image == images - 1:
                tl.store(left + images, base + tl.sum(tl.where(number == image, each, 0), axis=0))
    else:
        place = (program - images * chunks) * ROWS + local
        empty = (place >= tl.sum(each, axis=0)) & (place < count)
        tl.store(new_slots + place, tl.zeros((ROWS,), tl.int64) + total, mask=empty)
        tl.store(new_rows + place, tl.zeros((ROWS,), tl.int64), mask=empty)
        _clear(new_x, place, empty, D, BD)
        _clear(new_other, place, empty, W, BW)


def compact(
    chosen: Tensor, slots: Tensor, offsets: Tensor, x: Tensor, other: Tensor, count: int, total: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images = len(offsets) - 1
    n = max(1, total // max(1, images))
    x, other = x.contiguous(), other.contiguous()
    width, other_width = (max(1, t[:1].numel()) for t in (x, other))
    counts, left = offsets.new_empty(images), torch.empty_like(offsets)
    places, rows = slots.new_empty(count), slots.new_empty(count)
    new_x, new_other = x.new_empty(count, *x.shape[1:]), other.new_empty(count, *other.shape[1:])
    block, chunks = next_power_of_2(n), cdiv(n, ROWS)
    _count[(images,)](chosen, slots, offsets, counts, total, BLOCK=block)
    _compact[(images * chunks + cdiv(count, ROWS),)](
        chosen,
        slots,
        offsets,
        counts,
        x,
        other,
        left,
        places,
        rows,
        new_x,
        new_other,
        images,
        count,
        total,
        chunks,
        D=width,
        W=other_width,
        BLOCK=block,
        IMAGES=next_power_of_2(images),
        ROWS=ROWS,
        BD=min(256, next_power_of_2(width)),
        BW=min(256, next_power_of_2(other_width)),
    )
    return left, places, rows, new_x, new_other


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
def _received(
    q,
    k,
    asks,
    offsets,
    out,
    scale,
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
        many += tl.load(asks + image * R + one).to(tl.int32)
    share = 1.0 / tl.maximum(many, 1).to(tl.float32)
    for one in range(0, R):
        asked = tl.load(asks + image * R + one).to(tl.float32) * share
        query = tl.load(q + ((image * R + one) * H + head) * D + column, mask=inside, other=0.0).to(tl.float32) * scale
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


def received(q: Tensor, k: Tensor, asks: Tensor, offsets: Tensor, n: int) -> Tensor:
    images, read, heads, size = q.shape
    k = k if k.stride(2) == 1 else k.contiguous()
    out = torch.zeros(k.shape[:2], dtype=torch.float32, device=k.device)
    _received[(images, heads)](
        q.contiguous(),
        k,
        asks.contiguous(),
        offsets,
        out,
        size**-0.5,
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
    product,
    total,
    offsets,
    score,
    target,
    row_stride,
    head_stride,
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
        products = tl.load(product + a, mask=a < end, other=0.0)
    if TOTAL:
        totals = tl.load(total + a, mask=a < end, other=0.0)
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
            alike -= products[:, None] * tl.load(product + b, mask=b < end, other=0.0)[None]
        if TOTAL:
            alike -= totals[:, None] + tl.load(total + b, mask=b < end, other=0.0)[None]
        alike = tl.where((b < end)[None], alike, -float("inf"))
        most = tl.max(alike, axis=1)
        found = first + tl.argmax(alike, axis=1)
        which = tl.where(most > highest, found, which)
        highest = tl.maximum(highest, most)
    highest = tl.where(a < end, highest, -float("inf"))
    tl.store(score + image * A + number, highest, mask=number < A)
    tl.store(target + image * A + number, which.to(tl.int64), mask=number < A)


def match(
    keys: Tensor, product: Tensor | None, total: Tensor | None, offsets: Tensor, n: int, prefix: int
) -> tuple[Tensor, Tensor]:
    images, even, odd = len(offsets) - 1, prefix + prefix % 2, prefix + 1 - prefix % 2
    count = (n - even + 1) // 2
    keys = keys if keys.stride(2) == 1 else keys.contiguous()
    score = torch.empty(images, count, dtype=torch.float32, device=keys.device)
    target = torch.empty_like(score, dtype=torch.int64)
    _match[(images, cdiv(count, 32))](
        keys,
        score if product is None else product.contiguous(),
        score if total is None else total.contiguous(),
        offsets,
        score,
        target,
        keys.stride(0),
        keys.stride(1),
        A=count,
        N=n,
        H=keys.shape[1],
        D=keys.shape[2],
        PRODUCT=product is not None,
        TOTAL=total is not None,
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
            if image == images - 1:
                tl.store(left + images, base + mine)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images, n = place.shape
    new_x, new_at, sums = x.new_empty(count, x.shape[1]), at.new_empty(count), size.new_empty(count)
    new_slots, left, counts = torch.empty_like(new_at), torch.empty_like(offsets), offsets.new_empty(images)
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
    return new_x, new_at, sums, new_slots, left


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
