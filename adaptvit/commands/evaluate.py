"""`adaptvit evaluate`: accuracy, GMACs, depth of tokens and speed of a model on a data set."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from jsonargparse import ArgumentParser, Namespace
from torch.utils.data import DataLoader, Dataset

from adaptvit.checks import In, check_device, check_fields
from adaptvit.commands.console import add_json, check_json, config_of, say_listed, say_unused, tell_json
from adaptvit.data import (
    PERHAPS_STRIPS,
    ClassFolders,
    ClipFolders,
    Clips,
    DataConfig,
    Samples,
    check_sources,
    class_names,
    collate,
    open_split,
    preparation,
    read_class_map,
)
from adaptvit.files import append_csv, check_output, read_csv
from adaptvit.measure.evaluate import Result, evaluate
from adaptvit.measure.speed import measure_speed
from adaptvit.model import AdaptiveViT
from adaptvit.process import as_found, best_device
from adaptvit.weights.opening import classes_told, open_model

KNOWN_BY = ("model", "data", "images")
"""Columns of a CSV file that `evaluate` adds lines to."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, on what."""

    model: str
    """A file, folder, repository (`hf-hub:OWNER/NAME`) or timm name of a ViT."""
    root: Path
    """Folder with a folder for each class, or with such a folder for the split; or a tar file."""
    dataset: str = ""
    """A data set of the Hub or of webdataset instead, as `DataConfig.dataset` takes it."""
    split: str = "validation"
    """The split of it."""
    class_map: Path | None = None
    """File with the class names in the order of the labels, one on a line."""
    strip: Annotated[int | None, In("[1, 65536]")] = None
    """For a model that takes clips: frames of a picture that shows all of a clip, one below another; None takes videos
    and folders of frames."""
    batch_size: Annotated[int, In("[1, inf)")] = 64
    """Images per forward pass."""
    workers: Annotated[int, In("[0, 1024]")] = 2
    """Processes that decode."""
    device: str = field(default_factory=best_device)
    """Where to run: cpu or cuda; cuda unless told, where there is one."""
    rounds: Annotated[int, In("[0, inf)")] = 10
    """Timed turns of dense, masked and packed execution of one batch; 0 measures no speed."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_device("EvaluateConfig.device", self.device)


@as_found()
def evaluate_model(config: EvaluateConfig) -> tuple[Result, dict[str, Any]]:
    """Open model and images, evaluate, and time one batch; also everything as JSON-able figures.

    Raises:
        FileNotFoundError: no such model or folder.
        ValueError: the model's classes are not those of the images, or no image can be read.
    """
    source = DataConfig(root=config.root, dataset=config.dataset, class_map=config.class_map, strip=config.strip)
    folders = check_sources(source, config.split, classes=True)
    check_count(classes_told(config.model), folders, config.root, config.class_map)
    model = open_model(config.model).to(config.device)
    settings = preparation(model, config.model)
    data = open_split(source, settings, config.split)
    check_classes(data, model, config.root, config.class_map)
    result = evaluate(model, data, batch_size=config.batch_size, workers=config.workers)
    result = replace(result, left_out=data.left_out if isinstance(data, Samples | Clips) else ())
    figures: dict[str, Any] = {"model": config.model, "data": str(config.dataset or config.root), **result.figures}
    if config.rounds:
        loader = DataLoader(data, config.batch_size, collate_fn=collate)
        batch = next(batch for batch in loader if len(batch.labels))
        timing = measure_speed(model.vit, model, batch.images.to(next(model.parameters())), config.rounds)
        figures |= {f"{name}_images_per_s": getattr(timing, name) for name in ("dense", "masked", "packed")}
        figures |= {"ideal_speedup": timing.ideal, "realised_speedup": timing.gain, "ratio": timing.ratio}
        figures |= {"load_average": os.getloadavg()[0], "timed_batch": len(batch.images)}
    return result, figures


def check_classes(data: Dataset, model: AdaptiveViT, root: Path, class_map: Path | None) -> None:
    """Refuse data of other classes than the model's, as far as the number of their folders tells.

    Raises:
        ValueError: naming both numbers.
    """
    classes, reader = class_names(data), getattr(data, "reader", None)
    empty: tuple[str, ...] = ()
    kind, strips = "images", ""
    if isinstance(reader, ClassFolders | ClipFolders):
        empty = reader.empty
        if isinstance(reader, ClipFolders):
            kind, strips = "clips", PERHAPS_STRIPS
        if not classes:
            first = reader.filename(0)
            raise ValueError(f"{str(root)!r} has {kind}, but no folders of classes: {first!r} lies in none{strips}")
    check_count(model.num_classes, classes, root, class_map, empty, kind)


def check_count(
    count: int | None,
    folders: Sequence[str],
    root: Path,
    class_map: Path | None,
    empty: Sequence[str] = (),
    kind: str = "images",
) -> None:
    """Refuse folders, or class names, that are not as many as a model has classes.

    Args:
        count: the model's; None where it is not known yet.
        empty: those of the folders without any of that kind.
    Raises:
        ValueError: naming both numbers.
    """
    if count is None:
        return
    if folders and class_map is None and (empty or len(folders) != count):
        without = f" {', '.join(map(repr, empty[:3]))} without {kind}," if empty else ""
        raise ValueError(
            f"the model has {count} classes, but {str(root)!r} has {len(folders) - len(empty)};{without} "
            "if they are some of the model's, name all of these in a file by --class-names (class_map)"
        )
    if class_map is not None and (named := len(read_class_map(class_map))) != count:
        raise ValueError(f"the model has {count} classes, but class_map {str(class_map)!r} has {named}")


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit evaluate MODEL ROOT`."""
    parser = ArgumentParser(
        allow_abbrev=False, description="Accuracy, GMACs, depth of tokens and speed of a model on a data set."
    )
    parser.add_class_arguments(EvaluateConfig, as_positional=True)
    add_json(parser)
    parser.add_argument("--csv", type=Path, default=None, help="Also append them, a line a model, to this file.")
    return parser


def execute(arguments: Namespace) -> int:
    """Print the figures, write them where asked; 1 where images could not be read."""
    config = config_of(EvaluateConfig, arguments)
    check_json(arguments.json)
    if arguments.csv:
        check_output(arguments.csv)
        read_csv(arguments.csv, KNOWN_BY)
    result, figures = evaluate_model(config)
    say_listed(figures)
    tell_json(arguments.json, figures)
    if arguments.csv:
        append_csv(arguments.csv, figures, KNOWN_BY)
    return say_unused(result.unreadable, result.left_out)
