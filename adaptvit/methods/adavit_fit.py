"""Fit AdaViT's policies over patches to a pretrained ViT before any training.

Policies that start at random wreck what the ViT knows, and a short training does not recover it. So each block's map is
fitted, by linear regression, to how much the class token attends to a patch in this block and all that follow: patches
begin to go with those that the ViT itself looks at least, and later blocks work on fewer than earlier ones, without
which little is left of its accuracy. Policies over heads and sub-layers are left as they are.
"""

import torch
from torch import Tensor

from adaptvit.methods.adavit import AdaViT
from adaptvit.methods.regression import Regression
from adaptvit.tokens import Masked, Tokens
from adaptvit.vit import attention_norm, attention_received, embed, project_normed, run_block

BATCH = 32
SPREAD = 2.0
"""Standard deviation of the fitted logits of a block."""
FALL = 6.0
"""By how much their mean falls from the first block to the last."""


def fit_policies(model: AdaViT, images: Tensor) -> float:
    """Set the maps of the patches' policies, in place, from what the ViT does with calibration images.

    Args:
        model: with policies over patches, around a ViT with a class token.
        images: (B, channels, height, width), as the model takes them; a few hundred will do.
    Returns:
        The share of the variance of the patches' logarithmic attention that the maps explain, mean over blocks.
    Raises:
        ValueError: no policy over patches, or no class token.
    """
    if not model.patch_policy:
        raise ValueError(f"fit_policies needs policies over patches, but the model decides {model.config.policies}")
    if model.read is None:
        raise ValueError(
            "fit_policies needs a ViT that classifies by a class token, whose attention tells which patches matter"
        )
    vit = model.vit
    regressions = {int(block): Regression(model.shape.dim, images.device) for block in model.patch_policy}
    training = vit.training
    vit.eval()
    with torch.inference_mode():
        for batch in images.split(BATCH):
            tokens: Tokens = Masked.of(embed(vit, batch)[0])
            seen, features = [], []
            for number, block in enumerate(vit.blocks):
                normed = attention_norm(vit, number, tokens.x)
                projected = project_normed(block, tokens, normed)
                features.append(normed[:, model.prefix :])
                seen.append(attention_received(tokens, projected, 1).mean(dim=2)[:, model.prefix :])
                tokens = run_block(block, tokens, projected=projected)
            for number, regression in regressions.items():
                matters = torch.stack(seen[number:]).double().mean(dim=0).log()
                regression.add(features[number], (matters - matters.mean()) / matters.std())
    vit.train(training)
    shares = []
    for number, regression in regressions.items():
        weights, constant, explained = regression.solve()
        shares.append(explained)
        policy = model.patch_policy[str(number)]
        assert isinstance(policy, torch.nn.Linear)
        with torch.no_grad():
            policy.weight.copy_(SPREAD * weights[None])
            policy.bias.copy_(SPREAD * constant + FALL * (0.5 - number / model.depth))
    return torch.stack(shares).mean().item()
