"""Attention on plain tensors, and which kernel serves images of different lengths.

Letters: B images, N token slots, T live tokens over the batch, R queries, H heads, d channels per head.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from adaptvit.tokens import fused


def on_host(device: torch.device) -> bool:
    """Whether numbers on a device can be read without waiting for it."""
    return device.type == "cpu"


def fuses(*tensors: Tensor) -> bool:
    """Whether these go through operators of `fused`: on a device, without gradients, and not in float64."""
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not (learns or on_host(tensors[0].device) or any(t.dtype == torch.float64 for t in tensors))


class AttentionOptions(NamedTuple):
    """What softmax attention has beside queries, keys and values."""

    dropout: float = 0.0
    """The probability of dropping an attention weight."""
    bias: Tensor | None = None
    """Token features (...,) of the keys, added to the logits of each."""
    pairs: Tensor | None = None
    """(B or 1, H or 1, N, N), added to the logits by the positions of query and key."""
    scale: float | None = None
    """Of the logits; None is 1 / sqrt(d)."""


PLAIN = AttentionOptions()


def attend_dense(q: Tensor, k: Tensor, v: Tensor, images: int, mask: Tensor | None, how: AttentionOptions) -> Tensor:
    """Of images that have as many tokens each; `mask` (B or 1, H or 1, R or 1, keys) is added to the logits."""
    q, k, v = (t.view(images, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, mask, how.dropout, scale=how.scale).transpose(1, 2).flatten(0, 1)


def attend_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    live: Tensor | None,
    added: Tensor | None,
    how: AttentionOptions,
) -> Tensor:
    """Attention on the grid, (B, N, H, d) each, to the slots that are live: (B, N) bool, None where all are.

    Args:
        added: to the logits, (B or 1, H or 1, N or 1, N).
    """
    mask = None
    if live is not None:
        visible = live | ~live.any(dim=1, keepdim=True)  # an image without tokens attends to all: no 0/0
        mask = visible[:, None, None, :]
    if added is not None:
        added = added.to(q.dtype)
        mask = added if mask is None else added.masked_fill(~mask, -torch.inf)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, mask, how.dropout, scale=how.scale).transpose(1, 2)


def by_place(pairs: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Entries (B, H, R, n) of a table of pairs (B or 1, H, N, N) at the places of queries (B, R) and keys (B, n)."""
    if pairs.shape[0] > 1:
        image = torch.arange(queries.shape[0], device=pairs.device)[:, None, None]
        return pairs[image, :, queries[:, :, None], keys[:, None]].permute(0, 3, 1, 2)
    if queries.shape[0] == 1:
        return pairs.index_select(2, queries[0]).index_select(3, keys[0])
    return pairs[0][:, queries[:, :, None], keys[:, None]].transpose(0, 1)


def slots_of(where: Tensor) -> Tensor:
    """The slots of `Tokens.where`."""
    return where[..., 0].long() if where.is_floating_point() else where


ROWS = 64
"""Rows of the attention matrix that `mean_received` holds at a time."""


def mean_received(q: Tensor, k: Tensor, live: Tensor | None, added: Tensor | None = None) -> Tensor:
    """`Tokens.received` on the grid: q (B, R, H, d), k (B, N, H, d), live (B, N) or None where all are.

    Args:
        added: to the logits, (B or 1, H or 1, R, N).
    """
    with torch.autocast(k.device.type, enabled=False):
        return _mean_received(q, k, live, added)


def _mean_received(q: Tensor, k: Tensor, live: Tensor | None, added: Tensor | None) -> Tensor:
    dtype = torch.promote_types(k.dtype, torch.float32)
    q, keys = (q.to(dtype) * q.shape[-1] ** -0.5).transpose(1, 2), k.to(dtype).permute(0, 2, 3, 1)
    total: Tensor | None = None
    known = isinstance(q.shape[2], int)  # where an exported file is to find out how many, it takes all at once
    alone = known and q.shape[2] == 1
    for start in range(0, q.shape[2], ROWS) if known else (0,):
        rows = slice(start, min(start + ROWS, q.shape[2]) if known else None)
        logits = q[:, :, rows] @ keys
        if added is not None:
            logits = logits + added[:, :, rows].to(dtype)
        if live is None:
            weights = logits.softmax(dim=-1)
        else:
            hidden = ~live[:, None, None]
            weights = logits.masked_fill(hidden, torch.finfo(dtype).min).softmax(dim=-1) * live[:, None, rows, None]
        summed = weights.squeeze(2) if alone else weights.sum(dim=2)
        total = summed if total is None else total + summed
    if total is None:
        return k.new_zeros(k.shape[:3], dtype=dtype)
    if not alone:  # of one query that is dead 0 is the mean
        total /= q.shape[2] if live is None else live[:, : q.shape[2]].sum(dim=1).clamp(min=1).view(-1, 1, 1)
    return total.transpose(1, 2)


