"""Images in a folder or in a tar: which they are, in what order, of which class, and what is left out.

a folder or tar -> list_images -> Listing -> ClassFolders, with labels | LoosePictures, without
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from adaptvit.data.classes import labels_of
from adaptvit.data.images import Unreadable, read_image
from adaptvit.data.tars import Member, scan_tar
from adaptvit.files import check_is_file, open_file

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif"),
    *(".tiff", ".webp"),
)
"""Of the files that count as images, readable or not."""

SPLITS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"), ("test",))
"""Names of splits; those of one row mean the same."""

TAR = ".tar"
HIDDEN = "hidden"
NO_IMAGES = "without the suffix of an image"
NAMED = 3
"""Names told of what is left out."""


@dataclass(frozen=True)
class LeftOut:
    """What lies in a folder of images and is not used."""

    kind: str
    """In words."""
    count: int
    names: tuple[str, ...]
    """The first few, from the folder on."""

    def __str__(self) -> str:
        more = f" and {self.count - len(self.names)} more" if self.count > len(self.names) else ""
        return f"{self.count} {self.kind}: {', '.join(map(repr, self.names))}{more}"


@dataclass(frozen=True)
class Listing:
    """What is in a folder or a tar; names are paths from there on, with / between."""

    root: Path
    names: tuple[str, ...]
    """Of the images, `a2.png` before `a10.png`. What stands in the place of images and cannot be opened is among them:
    a pipe, a folder (its name ends in /), a damaged part of a tar."""
    barred: frozenset[str]
    """Those of what cannot be opened."""
    folders: frozenset[str]
    """Of the folders that were looked into, at any depth."""
    members: Mapping[str, Member]
    """Where the images are that lie in a tar, by name."""
    holes: frozenset[str]
    """Of the damaged parts of tars."""
    skipped: Mapping[str, Sequence[str]]
    """What is not used, by kind."""
    repeated: Mapping[str, str]
    """Links to folders that were looked into under another name, and that name."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What is not used, to be told."""
        return told(self.skipped)

    @property
    def instead(self) -> str:
        """What there is where there are no images, in words."""
        return "; ".join(map(str, self.left_out)) or f"no file ends in {' '.join(IMAGE_SUFFIXES)}"

    def open(self, name: str) -> BinaryIO:
        """The bytes of an image.

        Raises:
            OSError: it cannot be opened.
        """
        member = self.members.get(name)
        return open_file(self.root / name) if member is None else member.open()

    def within(self, folder: str) -> "Listing":
        """What is in one of the folders, under names that begin there, and the damaged parts, which may have been."""
        prefix = f"{folder}/"

        def inside(names: Iterable[str]) -> list[str]:
            return [name.removeprefix(prefix) for name in names if name.startswith(prefix) and name != prefix]

        members = {name.removeprefix(prefix): self.members[name] for name in self.members if name.startswith(prefix)}
        return replace(
            self,
            names=(*inside(self.names), *sorted(self.holes)),
            barred=frozenset(inside(self.barred)) | self.holes,
            folders=frozenset(inside(self.folders)),
            members=members | {name: self.members[name] for name in self.holes},
            skipped={kind: inside(names) for kind, names in self.skipped.items()},
            repeated={},
        )


def told(skipped: Mapping[str, Sequence[str]]) -> tuple[LeftOut, ...]:
    """What is left out, by kind, with the first few names of each."""
    return tuple(
        LeftOut(kind, len(names), tuple(sorted(names, key=natural)[:NAMED])) for kind, names in skipped.items() if names
    )


def list_images(root: Path, below: bool = True, tars: bool = False) -> Listing:
    """Find the images of a folder or a tar.

    Hidden files and folders are left out. Links to folders are followed after all else, but no folder is looked into
    twice, nor one that holds the root. A tar of one folder that has its name is that folder.

    Args:
        below: look into the root's folders.
        tars: take a tar in the root as a folder of its name.
    Raises:
        OSError: the root cannot be read.
        ValueError: a tar is none.
    """
    walk = _Walk(root, below, tars)
    if root.is_dir():
        walk.run()
        return walk.found()
    walk.put_tar(root, "")
    listing = walk.found()
    inside = [*listing.folders, *(name for name in listing.names if name not in listing.holes)]
    own = root.name[: -len(TAR)]
    wrapped = own in listing.folders and all(name == own or name.startswith(f"{own}/") for name in inside)
    return listing.within(own) if wrapped else listing


