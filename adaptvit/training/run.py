"""A training from start to end: open the data, start from weights, calibrate, train, set the knob, evaluate, save."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm
from torch import Tensor
from torch.utils.data import IterableDataset

from adaptvit.backbones.base import check
from adaptvit.backbones.segmenting import SegmentingViT
from adaptvit.backbones.video import inflate
from adaptvit.checks import In, check_fields
from adaptvit.data import (
    DataConfig,
    MasksConfig,
    open_data,
    open_masks,
    preparation,
    preparation_of_name,
    spread_over,
)
from adaptvit.extras import needed
from adaptvit.files import as_json, check_output_folder, write_atomically
from adaptvit.measure.evaluate import Result
from adaptvit.measure.segmentation import EVALUATIONS, PixelResult
from adaptvit.methods import MethodConfig, is_dense, turned
from adaptvit.model import AdaptiveViT
from adaptvit.process import as_found, best_device
from adaptvit.seeds import begin_stream
from adaptvit.terminal import meant, say
from adaptvit.training.loop import check_shape, fingerprint, train
from adaptvit.training.recipe import Epoch, Recipe
from adaptvit.weights.checkpoints import digest, save
from adaptvit.weights.names import method_of
from adaptvit.weights.opening import check_name, open_model, remade, start_from
from adaptvit.weights.places import is_stored

with needed("training"):
    from accelerate import PartialState  # type: ignore[import-untyped]

CALIBRATION = {"classes": 256, "pixels": 16}
CALIBRATION_CLIPS = 64
"""Training images that gate and knob are calibrated on, spread over the split; logits of pixels take much memory, and
clips much time."""
SQUASHED = {"crop_pct": 1.0, "crop_mode": "squash"}
"""How images with masks are prepared."""
PREPARED = ("interpolation", "crop_pct")
"""What the data may set of how images are prepared, beside mean and deviation."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Which model, which method, which images, how."""

    model: str = "vit_tiny_patch16_224"
    """Name of a timm ViT; or a file, folder or repository of a model, as other commands take it, whose weights are
    started from; a head of other classes and its method are left out."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Other arguments of `timm.create_model`."""
    img_size: Annotated[int | tuple[int, int] | None, In("[1, 65536]")] = None
    """Side of the input in pixels, or height and width; None is the model's own."""
    frames: Annotated[int | None, In("[1, 65536]")] = None
    """Frames of a clip, for which an image ViT is inflated with the weights that it starts from; None takes what the
    model takes."""
    tubelet: Annotated[int, In("[1, 65536]")] = 2
    """Then the frames of a patch."""
    drop_path: Annotated[float, In("[0, 1)")] = 0.0
    """Rate of stochastic depth at the last block; it grows from 0 at the first."""
    weights: Path | None = None
    """File, folder or repository of weights to start from; a head of other classes is left out. None starts afresh, or
    from what `model` or `pretrained` brings."""
    pretrained: bool = False
    """Start from the model's own weights, timm's being downloaded from the Hub."""
    teacher: str | None = None
    """A model to distil from, of the same classes: a timm name, file, folder or repository."""
    method: MethodConfig
    """The adaptive method."""
    fit: bool = False
    """Fit the method to the weights before training, at `target`: what it can find out from training images alone, such
    as A-ViT's gate, AdaViT's policies over patches, merging's thresholds."""
    data: DataConfig | MasksConfig
    """The images; with masks, a head is put on the ViT that tells the class of every pixel."""
    recipe: Recipe
    """How to train."""
    output: Path = Path("runs/train")
    """Folder of the results."""

    def __post_init__(self) -> None:
        check_fields(self)
        stored = is_stored(self.model)
        if not stored and not timm.is_model(self.model):
            raise ValueError(
                f"Run.model must be the name of a timm ViT, got {self.model!r}, which is no file or folder either"
                f"{meant(self.model, timm.list_models())}"
            )
        if not stored and (kind := method_of(self.model)) is not None:
            inside = kind.published.names[self.model.partition(".")[0]].inside
            raise ValueError(
                f"Run.model must be the name of a plain ViT, got {self.model!r}, a model of {kind.title}: take "
                f"{inside!r}, and the method {kind.method!r}"
            )
        if stored and self.weights is not None:
            raise ValueError(
                f"Run.model {self.model!r} brings its weights, and Run.weights is {str(self.weights)!r}: one of them, "
                "and null for Run.weights"
            )
        if self.weights is not None and self.pretrained:
            raise ValueError(f"Run.weights is {str(self.weights)!r} and Run.pretrained is true: one of them")
        if self.fit and self.target is None:
            raise ValueError("Run.fit needs a budget to fit to: set Recipe.target")
        if self.fit and self.method.knob is None:
            raise ValueError(f"Run.fit is for methods with a knob, which {self.method.method} has not")

    @property
    def target(self) -> float | None:
        """Share of the dense MACs to meet in the end: the recipe's, or what the method's own loss aims at."""
        return self.method.aim if self.recipe.target is None else self.recipe.target


@dataclass(frozen=True)
class RunOutcome:
    """What a run found and where it is."""

    model: AdaptiveViT
    """In evaluation mode, its knob set."""
    history: list[Epoch]
    """Epoch by epoch."""
    result: Result | PixelResult
    """Of the test split."""
    file: Path
    """The model."""