class Ragged(Protocol):
    """Where tokens of images of different lengths stand, end to end; `Packed` and `Slab` do."""

    @property
    def shape(self) -> tuple[int, int]:
        """Images and slots, (B, N)."""

    @property
    def lengths(self) -> list[int]:
        """Tokens per image, on the host."""

    @property
    def offsets(self) -> Tensor:
        """(B + 1,) int32: image b's tokens are rows offsets[b] to offsets[b + 1]."""

    @property
    def live(self) -> Tensor:
        """(B, N) bool, the slots that hold a token."""

    @property
    def spare(self) -> bool:
        """Whether there may be rows that hold no token."""

    @property
    def real(self) -> Tensor | None:
        """(T,) bool, the rows that hold a token; None is all."""

    @property
    def at(self) -> Tensor:
        """(T,) each token's position: a row of a table of pairs."""

    def grid(self, t: Tensor) -> Tensor:
        """(T, ...) -> (B, N, ...), 0 where a slot is dead."""

    def spread(self, t: Tensor) -> Tensor:
        """(B, N, ...) -> (T, ...)."""


class Facts(NamedTuple):
    """What attention is asked of a kernel, as far as it decides which one."""

    device: str
    """The type of the device."""
    capability: tuple[int, int]
    """Of a CUDA device, (0, 0) of others."""
    dtype: torch.dtype
    head_dim: int
    """Channels of a head: the most that queries, keys or values have."""
    dropout: bool
    biased: bool
    """Whether keys have a bias."""
    pairs: bool
    """Whether there is a table of pairs."""
    counted: bool
    """Whether the host knows `lengths`; else to ask for them is to wait for the device."""
    learns: bool
    """Whether a gradient is wanted."""


Kernel = Callable[[Tensor, Tensor, Tensor, Ragged, Ragged, AttentionOptions], Tensor]
"""Attends within images of different lengths: queries (R, H, d), keys and values (T, H, d), whose they are, keys then
queries, and how -> (R, H, d), 0 in rows of queries that are not `real`."""
Applies = Callable[[Facts], bool]
"""Whether a kernel can be used, and is the best there is after those before it."""


def register(kernel: Kernel, applies: Applies) -> None:
    """Put a kernel before all others: images of different lengths are attended to by the first one that applies.

    Images that all have as many tokens are not: of these one call of torch's own attention takes all.
    """
    KERNELS.insert(0, (applies, kernel))


def attend_ragged(
    q: Tensor, k: Tensor, v: Tensor, keys: Ragged, queries: Ragged, how: AttentionOptions, counted: bool
) -> Tensor:
    """By the first of `KERNELS` that applies; whether the host has counted `keys` and `queries` is `counted`.

    Under autocast all are of the values' type: on CUDA it norms and rotates queries and keys in float32.
    """
    if not q.dtype == k.dtype == v.dtype and torch.is_autocast_enabled(v.device.type):
        q, k = q.to(v.dtype), k.to(v.dtype)
    facts = Facts(
        q.device.type,
        capability(q.device),
        q.dtype,
        max(q.shape[-1], v.shape[-1]),
        how.dropout > 0,
        how.bias is not None,
        how.pairs is not None,
        counted,
        torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    )
    return choose(facts)(q, k, v, keys, queries, how)


