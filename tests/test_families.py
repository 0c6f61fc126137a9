"""Every family of hosts that has a row of names, on small models in float64."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from models import small_vit
from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.gemma4_vit import Gemma4VitClassifier, Gemma4VitEncoder
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer

from adaptvit import (
    AdaViTConfig,
    ATSConfig,
    AViTConfig,
    DynamicViTConfig,
    EViTConfig,
    FullConfig,
    GridConfig,
    Masked,
    MergeConfig,
    Packed,
    Slab,
    ToMeConfig,
    adapt,
    load,
    save,
)
from adaptvit.backbones.base import check
from adaptvit.backbones.blocks import run_block
from adaptvit.backbones.door import Acts
from adaptvit.backbones.forward import Source, run, scores
from adaptvit.data import preparation
from adaptvit.methods import MethodConfig
from adaptvit.methods.adavit import AdaViT
from adaptvit.methods.ats import RandomConfig
from adaptvit.methods.base import DropConfig
from adaptvit.methods.released import ReleasedATSConfig
from adaptvit.tokens import Tokens
from adaptvit.usage import join
from adaptvit.weights.opening import open_model

METHODS: dict[str, MethodConfig] = {
    "avit": AViTConfig(gate_scale=4.0, gate_center=2.0),
    "ats": ATSConfig(blocks=(0, 1), rate=0.3),
    "evit": EViTConfig(blocks=(0, 1), keep_rate=0.6),
    "tome": ToMeConfig(r=2),
    "merge": MergeConfig(thresholds=0.3),
    "grid": GridConfig(rate=0.8),
    "dynamicvit": DynamicViTConfig(),
    "adavit": AdaViTConfig(policies=("patches", "sublayers"), macs_target=None, initial_bias=0.3),
}
ACTS = ("avit", "ats", "evit", "merge", "grid", "adavit")
"""Of these, one for each thing done to tokens; tests/test_methods.py has all, on a model of each structure."""
WHOLE = ("parallel", "parallel scaling", "differential, parallel")
"""Models whose blocks are called whole: sub-layers of them cannot go."""
MASKS = (
    *("DINOv3", "DINOv3, SwiGLU", "EVA-02, post-norm", "ROPE-ViT, mixed", "Sapiens2", "post-norm", "differential"),
    *WHOLE,
)
"""Models that take an attention mask themselves."""
DROP_NOTHING: dict[str, MethodConfig] = {
    "full": FullConfig(),
    "ats": ATSConfig(rate=1e9),
    "tome": ToMeConfig(r=0),
    "grid": GridConfig(rate=0.0),
}
FLOAT32 = dict.fromkeys(("Aimv2VisionModel", "Aimv2VisionModel, native", "DeepseekVitClassifier"), 2e-6)
FLOAT32["DeepseekVitEncoder, aligner"] = 4e-6  # which adds up the channels of four patches
"""How far off those may be whose norm computes in float32, whatever the precision."""

SMALL: dict[str, Any] = {"embed_dim": 64, "depth": 3, "num_heads": 4}
TOWER = SMALL | {"img_size": 64}
GEMMA = TOWER | {
    "head_dim": 16,
    "num_kv_heads": 2,
    "intermediate_size": 96,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 16,
}
LABELS = {"num_labels": 7}
DINO = VISION | {"mlp_ratio": 2}
PATCHES = {name: value for name, value in VISION.items() if name != "image_size"} | {"num_patches": 16}
VJEPA = DINO | {
    "crop_size": 64,
    "frames_per_clip": 4,
    "tubelet_size": 2,
    "pred_hidden_size": 32,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1,
    "num_pooler_layers": 1,
}
BEIT = VISION | LABELS | {"vocab_size": 8}


def of_timm(name: str, **settings: Any) -> nn.Module:
    return timm.create_model(name, **SMALL | {"num_classes": 7} | settings)


def naflex(rope: str) -> nn.Module:
    settings = {"class_token": True, "reg_tokens": 1, "global_pool": "token", "fc_norm": False, "init_values": 0.1}
    return NaFlexVit(NaFlexVitCfg(**SMALL, rope_type=rope, **settings), num_classes=7)


def of_transformers(model: str, config: str, vision: str | None = None, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    named: dict[str, Any] = settings
    if vision is not None:
        named = LABELS | {"vision_config": getattr(transformers, vision)(**settings)}
    return getattr(transformers, model)(getattr(transformers, config)(**named))


def of_open_clip(**settings: Any) -> nn.Module:
    tower: Any = pytest.importorskip("open_clip.transformer").VisionTransformer
    return tower(64, 16, 64, 3, 4, 2.0, output_dim=32, **settings)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "NaFlexVit, mean": partial(of_timm, "naflexvit_base_patch16_parfac_gap"),
    "NaFlexVit, attention pool": partial(of_timm, "naflexvit_base_patch16_map"),
    "NaFlexVit, class tokens": partial(of_timm, "naflexvit_base_patch16_radio_v3"),
    "NaFlexVit, axial": partial(naflex, "axial"),
    "NaFlexVit, mixed": partial(naflex, "mixed"),
    "Qwen3VitClassifier": partial(Qwen3VitClassifier, **TOWER, pos_embed_grid_size=8, num_classes=7),
    "Qwen3VitEncoder": partial(Qwen3VitEncoder, **TOWER, pos_embed_grid_size=8, global_pool="avg"),
    "Qwen3VitEncoder, merger": partial(Qwen3VitEncoder, **TOWER, pos_embed_grid_size=8, out_features=32),
    "Qwen3VitClassifier, merger": partial(
        Qwen3VitClassifier, **TOWER, pos_embed_grid_size=8, num_classes=7, encoder_pool="merge"
    ),
    "DeepseekVitEncoder, aligner": partial(
        DeepseekVitEncoder, **TOWER, patch_size=16, out_features=32, downsample_ratio=2
    ),
    "DeepseekVitClassifier": partial(DeepseekVitClassifier, **TOWER, patch_size=16, num_classes=7),
    "Gemma4VitClassifier": partial(Gemma4VitClassifier, **GEMMA, num_classes=7, encoder_pool=""),
    "Gemma4VitEncoder": partial(Gemma4VitEncoder, **GEMMA, global_pool="avg"),
    "PE, attention pool": partial(of_timm, "vit_pe_core_tiny_patch16_384", img_size=64),
    "DINOv3": partial(of_timm, "vit_small_patch16_dinov3", img_size=64),
    "DINOv3, SwiGLU": partial(of_timm, "vit_small_plus_patch16_dinov3", img_size=64, global_pool="token"),
    "EVA-02": partial(of_timm, "eva02_base_patch14_224", img_size=56),
    "EVA-02, post-norm": partial(of_timm, "eva02_enormous_patch14_clip_224", img_size=56),
    "ROPE-ViT, mixed": partial(of_timm, "vit_small_patch16_rope_mixed_ape_224", img_size=64),
    "Sapiens2": partial(of_timm, "vit_base_patch16_sapiens2", img_size=64, num_kv_heads=(4, 2, 1)),
    "BEiT": partial(of_timm, "beit_base_patch16_224", img_size=64),
    "relative positions": partial(of_timm, "vit_relpos_small_patch16_224", img_size=64),
    "relative positions, shared": partial(of_timm, "vit_srelpos_small_patch16_224", img_size=64),
    "relative positions, post-norm": partial(of_timm, "vit_relpos_base_patch32_plus_rpn_256", img_size=128),
    "post-norm": partial(of_timm, "vit_base_patch16_rpn_224", img_size=64),
    "parallel": partial(of_timm, "vit_base_patch16_18x2_224", img_size=64),
    "parallel scaling": partial(of_timm, "vit_base_patch16_xp_224", img_size=64),
    "differential": partial(of_timm, "vit_dwee_patch16_reg1_gap_256", img_size=64),
    "differential, parallel": partial(of_timm, "vit_dpwee_patch16_reg1_gap_256", img_size=64),
    "torchvision": partial(VisionTransformer, 64, 16, 3, 4, 64, 96, num_classes=7),
    "open_clip, class token": of_open_clip,
    "open_clip, mean": partial(of_open_clip, pool_type="avg", ls_init_value=0.1),
    "open_clip, norm after mean": partial(of_open_clip, pool_type="avg", final_ln_after_pool=True),
    "open_clip, attention pool": partial(of_open_clip, attentional_pool=True, attn_pooler_queries=4, pool_type="avg"),
    "open_clip, custom blocks": partial(of_open_clip, qk_norm=True, scale_attn=True, scale_fc=True, scale_heads=True),
    "ViTModel": partial(of_transformers, "ViTModel", "ViTConfig", **VISION),
    "ViTForImageClassification": partial(of_transformers, "ViTForImageClassification", "ViTConfig", **VISION | LABELS),
    "DeiTModel": partial(of_transformers, "DeiTModel", "DeiTConfig", **VISION),
    "DeiTForImageClassification": partial(
        of_transformers, "DeiTForImageClassification", "DeiTConfig", **VISION | LABELS
    ),
    "DeiTForImageClassificationWithTeacher": partial(
        of_transformers, "DeiTForImageClassificationWithTeacher", "DeiTConfig", **VISION | LABELS
    ),
    "IJepaModel": partial(of_transformers, "IJepaModel", "IJepaConfig", **VISION),
    "IJepaForImageClassification": partial(
        of_transformers, "IJepaForImageClassification", "IJepaConfig", **VISION | LABELS
    ),
    "Dinov2Model": partial(of_transformers, "Dinov2Model", "Dinov2Config", **DINO, use_swiglu_ffn=True),
    "Dinov2ForImageClassification": partial(
        of_transformers, "Dinov2ForImageClassification", "Dinov2Config", **DINO | LABELS
    ),
    "Dinov2WithRegistersModel": partial(
        of_transformers, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **DINO, num_register_tokens=3
    ),
    "Dinov2WithRegistersForImageClassification": partial(
        of_transformers, "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **DINO | LABELS
    ),
    "DINOv3ViTModel": partial(
        of_transformers, "DINOv3ViTModel", "DINOv3ViTConfig", **VISION, num_register_tokens=4, use_gated_mlp=True
    ),
    "SiglipVisionModel": partial(of_transformers, "SiglipVisionModel", "SiglipVisionConfig", **VISION),
    "SiglipForImageClassification": partial(
        of_transformers, "SiglipForImageClassification", "SiglipConfig", "SiglipVisionConfig", **VISION
    ),
    "Siglip2VisionModel": partial(of_transformers, "Siglip2VisionModel", "Siglip2VisionConfig", **PATCHES),
    "Siglip2ForImageClassification": partial(
        of_transformers, "Siglip2ForImageClassification", "Siglip2Config", "Siglip2VisionConfig", **PATCHES
    ),
    "CLIPVisionModel": partial(of_transformers, "CLIPVisionModel", "CLIPVisionConfig", **VISION),
    "CLIPVisionModelWithProjection": partial(
        of_transformers, "CLIPVisionModelWithProjection", "CLIPVisionConfig", **VISION, projection_dim=32
    ),
    "CLIPForImageClassification": partial(
        of_transformers, "CLIPForImageClassification", "CLIPConfig", "CLIPVisionConfig", **VISION
    ),
    "Aimv2VisionModel": partial(of_transformers, "Aimv2VisionModel", "Aimv2VisionConfig", **VISION),
    "Aimv2VisionModel, native": partial(
        of_transformers, "Aimv2VisionModel", "Aimv2VisionConfig", **VISION, is_native=True
    ),
    "VideoMAEModel": partial(
        of_transformers, "VideoMAEModel", "VideoMAEConfig", **VISION, num_frames=4, use_mean_pooling=False
    ),
    "VideoMAEForVideoClassification": partial(
        of_transformers, "VideoMAEForVideoClassification", "VideoMAEConfig", **VISION | LABELS, num_frames=4
    ),
    "VJEPA2Model": partial(of_transformers, "VJEPA2Model", "VJEPA2Config", **VJEPA),
    "VJEPA2ForVideoClassification": partial(
        of_transformers, "VJEPA2ForVideoClassification", "VJEPA2Config", **VJEPA | LABELS
    ),
    "BeitModel, class token": partial(
        of_transformers,
        "BeitModel",
        "BeitConfig",
        **BEIT,
        use_absolute_position_embeddings=True,
        use_mean_pooling=False,
        layer_scale_init_value=0.0,
    ),
    "BeitModel, shared bias": partial(
        of_transformers, "BeitModel", "BeitConfig", **BEIT, use_shared_relative_position_bias=True
    ),
    "BeitForImageClassification": partial(
        of_transformers, "BeitForImageClassification", "BeitConfig", **BEIT, use_relative_position_bias=True
    ),
}
UNREAD = {
    "SiglipForImageClassification": "vision_model.head.",
    "Siglip2ForImageClassification": "vision_model.head.",
    "CLIPForImageClassification": "vision_model.post_layernorm.",
    "VJEPA2Model": "predictor.",
    "VJEPA2ForVideoClassification": "vjepa2.predictor.",
}
"""Parameters that a host computes with and then does not read."""


@cache
def model(name: str) -> nn.Module:
    vit = MODELS[name]()
    torch.manual_seed(0)
    for weight in vit.parameters():
        if weight.ndim == 1 or (weight.numel() > 1 and not weight.std() > 0):
            nn.init.normal_(weight, weight.mean().item() if weight.mean() == 1 else 0.0, 0.2)
        elif weight.ndim > 1:
            nn.init.normal_(weight, 0.0, min(0.5, 1.5 / weight[0].numel() ** 0.5))
    return vit.double().eval()


@cache
def images(name: str) -> Any:
    if name.startswith("Siglip2"):
        return siglip_patches(cut())
    draw = torch.Generator().manual_seed(1)
    side = 56 if name.startswith("EVA") else 128 if name == "relative positions, post-norm" else 64
    shape = (3, 4, 3, 64, 64) if name.startswith(("VideoMAE", "VJEPA2")) else (3, 3, side, side)
    scale = torch.tensor([1.0, 2.0, 0.3], dtype=torch.float64).view(3, *[1] * (len(shape) - 1))
    return scale * torch.randn(shape, generator=draw, dtype=torch.float64)


def cut(grids: Sequence[tuple[int, int]] = ((4, 4), (2, 6), (3, 3)), room: int = 16) -> dict[str, Tensor]:
    """Images of so many rows and columns of patches, as timm's loader gives them."""
    draw, count = torch.Generator().manual_seed(3), len(grids)
    patches = torch.zeros(count, room, 768, dtype=torch.float64)
    places, valid = torch.zeros(count, room, 2, dtype=torch.long), torch.zeros(count, room, dtype=torch.bool)
    for image, (rows, columns) in enumerate(grids):
        own = slice(rows * columns)
        patches[image, own] = (0.5 + image) * torch.randn(own.stop, 768, generator=draw, dtype=torch.float64)
        places[image, own] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        valid[image, own] = True
    return {"patches": patches, "patch_coord": places, "patch_valid": valid}


