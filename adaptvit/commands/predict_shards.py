"""Predictions shard by shard, whoever computes them: what a shard is, what is finished, what a job may cost.

    units of the source -> Job.decode, a lot of images at a time -> Job.compute, a shard written -> Record

In the output, on any filesystem: `predictions/SHARD.parquet`, a row for each image; `errors/SHARD.parquet`, where
images cannot be read; `manifest/SHARD.json`, written last, by which a shard is finished; `settings.json`, what all were
made with. SHARD is the number of the unit and that of the shard in it. Whoever computes one again writes the same.
"""

import errno
import hashlib
import json
import posixpath
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from io import BytesIO
from typing import Any

import numpy as np

from adaptvit.data.images import NOT_FINITE
from adaptvit.data.sources import Picture, Source, Unit, chunks
from adaptvit.data.storage import found, reach_place, write_whole
from adaptvit.extras import needed
from adaptvit.files import as_json
from adaptvit.measure.predictor import Predictor, expected_costs
from adaptvit.process import fault
from adaptvit.records import VERSION, plain, version
from adaptvit.weights.checkpoints import digest

with needed("predicting in shards"):
    import pyarrow
    from pyarrow import parquet


PREDICTIONS, ERRORS, MANIFEST, SETTINGS = "predictions", "errors", "manifest", "settings.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk says that takes no more."""
LOT = 192 * 2**20
"""Bytes of decoded images at most that are handed from one process to another at a time."""
READERS = 32
"""Threads that read the manifest, each entry of which is a round trip to where it lies."""
PAUSE = 0.5
"""Seconds before a second try; each further one waits twice as long."""


@dataclass(frozen=True)
class Record:
    """What is kept of a shard, or why there is none."""

    shard: str
    last: bool = False
    """Whether it is the last of its unit."""
    images: int = 0
    """Rows."""
    unreadable: int = 0
    macs: int = 0
    """Of all its images."""
    fault: str = ""
    """Why it could not be made; it is not finished then."""
    full: bool = False
    """Whether that is for want of room."""

    @property
    def unit(self) -> int:
        """The number of its unit."""
        return int(self.shard.split("-")[0])


@dataclass
class Manifest:
    """Which shards are finished, by unit, and what they come to."""

    finished: dict[int, set[str]] = field(default_factory=dict)
    ended: dict[int, int] = field(default_factory=dict)
    """Shards of the units whose last one is known."""
    images: int = 0
    unreadable: int = 0
    macs: int = 0

    def add(self, record: Record) -> bool:
        """Count a shard, once; whether it is new."""
        shards = self.finished.setdefault(record.unit, set())
        if record.shard in shards:
            return False
        shards.add(record.shard)
        if record.last:
            self.ended[record.unit] = int(record.shard.split("-")[1]) + 1
        self.images += record.images
        self.unreadable += record.unreadable
        self.macs += record.macs
        return True

    def whole(self, unit: int) -> bool:
        """Whether all shards of a unit are finished."""
        return unit in self.ended and len(self.finished[unit]) == self.ended[unit]


@dataclass(frozen=True)
class Store:
    """The output. It pickles as its address."""

    address: str

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address}

    @cached_property
    def _place(self) -> tuple[Any, str]:
        return reach_place(self.address)

    def write(self, name: str, content: bytes) -> None:
        """A file that is whole or not there."""
        filesystem, root = self._place
        write_whole(filesystem, posixpath.join(root, name), content)

    def write_table(self, name: str, table: Any) -> None:
        """A parquet file."""
        content = BytesIO()
        parquet.write_table(table, content)
        self.write(name, content.getvalue())

    def remove(self, name: str) -> None:
        """A file, where it is there."""
        filesystem, root = self._place
        if filesystem.get_file_info(posixpath.join(root, name)).is_file:
            filesystem.delete_file(posixpath.join(root, name))

    def read(self, name: str) -> Any:
        """What a JSON file holds; None where there is none.

        Raises:
            ValueError: it is damaged.
        """
        filesystem, root = self._place
        path = posixpath.join(root, name)
        if not filesystem.get_file_info(path).is_file:
            return None
        with filesystem.open_input_stream(path) as file:
            content = file.read()
        try:
            return json.loads(content)
        except ValueError:
            raise ValueError(f"{path!r} is damaged: remove it, and the same command goes on") from None

    def names(self, folder: str) -> list[str]:
        """Of the files in one of its folders."""
        filesystem, root = self._place
        return sorted(found(filesystem, posixpath.join(root, folder)))

    def manifest(self) -> Manifest:
        """What is finished."""
        manifest = Manifest()
        names = [f"{MANIFEST}/{name}" for name in self.names(MANIFEST) if name.endswith(".json")]
        with ThreadPoolExecutor(READERS) as pool:
            for record in pool.map(self.read, names):
                manifest.add(Record(**record))
        return manifest

    def is_finished(self, shard: str) -> bool:
        """Whether a shard is in the manifest."""
        filesystem, root = self._place
        return bool(filesystem.get_file_info(posixpath.join(root, MANIFEST, f"{shard}.json")).is_file)