def choose(facts: Facts) -> Kernel:
    """The first of `KERNELS` that applies."""
    return next(kernel for applies, kernel in KERNELS if applies(facts))


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; (0, 0) of others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def attend_each(q: Tensor, k: Tensor, v: Tensor, keys: Ragged, queries: Ragged, how: AttentionOptions) -> Tensor:
    """Image by image, in two products where these are faster than torch's own attention."""
    masks: Sequence[Tensor | None] = [None] * len(keys.lengths)
    if how.bias is not None:
        masks = how.bias.to(q.dtype)[None].split(keys.lengths, dim=1)
    if how.pairs is not None:
        masks = _looked_up(how.pairs.to(q.dtype), keys, queries, masks)
    across, over, values = (t.transpose(0, 1) for t in (q, k, v))
    parts = across.split(queries.lengths, 1), over.split(keys.lengths, 1), values.split(keys.lengths, 1)
    images = zip(*parts, masks, strict=True)
    if any(t.requires_grad for t in (q, k, v, *(() if how.bias is None else (how.bias,)))):
        return torch.cat([_at_once(*image, how) for image in images if image[0].shape[1]], dim=1).transpose(0, 1)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])  # a third less memory than joining the parts
    attend = _in_products(q, how) if _is_short(q, keys, queries, how) else None
    for place, image in zip(out.transpose(0, 1).split(queries.lengths, 1), images, strict=True):
        if not place.shape[1]:
            continue
        if attend is None:
            place.copy_(_at_once(*image, how))
        else:
            attend(place, *image)
    return out


SHORT = 1 << 20
"""Attention weights of an image, heads together, up to which two products and a softmax between are faster on a CPU
in float32 than torch's fused attention, whose every call costs some 20 us: at 33 tokens of three heads 26 us an image
in the place of 45, at 100 of six 125 in the place of 200, as many at 577 of six, twice as many at 1025 of twelve."""


def _is_short(q: Tensor, keys: Ragged, queries: Ragged, how: AttentionOptions) -> bool:
    """Whether each image's attention is taken in products."""
    if how.dropout or q.dtype not in (torch.float32, torch.float64):
        return False
    most = max(keys.lengths, default=0) * max(queries.lengths, default=0) * q.shape[1]
    return most <= SHORT and not torch.is_autocast_enabled(q.device.type)


def _in_products(q: Tensor, how: AttentionOptions) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]:
    """What writes an image's attention, (H, R, d), in products, of queries (..., d) and its keys, values and mask."""
    nothing, scale = q.new_zeros(1, 1, 1), q.shape[-1] ** -0.5 if how.scale is None else how.scale

    def attend(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        if mask is None:
            logits = torch.baddbmm(nothing, q, k.mT, beta=0, alpha=scale)
        else:
            logits = torch.baddbmm(mask.view(-1, *mask.shape[-2:]), q, k.mT, alpha=scale)
        torch.bmm(logits.softmax(dim=-1), v, out=out)

    return attend


def _at_once(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, how: AttentionOptions) -> Tensor:
    """The same by torch's fused attention."""
    return scaled_dot_product_attention(q[None], k[None], v[None], mask, how.dropout, scale=how.scale)[0]


def _looked_up(pairs: Tensor, keys: Ragged, queries: Ragged, bias: Sequence[Tensor | None]) -> list[Tensor]:
    """Each image's own part of a table of pairs, (1, H, R, n), with what its keys have beside it."""
    rows, columns = queries.at.split(queries.lengths), keys.at.split(keys.lengths)
    found = []
    for image, (row, column, own) in enumerate(zip(rows, columns, bias, strict=True)):
        part = by_place(pairs[image % len(pairs)][None], row[None], column[None])
        found.append(part if own is None else part + own)
    return found


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, keys: Ragged, queries: Ragged, how: AttentionOptions) -> Tensor:
    """Flash attention, from torch, which knows no bias: keys carry theirs in channels of their own.

    The longest length only bounds the launch grid: the number of slots will do, and no length goes to the host.
    """
    from torch.nn.attention import varlen  # needs a CUDA build to be imported on some releases

    slots, channels, scale = keys.shape[1], v.shape[-1], how.scale
    if how.bias is not None:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        carry = fused.with_bias if fuses(q, k, v, how.bias) else fused.carried
        q, k, v = carry(q, k, v, how.bias, scale)
    given: dict[str, Any] = {"scale": scale} if takes_scale(varlen.varlen_attn) else {}
    if not given and scale is not None:
        q = q * (scale * q.shape[-1] ** 0.5)
    with FLASH_FIRST, sdpa_kernel(FLASH, set_priority=True):
        out = varlen.varlen_attn(q, k, v, queries.offsets, keys.offsets, slots, slots, **given)
    assert isinstance(out, Tensor)  # a tuple only where auxiliary outputs are asked for
    out = out[..., :channels]
    if not queries.spare:
        return out
    if fuses(out):  # all rows but those of no image, which it does not write, are those of one
        found: Tensor = fused.unpadded(out[None], queries.offsets[:: queries.shape[0]], out.shape[0])
        return found
    assert queries.real is not None
    return out.where(queries.real[:, None, None], 0)


