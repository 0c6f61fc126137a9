"""`adaptvit predict MODEL SOURCE OUT --engine ray`: more images than a folder holds, on Ray Data.

Ray's tasks decode and its actors hold the model; what they are handed is a `Job`, what comes back are `Record`s.
"""

import errno
import json
import logging
import os
import pickle
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from jsonargparse import ArgumentParser, Namespace

from adaptvit.checks import In, check_fields
from adaptvit.commands.console import add_json, check_json, config_of, tell_json
from adaptvit.commands.predict_shards import (
    ERRORS,
    MANIFEST,
    SETTINGS,
    Job,
    Record,
    Store,
    check_settings,
    images_of_lot,
    measure_pace,
    settings_of,
    share_in_time,
    share_within,
)
from adaptvit.data.folders import LeftOut
from adaptvit.data.sources import Source, Unit
from adaptvit.extras import needed
from adaptvit.files import as_json, check_output_folder, locked
from adaptvit.measure.predictor import Predictor
from adaptvit.terminal import progress_bar, say

T = TypeVar("T")
REACHED_IN = 10
"""Seconds in which a cluster must answer."""
NAMED = 10
"""Shards that are named at the end, of those that failed."""


@dataclass(frozen=True)
class ScaleConfig:
    """Which images, through which model, to where, and what the whole may cost."""

    model: str
    """A file, folder, repository (`hf-hub:OWNER/NAME`) or timm name of a ViT, to be found on every node."""
    source: str
    """A folder, tars or parquet files, here or on any filesystem of pyarrow's or fsspec's: s3://, gs://, hf://."""
    output: str
    """A folder for the shards, here or on such a filesystem; one that an interrupted run left is gone on with."""
    engine: Literal["ray"] = "ray"
    """Where it runs."""
    address: str | None = None
    """Of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT; None starts Ray on this machine."""
    actors: Annotated[int, In("[1, inf)")] | None = None
    """Processes with the model; None takes one for each GPU, or three quarters of the CPUs where there is none."""
    budget: Annotated[float, In("(0, 1]", "the share of the dense MACs", "60 % is 0.6")] | None = None
    """Share of the dense MACs that images are to cost, by the curve in the model's file."""
    total_macs: Annotated[float, In("(0, inf)")] | None = None
    """MACs that all images together may cost: sets the budget by that curve."""
    hours: Annotated[float, In("(0, inf)")] | None = None
    """Hours in which all images are to be through: sets the budget by that curve and a measurement."""
    embedding: bool = False
    """Write what the classifier reads of each image, too."""
    batch_size: Annotated[int, In("[1, inf)")] = 32
    """Images in a forward pass."""
    shard: Annotated[int, In("[1, inf)")] = 1024
    """Images in a file of the output, and in what is done again after an interruption; fewer where they are large."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and features."""
    compile: bool = False
    """Run the model under `torch.compile`."""
    device: Literal["cpu", "cuda"] | None = None
    """Where the model runs; None takes GPUs where Ray has some."""
    column: str | None = None
    """Of parquet files, the column with images or their paths; None finds it."""
    tries: Annotated[int, In("[1, 100]")] = 3
    """Of a shard that fails, or whose process dies, before it is named and skipped."""

    def __post_init__(self) -> None:
        check_fields(self)
        asked = [name for name in ("budget", "total_macs", "hours") if getattr(self, name) is not None]
        if len(asked) > 1:
            raise ValueError(f"ScaleConfig has {' and '.join(asked)}, which set the same: leave all out but one")


@dataclass(frozen=True)
class Scaled:
    """What there is once every shard has had its turn."""

    images: int
    """Rows, those of earlier runs included."""
    earlier: int
    unreadable: int
    share: float
    """Of the dense MACs, what they cost."""
    macs: int
    faults: tuple[Record, ...]
    """Shards that failed each time, and units whose process died each time."""
    left: int | None
    """Images of these; None where they were not counted."""
    left_out: tuple[LeftOut, ...]
    """What lies in the source and is no image."""


def predict_at_scale(config: ScaleConfig) -> Scaled:
    """Every image of the source once, whatever is killed, and however often, before the same is called again.

    Raises:
        ConnectionError: there is no cluster at the address.
        FileExistsError: another run on this machine writes to the output.
        MissingLibrary: Ray is not here.
        OSError: the output cannot be written; what is finished stays.
        ValueError: there are no images, the output was made with other settings, or the budget cannot be met.
    """
    with needed("--engine ray"):
        import ray  # noqa: F401
    here = "://" not in config.output
    if here:
        check_output_folder(config.output)
        Path(config.output).mkdir(parents=True, exist_ok=True)
    predictor = Predictor(
        config.model, config.dtype, config.compile, config.budget, config.embedding, config.batch_size, config.device
    )
    shard = images_of_lot(config.shard, predictor)
    job = Job(Source(config.source, config.column), Store(config.output), predictor, shard, config.tries)
    engine = RayEngine(config)
    with redirect_stdout(sys.stderr):  # of what Ray says when a process dies
        try:
            with locked(Path(config.output, SETTINGS)) if here else nullcontext():
                return run(job, config, engine)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; the same command goes on with {config.output!r}") from None
        finally:
            engine.close()


