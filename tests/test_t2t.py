from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from models import images, small_vit
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, unfold
from torch.utils.flop_counter import FlopCounterMode

import adaptvit
from adaptvit import ATSConfig, AViTConfig, FullConfig, dense_macs
from adaptvit.backbones.t2t import MODELS, SPLITS, Performer, SkipToValues, TokensToToken, sinusoid, soft_split, t2t_vit
from adaptvit.backbones.turn import set_channel
from adaptvit.weights.opening import start_from

SIZES: dict[str, Any] = {"img_size": (32, 48), "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
TYPES = pytest.mark.parametrize("tokens_type", ["performer", "transformer"])


def small(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("t2t_vit_14", **SIZES | settings).eval()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the stem


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [(32, 48), (17, 3), (20, 23)])
def test_a_soft_split_is_unfold(split: tuple[int, int, int], size: tuple[int, int]) -> None:
    kernel, stride, padding = split
    x = noise(2, 5, *size)
    expected = unfold(x, kernel, padding=padding, stride=stride).mT
    assert torch.equal(soft_split(x.permute(0, 2, 3, 1), *split), expected)


def test_performer_attention_is_the_kernel_spelt_out() -> None:
    attention = Performer(10, 8).double()
    k, q, v = noise(3, 2, 7, 8, dtype=torch.float64)
    out = attention.attend(k, q, v)
    for image in range(2):
        for token in range(7):
            weights = torch.zeros(7, dtype=torch.float64)
            for other in range(7):
                for w in attention.w:
                    exponents = (u @ w - u @ u / 2 for u in (q[image, token], k[image, other]))
                    weights[other] += torch.exp(sum(exponents)) / len(attention.w)
            torch.testing.assert_close(out[image, token], weights @ v[image] / (weights.sum() + 1e-8))


def test_random_features_approach_softmax_attention() -> None:
    attention = Performer(10, 8).double()
    attention.w = nn.Parameter(noise(200_000, 8, dtype=torch.float64), requires_grad=False)
    k, q, v = 0.25 * noise(3, 1, 6, 8, dtype=torch.float64)
    expected = scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(attention.attend(k, q, v), expected, atol=2e-3, rtol=0)


def test_performer_attention_is_float32_under_autocast() -> None:
    attention = Performer(10, 8)
    k, q, v = noise(3, 2, 7, 8)
    expected = attention.attend(k, q, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention.attend(k, q, v), expected)
        half = attention.attend(*(t.bfloat16() for t in (k, q, v)))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, attention.attend(*(t.bfloat16().float() for t in (k, q, v))).bfloat16())


def test_random_features_are_orthogonal_and_not_trained() -> None:
    for w in (small().patch_embed.attention1.w, small(dtype=torch.bfloat16).patch_embed.attention2.w):
        assert w.shape == (32, 64)
        assert not w.requires_grad
        gram = w.float() @ w.float().T
        torch.testing.assert_close(gram, 32 * torch.eye(32), atol=0.2 if w.dtype == torch.bfloat16 else 1e-4, rtol=0)


def test_softmax_attention_is_scaled_by_the_width_of_its_input() -> None:
    attention = SkipToValues(10, 4).double()
    x = noise(2, 7, 10, dtype=torch.float64)
    q, k, v = attention.qkv(x).split(4, dim=-1)
    weights = (q @ k.mT / 10**0.5).softmax(dim=-1)
    torch.testing.assert_close(attention(x), v + attention.proj(weights @ v))


def test_the_performer_drops_out_in_training_only() -> None:
    vit = small()
    batch = images(vit, count=2)
    assert torch.equal(vit.patch_embed(batch), vit.patch_embed(batch))
    vit.train()
    assert not torch.allclose(vit.patch_embed(batch), vit.patch_embed(batch))
    assert {part.p for part in vit.patch_embed.modules() if isinstance(part, nn.Dropout)} == {0.1}


