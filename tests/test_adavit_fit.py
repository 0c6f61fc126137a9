"""Policies fitted to a pretrained ViT."""

import pytest
import torch
from models import images, small_vit

from adaptvit import AdaViTConfig, meet_target
from adaptvit.methods.adavit_fit import fit_policies
from adaptvit.tokens import Masked
from adaptvit.vit import attention_received, embed, project, run_block

PATCHES = AdaViTConfig(policies=("patches",), patch_threshold=0.5, macs_target=None)


def test_the_fitted_logits_go_by_the_attention_of_the_class_token_from_here_on() -> None:
    model = PATCHES.build(small_vit(img_size=64)).eval()
    explained = fit_policies(model, images(model.vit, count=24))
    assert 0.05 < explained <= 1
    batch = images(model.vit, count=8, seed=5)
    with torch.inference_mode():
        tokens, seen, logits = Masked.of(embed(model.vit, batch)[0]), [], []
        for number, block in enumerate(model.vit.blocks):
            logits.append(model.patch_policy[str(number)](block.norm1(tokens.x))[:, 1:, 0])
            seen.append(attention_received(tokens, project(block, tokens), 1).mean(dim=2)[:, 1:])
            tokens = run_block(block, tokens)
    for number, fitted in enumerate(logits):
        matters = torch.stack(seen[number:]).mean(dim=0).log()
        assert torch.corrcoef(torch.stack([fitted.flatten(), matters.flatten()]))[0, 1] > 0.2, number
    means = [fitted.mean() for fitted in logits]
    assert means == sorted(means, reverse=True)  # later blocks work on fewer patches


def test_fitting_keeps_the_mode_and_the_logits_of_what_is_on() -> None:
    model = PATCHES.build(small_vit()).train()
    fit_policies(model, images(model.vit, count=8))
    assert model.training
    assert model.vit.training
    model.eval()
    batch = images(model.vit, count=8)
    meet_target(model, batch, 1.0)
    with torch.inference_mode():
        torch.testing.assert_close(model(batch).logits, model.vit(batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "flavour", "said"),
    [
        (AdaViTConfig(policies=("heads",), macs_target=None), "class token", r"decides \('heads',\)"),
        (PATCHES, "average pool", "class token"),
    ],
    ids=["no patches", "no class token"],
)
def test_what_cannot_be_fitted_is_refused(config: AdaViTConfig, flavour: str, said: str) -> None:
    model = config.build(small_vit(flavour)).eval()
    with pytest.raises(ValueError, match=said):
        fit_policies(model, images(model.vit))
