"""Training: accelerate around a plain loop, one checkpoint and one log line per epoch, resumed where it stopped.

A run is known by what decides its outcome: recipe, method, starting weights and data. Its files carry eight digits of
that fingerprint, so that a changed recipe starts afresh beside the old run instead of over it.
"""

import fnmatch
import math
import os
import time
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from filelock import FileLock, Timeout
from timm.data import Mixup
from timm.data.distributed_sampler import RepeatAugSampler
from timm.layers import to_2tuple
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from tqdm import tqdm

from adaptvit.backbones.base import check_images, class_count, prefix_tokens
from adaptvit.budget import meet_target
from adaptvit.checks import In, check_fields, quoted
from adaptvit.data import Batch, Data, Renormalise, filled
from adaptvit.files import as_json, check_output_folder, replacing, write_atomically
from adaptvit.macs import dense_macs, macs
from adaptvit.measure.evaluate import evaluate
from adaptvit.methods.gates import annealed
from adaptvit.methods.losses import distillation, over_processes
from adaptvit.model import AdaptiveViT, LogitsOnly
from adaptvit.process import as_found, serve
from adaptvit.seeds import begin_stream, stream
from adaptvit.terminal import shown, warn
from adaptvit.usage import Output
from adaptvit.weights.checkpoints import digest
from adaptvit.weights.tensorfiles import existing, read_torch, reason

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train."""

    epochs: Annotated[int, In("[1, inf)")]
    """Passes over the training split."""
    batch_size: Annotated[int, In("[1, inf)")] = 64
    """Images per step and process; the images left over at the end of an epoch are skipped."""
    accumulate: Annotated[int, In("[1, inf)")] = 1
    """Steps whose gradients are averaged into one update."""
    optimizer: str = "adamw"
    """A name of `timm.optim.list_optimizers()`."""
    learning_rate: Annotated[float, In("(0, inf)")] = 1e-3
    """Peak of the learning rate, after the warm-up; from there it falls along a cosine."""
    method_learning_rate: Annotated[float, In("(0, inf)")] = 1.0
    """Of the method's own parameters, over that of the ViT's."""
    warmup_learning_rate: Annotated[float, In("[0, inf)")] = 0.0
    """Where the warm-up begins."""
    least_learning_rate: Annotated[float | None, In("[0, inf)")] = None
    """Where the cosine ends; None is a hundredth of the peak."""
    weight_decay: Annotated[float, In("[0, inf)")] = 0.05
    """Weight decay of matrices; biases and norms have none."""
    warmup_epochs: Annotated[int, In("[0, inf)")] = 1
    """Epochs of linear warm-up, below `epochs`."""
    label_smoothing: Annotated[float, In("[0, 1)")] = 0.1
    """Share of the target spread over all classes, in [0, 1)."""
    mixup: Annotated[float, In("[0, 1000]")] = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: Annotated[float, In("[0, 1000]")] = 0.0
    """Alpha of cutmix; 0 is off. With both, each batch takes one of them at random."""
    clip_grad: Annotated[float | None, In("(0, inf)")] = 1.0
    """Largest norm of the gradient of an update; None does not clip."""
    ema_decay: Annotated[float | None, In("(0, 1)")] = None
    """Decay of the averaged weights, in (0, 1). They are what is evaluated, and what a finished run leaves in the
    model; None averages nothing."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the forward pass; weights, gradients and halting stay float32."""
    distillation: Literal["soft", "hard"] = "soft"
    """What a teacher teaches: its distribution, or its first choice."""
    distillation_weight: Annotated[float, In("[0, 1]")] = 0.5
    """Share of the teacher in the task's loss, in [0, 1]."""
    temperature: Annotated[float, In("[0.001, 1e6]")] = 1.0
    """Of soft distillation."""
    freeze: tuple[str, ...] = ()
    """Parameters of the ViT to leave as they are, by patterns of their names: patch_embed.*, blocks.0.*, pos_embed."""
    final_gate_temperature: Annotated[float | None, In("[0.001, 1e6]")] = None
    """Temperature of the method's gates at the end; it falls to that by equal factors. None keeps the method's."""
    target: Annotated[float | None, In("(0, 1]", "the share of the dense MACs")] = None
    """Share of the dense MACs in (0, 1] that the method's knob is steered to while training; None leaves the knob."""
    ease_epochs: Annotated[float, In("[0, inf)")] = 0.0
    """Epochs over which the target comes down from 1, so that pretrained features are not wrecked at the first step."""
    steer_every: Annotated[int, In("[1, inf)")] = 40
    """Updates between two settings of the knob, each on the images at hand."""
    evaluate_every: Annotated[int, In("[0, inf)")] = 1
    """Epochs between two evaluations of the test split, the last epoch's always included; 0 never evaluates."""
    tensorboard: bool = False
    """Also log to TensorBoard, in the run's folder."""
    seed: Annotated[int, In("[0, 4294967295]")] = 0
    """Decides the starting weights, and with the number of the epoch the order of the images and all that is drawn in
    training; seeds, epochs and processes share nothing of it."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.optimizer.lower().removeprefix("lookahead_") not in list_optimizers():
            raise ValueError(
                f"Recipe.optimizer must be a name of timm.optim.list_optimizers(), got {quoted(self.optimizer)}"
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"Recipe.warmup_epochs must lie in [0, epochs={self.epochs}), got {self.warmup_epochs}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(f"Recipe.batch_size must be even for mixup and cutmix, got {self.batch_size}")


@dataclass(frozen=True)
class Epoch:
    """One epoch, averaged over its training images: a line of the log."""

    epoch: int
    """Counted from 1."""
    loss: float
    """Loss of the task."""
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
    """Of the last update."""
    knob: float | None
    """The method's knob at the end; None where it has none."""
    unreadable: int
    """Training images that could not be decoded; another of the batch took the place of each."""
    test: dict[str, float | int | None] | None
    """What `evaluate` says of the test split after this epoch; None where it was not asked."""
    seconds: float
    """Duration."""


