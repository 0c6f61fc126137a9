"""What is in a tar file, and where: its files are read in place, its damaged parts are told and do not end it."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from adaptvit.files import open_file

DAMAGED = "damaged: no file can be made out there"


class Member(NamedTuple):
    """A file in a tar."""

    tar: Path
    start: int
    """Of its bytes in the tar, the outermost where one lies in another."""
    size: int
    fault: str = ""
    """Why it cannot be read; empty where it can."""

    def open(self) -> BinaryIO:
        """Its content.

        Raises:
            OSError: it cannot be read, or not to its end.
        """
        if self.fault:
            raise OSError(self.fault)
        with open_file(self.tar) as file:
            if self.start + self.size > file.seek(0, io.SEEK_END):
                raise OSError(f"cut off: {str(self.tar)!r} ends before it does")
            file.seek(self.start)
            return io.BytesIO(file.read(self.size))


@dataclass
class Tar:
    """What a tar holds, under names without `.` and leading slashes."""

    members: dict[str, Member] = field(default_factory=dict)
    """Files; of one that stands there more than once the last. A tar in it is a folder of the tar's name."""
    folders: set[str] = field(default_factory=set)
    """Folders that have an entry of their own."""
    holes: dict[str, Member] = field(default_factory=dict)
    """Damaged parts, in which files may have been."""


def scan_tar(path: Path) -> Tar:
    """Read the headers of a tar and of those in it.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no tar, or a compressed one.
    """
    with open_file(path) as file:
        found = _scanned(file, path, path.name, 0, inner=True)
    if not found.members and found.holes:
        raise ValueError(f"{str(path)!r} is not a tar file, or a compressed one: unpack it, or make it a plain .tar")
    return found


def _scanned(file: Any, path: Path, name: str, start: int, inner: bool) -> Tar:
    found = Tar()
    links: dict[str, tuple[str, str]] = {}  # where each leads, and as it says itself
    for entry in _entries(file):
        if isinstance(entry, tuple):
            first, last, fault = entry
            found.holes[f"{name}: bytes {first} to {last}"] = Member(path, start + first, last - first, fault)
            continue
        label = "/".join(part for part in entry.name.split("/") if part not in ("", "."))
        if entry.isdir():
            found.folders |= {label} - {""}
        elif entry.issym() or entry.islnk():
            beside = PurePosixPath(label).parent / entry.linkname if entry.issym() else PurePosixPath(entry.linkname)
            links[label] = _resolved(beside), entry.linkname
        elif entry.isreg() and not entry.issparse():
            links.pop(label, None)
            if inner and label.lower().endswith(".tar"):
                _put_inside(found, file, path, f"{name}/{label}", label[:-4], start + entry.offset_data, entry.size)
            else:
                found.members[label] = Member(path, start + entry.offset_data, entry.size)
        else:
            kind = "stored sparsely, which is not supported" if entry.isreg() else "a pipe or device, not a file"
            found.members[label] = Member(path, 0, 0, kind)
    for label, (target, told) in links.items():
        passed = {label}
        while target in links and target not in passed:
            passed.add(target)
            target = links[target][0]
        missing = Member(path, 0, 0, f"a link to {told!r}, which is not in the tar")
        found.members[label] = missing if target in links else found.members.get(target, missing)
    return found


def _resolved(path: PurePosixPath) -> str:
    """Without `.` and `..`."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            del parts[-1:]
        elif part != "/":
            parts.append(part)
    return "/".join(parts)


def _put_inside(found: Tar, file: Any, path: Path, name: str, label: str, start: int, size: int) -> None:
    """Add what a tar in a tar holds."""
    inside = _scanned(_Part(file, start, size), path, name, start, inner=False)
    found.folders.add(label)
    found.folders |= {f"{label}/{folder}" for folder in inside.folders}
    found.members |= {f"{label}/{member}": place for member, place in inside.members.items()}
    found.holes |= inside.holes


def _entries(file: Any) -> Iterator[tarfile.TarInfo | tuple[int, int, str]]:
    """Entries in turn, and between them, as (first, last, why), the bytes that are none."""
    size = file.seek(0, io.SEEK_END)
    tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(tarfile.BLOCKSIZE)), ignore_zeros=True)  # of nothing: it cannot fail
    tar.fileobj, tar.offset, end = file, 0, 0
    file.seek(0)
    while True:
        try:
            entry = tar.next()
        except (tarfile.TarError, ValueError, OverflowError):
            if tar.offset >= size:
                break
            tar.offset += tarfile.BLOCKSIZE
            continue
        if entry is None:
            break
        tar.members = []  # type: ignore[attr-defined]  # which it would keep
        if entry.size < 0 or tar.offset <= entry.offset:
            tar.offset = entry.offset + tarfile.BLOCKSIZE
            continue
        end = _after_global_header(file, end, entry.offset)
        if entry.offset > end and not _is_padding(file, end, entry.offset):
            yield end, entry.offset, DAMAGED
        end = tar.offset
        yield entry
    if end < size and not _is_zero(file, end, size):
        yield end, size, DAMAGED
    elif end + tarfile.BLOCKSIZE > size:
        yield min(end, size), size, "cut off: what marks the end of a tar is missing"


def _after_global_header(file: Any, first: int, last: int) -> int:
    """Where the first entry may start: `git archive` and others put one for all of them before it."""
    while last - first >= 2 * tarfile.BLOCKSIZE:
        file.seek(first)
        block = file.read(tarfile.BLOCKSIZE)
        try:
            header = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError:
            break
        if header.type != tarfile.XGLTYPE:
            break
        first += tarfile.BLOCKSIZE * (1 + -(-header.size // tarfile.BLOCKSIZE))
    return first


def _is_padding(file: Any, first: int, last: int) -> bool:
    """Whether a tar ends here and another was hung on: tars end in zeros, up to a multiple of `tarfile.RECORDSIZE`."""
    return last % tarfile.RECORDSIZE == 0 and last - first >= 2 * tarfile.BLOCKSIZE and _is_zero(file, first, last)


def _is_zero(file: Any, first: int, last: int) -> bool:
    file.seek(first)
    while first < last and (part := file.read(min(1 << 20, last - first))):
        if part.strip(b"\0"):
            return False
        first += len(part)
    return True


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: Any, start: int, size: int) -> None:
        self.file, self.start, self.size, self.place = file, start, size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.place)
        self.file.seek(self.start + self.place)
        content: bytes = self.file.read(left if size < 0 else min(size, left))
        self.place += len(content)
        return content
