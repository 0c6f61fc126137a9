"""A rotation of a timm ViT's channels that leaves what it computes as it is."""

import torch
from timm.layers import LayerScale, Mlp, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adaptvit.backbones.base import check_offers, model_name
from adaptvit.backbones.parts import RepresentationHead
from adaptvit.backbones.segmenting import SegmentingViT
from adaptvit.backbones.t2t import TokensToToken
from adaptvit.backbones.video import SpaceTimeViT
from adaptvit.process import in_float64


def set_channel(whole: nn.Module, direction: Tensor) -> None:
    """Turn the residual stream, in place, so that channel 0 carries a direction of it; the ViT computes what it did.

    A rotation that keeps the all-ones vector commutes with layer norm once its weights are folded into the linear maps
    that follow, and every linear map can be turned to match. The rotation is the reflection that takes channel 0 to
    mean(x) + sqrt(1 - 1/D) u.x, u being the direction without its mean, of unit length.

    Args:
        whole: a timm `VisionTransformer`, or one that was made for pixels (`SegmentingViT`) or clips (`inflate`).
        direction: (D,), not constant, on the ViT's device.
    Raises:
        TypeError: the ViT has a part that no rotation passes through: another norm than layer norm, a norm before the
            blocks, an attention pool, gated attention, or a linear map without the bias that a norm's would go to.
        ValueError: the direction is constant.
    """
    vit = _rotatable(whole.vit if isinstance(whole, SegmentingViT | SpaceTimeViT) else whole)
    size = vit.embed_dim
    u = in_float64(direction) - in_float64(direction).mean()
    if not u.norm() > 0:
        raise ValueError("the direction for channel 0 is constant over the channels, which layer norm cannot see")
    identity = torch.eye(size, dtype=torch.float64, device=u.device)
    v = identity[0] - (1 / size + (1 - 1 / size) ** 0.5 * u / u.norm())
    rotation = identity - 2 * torch.outer(v, v) / v.dot(v)
    with torch.no_grad():
        pairs = _readers(vit)
        if isinstance(whole, SegmentingViT):
            pairs.pop()
            _turn_map_head(vit.norm, whole.head[0], rotation)
        for norm, readers in pairs:
            for reader in readers:
                if reader.bias is not None:
                    _assign(reader.bias, in_float64(reader.bias) + in_float64(reader.weight) @ in_float64(norm.bias))
                _assign(reader.weight, (in_float64(reader.weight) * in_float64(norm.weight)) @ rotation)
            norm.weight.fill_(1)
            norm.bias.zero_()
        for block in vit.blocks:
            for scale, writer in ((block.ls1, block.attn.proj), (block.ls2, block.mlp.fc2)):
                gain = in_float64(scale.gamma) if isinstance(scale, LayerScale) else u.new_ones(size)
                _assign(writer.weight, rotation @ (gain[:, None] * in_float64(writer.weight)))
                if writer.bias is not None:
                    _assign(writer.bias, rotation @ (gain * in_float64(writer.bias)))
                if isinstance(scale, LayerScale):
                    scale.gamma.fill_(1)
        stem = vit.patch_embed.project if isinstance(vit.patch_embed, TokensToToken) else vit.patch_embed.proj
        _assign(stem.weight, torch.tensordot(rotation, in_float64(stem.weight), dims=1))
        if stem.bias is not None:
            _assign(stem.bias, rotation @ in_float64(stem.bias))
        for name in ("pos_embed", "cls_token", "reg_token", "dist_token"):
            table = getattr(vit, name, None)
            if table is not None:
                _assign(table, in_float64(table) @ rotation)
        if isinstance(whole, SpaceTimeViT):
            _assign(whole.time_embed, in_float64(whole.time_embed) @ rotation)


def _turn_map_head(norm: nn.Module, conv: nn.Module, rotation: Tensor) -> None:
    """Of a convolution that pads its map with zeros: the last norm's scale is folded into it, and the bias is not."""
    assert isinstance(conv, nn.Conv2d)
    weight = in_float64(conv.weight)
    if isinstance(norm, nn.LayerNorm):
        scale = in_float64(norm.weight)
        weight = weight * scale[:, None, None]
        _assign(norm.bias, rotation @ (in_float64(norm.bias) / scale))
        norm.weight.fill_(1)
    _assign(conv.weight, torch.einsum("oihw,ij->ojhw", weight, rotation))


def _readers(vit: VisionTransformer) -> list[tuple[nn.LayerNorm, list[nn.Linear]]]:
    """Every norm of the residual stream, and the linear maps that read it."""
    pairs = [(block.norm1, [block.attn.qkv]) for block in vit.blocks]
    pairs += [(block.norm2, [block.mlp.fc1]) for block in vit.blocks]
    head = vit.head.pre_logits.fc if isinstance(vit.head, RepresentationHead) else vit.head
    heads = [head for head in (head, getattr(vit, "head_dist", None)) if isinstance(head, nn.Linear)]
    return [*pairs, (vit.norm if isinstance(vit.norm, nn.LayerNorm) else vit.fc_norm, heads)]


def _rotatable(vit: nn.Module) -> VisionTransformer:
    """The ViT, if its residual stream can be turned."""
    name = model_name(vit)
    if not isinstance(vit, VisionTransformer):
        raise TypeError(f"the residual stream of {name} cannot be turned: it is no VisionTransformer of timm's")
    check_offers(vit, {"attention", "timm's plain blocks"}, "turning the residual stream")
    block, stem = vit.blocks[0], vit.patch_embed
    for part, fault in (
        ("norm_pre", not isinstance(vit.norm_pre, nn.Identity)),
        ("attn_pool", vit.attn_pool is not None),
        (
            "patch_embed",
            not isinstance(stem, TokensToToken)
            and (not isinstance(stem, PatchEmbed) or not isinstance(stem.norm, nn.Identity)),
        ),
        ("blocks.0.attn.gate", block.attn.gate is not None),
        ("blocks.0.mlp", type(block.mlp) is not Mlp),
    ):
        if fault:
            raise TypeError(f"{name}.{part} is of a kind whose residual stream cannot be turned")
    for norm, readers in _readers(vit):
        if not isinstance(norm, nn.LayerNorm):
            raise TypeError(f"{name} has {type(norm).__name__}; only with LayerNorm can the residual stream be turned")
        if any(reader.bias is None and norm.bias.any() for reader in readers):
            raise TypeError(f"{name} has a linear map without bias after a norm with one, which cannot be turned")
    return vit


def _assign(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))
