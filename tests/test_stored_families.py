"""Models of timm's other families come back from a file as they were."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import adaptvit
from adaptvit import MergeConfig
from adaptvit.backbones.record import describe, rebuild

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5, "img_size": 64}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_small_patch16_dinov3", {}),
        ("eva02_base_patch14_224", {"img_size": 56}),
        ("eva02_enormous_patch14_clip_224", {"img_size": 56}),
        ("vit_small_patch16_rope_mixed_ape_224", {}),
        ("vit_pe_core_tiny_patch16_384", {}),
        ("vit_base_patch16_sapiens2", {"num_kv_heads": (3, 1)}),
        ("beit_base_patch16_224", {}),
        ("vit_relpos_small_patch16_224", {}),
        ("vit_base_patch16_18x2_224", {}),
        ("vit_base_patch16_xp_224", {}),
        ("vit_base_patch16_rpn_224", {}),
    ],
)
def test_a_model_comes_back(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = timm.create_model(name, **SMALL | settings).eval()
    model = MergeConfig(thresholds=0.3).build(vit)
    adaptvit.save(model, tmp_path / "model.safetensors")
    other = adaptvit.load(tmp_path / "model.safetensors").eval()
    images = torch.randn(2, 3, *vit.patch_embed.img_size)
    assert type(other.vit) is type(vit)
    torch.testing.assert_close(other(images), model(images))


def test_a_classifier_that_was_reset_comes_back() -> None:
    vit = timm.create_model("vit_small_patch16_dinov3", **SMALL)
    vit.reset_classifier(9, "token")
    other = rebuild(describe(vit))
    assert (other.num_classes, other.global_pool) == (9, "token")


def test_parts_that_the_name_does_not_give_are_not_saved() -> None:
    vit = timm.create_model("vit_small_patch16_dinov3", **SMALL)
    vit.blocks[1].mlp = torch.nn.Linear(48, 48)
    with pytest.raises(ValueError, match="parts that its name and arguments do not give"):
        describe(vit)


@pytest.mark.parametrize("argument", [{"checkpoint_path": "x"}, {"pretrained": True}, {"depth": {"a": 1}}])
def test_a_file_says_nothing_else(argument: dict[str, Any]) -> None:
    description = describe(timm.create_model("vit_small_patch16_dinov3", **SMALL))
    description["arguments"] |= argument
    with pytest.raises(ValueError, match="its ViT's argument"):
        rebuild(description)