@dataclass
class _Walk:
    """A walk through a folder, and what it has come by."""

    root: Path
    below: bool
    tars: bool
    names: set[str] = field(default_factory=set)
    barred: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    members: dict[str, Member] = field(default_factory=dict)
    holes: set[str] = field(default_factory=set)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    repeated: dict[str, str] = field(default_factory=dict)
    seen: dict[tuple[int, int], str] = field(default_factory=dict)
    """Name of each folder that was met, by what the file system knows it by; empty for those that hold the root."""
    waiting: list[str] = field(default_factory=list)
    """Folders to look into, as they begin the names of what is there."""
    links: list[str] = field(default_factory=list)
    """To folders."""
    packed: list[str] = field(default_factory=list)
    """Tars in the root."""

    def found(self) -> Listing:
        return Listing(
            self.root,
            tuple(sorted(self.names, key=natural)),
            frozenset(self.barred),
            frozenset(self.folders),
            self.members,
            frozenset(self.holes),
            self.skipped,
            self.repeated,
        )

    def run(self) -> None:
        os.scandir(self.root).close()  # which says why, where it cannot be read
        for parent in (real := self.root.resolve(), *real.parents):
            self.seen[_identity(parent)] = ""
        self.waiting.append("")
        self.look()
        while self.links:
            links, self.links = sorted(self.links, key=natural), []
            for name in links:
                self.enter(name)
                self.look()
        for name in self.packed:
            if name[: -len(TAR)] in self.folders:
                self.skip("tars beside the folder of their name", name)
            else:
                self.put_tar(self.root / name, name[: -len(TAR)])

    def look(self) -> None:
        """Into the folders that wait."""
        while self.waiting:
            prefix = self.waiting.pop()
            try:
                with os.scandir(self.root / prefix) as entries:
                    for entry in entries:
                        self.meet(entry, prefix + entry.name)
            except OSError:
                self.bar(prefix)

    def meet(self, entry: "os.DirEntry[str]", name: str) -> None:
        if entry.name.startswith("."):
            self.skip(HIDDEN, name)
        elif _is(entry.is_dir):
            if not self.below:
                self.skip("folders", name)
            elif entry.is_symlink():
                self.links.append(name)
            else:
                self.enter(name)
        elif name.lower().endswith(IMAGE_SUFFIXES):
            self.names.add(name)
            if not _is(entry.is_file):
                self.barred.add(name)
        elif not _is(entry.is_file):
            self.skip("pipes, sockets, devices or broken links", name)
        elif self.tars and name.lower().endswith(TAR) and "/" not in name:
            self.packed.append(name)
        else:
            self.skip(NO_IMAGES, name)

    def enter(self, name: str) -> None:
        """Have a folder wait, unless it was met under another name."""
        try:
            identity = _identity(self.root / name)
        except OSError:
            self.folders.add(name)
            self.bar(f"{name}/")
            return
        if identity in self.seen:
            self.skip("links to folders that are read already, or hold this one", name)
            if self.seen[identity]:
                self.repeated[name] = self.seen[identity]
        else:
            self.seen[identity] = name
            self.folders.add(name)
            self.waiting.append(f"{name}/")

    def put_tar(self, path: Path, folder: str) -> None:
        """Add what a tar holds, as if it were in a folder."""
        tar, prefix = scan_tar(path), f"{folder}/" if folder else ""
        self.folders |= {folder} if folder else set()
        self.folders |= {prefix + name for name in tar.folders if not _is_hidden(name)}
        for name, member in tar.members.items():
            if _is_hidden(name):
                self.skip(HIDDEN, prefix + name)
            elif not name.lower().endswith(IMAGE_SUFFIXES):
                self.skip(NO_IMAGES, prefix + name)
            else:
                self.names.add(prefix + name)
                self.members[prefix + name] = member
                self.folders |= {prefix + str(parent) for parent in PurePosixPath(name).parents if parent.name}
                if member.fault:
                    self.barred.add(prefix + name)
        self.holes |= tar.holes.keys()
        self.names |= tar.holes.keys()
        self.barred |= tar.holes.keys()
        self.members |= tar.holes

    def bar(self, name: str) -> None:
        self.names.add(name)
        self.barred.add(name)

    def skip(self, kind: str, name: str) -> None:
        self.skipped.setdefault(kind, []).append(name)


