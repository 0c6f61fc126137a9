"""Small ViTs for tests, and every method with settings that drop something on them."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from adaptvit import (
    AdaViTConfig,
    ATSConfig,
    AViTConfig,
    CalibratedConfig,
    DynamicViTConfig,
    EViTConfig,
    FullConfig,
    GridConfig,
    Masked,
    MergeConfig,
    ToMeConfig,
)
from adaptvit.backbones.base import blocks_of
from adaptvit.backbones.parts import add_representation, set_head_dim
from adaptvit.methods.adavit import AdaViT
from adaptvit.methods.ats import RandomConfig
from adaptvit.methods.dynamicvit import DynamicViT
from adaptvit.methods.exits import ExitViT
from adaptvit.methods.released import ReleasedATSConfig, ReleasedAViTConfig
from adaptvit.model import AdaptiveViT

PARTS = {"model_name": "parts_vit", "embed_dim": 48, "dynamic_img_size": None}
FLAVOURS: dict[str, dict[str, Any]] = {
    "class token": {},
    "distilled": {"model_name": "deit_tiny_distilled_patch16_224", "embed_dim": 48, "num_heads": 3},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "LayerScale": {"init_values": 0.5},
    "QK norm": {"qk_norm": True},
    "average pool": {"model_name": "test_vit2"},
    "average pool, no class token": {"class_token": False, "global_pool": "avg"},
    "attention pool": {"model_name": "test_vit3"},
    "CLIP": {"model_name": "vit_xsmall_patch16_clip_224", "embed_dim": 48, "num_heads": 3},
    "representation layer": {"representation_size": 40},
    "rectangular": {"img_size": (64, 32), "patch_size": (8, 16)},
    "tokens to token": {
        "model_name": "t2t_vit_7",
        "img_size": (48, 80),
        "patch_size": 16,
        "embed_dim": 48,
        "num_heads": 3,
    },
    "rotary, RMS norm, cosine": PARTS | {"position": "rotary", "norm": "rms", "attention": "cosine"},
    "sinusoidal, instance norm": PARTS | {"position": "sinusoidal", "norm": "instance"},
    "mixer": PARTS | {"block": "mixer", "position": "none"},
}

TURNED = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": None}
VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
VISION |= {"image_size": 32, "patch_size": 8, "num_labels": 7}
HOSTS: dict[str, dict[str, Any]] = {
    "Eva, DINOv3": TURNED | {"model_name": "vit_small_patch16_dinov3"},
    "Eva, SwiGLU, post-norm": TURNED | {"model_name": "eva02_enormous_patch14_clip_224"},
    "Eva, learned rotations": TURNED | {"model_name": "vit_small_patch16_rope_mixed_ape_224"},
    "Eva, attention pool": TURNED | {"model_name": "vit_pe_core_tiny_patch16_384"},
    "Eva, grouped queries": TURNED | {"model_name": "vit_base_patch16_sapiens2", "num_kv_heads": (2, 1, 1, 2)},
    "NaFlexVit": TURNED | {"model_name": "naflexvit_base_patch16_parfac_gap", "img_size": None},
    "BEiT": TURNED | {"model_name": "beit_base_patch16_224"},
    "parallel": TURNED | {"model_name": "vit_base_patch16_18x2_224"},
    "post-norm": TURNED | {"model_name": "vit_base_patch16_rpn_224"},
    "transformers, ViT": VISION | {"model_name": "ViTForImageClassification", "config": "ViTConfig"},
    "transformers, rotary": VISION
    | {"model_name": "DINOv3ViTModel", "config": "DINOv3ViTConfig", "num_register_tokens": 2},
    "transformers, attention pool": VISION | {"model_name": "SiglipVisionModel", "config": "SiglipVisionConfig"},
}
"""A model of each structure whose blocks are not timm's plain ones."""
ON_HOSTS = ("full", "ats", "dynamicvit", "tome")
"""Methods of which every fact is held on those: they drop nothing, what each can spare, as many in each, or merge.
`test_families.py` has the layouts of the others."""

KINDS = (
    "class token",
    "distilled",
    "average pool, no class token",
    "attention pool",
    "tokens to token",
    "rotary, RMS norm, cosine",
    "sinusoidal, instance norm",
    "mixer",
)
"""Flavours that methods and layouts may treat differently; the others differ in what a block or head computes."""

