"""Names registered with timm: once adaptvit is imported, `timm.create_model("avit_tiny_patch16_224")` makes an A-ViT.

    avit_*        A-ViT around the DeiT of the same size, with fields of `AViTConfig` (among them `class_token`, a word
                  that timm has too)
    ada_step_*    AdaViT around a DeiT or T2T-ViT, as its authors named them, with fields of `AdaViTConfig`

    evit_*        EViT around a DeiT, with fields of `EViTConfig`
    dynamicvit_*  DynamicViT around a DeiT, with fields of `DynamicViTConfig`

They take the arguments of both: fields of the config, anything else as timm takes it. timm drops arguments that are
None: a config with a None that is not its default has to build around a plain model. `pretrained=True` loads DeiT's
weights, which have not learnt to decide: fine-tune them, or find a gate for A-ViT with `adaptvit.meet_target`. T2T-ViT
has none to download.
"""

from dataclasses import fields
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model

from adaptvit.methods.adavit import AdaViT, AdaViTConfig
from adaptvit.methods.avit import AViT, AViTConfig
from adaptvit.methods.base import MethodConfig
from adaptvit.methods.dynamicvit import DynamicViT, DynamicViTConfig
from adaptvit.methods.evit import EViT, EViTConfig

SIZES = ("tiny", "small", "base", "tiny_distilled", "small_distilled")
AVIT = {f"avit_{size}_patch16_224": f"deit_{size}_patch16_224" for size in SIZES}
"""A-ViT's names, and the models inside."""
ADAVIT = {f"ada_step_deit_{size}_patch16_224": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")}
ADAVIT |= {f"ada_step_t2t_vit_{depth}_lnorm": f"t2t_vit_{depth}" for depth in (14, 19)}
"""AdaViT's names, and the models inside."""
EVIT = {f"evit_{size}_patch16_224": f"deit_{size}_patch16_224" for size in ("small", "base")}
"""EViT's names, and the models inside."""
DYNAMICVIT = {f"dynamicvit_{size}_patch16_224": f"deit_{size}_patch16_224" for size in ("small", "base")}
"""DynamicViT's names, and the models inside, which timm has."""
DYNAMICVIT_256 = "dynamicvit_256_patch16_224"
"""DynamicViT around a model that timm does not have, a DeiT between tiny and small."""

default_cfgs = generate_default_cfgs(  # timm looks for this name in the module of a registered function
    {
        f"{name}.{config.tag}" if config.tag else name: config
        for name, inside in (AVIT | ADAVIT | EVIT | DYNAMICVIT).items()
        for config in timm.models.get_arch_pretrained_cfgs(inside).values()
    }
)


@register_model
def avit_tiny_patch16_224(**options: Any) -> AViT:
    """DeiT-tiny (192 channels, 12 blocks, 3 heads) with the gate of the released weights, 10 / 30."""
    return around(AViTConfig, "deit_tiny_patch16_224", options, gate_scale=10.0, gate_center=30.0)


@register_model
def avit_small_patch16_224(**options: Any) -> AViT:
    """DeiT-small (384 channels, 12 blocks, 6 heads) with the gate of the released weights, 10 / 75."""
    return around(AViTConfig, "deit_small_patch16_224", options, gate_scale=10.0, gate_center=75.0)


@register_model
def avit_base_patch16_224(**options: Any) -> AViT:
    """DeiT-base (768 channels, 12 blocks, 12 heads). Nobody has published a gate for it: this is small's, 10 / 75."""
    return around(AViTConfig, "deit_base_patch16_224", options, gate_scale=10.0, gate_center=75.0)


@register_model
def avit_tiny_distilled_patch16_224(**options: Any) -> AViT:
    """DeiT-tiny with a distillation token. Nobody has published a gate for it: this is tiny's, 10 / 30."""
    return around(AViTConfig, "deit_tiny_distilled_patch16_224", options, gate_scale=10.0, gate_center=30.0)


@register_model
def avit_small_distilled_patch16_224(**options: Any) -> AViT:
    """DeiT-small with a distillation token. Nobody has published a gate for it: this is small's, 10 / 75."""
    return around(AViTConfig, "deit_small_distilled_patch16_224", options, gate_scale=10.0, gate_center=75.0)


@register_model
def ada_step_deit_tiny_patch16_224(**options: Any) -> AdaViT:
    """DeiT-tiny (192 channels, 12 blocks, 3 heads) with policies."""
    return around(AdaViTConfig, "deit_tiny_patch16_224", options)


@register_model
def ada_step_deit_small_patch16_224(**options: Any) -> AdaViT:
    """DeiT-small (384 channels, 12 blocks, 6 heads) with policies: published with weights."""
    return around(AdaViTConfig, "deit_small_patch16_224", options)


@register_model
def ada_step_deit_base_patch16_224(**options: Any) -> AdaViT:
    """DeiT-base (768 channels, 12 blocks, 12 heads) with policies."""
    return around(AdaViTConfig, "deit_base_patch16_224", options)


@register_model
def ada_step_t2t_vit_14_lnorm(**options: Any) -> AdaViT:
    """T2T-ViT-14 (384 channels, 14 blocks, 6 heads) with policies."""
    return around(AdaViTConfig, "t2t_vit_14", options)


@register_model
def ada_step_t2t_vit_19_lnorm(**options: Any) -> AdaViT:
    """T2T-ViT-19 (448 channels, 19 blocks, 7 heads) with policies: published with weights."""
    return around(AdaViTConfig, "t2t_vit_19", options)


@register_model
def evit_small_patch16_224(**options: Any) -> EViT:
    """DeiT-small (384 channels, 12 blocks, 6 heads) whose blocks 3, 6 and 9 keep 0.7: published with weights."""
    return around(EViTConfig, "deit_small_patch16_224", options)


@register_model
def evit_base_patch16_224(**options: Any) -> EViT:
    """DeiT-base (768 channels, 12 blocks, 12 heads) whose blocks 3, 6 and 9 keep 0.7: published with weights."""
    return around(EViTConfig, "deit_base_patch16_224", options)


@register_model
def dynamicvit_small_patch16_224(**options: Any) -> DynamicViT:
    """DeiT-small (384 channels, 12 blocks, 6 heads) with predictors: published with weights."""
    return around(DynamicViTConfig, "deit_small_patch16_224", options)


@register_model
def dynamicvit_base_patch16_224(**options: Any) -> DynamicViT:
    """DeiT-base (768 channels, 12 blocks, 12 heads) with predictors: published with weights."""
    return around(DynamicViTConfig, "deit_base_patch16_224", options)


@register_model
def dynamicvit_256_patch16_224(**options: Any) -> DynamicViT:
    """DeiT-256 (256 channels, 12 blocks, 4 heads) with predictors: published with weights."""
    if options.get("pretrained"):
        raise ValueError(f"{DYNAMICVIT_256} has no weights to download: adaptvit.convert takes its authors' file")
    return around(DynamicViTConfig, "deit_tiny_patch16_224", {"embed_dim": 256, "num_heads": 4, **options})


def around(kind: type[MethodConfig], inside: str, options: dict[str, Any], **defaults: float) -> Any:
    """A method around timm's model `inside`.

    Args:
        kind: the method's config.
        options: what `timm.create_model` was called with.
        defaults: fields of the config for this size; `options` win.
    """
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    config = kind(**{**defaults, **{name: options[name] for name in options.keys() & names}})
    rest = {name: options[name] for name in options.keys() - names}
    overlay = {**(rest.pop("pretrained_cfg_overlay", None) or {}), "architecture": inside}
    return config.build(timm.create_model(inside, pretrained_cfg_overlay=overlay, **rest))
