"""Fit AdaViT's policies over patches to a pretrained ViT before any training.

Policies that start at random wreck what the ViT knows, and a short training does not recover it. So each block's map is
fitted, by linear regression, to how much the class token of the dense ViT attends to a patch in this block and all that
follow. It is fitted on what the blocks before it leave once their own policies are at work, since skipped patches look
unlike others; and its constant is set so that it keeps just its share. From block to block the shares fall by equal
factors. Policies over heads and sub-layers are left as they are.
"""

import math

import torch
from torch import Tensor

from adaptvit.gated import run_gated
from adaptvit.gates import log_odds
from adaptvit.methods.adavit import AdaViT, Policies
from adaptvit.methods.regression import Regression, importance
from adaptvit.tokens import Masked, Tokens
from adaptvit.usage import check_finite
from adaptvit.vit import attention_norm, attention_received, embed, patch_grid, project_normed, run_block

BATCH = 32
SPREAD = 2.0
"""Standard deviation of the fitted logits of a block, less what the maps do not explain."""


def fit_policies(model: AdaViT, images: Tensor, share: float) -> float:
    """Set the maps of the patches' policies, in place, from what the ViT does with calibration images.

    Args:
        model: with policies over patches, around a ViT with a class token.
        images: (B, channels, height, width), as the model takes them; a few hundred will do.
        share: of the dense MACs, in (0, 1), what the policies are to leave.
    Returns:
        The share of the variance of the patches' logarithmic attention that the maps explain, mean over blocks.
    Raises:
        ValueError: no policy over patches, no class token, a share that patches alone cannot come down to, or attention
            that is not finite or tells no patch from another.
    """
    if not model.patch_policy:
        raise ValueError(f"fit_policies needs policies over patches, but the model decides {model.config.policies}")
    if model.read is None:
        raise ValueError(
            "fit_policies needs a ViT that classifies by a class token, whose attention tells which patches matter"
        )
    kept = _kept(model, share)
    training = model.training
    model.eval()
    try:
        return _fit_all(model, images, kept)
    finally:
        model.train(training)


@torch.inference_mode()
def _fit_all(model: AdaViT, images: Tensor, kept: list[float]) -> float:
    """Fit block after block, so that each keeps its share; of the variance, what the maps explain, mean over blocks."""
    explained = []
    batches: list[Tokens] = [Masked.of(embed(model.vit, batch)[0]) for batch in images.split(BATCH)]
    seen = [_attention(model, tokens) for tokens in batches]
    check_finite(torch.cat(seen), "attention weights")
    for number in range(model.depth):
        if str(number) in model.patch_policy:
            explained.append(_fit(model, number, batches, seen, kept[number]))
        batches = [_run(model, number, tokens) for tokens in batches]
    return torch.stack(explained).mean().item()


def _attention(model: AdaViT, tokens: Tokens) -> Tensor:
    """What the class token of the dense ViT attends to: (B, L, P)."""
    seen = []
    for number, block in enumerate(model.vit.blocks):
        projected = project_normed(block, tokens, attention_norm(model.vit, number, tokens.x))
        seen.append(attention_received(tokens, projected, 1).mean(dim=2)[:, model.prefix :])
        tokens = run_block(block, tokens, projected=projected)
    return torch.stack(seen, dim=1)


def _fit(model: AdaViT, block: int, batches: list[Tokens], seen: list[Tensor], kept: float) -> Tensor:
    """Fit one block's map so that it keeps a share of these tokens; the share of the variance that it explains."""
    regression = Regression(model.shape.dim, batches[0].x.device)
    patches = [attention_norm(model.vit, block, tokens.x)[:, model.prefix :] for tokens in batches]
    for features, attention in zip(patches, seen, strict=True):
        regression.add(features, importance(attention[:, block:].double().mean(dim=1)))
    weights, _, explained = regression.solve()
    logits = SPREAD * torch.cat([(features.double() @ weights).flatten() for features in patches])
    policy, config = model.patch_policy[str(block)], model.config
    assert isinstance(policy, torch.nn.Linear)
    policy.weight.copy_(SPREAD * weights[None])
    policy.bias.copy_(log_odds(config.patch_threshold) - config.lean - logits.quantile(1 - kept))
    return explained


def _run(model: AdaViT, block: int, tokens: Tokens) -> Tokens:
    policies, normed = model.decide(block, tokens)
    return run_gated(model.vit.blocks[block], tokens, model.gates(policies), model.config.heads_take, normed, None)


def _kept(model: AdaViT, share: float) -> list[float]:
    """The share of patches that each block keeps, falling by equal factors, so that MACs come to `share`."""
    grid = patch_grid(model.vit)
    device = next(model.parameters()).device
    blocks = torch.arange(model.depth, dtype=torch.float64, device=device)
    later = (blocks - model.config.first_patch_block + 1).clamp(min=0)

    def cost(factor: float) -> float:
        patches = (factor**later)[None, :, None].expand(1, -1, math.prod(grid))
        on = patches.new_ones(1, model.depth, 1)
        return model.share(Policies(patches, on.expand(-1, -1, model.heads[0]), on.expand(-1, -1, 2)), grid).item()

    least = cost(0.0)
    if not least < share < 1:
        raise ValueError(
            f"fit_policies fits to a share of the dense MACs between {least:.3g}, with no patches, and 1, got {share:g}"
        )
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) > share else (middle, high)
    return (low**later).tolist()
