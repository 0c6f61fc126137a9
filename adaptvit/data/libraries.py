"""Data sets of other libraries, handed out as our readers do: their images as bytes wherever that can be had.

timm's reader of a data set of the Hub -> HubImages
a data set of torchvision's -> TorchImages
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from adaptvit.data.classes import label_number, labels_of
from adaptvit.data.folders import LeftOut, told
from adaptvit.files import open_file


class HubImages:
    """The images of a split of the Hub, which may be a folder in its format.

    Attributes:
        class_to_idx: labels by the names of the classes; empty where it does not name them.
        left_out: classes that the class map does not name.
    """

    def __init__(self, reader: Any, names: Sequence[str] | None, where: str) -> None:
        """Make it of timm's reader.

        Args:
            names: of the classes, in the order of the labels; None takes the data set's own numbers.
            where: what the data set is called in messages.
        Raises:
            ValueError: it holds no labels, or none of the classes that are named.
        """
        self.reader = reader
        columns = reader.dataset.column_names
        if reader.label_key not in columns:
            raise ValueError(f"{where} has no column {reader.label_key!r}, but {', '.join(map(repr, columns))}")
        self.class_to_idx: dict[str, int] = dict(reader.class_to_idx)
        self.indices: Sequence[int] = range(len(reader))
        self.labels: Mapping[Any, int] | None = None
        self.left_out: tuple[LeftOut, ...] = ()
        if names is not None:
            found = list(reader.dataset[reader.label_key])
            own: Mapping[str, Any] = self.class_to_idx or {label: label for label in found if isinstance(label, str)}
            self.labels, self.left_out = renumbered(own, names, where)
            self.indices = [index for index, label in enumerate(found) if kept(label, self.labels)]
            self.class_to_idx = {name: label for label, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        row = self.reader.dataset[self.indices[index]]
        label, image = row[self.reader.label_key], row[self.reader.image_key]
        number = label_number(label if self.labels is None else self.labels.get(label, label))
        return hub_file(image), number

    def filename(self, index: int) -> str:
        """Of the file, or the number in the split."""
        image = self.reader.dataset[self.indices[index]][self.reader.image_key]
        return str((image or {}).get("path") or f"image {self.indices[index]}")


def hub_file(image: Mapping[str, Any] | None) -> BinaryIO:
    """The bytes of an image of the Hub, which has them or names a file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it has neither.
    """
    if image is not None and image.get("bytes") is not None:
        return io.BytesIO(image["bytes"])
    if image is None or not image.get("path"):
        raise ValueError("there is no image in this row")
    return open_file(image["path"])


class TorchImages:
    """The images of a data set of torchvision's: bytes where it reads files, else decoded.

    Attributes:
        class_to_idx: labels by the names of the classes; empty where it does not name them.
        left_out: classes that the class map does not name.
    """

    def __init__(self, source: Any, names: Sequence[str] | None, where: str) -> None:
        """Make it of torchvision's data set, whose own decoder is put out of use.

        Args:
            names: of the classes, in the order of the labels; None takes the data set's own numbers.
            where: what the data set is called in messages.
        Raises:
            ValueError: none of its classes is named, or it does not list its labels.
        """
        self.source = source
        if hasattr(source, "loader"):  # it reads files
            source.loader = open_file
        own = getattr(source, "wnids", None) or getattr(source, "classes", None) or ()  # ImageNet has "crane" twice
        self.class_to_idx: dict[str, int] = {str(name): label for label, name in enumerate(own)}
        self.indices: Sequence[int] = range(len(source))
        self.labels: Mapping[Any, int] | None = None
        self.left_out: tuple[LeftOut, ...] = ()
        if names is not None:
            found = getattr(source, "targets", None)
            if found is None:
                raise ValueError(f"{where} does not list its labels, so that class_map cannot number them")
            self.labels, self.left_out = renumbered(self.class_to_idx, names, where)
            self.indices = [index for index, label in enumerate(found) if kept(int(label), self.labels)]
            self.class_to_idx = {name: label for label, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.source[self.indices[index]]
        number = label_number(label)
        return image, number if self.labels is None else self.labels[number]

    def filename(self, index: int) -> str:
        """Of the file, or the number in the data set."""
        files = getattr(self.source, "samples", None) or getattr(self.source, "imgs", None)
        number = self.indices[index]
        return str(files[number][0]) if files else f"image {number}"


def renumbered(
    own: Mapping[str, Any], names: Sequence[str], where: str
) -> tuple[Mapping[Any, int] | None, tuple[LeftOut, ...]]:
    """A data set's own labels -> those of a class map, and the classes that it does not name; None stays as it is.

    Args:
        own: its labels by the names of its classes; empty where it has none, whose numbers are the map's then.
    Raises:
        ValueError: no class is named.
    """
    if not own:
        return None, ()
    labels = labels_of(list(own), names)
    if not labels:
        raise ValueError(f"class_map names none of the classes of {where}, the first being {next(iter(own))!r}")
    unnamed = [name for name in own if name not in labels]
    return {own[name]: label for name, label in labels.items()}, told({"classes that class_map does not name": unnamed})


def kept(label: Any, labels: Mapping[Any, int] | None) -> bool:
    """Whether an image of a label is one of the renumbered data set: what has no class is, to be named."""
    return labels is None or label is None or label in labels or (isinstance(label, int) and label < 0)