@cache
def takes_scale(attention: Callable[..., object]) -> bool:
    """Whether variable-length attention is told a scale, which that of older torch is not."""
    try:
        signature(attention).bind_partial(scale=None)
    except TypeError:
        return False
    return True


FLASH = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Flash before cuDNN, which plans anew, in some 40 ms, for every number of tokens that it has not met. All others stay
allowed: the order is the process's, and another thread may attend in the meantime."""
FLASH_FIRST = Lock()
"""Who changes the order, lest two threads put it back in the wrong one."""


def attend_padded(q: Tensor, k: Tensor, v: Tensor, keys: Ragged, queries: Ragged, how: AttentionOptions) -> Tensor:
    """In a grid of as many slots as there are, dead ones hidden."""
    if how.pairs is None and fuses(q, k, v, *(() if how.bias is None else (how.bias,))):
        *grids, mask = fused.padded(q, k, v, how.bias, queries.offsets, keys.offsets, keys.shape[1])
        across, over, values = (t.transpose(1, 2) for t in grids)
        out = scaled_dot_product_attention(across, over, values, mask, how.dropout, scale=how.scale)
        found: Tensor = fused.unpadded(out.transpose(1, 2), queries.offsets, q.shape[0])
        return found
    added = None if how.bias is None else keys.grid(how.bias)[:, None, None]
    if how.pairs is not None:
        pairs = by_place(how.pairs, queries.grid(queries.at), keys.grid(keys.at))
        added = pairs if added is None else pairs + added
    return queries.spread(attend_masked(queries.grid(q), keys.grid(k), keys.grid(v), keys.live, added, how))


def is_flash(facts: Facts) -> bool:
    """Whether variable-length flash attention does it: NVIDIA's from Ampere on, half precision, nothing by pairs."""
    channels = fused.width(facts.head_dim) if facts.biased else facts.head_dim
    return (
        facts.device == "cuda"
        and facts.capability >= (8, 0)
        and facts.dtype in (torch.float16, torch.bfloat16)
        and channels % 8 == 0
        and channels <= 256
        and not (facts.dropout or facts.pairs)
    )


def is_host(facts: Facts) -> bool:
    """Whether a call per image does it: on the host, but for half precision with gradients, in small products."""
    return facts.device == "cpu" and facts.counted and not (facts.learns and facts.dtype == torch.bfloat16)


KERNELS: list[tuple[Applies, Kernel]] = [
    (is_host, attend_each),
    (is_flash, attend_varlen),
    (lambda _: True, attend_padded),
]
"""Tried in this order. On the host a call per image beats padding, buckets of equal length and NestedTensor."""


def add_rows(base: Tensor, into: Tensor, t: Tensor) -> Tensor:
    """`base` (n, ...) with the rows of `t` (m, ...) added to those that `into` (m,) names.

    Beside a CPU in float32, or wider, and by an operator that sorts them first: a device's `index_add` takes threads as
    they come, so that sums, and what is decided by them, differ from run to run.
    """
    if on_host(t.device):
        return base.index_add(0, into, t)
    wide = torch.promote_types(t.dtype, torch.float32)
    if t.dtype != wide:
        return add_rows(base.to(wide), into, t.to(wide)).to(base.dtype)
    return base.index_put((into,), t, accumulate=True)


def rows_at(t: Tensor, index: Tensor) -> Tensor:
    """The rows (..., k) of (..., n, D), each copied whole, where `gather` goes by value: (..., k, D)."""
    if not t.shape[-1]:
        return t.new_empty(*index.shape, 0)
    lines = index.shape[:-1]
    first = torch.arange(math.prod(lines), device=t.device).view(*lines, 1) * t.shape[-2]
    return t.flatten(0, -2).index_select(0, (index + first).flatten()).view(*index.shape, t.shape[-1])