def choose_split(folders: Sequence[str], split: str, where: str) -> str | None:
    """The folder, or tar, of a split among those of a data set; None where they are all folders of classes.

    Raises:
        FileNotFoundError: there are other splits, but not this one.
        ValueError: there are two that mean it.
    """
    plain = {name: name.lower().removesuffix(TAR) for name in folders}
    alike = next((row for row in SPLITS if split.lower() in row), (split.lower(),))
    for kind in (lambda name: not name.lower().endswith(TAR), lambda name: True):  # a folder goes before its tar
        found = [name for name in folders if plain[name] in alike and kind(name)]
        if len(found) > 1:
            raise ValueError(
                f"{where} has {' and '.join(map(repr, sorted(found)))}, which mean the same: name the one to read"
            )
        if found:
            return found[0]
    others = [name for name in sorted(folders) if any(plain[name] in row for row in SPLITS)]
    if others:
        raise FileNotFoundError(
            f"{where} has no folder {split!r}, but {', '.join(map(repr, others))}: name that split, or . for the whole"
        )
    return None


class ClassFolders:
    """The images of a split with their labels, handed out as timm's readers do.

    The class of an image is the first folder below the split, however deep it lies there.

    Attributes:
        root: the folder or tar.
        samples: name and label of each image, from the root on; None in the place of labels that are not known.
        class_to_idx: labels by the names of the classes; empty where images lie in no folders.
        empty: classes whose folders hold no images.
        left_out: what is not used.
    """

    def __init__(self, root: Path, split: str, where: str, names: Sequence[str] | None = None) -> None:
        """Find them.

        Args:
            split: name of a folder or tar in the root, or one that means the same. Where there is none and the folders
                are none of other splits, the root itself is read.
            where: what the data set is called in messages.
            names: of the classes, in the order of the labels; None numbers the folders in natural order.
        Raises:
            FileNotFoundError: there is no such split.
            ValueError: there are no images, or it is not clear of which class they are.
        """
        listing = _listed(root, split, where)
        self.listing, self.root = listing, str(listing.root)
        within = f"{where} has no images that can be read"
        if not listing.names:
            raise ValueError(f"{within}: {listing.instead}")
        folders = sorted((name for name in listing.folders if "/" not in name), key=natural)
        skipped = {kind: list(names) for kind, names in listing.skipped.items()}
        self._check_repeated(listing, names, where)
        classes = folders if names is None or not folders else names
        self.class_to_idx = {name: label for label, name in enumerate(classes)}
        labels = self.class_to_idx if names is None else labels_of(folders, names)
        if names is not None and folders:
            if not labels:
                raise ValueError(f"{within}: class_map names none of its folders, the first being {folders[0]!r}")
            skipped["folders that class_map does not name"] = [name for name in folders if name not in labels]
            known = {*labels.values()}
            skipped["names in class_map without a folder"] = [
                name for label, name in enumerate(names) if label not in known
            ]
        self.samples: list[tuple[str, int | None]] = []
        for name in listing.names:
            first, *rest = name.split("/", 1)
            if name in listing.holes or not folders:
                self.samples.append((name, None))
            elif not rest:
                skipped.setdefault("images beside the folders of classes", []).append(name)
            elif first in labels:
                self.samples.append((name, labels[first]))
        if not self.samples:
            raise ValueError(
                f"{within}: those that are there lie beside its folders, the first being {listing.names[0]!r}"
            )
        filled = {label for _, label in self.samples}
        self.empty = tuple(name for name in folders if name in labels and labels[name] not in filled)
        skipped["folders of classes without images"] = list(self.empty)
        self.left_out = told(skipped)

    @staticmethod
    def _check_repeated(listing: Listing, names: Sequence[str] | None, where: str) -> None:
        for link, other in listing.repeated.items():
            if "/" not in link and (names is None or labels_of([link], names)):
                raise ValueError(
                    f"{where} has the folders {link!r} and {other!r}, which are one: its images would be of two classes"
                )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | None]:
        name, label = self.samples[index]
        return self.listing.open(name), label

    def filename(self, index: int) -> str:
        """From the root on."""
        return self.samples[index][0]


