"""What is written down of a timm ViT to make it again: architecture, arguments, preparation of its images.

    describe    a ViT -> what a file keeps of it
    rebuild     that -> the same ViT with fresh weights

A file may come from anybody: `ARGUMENTS` and `PREPROCESSING` are the rules of what it may say.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import signature
from typing import Any

import timm
import torch
from timm.layers import DropPath, LayerScale, Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from adaptvit.backbones.base import model_name, timm_config
from adaptvit.backbones.families import FAMILIES, find, qualified
from adaptvit.backbones.parts import PartsViT, RepresentationHead, ViTConfig, add_representation, set_head_dim
from adaptvit.backbones.segmenting import SegmentingViT
from adaptvit.backbones.t2t import TokensToToken, t2t_vit
from adaptvit.backbones.video import SpaceTimeViT

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
    "label_names": _several(WORD, 1, 2**20),
}
"""What timm's `pretrained_cfg` says about the images and their classes."""
TRANSFORMERS = "transformers.models."
"""What the qualified names of Hugging Face's models begin with."""
PASSING = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "auto_map")
"""What a config of theirs says of the file it came in."""
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


VIDEO: dict[str, Rule] = {"frames": SIDE, "tubelet": SIDE}
"""What a file says of an image ViT that was made to take clips."""
SEGMENTS: dict[str, Rule] = {"classes": SIDE, "width": SIDE}
"""What it says of one that was made to tell the class of every pixel."""


def describe(vit: nn.Module) -> dict[str, Any]:
    """What `rebuild` needs to make the same architecture and to prepare its images: JSON-able, weights not included.

    Raises:
        ValueError: the ViT differs from what timm's name and arguments give, so that it could not be rebuilt.
    """
    description = _described(vit)
    with torch.device("meta"):
        twin = rebuild(description)
    if _anatomy(twin) != _anatomy(vit):
        name = description["architecture"]
        raise ValueError(f"this {name} has parts that its name and arguments do not give, so it cannot be saved")
    return description


def _described(vit: Any) -> dict[str, Any]:
    if isinstance(vit, SpaceTimeViT):
        return _described(vit.vit) | {"video": {"frames": vit.frames, "tubelet": vit.tubelet}}
    if isinstance(vit, SegmentingViT):
        return _described(vit.vit) | {"segments": {"classes": vit.num_classes, "width": vit.width}}
    name, recorded = model_name(vit), timm_config(vit)
    arguments: dict[str, Any]
    if qualified(type(vit)).startswith(TRANSFORMERS):
        name, arguments = qualified(type(vit)), {"config": _transformers_config(vit)}
    elif not isinstance(vit, VisionTransformer):
        arguments = _recorded_arguments(vit)
    else:
        arguments = _parts_arguments(vit) if isinstance(vit, PartsViT) else _timm_arguments(vit)
        if isinstance(vit.head, RepresentationHead):
            arguments["representation_size"] = vit.head.fc.in_features
    data = {key: recorded[key] for key in PREPROCESSING if key in recorded}
    if not isinstance(data.get("label_names"), list | tuple):
        data.pop("label_names", None)  # timm takes tables too
    return {"architecture": name, "arguments": arguments, "data": data}


def _parts_arguments(vit: PartsViT) -> dict[str, Any]:
    """The fields of its config, as the ViT is now; as for timm's, without what only regularises."""
    arguments = dataclasses.asdict(vit.config) | {"num_classes": vit.num_classes, "global_pool": vit.global_pool}
    del arguments["drop_path_rate"]
    return arguments


def _recorded_arguments(vit: Any) -> dict[str, Any]:
    """Of other models of timm's, what they were created with, as timm keeps it, as they are now.

    Raises:
        ValueError: timm did not create it, or a file could not say what it was created with.
    """
    name = model_name(vit)
    if not timm.is_model(name):
        raise ValueError(f"this {name} was not made by timm.create_model, so that nothing says how to make it again")
    own = {"num_classes": vit.num_classes, "global_pool": vit.global_pool}
    arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in own_arguments(vit).items()}
    arguments |= {key: value for key, value in own.items() if getattr(vit, key, None) is not None}
    for key, value in arguments.items():
        if not _is_plain_argument(key, value):
            raise ValueError(f"this {name} was created with {key}={value!r:.80}, which a file cannot say")
    return arguments


def own_arguments(vit: nn.Module) -> dict[str, Any]:
    """What a model of timm's was created with beside its name."""
    return dict(getattr(vit, "_model_args", {}))