@dataclass(frozen=True)
class Job:
    """What the processes of an engine are handed: all that decides what is in the output, and where it goes."""

    source: Source
    store: Store
    predictor: Predictor
    shard: int
    """Images of a shard, unreadable ones included."""
    tries: int = 3
    """Of what fails, before it is given up."""

    def decode(self, number: int, unit: Unit) -> Iterator[Any]:
        """A unit's images, decoded, a table of one row for each shard that is not finished, and for a fault."""
        done = -1
        for attempt in range(self.tries):
            try:
                with self.source.opened(unit) as (count, pictures):
                    for place, last, lot in chunks(pictures, count, self.shard):
                        shard = f"{number:06d}-{place:06d}"
                        if place > done and not self.store.is_finished(shard):
                            yield self._decoded(shard, last, lot)
                        done = max(done, place)
                return
            except GeneratorExit:
                raise
            except Exception as error:  # of a filesystem or a format, each of its own kind
                if attempt + 1 == self.tries:
                    why = str(error) or fault(error)
                    yield _row(Record(f"{number:06d}-{done + 1:06d}", fault=why, full=_is_full(error)))
                else:
                    time.sleep(PAUSE * 2**attempt)

    def _decoded(self, shard: str, last: bool, lot: Sequence[Picture]) -> Any:
        names, pixels, broken, reasons = [], [], [], []
        for name, read in lot:
            try:
                pixels.append(self.predictor.prepare(read()))
                names.append(name)
            except Exception as error:  # Pillow raises half a dozen kinds
                broken.append(name)
                reasons.append(" ".join((str(error) or fault(error)).split()))
        return _row(Record(shard, last), names, pixels, broken, reasons)

    def compute(self, table: Any) -> Record:
        """A row of `decode` -> its shard, written; a fault where that failed each time."""
        row = {name: table.column(name)[0] for name in table.column_names}
        record = Record(**json.loads(row["record"].as_py()))
        if record.fault:
            return record
        for attempt in range(self.tries):
            try:
                return self._written(record, row)
            except Exception as error:  # whatever a model or a filesystem raises
                why, full = fault(error), _is_full(error)
                if full:
                    break
                if attempt + 1 < self.tries:
                    time.sleep(PAUSE * 2**attempt)
        return replace(record, fault=why, full=full)

    def _written(self, record: Record, row: dict[str, Any]) -> Record:
        names, broken, reasons = (row[name].as_py() for name in ("names", "broken", "reasons"))
        channels, height, width = self.predictor.settings["input_size"]
        pixels = np.frombuffer(row["pixels"].as_buffer() or b"", np.uint8).reshape(-1, channels, height, width)
        told = self.predictor.predict(pixels) if names else self.predictor.nothing
        spoilt = [place for place, error in enumerate(told["error"]) if error is not None]
        kept = [place for place in range(len(names)) if told["error"][place] is None]
        broken += [names[place] for place in spoilt]
        reasons += [NOT_FINITE] * len(spoilt)
        columns = {name: [values[place] for place in kept] for name, values in told.items() if name != "error"}
        table = _table([names[place] for place in kept], columns, bool(self.predictor.classes))
        name = f"{record.shard}.parquet"
        if broken:
            self.store.write_table(f"{ERRORS}/{name}", pyarrow.table({"path": broken, "reason": reasons}))
        else:
            self.store.remove(f"{ERRORS}/{name}")  # of who was killed when they could not be read yet
        self.store.write_table(f"{PREDICTIONS}/{name}", table)
        macs = int(sum(map(int, columns["macs"])))
        record = replace(record, images=len(kept), unreadable=len(broken), macs=macs)
        self.store.write(f"{MANIFEST}/{record.shard}.json", as_json(asdict(record)).encode())
        return record


def _row(
    record: Record,
    names: Sequence[str] = (),
    pixels: Sequence[np.ndarray] = (),
    broken: Sequence[str] = (),
    reasons: Sequence[str] = (),
) -> Any:
    """One row, so that no engine takes a shard apart."""
    strings = pyarrow.list_(pyarrow.string())
    columns = {
        "record": pyarrow.array([as_json(asdict(record))], pyarrow.string()),
        "names": pyarrow.array([names], strings),
        "pixels": pyarrow.array([np.stack(pixels).data.cast("B") if len(pixels) else b""], pyarrow.large_binary()),
        "broken": pyarrow.array([broken], strings),
        "reasons": pyarrow.array([reasons], strings),
    }
    return pyarrow.table(columns)


def _table(names: Sequence[str], columns: dict[str, list[Any]], named: bool) -> Any:
    kinds = {
        "class": pyarrow.string() if named else pyarrow.int64(),
        "probability": pyarrow.float32(),
        "macs": pyarrow.int64(),
        "tokens": pyarrow.list_(pyarrow.int32()),
        "embedding": pyarrow.list_(pyarrow.float32()),
    }
    told = {name: pyarrow.array(values, kinds[name]) for name, values in columns.items()}
    return pyarrow.table({"path": pyarrow.array(names, pyarrow.string()), **told})


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in FULL