METHODS = {
    "full": FullConfig(),
    "avit": AViTConfig(gate_scale=4.0, gate_center=2.0),
    "avit, class token stays": AViTConfig(gate_scale=4.0, gate_center=2.0, class_token="stays"),
    "avit, official": ReleasedAViTConfig(gate_scale=4.0, gate_center=2.0),
    "ats": ATSConfig(blocks=(0, 1, 3), tokens=(12, 9, 6)),
    "ats, released": ReleasedATSConfig(),
    "ats, random": RandomConfig(blocks=(0, 1, 3), tokens=(12, 9, 6)),
    "adavit": AdaViTConfig(macs_target=None),
    "adavit, heads hidden": AdaViTConfig(heads_take="hidden", norm_policies=True, macs_target=None),
    "adavit, heads identity": AdaViTConfig(heads_take="identity", macs_target=None),
    "adavit, patches": AdaViTConfig(policies=("patches",), macs_target=None),
    "adavit, patches only in attention": AdaViTConfig(
        policies=("patches", "heads"), patches_skip="attention", macs_target=None
    ),
    "adavit, heads": AdaViTConfig(policies=("heads",), macs_target=None),
    "adavit, sublayers": AdaViTConfig(policies=("sublayers",), macs_target=None),
    "evit": EViTConfig(blocks=(0, 1, 3), keep_rate=0.7),
    "unfused evit": EViTConfig(blocks=(0, 1, 2), keep_rate=(0.7, 1.0, 0.5), fuse=False),
    "evit, tokens": EViTConfig(blocks=(0, 2, 3), tokens=(6, 4, 4)),
    "dynamicvit": DynamicViTConfig(),
    "dynamicvit, by stage": DynamicViTConfig(keep_rate=(0.9, 0.5, 0.5)),
    "dynamicvit, threshold": DynamicViTConfig(blocks=(0, 1, 3), select="threshold", threshold=0.2),
    "tome": ToMeConfig(r=3),
    "tome, to the end": ToMeConfig(r=(0, 8, 0, 8), proportional_attention=False),
    "calibrated": CalibratedConfig(r=3),
    "merge": MergeConfig(thresholds=0.35),
    "grid": GridConfig(rate=0.8),
    "grid, to the end": GridConfig(rate=4.0),
    "merge, by block": MergeConfig(thresholds=(0.4, 1.0, 0.2, -1.0), relative=0.0, proportional_attention=False),
}
ONE_OF_EACH = (
    "full",
    "avit",
    "avit, official",
    "ats",
    "adavit",
    "adavit, heads hidden",
    "evit",
    "dynamicvit",
    "tome",
    "merge",
    "grid",
)
"""Of the methods, one setting each: for what does not go by settings."""
DROP_NOTHING = {
    "full": FullConfig(),
    "avit": AViTConfig(gate_center=1e4),
    "avit, official": ReleasedAViTConfig(gate_center=1e4),
    "ats": ATSConfig(rate=1e6),
    "evit": EViTConfig(keep_rate=1.0),
    "evit, by its knob": EViTConfig(rate=2.0),
    "dynamicvit": DynamicViTConfig(keep_rate=1.0),
    "dynamicvit, threshold": DynamicViTConfig(select="threshold", threshold=0.0),
    "tome": ToMeConfig(r=0),
    "calibrated": CalibratedConfig(r=0),
    "merge": MergeConfig(shift=2.0),
    "grid": GridConfig(rate=0.0),
    "adavit": AdaViTConfig(macs_target=None, lean=30.0),
    "adavit, heads hidden": AdaViTConfig(macs_target=None, lean=30.0, heads_take="hidden"),
    "adavit, heads identity": AdaViTConfig(macs_target=None, lean=30.0, heads_take="identity"),
}
MERGING = ("tome", "calibrated", "merge", "grid")
REFUSED = {
    "sinusoidal, instance norm": ("adavit", "avit, official", "evit", "unfused evit", "dynamicvit", *MERGING),
    "mixer": ("adavit", "ats", "avit, official", "evit", "unfused evit", "dynamicvit", *MERGING),
}
"""Flavours that methods refuse, by the beginning of the method's name."""


