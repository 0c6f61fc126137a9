"""`adaptvit adapt`: a model that meets a budget, untrained."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

from jsonargparse import ArgumentParser, Namespace

from adaptvit.adapt import adapt
from adaptvit.budget import Trial, Unit, check_target
from adaptvit.checks import In, OneOf, check_device, checked
from adaptvit.commands.console import add_json, check_json, tell_json
from adaptvit.data import (
    Clips,
    DataConfig,
    Samples,
    check_sources,
    class_names,
    first_of,
    open_split,
    preparation,
    spread_over,
)
from adaptvit.files import check_output
from adaptvit.methods import METHODS, MethodConfig, is_dense, turned, untrained
from adaptvit.process import as_found, best_device
from adaptvit.terminal import say, warn
from adaptvit.weights.checkpoints import save
from adaptvit.weights.opening import check_method, method_told, open_model


@checked
@as_found()
def set_budget(
    model: str,
    folder: Path,
    output: Path,
    target: float | None = None,
    unit: Unit = "share",
    method: Annotated[str | None, OneOf(partial(untrained, clips=True, many=True))] = None,
    images: Annotated[int, In("[1, inf)")] = 256,
    tell: Callable[[Trial], object] | None = None,
    device: str | None = None,
    strip: Annotated[int | None, In("[1, 65536]")] = None,
) -> MethodConfig:
    """Make a model meet a budget without training it: a plain ViT is made adaptive, an adaptive one has its knob moved.

    Args:
        model: a file, folder, repository or timm name of a ViT.
        folder: images of the kind it will see, in folders or not.
        output: the file to write.
        target: met within 1 %, images per second within 3 %; None is half of the dense MACs.
        unit: `share` of the dense MACs, `gmacs` an image, or `images_per_s` on this machine.
        method: what a plain ViT becomes, `calibrated` by default; what it can find out from the images is fitted.
        images: how many of them to look at.
        tell: called with each trial; its accuracy is known where the folder has as many classes as the model.
        device: where to run: cpu or cuda; None is cuda where there is one.
        strip: for a model that takes clips: frames of a picture that shows all of a clip, one below another; None takes
            videos and folders of frames.
    Returns:
        The config written.
    Raises:
        FileNotFoundError: no such model, folder, or folder of `output`.
        TypeError: the method cannot run on this ViT.
        ValueError: a method for a model that has another, no readable images, or a target
            that cannot be met.
    """
    if target is None and unit != "share":
        raise ValueError(f"unit {unit!r} needs a target")
    target = 0.5 if target is None else target
    check_target(target, unit)
    check_output(output)
    device = best_device() if device is None else device
    check_device("device", device)
    source = DataConfig(root=folder, strip=strip)
    check_sources(source, "train")
    check_method(model, method_told(model), method)
    opened = open_model(model).to(device)
    check_method(model, opened.config, method)
    split = open_split(source, preparation(opened, model), "train")
    for one in split.left_out if isinstance(split, Samples | Clips) else ():
        warn(f"left out in {str(folder)!r} are {one}", stacklevel=2)
    batch = spread_over(split, images)
    if batch.unreadable:
        kind = batch.unreadable[0].kind
        warn(f"{len(batch.unreadable)} {kind} cannot be read{first_of(batch.unreadable)}", stacklevel=2)
    labels = batch.labels.to(device) if len(class_names(split)) == opened.num_classes else None
    looked_at = batch.images.to(next(opened.parameters()))
    tolerance = 0.03 if unit == "images_per_s" else 0.01  # the clock repeats no better
    if is_dense(opened):
        chosen = None if method is None else METHODS[method]()
        opened = adapt(opened.vit, looked_at, target, chosen, unit, tolerance, labels, tell)
    else:
        turned(opened, looked_at, target, unit=unit, tolerance=tolerance, labels=labels, tell=tell)
    try:
        save(opened, output)
    except OSError as error:
        knob = opened.config.knob
        found = f"{knob.field} {getattr(opened.config, knob.field):g} meets the target"
        raise OSError(error.errno, f"{error.strerror or error}; {found}") from error
    return opened.config


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit adapt MODEL FOLDER OUTPUT`."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Make a model meet a budget without training: a plain ViT becomes adaptive, else the knob moves.",
    )
    parser.add_function_arguments(set_budget, as_positional=True, skip={"tell"})
    add_json(parser)
    return parser


def execute(arguments: Namespace) -> None:
    """Print each trial, and what was written."""

    told = arguments.as_dict()
    where = told.pop("json")
    check_json(where)
    trials: list[Trial] = []

    def tell(trial: Trial) -> None:
        trials.append(trial)
        top1 = "" if trial.top1 is None else f", top-1 {trial.top1:.1%}"
        cost = f"{_with_error(trial)} of the MACs, {trial.gmacs:.3f} GMACs, {trial.images_per_s:.0f} images/s"
        say(f"knob at {trial.knob:8.4g}: {cost}{top1}")

    config = set_budget(**told, tell=tell)
    assert config.knob is not None  # or there would have been nothing to move
    value = getattr(config, config.knob.field)
    found = next((trial for trial in reversed(trials) if trial.knob == value), None)
    cost = "" if found is None else f", {_with_error(found)} of the MACs"
    say(f"{arguments.output}: {config.knob.field} {value:g}{cost}")
    met = {} if found is None else asdict(found)
    named = {"file": str(arguments.output), "method": config.method, "field": config.knob.field, "knob": value}
    tell_json(where, {**met, **named})


def _with_error(trial: Trial) -> str:
    """The share of the MACs, and how far off it is to be expected on other images."""
    return f"{trial.share:.1%}" + (f" ± {trial.share_error:.1%}" if trial.share_error else "")
