"""The sizes of a ViT that MACs depend on, block by block."""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from adaptvit.backbones.base import (
    blocks_of,
    cores,
    family_of,
    input_size,
    model_name,
    patch_grid,
    prefix_tokens,
    sample_shape,
)
from adaptvit.backbones.blocks import called_with
from adaptvit.backbones.families import FAMILIES, Parts, find, get, value_of
from adaptvit.backbones.fast import is_fast
from adaptvit.backbones.forward import enter
from adaptvit.backbones.parts import Mixer, TokenPart
from adaptvit.backbones.t2t import PATCH, TokensToToken, linear_macs
from adaptvit.macs import BlockShape, Shape
from adaptvit.tokens import Packed, Tokens


def shape_of(vit: nn.Module) -> Shape:
    """The sizes that MACs depend on; a stem that is a network of its own is run for it, once."""
    stem = find(vit, family_of(vit).stem)
    stem_fixed = stem_per_pair = 0
    if isinstance(stem, PatchEmbed):
        stem_per_patch = stem.proj.weight.numel()
    elif isinstance(stem, (nn.Linear, nn.Conv2d, nn.Conv3d)):
        stem_per_patch = stem.weight.numel()
    elif isinstance(stem, TokensToToken):
        stem_fixed, stem_per_patch, stem_per_pair = _t2t_macs(stem)
    else:
        before = stem.forward if stem is not None else lambda images: enter(vit, images, Packed)
        size, grid = (sample_shape(vit), patch_grid(vit)) if stem is None else (input_size(vit), patch_grid(vit)[-2:])
        stem_per_patch = _counted(before, vit, 1, *size) // math.prod(grid)
    if (table := find(vit, family_of(vit).weighed)) is not None:
        stem_per_patch += table.numel()
    dim = get(vit, family_of(vit).width)
    pool, pool_per_patch, pool_per_pair = _pool_macs(vit, dim)
    return Shape(
        dim=dim,
        blocks=_block_shapes(vit, dim),
        stem_per_patch=stem_per_patch,
        prefix=prefix_tokens(vit),
        head=head_macs(vit),
        pool=pool,
        pool_per_patch=pool_per_patch + _map_macs(vit, dim),
        pool_per_pair=pool_per_pair,
        stem=stem_fixed + _bias_macs(vit, family_of(vit).bias),
        stem_per_pair=stem_per_pair,
    )


_WHOLE = (6, 6)
"""Rows and columns of whole groups of neighbours."""


def head_macs(vit: nn.Module) -> int:
    """MACs of the classifier for one image."""
    return sum(_linear_macs(find(vit, name)) for name in family_of(vit).heads)


def _map_macs(vit: nn.Module, dim: int) -> int:
    """MACs for each patch of a head on the map of patches: of convolutions that keep its size, or of a projector.

    A projector takes 2 x 2 or 3 x 3 patches together, for which it is run once; a grid's rest that it pads counts less.
    """
    head: Any = find(vit, family_of(vit).map_head)
    if head is None:
        return 0
    maps = [part.weight.numel() for part in head.modules() if isinstance(part, nn.Conv2d)]
    return sum(maps) if maps else _counted(head.forward, vit, 1, *_WHOLE, dim) // math.prod(_WHOLE)


def _pool_macs(vit: nn.Module, dim: int) -> tuple[int, int, int]:
    """MACs of a pool by attention: for one image, for a patch and for two; counted by running it three times."""
    family = family_of(vit)
    pool: Any = find(vit, family.pool)
    if pool is None:
        return 0, 0, 0
    one, two, three = (_counted(pool.forward, vit, 1, tokens, dim) for tokens in (1, 2, 3))
    prefix = prefix_tokens(vit) if value_of(vit, family.pools_prefix) else 0
    pair = (three - 2 * two + one) // 2
    each = two - one - 3 * pair
    return one - each - pair + prefix * (each + prefix * pair), each + 2 * prefix * pair, pair


def _block_shapes(vit: nn.Module, dim: int) -> tuple[BlockShape, ...]:
    tokens: Tokens | None = None
    shapes = []
    for number, block in enumerate(cores(vit)):
        parts = FAMILIES.parts_of(block)
        if parts is not None and parts.attends_once:
            shapes.append(_block_shape(block, parts, dim))
            continue
        if tokens is None:
            weight = next(vit.parameters())
            images = torch.zeros(1, *sample_shape(vit), device=weight.device, dtype=weight.dtype)
            with torch.no_grad():
                tokens = enter(vit, images, Packed)
        shape = _measured_shape(vit, number, tokens)
        if parts is not None:
            mlp = _mlp_macs(block, parts)
            shape = shape._replace(mlp_per_token=mlp, maps=shape.maps - mlp, whole=False)
        shapes.append(shape)
    return tuple(shapes)


