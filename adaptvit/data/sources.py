"""Images in folders, tars and parquet files on any filesystem, in units that one task reads in a fixed order.

an address -> Source -> units -> pictures, encoded, by name
"""

import itertools
import os
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from adaptvit.data.folders import IMAGE_SUFFIXES, NO_IMAGES, LeftOut, list_images, natural, told
from adaptvit.data.shards import expanded
from adaptvit.data.storage import found, is_local, open_place, reach_place
from adaptvit.extras import needed
from adaptvit.files import open_file

with needed("reading from any filesystem"):
    from pyarrow import ArrowException, fs, parquet, types

TAR, PARQUET = ".tar", ".parquet"
PATHS = ("path", "file", "file_name", "filename", "image", "image_path", "url", "uri")
"""Names of a column of strings that may hold paths of images."""
MOST_UNITS = 4096
"""Units that the images of a folder are shared out to; a unit of more than one shard follows from more images."""

Picture = tuple[str, Callable[[], bytes]]
"""The name of an image, and what reads it and raises where it cannot."""


@dataclass(frozen=True)
class Unit:
    """Images that are read together, in an order that stays."""

    kind: Literal["files", "tar", "parquet"]
    names: tuple[str, ...]
    """Of the files, or of the one, from the source on."""
    size: int = 0
    """Bytes of a tar or parquet file."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return self.names[0] if len(self.names) == 1 else f"{self.names[0]} to {self.names[-1]}"


@dataclass(frozen=True)
class Source:
    """Where images are. It pickles as its address."""

    address: str
    """A folder, at any depth, or a tar or parquet file, or several by `{0000..0127}` in their name."""
    column: str | None = None
    """Of parquet files, the column with the images' bytes or paths; None finds it."""

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "column": self.column}

    @cached_property
    def _place(self) -> tuple[Any, str]:
        return reach_place(self.address)

    @property
    def _folder(self) -> str:
        """That names begin in: the source itself, or the one of its files."""
        filesystem, path = self._place
        whole = "{" not in path and filesystem.get_file_info(path).type == fs.FileType.Directory
        return path if whole else posixpath.dirname(path)

    def units(self, shard: int) -> tuple[list[Unit], tuple[LeftOut, ...]]:
        """All there is, and what is none of it.

        Args:
            shard: images of a shard, of which a unit of single files has some, all of them full but the last.
        Raises:
            FileNotFoundError: the source, or a file of it, is not there.
            ValueError: there are no images.
        """
        names, sizes, skipped = self._names()
        packed = [name for name in names if name.lower().endswith((TAR, PARQUET))]
        single = [name for name in names if not name.lower().endswith((TAR, PARQUET))]
        each = shard * max(1, len(single) // (shard * MOST_UNITS))
        units = [Unit("files", tuple(single[start : start + each])) for start in range(0, len(single), each)]
        for name in packed:
            units.append(Unit("tar" if name.lower().endswith(TAR) else "parquet", (name,), sizes.get(name, 0)))
        left_out = told(skipped)
        if not units:
            instead = "; ".join(map(str, left_out)) or f"no file ends in {' '.join((*IMAGE_SUFFIXES, TAR, PARQUET))}"
            raise ValueError(f"the source {self.address!r} holds no images: {instead}")
        self._check_column(next((name for name in packed if name.lower().endswith(PARQUET)), None))
        return units, left_out

    def _check_column(self, name: str | None) -> None:
        """Refuse parquet files, by the first, in which nothing says where images are; damaged ones come later."""
        if name is None:
            return
        try:
            with self._place[0].open_input_file(posixpath.join(self._folder, name)) as file:
                schema = parquet.read_schema(file)
        except (ArrowException, OSError):
            return
        _image_column(schema, self.column, name)

    def _names(self) -> tuple[list[str], dict[str, int], dict[str, list[str]]]:
        """Images, tars and parquet files in natural order; sizes; and what is skipped, by kind."""
        filesystem, path = self._place
        if "{" in path:
            paths = [*expanded(path)]
        elif filesystem.get_file_info(path).type == fs.FileType.Directory:
            return self._in_folder()
        else:
            paths = [path]
        infos = filesystem.get_file_info(paths)
        missing = next((info.path for info in infos if info.type != fs.FileType.File), None)
        if missing is not None:
            raise FileNotFoundError(f"the source {self.address!r} is not there: no file or folder {missing!r}")
        kinds = (TAR, PARQUET, *IMAGE_SUFFIXES)
        wrong = next((one for one in paths if not one.lower().endswith(kinds)), None)
        if wrong is not None:
            raise ValueError(f"the source {wrong!r} is neither a folder nor a file that ends in {' '.join(kinds)}")
        folder = posixpath.dirname(paths[0])
        names = [posixpath.relpath(one, folder) for one in paths]
        return names, dict(zip(names, [info.size for info in infos], strict=True)), {}

    def _in_folder(self) -> tuple[list[str], dict[str, int], dict[str, list[str]]]:
        filesystem, path = self._place
        if is_local(filesystem):
            listing = list_images(Path(path))
            skipped = {kind: list(names) for kind, names in listing.skipped.items()}
            images, others = list(listing.names), skipped.pop(NO_IMAGES, [])
            sizes = {
                name: os.stat(Path(path, name)).st_size for name in others if name.lower().endswith((TAR, PARQUET))
            }
        else:
            sizes, skipped = found(filesystem, path), {}
            hidden = {name for name in sizes if any(part.startswith(".") for part in name.split("/"))}
            images = [name for name in sizes if name.lower().endswith(IMAGE_SUFFIXES) and name not in hidden]
            others = [name for name in sizes if name not in {*images} | hidden]
        packed = [name for name in others if name.lower().endswith((TAR, PARQUET))]
        rest = [name for name in others if not name.lower().endswith((TAR, PARQUET))]
        return sorted([*images, *packed], key=natural), sizes, skipped | ({NO_IMAGES: rest} if rest else {})

    def count(self, unit: Unit) -> int:
        """Images of a unit, those included that cannot be read; of a tar after a look at all its headers."""
        try:
            with self.opened(unit) as (number, _):
                return number
        except (OSError, ValueError):  # which will be told when its turn comes
            return 0

    def first(self, units: Sequence[Unit]) -> Iterator[Callable[[], bytes]]:
        """What reads each image, from the first on; units that cannot be opened are passed over."""
        for unit in units:
            with suppress(OSError, ValueError), self.opened(unit) as (_, pictures):
                for _, read in pictures:
                    yield read

    @contextmanager
    def opened(self, unit: Unit) -> Iterator[tuple[int, Iterator[Picture]]]:
        """How many images there are, and each in turn, not read yet.

        Raises:
            OSError: the unit cannot be read.
            ValueError: a tar or a parquet file is none, or has no column of images.
        """
        filesystem, _ = self._place
        path = posixpath.join(self._folder, unit.names[0])
        if unit.kind == "files":
            yield len(unit.names), ((name, self._reader(name)) for name in unit.names)
        elif unit.kind == "parquet":
            with parquet.ParquetFile(filesystem.open_input_file(path)) as file:
                yield file.metadata.num_rows, self._rows(unit.names[0], file)
        elif is_local(filesystem):
            yield _in_tar(Path(path), unit.names[0])
        else:
            with tempfile.TemporaryDirectory() as folder:  # a tar is read from place to place
                local = Path(folder, posixpath.basename(path))
                with filesystem.open_input_stream(path) as there, open(local, "wb") as here:
                    shutil.copyfileobj(there, here, 1 << 24)
                yield _in_tar(local, unit.names[0])

    def _reader(self, name: str) -> Callable[[], bytes]:
        filesystem, _ = self._place
        path = posixpath.join(self._folder, name)

        def read() -> bytes:
            opened = open_file(path) if is_local(filesystem) else filesystem.open_input_stream(path)
            with opened as file:
                content: bytes = file.read()
            return content

        return read

    def _rows(self, name: str, file: Any) -> Iterator[Picture]:
        """The images of a parquet file, named by its rows, or by their own paths."""
        column = _image_column(file.schema_arrow, self.column, name)
        batches = file.iter_batches(batch_size=64, columns=[column])
        values = (value for batch in batches for value in batch.column(0))
        for row, value in enumerate(values):
            known = value.as_py()
            if isinstance(known, dict):
                known = known["path"] if known.get("bytes") is None else known["bytes"]
            if isinstance(known, str):
                yield known, self._elsewhere(known, posixpath.dirname(name))
            else:
                yield f"{name}/{row}", _given(known)

    def _elsewhere(self, path: str, folder: str) -> Callable[[], bytes]:
        """What reads a file that a parquet file names: from that one's folder on, unless it says where."""
        if "://" not in path:
            return self._reader(posixpath.join(folder, path))

        def read() -> bytes:
            filesystem, place = open_place(path)
            with filesystem.open_input_stream(place) as file:
                content: bytes = file.read()
            return content

        return read


def _given(content: bytes | None) -> Callable[[], bytes]:
    def read() -> bytes:
        if content is None:
            raise ValueError("its row has no image")
        return content

    return read


def _in_tar(path: Path, name: str) -> tuple[int, Iterator[Picture]]:
    listing = list_images(path)

    def reader(inside: str) -> Callable[[], bytes]:
        return lambda: listing.open(inside).read()

    return len(listing.names), ((f"{name}/{inside}", reader(inside)) for inside in listing.names)


def _image_column(schema: Any, asked: str | None, name: str) -> str:
    """The column with the images: structs with `bytes`, as `datasets` writes them, else bytes, else paths.

    Raises:
        ValueError: there is none, or not the one asked for.
    """
    if asked is not None:
        if asked not in schema.names:
            raise ValueError(f"{name!r} has no column {asked!r}, but {', '.join(schema.names)}")
        return asked
    structs = [
        field.name for field in schema if types.is_struct(field.type) and "bytes" in {one.name for one in field.type}
    ]
    contents = [field.name for field in schema if types.is_binary(field.type) or types.is_large_binary(field.type)]
    paths = [
        field.name
        for field in schema
        if (types.is_string(field.type) or types.is_large_string(field.type)) and field.name.lower() in PATHS
    ]
    fitting: Sequence[str] = next((names for names in (structs, contents, paths) if names), ())
    if len(fitting) != 1:
        which = (
            f"several that may be images, {', '.join(fitting)}"
            if fitting
            else f"no images in {', '.join(schema.names)}"
        )
        raise ValueError(f"{name!r} has {which}: name the column with --column")
    return fitting[0]


def chunks(pictures: Iterator[Picture], count: int, size: int) -> Iterator[tuple[int, bool, list[Picture]]]:
    """Pictures `size` at a time: the number of each lot, whether it is the last, and what is in it; one at least."""
    lots = max(1, -(-count // size))
    for number in range(lots):
        yield number, number == lots - 1, list(itertools.islice(pictures, size))
