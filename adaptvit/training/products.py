"""Attention in mixed precision on a CPU, where torch's own is slow to train."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class Products(TorchFunctionMode):
    """While it is open, attention that a gradient is wanted of is two matrix products and a softmax.

    In bfloat16 on a CPU alone, where the backward pass of torch's `scaled_dot_product_attention` takes some six times
    as long (torch 2.15): half the time of a training step of ViT-Tiny. It keeps the weights, (B, H, N, N), for the
    backward pass, which torch's computes again. Elsewhere attention is torch's.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (attention if func is scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`, by products where torch's own is slow to train."""
    given = (query, key, value)
    slow = all(t.device.type == "cpu" and t.dtype == torch.bfloat16 for t in given)
    if is_causal or enable_gqa or not (slow and any(t.requires_grad for t in given)):
        return scaled_dot_product_attention(*given, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        logits = logits.masked_fill(~attn_mask, -torch.inf) if hidden else logits + attn_mask.to(logits.dtype)
    weights = logits.softmax(-1)
    return (dropout(weights, dropout_p) if dropout_p else weights) @ value
