"""The one door that nearly every ViT's attention goes through, `scaled_dot_product_attention`, with tokens behind it.

Whatever calls it while a `Door` is open gets the attention of tokens of images of different lengths, in whatever layout
they are. So a ViT's own attention runs as it is: its projections, its norms of queries and keys, its rotation.

Letters: b, n the images and tokens that the caller sees (`Tokens.batch`), H heads, d channels per head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, multi_head_attention_forward, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from adaptvit.tokens import AttentionOptions, Dense, Slab, Tokens, fused, kernels


class Projected(NamedTuple):
    """What attention attends with, as token features: queries, keys and values (..., H, d), rotated and normed."""

    q: Tensor
    k: Tensor
    v: Tensor
    pairs: Tensor | None = None
    """(B or 1, H or 1, N, N), added to the logits by the positions of query and key."""


def attention_received(tokens: Tokens, projected: Projected, slots: int | None) -> Tensor:
    """Attention that each token receives, mean over queries, by head: features (..., H).

    Args:
        slots: the queries are those of the first so many slots; None takes all live tokens.
    """
    q, k, pairs = projected.q, projected.k, projected.pairs
    if slots is not None and isinstance(tokens, Slab) and _is_fused(projected, slots):
        return tokens.received_from(q, k, slots)
    return tokens.received(tokens.rows(q) if slots is None else tokens.first(q, slots), k, pairs)


def mean_attention_received(tokens: Tokens, projected: Projected, slots: int | None) -> Tensor:
    """The mean of that over heads: features (...,)."""
    if slots is not None and isinstance(tokens, Dense | Slab) and _is_fused(projected, slots):
        return tokens.attended_from(projected.q, projected.k, slots)
    return attention_received(tokens, projected, slots).mean(dim=-1)


def _is_fused(projected: Projected, slots: int) -> bool:
    return slots <= fused.QUERIES and projected.pairs is None and kernels.fuses(projected.q, projected.k)


Look = Callable[[Projected], Tensor | None]
"""Sees what attention attends with, and says which slots are to be updated, (B, N) bool; None is all."""
Attend = Callable[[Projected, float], Tensor]
"""Attention in the place of the softmax's, of what it attends with on the grid and the dropout: (B, N, H, d)."""
Between = Callable[[Tokens], Tokens]
"""What is done with tokens between attention and MLP."""
Summed = Callable[[Tensor, Tensor, Tensor], None]
"""Is shown a residual sum: features, what a sub-layer adds to them, and their sum as it is rounded."""


@dataclass(frozen=True, eq=False)
class Acts:
    """What a method does in a block."""

    chosen: Tensor | int | None = None
    """(B, N) or (1, N) bool, the slots to update, or the first so many; the others are attended to and then dropped.
    None: all."""
    bias: Tensor | None = None
    """Token features (...,), added to the attention logits of each token as a key."""
    look: Look | None = None
    """Is shown what attention attends with, and says what is `chosen`."""
    attend: Attend | None = None
    """Attends on the grid in the place of softmax attention; only in `Masked`."""
    between: Between | None = None
    """Stands between attention and MLP; behind both where a block is called whole."""
    summed: Summed | None = None
    """Is shown both residual sums; none where a block is called whole."""


