"""What a model says of every image in a folder and what each cost, a line an image: resumable, shared among processes.

Beside the output stands `NAME.settings.json`, what its lines were made with; under torchrun, while it runs, also a
`NAME.part-R-of-W` for each process.

Letters: B images, L blocks, K classes told of each image.
"""

import csv
import errno
import glob
import io
import json
import os
from collections.abc import Container, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adaptvit.checks import In, check_device, check_fields
from adaptvit.commands.console import add_json, check_json, config_of, say_unused, tell_json, unused
from adaptvit.data import (
    Clips,
    DataConfig,
    FolderImages,
    LeftOut,
    Unreadable,
    check_no_strip,
    check_sources,
    collate,
    list_folder,
    not_finite,
    preparation,
    read_names,
)
from adaptvit.data import find_images as find_images
from adaptvit.extras import needed
from adaptvit.files import as_cell, as_json, check_output, from_cell, locked, replacing
from adaptvit.macs import macs
from adaptvit.model import AdaptiveViT
from adaptvit.process import as_found, best_device, in_float64, serve
from adaptvit.records import VERSION, read_record, version, write_record
from adaptvit.terminal import progress_bar, say, word_after
from adaptvit.weights.checkpoints import digest
from adaptvit.weights.opening import classes_told, open_model

with needed("predicting"):
    from accelerate import PartialState  # type: ignore[import-untyped]
    from accelerate.utils import gather_object  # type: ignore[import-untyped]

PATIENCE = timedelta(days=7)
"""How long a process that is done waits for the others."""


