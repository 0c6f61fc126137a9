"""Images to train and to evaluate on: whatever timm reads, or scikit-learn's digits, which are installed with it.

An item is (image, label), a normalised float32 tensor (channels, height, width) and an int, or `Unreadable`.
"""

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import ImageDataset, create_dataset, create_transform
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import v2

from adaptvit.checks import In, check_fields, checked, quoted
from adaptvit.data.classes import labels_of, read_class_map
from adaptvit.data.folders import ClassFolders, LeftOut, Listing, LoosePictures, find_split, told
from adaptvit.data.images import Unreadable, decode_image, read_image
from adaptvit.data.preparation import check_settings, pixels

HELD_OUT = 360
"""Digits of the test split, of 1797."""


class Batch(NamedTuple):
    """What `collate` makes of items."""

    images: Tensor
    """(B, channels, height, width)."""
    labels: Tensor
    """(B,) int64."""
    unreadable: list[Unreadable]
    """What was left out."""


@dataclass(frozen=True)
class Data:
    """A classification problem: two splits and how their images were normalised."""

    name: str
    """What it is, in words that tell it from any other: runs and reports are known by it."""
    train: Dataset
    """Items change from visit to visit where training is augmented, by torch's, numpy's and Python's global state."""
    calibration: Dataset
    """The training split, prepared as the test split is."""
    test: Dataset
    """Items never change."""
    classes: tuple[str, ...]
    """Names of the labels 0, 1, ..."""
    channels: int
    """Channels of an image."""
    size: int | tuple[int, int]
    """Height and width of an image in pixels: one number where they are the same."""
    mean: tuple[float, ...]
    """What was subtracted from the pixels in [0, 1] of each channel."""
    std: tuple[float, ...]
    """What the difference was divided by."""
    preparation: str = ""
    """How items are made of images, where `name` does not say."""
    repeats: int = 0
    """Times a training image comes in an epoch, of as many images as there are; 0 or 1: once."""
    workers: int = 0
    """Processes that decode, for each loader."""
    left_out: tuple[LeftOut, ...] = ()
    """What lies beside the images and is not used; names begin with the split's."""

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images as they are looked at: values in [0, 1]."""
        return pixels(images, {"mean": self.mean, "std": self.std})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images are and how they are prepared; what is None comes with the model's weights."""

    root: Path | None = None
    """Folder with a folder for each split, and in it one for each class; or a tar file or folder of tars; or the cache
    of a Hub data set. None, with no `dataset`: the embedded digits."""
    dataset: str = ""
    """Name as `timm.data.create_dataset` takes it: hfds/owner/name, wds/name, torch/cifar100; empty for a folder."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "validation"
    """Split to evaluate on."""
    class_map: Path | None = None
    """File with the class names in the order of the labels, one on a line; None numbers the folders by name."""
    mean: Annotated[tuple[float, ...] | None, In("[0, 1]")] = None
    """Of the pixels in [0, 1], by channel."""
    std: Annotated[tuple[float, ...] | None, In("[0.001, 1000]")] = None
    """Of the pixels in [0, 1], by channel."""
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"] | None = None
    """How pixels are found when an image is resized."""
    crop_pct: Annotated[float | None, In("(0, 1]")] = None
    """Side of the evaluated centre crop over that of the resized image, in (0, 1]."""
    scale: Annotated[tuple[float, float], In("(0, 1]")] = (0.08, 1.0)
    """Area of a random training crop, over that of the image."""
    hflip: Annotated[float, In("[0, 1]")] = 0.5
    """Probability of mirroring a training image."""
    color_jitter: Annotated[float, In("[0, 100]")] = 0.0
    """Strength; not used together with `auto_augment`."""
    auto_augment: str | None = None
    """timm's name of a policy, such as rand-m9-mstd0.5-inc1."""
    re_prob: Annotated[float, In("[0, 1]")] = 0.0
    """Probability of erasing a random rectangle of a training image."""
    repeated_augmentation: Annotated[int, In("[0, 1024]")] = 0
    """Times each image comes in an epoch of unchanged length, as DeiT is trained; 0 or 1: once."""
    workers: Annotated[int, In("[0, 1024]")] = 2
    """Processes that decode, for each loader; 0 decodes in the training process."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.scale[0] > self.scale[1]:
            raise ValueError(
                f"DataConfig.scale must be the least and the largest area, in this order, got {self.scale}"
            )
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"DataConfig.mean and std must have as many channels, got {self.mean} and {self.std}")
        if self.auto_augment is not None:
            try:
                create_transform(32, is_training=True, auto_augment=self.auto_augment)
            except (AssertionError, LookupError, TypeError, ValueError):  # how timm says that it knows no such policy
                raise ValueError(
                    "DataConfig.auto_augment must be timm's name of a policy, such as rand-m9-mstd0.5-inc1, got "
                    f"{quoted(self.auto_augment)}"
                ) from None


class Samples(Dataset):
    """The images of a reader, ours or timm's, that finds them by number.

    An unreadable one is `Unreadable`, never another one. What is no image at all, or of no class, is in `left_out`.
    """

    def __init__(self, reader: Any, channels: int, transform: Any, left_out: Sequence[LeftOut] = ()) -> None:
        self.reader, self.channels, self.transform = reader, channels, transform
        self.left_out = tuple(left_out)

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        """Of the file, from the root of the data set."""
        return str(self.reader.filename(index))

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        try:
            file, label = self.reader[index][:2]
            with file:
                image = read_image(file, self.channels)
        except Exception as error:  # Pillow raises half a dozen kinds
            return Unreadable(self.name(index), str(error) or type(error).__name__)
        return self.transform(image), -1 if label is None else int(label)


class Handed(Dataset):
    """The images of a data set of torchvision's, which hands them out decoded."""

    def __init__(self, source: Any, channels: int, transform: Any) -> None:
        self.reader, self.channels, self.transform = source, channels, transform
        if hasattr(source, "loader"):  # it reads files
            source.loader = self._load

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        """Of the file, or the number in the data set."""
        files = getattr(self.reader, "samples", None) or getattr(self.reader, "imgs", None)
        return str(files[index][0]) if files else f"image {index}"

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        try:
            image, label = self.reader[index]
            image = decode_image(image, self.channels)
        except Exception as error:  # Pillow raises half a dozen kinds
            return Unreadable(self.name(index), str(error) or type(error).__name__)
        return self.transform(image), int(label)

    def _load(self, path: str) -> Image.Image:
        with open(path, "rb") as file:
            return read_image(file, self.channels)