def siglip_patches(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, as transformers' processor gives them."""
    return {
        "pixel_values": batch["patches"],
        "pixel_attention_mask": batch["patch_valid"].long(),
        "spatial_shapes": batch["patch_coord"].amax(dim=1) + 1,
    }


def part(batch: Any, rows: slice) -> Any:
    """Some images of a batch."""
    return {name: t[rows] for name, t in batch.items()} if isinstance(batch, dict) else batch[rows]


def of_host(name: str, batch: Any) -> Tensor:
    """What a host makes of a batch itself."""
    return scores(model(name)(**batch) if name.startswith("Siglip2") else model(name)(batch))[0]


NO_GRID = ("Siglip2",)
"""Whose patches have no rows and columns that are the same for all images."""
each_family = pytest.mark.parametrize("name", MODELS)


@each_family
def test_a_host_is_what_it_was_where_nothing_is_dropped(name: str) -> None:
    vit = model(name)
    with torch.no_grad():
        wanted = of_host(name, images(name))
        for method, config in DROP_NOTHING.items():
            if method == "grid" and name.startswith(NO_GRID):
                continue
            given = config.build(vit)(images(name))
            torch.testing.assert_close(given, wanted, atol=FLOAT32.get(name, 1e-10), rtol=0)


@each_family
def test_layouts_agree_and_images_are_alone(name: str) -> None:
    vit, atol = model(name), FLOAT32.get(name, 1e-10)
    with torch.no_grad():
        wanted = of_host(name, images(name))
        for method in ACTS:
            config = METHODS[method]
            if method == "adavit" and name in WHOLE:
                with pytest.raises(TypeError, match="needs named parts"):
                    config.build(vit)
                continue
            if method == "grid" and name.startswith(NO_GRID):
                with pytest.raises(NotImplementedError, match="images of one shape"):
                    config.build(vit)(images(name))
                continue
            adaptive = config.build(vit)
            packed, masked = (adaptive(images(name), layout, detailed=True) for layout in (Packed, Masked))
            torch.testing.assert_close(packed.logits, masked.logits, atol=atol, rtol=0)
            assert packed.usage == masked.usage
            if method == "adavit":  # which runs blocks in a way of its own
                slab = adaptive(images(name), Slab, detailed=True)
                torch.testing.assert_close(slab.logits, masked.logits, atol=atol, rtol=0)
                assert slab.usage == masked.usage
            assert packed.logits.shape[:1] == wanted.shape[:1]
            alone = adaptive(part(images(name), slice(2, None)), detailed=True)
            torch.testing.assert_close(alone.logits, packed.logits[2:, : alone.logits.shape[1]], atol=atol, rtol=0)
            assert torch.equal(alone.usage.macs, packed.usage.macs[2:])


@pytest.mark.parametrize(
    "name",
    [
        "DINOv3",
        "DINOv3, SwiGLU",
        "EVA-02, post-norm",
        "ROPE-ViT, mixed",
        "Sapiens2",
        "post-norm",
        *WHOLE,
        "differential",
    ],
)
def test_tokens_that_are_gone_are_as_those_that_the_host_hides(name: str) -> None:
    vit = model(name)
    slots = vit.forward_features(images(name)).shape[1]
    draw = torch.Generator().manual_seed(2)
    kept = torch.rand(3, slots, generator=draw) > torch.tensor([0.3, 0.45, 0.6])[:, None]
    kept[:, : vit.num_prefix_tokens] = True
    left: list[Tensor] = []

    def inside(x: Tensor, source: Source) -> tuple[Tensor, None]:
        tokens = Packed.of(x).of_source(source).keep(kept)
        for number in range(3):
            tokens = run_block(number, tokens, Acts())
        left.append(tokens.grid(vit.norm(tokens.x)))
        return x, None

    with torch.no_grad():
        run(vit, images(name), inside)
        hidden = vit.forward_features(images(name), attn_mask=kept[:, None, None].expand(-1, -1, slots, -1))
    torch.testing.assert_close(left[0], hidden * kept[..., None], atol=1e-6, rtol=0)


@each_family
def test_macs_are_what_torch_counts(name: str) -> None:
    for config in (METHODS["ats"], METHODS["merge"]):
        adaptive = config.build(model(name))
        with FlopCounterMode(display=False) as counter:
            output = adaptive(part(images(name), slice(1)), detailed=True)
        assert 2 * int(output.usage.macs) == counter.get_total_flops()


@each_family
def test_gradients_arrive_and_the_host_stays(name: str) -> None:
    vit = model(name)
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    parts = {key: id(part) for key, part in vit.named_modules()}
    adaptive = METHODS["evit"].build(vit).train()
    adaptive(images(name)).square().sum().backward()
    adaptive.eval()
    without = {key for key, weight in vit.named_parameters() if weight.grad is None or not weight.grad.any()}
    unread = UNREAD.get(name, "no such part")
    assert not {key for key in without if not key.endswith("mask_token") and not key.startswith(unread)}
    vit.zero_grad()
    assert {key: id(part) for key, part in vit.named_modules()} == parts
    assert all(torch.equal(value, state[key]) for key, value in vit.state_dict().items())


@pytest.mark.parametrize("name", ["DINOv3ViTModel", "CLIPVisionModelWithProjection", "IJepaModel", "Qwen3VitEncoder"])
def test_models_without_classes_are_adapted(name: str) -> None:
    adaptive = adapt(model(name), images(name), 0.7, tolerance=0.1)
    assert adaptive.num_classes == 0
    assert adaptive.compute == pytest.approx(0.7, abs=0.1)
    with torch.no_grad():
        assert adaptive(images(name)).shape[0] == len(images(name))


@pytest.mark.parametrize("name", ["Dinov2Model", "DINOv3ViTModel", "BeitForImageClassification", "NaFlexVit, axial"])
def test_images_of_other_sizes(name: str) -> None:
    vit, others = model(name), images(name)[:, :, :48, :32]
    with torch.no_grad():
        output = FullConfig().build(vit)(others, detailed=True)
        torch.testing.assert_close(output.logits, scores(vit(others))[0], atol=1e-10, rtol=0)
        reduced = METHODS["merge"].build(vit)(others, Packed, detailed=True)
        masked = METHODS["merge"].build(vit)(others, Masked)
    assert output.usage.grid == (3, 2)
    torch.testing.assert_close(reduced.logits, masked, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "SiglipVisionModel"])
