"""Names registered with timm: once adaptvit is imported, `timm.create_model("avit_tiny_patch16_224")` makes an A-ViT.

Each is A-ViT around the DeiT of the same size and takes the arguments of both: fields of `AViTConfig` (among them
`class_token`, a word that timm has too), anything else as timm takes it. `pretrained=True` loads DeiT's weights, which
have not learnt to halt: fine-tune them, or find a gate for them with `adaptvit.meet_target`.
"""

from dataclasses import fields
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model

from adaptvit.methods.avit import AViT, AViTConfig

SIZES = ("tiny", "small", "base", "tiny_distilled", "small_distilled")

default_cfgs = generate_default_cfgs(  # timm looks for this name in the module of a registered function
    {
        f"avit_{size}_patch16_224.{config.tag}": config
        for size in SIZES
        for config in timm.models.get_arch_pretrained_cfgs(f"deit_{size}_patch16_224").values()
    }
)


@register_model
def avit_tiny_patch16_224(**options: Any) -> AViT:
    """DeiT-tiny (192 channels, 12 blocks, 3 heads) with the gate of the released weights, 10 / 30."""
    return around("deit_tiny_patch16_224", options, gate_scale=10.0, gate_center=30.0)


@register_model
def avit_small_patch16_224(**options: Any) -> AViT:
    """DeiT-small (384 channels, 12 blocks, 6 heads) with the gate of the released weights, 10 / 75."""
    return around("deit_small_patch16_224", options, gate_scale=10.0, gate_center=75.0)


@register_model
def avit_base_patch16_224(**options: Any) -> AViT:
    """DeiT-base (768 channels, 12 blocks, 12 heads). Nobody has published a gate for it: this is small's, 10 / 75."""
    return around("deit_base_patch16_224", options, gate_scale=10.0, gate_center=75.0)


@register_model
def avit_tiny_distilled_patch16_224(**options: Any) -> AViT:
    """DeiT-tiny with a distillation token. Nobody has published a gate for it: this is tiny's, 10 / 30."""
    return around("deit_tiny_distilled_patch16_224", options, gate_scale=10.0, gate_center=30.0)


@register_model
def avit_small_distilled_patch16_224(**options: Any) -> AViT:
    """DeiT-small with a distillation token. Nobody has published a gate for it: this is small's, 10 / 75."""
    return around("deit_small_distilled_patch16_224", options, gate_scale=10.0, gate_center=75.0)


def around(deit: str, options: dict[str, Any], **gate: float) -> AViT:
    """A-ViT around timm's model `deit`.

    Args:
        options: what `timm.create_model` was called with.
        gate: defaults of this size; `options` win.
    """
    names = {field.name for field in fields(AViTConfig)}
    config = AViTConfig(**{**gate, **{name: options[name] for name in options.keys() & names}})
    rest = {name: options[name] for name in options.keys() - names}
    overlay = {**(rest.pop("pretrained_cfg_overlay", None) or {}), "architecture": deit}
    return config.build(timm.create_model(deit, pretrained_cfg_overlay=overlay, **rest))
