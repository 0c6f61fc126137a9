"""Fit DynamicViT's predictors to a pretrained ViT before any training.

Predictors that start at random drop patches at random, and what the ViT unlearns meanwhile a short training does not
win back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adaptvit.budget import BATCH
from adaptvit.methods.dynamicvit import DynamicViT, Predictor
from adaptvit.methods.regression import SPREAD, Regression, importance, read_by_block
from adaptvit.process import in_float64
from adaptvit.tokens import Masked, Tokens
from adaptvit.usage import check_finite


@torch.inference_mode()
def fit_predictors(model: DynamicViT, images: Tensor) -> float:
    """Set a `top-k` model's predictors, in place, from what the ViT does with calibration images.

    Stage by stage, on what the stages before it keep, a predictor begins with the linear map of a patch's features
    that tells best, by linear regression, how much the class token of the dense ViT reads of the patch from there on.
    Log-odds of 0 are where the stage keeps its share of all images' patches.

    Args:
        model: in evaluation mode, its keep rates those that it is to run with.
        images: (B, channels, height, width), as the model takes them; a few hundred will do.
    Returns:
        The share of the squares of the patches' importance that the maps explain, mean over stages.
    Raises:
        ValueError: attention that is not finite or tells no patch from another.
    """
    batches = [model.enter(batch, Masked) for batch in images.split(BATCH)]
    seen = [read_by_block(model, tokens) for tokens in batches]
    check_finite(torch.cat(seen), "attention weights")
    explained = list[Tensor]()
    for number in range(model.stages[-1] + 1):
        if number in model.stages:
            stage = len(explained)
            wanted = importance(in_float64(torch.cat(seen)[:, number:]).mean(dim=1)).split(BATCH)
            predictor: nn.Module = model.score_predictor[stage]
            assert isinstance(predictor, Predictor)
            explained.append(_fit(predictor, model.prefix, batches, wanted, model.shares[stage]))
            batches = [model.drop(tokens, predictor(tokens, model.prefix), stage) for tokens in batches]
        batches = [model.run_block(number, tokens) for tokens in batches]
    return torch.stack(explained).mean().item()


def _fit(
    predictor: Predictor, prefix: int, batches: Sequence[Tokens], wanted: Sequence[Tensor], share: float
) -> Tensor:
    """Fit one predictor so that it keeps a share of all patches; the share of the squares that it explains."""
    norm, size = predictor.in_conv[0], batches[0].x.shape[-1]
    regression = Regression(size, wanted[0].device)
    lives = [tokens.live[:, prefix:] for tokens in batches]
    features = [norm(tokens.x[:, prefix:])[live] for tokens, live in zip(batches, lives, strict=True)]
    for x, matters, live in zip(features, wanted, lives, strict=True):
        regression.add(x, matters[live])
    weights, _, explained = regression.solve()
    score = SPREAD * torch.cat([in_float64(x) @ weights for x in features])
    gone = 1 - share * torch.cat(lives).numel() / len(score)  # of those that are left
    predictor.begin_with(SPREAD * weights, -score.quantile(max(0.0, gone)))
    return explained