@as_found()
def train_run(
    config: Run,
    resume: bool = False,
    known_by: object = None,
    tell: Callable[[Any], object] | None = None,
) -> RunOutcome:
    """Train, and write `model.safetensors` and `result.json` beside the training's own files.

    Where there is a target, the knob is set once more after the last epoch, on training images prepared as test images
    are.

    Args:
        resume: go on from a checkpoint of the same run; False refuses where there is one.
        known_by: what else tells this run from others.
        tell: called by the main process with the result, before any of it is written.
    Raises:
        FileNotFoundError: no such data or weights.
        TypeError: the model is not a ViT that this library reproduces.
        ValueError: data, weights, teacher and recipe do not go together.
        And what `adaptvit.training.loop.train` raises.
    """
    check_output_folder(config.output)
    for name in (config.model, config.weights, config.teacher):
        if name is not None:
            check_name(name)
    device = _process().device  # the processes of torchrun find each other, before any opens a stream that they share
    size = {} if config.img_size is None else {"img_size": config.img_size}
    arguments = {**config.model_args, **size}
    origin = open_model(config.model, pixels=True) if is_stored(config.model) else None
    settings = preparation_of_name(config.model, arguments, None if origin is None else origin.vit)
    if config.frames is not None:
        settings["frames"] = config.frames
    if isinstance(config.data, MasksConfig):
        settings |= SQUASHED
        data = open_masks(config.data, settings)
    else:
        data = open_data(config.data, settings)
    for one in data.left_out:
        _tell(f"left out: {one}")
    if isinstance(data.calibration, IterableDataset) and config.target is not None:
        raise ValueError(
            f"{data.name} is a stream, of which no calibration images can be picked: no fitting and no target"
        )
    begin_stream("weights", config.recipe.seed)
    changed = {"num_classes": len(data.classes), "drop_path_rate": config.drop_path, **arguments}
    headed, source = True, config.weights or config.model
    vit: Any
    if origin is None:
        vit = timm.create_model(config.model, pretrained=config.pretrained, **changed)
    else:
        vit, headed = remade(origin.vit, **changed)
        if not is_dense(origin):
            _tell(f"the {origin.config.method} in {config.model} is left out: {config.method.method} begins anew")
    check(vit)
    if config.weights is not None:
        headed = start_from(vit, config.weights)
    if config.frames is not None:
        vit = inflate(vit, config.frames, config.tubelet)
    if data.task == "pixels" and not isinstance(vit, SegmentingViT):
        vit, headed = SegmentingViT(vit, len(data.classes)), False
    if (data.task == "pixels") != isinstance(vit, SegmentingViT):
        raise ValueError(f"{config.model} tells the class of every pixel, but {data.name} has one for each image")
    check_shape(data, vit)
    vit.pretrained_cfg = {
        **vit.pretrained_cfg,
        "mean": data.mean,
        "std": data.std,
        "label_names": tuple(data.classes),
        **{name: getattr(config.data, name, None) or settings[name] for name in PREPARED},
        **(SQUASHED if data.task == "pixels" else {}),
    }
    if not headed:
        _tell(f"the head in {source} is left out: {data.name} has {len(data.classes)} classes of its own")
    teacher: AdaptiveViT | None = None if config.teacher is None else open_model(config.teacher).float()
    if teacher is not None and teacher.num_classes != len(data.classes):
        raise ValueError(
            f"the teacher {config.teacher!r} has {teacher.num_classes} classes, but {data.name} has {len(data.classes)}"
        )
    method = config.method
    taught = None
    if teacher is not None:
        prepared = preparation(teacher, f"the teacher {config.teacher!r}")
        check_shape(data, teacher.vit, prepared["input_size"][0])
        taught = digest(teacher, (teacher.config, prepared["mean"], prepared["std"]))
    key = fingerprint(method.build(vit), data, config.recipe, (config.fit, taught, known_by))

    def calibration() -> Tensor:
        count = CALIBRATION[data.task] if data.frames is None else CALIBRATION_CLIPS
        return spread_over(data.calibration, count).images.to(device)

    if config.fit:
        assert config.target is not None
        model = method.fitted(vit.to(device), calibration(), config.target)
        _tell(f"{method.title} fitted to {config.target:.0%} of the MACs of images prepared as test images are")
    else:
        model = method.build(vit).to(device)
    lessons = None
    if teacher is not None:
        lessons = teacher.vit if is_dense(teacher) and model.learns_patches else teacher
    model.train()
    history = train(
        model,
        data,
        config.recipe,
        config.output,
        method.method,
        resume,
        lessons,
        key,
    )
    model.eval()
    if config.target is not None:
        turned(model, calibration(), config.target)
    measure = EVALUATIONS[data.task]
    result = measure(model, data.test, batch_size=config.recipe.batch_size, workers=data.workers, shared=True)
    file = config.output / "model.safetensors"
    if is_main():
        if tell is not None:
            tell(result)
        save(model, file)
        write_atomically(config.output / "result.json", as_json(result.figures, indent=2) + "\n")
    return RunOutcome(model, history, result, file)


def is_main() -> bool:
    """Whether this is the process that speaks and writes for all that train."""
    return _process().is_main_process


def _process() -> PartialState:
    return PartialState(cpu=best_device() == "cpu")


def _tell(words: str) -> None:
    """Once, however many processes train."""
    if is_main():
        say(words)
