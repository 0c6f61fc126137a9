"""Training: accelerate around a plain loop, one checkpoint and one log line per epoch, resumed where it stopped.

A run is known by what decides its outcome: recipe, method, starting weights and data. Its files carry eight digits of
that fingerprint, so that a changed recipe starts afresh beside the old run instead of over it.
"""

import fnmatch
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from timm.data import Mixup
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from adaptvit.backbones.base import check_images, class_count, family_of, prefix_tokens
from adaptvit.backbones.families import FAMILIES, find
from adaptvit.budget import Trial, attempt, meet_target
from adaptvit.data import Batch, Data, Renormalise
from adaptvit.extras import MissingLibrary, needed
from adaptvit.files import check_output_folder
from adaptvit.measure.segmentation import EVALUATIONS
from adaptvit.methods.gates import annealed
from adaptvit.methods.losses import distillation, over_processes
from adaptvit.model import AdaptiveViT
from adaptvit.process import as_found, best_device, fault, from_all, pins, stopped_later
from adaptvit.seeds import begin_stream, stream
from adaptvit.terminal import progress_bar, shown, warn
from adaptvit.tokens import Dense, Masked, Tokens
from adaptvit.training.loader import end, training_loader
from adaptvit.training.products import Products
from adaptvit.training.recipe import Epoch, Recipe
from adaptvit.training.resuming import Checkpoints
from adaptvit.training.tally import READ_EVERY, Tally
from adaptvit.usage import Output
from adaptvit.weights.checkpoints import digest
from adaptvit.weights.tensorfiles import reason

