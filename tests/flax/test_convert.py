"""A timm ViT with ATS and its Flax counterpart: the same logits and the same tokens, both ways."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("jax", reason="the JAX side needs adaptvit[flax]")

import jax
from models import images, small_vit

from adaptvit import ATSConfig
from adaptvit.flax import Flavour, ViT
from adaptvit.flax.convert import from_timm, to_timm
from adaptvit.methods.released import ReleasedATSConfig

CONFIGS = {
    "default": ATSConfig(),
    "all patches at first": ATSConfig(blocks=(1, 2)),
    "falling": ATSConfig(blocks=(0, 1, 2), tokens=(12, 8, 3)),
    "every other": ATSConfig(blocks=(0, 2), tokens=9),
    "steered": ATSConfig(blocks=(1, 2), tokens=(12, 9), rate=0.55),
    "gumbel, not drawn": ATSConfig(blocks=(1,), tokens=6, sampler="gumbel"),
    "the last block too": ATSConfig(blocks=(2, 3), tokens=6),
}
SHAPES: dict[str, dict[str, Any]] = {
    "square": {"img_size": 64, "patch_size": 16},
    "rectangular": {"img_size": (64, 32), "patch_size": (8, 16)},
    "LayerScale": {"init_values": 0.5},
    "no qkv bias": {"qkv_bias": False},
    "grey": {"in_chans": 1},
}


@partial(jax.jit, static_argnums=0)
def forward(module: ViT, variables: dict[str, Any], images: np.ndarray) -> Any:
    return module.apply(variables, images, return_sampled_token_ids=True, training=False)


def run(module: ViT, variables: dict[str, Any], batch: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and which patches are left: (B, patches) bool."""
    logits, ids = forward(module, variables, batch.permute(0, 2, 3, 1).numpy())
    rows, columns = (size // patch for size, patch in zip(module.image_size, module.patch_size, strict=True))
    return np.asarray(logits), (np.asarray(ids)[:, :, None] == np.arange(rows * columns)).any(axis=1)


def same(model: torch.nn.Module, module: ViT, variables: dict[str, Any], batch: torch.Tensor) -> None:
    with torch.inference_mode():
        output = model(batch, detailed=True)
    logits, left = run(module, variables, batch)
    np.testing.assert_allclose(logits, output.logits, atol=1e-4, rtol=0)
    assert np.array_equal(left, output.usage.live[:, -1, 1:])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_flax_vit_keeps_the_tokens_and_gives_the_logits_of_timm_with_ats(config: ATSConfig) -> None:
    model = config.build(small_vit(img_size=64)).eval()
    same(model, *from_timm(model), images(model.vit, 6))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_go_to_flax_and_back(shape: dict[str, Any]) -> None:
    config = ATSConfig(blocks=(1, 2), tokens=(12, 5))
    model = config.build(small_vit(depth=3, **shape)).eval()
    torch.manual_seed(0)
    batch = torch.randn(6, model.vit.in_chans, *model.vit.patch_embed.img_size)
    module, variables = from_timm(model)
    same(model, module, variables, batch)

    other = config.build(small_vit(depth=3, **shape)).eval()
    for parameter in other.parameters():
        parameter.data.zero_()
    to_timm(module, variables, other.vit)
    same(other, module, variables, batch)
    if "init_values" not in shape:
        for key, value in model.vit.state_dict().items():
            assert torch.equal(value, other.vit.state_dict()[key]), key


@pytest.mark.parametrize(
    ("flavour", "settings", "named"),
    [
        ("distilled", {}, "VisionTransformerDistilled"),
        ("registers", {}, "no_embed_class"),
        ("class token", {"reg_tokens": 2}, "reg_token"),
        ("QK norm", {}, "k_norm"),
        ("average pool", {}, "global_pool 'avg'"),
        ("class token", {"drop_path_rate": 0.1}, "DropPath"),
        ("class token", {"proj_drop_rate": 0.1}, "p=0.1"),
        ("class token", {"num_classes": 0}, "num_classes"),
    ],
)
def test_a_vit_that_does_not_convert_is_refused_by_name(flavour: str, settings: dict[str, Any], named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        from_timm(ATSConfig(blocks=(1,)).build(small_vit(flavour, **settings)))


def test_the_released_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="ReleasedATSConfig has no counterpart in Flax"):
        from_timm(ReleasedATSConfig(blocks=(1,)).build(small_vit()))


def test_weights_of_another_shape_are_refused() -> None:
    module, variables = from_timm(ATSConfig(blocks=(1,)).build(small_vit()))
    with pytest.raises(ValueError, match="depth 4, but test_vit has 3"):
        to_timm(module, variables, small_vit(depth=3))
    with pytest.raises(ValueError, match="flavour"):
        to_timm(module.clone(flavour=Flavour()), variables, small_vit())
