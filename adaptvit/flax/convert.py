"""Between the two sides: a timm ViT with ATS, as `adaptvit.ATSConfig` builds it, and the Flax ATS ViT.

Letters: D channels, C colours, P and Q height and width of a patch, K draws.
"""

from collections.abc import Mapping
from typing import Any

import flax
import jax.numpy as jnp
import numpy as np
import torch
from timm.layers import Attention, LayerNorm, LayerScale, Mlp, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from adaptvit.backbones.base import model_name
from adaptvit.flax.ats_vit import Flavour, ViT, pair
from adaptvit.methods.ats import ATS, ATSConfig

PARTS: tuple[type, ...] = (
    *(VisionTransformer, PatchEmbed, Block, Attention, LayerScale, Mlp, LayerNorm),
    *(nn.Sequential, nn.Identity, nn.Conv2d, nn.Linear, nn.LayerNorm, nn.GELU, nn.Dropout),
)
"""What a ViT may consist of; the names of its weights then say whether each part is where it should be."""


def from_timm(model: ATS) -> tuple[ViT, dict[str, Any]]:
    """The Flax module and variables that give a model's logits and tokens; LayerScale goes into the linear maps.

    Raises:
        TypeError: the ViT has a part that the Flax one lacks.
        ValueError: the ViT or its sampling has a setting that the Flax one lacks.
    """
    if type(model.config) is not ATSConfig:
        raise ValueError(f"{type(model.config).__name__} has no counterpart in Flax, which has ATSConfig's")
    settings = architecture(model.vit)
    patches, depth = model.vit.patch_embed.num_patches, settings["depth"]
    points = {block: max(1.0, model.config.rate * (count or patches)) for block, count in model.points.items()}
    counts = [max(points.values(), default=float(patches))]
    for block in range(depth):
        counts.append(points.get(block, counts[-1]))
    module = ViT(
        **settings,
        max_tokens_per_depth=tuple(counts[1:]),
        blocks=tuple(points),
        sampler=model.config.sampler,
    )
    state = {key: value.detach().cpu().float() for key, value in model.vit.state_dict().items()}
    for scale, writer in (("ls1.gamma", "attn.proj"), ("ls2.gamma", "mlp.fc2")):
        for key in [key for key in state if key.endswith(scale)]:
            gamma, weight = state.pop(key), key.replace(scale, writer)
            state[f"{weight}.weight"] = state[f"{weight}.weight"] * gamma[:, None]
            state[f"{weight}.bias"] = state[f"{weight}.bias"] * gamma
    params = {path: to_flax(state[key]) for path, key in names(module).items()}
    return module, {"params": flax.traverse_util.unflatten_dict(params, sep="/")}


def to_timm(module: ViT, variables: Mapping[str, Any], vit: VisionTransformer) -> None:
    """Write a Flax ViT's weights into a timm ViT of the same sizes, in place; a LayerScale there is set to 1.

    Raises:
        TypeError: the timm ViT has a part that the Flax one lacks.
        ValueError: the two differ in a size or a setting.
    """
    for name, value in architecture(vit).items():
        ours = getattr(module, name)
        if (pair(ours) if name.endswith("_size") else ours) != value:
            raise ValueError(f"the Flax ViT has {name} {ours}, but {model_name(vit)} has {value}")
    params = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    state = vit.state_dict()
    for path, key in names(module).items():
        state[key] = to_torch(params[path], state[key].shape)
    for key in state:
        if key.endswith(".gamma"):
            state[key] = torch.ones_like(state[key])
    vit.load_state_dict(state)