def test_images_of_other_sizes_are_refused_where_the_host_refuses_them(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} takes 64 x 64"):
        FullConfig().build(model(name))(images(name)[:, :, :48, :32])


def test_transformers_checkpointing_acts() -> None:
    name = "ViTForImageClassification"
    vit = model(name)
    adaptive = METHODS["evit"].build(vit).train()
    found = []
    for checkpointing in (False, True):
        adaptive.set_grad_checkpointing(checkpointing)
        assert adaptive.checkpoints == checkpointing
        vit.zero_grad()
        adaptive(images(name)).square().sum().backward()
        found.append([weight.grad for weight in vit.parameters()])
    adaptive.set_grad_checkpointing(False)
    adaptive.eval()
    vit.zero_grad()
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)


@pytest.mark.parametrize("name", ["BeitForImageClassification", "Siglip2ForImageClassification"])
def test_attention_through_the_door_has_a_name_for_transformers(name: str) -> None:
    vit: Any = copy.deepcopy(model(name))
    FullConfig().build(vit)
    vit.set_attn_implementation("adaptvit")
    given = images(name)
    with torch.no_grad():
        wanted = of_host(name, given)
        outside = scores(vit(**given) if isinstance(given, dict) else vit(given))[0]
        torch.testing.assert_close(outside, wanted, atol=0, rtol=0)
        torch.testing.assert_close(FullConfig().build(vit)(given), wanted, atol=1e-10, rtol=0)