@as_found()
def train(
    model: AdaptiveViT,
    data: Data,
    recipe: Recipe,
    output: Path,
    name: str = "training",
    resume: bool = True,
    teacher: nn.Module | None = None,
    key: str | None = None,
) -> list[Epoch]:
    """Train in place and return what happened, epoch by epoch; finished epochs of the same run are not repeated.

    Writes `checkpoint-XXXXXXXX.pt` and `log-XXXXXXXX.jsonl` in `output` after every epoch, each whole or not at all.
    The checkpoint of the epoch before is kept as `previous-XXXXXXXX.pt`: a training whose last one is damaged goes on
    from there, and says so.
    Started by torchrun, every process takes its share of the images of each epoch. The process group stays for the next
    training in the same processes; all else that training changes of the process comes back as it was.

    Args:
        model: any adaptive model; a plain ViT trains as `FullConfig().build(vit)`. Its config ends with the knob
            steered to, where the recipe has a target.
        output: folder of the run, made if it is not there.
        name: what the progress bar calls it.
        resume: go on from a checkpoint of the same run; False refuses where there is one. One of another run is left
            as it is, with a warning.
        teacher: a model to distil from, giving (B, classes) logits. It sees the same augmented images, normalised as
            timm's record of it says, its `pretrained_cfg`; without one, as the model's own are. A method that learns
            from patches too (DynamicViT) needs a timm ViT of as many patches and channels.
        key: what the run is known by; None is the `fingerprint` of model, data and recipe.
    Raises:
        ChildProcessError: a process that decodes images died.
        FileExistsError: another training is writing to `output`, or there is a checkpoint and `resume` is False.
        FloatingPointError: the loss is not finite in one of the processes, and so in all of them; the checkpoint of the
            last finished epoch stays.
        TypeError: the method learns from a teacher's patches, and the teacher is no timm ViT.
        ValueError: the images are of another shape than the model or the teacher takes, the teacher has other classes,
            the training split is smaller than a batch or has one of which no image can be read, a pattern of
            `Recipe.freeze` names no parameter, or the recipe has a target and the method no knob.
    """
    AcceleratorState._reset_state()  # accelerate has one precision a process otherwise; `as_found` brings it back
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # or processes of torchrun would not find each other
        mixed_precision=PRECISIONS[recipe.precision],
        gradient_accumulation_steps=recipe.accumulate,
        log_with="tensorboard" if recipe.tensorboard else None,
        project_dir=output,
    )
    check_output_folder(output)
    output.mkdir(parents=True, exist_ok=True)
    with _only_run(output) if accelerator.is_main_process else nullcontext():
        return _Training(accelerator, model, data, recipe, output, name, teacher, key).run(resume)


