"""What a model gets right and what it costs: accuracy, MACs and depth over a data set, and speed in turns.

Letters: B images, L blocks, N token slots.
"""

from dataclasses import dataclass
from statistics import median

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from adaptvit.macs import macs
from adaptvit.model import AdaptiveViT
from adaptvit.timing import interleaved
from adaptvit.tokens import Masked, Packed, Tokens
from adaptvit.usage import Output, Usage, join
from adaptvit.vit import patch_grid, shape_of


@dataclass(frozen=True)
class Result:
    """A model on a data set. Depths are blocks entered by patch tokens, None where the method does not track them."""

    images: int
    """Images evaluated."""
    top1: float
    """Share of images whose label has the largest logit."""
    top5: float | None
    """Share of images whose label is among the five largest; None for five classes or fewer."""
    loss: float
    """Mean cross-entropy, in nats."""
    gmacs: float
    """Mean GMACs per image."""
    gmacs_p10: float
    """GMACs of the image at the 10th percentile."""
    gmacs_p90: float
    """GMACs of the image at the 90th percentile."""
    depth_mean: float | None
    """Mean over all patches of all images."""
    depth_min: int | None
    """Of any patch."""
    depth_max: int | None
    """Of any patch."""
    usage: Usage
    """The record of every image, in the order of the data set."""


@dataclass(frozen=True)
class Speed:
    """Forward passes of one batch, timed in turns; medians over the rounds."""

    dense: float
    """Images per second of the timm model."""
    masked: float
    """Images per second of the adaptive model, every slot computed."""
    packed: float
    """Images per second of the adaptive model, live tokens only."""
    gain: float
    """Time of the timm model over that of the packed one."""


def evaluate(
    model: AdaptiveViT | VisionTransformer, data: Dataset, layout: type[Tokens] | None = None, batch_size: int = 120
) -> Result:
    """Run every image once, in evaluation mode; the model's own mode is restored.

    Args:
        model: an adaptive model, or a timm ViT as it is, which takes every token through every block.
        data: items (image, label).
        layout: as in the adaptive model's forward.
    Raises:
        ValueError: the data set is empty.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    logits, labels, usages = [], [], []
    try:
        with torch.inference_mode():
            for images, answers in tqdm(DataLoader(data, batch_size), desc="evaluating", leave=False):
                output = _forward(model, images.to(device), layout)
                logits.append(output.logits.float().cpu())
                labels.append(answers)
                usages.append(_on_host(output.usage))
    finally:
        model.train(training)
    if not usages:
        raise ValueError("evaluate needs at least one image, got an empty data set")
    return _result(torch.cat(logits), torch.cat(labels), join(usages), model)


def speed(vit: VisionTransformer, model: AdaptiveViT, images: Tensor, rounds: int = 10) -> Speed:
    """Time the timm model and both executions of the adaptive one on the same (B, channels, height, width) images.

    The models are left in evaluation mode.
    """
    vit.eval()
    model.eval()
    calls = {
        "dense": lambda: vit(images),
        "masked": lambda: model(images, Masked),
        "packed": lambda: model(images, Packed),
    }
    with torch.inference_mode():
        seconds = interleaved(calls, rounds, images.device)
    rates = {name: len(images) / median(times) for name, times in seconds.items()}
    gain = median(slow / fast for slow, fast in zip(seconds["dense"], seconds["packed"], strict=True))
    return Speed(**rates, gain=gain)


def _forward(model: AdaptiveViT | VisionTransformer, images: Tensor, layout: type[Tokens] | None) -> Output:
    if isinstance(model, AdaptiveViT):
        return model(images, layout)
    shape, grid = shape_of(model), patch_grid(model, images)
    depth = torch.full((len(images), shape.prefix + grid[0] * grid[1]), shape.depth, device=images.device)
    return Output(model(images), Usage.of_depth(depth, shape.depth, shape.heads, grid, shape.prefix))


def _on_host(usage: Usage) -> Usage:
    parts = {name: part.cpu() for name, part in vars(usage).items() if isinstance(part, Tensor)}
    return Usage(**parts, grid=usage.grid, prefix=usage.prefix)


def _result(logits: Tensor, labels: Tensor, usage: Usage, model: AdaptiveViT | VisionTransformer) -> Result:
    shape = model.shape if isinstance(model, AdaptiveViT) else shape_of(model)
    cost = macs(usage, shape).double() / 1e9
    ranked = logits.argsort(dim=1, descending=True)
    depth = None if usage.live is None else usage.patch_depth
    return Result(
        images=len(labels),
        top1=(ranked[:, 0] == labels).double().mean().item(),
        top5=(ranked[:, :5] == labels[:, None]).any(dim=1).double().mean().item() if logits.shape[1] > 5 else None,
        loss=cross_entropy(logits, labels).item(),
        gmacs=cost.mean().item(),
        gmacs_p10=cost.quantile(0.1).item(),
        gmacs_p90=cost.quantile(0.9).item(),
        depth_mean=None if depth is None else depth.double().mean().item(),
        depth_min=None if depth is None else int(depth.min()),
        depth_max=None if depth is None else int(depth.max()),
        usage=usage,
    )
