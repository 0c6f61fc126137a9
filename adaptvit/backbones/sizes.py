"""The sizes of a timm ViT that MACs depend on, block by block."""

from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adaptvit.backbones.parts import Mixer, TokenPart
from adaptvit.backbones.t2t import PATCH, TokensToToken, linear_macs
from adaptvit.macs import BlockShape, Shape


def shape_of(vit: VisionTransformer) -> Shape:
    """The sizes that MACs depend on; a stem that is a network of its own is run for it, once."""
    stem = vit.patch_embed
    stem_fixed = stem_per_pair = 0
    if isinstance(stem, PatchEmbed):
        stem_per_patch = stem.proj.weight.numel()
    elif isinstance(stem, TokensToToken):
        stem_fixed, stem_per_patch, stem_per_pair = _t2t_macs(stem)
    else:
        stem_per_patch = _counted_macs(stem, vit) // stem.num_patches
    head, head_per_patch = head_macs(vit)
    return Shape(
        dim=vit.embed_dim,
        blocks=tuple(map(_block_shape, vit.blocks)),
        stem_per_patch=stem_per_patch,
        prefix=vit.num_prefix_tokens,
        head=head,
        head_per_patch=head_per_patch,
        stem=stem_fixed,
        stem_per_pair=stem_per_pair,
    )


def head_macs(vit: VisionTransformer) -> tuple[int, int]:
    """MACs of pooling and classifier: for one image, and for one patch beyond that."""
    head = _linear_macs(vit.head) + (_linear_macs(vit.head_dist) if isinstance(vit, VisionTransformerDistilled) else 0)
    head_per_patch = 0
    if vit.attn_pool is not None:
        pool = vit.attn_pool
        head += pool.latent_len * (_linear_macs(pool.q) + _linear_macs(pool.proj) + _linear_macs(pool.mlp))
        head_per_patch = _linear_macs(pool.kv) + 2 * pool.latent_len * vit.embed_dim
        head += head_per_patch * vit.num_prefix_tokens * vit.pool_include_prefix
    return head, head_per_patch


def _block_shape(block: Any) -> BlockShape:
    mixes = isinstance(block.attn, Mixer)
    return BlockShape(
        heads=0 if mixes else block.attn.num_heads,
        head_dim=0 if mixes else block.attn.head_dim,
        gated=not mixes and block.attn.gate is not None,
        mlp_per_token=_linear_macs(block.mlp),
        mixing=block.attn.macs if mixes else 0,
        norms_over_tokens=isinstance(block.norm2, TokenPart),
    )


def _linear_macs(module: nn.Module | None) -> int:
    """MACs of every linear map inside, applied once each to one token."""
    return 0 if module is None else linear_macs(module)


def _counted_macs(stem: Any, vit: VisionTransformer) -> int:
    """MACs of a stem that is not one convolution (a ResNet), counted by running it once."""
    weight, modes = next(vit.parameters()), [(part, part.training) for part in stem.modules()]
    stem.eval()  # or its batch norms would learn from this
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        stem(torch.zeros(1, vit.in_chans, *stem.img_size, device=weight.device, dtype=weight.dtype))
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
