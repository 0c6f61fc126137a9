"""What a model gets right and what it costs: accuracy, MACs and depth over a data set, and speed in turns.

Letters: B images, L blocks, N token slots.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Annotated, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from adaptvit.backbones.base import model_name, patch_grid
from adaptvit.backbones.forward import scores
from adaptvit.backbones.sizes import shape_of
from adaptvit.checks import In, checked
from adaptvit.data import (
    IGNORED,
    Batch,
    Clips,
    LeftOut,
    Samples,
    Unreadable,
    collate,
    first_of,
    not_finite,
)
from adaptvit.macs import dense_macs, macs
from adaptvit.model import AdaptiveViT
from adaptvit.process import as_found, from_all, in_float64, pins, place, serve
from adaptvit.terminal import progress_bar
from adaptvit.tokens import Tokens
from adaptvit.usage import Output, Usage, join
from adaptvit.weights.tensorfiles import check_finite

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
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
    gmacs_dense: float
    """GMACs of the timm model, the same for every image."""
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
    depth_spread: float | None
    """Standard deviation, over images, of an image's mean depth."""
    depth_spread_within: float | None
    """Standard deviation of the depth over the patches of an image, mean over images."""
    usage: Usage
    """The compact record of every image, in the order of the data set; `outputs` has `fused` and `groups` too."""
    losses: Tensor
    """(images,) cross-entropy of each."""
    correct: Tensor
    """(images,) bool, whose label has the largest logit."""
    unreadable: tuple[Unreadable, ...]
    """Images that could not be decoded, or whose logits are not finite; they are not counted anywhere else."""
    left_out: tuple[LeftOut, ...] = ()
    """What lies beside the images and is not used."""

    @property
    def figures(self) -> dict[str, float | int | None]:
        """The numbers of the whole data set, JSON-able."""
        parts = ("usage", "losses", "correct", "unreadable", "left_out")
        whole = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in parts}
        return whole | {"unreadable": len(self.unreadable)}


@checked
@as_found()
def evaluate(
    model: AdaptiveViT | nn.Module,
    data: Dataset,
    layout: type[Tokens] | None = None,
    batch_size: Annotated[int, In("[1, inf)")] = 120,
    workers: Annotated[int, In("[0, 1024]")] = 0,
    shared: bool = False,
) -> Result:
    """Run every image once, in evaluation mode; the model's own mode is restored, and the state of the process.

    Args:
        model: an adaptive model, or a timm ViT as it is, which takes every token through every block.
        data: items (image, label), or `Unreadable`, which is counted and left out.
        layout: as in the adaptive model's forward.
        workers: processes that decode; 0 decodes here.
        shared: of the processes of a group, which all call this, each runs some of the batches, and all have the result
            of the whole; of a stream each runs all.
    Raises:
        ChildProcessError: it is shared, and another process failed.
        TypeError: items of the data set are no images with labels.
        ValueError: the data set has no image that can be read and has finite logits, or a label that the model's head
            does not have; or weights are not finite, which no image may show.
    """
    kept, unreadable = each_batch(model, data, _kept, layout, batch_size, workers, shared)
    losses, places = (torch.cat([getattr(one, name) for one in kept]) for name in ("losses", "places"))
    return _result(losses, places, kept[0].classes, join([one.usage for one in kept]), model, tuple(unreadable))


def each_batch(
    model: AdaptiveViT | nn.Module,
    data: Dataset,
    keep: Callable[[Batch, Output], T],
    layout: type[Tokens] | None,
    batch_size: int,
    workers: int,
    shared: bool,
) -> tuple[list[T], list[Unreadable]]:
    """What is kept of every batch in evaluation mode, one or more, and what is left out; the rest as of `evaluate`."""
    check_finite(model_name(model.vit if isinstance(model, AdaptiveViT) else model), model.state_dict())
    training = model.training
    model.eval()
    shared = shared and not isinstance(data, IterableDataset)
    share = _share(data, batch_size) if shared else data

    def run() -> list[tuple[list[Unreadable], T | None]]:
        batches = outputs(model, share, layout, batch_size, workers)
        return [(batch.unreadable, None if output is None else keep(batch, output)) for batch, output in batches]

    try:
        parts = from_all(run) if shared else [run()]
    finally:
        model.train(training)
    unreadable = [one for part in parts for names, _ in part for one in names]
    kept = [one for part in parts for _, one in part if one is not None]
    if not kept:
        one = unreadable[0].kind.removesuffix("s") if unreadable else "image"
        needed = f"at least one {one} that can be read and has finite logits"
        raise ValueError(f"evaluate needs {needed}, and the data set has none{first_of(unreadable)}")
    return kept, unreadable


class _Kept(NamedTuple):
    """Of a batch, as `_result` takes them."""

    losses: Tensor
    places: Tensor
    classes: int
    usage: Usage


def _kept(batch: Batch, output: Output) -> _Kept:
    logits = output.logits.float().cpu()
    losses = cross_entropy(logits, batch.labels, reduction="none")
    places = (logits.argsort(dim=1, descending=True) == batch.labels[:, None]).int().argmax(dim=1)
    return _Kept(losses, places, logits.shape[1], output.usage.to_keep())


