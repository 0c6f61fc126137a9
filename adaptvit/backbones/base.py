"""What a host is: a timm ViT that is reproduced exactly, what it offers to methods, and what its parts say of it.

`check` refuses, by name, what is not reproduced. No module reads a timm model's blocks but those of this folder,
`adaptvit.flax.convert`, and A-ViT's released pass, whose gradients no block of timm's has.
"""

from collections.abc import Callable, Set
from typing import Any

import torch
from timm.layers import Attention, GluMlp, HybridEmbed, Mlp, PatchEmbed, SwiGLU
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from adaptvit.backbones.maps import is_hooked
from adaptvit.backbones.parts import Mixer, PartsViT, TokenPart
from adaptvit.backbones.t2t import TokensToToken

SUPPORTED = "timm's VisionTransformer and VisionTransformerDistilled with standard blocks, and PartsViT"


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


def check_called_by_parts(vit: VisionTransformer) -> None:
    """Refuse what somebody put around or on a block, or its attention, as wholes: blocks run by parts.

    Raises:
        NotImplementedError: naming it.
    """
    for number, block in enumerate(vit.blocks):
        if type(block) is not Block:
            raise NotImplementedError(
                f"{type(block).__name__} around block {number} of {model_name(vit)} would not act: blocks run by parts"
            )
        for module in (block, block.attn):
            if is_hooked(module):
                raise NotImplementedError(
                    f"a hook on {type(module).__name__} in block {number} of {model_name(vit)} would not be called: "
                    "blocks run by parts, and hooks on those are called (norms, qkv, proj, mlp, fc1, fc2)"
                )


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
