import warnings
from unittest.mock import patch

import pytest
import timm
import torch
from models import METHODS, small_vit, vary
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import adaptvit
from adaptvit import ATSConfig, FullConfig, Masked, Packed
from adaptvit.backbones.parts import representation_names
from adaptvit.backbones.record import describe, rebuild
from adaptvit.backbones.sizes import shape_of
from adaptvit.backbones.turn import set_channel
from adaptvit.tokens import kernels

NAMES = [
    # DeiT: class token, distilled, DeiT III with LayerScale and positions without the class token
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "deit_base_patch16_384",
    "deit_tiny_distilled_patch16_224",
    "deit_small_distilled_patch16_224",
    "deit3_small_patch16_224",
    "deit3_medium_patch16_224",
    # AugReg and other class-token models, several patch sizes, a ResNet stem
    "vit_tiny_patch16_224",
    "vit_small_patch32_224",
    "vit_small_patch8_224",
    "vit_base_patch16_224_miil",
    "vit_tiny_r_s16_p8_224",
    # DINOv2, without and with registers
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch14_reg4_dinov2",
    # CLIP and SigLIP image towers: pre-norm, quick GELU, attention pool, average pool without class token
    "vit_xsmall_patch16_clip_224",
    "vit_medium_patch16_clip_224",
    "vit_base_patch32_clip_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_gap_224",
    # average pool, registers, no class token
    "vit_medium_patch16_gap_240",
    "vit_medium_patch16_reg4_gap_256",
    "vit_little_patch16_reg4_gap_256",
    "vit_so150m_patch16_reg4_map_256",
    "vit_so150m2_patch16_reg1_gap_256",
    # SwiGLU and RMS norm, attention norm and MLP norm
    "aimv2_large_patch14_224",
    "beit3_base_patch16_224",
    "vit_intern300m_patch14_448",
    # tokens to token, with random features and with softmax
    "t2t_vit_14",
    "t2t_vit_t_14",
    # timm's own small test models
    "test_vit",
    "test_vit2",
    "test_vit3",
    "test_vit4",
]
LAYOUTS = pytest.mark.parametrize("layout", [Masked, Packed], ids=lambda layout: layout.__name__)


def images(vit: nn.Module, count: int = 3, seed: int = 0) -> torch.Tensor:
    height, width = vit.patch_embed.img_size
    return torch.randn(count, vit.in_chans, height, width, generator=torch.Generator().manual_seed(seed))


def small(name: str, **settings: object) -> nn.Module:
    """The named architecture at three patches a side and two blocks, its zero-initialised tokens made visible."""
    torch.manual_seed(0)
    side = timm.create_model(name, num_classes=0, device="meta").patch_embed.patch_size[0]
    size = 64 if "_r_" in name else 3 * side
    with patch("timm.layers.weight_init._trunc_normal_"):  # slow, and what it draws is drawn anew
        vit = timm.create_model(name, **{"img_size": size, "depth": 2, "num_classes": 11, **settings})
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.05) if parameter.ndim > 1 else parameter.data.add_(
            0.05 * torch.randn_like(parameter)
        )
    return vit


