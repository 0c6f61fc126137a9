"""What is written down of a timm ViT to make it again: architecture, arguments, preparation of its images.

    describe    a ViT -> what a file keeps of it
    rebuild     that -> the same ViT with fresh weights

A file may come from anybody: `ARGUMENTS` and `PREPROCESSING` are the rules of what it may say.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.layers import DropPath, LayerScale, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from adaptvit.backbones.base import model_name, timm_config
from adaptvit.backbones.parts import PartsViT, RepresentationHead, ViTConfig, add_representation, set_head_dim
from adaptvit.backbones.t2t import TokensToToken, t2t_vit

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
        "qkv_bias": getattr(block.attn.qkv, "bias", None) is not None,
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


def _anatomy(vit: nn.Module) -> tuple[dict[str, torch.Size], list[str]]:
    """Parameter names and shapes, and every part that computes, leaving out what only regularises."""
    regularisers = (nn.Identity, nn.Dropout, DropPath)
    shapes = {key: value.shape for key, value in vit.state_dict().items()}
    parts = [repr(part) for part in vit.modules() if not list(part.children()) and not isinstance(part, regularisers)]
    return shapes, parts
