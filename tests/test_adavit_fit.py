"""Policies fitted to a pretrained ViT."""

import dataclasses

import pytest
import torch
from models import images, small_vit, with_values_of_all_lengths

from adaptvit import AdaViTConfig, Masked, dense_macs, macs, meet_target
from adaptvit.methods.adavit import fit_policies

PATCHES = AdaViTConfig(policies=("patches",), patch_threshold=0.5, macs_target=None)


def test_the_patches_that_are_kept_are_those_that_the_class_token_reads_most_of() -> None:
    model = PATCHES.build(with_values_of_all_lengths(small_vit(img_size=64))).eval()
    calibration = images(model.vit, count=64)
    explained = fit_policies(model, calibration, 0.6)
    assert 0.05 < explained <= 1
    with torch.inference_mode():
        x = model.vit._pos_embed(model.vit.patch_embed(calibration))
        logits = model.patch_policy["0"](model.vit.blocks[0].norm1(x))[:, 1:, 0]
        seen = []
        for block in model.vit.blocks:
            normed = block.norm1(x)
            q, k, v = block.attn.qkv(normed).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            attention = (q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)[:, :, 0, 1:]
            seen.append((attention * v[:, :, 1:].norm(dim=-1)).mean(dim=1))
            x = block(x)
    matters = torch.stack(seen).mean(dim=0).log()
    assert torch.corrcoef(torch.stack([logits.flatten(), matters.flatten()]))[0, 1] ** 2 > 0.9 * explained


@pytest.mark.parametrize("first", [0, 2])
def test_blocks_keep_shares_that_fall_by_equal_factors_and_meet_the_budget(first: int) -> None:
    config = dataclasses.replace(PATCHES, first_patch_block=first, patch_threshold=0.7, lean=1.0)
    model = config.build(small_vit(img_size=96)).eval()
    calibration = images(model.vit, count=64)
    fit_policies(model, calibration, 0.6)
    with torch.inference_mode():
        usage = model(calibration, Masked, detailed=True).usage
    share = macs(usage, model.shape).double().mean() / dense_macs(model.shape, usage.grid)
    assert share.item() == pytest.approx(
        0.6, abs=0.01
    )  # attention goes by squares, whose mean is not that of the counts
    kept = (usage.attended - usage.prefix).double().mean(dim=0) / (usage.grid[0] * usage.grid[1])
    assert kept[:first].eq(1).all()
    factors = kept[first:] / torch.cat([torch.ones(1), kept[first:-1]])
    torch.testing.assert_close(factors, factors[:1].expand_as(factors), atol=0.01, rtol=0)


def test_fitting_keeps_the_mode_and_the_logits_of_what_is_on() -> None:
    model = PATCHES.build(small_vit()).train()
    fit_policies(model, images(model.vit, count=8), 0.7)
    assert model.training
    assert model.vit.training
    model.eval()
    batch = images(model.vit, count=8)
    meet_target(model, batch, 1.0)
    with torch.inference_mode():
        torch.testing.assert_close(model(batch), model.vit(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "flavour", "share", "said"),
    [
        (AdaViTConfig(policies=("heads",), macs_target=None), "class token", 0.5, r"decides \('heads',\)"),
        (PATCHES, "average pool", 0.5, "class token"),
        (PATCHES, "class token", 0.05, r"between 0\.\d+, with no patches, and 1, got 0.05"),
        (PATCHES, "class token", 1.0, "got 1"),
    ],
    ids=["no patches", "no class token", "too low", "nothing to leave out"],
)
def test_what_cannot_be_fitted_is_refused(config: AdaViTConfig, flavour: str, share: float, said: str) -> None:
    model = config.build(small_vit(flavour)).eval()
    with pytest.raises(ValueError, match=said):
        fit_policies(model, images(model.vit), share)