FORBIDDEN = frozenset(signature(timm.create_model).parameters) | {
    "pretrained_strict",
    "pretrained_filter_fn",
    "features_only",
}
"""What is told to timm rather than to a model."""


def _is_plain_argument(name: Any, value: Any) -> bool:
    """Whether a model's argument is one that a file may say: a number or word, or some, told to the model itself."""
    values = value if isinstance(value, (list, tuple)) else [value]
    plain = all(one is None or isinstance(one, (bool, int, float, str)) for one in values)
    return isinstance(name, str) and name.isidentifier() and name not in FORBIDDEN and plain


def _transformers_config(vit: Any) -> dict[str, Any]:
    """Of a model of transformers, without where it came from."""
    told = json.loads(json.dumps(vit.config.to_dict(), allow_nan=False))
    return {name: value for name, value in told.items() if name not in PASSING}


def _of_transformers(name: str, config: Any, num_classes: int | None = None) -> Any:
    """A model of transformers by its qualified name, which a row has: nothing else is imported.

    Raises:
        ValueError: no row has it, or there is no such class.
    """
    if not isinstance(config, dict):
        raise ValueError(f"the config of its ViT must be a table of names and values, got {type(config).__name__}")
    kind = transformers_class(name)
    others = {} if num_classes is None else {"num_labels": num_classes}
    return kind(kind.config_class.from_dict(config | others))


def transformers_class(name: str) -> Any:
    """The class of a model of transformers, by its qualified name.

    Raises:
        ValueError: no row has it, or there is no such class.
    """
    if name not in FAMILIES.models:
        raise ValueError(f"{name[:80]} is none of the models that are known")
    module, _, kind = name.rpartition(".")
    try:
        return getattr(import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{kind} needs transformers 5 or newer: pip install transformers") from error


def _timm_arguments(vit: VisionTransformer) -> dict[str, Any]:
    block = vit.blocks[0]
    if find(block, "ls1") is None or find(block, "attn.q_norm") is None:  # no plain block, which would tell the rest
        sizes = {"img_size": list(vit.patch_embed.img_size), "patch_size": list(vit.patch_embed.patch_size)}
        return {key: value for key, value in _recorded_arguments(vit).items() if key in ARGUMENTS} | sizes
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


def rebuild(description: dict[str, Any], **others: Any) -> Any:
    """The ViT of `describe`, with fresh weights.

    Args:
        others: arguments of timm's that are to be other than described.
    Raises:
        KeyError: the description lacks something.
        ValueError: timm does not know the architecture, or the description has something that none of ours has.
    """
    name = description["architecture"]
    if "video" in description:
        image = {key: value for key, value in description.items() if key != "video"}
        video = check_described("its clips'", description["video"], VIDEO)
        return SpaceTimeViT(rebuild(image, **others), video["frames"], video["tubelet"])
    if "segments" in description:
        image = {key: value for key, value in description.items() if key != "segments"}
        segments = check_described("its pixels'", description["segments"], SEGMENTS)
        classes = others.pop("num_classes", segments["classes"])
        return SegmentingViT(rebuild(image, **others), classes, segments["width"])
    if isinstance(name, str) and name.startswith(TRANSFORMERS):
        vit = _of_transformers(name, description["arguments"].get("config"), **others)
        vit.pretrained_cfg = timm_config(vit) | check_described("its images'", description["data"], PREPROCESSING)
        return vit
    if isinstance(name, str) and timm.is_model(name) and not _is_vision_transformer(name):
        return _created(name, description, others)
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


def _is_vision_transformer(name: str) -> bool:
    """Whether a name of timm's is made in modules whose models are `VisionTransformer`, or this library's own."""
    module = timm.model_entrypoint(name).__module__
    return module.startswith("adaptvit.") or module.rpartition(".")[2] in VISION_TRANSFORMERS


VISION_TRANSFORMERS = ("vision_transformer", "vision_transformer_hybrid", "deit")


def _created(name: str, description: dict[str, Any], others: dict[str, Any]) -> Any:
    """A model of timm's other ones, by what it was created with."""
    arguments = description["arguments"]
    if not isinstance(arguments, dict):
        raise ValueError(f"its ViT's arguments must be a table of names and values, got {type(arguments).__name__}")
    for key, value in arguments.items():
        if not _is_plain_argument(key, value):
            raise ValueError(f"its ViT's argument {str(key)[:80]!r} cannot be {repr(value)[:80]}")
    recorded = check_described("its images'", description["data"], PREPROCESSING)
    told = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    vit = timm.create_model(name, pretrained=False, **told | others)
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