def test_attention_that_is_not_seen_is_refused_until_it_has_that_name(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    kind = type("PlainViT", (transformers.ViTForImageClassification,), {"_supports_sdpa": False})
    vit = kind(transformers.ViTConfig(**VISION | LABELS)).double().eval()
    vit.load_state_dict(model("ViTForImageClassification").state_dict())
    given = images("ViTForImageClassification")
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        vit.set_attn_implementation("sdpa")
    with pytest.raises(TypeError, match=r"attends by 'eager'.*set_attn_implementation\(\"adaptvit\"\)"):
        FullConfig().build(vit)
    vit.set_attn_implementation("adaptvit")
    with torch.no_grad():
        wanted = of_host("ViTForImageClassification", given)
        torch.testing.assert_close(vit(given).logits, wanted, atol=1e-10, rtol=0)
        torch.testing.assert_close(FullConfig().build(vit)(given), wanted, atol=1e-10, rtol=0)
        reduced = METHODS["merge"].build(vit)
        torch.testing.assert_close(reduced(given, Packed), reduced(given, Masked), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(of_timm, "samvit_base_patch16_224"), "windows of the grid"),
        (partial(Gemma4VitEncoder, **GEMMA), "pooler .* global_pool='avg'"),
        (
            partial(
                of_transformers,
                "VideoMAEForVideoClassification",
                "VideoMAEConfig",
                **VISION,
                num_frames=4,
                use_mean_pooling=False,
            ),
            "use_mean_pooling=True",
        ),
        (partial(of_open_clip, output_tokens=True), "set output_tokens to False"),
    ],
)
def test_what_cannot_lose_tokens_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(TypeError, match=f"is not supported: .*{message}"):
        check(make())