def flavours(method: str) -> list[str]:
    """Those that a method takes."""
    return [flavour for flavour in FLAVOURS if not method.startswith(REFUSED.get(flavour, ()))]


def of_transformers(flavour: str) -> nn.Module:
    """A model by its class and its config's, of a library that is imported for it alone."""
    transformers = pytest.importorskip("transformers")
    settings = dict(HOSTS[flavour])
    model, config = (getattr(transformers, settings.pop(name)) for name in ("model_name", "config"))
    return model(config(**settings))


def small_vit(flavour: str = "class token", dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """A ViT of four blocks on 32-pixel images whose tokens differ enough from one another for methods to tell them."""
    torch.manual_seed(0)
    arguments = {"model_name": "test_vit", "img_size": 32, "patch_size": 8, "depth": 4, "num_classes": 7}
    arguments |= {"dynamic_img_size": False, **(FLAVOURS | HOSTS)[flavour], **settings}
    head_dim, representation_size = (arguments.pop(name, None) for name in ("head_dim", "representation_size"))
    vit = of_transformers(flavour) if "config" in arguments else timm.create_model(**arguments)
    if head_dim:
        set_head_dim(vit, head_dim)
    if representation_size:
        add_representation(vit, representation_size)
    for name, parameter in vit.named_parameters():
        if name.endswith(("token", "pos_embed")) or parameter.ndim < 2:
            parameter.data += 0.3 * torch.randn_like(parameter)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return vit.to(dtype)


def with_values_of_all_lengths(vit: nn.Module) -> nn.Module:
    """Values along one direction in every head, so that some tokens have next to none."""
    for block in vit.blocks:
        weight, bias = (parameter.data.chunk(3)[2] for parameter in (block.attn.qkv.weight, block.attn.qkv.bias))
        weight.copy_(weight[:1].expand_as(weight))
        bias.zero_()
    return vit


def vary(model: AdaptiveViT) -> AdaptiveViT:
    """Give AdaViT policies that differ between images, and so alike within a block that all of a kind go off too,
    DynamicViT predictors that tell patches apart, and exits lenses that tell something."""
    if isinstance(model, ExitViT):
        for parameter in model.lenses.parameters():
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    if isinstance(model, DynamicViT):
        generator = torch.Generator().manual_seed(0)
        for parameter in model.score_predictor.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=1.5 * parameter[0].numel() ** -0.5, generator=generator)
    if not isinstance(model, AdaViT):
        return model
    generator, training = torch.Generator().manual_seed(0), model.training
    batch, seen = images(model.vit, count=16, seed=99, dtype=next(model.parameters()).dtype), {}
    # one after the other: what a block reads depends on those before
    for number, block in enumerate(blocks_of(model.vit)):
        hook = block.norm1.register_forward_hook(lambda norm, given, out: seen.update(x=given[0], normed=out))
        with torch.no_grad():
            model.eval()(batch, Masked)
        hook.remove()
        key = str(number)
        state = model.state(Masked.of(seen["x"]))
        if key in model.policy_norm:
            state = model.policy_norm[key](state)
        for maps, read in (
            (model.head_policy, state),
            (model.sublayer_policy, state),
            (model.patch_policy, seen["normed"][:, model.prefix :].flatten(0, 1)),
        ):
            if key in maps:
                _calibrate(maps[key], read.detach().double(), generator)
        if key in model.patch_policy and number == 2:
            model.patch_policy[key].bias.data -= 4.0
    return model.train(training)


def _calibrate(policy: nn.Linear, read: Tensor, generator: torch.Generator) -> None:
    """Random logits of `read` (n, D) with mean 0 and deviation 2."""
    own, shared = (torch.randn(policy.weight.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = own / 2 + shared[:1]
    logits = read @ weight.T
    weight = weight * 2 / logits.std(dim=0).clamp(min=1e-3)[:, None]  # 0 where all that is read is alike
    policy.weight.data.copy_(weight)
    policy.bias.data.copy_(-(read @ weight.T).mean(dim=0))


def images(vit: nn.Module, count: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise of contrasts that differ from image to image."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(
        count, 3, *getattr(getattr(vit, "patch_embed", None), "img_size", (32, 32)), generator=generator
    )
    return (batch * torch.rand(count, 1, 1, 1, generator=generator) * 3).to(dtype)
