"""Names of classes: files that list them, and which of them a folder's name or a label is."""

import operator
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptvit.terminal import warn


def read_names(path: Path, what: str) -> tuple[str, ...]:
    """The names in a file, one on a line, as a person reads them.

    A byte order mark, ends of lines of any system, blank lines and blanks around a name are no part of them. A name
    that stands there twice is warned of.

    Args:
        what: the setting that names the file, for messages.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, or holds no name.
    """
    names = _lines(path, what)
    if double := _double(names):
        warn(f"{what} {str(path)!r} gives two classes the name {double}: they cannot be told apart", stacklevel=2)
    return names


def read_class_map(path: Path) -> tuple[str, ...]:
    """The names of the labels 0, 1, ... in a .txt file, read as `read_names` does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text or has another suffix, holds no name, or one of them twice.
    """
    names = _lines(path, "class_map")
    if path.suffix.lower() != ".txt":
        raise ValueError(f"class_map must be a .txt file with a class name on each line, got {path.name!r}")
    if double := _double(names):
        raise ValueError(f"class_map {str(path)!r} has the name {double} twice: a class has one label")
    return names


def labels_of(folders: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """The label of each folder whose name is among those of the classes: as it stands, else but for case.

    Raises:
        ValueError: two folders are one class, or a folder is two.
    """
    exact = {name: label for label, name in enumerate(names)}
    alike: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        alike.setdefault(_plain(name), []).append(label)
    found: dict[str, int] = {}
    taken: dict[int, str] = {}
    for folder in folders:
        labels = [exact[folder]] if folder in exact else alike.get(_plain(folder), [])
        if len(labels) > 1:
            either = " and ".join(repr(names[label]) for label in labels)
            raise ValueError(f"folder {folder!r} is both {either} in class_map: give it the name of one")
        for label in labels:
            if label in taken:
                raise ValueError(f"folders {taken[label]!r} and {folder!r} are both {names[label]!r} in class_map")
            found[folder], taken[label] = label, folder
    return found


def _lines(path: Path, what: str) -> tuple[str, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"{what} is {str(path)!r}, which is not a file")
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    try:
        text = content.decode(encoding).replace("\ufeff", "")  # one in the middle is of files that were put together
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{what} {str(path)!r} is not text in UTF-8: its line {line} cannot be read") from None
    names = tuple(name for line in re.split("\r\n|\r|\n", text) if (name := line.strip()))
    if not names:
        raise ValueError(f"{what} {str(path)!r} holds no names")
    if nul := next((name for name in names if "\0" in name), None):
        raise ValueError(f"{what} {str(path)!r} is not text: it has the name {nul!r}")
    return names


def _double(names: Sequence[str]) -> str:
    seen: set[str] = set()
    return next((repr(name) for name in names if name in seen or seen.add(name)), "")  # type: ignore[func-returns-value]


def _plain(name: str) -> str:
    """Without case, and with accents in one form: file systems differ in both."""
    return unicodedata.normalize("NFC", name).casefold()


def label_number(label: Any, classes: int | None = None) -> int:
    """The number of a class, from what a data set has in its place.

    Args:
        classes: how many there are; None where that is not known.
    Raises:
        ValueError: it has none, or none of these.
    """
    try:
        number = operator.index(label)
    except TypeError:
        told = "it has no class" if label is None else f"its class is {label!r}, which is no number"
        raise ValueError(told) from None
    if number < 0:  # as the Hub's test splits have it
        raise ValueError(f"it has no class: its label is {number}")
    if classes is not None and number >= classes:
        raise ValueError(f"its class is {number}, but class_map has {classes} names, the last of {classes - 1}")
    return number