class Door(TorchFunctionMode):
    """While it is open, attention is that of `tokens`, on whose features, as `batch`, the caller works.

    Attributes:
        chosen: (B, N) or (1, N) bool, the slots to update, or the first so many, once that is known; None is all.
        passed: how often attention was asked for.
    """

    def __init__(self, tokens: Tokens, acts: Acts, whole: bool = False) -> None:
        """
        Args:
            whole: all queries are needed, whatever is chosen; else the rest of what attention gives is 0.
        """
        super().__init__()
        self.tokens, self.acts, self.whole, self.chosen = tokens, acts, whole, acts.chosen
        self.passed = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        if func is multi_head_attention_forward:
            return self._attend_with_maps(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def check_passed(self, module: nn.Module) -> None:
        """Refuse a module that attends by another way.

        Raises:
            NotImplementedError: it did not come through.
        """
        if not self.passed:
            raise NotImplementedError(
                f"{type(module).__name__} does not attend by scaled_dot_product_attention: tokens that are gone would "
                "be attended to"
            )

    def _attend_with_maps(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        width: int,
        heads: int,
        into: Tensor | None,
        into_bias: Tensor | None,
        key_bias: Tensor | None,
        value_bias: Tensor | None,
        add_zeros: bool,
        dropout: float,
        out: Tensor,
        out_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """That of `nn.MultiheadAttention`, whose linear maps are inside: (n, b, channels)."""
        if (
            into is None
            or not query is key is value
            or key_bias is not None
            or add_zeros
            or key_padding_mask is not None
        ):
            raise NotImplementedError("nn.MultiheadAttention is known as attention of tokens to themselves alone")
        q, k, v = (
            t.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for t in linear(query, into, into_bias).chunk(3, dim=-1)
        )
        mixed = self._attend(q, k, v, attn_mask, dropout if training else 0.0)
        return linear(mixed.permute(2, 0, 1, 3).flatten(2), out, out_bias), None

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        self.passed += 1
        tokens, pairs = self.tokens, attn_mask
        if is_causal:
            raise NotImplementedError("causal attention has an order of tokens, which are to be dropped and merged")
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        if pairs is not None:
            pairs = _numbers(pairs, query)
        acts = self.acts
        if acts.attend is not None or (acts.look is not None and self.passed == 1):
            asked = query if scale is None else query * (scale * query.shape[-1] ** 0.5)
            q, k, v = (tokens.of_batch(t.transpose(1, 2)) for t in (asked, key, value))
            projected = Projected(q, k, v, pairs)
            if acts.attend is not None:
                return acts.attend(projected, dropout_p).transpose(1, 2)
            assert acts.look is not None
            self.chosen = acts.look(projected)
        how = AttentionOptions(dropout_p, acts.bias, pairs, scale)
        if self.chosen is None or self.whole:
            return tokens.attend_batch(query, key, value, how)
        q, k, v = (tokens.of_batch(t.transpose(1, 2)) for t in (query, key, value))
        rows, (q,) = tokens.select(self.chosen, q)
        out = tokens.put(rows, tokens.attend(q, k, v, rows, how))
        return tokens.with_x(out).batch.transpose(1, 2)


class OfLive(TorchFunctionMode):
    """While it is open, what attends to (B, N) tokens attends to the live ones alone."""

    def __init__(self, live: Tensor) -> None:
        super().__init__()
        self.live = live

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is multi_head_attention_forward and args[1].shape[0] == self.live.shape[1]:
            given, mask = kwargs.get("key_padding_mask"), kwargs.get("attn_mask")
            gone = ~self.live if given is None else ~self.live | given
            if mask is not None and mask.is_floating_point():
                gone = torch.zeros_like(gone, dtype=mask.dtype).masked_fill(gone, -torch.inf)
            kwargs["key_padding_mask"] = gone
        elif func is scaled_dot_product_attention and args[1].shape[-2] == self.live.shape[1]:
            args, given = args[:3], args[3] if len(args) > 3 else kwargs.get("attn_mask")
            live = self.live[:, None, None]
            kwargs["attn_mask"] = live if given is None else _numbers(given, args[0]).masked_fill(~live, -torch.inf)
        return func(*args, **kwargs)


def _numbers(mask: Tensor, query: Tensor) -> Tensor:
    """A mask that attention is given, added to the logits: (B or 1, H or 1, N, N)."""
    mask = mask.view(*[1] * (4 - mask.ndim), *mask.shape)
    return (
        torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
    )


ATTENTION = "adaptvit"
"""What transformers may call attention through the door, as in `vit.set_attn_implementation("adaptvit")`."""


def offer_attention() -> None:
    """Register that name: SDPA, for classes too that say they have none, and causal where a module says so itself."""
    transformers: Any = import_module("transformers")
    ways, masks = transformers.AttentionInterface(), transformers.AttentionMaskInterface()
    sdpa = ways["sdpa"]

    def attend(module: nn.Module, *given: Any, is_causal: bool | None = None, **options: Any) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        return sdpa(module, *given, is_causal=causal, **options)

    ways.register(ATTENTION, attend)
    masks.register(ATTENTION, masks["sdpa"])