@contextmanager
def _only_run(output: Path) -> Iterator[None]:
    lock = FileLock(output / ".lock")  # the system takes it back from a process that was killed
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(f"another training is writing to {str(output)!r}: choose another folder") from None
    try:
        yield
    finally:
        lock.release()


class _Training:
    """The state of one call of `train`."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: AdaptiveViT,
        data: Data,
        recipe: Recipe,
        output: Path,
        name: str,
        teacher: nn.Module | None,
        key: str | None,
    ) -> None:
        self.accelerator, self.model, self.data, self.recipe, self.name = accelerator, model, data, recipe, shown(name)
        self.output = output
        key = key or fingerprint(model, data, recipe, None if teacher is None else digest(teacher, None))
        self.checkpoint, self.log = output / f"checkpoint-{key}.pt", output / f"log-{key}.jsonl"
        self.previous = output / f"previous-{key}.pt"
        self.last: Path | None = None
        if recipe.target is not None and getattr(model.config, "knob", None) is None:
            raise ValueError(f"Recipe.target is {recipe.target}, but {type(model.config).__name__} has no knob")
        self.first_temperature = getattr(model.config, "temperature", None)
        if recipe.final_gate_temperature is not None and self.first_temperature is None:
            raise ValueError(
                f"Recipe.final_gate_temperature is {recipe.final_gate_temperature}, but {type(model.config).__name__} "
                "has no temperature"
            )
        if teacher is not None and model.learns_patches and not isinstance(teacher, VisionTransformer):
            raise TypeError(
                f"{type(model).__name__} learns from a teacher's patches, which {type(teacher).__name__} does not "
                "give: set token_weight to 0, or take a plain ViT"
            )
        check_shape(data, model.vit)
        self.teacher = None if teacher is None else teacher.to(accelerator.device).eval()
        self.renormalise: Renormalise | None = None
        if teacher is not None:
            self.renormalise = Renormalise(data.mean, data.std, teacher).to(accelerator.device)
            _check_teacher(teacher, data, len(self.renormalise.mean))
        freeze(model.vit, recipe.freeze)
        self.loader = self._loader()
        self.steps = len(self.loader) // recipe.accumulate * recipe.accumulate
        self.updates = self.steps // recipe.accumulate
        if not self.updates:
            raise ValueError(
                f"Recipe.batch_size is {recipe.batch_size}, more than the training images of {data.name} allow for"
            )
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mixup(
                recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=len(data.classes)
            )
        optimizer = create_optimizer_v2(
            model,
            recipe.optimizer,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            param_group_fn=None if recipe.method_learning_rate == 1 else partial(parameter_groups, recipe=recipe),
        )
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        least = recipe.learning_rate / 100 if recipe.least_learning_rate is None else recipe.least_learning_rate
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            num_epochs=recipe.epochs,
            warmup_epochs=recipe.warmup_epochs,
            warmup_lr=recipe.warmup_learning_rate,
            min_lr=least,
            step_on_epochs=False,
            updates_per_epoch=self.updates,
        )
        self.ema = None if recipe.ema_decay is None else ModelEmaV3(model, recipe.ema_decay)
        self.history: list[Epoch] = []
        self.unreadable: dict[str, str] = {}

    def run(self, resume: bool) -> list[Epoch]:
        if self.checkpoint.exists() or self.previous.exists():
            if not resume:
                raise FileExistsError(
                    f"{str(self.output)!r} holds a checkpoint of this very run: resume it, or choose another folder"
                )
            self._restore()
        elif resume and self.accelerator.is_main_process:
            self._tell_of_others()
        if self.recipe.tensorboard:
            self.accelerator.init_trackers("tensorboard")
        for number in range(len(self.history) + 1, self.recipe.epochs + 1):
            try:
                self.history.append(self._epoch(number))
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise ChildProcessError(
                    f"a process that decodes images died in epoch {number}; {self._kept()}"
                ) from error
            if self.accelerator.is_main_process:
                self._save()
            self.accelerator.log(_flat(self.history[-1]), step=number)
        for tracker in self.accelerator.trackers:  # its own `end_training` takes the process group down too
            tracker.finish()
        if self.recipe.final_gate_temperature is not None:
            self._cool(1.0)  # a finished run that is read back has taken no step
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())
        return self.history

    def _tell_of_others(self) -> None:
        """Say so where there is something to go on with, but not of this run."""
        others = sorted(path.name for path in self.output.glob("checkpoint-*.pt"))
        if others:
            warn(
                f"nothing in {str(self.output)!r} is of this very run, which begins afresh: {', '.join(others)} is of "
                "other settings, weights or images, or of another version of adaptvit",
                stacklevel=5,
            )

    def _loader(self) -> DataLoader:
        split, recipe, world = self.data.train, self.recipe, self.accelerator.num_processes
        sampler: Any = None
        if not isinstance(split, IterableDataset):
            place = {"num_replicas": world, "rank": self.accelerator.process_index}
            if self.data.repeats > 1:
                sampler = RepeatAugSampler(split, **place, num_repeats=self.data.repeats)
            else:
                sampler = DistributedSampler(split, **place, drop_last=True)
        return DataLoader(
            split,
            recipe.batch_size,
            sampler=sampler,
            num_workers=self.data.workers,
            collate_fn=filled,
            drop_last=True,
            worker_init_fn=serve,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _epoch(self, number: int) -> Epoch:
        recipe, accelerator = self.recipe, self.accelerator
        start = time.perf_counter()
        # all randomness of an epoch hangs on its number, so that resuming is exact
        begin_stream("epoch", recipe.seed, number, accelerator.process_index)
        for part in (self.loader.sampler, self.loader.dataset):  # the seed of either's order, which processes share
            if hasattr(part, "set_epoch"):
                part.set_epoch(stream("order", recipe.seed, number) % 2**31)
        self.wrapped.train()
        if self.teacher is not None:
            self.teacher.eval()
        tally = Tally(self.model)
        title, quiet = f"{self.name} {number}/{recipe.epochs}", not accelerator.is_local_main_process
        first = (number - 1) * self.steps
        with tqdm(total=self.steps, desc=title, disable=quiet) as bar:
            for step, batch in enumerate(self.loader, start=first):
                if step == first + self.steps:
                    break
                output, task = self._step(step, batch, number)
                tally.add(output, batch.labels, task, len(batch.unreadable))
                bar.update()
                bar.set_postfix_str(tally.line())
        test = None
        if recipe.evaluate_every and (number % recipe.evaluate_every == 0 or number == recipe.epochs):
            test = self._evaluate()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        return tally.epoch(number, learning_rate, time.perf_counter() - start, accelerator, test)

    def _step(self, step: int, batch: Batch, number: int) -> tuple[Output, Tensor]:
        """Forward, backward and, after every `Recipe.accumulate` steps, an update; steps count from 0 over the run."""
        recipe, accelerator = self.recipe, self.accelerator
        if not len(batch.labels):
            (name, why), *others = batch.unreadable
            raise ValueError(f"none of {1 + len(others)} images can be read, the first being {name!r}: {why}")
        images, labels = batch.images.to(accelerator.device), batch.labels.to(accelerator.device)
        self._report_unreadable(batch)
        update = step // recipe.accumulate
        if step % recipe.accumulate == 0:
            self.scheduler.step_update(update + 1)
            if recipe.target is not None and update % recipe.steer_every == 0:
                self._steer(images, update)
            if recipe.final_gate_temperature is not None:
                self._cool((update + 1) / (recipe.epochs * self.updates))
        with accelerator.accumulate(self.wrapped):
            output, task = self._forward(images, labels)
            loss = task + sum(output.terms.values())
            self._check_finite(loss, step, number)
            accelerator.backward(loss)
            if accelerator.sync_gradients and recipe.clip_grad is not None:
                accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.ema is not None and accelerator.sync_gradients:
            self.ema.update(self.model)
        return output, task

    def _check_finite(self, loss: Tensor, step: int, number: int) -> None:
        """Stop every process where the loss of any is not finite, rather than leave the others waiting for it."""
        accelerator = self.accelerator
        sound = loss.isfinite().float()
        if accelerator.num_processes > 1:
            sound = accelerator.reduce(sound, "mean")  # before the one wait for the device that there is anyway
        if sound == 1:
            return
        losses = accelerator.gather(loss.detach().float().reshape(1)).tolist()
        rank = next(rank for rank, one in enumerate(losses) if not math.isfinite(one))
        where = f", in process {rank}" if len(losses) > 1 else ""
        raise FloatingPointError(
            f"the loss is {losses[rank]} at step {step + 1}, in epoch {number}{where}: lower Recipe.learning_rate "
            f"({self.recipe.learning_rate:g}); {self._kept()}"
        )

    def _kept(self) -> str:
        """What a run that stops now leaves, in words."""
        epochs = len(self.history)
        return f"{epochs} finished epoch{'s' * (epochs != 1)} kept in {str(self.output)!r}"

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Output, Tensor]:
        recipe, targets = self.recipe, labels
        smoothing = recipe.label_smoothing
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
            smoothing = 0.0  # Mixup's targets are smooth already
        lesson, patches = (None, {}) if self.teacher is None else self._taught(images)
        output = self.wrapped(images, **patches)
        if output.means and self.accelerator.num_processes > 1:
            output = replace(output, terms=self.model.terms(over_processes(output.means)))
        logits = output.logits.float()
        task = cross_entropy(logits, targets, label_smoothing=smoothing)
        if lesson is not None:
            pupil = logits if output.distilled is None else output.distilled.float()
            taught = distillation(pupil, lesson.float(), recipe.distillation, recipe.temperature)
            task = (1 - recipe.distillation_weight) * task + recipe.distillation_weight * taught
        return output, task

    def _taught(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's logits, and its patches as the method's forward takes them, if it does."""
        teacher: Any = self.teacher
        assert self.renormalise is not None
        with torch.no_grad(), self.accelerator.autocast():
            images = self.renormalise(images)
            if self.model.learns_patches:
                check_images(teacher, images)
                features = teacher.forward_features(images)
                patches = {"teacher": features[:, prefix_tokens(teacher) :].float()}
                return teacher.forward_head(features), patches
            try:
                lesson = teacher(images)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a module of any kind: it cannot be asked before
                shape, fault = tuple(images.shape), str(error).splitlines()[0]
                raise ValueError(
                    f"the teacher, a {type(teacher).__name__}, fails on images of shape {shape}: {fault}"
                ) from error
        wanted = (len(images), len(self.data.classes))
        if not isinstance(lesson, Tensor) or lesson.shape != wanted:
            got = tuple(lesson.shape) if isinstance(lesson, Tensor) else type(lesson).__name__
            raise ValueError(f"the teacher, a {type(teacher).__name__}, gives {got}, not logits of shape {wanted}")
        return lesson, {}

    def _steer(self, images: Tensor, update: int) -> None:
        """Move the knob so that these images, in evaluation, cost what the target is by now."""
        recipe, model = self.recipe, self.model
        assert recipe.target is not None
        eased = recipe.ease_epochs * self.updates
        progress = min(1.0, update / eased) if eased else 1.0
        model.eval()
        config, fault = model.config, None
        try:
            with self.accelerator.autocast():
                config = meet_target(model, images, 1 - (1 - recipe.target) * progress, tolerance=0.02)
        except ValueError as error:  # a batch that cannot meet it: the next ones may
            fault = str(error)
        model.train()
        model.config, fault = broadcast_object_list([config, fault])  # the main process's, on all
        if fault is not None and self.accelerator.is_main_process:
            warn(f"the knob stays as it was at update {update + 1}: {fault}", stacklevel=2)

    def _cool(self, progress: float) -> None:
        """Set the temperature of the gates to what it is by now."""
        assert self.first_temperature is not None
        assert self.recipe.final_gate_temperature is not None
        temperature = annealed(self.first_temperature, self.recipe.final_gate_temperature, progress)
        self.model.config = replace(self.model.config, temperature=temperature)

    def _evaluate(self) -> dict[str, Any]:
        """The test split through what the run would leave, on every process alike."""
        model = self.model
        if self.ema is not None:
            model = self.ema.module
            model.config = self.model.config
        with self.accelerator.autocast():
            return evaluate(model, self.data.test, batch_size=self.recipe.batch_size, workers=self.data.workers).figures

    def _report_unreadable(self, batch: Batch) -> None:
        for name, why in batch.unreadable:
            if name not in self.unreadable:
                self.unreadable[name] = why
                told = f"training image {name!r} cannot be read, another took its place: {why}"
                warn(told, stacklevel=2, everywhere=True)

    def _save(self) -> None:
        """Write the checkpoint of the last epoch; the one before it is kept, under another name."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": [asdict(epoch) for epoch in self.history],
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }
        with replacing(self.checkpoint) as partial:
            try:
                torch.save(state, partial)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(
                    f"{str(self.checkpoint)!r} cannot be written (disk full?), the one before it stays: {reason(error)}"
                ) from error
            if self.last == self.checkpoint:  # or what is there is damaged, and the previous one better
                os.replace(self.checkpoint, self.previous)
        self.last = self.checkpoint
        self._write_log()

    def _write_log(self) -> None:
        write_atomically(self.log, "".join(as_json(asdict(epoch)) + "\n" for epoch in self.history))

    def _restore(self) -> None:
        """Go back to the last checkpoint, or to the one before it where that is damaged.

        Raises:
            ValueError: neither can be read; or the training was finished, which its last checkpoint alone can tell.
        """
        saved = self._read_checkpoints()
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(saved["ema"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{str(self.last)!r} does not fit this training: {reason(error)}") from error
        knob = getattr(self.model.config, "knob", None)
        if knob is not None and self.recipe.target is not None:
            self.model.config = replace(self.model.config, **{knob.field: self.history[-1].knob})
        if self.accelerator.is_main_process:
            self._write_log()  # it may have an epoch more, or one less where a process was killed before it wrote

    def _read_checkpoints(self) -> dict[str, Any]:
        device, faults = self.accelerator.device, []
        for path in (self.checkpoint, self.previous):
            if not path.exists():
                continue
            try:
                saved = read_checkpoint(path, device)
            except ValueError as error:
                faults.append(str(error))
                continue
            self.last, self.history = path, saved["history"]
            epochs = len(self.history)
            if faults and epochs + 1 == self.recipe.epochs:
                raise ValueError(
                    f"{faults[0]}; the training was finished, and its model is model.safetensors beside it: remove the "
                    f"damaged file to train epoch {epochs + 1} again from {path.name}"
                )
            if faults and self.accelerator.is_main_process:
                warn(f"{faults[0]}; going on from {path.name}, after epoch {epochs}", stacklevel=5)
            return saved
        raise ValueError(f"{'; '.join(faults)}: remove what is damaged to train from the start")


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a training resumes from, its checksums compared.

    torch's file is a zip archive, which has a checksum (CRC-32) of every tensor and of all that says what they are;
    torch itself does not compare them.

    Raises:
        ValueError: the file is damaged or something else.
    """
    try:
        with zipfile.ZipFile(existing(path)) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises BadZipFile, zlib's errors, and what wrong offsets make it stumble on
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{str(path)!r} is damaged: {reason(error)}") from error
    if damaged is not None:
        raise ValueError(f"{str(path)!r} is damaged: the checksum of {damaged} is wrong")
    saved = read_torch(path, device)
    try:
        history = [Epoch(**epoch) for epoch in saved["history"]]
    except (KeyError, TypeError):
        history = []
    if not history:
        raise ValueError(f"{str(path)!r} is no checkpoint of a training that this adaptvit can go on with")
    return saved | {"history": history}