def test_heads_of_attention_that_is_not_timms_plain_one_are_not_policies() -> None:
    with pytest.raises(TypeError, match=r"needs timm's plain blocks, but .* has DiffAttention"):
        AdaViTConfig(policies=("heads",), macs_target=None).build(of_timm("vit_dlittle_patch16_reg1_gap_256"))


PIECES = [name for name in MODELS if name.startswith("NaFlexVit")]
MIXED = ((4, 4), (2, 5), (3, 3), (1, 2))


@pytest.mark.parametrize("name", PIECES)
def test_images_of_different_shapes_are_what_they_are_for_the_host(name: str) -> None:
    vit, batch = model(name), cut(MIXED, 18)
    with torch.no_grad():
        for config in (config for method, config in DROP_NOTHING.items() if method != "grid"):
            torch.testing.assert_close(config.build(vit)(batch), vit(batch), atol=1e-10, rtol=0)
        alike = FullConfig().build(vit)(cut(((4, 4),) * 2), detailed=True).usage
        one_shape = FullConfig().build(vit)(images(name)[:2], detailed=True).usage
    assert torch.equal(alike.macs, one_shape.macs)
    assert torch.equal(alike.share, one_shape.share)


@dataclass(frozen=True, kw_only=True)
class DropSmall(DropConfig):
    """Patches go on whose features are large for their image."""

    method: ClassVar[str] = "drop small"

    def decide(self, before: Tokens, after: Tokens, block: int) -> Tensor:
        size = after.grid(after.x.norm(dim=-1))
        return size > 0.6 * size.amax(dim=1, keepdim=True)