def _share(data: Dataset, batch_size: int) -> Dataset:
    """What falls to this process: whole batches, so that these are the same however many processes there are."""
    count, (rank, world) = len(data), place()  # type: ignore[arg-type]
    batches = -(-count // batch_size)
    first, last = (min(count, batches * part // world * batch_size) for part in (rank, rank + 1))
    return Subset(data, range(first, last))


@checked
@torch.inference_mode()
def outputs(
    model: AdaptiveViT | nn.Module,
    data: Dataset,
    layout: type[Tokens] | None = None,
    batch_size: Annotated[int, In("[1, inf)")] = 120,
    workers: Annotated[int, In("[0, 1024]")] = 0,
    labelled: bool = True,
) -> Iterator[tuple[Batch, Output | None]]:
    """Each batch of a data set and what a model makes of it, in its present mode; None where no image can be read.

    An image whose logits are not finite is left out of both and named with the unreadable ones.

    Args:
        labelled: labels are the model's classes.
    Raises:
        ValueError: a label that the model's head does not have.
    """
    like = next(model.parameters())
    loader = DataLoader(
        data, batch_size, num_workers=workers, collate_fn=collate, worker_init_fn=serve, pin_memory=pins(like.device)
    )
    seen = 0
    for batch in progress_bar(loader, "evaluating"):
        batch = batch._replace(labels=batch.labels.clone())  # a tensor of a worker that is kept keeps a file open
        output = _forward(model, batch.images.to(like, non_blocking=True), layout) if len(batch.labels) else None
        if output is not None and labelled:
            _check_labels(batch.labels, output.logits.shape[1])
        items = range(seen, seen + len(batch.labels) + len(batch.unreadable))
        seen = items.stop
        if output is not None and not (sound := output.logits.isfinite().flatten(1).all(dim=1)).all():
            batch, output = _sound(batch, output, sound, data, items)
        yield batch, output


def _sound(batch: Batch, output: Output, sound: Tensor, data: Dataset, items: range) -> tuple[Batch, Output | None]:
    """What is left of a batch, its items numbered in the data set, without the images whose logits are not finite."""
    read = [item for item in items if not isinstance(data[item], Unreadable)] if batch.unreadable else list(items)
    spoilt = [not_finite(_name(data, item)) for item, fine in zip(read, sound.tolist(), strict=True) if not fine]
    there = sound.cpu()
    batch = Batch(batch.images[there], batch.labels[there], batch.unreadable + spoilt)
    if not there.any():
        return batch, None
    distilled = None if output.distilled is None else output.distilled[sound]
    return batch, replace(output, logits=output.logits[sound], usage=output.usage.of_images(sound), distilled=distilled)


def _name(data: Dataset, item: int) -> str:
    """Of an image, by its number in the data set."""
    if isinstance(data, Subset):
        return _name(data.dataset, data.indices[item])
    return data.name(item) if isinstance(data, Samples | Clips) else f"image {item}"


def _forward(model: AdaptiveViT | nn.Module, images: Tensor, layout: type[Tokens] | None) -> Output:
    if isinstance(model, AdaptiveViT):
        return model(images, layout, detailed=True)
    shape, grid = shape_of(model), patch_grid(model, images)
    depth = torch.full((len(images), shape.prefix + math.prod(grid)), shape.depth, device=images.device)
    return Output(scores(model(images))[0], Usage.of_depth(depth, shape.heads, grid, shape.prefix))


def _check_labels(labels: Tensor, classes: int) -> None:
    labels = labels if labels.ndim == 1 else labels[labels != IGNORED]
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
        raise ValueError(f"the model has {classes} classes, 0 to {classes - 1}, but the data set has the label {wrong}")


def _result(
    losses: Tensor,
    places: Tensor,
    classes: int,
    usage: Usage,
    model: AdaptiveViT | nn.Module,
    unreadable: tuple[Unreadable, ...],
) -> Result:
    """Of (images,) cross-entropies and places of the right class among `classes`, the most probable at 0."""
    shape = model.shape if isinstance(model, AdaptiveViT) else shape_of(model)
    cost = in_float64(macs(usage, shape)) / 1e9
    depth = _depths(usage)
    return Result(
        images=len(losses),
        top1=in_float64(places == 0).mean().item(),
        top5=in_float64(places < 5).mean().item() if classes > 5 else None,
        loss=losses.mean().item(),
        gmacs=cost.mean().item(),
        gmacs_dense=dense_macs(shape, usage.grid) / 1e9,
        gmacs_p10=cost.quantile(0.1).item(),
        gmacs_p90=cost.quantile(0.9).item(),
        depth_mean=None if depth is None else depth["mean"].mean().item(),
        depth_min=None if depth is None else int(depth["min"].min()),
        depth_max=None if depth is None else int(depth["max"].max()),
        depth_spread=None if depth is None else depth["mean"].std(correction=0).item(),
        depth_spread_within=None if depth is None else depth["spread"].mean().item(),
        usage=usage,
        losses=losses,
        correct=places == 0,
        unreadable=unreadable,
    )


def _depths(usage: Usage) -> dict[str, Tensor] | None:
    """Of each image, mean, spread, least and most of its patches' depths; some at a time, as maps take much room."""
    found = []
    for rows in torch.arange(len(usage.attended)).split(1000):
        some = usage.of_images(rows)
        if some.live is None:
            return None
        depth = in_float64(some.patch_depth).flatten(1)
        found.append(torch.stack([depth.mean(1), depth.std(1, correction=0), depth.amin(1), depth.amax(1)]))
    return dict(zip(("mean", "spread", "min", "max"), torch.cat(found, dim=1), strict=True))