class InProcess:
    """The engine that has no other processes: what Ray is compared with."""

    decoders = actors = 1

    def start(self) -> None:
        """Nothing to be done."""

    def call(self, work: Callable[..., T], *given: Any) -> T:
        """Call it where the model runs."""
        return work(*given)

    def counts(self, job: Job, units: Sequence[Unit]) -> list[int]:
        """Images of each unit."""
        return [job.source.count(unit) for unit in units]

    def records(self, job: Job, units: Sequence[tuple[int, Unit]]) -> Iterator[Record]:
        """The shards of the units, as they are written."""
        for number, unit in units:
            for table in job.decode(number, unit):
                yield job.compute(table)


class RayEngine:
    """Ray Data on a cluster, or on this machine.

    Attributes:
        decoders: tasks that decode at a time.
        actors: processes with the model.
    """

    def __init__(self, config: ScaleConfig) -> None:
        self.config, self.own = config, False
        self.ray: Any = None
        self.decoders = self.actors = 1

    def start(self) -> None:
        """Connect, and count what there is.

        Raises:
            ConnectionError: there is no cluster at the address, or none starts here.
            ValueError: it has fewer GPUs than actors are asked for.
        """
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of its C++ side, whose lines are no sentences
        with needed("--engine ray"):
            import ray
            import ray.data
        self.ray, self.own = ray, not ray.is_initialized()
        address = self.config.address
        if self.own:
            _check_reached(address)
            told: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            told |= {"address": "local", "include_dashboard": False} if address is None else {"address": address}
            try:
                ray.init(**told)
            except Exception as error:  # of which it has a dozen kinds, the plain one among them
                where = "on this machine" if address is None else f"at {address!r}"
                raise ConnectionError(f"Ray did not start {where}: {' '.join(str(error).split())}") from error
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is in the records
        there = ray.cluster_resources()
        cpus, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0))
        on_gpus = self.config.device == "cuda" or (self.config.device is None and gpus > 0)
        self.actors = self.config.actors or (gpus if on_gpus else max(1, 3 * cpus // 4))
        if on_gpus and self.actors > gpus:
            raise ValueError(
                f"{max(1, self.actors)} actors on GPUs, of which Ray finds {gpus}: ask for less, or --device cpu"
            )
        self.decoders = max(1, cpus - self.actors)
        self.resources = {"num_cpus": int(self.actors < cpus), "num_gpus": int(on_gpus)}

    def close(self) -> None:
        """End what was started here."""
        if self.ray is not None and self.own:
            self.ray.shutdown()

    def call(self, work: Callable[..., T], *given: Any) -> T:
        """Call it where the model runs."""
        told: T = self.ray.get(self.ray.remote(**self.resources)(work).remote(*given))
        return told

    def counts(self, job: Job, units: Sequence[Unit]) -> list[int]:
        """Images of each unit."""
        count = self.ray.remote(num_cpus=1)(lambda unit: job.source.count(unit))
        return self.ray.get([count.remote(unit) for unit in units])

    def records(self, job: Job, units: Sequence[tuple[int, Unit]]) -> Iterator[Record]:
        """The shards of the units, as they are written, in any order; none of what died with its process each time."""
        if not units:
            return
        data = self.ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars, context.max_errored_blocks = False, -1
        items = [{"number": number, "unit": pickle.dumps(unit)} for number, unit in units]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how often a task is tried, which goes by another name from Ray 2.64 on
            decoded = data.from_items(items, override_num_blocks=len(items)).map_batches(
                _decode, batch_size=1, fn_kwargs={"job": job}, num_cpus=1, max_retries=job.tries - 1
            )  # other arguments than the actors', with which Ray would run it in them
            written = decoded.map_batches(
                _Model,
                batch_size=1,
                batch_format="pyarrow",
                fn_constructor_args=(job,),
                compute=data.ActorPoolStrategy(size=self.actors),
                max_task_retries=job.tries - 1,
                **self.resources,
            )
        for row in written.iter_rows():
            yield Record(**json.loads(row["record"]))


def _decode(batch: dict[str, Any], job: Job) -> Iterator[Any]:
    yield from job.decode(int(batch["number"][0]), pickle.loads(batch["unit"][0]))


class _Model:
    """A process with the model."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, table: Any) -> dict[str, list[str]]:
        return {"record": [as_json(asdict(self.job.compute(table)))]}


def _check_reached(address: str | None) -> None:
    """Refuse a cluster that does not answer, for which Ray would wait."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if address is None or not colon:
        return
    try:
        socket.create_connection((host, int(port)), REACHED_IN).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ConnectionError(f"no Ray cluster answers at {address!r}: {error}") from None


def run(job: Job, config: ScaleConfig, engine: InProcess | RayEngine) -> Scaled:
    """The same on any engine."""
    units, left_out = job.source.units(job.shard)
    settings = settings_of(job, units)
    settings["budget"] = {name: getattr(config, name) for name in ("budget", "total_macs", "hours")}
    earlier = job.store.read(SETTINGS)
    if earlier is None and job.store.names(MANIFEST):
        raise ValueError(f"{config.output!r} is there without its {SETTINGS!r}: choose another output, or remove it")
    if earlier is not None:
        check_settings(earlier, settings, config.output)
    manifest = job.store.manifest()
    waiting = [(number, unit) for number, unit in enumerate(units) if not manifest.whole(number)]
    if waiting or earlier is None:
        engine.start()
    if earlier is None:
        earlier = settings | _set_up(job, config, engine, units)
        job.store.write(SETTINGS, as_json(earlier, indent=2).encode())
    kept = {"budget": earlier["share"], "costs": earlier["costs"] and tuple(earlier["costs"])}
    if kept != {name: getattr(job.predictor, name) for name in kept}:
        job = replace(job, predictor=replace(job.predictor, **kept))
    dense, faults = job.predictor.dense_macs, {}
    before = manifest.images
    with progress_bar(
        None, "predicting", total=earlier["images"], initial=before + manifest.unreadable, unit="image", stays=True
    ) as bar:
        for record in engine.records(job, waiting):
            if record.full:
                raise OSError(
                    errno.ENOSPC,
                    f"{config.output!r} cannot be written, the same command goes on with it: "
                    f"{os.strerror(errno.ENOSPC)}",
                )
            if record.fault:
                faults[record.unit] = record
            elif manifest.add(record):
                bar.set_postfix_str(
                    f"{manifest.macs / (max(1, manifest.images) * dense):.1%} of the MACs", refresh=False
                )
                bar.update(record.images + record.unreadable)
    died = f"its process died {job.tries} times, and what is left of it is not done"
    for number, _ in waiting:
        if not manifest.whole(number) and number not in faults:
            faults[number] = Record(f"{number:06d}-{len(manifest.finished.get(number, ())):06d}", fault=died)
    named = [replace(fault, fault=f"{units[fault.unit].name}: {fault.fault}") for fault in faults.values()]
    share, total = manifest.macs / (max(1, manifest.images) * dense), earlier["images"]
    left = None if total is None else total - manifest.images - manifest.unreadable
    return Scaled(manifest.images, before, manifest.unreadable, share, manifest.macs, tuple(named), left, left_out)


def _set_up(job: Job, config: ScaleConfig, engine: InProcess | RayEngine, units: Sequence[Unit]) -> dict[str, Any]:
    """What is found out at the first start, and stays: images, share of the dense MACs, what costs are expected by."""
    asked = config.total_macs is not None or config.hours is not None
    far = any(unit.kind == "tar" for unit in units) and "://" in config.source
    images = sum(engine.counts(job, units)) if asked or not far else None  # else every tar would be read twice
    share = config.budget
    if config.total_macs is not None:
        share = share_within(config.total_macs, images or 1, job.predictor)
        job = replace(job, predictor=replace(job.predictor, budget=share))
    costs = None
    if config.hours is not None or not job.predictor.opened.even:
        pace = engine.call(measure_pace, job, units)
        costs = pace and pace.costs
        if config.hours is not None and pace is not None:
            share = share_in_time(config.hours, images or 1, pace, engine.decoders, engine.actors)
    return {"images": images, "share": share, "costs": costs}


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit predict MODEL SOURCE OUT --engine ray`."""
    parser = ArgumentParser(description="Class, MACs and tokens of every image of a source, in parquet shards, on Ray.")
    parser.add_class_arguments(ScaleConfig, as_positional=True)
    add_json(parser)
    return parser


def execute(arguments: Namespace) -> int:
    """Write the shards; 1 where images could not be read, or shards not be made."""
    config = config_of(ScaleConfig, arguments)
    check_json(arguments.json)
    done = predict_at_scale(config)
    for other in done.left_out:
        say(f"adaptvit: left out: {other}", sys.stderr)
    earlier = f", {done.earlier} of them from earlier runs" if done.earlier else ""
    say(f"{config.output}: {done.images} images{earlier}, {done.share:.1%} of the dense MACs, {done.macs:.4g} in all")
    if config.total_macs is not None:
        say(f"{done.macs / config.total_macs:.1%} of the MACs that the job may cost")
    if done.unreadable:
        say(f"adaptvit: {done.unreadable} images could not be read: {config.output}/{ERRORS} names them", sys.stderr)
    for record in done.faults[:NAMED]:
        say(f"adaptvit: shard {record.shard} failed {config.tries} times and is left out: {record.fault}", sys.stderr)
    if done.faults:
        lost = "" if done.left is None else f", with {done.left} images"
        say(f"adaptvit: {len(done.faults)} shards failed{lost}; the same command tries them again", sys.stderr)
    figures = {"images": done.images, "earlier": done.earlier, "share": done.share, "macs": done.macs}
    failed = [{"shard": record.shard, "fault": record.fault} for record in done.faults]
    tell_json(
        arguments.json,
        {"output": config.output, **figures, "unreadable": done.unreadable, "faults": failed, "left": done.left},
    )
    return 1 if done.unreadable or done.faults else 0