class LoosePictures:
    """The images of a folder without classes, handed out as timm's readers do.

    Attributes:
        left_out: what is not used.
    """

    def __init__(self, listing: Listing) -> None:
        self.listing, self.left_out = listing, listing.left_out

    def __len__(self) -> int:
        return len(self.listing.names)

    def __getitem__(self, index: int) -> tuple[BinaryIO, None]:
        return self.listing.open(self.listing.names[index]), None

    def filename(self, index: int) -> str:
        """From the folder on."""
        return self.listing.names[index]


def list_folder(folder: Path, what: str, below: bool = True) -> Listing:
    """The images of a folder without classes.

    Args:
        what: the setting that names the folder, for messages.
    Raises:
        FileNotFoundError: there is no such folder.
        PermissionError: it cannot be read.
        ValueError: it holds no images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{what} is {str(folder)!r}, which is not a folder")
    try:
        listing = list_images(folder, below)
    except PermissionError:
        raise PermissionError(f"{what} is {str(folder)!r}, which cannot be read: permission denied") from None
    if not listing.names:
        raise ValueError(f"{what} is {str(folder)!r}, which holds no images: {listing.instead}")
    return listing


def find_images(folder: Path) -> list[str]:
    """Paths of the images in a folder, from there, with / between names: `a2.png` before `a10.png`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no images.
    """
    listing = list_folder(folder, "PredictConfig.folder")
    return [name for name in listing.names if name not in listing.barred]


class FolderImages(Dataset):
    """Images prepared as a model expects them; an item is (image, index) or `Unreadable`."""

    def __init__(self, folder: Path, names: Sequence[str], preparation: dict[str, Any]) -> None:
        """`preparation` is what `timm.data.resolve_model_data_config` says."""
        self.folder, self.names = folder, names
        self.channels, self.transform = preparation["input_size"][0], create_transform(**preparation)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        try:
            with open_file(self.folder / self.names[index]) as file:
                image = read_image(file, self.channels)
        except Exception as error:  # Pillow raises half a dozen kinds
            return Unreadable(self.names[index], str(error) or type(error).__name__)
        return self.transform(image), index


def natural(name: str) -> tuple[list[str | int], str]:
    """A key that orders numbers in names by value; the name itself tells those that differ in nothing else."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def find_split(root: Path, split: str, where: str, listing: Listing | None = None) -> str | None:
    """The name of a split in a folder or a tar, or of a tar in the folder; None where these are folders of classes.

    Args:
        split: the name, one that means the same, or `.` for the root itself.
        where: what the data set is called in messages.
        listing: of the root, where it is a tar and was read already.
    Raises:
        FileNotFoundError: there are other splits, but not this one.
        ValueError: there are two that mean it, or the root is neither a folder nor a tar.
    """
    if root.is_dir():
        place = root / split
        if place.is_dir() or (place.is_file() and place.suffix.lower() == TAR):
            return split
        try:
            inside = [entry.name for entry in os.scandir(root) if entry.name.lower().endswith(TAR) or _is(entry.is_dir)]
        except PermissionError:
            raise PermissionError(f"{where} cannot be read: permission denied") from None
        return choose_split(inside, split, where)
    check_is_file(root)
    if root.suffix.lower() != TAR:
        raise ValueError(f"{where} has no images that can be read: it is neither a folder nor a .tar file")
    folders = [name for name in (listing or list_images(root)).folders if "/" not in name]
    return split if split in (".", *folders) else choose_split(folders, split, where)


def _listed(root: Path, split: str, where: str) -> Listing:
    """What is in a split, or in the root where that is one."""
    try:
        if root.is_dir():
            return list_images(root / (find_split(root, split, where) or "."), tars=True)
        listing = list_images(root)
    except ValueError as error:
        raise ValueError(f"{where} has no images that can be read: {error}") from None
    chosen = find_split(root, split, where, listing)
    return listing if chosen in (None, ".") else listing.within(str(chosen))


def _identity(folder: Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _is(test: Callable[[], bool]) -> bool:
    """What an entry of a folder says of itself; false of links that end nowhere."""
    try:
        return test()
    except OSError:
        return False


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