def architecture(vit: VisionTransformer) -> dict[str, Any]:
    """A timm ViT's sizes and flavour, as arguments of the Flax one.

    Raises:
        TypeError: the ViT has a part that the Flax one lacks.
        ValueError: the ViT has a setting that the Flax one lacks.
    """
    block = vit.blocks[0]
    for path, part in vit.named_modules():
        if type(part) not in PARTS:
            allowed = ", ".join(kind.__name__ for kind in PARTS)
            raise TypeError(f"{path or model_name(vit)} is a {type(part).__name__}; the Flax ViT has only {allowed}")
        if isinstance(part, nn.Dropout) and part.p > 0:
            raise ValueError(f"{path} drops out with p={part.p}; only 0 converts: set dropout of the Flax ViT instead")
        if isinstance(part, nn.GELU) and part.approximate != "none":
            raise ValueError(f"{path} is GELU with approximate={part.approximate!r}; only 'none' converts")
        if isinstance(part, nn.LayerNorm) and part.eps != block.norm1.eps:
            raise ValueError(f"{path} has eps {part.eps}, the first norm {block.norm1.eps}; only equal ones convert")
    if vit.global_pool != "token":
        raise ValueError(f"{model_name(vit)} has global_pool {vit.global_pool!r}; only 'token' converts")
    if vit.no_embed_class:
        raise ValueError(f"{model_name(vit)} has no_embed_class=True; only a class token with a position converts")
    settings = {
        "image_size": tuple(vit.patch_embed.img_size),
        "patch_size": tuple(vit.patch_embed.patch_size),
        "num_classes": vit.num_classes,
        "dim": vit.embed_dim,
        "depth": len(vit.blocks),
        "heads": block.attn.num_heads,
        "mlp_dim": block.mlp.fc1.out_features,
        "dim_head": block.attn.head_dim,
        "flavour": Flavour(
            norm_eps=block.norm1.eps, norm_bias=True, qkv_bias=block.attn.qkv.bias is not None, exact_gelu=True
        ),
    }
    expected = set(names(ViT(**settings, max_tokens_per_depth=(1,) * settings["depth"])).values())
    odd = sorted(expected.symmetric_difference(key for key in vit.state_dict() if not key.endswith(".gamma")))
    if odd:
        raise TypeError(f"{model_name(vit)} {'lacks' if odd[0] in expected else 'has'} {odd[0]}, unlike the Flax ViT")
    return settings


def names(module: ViT) -> dict[str, str]:
    """Paths of a Flax ViT's parameters, `a/b/c`, and the keys of the same weights in timm."""
    parts = {"Dense_0": "patch_embed.proj", "LayerNorm_0": "norm", "Dense_1": "head"}
    for i in range(module.depth):
        parts |= {
            f"Transformer_0/PreNorm_{2 * i}/LayerNorm_0": f"blocks.{i}.norm1",
            f"Transformer_0/Attention_{i}/Dense_0": f"blocks.{i}.attn.qkv",
            f"Transformer_0/Attention_{i}/Dense_1": f"blocks.{i}.attn.proj",
            f"Transformer_0/PreNorm_{2 * i + 1}/LayerNorm_0": f"blocks.{i}.norm2",
            f"Transformer_0/FeedForward_{i}/Dense_0": f"blocks.{i}.mlp.fc1",
            f"Transformer_0/FeedForward_{i}/Dense_1": f"blocks.{i}.mlp.fc2",
        }
    keys = {"cls": "cls_token", "pos_embedding": "pos_embed"}
    for path, part in parts.items():
        keys[f"{path}/scale" if "LayerNorm" in path else f"{path}/kernel"] = f"{part}.weight"
        if module.flavour.qkv_bias or not part.endswith("qkv"):
            keys[f"{path}/bias"] = f"{part}.bias"
    return keys


def to_flax(weight: Tensor) -> jnp.ndarray:
    """A weight in Flax's layout: (out, in) -> (in, out), and the convolution (D, C, P, Q) -> (PQC, D)."""
    if weight.ndim == 4:
        weight = weight.permute(0, 2, 3, 1).flatten(1)
    return jnp.asarray(weight.T.numpy() if weight.ndim == 2 else weight.numpy())


def to_torch(weight: jnp.ndarray, shape: torch.Size) -> Tensor:
    """The weight of that shape that `to_flax` was given."""
    value = torch.from_numpy(np.array(weight))
    if len(shape) == 4:
        return value.T.unflatten(1, (shape[2], shape[3], shape[1])).permute(0, 3, 1, 2)
    return value.T if value.ndim == 2 else value