class Stream(IterableDataset):
    """The images of a timm reader that hands them out one after the other, decoded."""

    def __init__(self, source: Any, channels: int, transform: Any) -> None:
        self.source, self.reader, self.channels, self.transform = source, source.reader, channels, transform

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Tensor, int] | Unreadable]:
        for number, (image, label) in enumerate(self.reader):
            try:
                image = decode_image(image, self.channels)
            except Exception as error:  # Pillow raises half a dozen kinds
                yield Unreadable(f"image {number}", str(error) or type(error).__name__)
            else:
                yield self.transform(image), int(label)


def collate(items: Sequence[Any], fill: bool = False) -> Batch:
    """Items -> a batch.

    Args:
        fill: give the place of an unreadable image to another of the same batch, so that its size stays.
    Raises:
        ValueError: with `fill`, no image of the batch is readable.
    """
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    good = [item for item in items if not isinstance(item, Unreadable)]
    if fill and unreadable:
        if not good:
            first = unreadable[0]
            raise ValueError(f"none of {len(items)} images can be read, the first being {first.name!r}: {first.reason}")
        good += [good[i % len(good)] for i in range(len(unreadable))]
    if not good:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), unreadable)
    images, labels = zip(*good, strict=True)
    return Batch(torch.stack(images), torch.tensor([int(label) for label in labels]), unreadable)


def filled(items: Sequence[Any]) -> Batch:
    """`collate`, another image taking the place of an unreadable one."""
    return collate(items, fill=True)