class _Shapes(TorchFunctionMode):
    """Notes what attention is asked for, and gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, int]] = []
        """Heads, and channels of a query and of a value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, value = named["query"], named["value"]
        self.seen.append((query.shape[1], query.shape[-1], value.shape[-1]))
        return query.new_zeros(*query.shape[:-1], value.shape[-1])


def _measured_shape(vit: nn.Module, number: int, tokens: Tokens) -> BlockShape:
    """Of a block that is called whole, by running it on one token and on two."""
    block, counts = blocks_of(vit)[number], []
    for count in (1, 2):
        some = tokens.take(torch.arange(count, device=tokens.x.device)[None])
        args, kwargs = called_with(number, some)
        with torch.no_grad(), FlopCounterMode(display=False) as counter, _Shapes() as shapes:
            block(some.batch, *args, **kwargs)
        counts.append(counter.get_total_flops() // 2)
    if not shapes.seen:
        raise TypeError(
            f"{type(block).__name__} in {model_name(vit)} does not attend by scaled_dot_product_attention, so that "
            "tokens that are gone would be attended to"
        )
    (heads, query_dim, _), per_token = shapes.seen[0], counts[1] - counts[0]
    width = sum(count * (query + value) for count, query, value in shapes.seen)  # of both products, for a pair
    return BlockShape(
        heads=heads,
        head_dim=width // (2 * heads),
        gated=False,
        mlp_per_token=0,
        mixing=counts[0] - per_token,
        maps=per_token,
        query_dim=query_dim,
        whole=True,
    )


def _block_shape(block: Any, parts: Parts, dim: int) -> BlockShape:
    attn, mlp_per_token = get(block, parts.attention), _mlp_macs(block, parts)
    if isinstance(attn, Mixer):
        return BlockShape(
            heads=0,
            head_dim=0,
            gated=False,
            mlp_per_token=mlp_per_token,
            mixing=attn.macs,
            norms_over_tokens=_over_tokens(block, parts),
        )
    heads = get(block, parts.heads)
    return BlockShape(
        heads=heads,
        head_dim=dim // heads if parts.head_dim is None else get(block, parts.head_dim),
        gated=getattr(attn, "gate", None) is not None,
        mlp_per_token=mlp_per_token,
        norms_over_tokens=_over_tokens(block, parts),
        mixing=_bias_macs(block, parts.bias),
        maps=0 if is_fast(block) else _linear_macs(attn) - _linear_macs(_part(block, parts.bias)),
    )


def _mlp_macs(block: Any, parts: Parts) -> int:
    return sum(_linear_macs(get(block, name)) for name in parts.mlp)


def _over_tokens(block: Any, parts: Parts) -> bool:
    return any(isinstance(get(block, name), TokenPart) for name in parts.into_mlp)


def _part(module: nn.Module, name: str | None) -> Any:
    return None if name is None else get(module, name)


def _bias_macs(module: nn.Module, name: str | None) -> int:
    """MACs of making a relative bias, by running it once."""
    bias = _part(module, name)
    if bias is None:
        return 0
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bias.get_bias()
    return counter.get_total_flops() // 2


def _linear_macs(module: nn.Module | Tensor | None) -> int:
    """MACs of every linear map inside, applied once each to one token."""
    if module is None or isinstance(module, Tensor):
        return 0 if module is None else module.numel()
    inside = (find(part, "in_proj_weight") for part in module.modules())  # of `nn.MultiheadAttention` and its like
    return linear_macs(module) + sum(weight.numel() for weight in inside if weight is not None)


def _counted(run: Callable[[Tensor], object], vit: nn.Module, *shape: int) -> int:
    """MACs of a part of the ViT that is a network of its own, counted by running it once."""
    weight, modes = next(vit.parameters()), [(part, part.training) for part in vit.modules()]
    vit.eval()  # or its batch norms would learn from this
    own = torch.inference_mode(False), torch.enable_grad()  # without gradients the counter takes no parameters
    with own[0], own[1], sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # which all count
        run(torch.zeros(shape, device=weight.device, dtype=weight.dtype))
    for part, training in modes:
        part.training = training
    return counter.get_total_flops() // 2


def _t2t_macs(stem: TokensToToken) -> tuple[int, int, int]:
    """MACs of a tokens-to-token stem: for one image, for each patch, for each ordered pair of patches.

    In whole steps of a patch they are a polynomial in the patches without a constant; other sizes are never dynamic.
    """
    height, width = stem.img_size
    if height % PATCH or width % PATCH:
        return stem.macs(height, width), 0, 0
    one, two = stem.macs(PATCH, PATCH), stem.macs(PATCH, 2 * PATCH)
    per_pair = (two - 2 * one) // 2
    return 0, one - per_pair, per_pair
