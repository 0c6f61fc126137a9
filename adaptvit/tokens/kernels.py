"""Attention on plain tensors, and which kernel serves images of different lengths.

Letters: B images, N token slots, T live tokens over the batch, R queries, H heads, d channels per head.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend_dense(q: Tensor, k: Tensor, v: Tensor, images: int, dropout: float, bias: Tensor | None) -> Tensor:
    q, k, v = (t.view(images, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    mask = None if bias is None else bias.view(images, 1, 1, -1).to(q.dtype)
    return scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(0, 1)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, live: Tensor | None, dropout: float, bias: Tensor | None) -> Tensor:
    """Attention on the grid, (B, N, H, d) each, to the slots that are live: (B, N) bool, None where all are."""
    mask = None
    if live is not None:
        visible = live | ~live.any(dim=1, keepdim=True)  # an image without tokens attends to all: no 0/0
        mask = visible[:, None, None, :]
    if bias is not None:
        bias = bias[:, None, None, :].to(q.dtype)
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)


ROWS = 64
"""Rows of the attention matrix that `mean_received` holds at a time."""


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def mean_received(q: Tensor, k: Tensor, live: Tensor | None) -> Tensor:
    """`Tokens.received` on the grid: q (B, R, H, d), k (B, N, H, d), live (B, N) or None where all are."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    q, keys = (q.to(dtype) * q.shape[-1] ** -0.5).transpose(1, 2), k.to(dtype).permute(0, 2, 3, 1)
    total = k.new_zeros((), dtype=dtype).expand(len(k), k.shape[2], k.shape[1])
    for start in range(0, q.shape[2], ROWS):
        rows = slice(start, min(start + ROWS, q.shape[2]))
        logits = q[:, :, rows] @ keys
        if live is None:
            weights = logits.softmax(dim=-1)
        else:
            hidden = ~live[:, None, None]
            weights = logits.masked_fill(hidden, torch.finfo(dtype).min).softmax(dim=-1) * live[:, None, rows, None]
        total = total + weights.sum(dim=2)
    count = max(1, q.shape[2]) if live is None else live[:, : q.shape[2]].sum(dim=1).clamp(min=1).view(-1, 1, 1)
    return (total / count).transpose(1, 2)


class Ragged(Protocol):
    """Where tokens of images of different lengths stand, end to end."""

    @property
    def shape(self) -> tuple[int, int]:
        """Images and slots, (B, N)."""

    @property
    def slots(self) -> Tensor:
        """(T,) each token's place in the flattened (B, N) grid, ascending."""

    @property
    def lengths(self) -> list[int]:
        """Tokens per image, on the host."""

    @property
    def offsets(self) -> Tensor:
        """(B + 1,) int32: image b's tokens are rows offsets[b] to offsets[b + 1]."""


Kernel = Callable[[Tensor, Tensor, Tensor, Ragged, Ragged, float, Tensor | None], Tensor]


def ragged_kernel(device: torch.device, dtype: torch.dtype, dropout: float, biased: bool) -> Kernel:
    """The attention kernel for images of different lengths.

    On the host a call per image beats padding, buckets of equal length and NestedTensor; on CUDA in half precision
    variable-length flash attention, which has neither dropout nor bias, does; elsewhere images are padded to the grid.
    """
    if device.type == "cpu":
        return attend_each
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and not dropout and not biased:
        return attend_varlen
    return attend_padded


def attend_each(
    q: Tensor, k: Tensor, v: Tensor, keys: Ragged, queries: Ragged, dropout: float, bias: Tensor | None
) -> Tensor:
    def one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        return scaled_dot_product_attention(query, key, value, mask, dropout)[0].transpose(0, 1)

    masks = [None] * len(keys.lengths) if bias is None else bias.to(q.dtype)[None].split(keys.lengths, dim=1)
    images = zip(q.split(queries.lengths), k.split(keys.lengths), v.split(keys.lengths), masks, strict=True)
    if q.requires_grad:
        return torch.cat([one(*image) for image in images if len(image[0])])
    out = torch.empty_like(q, memory_format=torch.contiguous_format)  # a third less memory than joining the parts
    for place, image in zip(out.split(queries.lengths), images, strict=True):
        if len(place):
            place.copy_(one(*image))
    return out


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, keys: Ragged, queries: Ragged, dropout: float, bias: Tensor | None
) -> Tensor:
    """The longest length only bounds the launch grid: the number of slots will do, and no length goes to the host."""
    from torch.nn.attention import varlen  # needs a CUDA build to be imported on some releases

    slots = keys.shape[1]
    out = varlen.varlen_attn(q, k, v, queries.offsets, keys.offsets, slots, slots)
    assert isinstance(out, Tensor)  # a tuple only where auxiliary outputs are asked for
    return out


def attend_padded(
    q: Tensor, k: Tensor, v: Tensor, keys: Ragged, queries: Ragged, dropout: float, bias: Tensor | None
) -> Tensor:
    """In a grid of as many slots as there are, dead ones hidden."""

    def grid(t: Tensor, of: Ragged) -> Tensor:
        flat = t.new_zeros(of.shape[0] * of.shape[1], *t.shape[1:]).index_copy_(0, of.slots, t)
        return flat.view(*of.shape, *t.shape[1:])

    live = grid(torch.ones_like(keys.slots, dtype=torch.bool), keys)
    bias = None if bias is None else grid(bias, keys)
    out = attend_masked(grid(q, queries), grid(k, keys), grid(v, keys), live, dropout, bias)
    return out.flatten(0, 1).index_select(0, queries.slots)
