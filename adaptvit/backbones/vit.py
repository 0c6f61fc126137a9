"""The one door to timm: runs a timm ViT's own submodules on `Tokens`, and refuses, by name, what it does not reproduce.

Letters: B images, N token slots (prefix tokens first, then patches), D channels, H heads, d channels per head.
No other module of the package reads a timm model's attributes, but for `t2t` and `parts` beside it, which make
some, and `adaptvit.flax.convert`.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Set
from typing import Any

import timm
import torch
from timm.layers import Attention, DropPath, GluMlp, HybridEmbed, LayerScale, Mlp, PatchEmbed, SwiGLU
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from adaptvit.backbones.parts import (
    Mixer,
    PartsViT,
    RepresentationHead,
    TokenPart,
    ViTConfig,
    add_representation,
    set_head_dim,
)
from adaptvit.backbones.t2t import PATCH, TokensToToken, linear_macs, t2t_vit
from adaptvit.macs import BlockShape, Shape
from adaptvit.tokens import Tokens

SUPPORTED = "timm's VisionTransformer and VisionTransformerDistilled with standard blocks, and PartsViT"
MLP_ROWS = 1024
"""Tokens that go through an MLP at a time in evaluation on the CPU: few enough for the hidden features to stay in its
caches, enough for full matrix products. At batch 32 the MLPs of DeiT-S take 0.77 of the time, a fifth of the memory."""
Rule = tuple[str, Callable[[Any], bool]]
"""What is allowed, in words and as a question."""


def _is(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _whole(least: int, most: int = 2**24) -> Rule:
    return f"a whole number from {least} to {most}", lambda value: _is(value, int) and least <= value <= most


def _number(above: float, most: float) -> Rule:
    words = f"a number above {above:g}, {most:g} at most"
    return words, lambda value: _is(value, int, float) and above < value <= most


def _one_of(*names: str) -> Rule:
    return f"one of {', '.join(map(repr, names))}", lambda value: isinstance(value, str) and value in names


def _several(rule: Rule, least: int, most: int) -> Rule:
    def allowed(value: Any) -> bool:
        return isinstance(value, (list, tuple)) and least <= len(value) <= most and all(map(rule[1], value))

    return f"{least} to {most} of {rule[0]}" if most > least else f"{least} of {rule[0]}", allowed


SIDE = _whole(1, 2**16)
WORD: Rule = ("a word", lambda value: isinstance(value, str))
FLAG: Rule = ("true or false", lambda value: isinstance(value, bool))
PREPROCESSING: dict[str, Rule] = {
    "input_size": _several(SIDE, 3, 3),
    "fixed_input_size": FLAG,
    "interpolation": _one_of("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"),
    "mean": _several(_number(-1e6, 1e6), 1, 2**16),
    "std": _several(_number(0, 1e6), 1, 2**16),
    "crop_pct": _number(0.05, 20),
    "crop_mode": _one_of("center", "squash", "border"),
    "test_input_size": _several(SIDE, 3, 3),
    "test_crop_pct": _number(0.05, 20),
}
"""What timm's `pretrained_cfg` says about the images."""
ARGUMENTS: dict[str, Rule] = {
    "img_size": _several(SIDE, 2, 2),
    "patch_size": _several(SIDE, 2, 2),
    "in_chans": SIDE,
    "num_classes": _whole(0),
    "global_pool": _one_of("", "token", "avg", "avgmax", "max", "map"),
    "embed_dim": SIDE,
    "depth": SIDE,
    "num_heads": SIDE,
    "mlp_ratio": _number(0, 2**10),
    "qkv_bias": FLAG,
    "qk_norm": FLAG,
    "init_values": _number(0, 1e6),
    "no_embed_class": FLAG,
    "reg_tokens": _whole(0, 2**16),
    "pre_norm": FLAG,
    "dynamic_img_size": FLAG,
    "dynamic_img_pad": FLAG,
    "class_token": FLAG,
    "pool_include_prefix": FLAG,
    "tokens_type": WORD,
    "token_dim": SIDE,
    "representation_size": SIDE,
    "head_dim": SIDE,
    **dict.fromkeys(("position", "norm", "attention", "block"), WORD),
}
"""Arguments of a ViT that a file may name; whatever else timm's `create_model` takes could read another file."""


