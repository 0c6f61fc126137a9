"""`adaptvit export`: a model as a file that runs without this library."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from jsonargparse import ArgumentParser, Namespace

from adaptvit.backbones.base import input_size
from adaptvit.budget import check_target, measure_plan, meet_target
from adaptvit.checks import In, OneOf, checked
from adaptvit.commands.console import add_json, check_json, tell_json
from adaptvit.data import first_of, list_folder, open_pictures, preparation, read_names, spread_over
from adaptvit.export import DTYPES, Exported, Format, check_exportable, check_format, check_names, export
from adaptvit.methods import METHODS, MethodConfig, is_dense, untrained
from adaptvit.terminal import say, warn
from adaptvit.tokens import Dense, Masked, Slab, Tokens
from adaptvit.weights.opening import check_method, classes_told, method_told, open_model


@checked
def export_model(
    model: str,
    output: Path,
    format: Format = "onnx",
    target: float | None = None,
    method: Annotated[str | None, OneOf(partial(untrained, many=True))] = None,
    batch: Annotated[Literal["dynamic"] | int, In("[1, inf)")] = "dynamic",
    dtype: Annotated[str, OneOf(DTYPES)] = "float32",
    layout: Literal["dense", "slab", "masked"] = "dense",
    data: Path | None = None,
    images: Annotated[int, In("[1, inf)")] = 32,
    class_names: Path | None = None,
    tell: Callable[[str], object] | None = None,
) -> Exported:
    """Write a model as a file that runs without this library; it is run, and compared with the model.

    Args:
        model: a file, folder, repository or timm name of a ViT.
        output: the file to write, which ends in .onnx or .pt2, as its format does.
        format: onnx, torch for `torch.export.load`, or aoti, compiled for machines like this one.
        target: share of the dense MACs that the method's knob is moved to, in (0, 1]; None leaves it.
        method: what a plain ViT becomes, such as `tome`; None leaves it as it is.
        batch: images that the file takes at once: dynamic, or this many.
        dtype: float32 or float16, of weights and features; images and logits are float32.
        layout: dense, of a method that keeps what each image needs with batch 1; slab, of such a one with a larger
            batch, whose rows are planned by images of `data`; or masked, which takes any and saves nothing.
        data: folder of images that file and model are compared on; None takes noise.
        images: how many of them.
        class_names: file with the name of a class on each line, in the order of the model's.
        tell: called with what is done next.
    Raises:
        FileNotFoundError: no such model, folder, or folder of `output`.
        MissingLibrary: a library of the extra `onnx` is not there.
        ValueError: what cannot be exported, a target that cannot be met, or a file that has other logits.
    """
    layouts: dict[str, type[Tokens]] = {"dense": Dense, "slab": Slab, "masked": Masked}
    kind = layouts[layout]
    if target is not None:
        check_target(target, "share")
    check_format(output, format, kind, batch)
    classes = None if class_names is None else read_names(class_names, "class_names")
    listing = None if data is None else list_folder(data, "data")
    unplanned = layout == "slab" and listing is None
    if (told := method_told(model)) is not None:  # so that nothing is downloaded for what cannot be
        _check_asked(model, told, method, target, unplanned)
        check_names(classes, classes_told(model))
    opened = open_model(model)
    _check_asked(model, opened.config, method, target, unplanned and opened.plan is None)
    if is_dense(opened) and method is not None:
        opened = METHODS[method]().build(opened.vit).eval()
    check_exportable(opened, output, format, dtype, kind, classes, batch)
    if target is not None:
        if not opened.even:  # what they cost depends on the images
            raise ValueError(f"what {opened.config.title} costs depends on images: set its target with adaptvit adapt")
        meet_target(opened, torch.zeros(1, *input_size(opened.vit)).to(next(opened.parameters())), target)
    looked_at = None
    if listing is not None:
        split = open_pictures(listing, preparation(opened, model))
        batched = spread_over(split, images)
        if batched.unreadable:
            warn(f"{len(batched.unreadable)} images cannot be read{first_of(batched.unreadable)}", stacklevel=2)
        looked_at = batched.images
        if batch != "dynamic":
            looked_at = looked_at[: len(looked_at) // int(batch) * int(batch)]
        if layout == "slab":
            opened.plan = measure_plan(opened, looked_at)
    return export(opened, output, format, batch, dtype, kind, looked_at, classes, tell)


def _check_asked(
    model: str, own: MethodConfig | type[MethodConfig], method: str | None, target: float | None, unplanned: bool
) -> None:
    """Refuse what the method of a model rules out, however large it is.

    Args:
        own: the method that it has.
        method: the one asked for.
        unplanned: whether a slab is wanted, and neither images nor the model say how many rows it has.
    """
    check_method(model, own, method)
    if own.role == "dense" and method is None and target is not None:
        raise ValueError(f"{model} is a plain ViT, which costs what it costs: choose its method, such as tome")
    if unplanned:
        raise ValueError("layout slab plans its rows by images: choose a folder of such as come, with --data")


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit export MODEL OUTPUT`."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Write a model as ONNX or as a program of torch.export; run the file and compare.",
    )
    parser.add_function_arguments(export_model, as_positional=True, skip={"tell"})
    add_json(parser)
    return parser


def execute(arguments: Namespace) -> None:
    """Print what is done, and how the file did."""
    told = arguments.as_dict()
    where = told.pop("json")
    check_json(where)
    found = export_model(**told, tell=say)
    facts = found.facts
    say(f"{found.path}: {found.size / 1e6:.1f} MB, {facts['gmacs']:.3f} GMACs, {facts['share']:.1%} of the dense MACs")
    what = "images" if arguments.data else "images of noise"
    say(f"as the model on {found.equal} of {found.images} {what}, logits differ by {found.difference:.1g} at most")
    if found.turned:
        say(f"for {found.turned} of them rounding turned a decision, so that other tokens were kept or merged")
    if found.overflowed:
        say(f"{found.overflowed} {what} were in batches for which the rows are too few, which the file tells")
    checked = {"bytes": found.size, "images": found.images, "equal": found.equal, "difference": found.difference}
    checked |= {"turned": found.turned, "overflowed": found.overflowed}
    tell_json(where, {"file": str(found.path), **facts, **checked})