def agree(vit: nn.Module, batch: torch.Tensor, *layouts: type) -> None:
    model = FullConfig().build(vit)
    torch.manual_seed(1)
    expected = vit(batch)
    for layout in layouts:
        torch.manual_seed(1)
        torch.testing.assert_close(model(batch, layout), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_full_is_timms_own_forward(name: str) -> None:
    vit = small(name).eval()
    with torch.inference_mode():
        agree(vit, images(vit), Masked, Packed)


@pytest.mark.parametrize("name", NAMES)
def test_full_is_timms_own_forward_in_training(name: str) -> None:
    vit = small(name, drop_path_rate=0.4, drop_rate=0.1, pos_drop_rate=0.1).train()
    agree(vit, images(vit), Masked, Packed)


@LAYOUTS
@pytest.mark.parametrize(
    "settings",
    [
        {"qk_norm": True},
        {"scale_attn_norm": True, "scale_mlp_norm": True},
        {"init_values": 0.1},
        {"reg_tokens": 3, "no_embed_class": True},
        {"pos_embed": "none"},
        {"qkv_bias": False, "proj_bias": False},
        {"img_size": (32, 80), "patch_size": (16, 8)},
        {"in_chans": 1},
        {"final_norm": False},
        {"global_pool": "max"},
        {"global_pool": "avgmax", "pool_include_prefix": True},
        {"class_token": False, "global_pool": "avg"},
    ],
    ids=str,
)
def test_full_is_timms_own_forward_for_every_part(settings: dict, layout: type) -> None:
    vit = small("test_vit", **settings).eval()
    with torch.inference_mode():
        agree(vit, images(vit), layout)


@LAYOUTS
def test_gated_attention_is_reproduced(layout: type) -> None:
    vit = small("test_vit").eval()
    for block in vit.blocks:
        block.attn = Attention(64, num_heads=2, qkv_bias=True, gated=True)
    agree(vit, images(vit), layout)


@LAYOUTS
def test_dynamic_image_size_takes_any_grid(layout: type) -> None:
    vit = small("test_vit", dynamic_img_size=True, dynamic_img_pad=True).eval()
    batch = torch.randn(2, 3, 70, 33)
    agree(vit, batch, layout)
    assert FullConfig().build(vit)(batch, detailed=True).usage.grid == (5, 3)


@LAYOUTS
def test_training_drops_attention_weights_and_patches_as_timm_does(layout: type) -> None:
    vit = small("test_vit", attn_drop_rate=0.3, proj_drop_rate=0.3).train()
    if layout is Packed:  # the last block draws fewer random numbers, so only its distribution can agree
        pytest.skip("packed execution draws other random numbers for dropped activations")
    agree(vit, images(vit), layout)


def test_distilled_training_returns_both_heads() -> None:
    vit = small("deit_tiny_distilled_patch16_224").train()
    vit.set_distilled_training()
    batch = images(vit)
    output = FullConfig().build(vit)(batch, detailed=True)
    logits, distilled = vit(batch)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.distilled, distilled)


def test_a_model_of_no_known_family_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="resnet18 is a ResNet, of no family that is known, and has no convolution"):
        FullConfig().build(timm.create_model("resnet18", device="meta"))


def test_attention_that_does_not_pass_through_torchs_is_refused_by_name() -> None:
    vit = small("test_vit")
    vit.blocks[1].attn.fused_attn = False
    with pytest.raises(TypeError, match=r"Attention in test_vit does not call scaled_dot_product_attention, .*set_fus"):
        FullConfig().build(vit)


def test_patch_dropout_is_refused() -> None:
    vit = small("test_vit", patch_drop_rate=0.3)
    with pytest.raises(TypeError, match=r"patch_drop_rate=0\.3, which takes patches out of their slots"):
        FullConfig().build(vit)