@pytest.mark.parametrize("name", PIECES)
def test_images_of_different_shapes_are_alone(name: str) -> None:
    adaptives = {
        method: config.build(model(name))
        for method, config in ({"full": FullConfig()} | METHODS).items()
        if method != "grid"
    }
    threshold = DynamicViTConfig(select="threshold", threshold=0.2).build(model(name))
    bare = EViTConfig(blocks=(0, 1), tokens=4, fuse=False).build(model(name))
    attending = AdaViTConfig(policies=("patches",), patches_skip="attention", macs_target=None).build(model(name))
    sublayers = AdaViTConfig(policies=("sublayers",), macs_target=None).build(model(name))
    others = {"threshold": threshold, "bare": bare, "attending": attending, "sublayers": sublayers}
    others["dropping"] = DropSmall().build(model(name))
    batch = cut(MIXED, 18)
    for method, adaptive in (adaptives | others).items():
        with torch.no_grad():
            packed, masked = (adaptive(batch, layout, detailed=True) for layout in (Packed, Masked))
        torch.testing.assert_close(packed.logits, masked.logits, atol=1e-10, rtol=0)
        assert packed.usage == masked.usage, method
        if isinstance(adaptive, AdaViT):
            with torch.no_grad():
                slab = adaptive(batch, Slab, detailed=True)
            torch.testing.assert_close(slab.logits, masked.logits, atol=1e-10, rtol=0)
            assert slab.usage == masked.usage, method
        assert packed.usage.grid == (18,)
        assert packed.usage.patches is not None
        assert packed.usage.patches.tolist() == [16, 10, 9, 2]
        assert not packed.usage.patch_depth[~batch["patch_valid"]].any(), method
        for image, count in enumerate(packed.usage.patches.tolist()):
            own = {key: t[:, :count] for key, t in part(batch, slice(image, image + 1)).items()}
            with torch.no_grad():
                alone = adaptive(own, detailed=True)
            torch.testing.assert_close(alone.logits, packed.logits[image : image + 1], atol=1e-10, rtol=0)
            row, slots = packed.usage.of_images(torch.tensor([image])), adaptive.prefix + count
            for part_of_usage in ("attended", "updated", "heads", "attention", "mlp", "macs", "share"):
                assert torch.equal(getattr(alone.usage, part_of_usage), getattr(row, part_of_usage)), method
            if method not in ("tome", "merge"):
                assert torch.equal(alone.usage.live, row.live[..., :slots]), method
            if alone.usage.fused is not None:
                assert torch.equal(alone.usage.fused, row.fused[..., :slots]), method