Projected = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values."""


def check(vit: Any) -> None:
    """Refuse a model that `run_block` and `classify` would not reproduce.

    Raises:
        TypeError: naming the part that is not supported and what is.
    """
    name = model_name(vit)
    if type(vit) not in (VisionTransformer, VisionTransformerDistilled, PartsViT):
        raise TypeError(f"{name} is a {type(vit).__name__}; supported are {SUPPORTED}")
    allowed: dict[str, tuple[type, ...]] = {
        "block": (Block,),
        "attn": (Attention,),
        "qkv": (nn.Linear,),
        "mlp": (Mlp, GluMlp, SwiGLU),
        "patch_embed": (PatchEmbed, HybridEmbed, TokensToToken),
        "attn_pool": (type(None), AttentionPoolLatent),
    }
    parts: list[tuple[str, nn.Module | None]] = [("patch_embed", vit.patch_embed), ("attn_pool", vit.attn_pool)]
    for block in vit.blocks:
        if type(block) is not Block:
            parts.append(("block", block))
            break
        parts.append(("mlp", block.mlp))
        if not isinstance(block.attn, Mixer):
            parts.append(("attn", block.attn))
        if type(block.attn) is Attention:
            parts.append(("qkv", block.attn.qkv))
    for part, module in parts:
        if type(module) not in allowed[part]:
            names = " or ".join(kind.__name__ for kind in allowed[part])
            raise TypeError(f"{name}.{part} is a {type(module).__name__}, which is not supported; allowed: {names}")
    if any(isinstance(block.norm1, TokenPart) and getattr(block.attn, "gate", None) for block in vit.blocks):
        raise TypeError(f"{name} has gated attention after a norm over tokens, which is not supported")
    if (rate := getattr(vit.patch_drop, "prob", 0)) > 0:
        raise TypeError(
            f"{name} has patch_drop_rate={rate:g}, which takes patches out of their slots in training and is not "
            "supported: create it with patch_drop_rate=0"
        )
    if vit.grad_checkpointing:
        raise TypeError(f"{name} has gradient checkpointing on, which is not supported: set_grad_checkpointing(False)")


def _in_place_of_attention(vit: VisionTransformer) -> str | None:
    kinds = {type(block.attn).__name__ for block in vit.blocks if isinstance(block.attn, Mixer)}
    return f"the blocks of {model_name(vit)} have {kinds.pop()} in its place" if kinds else None


def _norms_over_tokens(vit: VisionTransformer) -> str | None:
    norms = [norm for block in vit.blocks for norm in (block.norm1, block.norm2)]
    kinds = {type(norm).__name__ for norm in norms if isinstance(norm, TokenPart)}
    return f"{model_name(vit)} has {kinds.pop()}, over all tokens of an image" if kinds else None


def _goes_by_slots(vit: VisionTransformer) -> str | None:
    attended = [block.attn for block in vit.blocks if not isinstance(block.attn, Mixer)]
    kinds = {type(part).__name__ for attn in attended for part in attn.q_norm.modules() if isinstance(part, TokenPart)}
    return f"{model_name(vit)} has {kinds.pop()}, which goes by a token's slot" if kinds else None


def _pools(vit: VisionTransformer) -> str | None:
    return f"{model_name(vit)} pools all its tokens" if read_slots(vit) is None else None


def _unequal_heads(vit: VisionTransformer) -> str | None:
    counts = sorted({block.attn.num_heads for block in vit.blocks if not isinstance(block.attn, Mixer)})
    return f"the blocks of {model_name(vit)} have {' or '.join(map(str, counts))}" if len(counts) > 1 else None


OFFERS: dict[str, Callable[[VisionTransformer], str | None]] = {
    "attention": _in_place_of_attention,
    "token norms": _norms_over_tokens,
    "free slots": _goes_by_slots,
    "a class token": _pools,
    "equal heads": _unequal_heads,
}
"""What a method may need of a ViT, and what a ViT that does not offer it has instead; None where it does.

    attention       in every block
    token norms     of each token by itself
    free slots      tokens may change theirs: queries and keys do not go by them
    a class token   which the classifier reads, rather than pool all tokens
    equal heads     as many in every block
