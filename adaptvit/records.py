"""Records: JSON files of what was computed, each with what it was computed from, by which version, and a checksum."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptvit.files import as_json, write_atomically
from adaptvit.terminal import warn

VERSION, CHECKSUM = "version of adaptvit", "sha256"
"""What a record says of itself."""


def version() -> str:
    """Of this package: figures of another are not this one's."""
    return importlib.metadata.version("adaptvit")


def plain(what: Any) -> Any:
    """Settings as JSON holds them, whatever they print as: a dataclass as its fields and their values."""
    if dataclasses.is_dataclass(what) and not isinstance(what, type):
        values = {field.name: plain(getattr(what, field.name)) for field in dataclasses.fields(what)}
        return {"kind": type(what).__name__, **values}
    if isinstance(what, Mapping):
        return {str(name): plain(value) for name, value in what.items()}
    if isinstance(what, list | tuple):
        return [plain(value) for value in what]
    if isinstance(what, os.PathLike):
        return os.fspath(what)
    if what is None or isinstance(what, bool | int | str) or (isinstance(what, float) and abs(what) < float("inf")):
        return what
    return repr(what)


def stable(what: Any) -> str:
    """The same text for the same settings, in any process and whatever the order of names."""
    return json.dumps(plain(what), sort_keys=True, allow_nan=False)


def same(stored: Any, what: Any) -> bool:
    """Whether settings that were stored as `plain` has them are these; a field that they lack had its default."""
    if dataclasses.is_dataclass(what) and not isinstance(what, type):
        own = {field.name: field for field in dataclasses.fields(what)}
        if (
            not isinstance(stored, dict)
            or stored.get("kind") != type(what).__name__
            or stored.keys() - {"kind"} - own.keys()
        ):
            return False
        return all(
            same(stored[name], getattr(what, name)) if name in stored else getattr(what, name) == _default(field)
            for name, field in own.items()
        )
    if isinstance(what, Mapping):
        named = {str(name): value for name, value in what.items()}
        if not isinstance(stored, dict) or stored.keys() != named.keys():
            return False
        return all(same(stored[name], value) for name, value in named.items())
    if isinstance(what, list | tuple):
        return isinstance(stored, list) and len(stored) == len(what) and all(map(same, stored, what))
    return bool(stored == plain(what))


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, whole or not at all."""
    told = json.loads(as_json({VERSION: version(), **record}))  # as it will be read
    write_atomically(path, json.dumps(told | {CHECKSUM: _checksum(told)}, indent=2, allow_nan=False) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """A record as it was written.

    Raises:
        FileNotFoundError: there is none.
        ValueError: naming it, where it is damaged or was changed.
    """
    try:
        record = json.loads(path.read_bytes())
        whole = isinstance(record, dict) and record.pop(CHECKSUM, None) == _checksum(record)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{str(path)!r} is damaged, or not what this version of adaptvit wrote")
    return record


def known(path: Path) -> dict[str, Any] | None:
    """A record of this version; None where there is none, or, with a warning, where it is damaged or of another."""
    if not path.exists():
        return None
    try:
        record = read_record(path)
    except (ValueError, OSError) as error:
        warn(f"{error}: computed again", stacklevel=2)
        return None
    was = record.pop(VERSION)
    if was != version():
        warn(f"{str(path)!r} is of adaptvit {was}, and this is {version()}: computed again", stacklevel=2)
        return None
    return record


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()


def contents(path: Path | None) -> str:
    """Sixteen digits of a file or a folder's files: names, sizes and times of change; empty where there is none."""
    if path is None or not path.exists():
        return ""
    found = hashlib.sha256()
    for file in [path] if path.is_file() else _files(path):
        state = file.stat()
        found.update(f"{file.relative_to(path)} {state.st_size} {state.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return found.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    """At any depth, each folder once, however many links lead to it."""
    seen, found = {folder.resolve()}, []
    for place, folders, names in os.walk(folder, followlinks=True):
        new = [name for name in sorted(folders) if (Path(place) / name).resolve() not in seen]
        seen |= {(Path(place) / name).resolve() for name in new}
        folders[:] = new
        found += [Path(place) / name for name in names]
    return sorted(file for file in found if file.exists())
