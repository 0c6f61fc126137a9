"""Any filesystem that pyarrow or fsspec reaches, by an address: a path, s3://, gs://, hf://, memory:// and so on."""

import os
import posixpath
from pathlib import Path
from typing import Any

from adaptvit.extras import needed
from adaptvit.files import replacing

with needed("reading from any filesystem"):
    from pyarrow import ArrowException, fs

NATIVE = ("file", "gs", "gcs", "hdfs", "hf", "s3", "viewfs")
"""What pyarrow itself knows; others are fsspec's."""
PATIENCE = "retry_limit_seconds=20"
"""Of Google's client, which else tries for a quarter of an hour."""


def open_place(address: str) -> tuple[Any, str]:
    """A filesystem of pyarrow's, and the path in it.

    Raises:
        OSError: it cannot be reached.
        ValueError: there is no such filesystem, or not without a package that is not here.
    """
    scheme, there, _ = address.partition("://")
    if not there:
        return fs.LocalFileSystem(), os.path.abspath(address)
    uri, _, query = address.partition("?")
    cut = uri.rindex("/", 0, uri.index("{")) if "{" in uri else len(uri)  # no URI has a brace
    uri, names = uri[:cut], uri[cut:]
    asked = [query] if query else []
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
        asked.append(PATIENCE)
    if asked:
        uri += "?" + "&".join(asked)
    try:
        filesystem, path = fs.FileSystem.from_uri(uri if scheme in NATIVE else f"fsspec+{uri}")
        return filesystem, path + names
    except ImportError as error:
        raise ValueError(f"{address!r} needs a package that is not here: {error}") from None
    except (ArrowException, ValueError) as error:
        raise ValueError(f"{address!r} is on no filesystem that pyarrow or fsspec knows: {error}") from None


def reach_place(address: str) -> tuple[Any, str]:
    """`open_place`, after a look whether anybody answers there.

    Raises:
        ConnectionError: nobody does.
        ValueError: there is no such filesystem, or not without a package that is not here.
    """
    try:
        filesystem, path = open_place(address)
        if not is_local(filesystem):
            filesystem.get_file_info(path)
    except ValueError:
        raise
    except Exception as error:  # whatever a library behind fsspec raises
        told = " ".join((str(error) or type(error).__name__).split())
        raise ConnectionError(f"{address!r} cannot be reached: {told}") from None
    return filesystem, path


def is_local(filesystem: Any) -> bool:
    """Whether its paths are those of this machine."""
    return isinstance(filesystem, fs.LocalFileSystem)


def found(filesystem: Any, folder: str) -> dict[str, int]:
    """Files at any depth in a folder and their sizes, by their paths from there; nothing where there is no folder."""
    selector = fs.FileSelector(folder, allow_not_found=True, recursive=True)
    infos = [info for info in filesystem.get_file_info(selector) if info.type == fs.FileType.File]
    return {posixpath.relpath(info.path, folder): info.size for info in infos}


def write_whole(filesystem: Any, path: str, content: bytes) -> None:
    """Write a file that is whole or not there, and make its folder.

    Raises:
        OSError: it cannot be written.
    """
    filesystem.create_dir(posixpath.dirname(path), recursive=True)
    if is_local(filesystem):
        with replacing(Path(path)) as partial:
            partial.write_bytes(content)
        return
    folder, name = posixpath.split(path)
    beside = f"{folder}/.{name}.{os.urandom(4).hex()}.partial"  # others may be at the same, with the same content
    with filesystem.open_output_stream(beside) as file:
        file.write(content)
    filesystem.move(beside, path)