"""


def check_offers(vit: VisionTransformer, needs: Set[str], who: str) -> None:
    """Refuse a ViT that does not offer what `who` needs, names in `OFFERS`.

    Raises:
        TypeError: naming the need, and what the ViT has instead.
    """
    for need in OFFERS:
        if need in needs and (instead := OFFERS[need](vit)):
            raise TypeError(f"{who} needs {need}, but {instead}")


def model_name(vit: nn.Module) -> str:
    """timm's name of the architecture, or the class name of a model built by hand."""
    return timm_config(vit).get("architecture") or type(vit).__name__


def timm_config(vit: nn.Module) -> dict[str, Any]:
    """timm's record of the weights and of the images they were trained on; empty for a model built by hand."""
    return getattr(vit, "pretrained_cfg", None) or {}


def input_size(vit: VisionTransformer) -> tuple[int, int, int]:
    """Channels, height and width of the images; timm's own record keeps those of the pretrained weights."""
    return (vit.in_chans, *vit.patch_embed.img_size)


def class_count(vit: VisionTransformer) -> int:
    """Classes of the head; 0 without one."""
    return vit.num_classes


def prefix_tokens(vit: VisionTransformer) -> int:
    """Class, distillation and register tokens: the slots before the first patch."""
    return vit.num_prefix_tokens


def position_rows(vit: VisionTransformer) -> int:
    """Rows of the position table before those of the patches; DeiT III and ViTs with registers may have none."""
    return 0 if vit.no_embed_class else vit.num_prefix_tokens


def read_slots(vit: VisionTransformer) -> int | None:
    """How many leading slots the classifier reads: 1 with a class token, 2 when distilled, None where it pools all."""
    if isinstance(vit, VisionTransformerDistilled):
        return 2
    return 1 if vit.global_pool == "token" else None