def open_data(config: DataConfig, settings: dict[str, Any]) -> Data:
    """Both splits of a data set; the digits where the config names none.

    Args:
        settings: input_size, mean, std, interpolation and crop_pct of the model, as
            `timm.data.resolve_data_config` gives them.
    Raises:
        FileNotFoundError: there is no such folder or split.
        ValueError: it holds no images, or those of one class only.
    """
    if config.root is None and not config.dataset:
        return digits()
    if not config.dataset:
        missing = [name for name in (config.train_split, config.test_split) if not _has_split(config, name)]
        if missing:
            raise FileNotFoundError(f"{_where(config)} has no folder {' and none '.join(map(repr, missing))}")
    train = open_split(config, settings, config.train_split, augment=True)
    calibration = open_split(config, settings, config.train_split)
    test = open_split(config, settings, config.test_split)
    if isinstance(train, Samples) and isinstance(train.reader, ClassFolders) and train.reader.empty:
        raise ValueError(f"{_where(config)} has no images of {_some(train.reader.empty)} to train on")
    classes = class_names(train, config.class_map)
    if not classes and not config.dataset:
        raise ValueError(f"{_where(config)} has images, but no folders of classes: {train.name(0)!r} lies in none")  # type: ignore[attr-defined]
    if not classes:
        raise ValueError(f"{_where(config)} does not name its classes: pass class_map")
    if len(classes) < 2:
        raise ValueError(f"{_where(config)} has images of the class {classes[0]!r} only to train on; two are the least")
    tested = class_names(test, config.class_map)
    if tested != classes:
        told = ", ".join(
            f"only {split!r} has {_some(name for name in own if name not in others)}"
            for split, own, others in ((config.train_split, classes, tested), (config.test_split, tested, classes))
            if set(own) - set(others)
        )
        raise ValueError(
            f"{_where(config)} has other classes to test on than the {len(classes)} to train on: "
            + (told or "they are in another order")
        )
    settings = _settings(config, settings)
    height, width = settings["input_size"][1:]
    sizes = [len(split) if isinstance(split, Sized) else "streamed" for split in (train, test)]
    return Data(
        name=f"{config.dataset or Path(config.root or '').name} ({sizes[0]} training and {sizes[1]} test images)",
        train=train,
        calibration=calibration,
        test=test,
        classes=classes,
        channels=settings["input_size"][0],
        size=height if height == width else (height, width),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        preparation=repr((replace(config, root=None, class_map=None, workers=0), sorted(settings.items()))),
        repeats=config.repeated_augmentation,
        workers=config.workers,
        left_out=tuple(
            replace(one, names=tuple(f"{name}/{inside}" for inside in one.names))
            for name, split in ((config.train_split, train), (config.test_split, test))
            for one in getattr(split, "left_out", ())
        ),
    )


def open_split(config: DataConfig, settings: dict[str, Any], split: str, augment: bool = False) -> Dataset:
    """One split, its images as the model expects them or augmented for training.

    A folder without one for the split, nor for another one, is taken to be the split itself.

    Raises:
        FileNotFoundError: there is no such folder, or it has other splits only.
        ValueError: it holds no images, or cannot be read with what is installed.
    """
    if not config.dataset:
        _root(config)
    names = None if config.class_map is None else read_class_map(config.class_map)
    settings = _settings(config, settings)
    channels = settings["input_size"][0]
    augmented = {
        "is_training": True,
        "scale": config.scale,
        "hflip": config.hflip,
        "color_jitter": config.color_jitter,
        "auto_augment": config.auto_augment,
        "re_prob": config.re_prob,
        "re_mode": "pixel",
    }
    transform = create_transform(**settings, **(augmented if augment else {}))
    if not config.dataset:
        folders = ClassFolders(_root(config), split, _where(config), names)
        return Samples(folders, channels, transform, folders.left_out)
    try:
        found = create_dataset(
            config.dataset,
            root=None if config.root is None else str(config.root),
            split=split,
            is_training=augment,
            input_img_mode="",  # as they are: `data.images` is to turn them into channels
        )
    except ImportError as error:
        raise ValueError(f"{_where(config)} needs a package: {error}; pip install 'adaptvit[data]'") from error
    except (RuntimeError, AssertionError, ValueError) as error:  # how timm says that it found nothing
        raise ValueError(f"{_where(config)} has no images that can be read: {_first_line(error)}") from error
    if isinstance(found, ImageDataset):
        reader = found.reader if names is None else _Renumbered(found.reader, names, _where(config))
        return Samples(reader, channels, transform, getattr(reader, "left_out", ()))
    if isinstance(found, IterableDataset):
        return Stream(found, channels, transform)
    return Handed(found, channels, transform)