with needed("training"):
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
    from accelerate.utils import gather_object, is_tensorboard_available  # type: ignore[import-untyped]

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


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
    Within one, where the recipe says how often, `part-XXXXXXXX.pt`: a run of as many processes goes on at that step.
    The checkpoint of the epoch before is kept as `previous-XXXXXXXX.pt`: a training whose last one is damaged goes on
    from there, and says so.
    Started by torchrun, every process takes its share of the images of each epoch. The process group stays for the next
    training in the same processes; all else that training changes of the process comes back as it was.

    Args:
        model: any adaptive model; a plain ViT trains as `FullConfig().build(vit)`. Its config ends with the knob
            steered to, where the recipe has a target, and its dial is gone, which other weights were measured for.
        output: folder of the run, made if it is not there.
        name: what the progress bar calls it.
        resume: go on from a checkpoint of the same run; False refuses where there is one. One of another run is left
            as it is, with a warning.
        teacher: a model to distil from, giving (B, classes) logits. It sees the same augmented images, normalised as
            timm's record of it says, its `pretrained_cfg`; without one, as the model's own are. A method that learns
            from patches too (DynamicViT) needs a timm ViT of as many patches and channels.
        key: what the run is known by; None is the `fingerprint` of model, data and recipe.
    Raises:
        ChildProcessError: a process that decodes images died, or another process of the training failed or was stopped.
        FileExistsError: another training is writing to `output`, or there is a checkpoint and `resume` is False.
        FloatingPointError: the loss is not finite in one of the processes, and so in all of them; the checkpoint of the
            last finished epoch stays. It is seen some steps later, since each look waits for the device: by then the
            weights in `model` are spoilt.
        TypeError: the method learns from a teacher's patches, and the teacher is no timm ViT.
        ValueError: the images are of another shape than the model or the teacher takes, the teacher has other classes,
            the training split is smaller than a batch, has one of which no image can be read, or is a stream that
            several processes cannot share, a pattern of `Recipe.freeze` names no parameter, or the recipe has a target
            and the method no knob.
        MissingLibrary: the recipe asks for TensorBoard, which is not there.
    """
    if recipe.tensorboard and not is_tensorboard_available():
        raise MissingLibrary("Recipe.tensorboard", "tensorboard")
    AcceleratorState._reset_state()  # accelerate has one precision a process otherwise; `as_found` brings it back
    accelerator = Accelerator(
        cpu=best_device() == "cpu",  # or processes of torchrun would not find each other
        mixed_precision=PRECISIONS[recipe.precision],
        gradient_accumulation_steps=recipe.accumulate,
        log_with="tensorboard" if recipe.tensorboard else None,
        project_dir=output,
    )
    with ExitStack() as held:

        def own() -> None:
            check_output_folder(output)
            output.mkdir(parents=True, exist_ok=True)
            if accelerator.is_main_process:
                held.enter_context(_only_run(output))

        from_all(own)
        training = _Training(accelerator, model, data, recipe, output, name, teacher, key)
        try:
            return training.run(resume)
        finally:
            training.failure = None  # whose frames know the processes that decode
            end(training.loader)


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
        self.checkpoints = Checkpoints(output, key)
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
        self.loader = training_loader(data, recipe.batch_size, pins(accelerator.device))
        self.steps = len(self.loader) // recipe.accumulate * recipe.accumulate
        self.updates = self.steps // recipe.accumulate
        if not self.updates:
            raise ValueError(
                f"Recipe.batch_size is {recipe.batch_size}, more than the training set of {data.name} allows for"
            )
        self.mixup = None
        if (recipe.mixup or recipe.cutmix or teacher is not None) and data.task == "pixels":
            raise ValueError(f"{data.name} has labels of pixels: no mixup, no cutmix, no teacher")
        if recipe.cutmix and data.frames is not None:
            raise ValueError(f"Recipe.cutmix is {recipe.cutmix:g}, but {data.name} has clips, which mixup alone mixes")
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mixup(
                recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=len(data.classes)
            )
        optimizer = create_optimizer_v2(
            model,
            recipe.optimizer,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            param_group_fn=partial(parameter_groups, recipe=recipe)
            if (recipe.method_learning_rate, recipe.head_learning_rate) != (1, 1)
            else None,
        )
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.called: Any = torch.compile(self.wrapped) if recipe.compile else self.wrapped
        half = accelerator.device.type == "cpu" and recipe.precision == "bfloat16"
        # a compiled one has its own; what is run again for its gradients is run outside of this
        self.by_products = half and not (recipe.compile or model.checkpoints)
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
        self.failure: BaseException | None = None
        self.unreadable: dict[str, str] = {}
        self.part: dict[str, Any] | None = None  # of the next epoch, what was counted before

    def run(self, resume: bool) -> list[Epoch]:
        if self.checkpoints.are_there:
            if not resume:
                raise FileExistsError(
                    f"{str(self.output)!r} holds a checkpoint of this very run: resume it, or choose another folder"
                )
            from_all(self._restore)
        elif resume and self.accelerator.is_main_process:
            self.checkpoints.tell_of_others()
        if self.recipe.tensorboard:
            from_all(partial(self.accelerator.init_trackers, "tensorboard"))
        for number in range(len(self.history) + 1, self.recipe.epochs + 1):
            try:
                self.history.append(self._epoch(number))
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise ChildProcessError(
                    f"a process that decodes images died in epoch {number}; {self._kept()}"
                ) from error
            from_all(self._write)
        for tracker in self.accelerator.trackers:  # its own `end_training` takes the process group down too
            tracker.finish()
        if self.recipe.final_gate_temperature is not None:
            self._cool(1.0)  # a finished run that is read back has taken no step
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())
        return self.history

    def _epoch(self, number: int) -> Epoch:
        recipe, accelerator = self.recipe, self.accelerator
        start = time.perf_counter()
        # all randomness of an epoch hangs on its number, so that resuming is exact
        begin_stream("epoch", recipe.seed, number, accelerator.process_index)
        if self.loader.generator is not None:
            self.loader.generator.manual_seed(stream("workers", recipe.seed, number, accelerator.process_index))
        for part in (self.loader.sampler, self.loader.dataset):  # the seed of either's order, which processes share
            if hasattr(part, "set_epoch"):
                part.set_epoch(stream("order", recipe.seed, number) % 2**31)
        self.wrapped.train()
        if self.teacher is not None:
            self.teacher.eval()
        tally, batches = Tally(self.model, accelerator), self._batches()
        if self.part is not None:
            tally.go_on(self.part)
            for _ in progress_bar(range(tally.steps), "passing over what was seen", unit="batch"):
                self._batch(batches)
            self._begin_part(number, tally)
            self.part = None
        title, quiet = f"{self.name} {number}/{recipe.epochs}", not accelerator.is_local_main_process
        alone = accelerator.num_processes == 1
        with (
            progress_bar(words=title, total=self.steps, initial=tally.steps, stays=True, shown=not quiet) as bar,
            nullcontext() if alone else stopped_later() as stop,
        ):
            for step in range((number - 1) * self.steps + tally.steps, number * self.steps):
                batch = self._batch(batches)
                if tally.losses and self._steers(step):
                    self._read(tally, number, stop)  # what a spoilt model costs says nothing
                output, task, loss = self._step(step, batch)
                tally.add(output, batch.labels, task, loss, len(batch.unreadable))
                parts = self._parts(tally)
                if tally.steps % READ_EVERY == 0 or tally.steps == self.steps or parts:
                    self._read(tally, number, stop)
                    bar.update(tally.steps - bar.n)
                    bar.set_postfix_str(tally.line())
                if parts:
                    kept = tally.kept()
                    from_all(partial(self._write_part, kept))
                    self._begin_part(number, tally)
        test = None
        if recipe.evaluate_every and (number % recipe.evaluate_every == 0 or number == recipe.epochs):
            test = self._evaluate()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        return tally.epoch(number, learning_rate, time.perf_counter() - start, test)

    def _parts(self, tally: Tally) -> bool:
        """Whether a checkpoint within the epoch is written after a step."""
        every = self.recipe.checkpoint_every
        return every is not None and tally.steps < self.steps and tally.steps % (every * self.recipe.accumulate) == 0

    def _begin_part(self, number: int, tally: Tally) -> None:
        """What is drawn after a checkpoint within an epoch hangs on its place, so that resuming is exact."""
        begin_stream("part", self.recipe.seed, number, tally.steps, self.accelerator.process_index)

    def _batches(self) -> Iterator[Batch]:
        """As many batches as an epoch has steps, so that processes take as many: a stream that ends begins again.

        Raises:
            ValueError: no image of a batch can be read, or the stream gives no whole batch.
        """
        while True:
            batch = None
            for batch in self.loader:
                if not len(batch.labels):
                    (name, why), *others = batch.unreadable
                    raise ValueError(f"none of {1 + len(others)} images can be read, the first being {name!r}: {why}")
                yield batch
            if batch is None:
                raise ValueError(
                    f"{self.data.name} gives no whole batch of {self.recipe.batch_size} training images, of which each "
                    "process that decodes fills its own"
                )

    def _batch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, on the device; blank images in a process that has failed."""
        device = self.accelerator.device
        if self.failure is None:
            with self._until_read():
                batch = next(batches)
                self._report_unreadable(batch)
                return batch._replace(
                    images=batch.images.to(device, non_blocking=True), labels=batch.labels.to(device, non_blocking=True)
                )
        count = self.recipe.batch_size
        images = next(self.model.parameters()).new_zeros(count, *self.data.shape)
        shape = (count,) if self.data.task == "classes" else (count, *self.data.shape[-2:])
        return Batch(images, torch.zeros(shape, dtype=torch.long, device=device), [])

    @contextmanager
    def _until_read(self) -> Iterator[None]:
        """Keep what one of several processes fails with; the others, which wait for it, learn of it when all read."""
        try:
            yield
        except Exception as error:
            if self.accelerator.num_processes == 1:
                raise
            self.failure = self.failure or error

    def _steers(self, step: int) -> bool:
        """Whether the knob is set before a step."""
        update, between = divmod(step, self.recipe.accumulate)
        return self.recipe.target is not None and not between and update % self.recipe.steer_every == 0

    def _step(self, step: int, batch: Batch) -> tuple[Output, Tensor, Tensor]:
        """Forward, backward and, after every `Recipe.accumulate` steps, an update; steps count from 0 over the run.

        Returns:
            What the model says, the loss of the task, and the loss.
        """
        recipe, accelerator = self.recipe, self.accelerator
        update = step // recipe.accumulate
        if step % recipe.accumulate == 0:
            self.scheduler.step_update(update + 1)
            if self._steers(step):
                self._steer(batch.images, update)
            if recipe.final_gate_temperature is not None:
                self._cool((update + 1) / (recipe.epochs * self.updates))
        with accelerator.accumulate(self.wrapped):
            output, task = self._forward(batch.images, batch.labels)
            loss = task + sum(output.terms.values())
            accelerator.backward(loss)
            with self._until_read():
                if accelerator.sync_gradients and recipe.clip_grad is not None:
                    accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.ema is not None and accelerator.sync_gradients:
            with self._until_read():
                self.ema.update(self.model)
        return output, task, loss

    def _read(self, tally: Tally, number: int, stop: Callable[[], None] | None) -> None:
        """Read the tally; stop every process where the loss of any is not finite, or any has failed.

        Raises:
            ChildProcessError: another process failed.
            FloatingPointError: a loss is not finite.
            What this process failed with, or `stop` raises.
        """
        if stop is not None and self.failure is None:
            try:
                stop()
            except BaseException as error:
                self.failure = error
        if tally.read(self.failure is not None):
            return
        for rank, why in enumerate(gather_object([self.failure and fault(self.failure)])):
            if why is not None:
                raise self.failure or ChildProcessError(f"process {rank} failed, and all stop: {why}; {self._kept()}")
        losses = self.accelerator.gather(torch.stack(tally.losses).float()[None]).cpu()
        place, rank = (~losses.isfinite()).T.nonzero()[0].tolist()  # the first step that any has spoilt
        where = f", in process {rank}" if len(losses) > 1 else ""
        step = (number - 1) * self.steps + tally.steps - len(tally.losses) + place
        raise FloatingPointError(
            f"the loss is {losses[rank, place]} at step {step + 1}, in epoch {number}{where}: lower "
            f"Recipe.learning_rate ({self.recipe.learning_rate:g}); {self._kept()}"
        )

    def _kept(self) -> str:
        """What a run that stops now leaves, in words."""
        epochs = len(self.history)
        return f"{epochs} finished epoch{'s' * (epochs != 1)} kept in {str(self.output)!r}"

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Output, Tensor]:
        recipe, targets = self.recipe, labels
        smoothing = recipe.label_smoothing
        if self.mixup is not None:
            with self._until_read():
                images, targets = self.mixup(images, labels)
                smoothing = 0.0  # Mixup's targets are smooth already
        lesson, patches = (None, {}) if self.teacher is None else self._taught(images)
        layout: type[Tokens] | None = None
        if recipe.compile:  # what is packed is no graph
            layout = Dense if self.model.even else Masked
        with Products() if self.by_products else nullcontext():
            output = self._output(images, layout, patches)
        if output.means and self.accelerator.num_processes > 1:
            output = replace(output, terms=self.model.terms(over_processes(output.means)))
        logits = output.logits.float()
        task = 0 * logits.mean()  # of a process in which the loss fails
        with self._until_read():
            task = cross_entropy(logits, targets, label_smoothing=smoothing)
            if lesson is not None:
                pupil = logits if output.distilled is None else output.distilled.float()
                taught = distillation(pupil, lesson.float(), recipe.distillation, recipe.temperature)
                task = (1 - recipe.distillation_weight) * task + recipe.distillation_weight * taught
        return output, task

    def _output(self, images: Tensor, layout: type[Tokens] | None, patches: dict[str, Tensor]) -> Output:
        """What the model says; of several processes one in which it fails says what it would of blank images.

        The others, which wait for its gradients, learn of it at the next reading. Where it fails on those too, they end
        when this process has.
        """
        try:
            output: Output = self.called(images, layout, detailed=True, **patches)
        except Exception as error:
            if self.accelerator.num_processes == 1 or self.failure is not None:
                raise
            self.failure = error
            if isinstance(self.wrapped, DistributedDataParallel):
                self.wrapped.require_forward_param_sync = False  # of buffers, which was done in the call that failed
            output = self.called(torch.zeros_like(images), layout, detailed=True, **patches)
        return output

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
        trials: list[Trial] = []
        model.eval()
        try:
            with self.accelerator.autocast():
                target = 1 - (1 - recipe.target) * progress
                meet_target(model, images, target, tolerance=0.02, tell=trials.append, measure=_together)
        except ValueError as error:  # a batch that cannot meet it: the next ones may
            if self.accelerator.is_main_process:
                warn(f"the knob stays as it was at update {update + 1}: {error}", stacklevel=2)
        model.train()
        if recipe.compile and len(trials) > 1:
            torch.compiler.reset()  # the graph of the value before, which would count towards torch's limit of them

    def _cool(self, progress: float) -> None:
        """Set the temperature of the gates to what it is by now."""
        assert self.first_temperature is not None
        assert self.recipe.final_gate_temperature is not None
        temperature = annealed(self.first_temperature, self.recipe.final_gate_temperature, progress)
        self.model.config = replace(self.model.config, temperature=temperature)

    def _evaluate(self) -> dict[str, Any]:
        """The test split through what the run would leave, of which each process takes a share."""
        model = self.model
        if self.ema is not None:
            model = self.ema.module
            model.config = self.model.config
        with self.accelerator.autocast():
            batch_size, workers = self.recipe.batch_size, self.data.workers
            measure = EVALUATIONS[self.data.task]
            return measure(model, self.data.test, batch_size=batch_size, workers=workers, shared=True).figures

    def _report_unreadable(self, batch: Batch) -> None:
        for name, why in batch.unreadable:
            if name not in self.unreadable:
                self.unreadable[name] = why
                told = f"training image {name!r} cannot be read, another took its place: {why}"
                warn(told, stacklevel=2, everywhere=True)

    def _write(self) -> None:
        if self.accelerator.is_main_process:
            self.checkpoints.write(self._state(), self.history)
        self.accelerator.log(_flat(self.history[-1]), step=len(self.history))

    def _write_part(self, kept: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            knob = getattr(self.model.config, "knob", None)
            value = None if knob is None else getattr(self.model.config, knob.field)
            part = {"tally": kept, "knob": value, "readers": self._readers()}
            self.checkpoints.write_part(self._state() | part, self.history)

    def _readers(self) -> list[int]:
        return [self.accelerator.num_processes, self.data.workers]

    def _state(self) -> dict[str, Any]:
        """What a checkpoint has beside the history."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }

    def _restore(self) -> None:
        """Go back to the last checkpoint that can be read, as `Checkpoints.read` and `read_part` say."""
        tells = self.accelerator.is_main_process
        whole = self.checkpoints.read(self.recipe.epochs, tells)
        done = 0 if whole is None else len(whole["history"])
        part = self.checkpoints.read_part(done, self._readers(), tells)
        saved = part or whole
        if saved is None:
            return
        self.history, self.part = saved["history"], part and part["tally"]
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(saved["ema"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            path = self.checkpoints.last if part is None else self.checkpoints.part
            raise ValueError(f"{str(path)!r} does not fit this training: {reason(error)}") from error
        knob = getattr(self.model.config, "knob", None)
        if knob is not None and self.recipe.target is not None:
            value = self.history[-1].knob if part is None else part["knob"]
            self.model.config = replace(self.model.config, **{knob.field: value})
        if tells:
            # it may have an epoch more, or one less where a process was killed before it wrote
            self.checkpoints.write_log(self.history)


def _together(model: AdaptiveViT, images: Tensor, labels: Tensor | None) -> Trial:
    """A trial on the images of all processes, as many in each: the same for all."""

    def own() -> Trial | str:
        try:
            return attempt(model, images, labels)
        except ValueError as error:
            return str(error)

    told = from_all(own)
    trials = [trial for trial in told if not isinstance(trial, str)]
    if len(trials) < len(told):
        raise ValueError(next(trial for trial in told if isinstance(trial, str)))
    return replace(trials[0], share=sum(trial.share for trial in trials) / len(trials))


def parameter_groups(model: AdaptiveViT, recipe: Recipe) -> list[dict[str, Any]]:
    """timm's groups with and without weight decay; the method's own parameters and the head's at rates of theirs."""
    scales = {
        id(parameter): recipe.method_learning_rate
        for name, parameter in model.named_parameters()
        if not name.startswith("vit.")
    }
    family = family_of(model.vit)
    for name in (*family.heads, family.map_head):
        if (head := find(model.vit, name)) is not None:
            scales |= {id(parameter): recipe.head_learning_rate for parameter in head.parameters()}
    groups = []
    for group in param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=model.no_weight_decay()):
        for scale in dict.fromkeys((1.0, recipe.method_learning_rate, recipe.head_learning_rate)):
            parameters = [one for one in group["params"] if scales.get(id(one), 1.0) == scale]
            if parameters:
                groups.append({**group, "params": parameters, "lr_scale": scale})
    return groups


def check_shape(data: Data, vit: nn.Module, channels: int | None = None) -> None:
    """Refuse data whose images a ViT does not take.

    Args:
        channels: that the images are turned to; None are those of the data.
    Raises:
        ValueError: naming both.
    """
    like = next(vit.parameters())
    try:
        check_images(vit, like.new_zeros(1, *replace(data, channels=channels or data.channels).shape))
    except ValueError as error:
        raise ValueError(f"{data.name}: {error}") from None


def _check_teacher(teacher: nn.Module, data: Data, channels: int) -> None:
    """Refuse a ViT that takes other images, turned to so many channels, or has other classes.

    Raises:
        ValueError: naming both.
    """
    vit = teacher.vit if isinstance(teacher, AdaptiveViT) else teacher
    if FAMILIES.of(vit) is None:
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