def parameter_groups(model: AdaptiveViT, recipe: Recipe) -> list[dict[str, Any]]:
    """timm's groups with and without weight decay, the method's own parameters apart, at a learning rate of theirs."""
    own = {id(parameter) for name, parameter in model.named_parameters() if not name.startswith("vit.")}
    groups = []
    for group in param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay()):
        for is_own, scale in ((False, 1.0), (True, recipe.method_learning_rate)):
            parameters = [parameter for parameter in group["params"] if (id(parameter) in own) is is_own]
            if parameters:
                groups.append({**group, "params": parameters, "lr_scale": scale})
    return groups


def check_shape(data: Data, vit: VisionTransformer, channels: int | None = None) -> None:
    """Refuse data whose images a ViT does not take.

    Args:
        channels: that the images are turned to; None are those of the data.
    Raises:
        ValueError: naming both.
    """
    like = next(vit.parameters())
    try:
        check_images(vit, like.new_zeros(1, channels or data.channels, *to_2tuple(data.size)))
    except ValueError as error:
        raise ValueError(f"{data.name}: {error}") from None


def _check_teacher(teacher: nn.Module, data: Data, channels: int) -> None:
    """Refuse a ViT that takes other images, turned to so many channels, or has other classes.

    Raises:
        ValueError: naming both.
    """
    vit = teacher.model.vit if isinstance(teacher, LogitsOnly) else teacher
    if not isinstance(vit, VisionTransformer):
        return
    check_shape(data, vit, channels)
    if class_count(vit) != len(data.classes):
        raise ValueError(f"the teacher has {class_count(vit)} classes, but {data.name} has {len(data.classes)}")


