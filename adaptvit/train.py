"""Training: accelerate around a plain loop, one checkpoint and one log line per epoch, resumed where it stopped.

A run is known by what decides its outcome: recipe, method, starting weights and data. Its files carry eight digits of
that fingerprint, so that a changed recipe starts afresh beside the old run instead of over it.
"""

import hashlib
import json
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from tqdm import tqdm

from adaptvit.data import Data
from adaptvit.files import replacing, write_atomically
from adaptvit.macs import dense_macs, macs
from adaptvit.model import AdaptiveViT
from adaptvit.usage import Output


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train."""

    epochs: int
    """Passes over the training split."""
    batch_size: int = 64
    """Images per step and process; the images left over at the end of an epoch are skipped."""
    optimizer: str = "adamw"
    """A name of `timm.optim.list_optimizers()`."""
    learning_rate: float = 1e-3
    """Peak of the learning rate, after the warm-up; from there it falls to a hundredth along a cosine."""
    weight_decay: float = 0.05
    """Weight decay of matrices; biases and norms have none."""
    warmup_epochs: int = 1
    """Epochs of linear warm-up, below `epochs`."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes, in [0, 1)."""
    clip_grad: float = 1.0
    """Largest norm of the gradient of a step."""
    seed: int = 0
    """Decides the order of the images and how they are augmented; epoch e uses `seed` + e."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Recipe.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_grad"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Recipe.{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"Recipe.warmup_epochs must lie in [0, epochs={self.epochs}), got {self.warmup_epochs}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"Recipe.label_smoothing must lie in [0, 1), got {self.label_smoothing}")


@dataclass(frozen=True)
class Epoch:
    """One epoch, averaged over its training images: a line of the log."""

    epoch: int
    """Counted from 1."""
    loss: float
    """Cross-entropy of the task."""
    terms: dict[str, float]
    """The method's own loss terms, weighted."""
    accuracy: float
    """Share of training images classified correctly while training."""
    macs: float
    """Executed MACs over those of the timm model, forward pass."""
    depth_mean: float | None
    """Mean blocks entered by a patch token; None, like the next two, where the method does not track them."""
    depth_min: int | None
    """Of any patch."""
    depth_max: int | None
    """Of any patch."""
    learning_rate: float
    """Of the last step."""
    seconds: float
    """Duration."""


def train(model: AdaptiveViT, data: Data, recipe: Recipe, output: Path, name: str = "training") -> list[Epoch]:
    """Train in place and return what happened, epoch by epoch; finished epochs of the same run are not repeated.

    Writes `checkpoint-XXXXXXXX.pt` and `log-XXXXXXXX.jsonl` in `output` after every epoch, each whole or not at all.

    Args:
        model: any adaptive model; a plain ViT trains as `FullConfig().build(vit)`.
        output: folder of the run, made if it is not there.
        name: what the progress bar calls it.
    Raises:
        FloatingPointError: the loss is not finite; the checkpoint of the last finished epoch stays.
        ValueError: the training split is smaller than a batch.
    """
    accelerator = Accelerator()
    key = fingerprint(model, data, recipe)
    checkpoint, log = output / f"checkpoint-{key}.pt", output / f"log-{key}.jsonl"
    output.mkdir(parents=True, exist_ok=True)

    order = torch.Generator()
    loader = DataLoader(data.train, recipe.batch_size, shuffle=True, drop_last=True, generator=order)
    if not len(loader):
        raise ValueError(f"Recipe.batch_size is {recipe.batch_size}, more than the training images of {data.name}")
    optimizer = create_optimizer_v2(model, recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=0.0,
        min_lr=recipe.learning_rate / 100,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    history: list[Epoch] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=accelerator.device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        history = [Epoch(**epoch) for epoch in saved["history"]]

    for number in range(len(history) + 1, recipe.epochs + 1):
        start = time.perf_counter()
        torch.manual_seed(recipe.seed + number)  # all randomness of an epoch hangs on its number: resuming is exact
        order.manual_seed(recipe.seed + number)
        wrapped.train()
        tally = Tally(model)
        bar = tqdm(loader, desc=f"{name} {number}/{recipe.epochs}", disable=not accelerator.is_local_main_process)
        for step, (images, labels) in enumerate(bar, start=(number - 1) * len(loader) + 1):
            scheduler.step_update(step)
            result = wrapped(images)
            task = cross_entropy(result.logits, labels, label_smoothing=recipe.label_smoothing)
            loss = task + sum(result.terms.values())
            if not loss.isfinite():
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {step}, in epoch {number}: lower Recipe.learning_rate "
                    f"({recipe.learning_rate:g}); epochs 1 to {number - 1} are kept in {output}"
                )
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            tally.add(result, labels, task)
            bar.set_postfix_str(tally.line())
        history.append(tally.epoch(number, optimizer.param_groups[0]["lr"], time.perf_counter() - start, accelerator))
        if accelerator.is_main_process:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "history": [asdict(epoch) for epoch in history],
            }
            with replacing(checkpoint) as partial:
                torch.save(state, partial)
            write_atomically(log, "".join(json.dumps(asdict(epoch)) + "\n" for epoch in history))
    return history