class _Renumbered:
    """A data set of the Hub whose labels follow a class map; where it does not name its classes they do already.

    Attributes:
        left_out: classes that the map does not name.
    """

    def __init__(self, reader: Any, names: Sequence[str], where: str) -> None:
        own = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
        labels = labels_of(own, names) if own else {name: label for label, name in enumerate(names)}
        if own and not labels:
            raise ValueError(f"class_map names none of the classes of {where}, the first being {own[0]!r}")
        self.reader, self.class_to_idx = reader, {name: label for label, name in enumerate(names)}
        self.labels = {reader.class_to_idx[name]: labels[name] for name in labels} if own else None
        found = reader.dataset[reader.label_key]
        self.indices = [index for index, label in enumerate(found) if self.labels is None or label in self.labels]
        self.left_out = told({"classes that class_map does not name": [name for name in own if name not in labels]})

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, label = self.reader[self.indices[index]][:2]
        return file, label if self.labels is None else self.labels[label]

    def filename(self, index: int) -> str:
        """Of the file."""
        return str(self.reader.filename(self.indices[index]))


def open_pictures(listing: Listing, settings: dict[str, Any]) -> Samples:
    """Images without classes, prepared as the model expects them; their label is -1."""
    pictures = LoosePictures(listing)
    return Samples(pictures, settings["input_size"][0], create_transform(**settings), pictures.left_out)


def class_names(data: Dataset, class_map: Path | None = None) -> tuple[str, ...]:
    """Names of the labels 0, 1, ...; where the data set does not say, those of `class_map`; else empty."""
    numbers = getattr(getattr(data, "reader", data), "class_to_idx", None)
    if numbers:
        return tuple(sorted(numbers, key=numbers.__getitem__))
    return () if class_map is None else read_class_map(class_map)


def _settings(config: DataConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """What the model wants, and what the config overrides, under `create_transform`'s names."""
    names = ("mean", "std", "interpolation", "crop_pct")
    wanted = ("input_size", "crop_mode", *names)
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return check_settings({name: settings[name] for name in wanted if name in settings} | given, "the model")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _root(config: DataConfig) -> Path:
    """The folder or tar, if it is there."""
    if config.root is None or not config.root.exists():
        raise FileNotFoundError(f"{_where(config)} does not exist")
    return config.root


def _has_split(config: DataConfig, split: str) -> bool:
    return find_split(_root(config), split, _where(config)) is not None


def _some(names: Iterable[str], most: int = 3) -> str:
    """The first few, and how many more there are."""
    told = list(map(repr, names))
    return ", ".join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")


def _where(config: DataConfig) -> str:
    return f"data set {config.dataset!r}" if config.dataset else f"data folder {str(config.root)!r}"


class Images(Dataset):
    """Images in memory, each passed through `augment` when it is visited."""

    def __init__(self, images: Tensor, labels: Tensor, augment: v2.Transform | None = None) -> None:
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return (image if self.augment is None else self.augment(image)), int(self.labels[index])


@checked
def digits(
    size: Annotated[int, In("[1, 65536]")] = 32,
    margin: Annotated[int, In("[0, 65536]")] = 4,
    seed: Annotated[int, In("[0, 4294967295]")] = 0,
) -> Data:
    """Handwritten digits, 8 x 8 pixels enlarged to `size` - 2 `margin` on black; the training split moves them about.

    Args:
        size: height and width of the images, in pixels.
        margin: black pixels around the digit, at least 0 and below half of `size`.
        seed: decides which digits are held out for the test.
    Raises:
        ValueError: the margin leaves no room for a digit.
    """
    if margin >= size / 2:
        raise ValueError(f"digits' margin must lie in [0, {size / 2:g}), half its size of {size}, got {margin}")
    bunch = load_digits()
    small = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    large = interpolate(small, size=size - 2 * margin, mode="bicubic", antialias=True).clamp(0, 1)
    images = torch.nn.functional.pad(large, (margin,) * 4)
    labels = torch.as_tensor(bunch.target)
    train, test = train_test_split(range(len(labels)), test_size=HELD_OUT, stratify=bunch.target, random_state=seed)
    std, mean = torch.std_mean(images[train])
    images = (images - mean) / std
    black = float(-mean / std)
    augment = v2.RandomAffine(
        degrees=10,
        translate=(0.08, 0.08),
        scale=(0.85, 1.15),
        fill=black,
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    return Data(
        name=f"scikit-learn's digits ({size} pixels with {margin} of margin, {HELD_OUT} held out by seed {seed})",
        train=Images(images[train], labels[train], augment),
        calibration=Images(images[train], labels[train]),
        test=Images(images[test], labels[test]),
        classes=tuple(str(name) for name in bunch.target_names),
        channels=1,
        size=size,
        mean=(float(mean),),
        std=(float(std),),
    )