@dataclass(frozen=True)
class PredictConfig:
    """Which images, through which model, to which file."""

    model: str
    """A file, folder, repository (`hf-hub:OWNER/NAME`) or timm name of a ViT."""
    folder: Path
    """Folder whose images, at any depth, are classified; for a model that takes clips, whose clips are, in folders of
    classes or without, or one clip."""
    output: Path = Path("predictions.csv")
    """File to write: .csv, or .jsonl for JSON lines. One that an interrupted run left is gone on with."""
    top: Annotated[int, In("[1, inf)")] = 5
    """Classes told of each image, the most probable first; all where the model has fewer."""
    batch_size: Annotated[int, In("[1, inf)")] = 32
    """Images in a forward pass."""
    workers: Annotated[int, In("[0, 1024]")] = 2
    """Processes that decode, for each that computes; 0 decodes there."""
    device: str = field(default_factory=best_device)
    """Where to run: cpu or cuda; cuda unless told, where there is one. Under torchrun, one for each process."""
    class_names: Path | None = None
    """File with the name of a class on each line, in the order of the model's; None tells them by number."""
    strip: Annotated[int | None, In("[1, 65536]")] = None
    """For a model that takes clips: frames of a picture that shows all of a clip, one below another; None takes videos
    and folders of frames."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.output.suffix not in FORMATS:
            allowed = " or ".join(FORMATS)
            raise ValueError(f"PredictConfig.output must end in {allowed}, got {str(self.output)!r}")
        check_device("PredictConfig.device", self.device)


@dataclass(frozen=True)
class Prediction:
    """What is there once every image has had its turn."""

    output: Path
    """The file."""
    images: int
    """Its lines, one for each image that can be read."""
    earlier: int
    """Those of them that were there before."""
    unreadable: tuple[Unreadable, ...]
    """Files that cannot be decoded, or whose logits are not finite, and folders that cannot be read, in the order of
    their paths."""
    left_out: tuple[LeftOut, ...] = ()
    """What lies in the folder and is no image."""
    kind: Literal["images", "clips"] = "images"
    """What the model takes."""


@as_found()
def predict(config: PredictConfig) -> Prediction:
    """Run every image of a folder once; lines come in the natural order of the paths.

    An interrupted run goes on where it stopped. Started by torchrun, the processes share the batches out. A batch is
    made of the same images whoever runs it and whenever, so the lines do not depend on either.

    Returns:
        The same in every process.
    Raises:
        FileNotFoundError: the folder, the model, the class names or the folder of the output do not exist.
        ValueError: there are no images, the model has no classes or another number than `class_names`, the output was
            made with other settings, or there is no image whose logits are finite.
        ChildProcessError: a process that decodes died.
        FileExistsError: another run is writing to the output.
        OSError: the output cannot be written.
    """
    if not config.folder.exists():
        raise FileNotFoundError(f"PredictConfig.folder is {str(config.folder)!r}, which is not a folder")
    if not config.output.parent.is_dir():
        raise FileNotFoundError(f"PredictConfig.output lies in {str(config.output.parent)!r}, which is not a folder")
    check_sources(DataConfig(root=config.folder))
    names = None if config.class_names is None else read_names(config.class_names, "PredictConfig.class_names")
    if (count := classes_told(config.model)) is not None:
        _check_classes(config, names, count)
    device = torch.device(config.device)
    check_output(config.output)
    state = PartialState(cpu=device.type == "cpu" and "LOCAL_RANK" in os.environ, timeout=PATIENCE)
    with locked(config.output) if state.is_main_process else nullcontext():
        return _predict(config, names, device, state)


def _predict(
    config: PredictConfig, told: Sequence[str] | None, device: torch.device, state: PartialState
) -> Prediction:
    rank, world = state.process_index, state.num_processes
    model = open_model(config.model).to(device if world == 1 else state.device)
    classes = _classes(config, told, model)
    settings = preparation(model, config.model)
    images, left_out = _images(config, settings)
    names = list(images.names)
    top = min(config.top, len(classes))
    form = FORMATS[config.output.suffix](top, model.depth)
    files = _Files(config.output, names, form, _settings(config, model, classes, settings, top))

    files.check()
    state.wait_for_everyone()  # every process has seen the same files before one of them writes
    if state.is_main_process:
        files.mend()
    state.wait_for_everyone()
    done = files.lines()
    state.wait_for_everyone()

    batches, unreadable = _batches(images, config.batch_size, done, rank, world)
    written = 0
    try:
        with open(files.target(rank, world), "a", **TEXT) as file:
            if not file.tell():
                file.write(form.header)
            workers = min(config.workers, len(batches))
            loader = DataLoader(
                images, batch_sampler=batches, num_workers=workers, collate_fn=collate, worker_init_fn=serve
            )
            for batch in progress_bar(loader, "predicting", unit="batch", stays=True, shown=state.is_main_process):
                unreadable += batch.unreadable
                rows = list(zip(batch.labels.tolist(), _image_rows(model, batch.images, classes, top), strict=True))
                unreadable += [not_finite(names[index]) for index, row in rows if row is None]
                lines = [form.line(names[index], row) for index, row in rows if row is not None and index not in done]
                file.write("".join(lines))
                file.flush()
                written += len(lines)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        what = f"{str(config.output)!r} cannot be written, the same command goes on with it: {error.strerror}"
        raise OSError(error.errno, what) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the same command goes on with {str(config.output)!r}") from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            f"a process that decodes images died; the same command goes on with {str(config.output)!r}"
        ) from error

    counts: list[int] = gather_object([written])  # waits for all
    found: list[Unreadable] = gather_object(unreadable)
    spoilt = [one.name for one in found if one.decoded]
    nothing = not done and not sum(counts) and bool(spoilt)
    if state.is_main_process:
        files.remove() if nothing else files.settle()
    state.wait_for_everyone()
    if nothing:
        raise ValueError(f"{config.model}: the logits are not finite for any image, {spoilt[0]!r} being the first")
    order = {name: index for index, name in enumerate(names)}
    return Prediction(
        output=config.output,
        images=len(done) + sum(counts),
        earlier=len(done),
        unreadable=tuple(sorted(found, key=lambda one: order[one.name])),
        left_out=left_out,
        kind="clips" if "frames" in settings else "images",
    )


class _Clips(Dataset):
    """Clips by their numbers, as `FolderImages` has images."""

    def __init__(self, clips: Clips) -> None:
        self.clips, self.names = clips, [name for name, _ in clips.samples]

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        item = self.clips[index]
        return item if isinstance(item, Unreadable) else (item[0], index)


def _images(config: PredictConfig, settings: dict[str, Any]) -> tuple[FolderImages | _Clips, tuple[LeftOut, ...]]:
    """What the folder has, and what it has beside."""
    if (frames := settings.get("frames")) is not None:
        clips = Clips(config.folder, settings, frames, strip=config.strip)
        return _Clips(clips), clips.left_out
    check_no_strip(config.strip, config.model)
    listing = list_folder(config.folder, "PredictConfig.folder")
    return FolderImages(config.folder, list(listing.names), settings), listing.left_out


class ImageRow(NamedTuple):
    """What is told of an image."""

    classes: list[str] | list[int]
    """(K,) the most probable first."""
    probabilities: list[float]
    """(K,)."""
    gmacs: float
    tokens: list[int]
    """(L,) tokens that each block attended to."""


class Csv:
    """A table with a header. A number that is not whole has six decimals."""

    def __init__(self, top: int, blocks: int) -> None:
        told = [f"{name}_{place}" for place in range(1, top + 1) for name in ("class", "probability")]
        self.header = self._joined(["file", *told, "gmacs", *(f"tokens_{block}" for block in range(1, blocks + 1))])

    def line(self, name: str, row: ImageRow) -> str:
        """An image's line, with its end."""
        classes = map(as_cell, row.classes)
        told = [cell for pair in zip(classes, _decimals(row.probabilities), strict=True) for cell in pair]
        return self._joined([as_cell(name), *told, *_decimals([row.gmacs]), *row.tokens])

    def name(self, line: str) -> str:
        """The image of a line."""
        return from_cell(next(csv.reader([line]))[0])

    def _joined(self, cells: Sequence[object]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue()


class JsonLines:
    """An object on each line. A number that is not whole is rounded to six decimals."""

    header = ""

    def __init__(self, top: int, blocks: int) -> None:
        pass

    def line(self, name: str, row: ImageRow) -> str:
        """An image's line, with its end."""
        told = [
            {"class": kind, "probability": round(probability, 6)}
            for kind, probability in zip(row.classes, row.probabilities, strict=True)
        ]
        return as_json({"file": name, "top": told, "gmacs": round(row.gmacs, 6), "tokens": row.tokens}) + "\n"

    def name(self, line: str) -> str:
        """The image of a line."""
        return json.loads(line)["file"]


FORMATS: dict[str, type[Csv] | type[JsonLines]] = {".csv": Csv, ".jsonl": JsonLines}
TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
"""How files are opened: any name that a file system allows comes back as it was."""


class _Files:
    """The output, its parts, and the settings that they were made with."""

    def __init__(self, output: Path, names: list[str], form: Csv | JsonLines, settings: dict[str, Any]) -> None:
        self.output, self.form, self.settings = output, form, settings
        self.record = output.with_name(f"{output.name}.settings.json")
        self.index = {name: index for index, name in enumerate(names)}
        if isinstance(form, Csv):
            broken = next((name for name in names if "\n" in name or "\r" in name), None)
            if broken is not None:
                raise ValueError(f"the name of {broken!r} has a line break, which is for .jsonl to hold, not for .csv")

    def target(self, rank: int, world: int) -> Path:
        """The file that a process writes to."""
        if world == 1:
            return self.output
        return self.output.with_name(f"{self.output.name}.part-{rank}-of-{world}")

    def check(self) -> None:
        """Look, and change nothing.

        Raises:
            ValueError: the files there were made with other settings, or are not ours.
        """
        if not self._written():
            return
        choose = "choose another output, or remove it"
        if not self.record.is_file():
            raise ValueError(f"{str(self.output)!r} is there without its {self.record.name!r}: {choose}")
        try:
            earlier = read_record(self.record)
        except ValueError as error:
            raise ValueError(
                f"{error}, so that nobody can tell what {str(self.output)!r} was made with: {choose}"
            ) from None
        other = [name for name, value in self.settings.items() if earlier.get(name) != value]
        if other:
            raise ValueError(f"{str(self.output)!r} was made with another {' and '.join(other)}: {choose}")
        try:
            self.lines()
        except (LookupError, StopIteration, TypeError, ValueError):
            raise ValueError(f"{str(self.output)!r} has lines that predict did not write: {choose}") from None

    def mend(self) -> None:
        """Cut off a last line that is not whole, and keep the settings."""
        for path in self._written():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        write_record(self.record, self.settings)

    def lines(self) -> dict[int, str]:
        """The whole lines by the index of their image, in the order in which they stand."""
        found: dict[int, str] = {}
        for path in self._written():
            with open(path, **TEXT) as file:
                lines = file.read().split("\n")[:-1]
            if lines and self.form.header and lines.pop(0) + "\n" != self.form.header:
                raise ValueError(f"{path} has another header")
            here = {self.index[self.form.name(line)]: line for line in lines}
            if len(here) < len(lines):
                raise ValueError(f"{path} has two lines of one image")
            found |= here
        return found

    def settle(self) -> None:
        """Put all lines into the output, in order, and remove the parts."""
        lines, parts = self.lines(), self._parts()
        if parts or list(lines) != sorted(lines):
            with replacing(self.output) as partial, open(partial, "w", **TEXT) as file:
                file.write(self.form.header)
                file.writelines(lines[index] + "\n" for index in sorted(lines))
        for part in parts:
            part.unlink()

    def remove(self) -> None:
        """Leave nothing, as there is no line."""
        for path in (self.output, self.record, *self._parts()):
            path.unlink(missing_ok=True)

    def _parts(self) -> list[Path]:
        return sorted(self.output.parent.glob(f"{glob.escape(self.output.name)}.part-*-of-*"))

    def _written(self) -> list[Path]:
        return [path for path in (self.output, *self._parts()) if path.is_file() and path.stat().st_size]


def _batches(
    images: FolderImages | _Clips, size: int, done: Container[int], rank: int, world: int
) -> tuple[list[list[int]], list[Unreadable]]:
    """Batches that this process is to run, and the images it need not run them for, as they are still unreadable.

    A batch of which only a part was written is run again as a whole, so that it is the batch that it was.
    """
    whole = [list(range(start, min(start + size, len(images)))) for start in range(0, len(images), size)]
    open_ones = [batch for batch in whole if any(index not in done for index in batch)]
    run, unreadable = [], []
    for batch in open_ones[rank::world]:
        lacking = [index for index in batch if index not in done]
        again: list[Unreadable] = []
        if len(lacking) < len(batch):
            for index in lacking:
                item = images[index]
                if not isinstance(item, Unreadable):
                    break
                again.append(item)
        if len(again) == len(lacking):
            unreadable += again
        else:
            run.append(batch)
    return run, unreadable


def _image_rows(model: AdaptiveViT, images: Tensor, classes: Sequence[str] | range, top: int) -> list[ImageRow | None]:
    """What is told of each image; None where its logits are not finite."""
    if not len(images):
        return []
    parameter = next(model.parameters())
    with torch.inference_mode():
        output = model(images.to(parameter.device, parameter.dtype), detailed=True)
        sound = output.logits.isfinite().all(dim=1)
        best = output.logits.float().softmax(dim=1).topk(top, dim=1)
        cost = in_float64(macs(output.usage, model.shape)) / 1e9
    return [
        ImageRow([classes[index] for index in indices], *rest) if finite else None
        for finite, indices, *rest in zip(
            sound.tolist(),
            best.indices.tolist(),
            best.values.tolist(),
            cost.tolist(),
            output.usage.attended.tolist(),
            strict=True,
        )
    ]


def _classes(config: PredictConfig, names: Sequence[str] | None, model: AdaptiveViT) -> Sequence[str] | range:
    """Names of the classes, those of the file first, or their numbers."""
    _check_classes(config, names, model.num_classes)
    return names or model.class_names or range(model.num_classes)


def _check_classes(config: PredictConfig, names: Sequence[str] | None, count: int) -> None:
    """Refuse a model without classes, or another number of names than it has."""
    if count < 1:
        raise ValueError(f"PredictConfig.model is {config.model!r}, which has no classes to tell")
    if names is not None and len(names) != count:
        raise ValueError(f"{config.class_names} has {len(names)} names, but {config.model} has {count} classes")


def _settings(
    config: PredictConfig, model: AdaptiveViT, classes: Sequence[str] | range, prepared: dict[str, Any], top: int
) -> dict[str, Any]:
    """What decides the lines, as JSON holds it."""
    return {
        VERSION: version(),
        "model": digest(model, (model.config, model.shape)),
        "folder": str(config.folder.resolve()),
        "top": top,
        "class names": None if isinstance(classes, range) else list(classes),
        "preparation": json.loads(json.dumps(prepared, allow_nan=False)),
    } | ({} if config.strip is None else {"strip": config.strip})


def _decimals(values: Sequence[float]) -> list[str]:
    return [f"{value:.6f}" for value in values]


def options(words: Sequence[str]) -> ArgumentParser:
    """`adaptvit predict MODEL FOLDER`, or, with `--engine ray`, `adaptvit predict MODEL SOURCE OUT`."""
    engine = word_after(words, "--engine") or "embedded"
    if engine == "ray":
        from adaptvit.commands import predict_ray  # which needs what the other engine does not

        return predict_ray.options(words)
    if engine != "embedded":
        raise ValueError(f"--engine must be embedded or ray, got {engine!r}")
    parser = ArgumentParser(description="Classes, GMACs and tokens left per block of every image in a folder.")
    parser.add_class_arguments(PredictConfig, as_positional=True)
    parser.add_argument(
        "--engine",
        type=str,
        default="embedded",
        help="Where it runs: embedded, in this process or torchrun's; ray, which has options of its own.",
    )
    add_json(parser)
    return parser


def execute(arguments: Namespace) -> int:
    """Write the file; 1 where images could not be read. Under torchrun the main process speaks for all."""
    if arguments.engine == "ray":
        from adaptvit.commands import predict_ray

        return predict_ray.execute(arguments)
    check_json(arguments.json)
    result = predict(config_of(PredictConfig, arguments))
    if not PartialState().is_main_process:
        return 0
    earlier = f", {result.earlier} of them from an earlier run" if result.earlier else ""
    say(f"{result.output}: {result.images} {result.kind}{earlier}")
    told = {"output": str(result.output), "images": result.images, "earlier": result.earlier}
    tell_json(arguments.json, told | unused(result.unreadable, result.left_out))
    return say_unused(result.unreadable, result.left_out)