@LAYOUTS
def test_a_subclass_runs_as_it_is_written(layout: type) -> None:
    class Mine(VisionTransformer):
        def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super()._pos_embed(x)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flip(-1)) - 1

    vit = Mine(img_size=32, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
    agree(vit, images(vit), layout)


@pytest.mark.parametrize(
    ("batch", "error", "said"),
    [
        (torch.zeros(1, 3, 32, 48), ValueError, r"32 x 48 pixels, but deit_tiny_patch16_224 takes 48 x 48"),
        (torch.zeros(1, 1, 48, 48), ValueError, r"\(1, 1, 48, 48\).*\(batch, 3, height, width\)"),
        (torch.zeros(3, 48, 48), ValueError, r"\(3, 48, 48\)"),
        (torch.zeros(1, 3, 48, 48, dtype=torch.uint8), TypeError, "torch.uint8"),
        (torch.zeros(1, 3, 48, 48, dtype=torch.float64), TypeError, "torch.float64"),
        (torch.zeros(1, 3, 48, 48, device="meta"), ValueError, "on meta"),
    ],
    ids=["size", "channels", "dimensions", "bytes", "double", "device"],
)
def test_unfit_images_are_refused_in_one_sentence(batch: torch.Tensor, error: type, said: str) -> None:
    model = FullConfig().build(small("deit_tiny_patch16_224"))
    with pytest.raises(error, match=said):
        model(batch)


@pytest.mark.parametrize("name", [name for name in NAMES if "_r_" not in name])
def test_a_described_vit_can_be_rebuilt(name: str) -> None:
    vit = small(name)
    twin = rebuild(describe(vit))
    twin.load_state_dict(vit.state_dict())
    batch = images(vit)
    with torch.inference_mode():
        torch.testing.assert_close(twin.eval()(batch), vit.eval()(batch))


def test_a_representation_layer_and_wide_heads_are_old_timms_and_are_rebuilt() -> None:
    vit = small_vit("representation layer", head_dim=24).eval()  # two heads: 48, not 64 channels
    batch = images(vit)
    with torch.inference_mode():
        x = vit.forward_head(vit.forward_features(batch), pre_logits=True)
        state = vit.state_dict()
        x = torch.tanh(x @ state["head.pre_logits.fc.weight"].T + state["head.pre_logits.fc.bias"])
        expected = x @ state["head.fc.weight"].T + state["head.fc.bias"]
        agree(vit, batch, Packed)
        torch.testing.assert_close(vit(batch), expected)
        old = {key.replace("head.pre_logits", "pre_logits").replace("head.fc", "head"): state[key] for key in state}
        twin = rebuild(describe(vit)).eval()
        twin.load_state_dict(representation_names(old))
        assert torch.equal(twin(batch), vit(batch))
    with FlopCounterMode(display=False) as counter:
        vit(batch[:1])
    assert counter.get_total_flops() // 2 == adaptvit.dense_macs(shape_of(vit), (4, 4))
    with torch.no_grad():
        set_channel(vit, torch.arange(64.0))
        torch.testing.assert_close(vit(batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["avit", "ats", "adavit, heads hidden", "evit", "dynamicvit", "tome", "merge"])
def test_heads_of_another_width_than_the_vits_run_packed_as_masked(name: str) -> None:
    model = vary(METHODS[name].build(small_vit(head_dim=24))).eval()
    batch = images(model.vit)
    with torch.inference_mode():
        packed, masked = model(batch, Packed, detailed=True), model(batch, Masked, detailed=True)
    torch.testing.assert_close(packed.logits, masked.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(adaptvit.macs(packed.usage, model.shape), adaptvit.macs(masked.usage, model.shape))


def test_a_vit_that_cannot_be_rebuilt_is_not_described() -> None:
    vit = small("test_vit")
    vit.blocks[1].mlp = Mlp(64, 192, act_layer=nn.ReLU)
    with pytest.raises(ValueError, match="cannot be saved"):
        describe(vit)


def test_autocast_keeps_decisions_of_the_weights_dtype() -> None:
    vit = small("test_vit").eval()
    batch = images(vit)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        packed = FullConfig().build(vit)(batch)
        torch.testing.assert_close(packed, vit(batch), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("watched", [False, True], ids=["by its maps", "through the door"])
def test_norms_in_float32_leave_attention_in_half_precision(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's autocast norms queries and keys in float32, which no CPU's does."""
    vit, seen = small_vit("QK norm"), []
    for attn in (block.attn for block in vit.blocks):
        for norm in (attn.q_norm, attn.k_norm):
            norm.register_forward_hook(lambda module, given, out: out.float())
        if watched:
            attn.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(kernels, "KERNELS", [*kernels.KERNELS])
    kernels.register(kernels.attend_each, lambda facts: bool(seen.append(facts.dtype)))
    model = ATSConfig(blocks=(0, 1), tokens=(12, 9)).build(vit).eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(images(vit), Packed)
    assert seen
    assert {*seen} == {torch.bfloat16}
