"""Fit A-ViT's gate to a pretrained ViT before any training: choose what channel 0 carries.

A-ViT reads its halting score from channel 0 of the residual stream, which in a pretrained ViT means nothing in
particular. But the stream can be turned without changing what the ViT computes (`set_channel`), so that channel 0
becomes the direction in which it is best told, by linear regression, how little the class token reads of a patch over
all blocks (`regression.see`). Halting then begins with the patches that the ViT itself needs least.
"""

from functools import partial

import torch
from torch import Tensor, nn

from adaptvit.backbones.base import check_offers
from adaptvit.backbones.turn import set_channel
from adaptvit.budget import in_batches
from adaptvit.methods.full import FullConfig
from adaptvit.methods.regression import Regression, importance, see
from adaptvit.process import in_float64
from adaptvit.tokens import Masked
from adaptvit.usage import check_finite


def fit_gate(vit: nn.Module, images: Tensor) -> tuple[float, float]:
    """Turn the ViT's residual stream, in place, so that channel 0 tells the patches that matter little.

    Args:
        vit: in evaluation mode, with a class token.
        images: (B, channels, height, width), as the model takes them; a few hundred will do.
    Returns:
        The gate scale with which patches' logits have a standard deviation of about 1, and the share of the variance of
        the patches' importance that channel 0 explains, in [0, 1].
    Raises:
        TypeError: the ViT has no attention or no class token, or a part that cannot be turned.
        ValueError: its attention is not finite, or tells no patch from another.
    """
    check_offers(vit, {"attention", "a class token"}, "fitting a gate")
    model = FullConfig().build(vit)
    prefix, size = model.prefix, model.shape.dim
    regression = Regression(size, images.device)
    with torch.inference_mode():
        for batch in in_batches(images, "fitting"):
            tokens = model.enter(batch, Masked)
            seen, features = list[Tensor](), list[Tensor]()
            for number in range(model.depth):
                tokens = model.run_block(number, tokens, look=partial(see, seen, tokens, model), every=True)
                features.append(in_float64(tokens.x[:, prefix:]))
            read = in_float64(torch.stack(seen)).mean(dim=0)  # (B, patches)
            check_finite(read, "attention weights")
            little = -importance(read)
            for x in features[:-1]:
                regression.add(x - x.mean(dim=-1, keepdim=True), little)
    direction, _, explained = regression.solve()
    set_channel(vit, direction)
    scale = (direction - direction.mean()).norm() / (1 - 1 / size) ** 0.5
    return scale.item(), explained.item()