@pytest.mark.parametrize("name", PIECES)
def test_macs_of_images_of_different_shapes_are_what_torch_counts(name: str) -> None:
    for config in (FullConfig(), METHODS["ats"], EViTConfig(blocks=(0,), keep_rate=0.6), METHODS["tome"]):
        adaptive = config.build(model(name))
        with FlopCounterMode(display=False) as counter:
            output = adaptive(cut(((2, 5),), 10), detailed=True)
        assert 2 * int(output.usage.macs) == counter.get_total_flops()


@pytest.mark.parametrize("method", ["avit", "dynamicvit", "evit"])
def test_methods_learn_from_images_of_different_shapes(method: str) -> None:
    adaptive = METHODS[method].build(model("NaFlexVit, axial")).train()
    found = []
    for room in (16, 20):  # room that no image takes has no part in what is learned
        torch.manual_seed(0)
        adaptive.zero_grad()
        output = adaptive(cut(MIXED, room), Masked, detailed=True)
        (output.logits.square().sum() + sum(output.terms.values())).backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in adaptive.parameters())
        found.append([weight.grad for weight in adaptive.parameters()])
    adaptive.zero_grad()
    adaptive.eval()
    if method != "dynamicvit":  # which draws noise for all of it
        torch.testing.assert_close(*found, atol=1e-10, rtol=0)