def fingerprint(model: AdaptiveViT, data: Data, recipe: Recipe) -> str:
    """Eight hexadecimal digits of what decides a run: recipe, method, starting weights, data."""
    digest = hashlib.sha256(repr((recipe, model.config, data.name)).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:8]


class Tally:
    """Running sums over the images of an epoch, on this process; `epoch` adds up those of all."""

    def __init__(self, model: AdaptiveViT) -> None:
        self.model = model
        self.images = 0
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.depths = (model.shape.depth, 0)

    def add(self, output: Output, labels: Tensor, task: Tensor) -> None:
        """Count a batch: its outputs, its (B,) labels and the mean loss of the task."""
        usage, shape, images = output.usage, self.model.shape, len(labels)
        self.images += images
        self.sums["loss"] += images * task.item()
        self.sums["accuracy"] += (output.logits.argmax(dim=1) == labels).sum().item()
        self.sums["macs"] += macs(usage, shape).sum().item() / dense_macs(shape, usage.grid)
        for name, term in output.terms.items():
            self.sums[f"terms.{name}"] += images * term.item()
        if usage.live is not None:
            depth = usage.patch_depth
            self.sums["depth"] += depth.double().mean(dim=(1, 2)).sum().item()
            self.depths = (min(self.depths[0], int(depth.min())), max(self.depths[1], int(depth.max())))

    def line(self) -> str:
        """The running means, for a progress bar."""
        means = {name: total / self.images for name, total in self.sums.items()}
        depth = f", depth {means['depth']:.2f}" if "depth" in means else ""
        return f"loss {means['loss']:.3f}, accuracy {means['accuracy']:.1%}, MACs {means['macs']:.1%}{depth}"

    def epoch(self, number: int, learning_rate: float, seconds: float, accelerator: Accelerator) -> Epoch:
        """The means over the images of all processes."""
        sums = torch.tensor([self.images, *self.sums.values()], dtype=torch.float64, device=accelerator.device)
        images, *totals = accelerator.reduce(sums).tolist()
        depths = accelerator.gather(torch.tensor([self.depths], device=accelerator.device))
        means = {name: total / images for name, total in zip(self.sums, totals, strict=True)}
        tracked = "depth" in means
        return Epoch(
            epoch=number,
            loss=means["loss"],
            terms={name.removeprefix("terms."): mean for name, mean in means.items() if name.startswith("terms.")},
            accuracy=means["accuracy"],
            macs=means["macs"],
            depth_mean=means["depth"] if tracked else None,
            depth_min=int(depths[:, 0].min()) if tracked else None,
            depth_max=int(depths[:, 1].max()) if tracked else None,
            learning_rate=learning_rate,
            seconds=seconds,
        )
