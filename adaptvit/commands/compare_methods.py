"""Methods side by side on one pretrained ViT: accuracy against MACs and against measured speed, at several budgets.

Where there are no classes, as of DINO's, embeddings take the place of accuracy: the cosine of each to the dense one.

calibration images -> each method that needs no training, at each budget
fine-tuned files, each at its own budget                                 -> the other images -> a record each
all records        -> all speeds in turns -> methods.csv, conditions.json, two plots, report.html
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any, Literal, NamedTuple

import timm
import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.data import Dataset, IterableDataset, Subset

from adaptvit.adapt import adapt
from adaptvit.backbones.base import patch_grid
from adaptvit.checks import In, OneOf, check_device, check_fields
from adaptvit.commands.console import add_json, check_json, config_of, say_table, say_unused, tell_json
from adaptvit.commands.draw import last_groups
from adaptvit.commands.evaluate import check_classes, check_count
from adaptvit.data import (
    Clips,
    DataConfig,
    LeftOut,
    Samples,
    Unreadable,
    check_sources,
    first_of,
    list_folder,
    open_pictures,
    open_split,
    pixels,
    preparation,
    spread_over,
)
from adaptvit.data.folders import find_split
from adaptvit.files import as_json, check_output_folder, write_atomically, write_csv
from adaptvit.macs import Shape, macs
from adaptvit.measure.evaluate import outputs
from adaptvit.measure.speed import interleaved, speeds
from adaptvit.methods import METHODS, MethodConfig, dense, named, untrained
from adaptvit.model import AdaptiveViT
from adaptvit.process import as_found, best_device, in_float64
from adaptvit.records import contents, known, same, stable, version, write_record
from adaptvit.show.pictures import (
    Figure,
    Point,
    data_uri,
    laid_over,
    merged_regions,
    one_below_another,
    sheet_maps,
    sheets,
    tradeoff,
    write_png,
)
from adaptvit.show.report import Illustration, Report, Section, Table, machine, write_report
from adaptvit.terminal import progress_bar, say, warn
from adaptvit.weights.checkpoints import digest
from adaptvit.weights.opening import check_name, classes_told, method_told, open_model, start_from

Task = Literal["classes", "embedding"]


class Judged(NamedTuple):
    """What a task judges models by: a figure of each image, of which records have the mean by its name."""

    name: str
    label: str
    """On a plot's axis."""


JUDGED: dict[Task, Judged] = {
    "classes": Judged("top1", "top-1"),
    "embedding": Judged("cosine", "cosine to the dense model's embedding"),
}


@dataclass(frozen=True)
class MethodsConfig:
    """What to compare, on what."""

    model: str
    """A file, folder, repository (`hf-hub:OWNER/NAME`) or timm name of a plain ViT."""
    root: Path
    """Folder with a folder for each class, or with such a folder for the split; or a tar file. For embeddings a folder
    of pictures, whatever folders they lie in."""
    task: Task = "classes"
    """What is compared: accuracy in `classes`, or, without classes and whatever head there is, the cosine of what the
    classifier would be given, the `embedding` of each image, to the dense model's."""
    dataset: str = ""
    """A data set of the Hub or of webdataset instead, as `DataConfig.dataset` takes it; not a stream of the Hub."""
    files: tuple[str, ...] = ()
    """Fine-tuned models of the same classes, named alike; each is measured as it is."""
    methods: Annotated[tuple[str, ...] | None, OneOf(partial(untrained, clips=True, many=True))] = None
    """What the model becomes without training, null being all such; `random` drops as many patches as ATS, but any."""
    budgets: Annotated[tuple[float, ...], In("(0, 1]", "shares of the dense MACs", "60 % is 0.6", empty=True)] = (
        0.85,
        0.7,
        0.6,
        0.5,
    )
    """Shares of the dense MACs, in (0, 1], that each of these methods is brought to."""
    weights: Path | None = None
    """File, folder or repository to give the timm ViT its weights; None takes timm's own."""
    output: Path = Path("runs/methods")
    """Folder of the results; what it holds of the same comparison is not computed again."""
    split: str = "validation"
    """The split of the data."""
    class_map: Path | None = None
    """File with the class names in the order of the labels, one on a line."""
    strip: Annotated[int | None, In("[1, 65536]")] = None
    """For a model that takes clips: frames of a picture that shows all of a clip, one below another; None takes videos
    and folders of frames."""
    calibration: Annotated[int | None, In("[1, inf)")] = None
    """Images that are set aside to fit methods and budgets, spread over the split; the others are measured. None is a
    fifth of them, 256 at most."""
    limit: Annotated[int | None, In("[2, inf)")] = None
    """Most images measured, spread over those that are not set aside."""
    batch_size: Annotated[int, In("[1, inf)")] = 64
    """Images per forward pass."""
    workers: Annotated[int, In("[0, 1024]")] = 2
    """Processes that decode."""
    device: str = field(default_factory=best_device)
    """Where to run: cpu or cuda; cuda unless told, where there is one."""
    timed: Annotated[int, In("[1, inf)")] = 32
    """Images in a timed batch."""
    rounds: Annotated[int, In("[1, inf)")] = 10
    """Timed turns of that batch, all models after one another in each."""
    latencies: Annotated[int, In("[2, inf)")] = 100
    """Timed turns of one image, likewise."""
    pictures: Annotated[int, In("[0, inf)")] = 4
    """Images on which the report shows what each method kept or merged."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_device("MethodsConfig.device", self.device)


@dataclass(frozen=True)
class Entry:
    """One line of the comparison."""

    name: str
    """Of the method, or of the file; `dense` is timm's own model."""
    budget: float | None = None
    """Share of the dense MACs asked for; None of a model that is measured as it is."""

    @property
    def label(self) -> str:
        """What it is called where budgets differ."""
        return self.name if self.budget is None else f"{self.name} {self.budget:g}"