def test_what_padding_holds_does_not_matter() -> None:
    name, batch = "NaFlexVit, mean", cut(MIXED, 18)
    spoilt = batch | {"patches": batch["patches"].masked_fill(~batch["patch_valid"][..., None], torch.nan)}
    with torch.no_grad():
        for method, config in METHODS.items():
            if method == "grid":  # refused
                continue
            adaptive = config.build(model(name))
            for layout in (Packed, Masked):
                assert torch.equal(adaptive(spoilt, layout), adaptive(batch, layout))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attn_mask": torch.ones(3, 1, 16, 16)}, TypeError, "a dictionary of patches, patch_coord, patch_valid$"),
        ({"patches": torch.ones(3, 16, 700)}, ValueError, r"takes \(batch, patches, 768\)"),
        ({"patch_valid": torch.ones(3, 15, dtype=torch.bool)}, ValueError, r"patch_valid \(3, 15\)"),
        ({"patch_valid": torch.arange(16).expand(3, -1) > 2}, ValueError, "its first patches are valid, one or more"),
        ({"patches": torch.ones(3, 16, 768)}, TypeError, "images are torch.float32"),
    ],
)
def test_patches_that_a_model_does_not_take_are_refused(
    change: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        FullConfig().build(model("NaFlexVit, axial"))(cut() | change)


def test_methods_that_need_images_of_one_shape_say_so() -> None:
    vit, batch = model("NaFlexVit, axial"), cut()
    for config in (
        ToMeConfig(r=2, position="mean"),
        RandomConfig(blocks=(0, 1)),
        ReleasedATSConfig(blocks=(0, 1)),
    ):
        with pytest.raises(NotImplementedError, match="images of one shape"):
            config.build(vit)(batch)
    learning = METHODS["adavit"].build(vit).train()
    with pytest.raises(NotImplementedError, match="AdaViT in training takes images of one shape"):
        learning(batch)
    learning.eval()


def test_budgets_are_not_measured_on_images_of_different_shapes() -> None:
    with pytest.raises(TypeError, match="measured on a tensor of images of one shape"):
        adapt(model("NaFlexVit, axial"), cut(), 0.7)  # type: ignore[arg-type]
    vit = model("NaFlexVit, mean")
    adaptive = adapt(vit, images("NaFlexVit, mean"), 0.7, tolerance=0.1)
    with torch.no_grad():
        assert adaptive(cut()).shape == (3, 7)


def test_records_of_images_of_different_shapes_are_joined() -> None:
    adaptive = METHODS["evit"].build(model("NaFlexVit, mean"))
    batch = cut(MIXED, 18)
    with torch.no_grad():
        whole = adaptive(batch, detailed=True).usage
        parts = [adaptive(part(batch, rows), detailed=True).usage for rows in (slice(2), slice(2, 4))]
    assert join(parts, whole=True) == whole


def test_images_that_run_by_themselves_have_their_own_rows_of_tables() -> None:
    vit = model("Gemma4VitEncoder")
    torch.manual_seed(1)
    adaptive = AdaViTConfig(policies=("sublayers",), macs_target=None).build(vit)
    with torch.no_grad():
        packed, masked = (adaptive(images("Gemma4VitEncoder"), layout, detailed=True) for layout in (Packed, Masked))
    assert (packed.usage.attention.sum(dim=0) % 3).any()  # of some images and not of others
    torch.testing.assert_close(packed.logits, masked.logits, atol=1e-10, rtol=0)


def test_pictures_are_refused_where_patches_are_taken() -> None:
    with pytest.raises(TypeError, match="a Tensor, but Siglip2VisionModel takes a dictionary of pixel_values, spatial"):
        FullConfig().build(model("Siglip2VisionModel"))(images("ViTModel"))


@pytest.mark.parametrize(
    "name", ["ViTForImageClassification", "DINOv3ViTModel", "SiglipForImageClassification", "BeitModel, shared bias"]
)
def test_files_hold_models_of_transformers(name: str, tmp_path: Path) -> None:
    adaptive = METHODS["evit"].build(model(name)).eval()
    save(adaptive, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors").eval()
    assert type(again.vit) is type(adaptive.vit)
    assert preparation(again) == preparation(adaptive)
    with torch.no_grad():
        # tables of frequencies are not in files, but made anew in float32
        torch.testing.assert_close(again(images(name)), adaptive(images(name)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPVisionModelWithProjection"])
def test_folders_of_transformers_are_opened(name: str, tmp_path: Path) -> None:
    vit: Any = model(name)
    vit.save_pretrained(tmp_path)
    told = {"image_mean": [0.1] * 3, "image_std": [0.9] * 3, "resample": 2, "size": {"shortest_edge": 80}}
    crop = {"do_center_crop": True, "crop_size": {"height": 64, "width": 64}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told | crop))
    opened = open_model(tmp_path)
    assert preparation(opened) == {
        "input_size": (3, 64, 64),
        "mean": (0.1,) * 3,
        "std": (0.9,) * 3,
        "interpolation": "bilinear",
        "crop_pct": 0.8,
        "crop_mode": "center",
    }
    with torch.no_grad():
        torch.testing.assert_close(opened.double()(images(name)), scores(vit(images(name)))[0], atol=1e-10, rtol=0)


def test_folders_of_other_models_are_refused(tmp_path: Path) -> None:
    vit: Any = model("ViTForImageClassification")
    vit.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("ViTForImageClassification", "ViTForMaskedImageModeling"))
    with pytest.raises(ValueError, match="holds ViTForMaskedImageModeling; known of transformers' are ViTModel"):
        open_model(tmp_path)


def test_classes_have_the_names_that_the_model_has() -> None:
    names = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    named = of_transformers("ViTForImageClassification", "ViTConfig", **VISION | names)
    assert FullConfig().build(named).class_names == ("cat", "dog")
    assert FullConfig().build(model("ViTForImageClassification")).class_names == ()
    assert FullConfig().build(model("ViTModel")).class_names == ()


@pytest.mark.parametrize("host", ["timm", "transformers"])
def test_classes_are_named_and_files_keep_the_names(host: str, tmp_path: Path) -> None:
    vit = model("ViTForImageClassification") if host == "transformers" else small_vit(num_classes=2)
    named = FullConfig().build(vit)
    names = tuple(f"class {number}" for number in range(named.num_classes))
    for wrong in (names[1:], (*names[1:], 1), "a" * len(names)):
        with pytest.raises(ValueError, match=r"class_names must be as many texts as the model has classes, \d, got"):
            named.class_names = wrong
    named.class_names = names
    save(named, tmp_path / "named.safetensors")
    assert load(tmp_path / "named.safetensors").class_names == names


def test_hooks_on_blocks_that_give_tuples_are_given_them() -> None:
    name = "VJEPA2ForVideoClassification"
    vit: Any = model(name)
    hook = vit.vjepa2.encoder.layer[1].register_forward_hook(lambda _, given, out: (out[0] * 2, *out[1:]))
    try:
        with torch.no_grad():
            torch.testing.assert_close(
                FullConfig().build(vit)(images(name)), of_host(name, images(name)), atol=1e-10, rtol=0
            )
    finally:
        hook.remove()


def test_videos_have_steps_in_time() -> None:
    name = "VideoMAEForVideoClassification"
    adaptive = METHODS["evit"].build(model(name))
    with torch.no_grad():
        output = adaptive(images(name), detailed=True)
    assert output.usage.grid == (2, 4, 4)
    assert output.usage.patch_depth.shape == (3, 2, 4, 4)
    with pytest.raises(ValueError, match=r"takes \(batch, 4, 3, height, width\)"):
        adaptive(images(name)[:, :2])