def freeze(vit: nn.Module, patterns: tuple[str, ...]) -> None:
    """Leave the parameters whose names match as they are.

    Raises:
        ValueError: a pattern matches no parameter, or all are matched.
    """
    names = [name for name, _ in vit.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"Recipe.freeze has {pattern!r}, which no parameter matches; they are named like {names[0]!r}"
            )
    for name, parameter in vit.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in vit.parameters()):
        raise ValueError(f"Recipe.freeze leaves nothing to train: {', '.join(patterns)}")


def fingerprint(model: AdaptiveViT, data: Data, recipe: Recipe, more: object = None) -> str:
    """Eight hexadecimal digits of what decides a run: recipe, method, starting weights, data, and `more`."""
    return digest(model, (recipe, model.config, data.name, data.preparation, more))[:8]


def _flat(epoch: Epoch) -> dict[str, float]:
    """An epoch's numbers under TensorBoard's kind of names."""
    values = asdict(epoch)
    groups = {"test": values.pop("test") or {}, "terms": values.pop("terms"), "train": values}
    return {
        f"{group}/{name}": value
        for group, figures in groups.items()
        for name, value in figures.items()
        if value is not None
    }


class Tally:
    """Running sums over the images of an epoch, on this process; `epoch` adds up those of all."""

    def __init__(self, model: AdaptiveViT) -> None:
        self.model = model
        self.images = 0
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.depths = (model.shape.depth, 0)

    def add(self, output: Output, labels: Tensor, task: Tensor, unreadable: int) -> None:
        """Count a batch: its outputs, its (B,) labels, the mean loss of the task, images that could not be read."""
        usage, shape, images = output.usage, self.model.shape, len(labels)
        self.images += images
        self.sums["loss"] += images * task.item()
        self.sums["unreadable"] += unreadable
        self.sums["accuracy"] += (output.logits.argmax(dim=1).cpu() == labels.cpu()).sum().item()
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

    def epoch(
        self, number: int, learning_rate: float, seconds: float, accelerator: Accelerator, test: dict[str, Any] | None
    ) -> Epoch:
        """The means over the images of all processes."""
        sums = torch.tensor([self.images, *self.sums.values()], dtype=torch.float64, device=accelerator.device)
        images, *totals = accelerator.reduce(sums).tolist()
        depths = accelerator.gather(torch.tensor([self.depths], device=accelerator.device))
        means = {name: total / images for name, total in zip(self.sums, totals, strict=True)}
        tracked = "depth" in means
        config = self.model.config
        knob = getattr(config, "knob", None)
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
            knob=None if knob is None else getattr(config, knob.field),
            unreadable=round(means["unreadable"] * images),
            test=test,
            seconds=seconds,
        )
