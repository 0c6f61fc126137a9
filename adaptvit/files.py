"""Files that are either whole or not there, and files that others name, which may be no files."""

import csv
import io
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_is_file(path: Path | str) -> None:
    """Refuse what may never end when it is read.

    Raises:
        OSError: it cannot be looked at, is a folder, or is a pipe, a socket or a device.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        os.scandir(path).close()  # which says so where it is locked
    if not stat.S_ISREG(mode):
        raise OSError(f"{str(path)!r} is {KINDS.get(stat.S_IFMT(mode), 'something else')}, not a file")


def open_file(path: Path | str) -> BinaryIO:
    """Open a file to read its bytes.

    Raises:
        OSError: it cannot be opened, or what `check_is_file` raises.
    """
    check_is_file(path)
    return open(path, "rb")


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` to write to, which takes its place when the block ends without an error.

    It is on the disk before it does. What a writer that was killed left there of the same name is removed.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        OSError: naming `path`, where the block or the system cannot write it, as on a full disk.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    _clear_abandoned(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial, os.O_RDWR)
        os.replace(partial, path)
        if os.name == "posix":
            _sync(path.parent, os.O_RDONLY)  # the new name is not safe before
    except OSError as error:
        if error.errno is None or error.filename not in (None, partial, str(partial)):
            raise
        raise OSError(error.errno, f"cannot write {str(path)!r}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path, mode: int) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _clear_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` whose writers are no longer running."""
    if os.name != "posix":  # where asking for a process may end it
        return
    start, end = f".{path.name}.", ".partial"
    with os.scandir(path.parent) as entries:
        found = [entry.name for entry in entries if entry.name.startswith(start) and entry.name.endswith(end)]
    for name in found:
        writer = name[len(start) : -len(end)]
        if writer.isdecimal() and not _runs(int(writer)):
            path.with_name(name).unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def check_output(path: Path | str) -> None:
    """Refuse a file that could not be written, before the work whose results it is for.

    Raises:
        FileNotFoundError: its folder does not exist.
        OSError: it is there and no file, or its folder takes no files: it is locked, read-only or full.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {str(path)!r}: it is there and is no file")
    _try_to_write(path.parent, path)


def check_output_folder(path: Path | str) -> None:
    """Refuse a folder that could not be made or written to, before the work; makes nothing.

    Raises:
        OSError: a file stands in its way, or it takes no files: it is locked, read-only or full.
    """
    path = Path(path)
    there = next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
    if not there.is_dir():
        raise OSError(f"cannot write to {str(path)!r}: {str(there)!r} is there and is no folder")
    _try_to_write(there, path)


def _try_to_write(folder: Path, path: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise OSError(error.errno, f"cannot write {str(path)!r}: {error.strerror}") from error


@contextmanager
def locked(path: Path | str, wait: bool = False) -> Iterator[None]:
    """Be the only one in a block of this kind for `path`; the system takes it back from a process that was killed.

    Args:
        wait: until the others are done; False refuses.
    Raises:
        FileExistsError: another is in it.
    """
    path = Path(path)
    real = path.resolve()
    file = real.with_name(f".{real.name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise FileExistsError(f"another process is writing to {str(path)!r}: wait for it, or choose another") from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # by its holder: who waits sees it and makes another
        lock.release()


def write_atomically(path: Path | str, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; names that are none in it come out byte by byte as they are."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""How a cell begins that a spreadsheet would compute, with and without the mark that makes it text."""


def as_cell(value: object) -> object:
    """What a cell of a CSV file holds: nothing for a number that is not finite; text that a spreadsheet would compute
    gets a ' in front, as OWASP advises."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def from_cell(text: str) -> str:
    """The text that `as_cell` made a cell of."""
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def write_csv(path: Path | str, lines: Sequence[Mapping[str, object]]) -> None:
    """Write a CSV file with a column for each name in any of the lines, whole or not at all, as `as_cell` has it."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    told = [csv_line([as_cell(line.get(name)) for name in names]) for line in lines]
    write_atomically(path, "".join([csv_line(names), *told]))


def csv_line(cells: Sequence[object]) -> str:
    """Cells as a line of a CSV file, with its end; one with a line break of any kind stands between quotes."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n") + "\n"


def read_csv(path: Path, names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The header of a CSV file and its lines, cell by cell as they stand; nothing where there is no file, or no line.

    Args:
        names: columns that make it a file of this kind.
    Raises:
        ValueError: it is of another kind, or a line has more or fewer cells than the header.
    """
    if not path.exists():
        return [], []
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            lines = [line for line in csv.reader(file, strict=True) if line]
        except csv.Error as error:
            raise ValueError(f"{str(path)!r} is no CSV file: {error}") from error
    if not lines:
        return [], []
    header, *rest = lines
    if lacking := [name for name in names if name not in header]:
        raise ValueError(f"{str(path)!r} has other columns, without {', '.join(lacking)}: name another file")
    if len(set(header)) < len(header):
        raise ValueError(f"{str(path)!r} has two columns of one name: name another file")
    for number, line in enumerate(rest, start=2):
        if len(line) != len(header):
            raise ValueError(
                f"{str(path)!r} has {len(line)} cells in line {number} and {len(header)} in its header: mend it, or "
                "name another file"
            )
    return header, rest


def append_csv(path: Path, line: Mapping[str, object], names: Sequence[str]) -> None:
    """Add a line to a CSV file, and columns that its earlier lines do not have; what stands there stays as it is.

    Several processes may do so at once.

    Raises:
        ValueError: what `read_csv` raises of the file, which stays.
    """
    with locked(path, wait=True):
        header, lines = read_csv(path, names)
        columns = list(dict.fromkeys([*header, *line]))
        longer = [earlier + [""] * (len(columns) - len(header)) for earlier in lines]
        added = csv_line([as_cell(line.get(name)) for name in columns])
        write_atomically(path, "".join([csv_line(columns), *map(csv_line, longer), added]))


def as_json(value: object, indent: int | None = None) -> str:
    """A value as JSON; a number that is not finite, for which JSON has none, is null."""

    def finite(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {name: finite(inside) for name, inside in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(inside) for inside in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)
