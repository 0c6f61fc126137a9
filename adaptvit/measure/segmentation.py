"""How well a model tells the class of every pixel: intersection over union, accuracy, MACs over a data set.

Letters: C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from adaptvit.backbones.sizes import shape_of
from adaptvit.checks import In, checked
from adaptvit.data import IGNORED, Batch, Unreadable
from adaptvit.extras import needed
from adaptvit.macs import dense_macs, macs
from adaptvit.measure.evaluate import each_batch, evaluate
from adaptvit.model import AdaptiveViT
from adaptvit.process import as_found, in_float64
from adaptvit.tokens import Tokens
from adaptvit.usage import Output, Usage, join


@dataclass(frozen=True, eq=False)
class PixelResult:
    """A model on a data set with masks. Pixels of no class are not counted."""

    images: int
    """Images evaluated."""
    miou: float
    """Mean over classes that occur of the pixels that are and are told to be of a class, over those that are or are."""
    accuracy: float
    """Share of pixels that are told rightly."""
    iou: tuple[float, ...]
    """Of each class; NaN where it neither occurs nor is told."""
    gmacs: float
    """Mean GMACs per image."""
    gmacs_dense: float
    """GMACs of the model with nothing left out."""
    confusion: Tensor
    """(images, C, C) int64, pixels of class i that are told to be of class j, in the order of the data set."""
    usage: Usage
    """The compact record of every image."""
    unreadable: tuple[Unreadable, ...]
    """Images that could not be decoded, or whose logits are not finite; they are not counted anywhere else."""

    @property
    def figures(self) -> dict[str, Any]:
        """The numbers of the whole data set, JSON-able."""
        names = ("images", "miou", "accuracy", "gmacs", "gmacs_dense")
        return {name: getattr(self, name) for name in names} | {"unreadable": len(self.unreadable)}


@checked
@as_found()
def evaluate_pixels(
    model: AdaptiveViT | nn.Module,
    data: Dataset,
    layout: type[Tokens] | None = None,
    batch_size: Annotated[int, In("[1, inf)")] = 16,
    workers: Annotated[int, In("[0, 1024]")] = 0,
    shared: bool = False,
) -> PixelResult:
    """Run every image once; arguments and errors as of `adaptvit.measure.evaluate.evaluate`, of logits of pixels."""
    kept, unreadable = each_batch(model, data, _kept, layout, batch_size, workers, shared)
    confusion, usage = torch.cat([one for one, _ in kept]), join([one for _, one in kept])
    iou, shape = iou_of(confusion.sum(dim=0)), model.shape if isinstance(model, AdaptiveViT) else shape_of(model)
    right = confusion.diagonal(dim1=1, dim2=2).sum()
    return PixelResult(
        images=len(confusion),
        miou=iou.nanmean().item(),
        accuracy=(right / confusion.sum()).item(),
        iou=tuple(iou.tolist()),
        gmacs=in_float64(macs(usage, shape)).mean().item() / 1e9,
        gmacs_dense=dense_macs(shape, usage.grid) / 1e9,
        confusion=confusion,
        usage=usage,
        unreadable=tuple(unreadable),
    )


def iou_of(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, (..., C) float64, of (..., C, C) pixels; NaN where there are none."""
    confusion = in_float64(confusion)
    both = confusion.diagonal(dim1=-2, dim2=-1)
    return both / (confusion.sum(dim=-1) + confusion.sum(dim=-2) - both)


def _kept(batch: Batch, output: Output) -> tuple[Tensor, Usage]:
    with needed("measuring what pixels are told to be"):
        from sklearn.metrics import confusion_matrix

    found, classes = output.logits.argmax(dim=1).cpu(), range(output.logits.shape[1])
    counted = batch.labels != IGNORED
    matrices = [
        torch.from_numpy(confusion_matrix(label[there].numpy(), guess[there].numpy(), labels=classes))
        if there.any()
        else torch.zeros(len(classes), len(classes), dtype=torch.int64)
        for label, guess, there in zip(batch.labels, found, counted, strict=True)
    ]
    return torch.stack(matrices), output.usage.to_keep()


EVALUATIONS: dict[str, Callable[..., Any]] = {"classes": evaluate, "pixels": evaluate_pixels}
"""How a model is measured, by `Data.task`."""