def images_of_lot(asked: int, predictor: Predictor) -> int:
    """Images of a shard: no more than are handed on at a time."""
    return max(1, min(asked, LOT // int(np.prod(predictor.settings["input_size"]))))


def settings_of(job: Job, units: Sequence[Unit]) -> dict[str, Any]:
    """What decides what is in the output, as JSON holds it."""
    model = job.predictor.opened
    listed = hashlib.sha256(as_json([plain(unit) for unit in units]).encode()).hexdigest()
    return {
        VERSION: version(),
        "model": digest(model, (model.config, model.shape)),
        "source": job.source.address,
        "list of images": listed,
        "shard": job.shard,
        "column": job.source.column,
        "dtype": job.predictor.dtype,
        "embedding": job.predictor.embedding,
        "preparation": json.loads(as_json(job.predictor.settings)),
    }


def check_settings(earlier: dict[str, Any], now: dict[str, Any], address: str) -> None:
    """Refuse an output that was made with others.

    Raises:
        ValueError: naming them.
    """
    if other := [name for name, value in now.items() if earlier.get(name) != value]:
        raise ValueError(
            f"{address!r} was made with another {' and '.join(other)}: choose another output, or remove it"
        )


def share_within(total: float, images: int, predictor: Predictor) -> float:
    """The share of the dense MACs at which so many images cost no more than a total, by the curve in the file.

    Raises:
        ValueError: the file has no curve, or the least that the model can compute is more.
    """
    dial = predictor.opened.dial
    if dial is None:
        predictor.opened.compute = 0.5  # which says what is missing
    assert dial is not None
    share = total / (images * predictor.dense_macs)
    least, most = dial.shares[0], dial.shares[-1]
    if share < least:
        needs = least * images * predictor.dense_macs
        raise ValueError(
            f"{images} images cost {needs:.3g} MACs at least with {predictor.model}, more than the job's {total:.3g}"
        )
    return min(share, most)


@dataclass(frozen=True)
class Pace:
    """Seconds that an image takes, as measured on a few of the job's own."""

    decoding: float
    """In one process."""
    shares: tuple[float, float]
    """Of the dense MACs: the least and the most of the model's curve, or what it computes, twice."""
    computing: tuple[float, float]
    """In one process, at each."""
    costs: tuple[float, float] | None
    """`Predictor.costs`."""


def measure_pace(job: Job, units: Sequence[Unit], images: int = 64) -> Pace | None:
    """Decode and run the first images that can be read; None where none can."""
    pixels: list[np.ndarray] = []
    tried, start = 0, time.perf_counter()
    for read in job.source.first(units):
        tried += 1
        try:
            pixels.append(job.predictor.prepare(read()))
        except Exception:  # which its shard will name
            continue
        if len(pixels) == images:
            break
    if not pixels:
        return None
    decoding, batch = (time.perf_counter() - start) / tried, np.stack(pixels)
    predictor = replace(job.predictor, costs=None)
    dial, config = predictor.opened.dial, predictor.opened.config
    ends = (1.0, 1.0) if dial is None or job.predictor.budget is not None else (dial.shares[0], dial.shares[-1])
    seconds = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the least of a curve may halt everything
        for share in ends:
            if ends[0] < ends[1]:
                predictor.opened.compute = share
            predictor.predict(batch[: predictor.batch_size])  # the first pass is slower
            start = time.perf_counter()
            told = predictor.predict(batch)
            seconds.append((time.perf_counter() - start) / len(batch))
    predictor.opened.config = config
    if ends[0] < ends[1]:
        told = predictor.predict(batch)
    costs = None if predictor.opened.even else expected_costs(batch, np.array(told["macs"], dtype=float))
    return Pace(decoding, ends, (seconds[0], seconds[1]), costs)


def share_in_time(hours: float, images: int, pace: Pace, decoders: int, actors: int) -> float:
    """The share of the dense MACs at which so many images are through in time.

    Raises:
        ValueError: decoding alone takes longer, or the model does at the least that it can compute.
    """
    seconds = 3600 * hours
    if images * pace.decoding / decoders > seconds:
        raise ValueError(
            f"decoding {images} images takes {images * pace.decoding / decoders / 3600:.2g} h with {decoders} "
            f"processes, more than the {hours:g} h of the job: give it more CPUs, or smaller pictures"
        )
    (least, most), (fast, slow) = pace.shares, pace.computing
    each = seconds * actors / images
    if each < fast:
        raise ValueError(
            f"{images} images take {images * fast / actors / 3600:.2g} h at least with {actors} of the model, more "
            f"than the {hours:g} h of the job"
        )
    return most if each >= slow else least + (most - least) * (each - fast) / (slow - fast)