def embed(vit: VisionTransformer, images: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Images -> tokens (B, N, D) as the first block receives them, and the patch grid (rows, columns).

    An image that is not finite has no finite token, so that whatever a method leaves out of it, its logits are NaN.

    Raises:
        ValueError: the images' shape or device does not fit the model.
        TypeError: the images are not floating point, or of another precision than the weights.
    """
    check_images(vit, images)
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    spoilt = 0 * x.sum(dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))  # 0, or NaN
    return x + spoilt.to(x.dtype), patch_grid(vit, images)


def check_images(vit: VisionTransformer, images: Tensor) -> None:
    """Refuse images that the ViT does not take.

    Raises:
        TypeError: they are of another precision.
        ValueError: they are of another shape, or on another device.
    """
    name, weight = model_name(vit), next(vit.parameters())
    if images.ndim != 4 or images.shape[1] != vit.in_chans:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, but {name} takes (batch, {vit.in_chans}, height, width)"
        )
    if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
        raise TypeError(f"images are {images.dtype}, but {name} is {weight.dtype}: convert and normalise them first")
    if images.device != weight.device:
        raise ValueError(f"images are on {images.device}, but {name} is on {weight.device}")
    size = tuple(vit.patch_embed.img_size)
    if not vit.dynamic_img_size and tuple(images.shape[2:]) != size:
        raise ValueError(
            f"images are {images.shape[2]} x {images.shape[3]} pixels, but {name} takes {size[0]} x {size[1]}; "
            "create it with img_size=... or dynamic_img_size=True"
        )


def patch_grid(vit: VisionTransformer, images: Tensor | None = None) -> tuple[int, ...]:
    """Rows and columns of patches that the images are cut into; None: images of the ViT's own size."""
    return vit.patch_embed.dynamic_feat_size(vit.patch_embed.img_size if images is None else images.shape[-2:])


def attention_norm(vit: VisionTransformer, block: int, x: Tensor) -> Tensor:
    """What the attention sub-layer of a block reads of features (..., D)."""
    return vit.blocks[block].norm1(x)


def like_norm(vit: VisionTransformer) -> nn.Module:
    """A fresh norm of the kind and size that the blocks have."""
    norm = copy.deepcopy(vit.blocks[0].norm1)
    norm.reset_parameters()
    return norm.requires_grad_(True)


def run_block(
    block: Block,
    tokens: Tokens,
    chosen: Tensor | None = None,
    projected: Projected | None = None,
    bias: Tensor | None = None,
) -> Tokens:
    """One transformer block.

    Args:
        chosen: (B, N) or (1, N) bool, the slots to update; the others are attended to and then dropped. None: all.
        projected: what `project` gave, where it was needed to choose.
        bias: token features (...,), added to the attention logits of each token as a key.
    """
    if chosen is None or not isinstance(block.norm2, TokenPart):
        return add_mlp(block, add_attention(block, tokens, chosen, projected, bias))
    tokens = add_attention(block, tokens, None, projected, bias)  # a norm over tokens sees those that are dropped too
    normed = block.norm2.on(tokens.x, tokens)
    rows, (normed,) = tokens.filter(tokens.spread(chosen.expand(tokens.shape)), normed)
    return add_mlp(block, rows, normed)


def add_attention(
    block: Block,
    tokens: Tokens,
    chosen: Tensor | None = None,
    projected: Projected | None = None,
    bias: Tensor | None = None,
) -> Tokens:
    """The attention sub-layer with its residual; `chosen`, `projected` and `bias` as in `run_block`."""
    attn = block.attn
    if isinstance(attn, Mixer):
        return _add_mixed(block, tokens, chosen)
    rows = tokens
    if chosen is None:
        q, k, v = projected or project(block, tokens)
    elif projected is not None:
        q, k, v = projected
        rows, (q,) = tokens.filter(tokens.spread(chosen.expand(tokens.shape)), q)
    else:  # without the queries of the others
        normed = on_tokens(block.norm1, tokens.x, tokens)
        rows, (few,) = tokens.filter(tokens.spread(chosen.expand(tokens.shape)), normed)
        (q,) = _heads(block, few, slice(attn.attn_dim))
        k, v = _heads(block, normed, slice(attn.attn_dim, None))
        q, k = on_tokens(attn.q_norm, q, rows), on_tokens(attn.k_norm, k, tokens)
    mixed = tokens.attend(q, k, v, rows, attn.attn_drop.p if attn.training else 0.0, bias)
    out = through(attn.norm, mixed.flatten(-2))
    if attn.gate is not None:
        out = out * attn.gate(block.norm1(rows.x)).sigmoid()
    return add_branch(rows, through(block.ls1, attn.proj_drop(attn.proj(out))), block.drop_path1)


def _add_mixed(block: Block, tokens: Tokens, chosen: Tensor | None) -> Tokens:
    """`add_attention` where something else stands in its place, which runs over all slots at once."""
    mixed = through(block.ls1, block.attn.on(on_tokens(block.norm1, tokens.x, tokens), tokens))
    if chosen is not None:
        tokens, (mixed,) = tokens.filter(tokens.spread(chosen.expand(tokens.shape)), mixed)
    return add_branch(tokens, mixed, block.drop_path1)


def project(block: Block, tokens: Tokens) -> Projected:
    """Queries, keys and values of the attention sub-layer, normalised as the ViT does: features (..., H, d) each.

    Raises:
        TypeError: the block has something else in the place of attention.
    """
    return project_normed(block, tokens, on_tokens(block.norm1, tokens.x, tokens))


def project_normed(block: Block, tokens: Tokens, normed: Tensor) -> Projected:
    """As `project`, of what the block's first norm gave of `tokens`."""
    attn = block.attn
    if isinstance(attn, Mixer):
        raise TypeError(f"the block has {type(attn).__name__} in the place of attention: no queries, keys and values")
    q, k, v = _heads(block, normed, slice(None))
    return on_tokens(attn.q_norm, q, tokens), on_tokens(attn.k_norm, k, tokens), v


def _heads(block: Block, normed: Tensor, rows: slice) -> tuple[Tensor, ...]:
    """Those of queries, keys and values that stand in these rows of their common linear map, by head."""
    attn = block.attn
    weight = attn.qkv.weight[rows]
    out = linear(normed, weight, None if attn.qkv.bias is None else attn.qkv.bias[rows])
    parts = len(weight) // attn.attn_dim
    return out.view(*normed.shape[:-1], parts, attn.num_heads, attn.head_dim).unbind(-3)


def attention_received(tokens: Tokens, projected: Projected, slots: int | None) -> Tensor:
    """Attention that each token receives, mean over queries, by head: features (..., H).

    Args:
        projected: what `project` gave.
        slots: the queries are those of the first so many slots; None takes all live tokens.
    """
    q, k, _ = projected
    return tokens.received(tokens.rows(q) if slots is None else tokens.first(q, slots), k)


def add_mlp(block: Block, tokens: Tokens, normed: Tensor | None = None) -> Tokens:
    """The MLP sub-layer with its residual; in evaluation on the CPU a part of the tokens at a time.

    Args:
        normed: what the block's second norm gives of `tokens`, where it is known.
    """
    x = tokens.x
    if normed is None and isinstance(block.norm2, TokenPart):
        normed = block.norm2.on(x, tokens)

    def mlp(read: Tensor) -> Tensor:
        return through(block.ls2, block.mlp(block.norm2(read) if normed is None else read))

    read = x if normed is None else normed
    if torch.is_grad_enabled() or block.training or x.device.type != "cpu" or x.shape[:-1].numel() <= MLP_ROWS:
        return add_branch(tokens, mlp(read), block.drop_path2)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = (out.view(-1, x.shape[-1]), x.flatten(0, -2), read.flatten(0, -2))
    for place, rows, some in zip(*(part.split(MLP_ROWS) for part in parts), strict=True):
        torch.add(rows, mlp(some), out=place)
    return tokens.with_x(out)


def classify(vit: VisionTransformer, x: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Final norm, pooling and head.

    Args:
        x: (B, n, D), the slots that `read_slots` names, or all.
        live: (B, n) bool, the slots to pool; None pools all of `x`.
    Returns:
        logits (B, classes), and the distillation head's in timm's distilled training, else None.
    """
    x = vit.norm(x)
    if live is not None and vit.global_pool != "token":
        return vit.head(vit.head_drop(vit.fc_norm(_pool(vit, x, live)))), None
    logits = vit.forward_head(x)
    return logits if isinstance(logits, tuple) else (logits, None)


def final_norm(vit: VisionTransformer, x: Tensor) -> Tensor:
    """What the ViT makes of features (..., D) of its last block before it pools them."""
    return vit.norm(x)


def _pool(vit: VisionTransformer, x: Tensor, live: Tensor) -> Tensor:
    """timm's pooling of (B, N, D) over live slots only."""
    if vit.attn_pool is not None:
        start = 0 if vit.pool_include_prefix else vit.num_prefix_tokens
        return vit.attn_pool(x[:, start:], attn_mask=live[:, None, None, start:])
    patches = slice(0 if vit.pool_include_prefix else vit.num_prefix_tokens, None)
    alive = live[:, patches, None]
    mean = (x[:, patches] * alive).sum(dim=1, keepdim=True) / alive.sum(dim=1, keepdim=True)
    # in dead slots the mean moves neither mean nor maximum
    return vit.pool(torch.where(live[..., None], x, mean))


def set_channel(vit: VisionTransformer, direction: Tensor) -> None:
    """Turn the residual stream, in place, so that channel 0 carries a direction of it; the ViT computes what it did.

    A rotation that keeps the all-ones vector commutes with layer norm once its weights are folded into the linear maps
    that follow, and every linear map can be turned to match. The rotation is the reflection that takes channel 0 to
    mean(x) + sqrt(1 - 1/D) u.x, u being the direction without its mean, of unit length.

    Args:
        direction: (D,), not constant, on the ViT's device.
    Raises:
        TypeError: the ViT has a part that no rotation passes through: another norm than layer norm, a norm before the
            blocks, an attention pool, gated attention, or a linear map without the bias that a norm's would go to.
        ValueError: the direction is constant.
    """
    _check_rotatable(vit)
    size = vit.embed_dim
    u = direction.double() - direction.double().mean()
    if not u.norm() > 0:
        raise ValueError("the direction for channel 0 is constant over the channels, which layer norm cannot see")
    identity = torch.eye(size, dtype=torch.float64, device=u.device)
    v = identity[0] - (1 / size + (1 - 1 / size) ** 0.5 * u / u.norm())
    rotation = identity - 2 * torch.outer(v, v) / v.dot(v)
    with torch.no_grad():
        for norm, readers in _readers(vit):
            for reader in readers:
                if reader.bias is not None:
                    _assign(reader.bias, reader.bias.double() + reader.weight.double() @ norm.bias.double())
                _assign(reader.weight, (reader.weight.double() * norm.weight.double()) @ rotation)
            norm.weight.fill_(1)
            norm.bias.zero_()
        for block in vit.blocks:
            for scale, writer in ((block.ls1, block.attn.proj), (block.ls2, block.mlp.fc2)):
                gain = scale.gamma.double() if isinstance(scale, LayerScale) else u.new_ones(size)
                _assign(writer.weight, rotation @ (gain[:, None] * writer.weight.double()))
                if writer.bias is not None:
                    _assign(writer.bias, rotation @ (gain * writer.bias.double()))
                if isinstance(scale, LayerScale):
                    scale.gamma.fill_(1)
        stem = vit.patch_embed.project if isinstance(vit.patch_embed, TokensToToken) else vit.patch_embed.proj
        _assign(stem.weight, torch.tensordot(rotation, stem.weight.double(), dims=1))
        if stem.bias is not None:
            _assign(stem.bias, rotation @ stem.bias.double())
        for name in ("pos_embed", "cls_token", "reg_token", "dist_token"):
            table = getattr(vit, name, None)
            if table is not None:
                _assign(table, table.double() @ rotation)


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


def describe(vit: VisionTransformer) -> dict[str, Any]:
    """What `rebuild` needs to make the same architecture and to prepare its images: JSON-able, weights not included.

    Raises:
        ValueError: the ViT differs from what timm's name and arguments give, so that it could not be rebuilt.
    """
    arguments = _parts_arguments(vit) if isinstance(vit, PartsViT) else _timm_arguments(vit)
    if isinstance(vit.head, RepresentationHead):
        arguments["representation_size"] = vit.head.fc.in_features
    name, recorded = model_name(vit), timm_config(vit)
    data = {key: recorded[key] for key in PREPROCESSING if key in recorded}
    description = {"architecture": name, "arguments": arguments, "data": data}
    with torch.device("meta"):
        twin = rebuild(description)
    if _anatomy(twin) != _anatomy(vit):
        raise ValueError(f"this {name} has parts that its timm name and arguments do not give, so it cannot be saved")
    return description


def _parts_arguments(vit: PartsViT) -> dict[str, Any]:
    """The fields of its config, as the ViT is now; as for timm's, without what only regularises."""
    arguments = dataclasses.asdict(vit.config) | {"num_classes": vit.num_classes, "global_pool": vit.global_pool}
    del arguments["drop_path_rate"]
    return arguments


def _timm_arguments(vit: VisionTransformer) -> dict[str, Any]:
    block = vit.blocks[0]
    arguments = {
        "img_size": list(vit.patch_embed.img_size),
        "patch_size": list(vit.patch_embed.patch_size),
        "in_chans": vit.in_chans,
        "num_classes": vit.num_classes,
        "global_pool": vit.global_pool,
        "embed_dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "init_values": 1e-5 if isinstance(block.ls1, LayerScale) else None,
        "no_embed_class": vit.no_embed_class,
        "reg_tokens": vit.num_reg_tokens,
        "pre_norm": not isinstance(vit.norm_pre, nn.Identity),
        "dynamic_img_size": vit.dynamic_img_size,
        "dynamic_img_pad": vit.patch_embed.dynamic_img_pad,
    }
    if block.attn.attn_dim != vit.embed_dim:
        arguments["head_dim"] = block.attn.head_dim
    if type(block.mlp) is Mlp:
        arguments["mlp_ratio"] = block.mlp.fc1.out_features / vit.embed_dim
    if type(vit) is VisionTransformer:
        arguments["class_token"] = vit.has_class_token
        arguments["pool_include_prefix"] = vit.pool_include_prefix
    if isinstance(vit.patch_embed, TokensToToken):
        arguments["tokens_type"] = vit.patch_embed.tokens_type
        arguments["token_dim"] = vit.patch_embed.token_dim
    return arguments


def rebuild(description: dict[str, Any], **others: Any) -> VisionTransformer:
    """The ViT of `describe`, with fresh weights.

    Args:
        others: arguments of timm's that are to be other than described.
    Raises:
        KeyError: the description lacks something.
        ValueError: timm does not know the architecture, or the description has something that none of ours has.
    """
    name = description["architecture"]
    arguments = check_described("its ViT's argument", description["arguments"], ARGUMENTS)
    recorded = check_described("its images'", description["data"], PREPROCESSING)
    for size in ("img_size", "patch_size"):
        arguments[size] = tuple(arguments[size])
    representation_size = arguments.pop("representation_size", None)
    head_dim = arguments.pop("head_dim", None)
    arguments |= others
    by_hand: dict[str, Callable[..., Any]] = {
        "VisionTransformer": t2t_vit if "tokens_type" in arguments else VisionTransformer,
        "VisionTransformerDistilled": VisionTransformerDistilled,
        "PartsViT": lambda **fields: ViTConfig(**fields).build(),
    }
    if not isinstance(name, str):
        raise ValueError(f"the name of its ViT must be a word, got {repr(name)[:80]}")
    if name in by_hand:
        vit = by_hand[name](**arguments)
    elif timm.is_model(name):
        vit = timm.create_model(name, pretrained=False, **arguments)
    else:
        raise ValueError(f"timm {timm.__version__} has no model named {name!r}")
    if head_dim:
        set_head_dim(vit, head_dim)
    if representation_size:
        add_representation(vit, representation_size)
    data = {key: tuple(value) if isinstance(value, list) else value for key, value in recorded.items()}
    vit.pretrained_cfg = {**timm_config(vit), **data}
    return vit


def check_described(what: str, values: Any, rules: Mapping[str, Rule]) -> dict[str, Any]:
    """The values of a description that are told, which is what others may have written.

    Raises:
        ValueError: one of them is of a kind or size that none of ours has.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{what}s must be a table of names and values, got {type(values).__name__}")
    told = {name: value for name, value in values.items() if value is not None}
    for name, value in told.items():
        if name not in rules:
            raise ValueError(f"{what} {str(name)[:80]!r} is not known; a newer adaptvit may have written it")
        words, allowed = rules[name]
        if not allowed(value):
            raise ValueError(f"{what} {name} must be {words}, got {repr(value)[:80]}")
    return told


def _readers(vit: VisionTransformer) -> list[tuple[nn.LayerNorm, list[nn.Linear]]]:
    """Every norm of the residual stream, and the linear maps that read it."""
    pairs = [(block.norm1, [block.attn.qkv]) for block in vit.blocks]
    pairs += [(block.norm2, [block.mlp.fc1]) for block in vit.blocks]
    head = vit.head.pre_logits.fc if isinstance(vit.head, RepresentationHead) else vit.head
    heads = [head for head in (head, getattr(vit, "head_dist", None)) if isinstance(head, nn.Linear)]
    return [*pairs, (vit.norm if isinstance(vit.norm, nn.LayerNorm) else vit.fc_norm, heads)]


def _check_rotatable(vit: VisionTransformer) -> None:
    name = model_name(vit)
    check_offers(vit, {"attention"}, "turning the residual stream")
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


def _assign(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))


def through(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), without the price of a call where there is nothing to do; at batch 1 those add up."""
    return x if type(module) is nn.Identity else module(x)


def on_tokens(part: nn.Module, x: Tensor, tokens: Tokens) -> Tensor:
    """A part of a block on token features of `tokens`."""
    if isinstance(part, TokenPart):
        return part.on(x, tokens)
    if isinstance(part, nn.Sequential):
        for step in part:
            x = on_tokens(step, x, tokens)
        return x
    return through(part, x)


def add_branch(tokens: Tokens, branch: Tensor, drop_path: nn.Module) -> Tokens:
    if isinstance(drop_path, DropPath) and drop_path.training:
        branch = branch * tokens.spread(drop_path(branch.new_ones(tokens.shape[0], 1, 1)))
    return tokens.with_x(tokens.x + branch)


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


def _anatomy(vit: nn.Module) -> tuple[dict[str, torch.Size], list[str]]:
    """Parameter names and shapes, and every part that computes, leaving out what only regularises."""
    regularisers = (nn.Identity, nn.Dropout, DropPath)
    shapes = {key: value.shape for key, value in vit.state_dict().items()}
    parts = [repr(part) for part in vit.modules() if not list(part.children()) and not isinstance(part, regularisers)]
    return shapes, parts