DENSE = Entry("dense")


@dataclass(frozen=True)
class EntryRow:
    """What came of an entry."""

    entry: Entry
    record: dict[str, Any]
    """As it is stored: why it could not be done, `refused`, or None there and the figures."""
    against_dense: tuple[float, float] | None
    """Difference in top-1, or in cosine, from the dense model, image by image: mean and its standard error; None of
    dense itself and where it could not be done."""
    against_reference: tuple[float, float] | None
    """The same from the reference, ToMe, at the same budget; None where that was not measured too."""
    speed: dict[str, float]
    """Images per second, `dense`, `masked` and `packed`; `ideal` and `realised` gain over the dense model; seconds for
    one image, `p50` and `p95`. Empty where it could not be done."""


@dataclass(frozen=True)
class MethodsOutcome:
    """What `compare_methods` found."""

    rows: list[EntryRow]
    """The dense model first."""
    unreadable: list[Unreadable]
    """Images that could not be decoded and are in no figure."""
    report: Path
    """What to open first."""
    left_out: tuple[LeftOut, ...] = ()
    """What lies beside the images and is not used."""


@as_found()
def compare_methods(config: MethodsConfig, tell: Callable[[list[EntryRow]], object] | None = None) -> MethodsOutcome:
    """Evaluate every method at every budget and every file, time all of them in turns, and write the results.

    Each entry leaves a record in `output/records`, known by all that decides it, and is never evaluated twice by one
    version: an interrupted comparison goes on with the next entry. What the model cannot do has a row that says why.

    Args:
        tell: called with what was found, before the table, plots and report of it are written.
    Raises:
        FileNotFoundError: no such model, file or folder.
        TypeError: the model is not a ViT that this library reproduces.
        ValueError: the model is no plain ViT, a file or the data has other classes, or there are too few images.
    """
    check_output_folder(config.output)
    source = DataConfig(root=config.root, dataset=config.dataset, class_map=config.class_map)
    folders = check_sources(source, config.split, classes=config.task == "classes")
    if config.weights is not None and not timm.is_model(config.model):
        raise ValueError(f"weights are for the name of a timm model, which {config.model!r} is not")
    for name in (config.model, *config.files, config.weights):
        if name is not None:
            check_name(name)
    _check_plain(config.model, method_told(config.model))
    if config.task == "classes":
        check_count(classes_told(config.model), folders, config.root, config.class_map)
    what = _Compared(config)
    budgets = tuple(dict.fromkeys(config.budgets))
    fitted = [Entry(name, share) for name in what.methods for share in budgets]
    entries = [DENSE, *fitted, *map(Entry, what.files)]
    (config.output / "records").mkdir(parents=True, exist_ok=True)
    records = {entry: what.record(entry) for entry in progress_bar(entries, "methods", outer=True, stays=True)}
    models = {entry: what.rebuild(entry, record) for entry, record in records.items() if not record["refused"]}
    timed = what.speeds(models)
    rows = [
        EntryRow(
            entry,
            record,
            _paired_by_image(record, records[DENSE]),
            _paired_by_image(record, records.get(Entry(named("reference"), entry.budget), record)),
            timed["speeds"].get(entry.label, {}),
        )
        for entry, record in records.items()
    ]
    if tell is not None:
        tell(rows)
    conditions = what.conditions() | {name: value for name, value in timed.items() if name.startswith("load")}
    lines = [_line(row, config.task) for row in rows]
    write_csv(config.output / "methods.csv", lines)
    write_atomically(config.output / "conditions.json", as_json(conditions | timed["machine"], indent=2) + "\n")
    tuned = {entry.name: model.config.method for entry, model in models.items() if entry.budget is None}
    plots = tradeoffs(lines, tuned, f"{config.model} on {config.dataset or config.root}", config.task)
    for name, (figure, _) in plots.items():
        write_png(figure, config.output / f"{name}.png")
    shown = sorted(budgets)[(len(budgets) - 1) // 2] if budgets else None
    sections = [
        Section(
            "Accuracy against cost" if config.task == "classes" else "Likeness against cost",
            [Illustration(data_uri(figure), said) for figure, said in plots.values()],
        )
    ]
    drawn = {entry: model for entry, model in models.items() if entry != DENSE and entry.budget in (shown, None)}
    if drawn and config.pictures:
        sections.append(Section("What is kept, or merged", what.pictures(drawn)))
    report = Report(
        title="adaptvit compare methods",
        headline=_headline(rows, shown, config.task),
        introduction=what.introduction(records[DENSE]),
        table=methods_table(rows, config.task),
        sections=sections,
        facts={"Conditions": conditions, "Machine": timed["machine"]},
    )
    write_report(report, config.output / "report.html")
    unreadable = [*what.unreadable, *(Unreadable(*one) for one in records[DENSE]["unreadable"])]
    return MethodsOutcome(rows, unreadable, config.output / "report.html", what.left_out)


class _Strays(ValueError):
    """Embeddings that are not finite."""


class _Compared:
    """The model, the files, and the images to fit and to measure them on.

    Attributes:
        dense: the plain ViT.
        methods: what it becomes without training.
        files: fine-tuned models by the names that they were given.
        aside, measured: numbers of the images in the split.
        calibration: the images that are set aside.
        unreadable: those of them that cannot be decoded.
        embeddings: the dense model's of the images measured, (images, D), once they were asked for.
        without: those of which it has none.
    """

    def __init__(self, config: MethodsConfig) -> None:
        self.config = config
        self.dense = _open_plain(config).to(config.device)
        self.files = {file: open_model(file).to(config.device) for file in config.files}
        if config.task == "embedding":
            for model in (self.dense, *self.files.values()):
                if model.num_classes:
                    model.reset_classifier(0)
        for file, model in self.files.items():
            if model.num_classes != self.dense.num_classes:
                raise ValueError(
                    f"{file} has {model.num_classes} classes, but {config.model} has {self.dense.num_classes}: only "
                    "models of the same classes can be compared"
                )
        clips = "frames" in preparation(self.dense)
        self.methods = tuple(dict.fromkeys(config.methods or untrained(clips)))
        split = self.split(self.dense)
        if isinstance(split, IterableDataset):
            raise ValueError(f"{config.dataset} is a stream, of which no images can be set aside")
        if config.task == "classes":
            check_classes(split, self.dense, config.root, config.class_map)
        self.left_out = split.left_out if isinstance(split, Samples | Clips) else ()
        self.aside, self.measured = _divided(len(split), config)  # type: ignore[arg-type]
        aside = spread_over(Subset(split, self.aside), len(self.aside))
        self.calibration = aside.images.to(next(self.dense.parameters()))
        self.unreadable = aside.unreadable
        self.images = [contents(path) for path in (config.root, config.class_map)]
        self.known_by = digest(self.dense, (self.dense.config, self.dense.shape))
        self.prepared: dict[str, nn.Module] = {}  # by method, for all of its budgets
        self.embeddings: Tensor | None = None
        self.without: list[Unreadable] = []

    def split(self, model: AdaptiveViT) -> Dataset:
        """All images, as a model takes them."""
        config = self.config
        if config.task == "embedding" and not config.dataset and "frames" not in preparation(model):
            folder = find_split(config.root, config.split, str(config.root)) if config.root.is_dir() else None
            return open_pictures(list_folder(config.root / (folder or "."), "root"), preparation(model))
        source = DataConfig(root=config.root, dataset=config.dataset, class_map=config.class_map, strip=config.strip)
        return open_split(source, preparation(model), self.config.split)

    def some(self, model: AdaptiveViT, count: int) -> Tensor:
        """Measured images, spread over all of them."""
        return spread_over(Subset(self.split(model), self.measured), count).images.to(next(model.parameters()))

    def key(self, entry: Entry) -> str:
        """Eight hexadecimal digits of all that decides a record."""
        model = self.files.get(entry.name)
        weights = self.known_by if model is None else digest(model, (model.config, model.shape))
        settings = sorted(preparation(model or self.dense).items())
        images = f"{self.config.dataset} {self.config.root.resolve()}".strip()
        source = (images, self.config.split, str(self.config.class_map), self.config.strip)
        default = None if entry.budget is None else METHODS[entry.name]()
        told = (
            version(),
            entry,
            self.config.task,
            default,
            weights,
            self.known_by,
            settings,
            source,
            self.images,
            self.aside,
            self.measured,
        )
        return hashlib.sha256(stable(told).encode()).hexdigest()[:8]

    def record(self, entry: Entry) -> dict[str, Any]:
        """What is known of an entry: read back, or found out and stored."""
        name = re.sub(r"[^\w.]+", "-", entry.label).strip("-")[-80:]
        path = self.config.output / "records" / f"{name}-{self.key(entry)}.json"
        if (found := known(path)) is not None:
            return found
        record: dict[str, Any] = {"entry": entry.label, "refused": None, "config": None}
        try:
            model = self.made(entry)
        except (TypeError, ValueError) as error:
            record["refused"] = " ".join(str(error).split())
        else:
            record["config"] = asdict(model.config)
            try:
                record |= self.measure(entry, model)
            except _Strays as error:
                record["refused"] = str(error)
        _keep(path, record)
        return dict(json.loads(as_json(record)))  # the same, tuples and lists, whether found out now or earlier

    def measure(self, entry: Entry, model: AdaptiveViT) -> dict[str, Any]:
        """What `_measured` finds of an entry's model."""
        config, data = self.config, Subset(self.split(model), self.measured)
        like = None
        if config.task == "embedding":
            if self.embeddings is None:
                own = Subset(self.split(self.dense), self.measured)
                found = outputs(self.dense.vit, own, None, config.batch_size, config.workers, labelled=False)
                parts = [(batch.unreadable, output) for batch, output in found]
                self.embeddings = torch.cat([output.logits for _, output in parts if output is not None])
                self.without = [one for unreadable, _ in parts for one in unreadable]
            like = self.embeddings
        runs = model.vit if entry == DENSE else model
        record = _measured(runs, model.shape, data, config.batch_size, config.workers, like)
        if like is not None and record["unreadable"] != self.without:
            raise _Strays("the images that have finite embeddings are others than the dense model's")
        return record

    def made(self, entry: Entry) -> AdaptiveViT:
        """The model of an entry, fitted to its budget if it has one; what `adapt` raises where that cannot be done."""
        if entry.budget is None:
            return self.files.get(entry.name, self.dense)
        return adapt(self.dense.vit, self.calibration, entry.budget, METHODS[entry.name]())

    def rebuild(self, entry: Entry, record: dict[str, Any]) -> AdaptiveViT:
        """The model that a record is of, from its config; fitted anew where that does not say all of it."""
        if entry.budget is None:
            return self.made(entry)
        config = METHODS[entry.name](**record["config"])
        if entry.name not in self.prepared:
            self.prepared[entry.name] = config.prepared(self.dense.vit, self.calibration)
        model = config.build(self.prepared[entry.name])
        own = [name for name in model.state_dict() if not name.startswith("vit.")]
        return self.made(entry) if own else model

    def speeds(self, models: Mapping[Entry, AdaptiveViT]) -> dict[str, Any]:
        """Speeds by label, all models in turns, and the load average before and after; measured once."""
        config, path = self.config, self.config.output / "speed.json"
        settings = [[self.key(entry) for entry in models], config.timed, config.rounds, config.latencies]
        settings += [config.device, torch.get_num_threads()]
        if (found := known(path)) is not None and same(found["settings"], settings):
            return found
        before = round(os.getloadavg()[0], 1)
        batches = {DENSE: self.some(self.dense, config.timed)}
        for entry in models:
            batches[entry] = self.some(models[entry], config.timed) if entry.name in self.files else batches[DENSE]
        labelled = {entry.label: model for entry, model in models.items()}
        own = {entry.label: batches[entry] for entry in models}
        timed = speeds(labelled, own, config.rounds, dense=(self.dense.vit, batches[DENSE]), bar="timing batches")
        single = {label: _one_by_one(model, own[label]) for label, model in labelled.items()}
        single[DENSE.label] = _one_by_one(self.dense.vit, batches[DENSE])
        with torch.inference_mode():
            alone = interleaved(single, config.latencies, torch.device(config.device), "timing single images")
        found = {}
        for label, seconds in alone.items():
            spread = quantiles(seconds, n=20, method="inclusive")
            one = timed[label]
            found[label] = {"dense": one.dense, "p50": spread[9], "p95": spread[18]}
            if label != DENSE.label:
                found[label] |= {"masked": one.masked, "packed": one.packed, "ideal": one.ideal, "realised": one.gain}
        loads = {"load average before timing": before, "load average after timing": round(os.getloadavg()[0], 1)}
        record = {"settings": settings, "speeds": found, "machine": machine(), **loads}
        _keep(path, record)
        return record

    def pictures(self, models: Mapping[Entry, AdaptiveViT]) -> list[Illustration]:
        """The same images, below them what each model did with their patches; none where they have odd channels."""
        images = self.some(self.dense, self.config.pictures)
        if images.shape[-3] not in (1, 3):
            return []
        grid = patch_grid(self.dense.vit, images)
        shown = sheets(pixels(images.cpu(), preparation(self.dense)), grid)
        rows = [("", shown, [""] * len(images))]
        blocks, below = max(model.depth for model in models.values()), False
        for entry, model in models.items():
            images = self.some(model, self.config.pictures)
            with torch.inference_mode():
                usage = model.to_the_end(images).usage
            if usage.live is None:
                continue
            seen = sheets(pixels(images.cpu(), preparation(model)), usage.grid)
            groups = [one for one in last_groups(usage) if one is not None]
            if groups:
                shown = merged_regions(seen, sheet_maps(torch.stack(groups)))
            else:
                shown = laid_over(seen, sheet_maps(usage.patch_depth), blocks)
                below |= bool((usage.patch_depth < 1).any())
            costs = [f"{cost:.3g} GMACs" for cost in (in_float64(macs(usage, model.shape)) / 1e9).tolist()]
            name = entry.label if entry.budget is not None else "/".join(Path(entry.name).with_suffix("").parts[-2:])
            rows.append((name, shown, costs))
        if len(rows) == 1:
            return []
        said = (
            "A row for each model. Where it merges, the patches of each token are one region, outlined, in their mean "
            "colour; where it drops patches, the colour over each says how many blocks worked on it."
        )
        return [Illustration(data_uri(one_below_another(rows, blocks, below), "png"), said, wide=True)]

    def introduction(self, dense: dict[str, Any]) -> list[str]:
        """What was done, in words."""
        unreadable = (
            f" {len(dense['unreadable'])} unreadable or without finite logits are left out."
            if dense["unreadable"]
            else ""
        )
        source = self.config.dataset or self.config.root
        return [
            f"{self.config.model}, {dense['images']} images of {source} measured; {len(self.aside)} others, "
            f"spread over the split, were set aside to fit methods and budgets.{unreadable}",
            "Nothing was trained here. Methods with a budget were fitted to it; files come fine-tuned, at their own. "
            f"{named('control')} is the control: it drops patches, but any.",
        ]

    def conditions(self) -> dict[str, Any]:
        """What the results depend on."""
        told = {field.name: getattr(self.config, field.name) for field in fields(self.config)}
        told |= {"images measured": len(self.measured), "images set aside": len(self.aside)}
        plain = (int, float, str)
        return {
            name: value if isinstance(value, plain) or value is None else _said(value) for name, value in told.items()
        }


def methods_table(rows: Sequence[EntryRow], task: Task = "classes") -> Table:
    """What was found, a line an entry."""
    judged = ("top-1, %", "against dense", "±") if task == "classes" else ("cosine", "±", "p10")
    columns = [
        *("", *judged, "GMACs", "p10", "p90", "of dense, %"),
        *("masked, images/s", "packed, images/s", "gain", "ideal", "ms", "ms, p95"),
    ]
    refused = any(row.record["refused"] for row in rows)
    dense = rows[0].record["gmacs"]
    cells = []
    for row in rows:
        record, speed, gap = row.record, row.speed, row.against_dense
        if record["refused"]:
            cells.append([row.entry.label, *["-"] * (len(columns) - 1), record["refused"]])
            continue
        if task == "classes":
            line = [row.entry.label, f"{100 * record['top1']:.1f}"]
            line += ["", ""] if gap is None else [f"{100 * gap[0]:+.1f}", f"{100 * gap[1]:.1f}"]
        else:
            line = [row.entry.label, f"{record['cosine']:.4f}"]
            line += ["", ""] if gap is None else [f"{gap[1]:.4f}", f"{record['cosine_p10']:.4f}"]
        line += [f"{record[name]:.3f}" for name in ("gmacs", "gmacs_p10", "gmacs_p90")]
        line.append(f"{100 * record['gmacs'] / dense:.1f}")
        if row.entry == DENSE:
            line += ["", f"{speed['dense']:.1f}", "", ""]
        else:
            line += [f"{speed[name]:.1f}" for name in ("masked", "packed")]
            line += [f"{speed[name]:.2f}" for name in ("realised", "ideal")]
        line += [f"{1e3 * speed[name]:.1f}" for name in ("p50", "p95")]
        cells.append(line + [""] * refused)
    first = {
        "classes": "Against dense: difference in top-1 in points, image by image, and ± its standard error.",
        "embedding": "Cosine of an image's embedding to the dense one: mean, ± its standard error, 10th percentile.",
    }
    note = (
        f"{first[task]} GMACs: executed, in "
        "10⁹ multiply-accumulates, mean, 10th and 90th percentile over images. Gain: speed of the packed batch over "
        "that of the dense model, which is in its column, all models in turns; ideal: dense MACs over executed MACs. "
        "ms: one image at a time, median and 95th percentile."
    )
    return Table(columns + ["why not"] * refused, cells, note)


def _keep(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record; where that cannot be done the comparison still has it, and the next one has not."""
    try:
        write_record(path, record)
    except OSError as error:
        warn(error.strerror or str(error), stacklevel=2)


def _open_plain(config: MethodsConfig) -> AdaptiveViT:
    """The model that is compared with: a plain ViT, in evaluation mode."""
    if config.weights is None:
        model = open_model(config.model)
        _check_plain(config.model, model.config)
        return model
    vit = timm.create_model(config.model)
    if not start_from(vit, config.weights) and config.task == "classes":
        raise ValueError(f"{str(config.weights)!r} has no head of the {vit.num_classes} classes of {config.model}")
    return dense(vit).eval()


def _check_plain(model: str, own: MethodConfig | type[MethodConfig] | None) -> None:
    if own is not None and own.role != "dense":
        raise ValueError(f"{model} is {own.method} already: give a plain ViT, and this model after the folder")


def _divided(count: int, config: MethodsConfig) -> tuple[list[int], list[int]]:
    """The images set aside and those measured, of so many.

    Raises:
        ValueError: fewer than two are left to measure.
    """
    calibration = max(1, min(256, count // 5)) if config.calibration is None else config.calibration
    if count - calibration < 2:
        raise ValueError(
            f"{str(config.root)!r} has {count} images, of which {calibration} are set aside for calibration: two or "
            "more must be left to measure"
        )
    aside = [place * count // calibration for place in range(calibration)]
    others = sorted({*range(count)} - {*aside})
    limit = min(config.limit or len(others), len(others))
    return aside, [others[place * len(others) // limit] for place in range(limit)]


def _measured(
    model: AdaptiveViT | nn.Module, shape: Shape, data: Dataset, batch_size: int, workers: int, like: Tensor | None
) -> dict[str, Any]:
    """Figures of a model over a data set, with one of each image: whether it was classified rightly, or its cosine.

    Args:
        like: (images, D) the dense model's embeddings of those that can be read; None is to compare with labels.
    Raises:
        _Strays: an embedding is not finite where the dense model's is.
        ValueError: fewer than two images can be read.
    """
    each, costs, attended = [], [], torch.zeros(shape.depth, dtype=torch.long)
    unreadable: list[Unreadable] = []
    seen = 0
    for batch, output in outputs(model, data, None, batch_size, workers, labelled=like is None):
        unreadable += batch.unreadable
        if output is not None:
            if like is None:
                each.append(output.logits.argmax(dim=1).cpu() == batch.labels)
            else:
                rows = like[seen : seen + len(output.logits)]
                each.append(cosine_similarity(output.logits[: len(rows)].float(), rows.float()).cpu())
                seen += len(output.logits)
            costs.append(in_float64(macs(output.usage, shape)).cpu() / 1e9)
            attended += output.usage.attended.sum(dim=0).cpu()
    count = sum(map(len, costs))
    if like is not None and count != len(like):
        raise _Strays(f"embeddings of {count} images are finite, but the dense model's of {len(like)}")
    if count < 2:
        raise ValueError(
            "two images or more must be readable and have finite logits to be measured, got "
            f"{count} of {count + len(unreadable)}{first_of(unreadable)}"
        )
    figures, gmacs = in_float64(torch.cat(each)), torch.cat(costs)
    judged: dict[str, Any]
    if like is None:
        judged = {"top1": figures.mean().item(), "correct": "".join(map(str, figures.int().tolist()))}
    else:
        judged = {"cosine": figures.mean().item(), "cosine_p10": figures.quantile(0.1).item()}
        judged |= {"cosines": [round(one, 6) for one in figures.tolist()]}
    return judged | {
        "images": count,
        "gmacs": gmacs.mean().item(),
        "gmacs_p10": gmacs.quantile(0.1).item(),
        "gmacs_p90": gmacs.quantile(0.9).item(),
        "tokens_per_block": (attended / count).tolist(),
        "unreadable": unreadable,
    }


def _paired_by_image(record: dict[str, Any], base: dict[str, Any]) -> tuple[float, float] | None:
    """Mean and standard error of the difference in what is judged, image by image; None of `base` itself, where
    refused, and where the two are of other images, as the logits of one are not finite for some."""
    if record is base or record["refused"] or base["refused"] or record["unreadable"] != base["unreadable"]:
        return None
    own, other = (
        torch.tensor([*map(float, one["correct" if "correct" in one else "cosines"])], dtype=torch.float64)
        for one in (record, base)
    )
    gap = own - other
    return gap.mean().item(), (gap.std() / len(gap) ** 0.5).item()


def _one_by_one(model: Callable[[Tensor], object], images: Tensor) -> Callable[[], object]:
    """A call that takes the next image whenever it is called."""
    turns = cycle(images.split(1))
    return lambda: model(next(turns))


def _line(row: EntryRow, task: Task) -> dict[str, Any]:
    """A line of `methods.csv`."""
    record, gap, judged = row.record, row.against_dense, JUDGED[task].name
    line: dict[str, Any] = {"name": row.entry.name, "budget": row.entry.budget, "refused": record["refused"]}
    if record["refused"]:
        return line
    line |= {name: record[name] for name in ("images", judged)}
    line |= {f"{judged}_minus_dense": gap and gap[0], "standard_error": gap and gap[1]}
    name, other = named("reference"), row.against_reference
    line |= {f"{judged}_minus_{name}": other and other[0], f"standard_error_{name}": other and other[1]}
    line |= {name: record[name] for name in ("gmacs", "gmacs_p10", "gmacs_p90")}
    line |= {f"{name}_images_per_s": row.speed.get(name) for name in ("dense", "masked", "packed")}
    line |= {f"{name}_gain": row.speed.get(name) for name in ("ideal", "realised")}
    line |= {f"ms_{name}": 1e3 * row.speed[name] for name in ("p50", "p95")}
    line["tokens_per_block"] = " ".join(f"{count:.0f}" for count in record["tokens_per_block"])
    return line | {"config": as_json(record["config"])}


def tradeoffs(
    lines: Sequence[Mapping[str, Any]], tuned: Mapping[str, str], title: str, task: Task = "classes"
) -> dict[str, tuple[Figure, str]]:
    """Plots by file name, each with its caption.

    Args:
        lines: of `methods.csv`, the dense model first.
        tuned: the methods of the fine-tuned files, by the names of these.
        title: of both.
    """
    dense, *others = [line for line in lines if not line["refused"]]
    judged = JUDGED[task]
    label = judged.label[0].upper() + judged.label[1:]

    def plot(x: Callable[[Mapping[str, Any]], float], label: str, better: Literal["less", "more"]) -> Figure:
        curves: dict[str, list[Point]] = {}
        for line in others:
            name = f"{tuned[line['name']]}, tuned" if line["name"] in tuned else line["name"]
            curves.setdefault(name, []).append((x(line), line[judged.name], line["standard_error"] or 0.0))
        gmacs = dense["gmacs"] if better == "less" else None
        star = (1.0, dense[judged.name])
        return tradeoff(curves, star, label, (named("control"),), better, title, gmacs, judged.label)

    whiskers = "whiskers are one standard error of the difference from it, image by image."
    return {
        "accuracy_gmacs": (
            plot(lambda line: line["gmacs"] / dense["gmacs"], "share of the dense MACs, mean over images", "less"),
            f"{label} against executed MACs: further left is cheaper. The star is the dense model, the dashed line "
            f"the frontier; {whiskers}",
        ),
        "accuracy_speed": (
            plot(lambda line: line["realised_gain"] or 1.0, "measured speed over the dense model's", "more"),
            f"{label} against speed, measured in turns: further right is faster. Star, line and whiskers as above.",
        ),
    }


def _headline(rows: Sequence[EntryRow], budget: float | None, task: Task) -> str:
    """The best of the methods at one budget."""
    able = [
        row for row in rows if row.against_dense and row.entry.budget == budget and row.entry.name != named("control")
    ]
    if budget is None or not able:
        return f"{sum(row.against_dense is not None for row in rows)} models beside the dense one."
    best = max(able, key=lambda row: (row.record[JUDGED[task].name], -row.record["gmacs"]))
    alike = [row for row in able if row is best or _within_error(best, row)]
    assert best.against_dense is not None
    gap, error = (100 * part for part in best.against_dense)
    against, kept = f"{gap:+.1f} ± {error:.1f} points against dense", "most of the accuracy"
    if task == "embedding":
        against, kept = (
            f"a cosine of {best.record['cosine']:.4f} to the dense embedding",
            "embeddings nearest to the dense",
        )
    against += f", at {best.speed['realised']:.2f} times the speed"
    if len(alike) == 1:
        return f"At {budget:.0%} of the MACs {best.entry.name} keeps {kept} without training: {against}."
    names = ", ".join(row.entry.name for row in alike[:-1])
    return (
        f"At {budget:.0%} of the MACs, without training, {names} and {alike[-1].entry.name} are within two standard "
        f"errors of one another; {best.entry.name} has {against}."
    )


def _within_error(best: EntryRow, other: EntryRow) -> bool:
    """Whether two models are not told apart by two standard errors of their difference, image by image."""
    gap = _paired_by_image(best.record, other.record)
    return gap is not None and gap[0] <= 2 * gap[1]


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit compare methods MODEL ROOT [FILES...]`."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Every method that needs no training, at several budgets, and models that were fine-tuned: "
        "accuracy against MACs and measured speed. What is finished is never run again.",
    )
    parser.add_argument("name", choices=["methods"], help="The word methods.")
    parser.add_class_arguments(MethodsConfig, as_positional=True, skip={"files"})
    parser.add_argument(
        "files", nargs="*", default=[], help="Fine-tuned models of the same classes, named as MODEL is."
    )
    add_json(parser)
    return parser


def execute(arguments: Namespace) -> int:
    """Run what is not finished, and print the table; 1 where images could not be read."""
    check_json(arguments.json)
    arguments.files = tuple(arguments.files)
    config = config_of(MethodsConfig, arguments)
    outcome = compare_methods(config, lambda rows: say_table(methods_table(rows, config.task)))
    say(f"{outcome.report}: the report")
    tell_json(arguments.json, [_line(row, config.task) for row in outcome.rows])
    return say_unused(outcome.unreadable, outcome.left_out)