@TYPES
def test_evaluation_image_by_image_is_the_whole_batch(tokens_type: str) -> None:
    stem = small(tokens_type=tokens_type).double().patch_embed
    batch = noise(3, 3, 32, 48, dtype=torch.float64)
    whole = stem(batch)
    with torch.inference_mode():
        torch.testing.assert_close(stem(batch), whole, atol=1e-12, rtol=1e-10)
        assert stem(batch[:0]).shape == (0, 6, 24)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((224, 224), (14, 14)), ((32, 48), (2, 3)), ((40, 72), (3, 5)), ((17, 100), (1, 7)), ((3, 3), (1, 1))],
)
def test_the_grid_is_what_the_three_convolutions_give(size: tuple[int, int], grid: tuple[int, int]) -> None:
    x = torch.zeros(1, 1, *size, device="meta")
    for kernel, stride, padding in SPLITS:
        x = nn.functional.conv2d(x, torch.zeros(1, 1, kernel, kernel, device="meta"), stride=stride, padding=padding)
    stem = TokensToToken(size, embed_dim=8, token_dim=4)
    assert tuple(x.shape[-2:]) == stem.grid_size == stem.dynamic_feat_size(size) == grid
    assert stem(torch.zeros(2, 3, *size)).shape == (2, stem.num_patches, 8)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"img_size": (2, 32)}, "2 x 32 pixels, but the tokens-to-token stem needs at least 3 x 3"),
        ({"img_size": (40, 32), "dynamic_img_size": True}, "40 x 32 pixels.*dynamic_img_size=True.*multiples of 16"),
        ({"patch_size": 8}, "patch_size is 8, but.*16"),
        ({"tokens_type": "convolution"}, "one of performer, transformer, got 'convolution'"),
        ({"dynamic_img_pad": True}, "dynamic_img_pad is True.*leave it off"),
    ],
    ids=str,
)
def test_settings_that_the_stem_lacks_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        small(**settings)


def test_images_of_another_size_are_refused() -> None:
    vit = small()
    with pytest.raises(ValueError, match="32 x 32 pixels, but the tokens-to-token stem takes 32 x 48"):
        vit(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="32 x 32 pixels, but t2t_vit_14 takes 32 x 48"):
        FullConfig().build(vit)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"32 x 40 pixels.*multiples of 16"):
        FullConfig().build(small(dynamic_img_size=True))(torch.zeros(1, 3, 32, 40))


# ---- the models

PUBLISHED = {
    "7": 4.3,
    "10": 5.9,
    "12": 6.9,
    "14": 21.5,
    "19": 39.2,
    "24": 64.1,
    "t_14": 21.5,
    "t_19": 39.2,
    "t_24": 64.1,
}
"""Parameters in millions, as T2T-ViT's authors give them."""


def test_timm_lists_the_names() -> None:
    assert set(timm.list_models("t2t*")) == set(MODELS) == {f"t2t_vit_{size}" for size in PUBLISHED}


@pytest.mark.parametrize("size", PUBLISHED)
def test_models_have_the_published_sizes(size: str) -> None:
    vit = timm.create_model(f"t2t_vit_{size}", device="meta")
    assert vit.patch_embed.tokens_type == ("transformer" if "t_" in size else "performer")
    assert sum(part.numel() for part in vit.parameters()) / 1e6 == pytest.approx(PUBLISHED[size], abs=0.1)
    assert vit.blocks[0].attn.scale == 64**-0.5
    assert {part.eps for part in vit.modules() if isinstance(part, nn.LayerNorm)} == {1e-5}


def test_t2t_vit_19_has_the_published_tensors_and_macs() -> None:
    vit = timm.create_model("t2t_vit_19", device="meta")
    assert sum(part.numel() for part in vit.state_dict().values()) == 39_177_422
    norms = 5 * (3136 * (147 + 64) + 784 * (576 + 64))  # as fvcore counts them, which gave 0.312 G
    assert (vit.patch_embed.macs(224, 224) + norms) / 1e9 == pytest.approx(0.312, abs=1e-4)
    assert dense_macs(FullConfig().build(vit).shape, (14, 14)) / 1e9 == pytest.approx(8.5, abs=0.05)


def test_preprocessing_is_the_published_one() -> None:
    config = resolve_model_data_config(timm.create_model("t2t_vit_7", device="meta"))
    assert (config["input_size"], config["crop_pct"], config["interpolation"]) == ((3, 224, 224), 0.9, "bicubic")
    assert (config["mean"], config["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_positions_are_sinusoids_that_are_stored_and_not_trained() -> None:
    vit = small()
    assert torch.equal(vit.state_dict()["pos_embed"], sinusoid(7, 24))
    assert not vit.pos_embed.requires_grad
    model = AViTConfig().build(vit).train()
    before = {name: part.clone() for name, part in vit.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images(vit, count=2)).square().sum().backward()
    optimizer.step()
    still = {name for name, part in vit.named_parameters() if torch.equal(part, before[name])}
    assert {"pos_embed", "patch_embed.attention1.w", "patch_embed.attention2.w"} <= still
    assert "patch_embed.attention1.kqv.weight" not in still


def test_linear_maps_begin_with_deviation_0_02() -> None:
    stem = small(img_size=224, embed_dim=192).patch_embed
    for part in stem.modules():
        if isinstance(part, nn.Linear):
            assert part.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not part.bias.any()


@TYPES
@pytest.mark.parametrize("size", [(32, 48), (40, 72), (17, 100)])
def test_macs_are_what_torch_counts_at_any_size(tokens_type: str, size: tuple[int, int]) -> None:
    model = FullConfig().build(small(tokens_type=tokens_type, img_size=size)).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model.vit(torch.zeros(1, 3, *size))
    assert 2 * dense_macs(model.shape, model.vit.patch_embed.grid_size) == counter.get_total_flops()


@TYPES
def test_a_dynamic_size_is_counted_at_each_grid(tokens_type: str) -> None:
    model = FullConfig().build(small(tokens_type=tokens_type, dynamic_img_size=True)).requires_grad_(False)
    for rows, columns in ((1, 1), (2, 3), (4, 2)):
        batch = noise(1, 3, 16 * rows, 16 * columns)
        assert model(batch, detailed=True).usage.grid == (rows, columns)
        with FlopCounterMode(display=False) as counter:
            model.vit(batch)
        assert 2 * dense_macs(model.shape, (rows, columns)) == counter.get_total_flops()


def test_a_dynamic_size_is_the_fixed_model_at_its_own_size() -> None:
    batch = noise(2, 3, 32, 48)
    with torch.inference_mode():
        assert torch.equal(small(dynamic_img_size=True)(batch), small()(batch))


def test_timm_can_change_the_size_afterwards() -> None:
    vit = small()
    vit.set_input_size((64, 32))
    assert (vit.patch_embed.img_size, vit.patch_embed.grid_size) == ((64, 32), (4, 2))
    assert vit.pos_embed.shape == (1, 9, 24)
    assert not vit.pos_embed.requires_grad
    with torch.inference_mode():
        batch = noise(2, 3, 64, 32)
        torch.testing.assert_close(FullConfig().build(vit)(batch), vit(batch))
    with pytest.raises(ValueError, match="patch_size is 8"):
        vit.set_input_size(patch_size=8)


def test_the_stream_can_be_turned_with_biases_for_the_norms() -> None:
    direction = noise(48, dtype=torch.float64)
    vit = small_vit("tokens to token", torch.float64, qkv_bias=True).eval()
    batch = images(vit, dtype=torch.float64)
    with torch.inference_mode():
        logits = vit(batch)
        set_channel(vit, direction)
        torch.testing.assert_close(vit(batch), logits)
    with pytest.raises(TypeError, match="linear map without bias"):
        set_channel(small_vit("tokens to token", torch.float64), direction)


# ---- weights


def test_pretrained_weights_have_to_be_brought() -> None:
    with pytest.raises(ValueError, match=r"t2t_vit_7 has no weights to download.*adaptvit\.convert") as error:
        timm.create_model("t2t_vit_7", pretrained=True)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """Weights with the names and shapes that T2T-ViT-7's authors published."""
    torch.manual_seed(0)
    tensors = timm.create_model("t2t_vit_7", num_classes=5).state_dict()
    return {key.replace("patch_embed.", "tokens_to_token."): value for key, value in tensors.items()}


def holds(model: Any, published: dict[str, Tensor]) -> bool:
    found = model.vit.state_dict()
    return all(torch.equal(found[key.replace("tokens_to_token", "patch_embed")], published[key]) for key in published)


def test_published_weights_convert(published: dict[str, Tensor], tmp_path: Path) -> None:
    parallel = {f"module.{key}": value for key, value in published.items()}
    old = {key: value + 1 for key, value in published.items()}
    contents = {
        "bare": published,
        "averaged": {"state_dict_ema": parallel, "state_dict": old, "model": old, "epoch": 3},
        "last": {"state_dict": parallel, "state_dict_ema": None, "model": old},
        "model": {"model": published},
    }
    target = tmp_path / "out.safetensors"
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pth.tar")
        written = adaptvit.convert(tmp_path / f"{name}.pth.tar", target, "t2t_vit_7", num_classes=5)
        loaded = adaptvit.load(target)
        assert written.config == loaded.config == FullConfig()
        assert holds(loaded, published), name
        assert not loaded.vit.pos_embed.requires_grad


def test_a_gate_makes_published_weights_an_avit(published: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(published, tmp_path / "in.pth")
    arguments = {"num_classes": 5, "gate_scale": 4.0, "gate_center": 2.0}
    adaptvit.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", "t2t_vit_7", **arguments)
    assert adaptvit.load(tmp_path / "out.safetensors").config == AViTConfig(gate_scale=4.0, gate_center=2.0)


def test_published_weights_can_be_fine_tuned(published: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(published, tmp_path / "in.pth")
    vit = timm.create_model("t2t_vit_7", num_classes=3)
    assert not start_from(vit, tmp_path / "in.pth")  # the head stays behind
    body = {key: value for key, value in published.items() if not key.startswith("head.")}
    assert holds(FullConfig().build(vit), body)


def test_weights_that_do_not_fit_are_named(published: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {key: value for key, value in published.items() if key != "tokens_to_token.attention1.w"}
    torch.save({**tensors, "blocks.0.attn.qkv.bias": torch.zeros(768)}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match="does not fit t2t_vit_7") as error:
        adaptvit.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", "t2t_vit_7", num_classes=5)
    assert "missing patch_embed.attention1.w" in str(error.value)
    assert "unexpected blocks.0.attn.qkv.bias" in str(error.value)
    torch.save(published, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=r"missing patch_embed\.attention1\.attn\.qkv\.weight"):
        adaptvit.convert(tmp_path / "in.pth", tmp_path / "out.safetensors", "t2t_vit_t_14", num_classes=5)


def test_timm_takes_published_weights_too(published: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict_ema": published}, tmp_path / "in.pth")
    overlay = {"file": str(tmp_path / "in.pth"), "num_classes": 5}
    vit = timm.create_model("t2t_vit_7", pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    assert holds(FullConfig().build(vit), published)


@TYPES
@pytest.mark.parametrize("settings", [{}, {"dynamic_img_size": True}, {"token_dim": 8, "qkv_bias": True}], ids=str)
def test_a_saved_model_comes_back(tokens_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = ATSConfig(blocks=(0, 1), tokens=(4, 2)).build(small(tokens_type=tokens_type, **settings))
    adaptvit.save(model, tmp_path / "model.safetensors")
    loaded = adaptvit.load(tmp_path / "model.safetensors").eval()
    batch = images(model.vit)
    assert torch.equal(loaded(batch), model(batch))
    assert loaded.vit.patch_embed.tokens_type == tokens_type
    assert not loaded.vit.pos_embed.requires_grad
    assert loaded.shape == model.shape


def test_a_vit_made_by_hand_comes_back(tmp_path: Path) -> None:
    model = FullConfig().build(t2t_vit(**SIZES, token_dim=8)).eval()
    adaptvit.save(model, tmp_path / "model.safetensors")
    batch = images(model.vit)
    assert torch.equal(adaptvit.load(tmp_path / "model.safetensors").eval()(batch), model(batch))
