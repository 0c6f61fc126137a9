"""Images to train and to evaluate on: whatever timm reads, or scikit-learn's digits; and its photographs.

An item is (image, label), a normalised float32 tensor (channels, height, width) and an int, or `Unreadable`.
"""

import io
import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.layers import to_2tuple
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torchvision.transforms import v2

from adaptvit.checks import In, check_fields, checked, quoted
from adaptvit.data.classes import label_number, labels_of, read_class_map
from adaptvit.data.folders import IMAGE_SUFFIXES, TAR, ClassFolders, LeftOut, Listing, LoosePictures, find_split
from adaptvit.data.images import Unreadable, decode_image, first_of, read_image
from adaptvit.data.libraries import HubImages, TorchImages, hub_file
from adaptvit.data.preparation import check_settings, pixels
from adaptvit.data.shards import Shards, Split, find_shards, flow, open_sample
from adaptvit.data.video import PERHAPS_STRIPS, VIDEO_SUFFIXES, ClipFolders, Clips, check_no_strip
from adaptvit.extras import MissingLibrary, needed
from adaptvit.process import place
from adaptvit.terminal import progress_bar

HELD_OUT = 360
"""Digits of the test split, of 1797."""
SOURCES = ("hfds/", "hfids/", "wds/", "torch/")
"""How `DataConfig.dataset` begins: of the Hub, of the Hub as a stream, shards of webdataset, torchvision."""
IGNORED = -100
"""Label of a pixel that is of no class, as torch's losses have it."""
FOLDERS = ("torch/image_folder", "torch/folder")
"""Data sets of torchvision that are folders of classes, which are read as all of them are."""


class Batch(NamedTuple):
    """What `collate` makes of items."""

    images: Tensor
    """(B, channels, height, width)."""
    labels: Tensor
    """(B,) int64; of pixels (B, height, width), `IGNORED` where they are of no class."""
    unreadable: list[Unreadable]
    """What was left out."""


@dataclass(frozen=True)
class Data:
    """A classification problem, of images or of their pixels: two splits and how their images were normalised."""

    name: str
    """What it is, in words that tell it from any other: runs and reports are known by it."""
    train: Dataset
    """Items change from visit to visit where training is augmented, by torch's, numpy's and Python's global state. A
    stream that several processes train on has `set_epoch(seed)`, called once they know each other: in the order of the
    seed, which is the same in all, each then has a share of its own."""
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
    task: Literal["classes", "pixels"] = "classes"
    """Whether an image has a label or each of its pixels."""
    frames: int | None = None
    """Of clips, in whose place images stand above: an item is (frames, channels, height, width); None of images."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an item: channels, height and width; of clips frames before them."""
        one = (self.channels, *to_2tuple(self.size))
        return one if self.frames is None else (self.frames, *one)

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images as they are looked at: values in [0, 1]."""
        return pixels(images, {"mean": self.mean, "std": self.std})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images are and how they are prepared; what is left out comes with the model's weights."""

    root: Path | None = None
    """Folder with a folder for each split, and in it one for each class; or a tar file or folder of tars; or the cache
    of a Hub data set. None, with no `dataset`: the embedded digits."""
    dataset: str = ""
    """Name as `timm.data.create_dataset` takes it: hfds/owner/name, hfids/owner/name (the same as a stream), wds/name,
    torch/cifar100; empty for a folder."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str = "validation"
    """Split to evaluate on."""
    class_map: Path | None = None
    """File with the class names in the order of the labels, one on a line; None numbers the folders by name."""
    strip: Annotated[int | None, In("[1, 65536]")] = None
    """For a model that takes clips: frames of a picture that shows all of a clip, one below another; None takes videos
    and folders of frames."""
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
        if self.dataset and not self.dataset.lower().startswith(SOURCES):
            raise ValueError(
                f"DataConfig.dataset must begin with one of {', '.join(SOURCES)}, got {quoted(self.dataset)}"
            )
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
    """The images of a reader that finds them by number.

    An unreadable one is `Unreadable`, never another one. What is no image at all, or of no class, is in `left_out`.
    """

    def __init__(self, reader: Any, channels: int, transform: Any) -> None:
        self.reader, self.channels, self.transform = reader, channels, transform

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What is not used."""
        return tuple(self.reader.left_out)

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        """Of the file, from the root of the data set."""
        return str(self.reader.filename(index))

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        return _item(lambda: self.reader[index], lambda: self.name(index), self.channels, self.transform)


class Flow(IterableDataset):
    """The samples of webdataset's shards one after the other, shuffled, to train on; each process has a share of them.

    They are in no order that is known before: `Samples` of `Shards` is to evaluate on.
    """

    def __init__(self, split: Split, count: int, channels: int, transform: Any) -> None:
        """`count` samples of all processes together are an epoch."""
        self.split, self.count, self.channels, self.transform = split, count, channels, transform
        self.seed, self.place = 0, (0, 1)

    def set_epoch(self, seed: int) -> None:
        """Begin an epoch in the order of a seed, which is the same in all processes."""
        self.seed, self.place = seed, place()

    def __len__(self) -> int:
        return math.ceil(self.count / place()[1])

    def __iter__(self) -> Iterator[tuple[Tensor, int] | Unreadable]:
        worker, (process, processes) = get_worker_info(), self.place
        own, all_own = (0, 1) if worker is None else (worker.id, worker.num_workers)
        place, places = process * all_own + own, processes * all_own
        for sample in flow(self.split, place, places, math.ceil(self.count / places), self.seed):
            yield _item(
                lambda sample=sample: open_sample(self.split, sample),  # type: ignore[misc]
                lambda sample=sample: sample.name,  # type: ignore[misc]
                self.channels,
                self.transform,
            )


class Stream(IterableDataset):
    """The images that timm's reader of a Hub data set hands out one after the other."""

    def __init__(self, source: Any, channels: int, transform: Any) -> None:
        self.source, self.reader, self.channels, self.transform = source, source.reader, channels, transform
        self.count: int = self.reader.num_samples
        self.reader.dist_rank, self.reader.dist_num_replicas = 0, 1  # every process evaluates all images

    def set_epoch(self, seed: int) -> None:
        """Begin an epoch in the order of a seed, which is the same in all processes; each has a share of it."""
        self.reader.dist_rank, self.reader.dist_num_replicas = place()
        self.source.set_epoch(seed)

    def __len__(self) -> int:
        return math.ceil(self.count / (place()[1] if self.reader.is_training else 1))

    def __iter__(self) -> Iterator[tuple[Tensor, int] | Unreadable]:
        with needed("reading a stream of the Hub"):
            from datasets import Image as HubImage  # type: ignore[import-not-found, import-untyped, unused-ignore]

        reader = self.reader
        fresh = reader.ds is None  # which timm leaves to the process that reads
        if fresh:
            reader._lazy_init()
            reader.ds = reader.ds.cast_column(reader.input_key, HubImage(decode=False))
        worker = get_worker_info()
        own = "" if worker is None else f" of process {worker.id}"
        for number, (image, label) in enumerate(reader):
            name = str((image or {}).get("path") or f"image {number}{own}")
            yield _item(
                lambda image=image, label=label: (hub_file(image), label_number(label)),  # type: ignore[misc]
                lambda name=name: name,  # type: ignore[misc]
                self.channels,
                self.transform,
            )


def _item(
    source: Callable[[], tuple[Any, int | None]], name: Callable[[], str], channels: int, transform: Any
) -> tuple[Tensor, int] | Unreadable:
    """An image, of a file or as a library decoded it, and its label; -1 where there are none."""
    try:
        found, label = source()[:2]
        if isinstance(found, io.IOBase):
            with found:
                image = read_image(found, channels)
        else:
            image = decode_image(found, channels)
    except Exception as error:  # Pillow raises half a dozen kinds
        return Unreadable(name(), str(error) or type(error).__name__)
    return transform(image), -1 if label is None else label


def collate(items: Sequence[Any], fill: bool = False) -> Batch:
    """Items -> a batch.

    Args:
        fill: give the place of an unreadable image to another of the same batch, so that its size stays.
    Raises:
        TypeError: an item is neither `Unreadable` nor a tensor of floats with an int.
        ValueError: the images have several shapes.
    """
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    good = [item for item in items if not isinstance(item, Unreadable)]
    if fill and good:
        good += [good[i % len(good)] for i in range(len(unreadable))]
    if not good:
        return Batch(torch.empty(0), torch.empty(0, dtype=torch.long), unreadable)
    images, labels = zip(*map(_pair, good), strict=True)
    if len(shapes := {tuple(image.shape) for image in images}) > 1:
        raise ValueError(f"images of one batch must have one shape, got {' and '.join(map(str, sorted(shapes)))}")
    made = torch.stack(labels) if isinstance(labels[0], Tensor) else torch.tensor(labels)
    return Batch(torch.stack(images), made, unreadable)


def _pair(item: Any) -> tuple[Tensor, int | Tensor]:
    """An item of any data set as an image and its label, or those of its pixels."""
    try:
        image, label = item
        if not isinstance(item, Mapping) and image.is_floating_point():
            of_pixels = isinstance(label, Tensor) and label.shape == image.shape[-2:] and label.dtype == torch.long
            return image, label if of_pixels else operator.index(label)
        told = f"({image.dtype}, {label!r})"
    except (AttributeError, TypeError, ValueError):
        parts = item if isinstance(item, tuple | list) else [item]
        told = f"({', '.join(type(part).__name__ for part in parts)})"
    raise TypeError(f"items of a data set must be (normalised image, label), a tensor of floats and an int, got {told}")


def filled(items: Sequence[Any]) -> Batch:
    """`collate`, another image taking the place of an unreadable one."""
    return collate(items, fill=True)


def spread_over(split: Dataset, count: int) -> Batch:
    """Up to `count` readable images, spread evenly over a split.

    Raises:
        ValueError: none of them can be read.
    """
    size = len(split)  # type: ignore[arg-type]
    places = progress_bar(range(min(count, size)), "reading images", unit="image", delay=1)
    batch = collate([split[index * size // min(count, size)] for index in places])
    if not len(batch.images):
        kind = batch.unreadable[0].kind
        raise ValueError(f"none of the {kind} looked at can be read{first_of(batch.unreadable)}")
    return batch


def open_data(config: DataConfig, settings: dict[str, Any]) -> Data:
    """Both splits of a data set; the digits where the config names none.

    Args:
        settings: of the model, as `preparation` gives them: where these have `frames` it is of clips.
    Raises:
        FileNotFoundError: there is no such folder or split.
        ValueError: it holds no images, or those of one class only.
    """
    if config.root is None and not config.dataset:
        if "frames" in settings:
            raise ValueError("DataConfig.root is null, but the model takes clips: name a folder of these")
        return open_digits(channels=settings["input_size"][0] if settings else 1)
    if not config.dataset:
        missing = [name for name in (config.train_split, config.test_split) if not _has_split(config, name)]
        if missing:
            raise FileNotFoundError(f"{_where(config)} has no folder {' and none '.join(map(repr, missing))}")
    frames = settings.get("frames")
    train = open_split(config, settings, config.train_split, augment=True)
    calibration = open_split(config, settings, config.train_split)
    test = open_split(config, settings, config.test_split)
    kind, reader = "images" if frames is None else "clips", getattr(train, "reader", None)
    if isinstance(reader, ClassFolders | ClipFolders) and reader.empty:
        raise ValueError(f"{_where(config)} has no {kind} of {_some(reader.empty)} to train on")
    classes = class_names(train, config.class_map)
    if not classes and not config.dataset:
        first = train.name(0)  # type: ignore[attr-defined]
        strips = PERHAPS_STRIPS if isinstance(reader, ClipFolders) else ""
        raise ValueError(f"{_where(config)} has {kind}, but no folders of classes: {first!r} lies in none{strips}")
    if not classes:
        raise ValueError(f"{_where(config)} does not name its classes: pass class_map")
    if len(classes) < 2:
        raise ValueError(f"{_where(config)} has {kind} of the class {classes[0]!r} only to train on; two are the least")
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
    settings = _prepared(config, settings)
    height, width = settings["input_size"][1:]
    sizes = [split.count if isinstance(split, Flow | Stream) else len(split) for split in (train, test)]  # type: ignore[arg-type]
    return Data(
        name=f"{config.dataset or Path(config.root or '').name} ({sizes[0]} training and {sizes[1]} test {kind})",
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
        frames=frames,
    )


def open_split(config: DataConfig, settings: dict[str, Any], split: str, augment: bool = False) -> Dataset:
    """One split, its images as the model expects them or augmented for training.

    A folder without one for the split, nor for another one, is taken to be the split itself.

    Raises:
        FileNotFoundError: there is no such folder, or it has other splits only.
        ValueError: it holds no images, or cannot be read with what is installed.
    """
    names = None if config.class_map is None else read_class_map(config.class_map)
    frames, settings = settings.get("frames"), _prepared(config, settings)
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
    if frames is not None:
        if config.dataset:
            raise ValueError(f"{_where(config)} has no clips: these are read from folders alone, root")
        return Clips(_root(config), settings, frames, split, config.strip, names, augmented if augment else None)
    check_no_strip(config.strip, "the model")
    transform = create_transform(**settings, **(augmented if augment else {}))
    if not config.dataset or config.dataset.lower() in FOLDERS:
        return Samples(_folders(config, split, names), channels, transform)
    if config.dataset.lower().startswith("wds/"):
        shards = find_shards(_root(config), split, _where(config), None if names is None else len(names))
        if not augment:
            return Samples(Shards(shards), channels, transform)
        return Flow(shards, len(Shards(shards)) if shards.count is None else shards.count, channels, transform)
    found = _of_library(config, split, augment)
    if isinstance(found, IterableDataset):
        if names is not None and found.reader.class_to_idx and tuple(found.reader.class_to_idx) != names:  # type: ignore[attr-defined]
            raise ValueError(f"{_where(config)} names its classes, and as a stream they are not numbered by class_map")
        return Stream(found, channels, transform)
    if config.dataset.lower().startswith("hfds/"):
        return Samples(HubImages(found.reader, names, _where(config)), channels, transform)  # type: ignore[attr-defined]
    return Samples(TorchImages(found, names, _where(config)), channels, transform)


def _folders(config: DataConfig, split: str, names: Sequence[str] | None) -> ClassFolders:
    where = _where(config)
    folders = ClassFolders(_root(config), split, where, names)
    if config.dataset and names is None and [*folders.class_to_idx] != sorted(folders.class_to_idx):
        return ClassFolders(_root(config), split, where, sorted(folders.class_to_idx))  # torchvision puts 10 before 2
    return folders


def _of_library(config: DataConfig, split: str, augment: bool) -> Dataset:
    """A split of a library's data set."""
    if config.dataset.lower().startswith("torch/"):
        _root(config)
    try:
        with needed(_where(config)):
            return create_dataset(
                config.dataset,
                root=None if config.root is None else str(config.root),
                split=split,
                is_training=augment,
                input_img_mode="",  # as they are: `data.images` is to turn them into channels
            )
    except MissingLibrary:
        raise
    except ImportError as error:
        raise ValueError(f"{_where(config)} needs a package: {error}") from error
    except FileNotFoundError:
        raise
    except Exception as error:  # timm, torchvision, datasets and the Hub's client raise a dozen kinds
        raise ValueError(f"{_where(config)} has no images that can be read: {_first_line(error)}") from error


def open_pictures(listing: Listing, settings: dict[str, Any]) -> Samples:
    """Images without classes, prepared as the model expects them; their label is -1.

    Raises:
        ValueError: the model takes clips.
    """
    if "frames" in settings:
        raise ValueError(f"the model takes clips of {settings['frames']} frames, and here images alone are read")
    return Samples(LoosePictures(listing), settings["input_size"][0], create_transform(**settings))


def class_names(data: Dataset, class_map: Path | None = None) -> tuple[str, ...]:
    """Names of the labels 0, 1, ...; where the data set does not say, those of `class_map`; else empty."""
    numbers = getattr(getattr(data, "reader", data), "class_to_idx", None)
    if numbers:
        return tuple(sorted(numbers, key=numbers.__getitem__))
    return () if class_map is None else read_class_map(class_map)


def _prepared(config: DataConfig, settings: dict[str, Any]) -> dict[str, Any]:
    """What the model wants, and what the config overrides, under `create_transform`'s names."""
    names = ("mean", "std", "interpolation", "crop_pct")
    wanted = ("input_size", "crop_mode", *names)
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return check_settings({name: settings[name] for name in wanted if name in settings} | given, "the model")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _root(config: DataConfig) -> Path:
    """The folder or tar, if it is there."""
    if config.root is None:
        raise ValueError(f"{_where(config)} needs DataConfig.root, the folder that it is in")
    if not config.root.exists():
        root = f": root {str(config.root)!r}" if config.dataset else ""
        raise FileNotFoundError(f"{_where(config)}{root} does not exist")
    return config.root


def check_sources(config: DataConfig, split: str = ".", classes: bool = False) -> list[str]:
    """Refuse what can be seen, before any model is opened, to be no images, or no class names.

    Args:
        split: that the folder is to have, unless it has none at all.
        classes: whether it is to have folders of classes too, some of them named where there are class names.
    Returns:
        Their names, where they were asked for and are not in a tar or elsewhere.
    Raises:
        FileNotFoundError: naming what is not there.
        ValueError: no file in the folder is an image, a video or a tar, the class names cannot be read, or there are no
            such folders.
    """
    names = None if config.class_map is None else read_class_map(config.class_map)
    if not config.dataset and (root := _root(config)).is_dir():
        files = _files_in(root)
        if (first := next(files, None)) is None:
            raise ValueError(f"{_where(config)} has no images or clips that can be read: there is no file in it")
        kinds = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, TAR)
        if not any(name.lower().endswith(kinds) for name in chain([first], files)):
            raise ValueError(
                f"{_where(config)} has no images that can be read: none of its files, as {first!r}, is one, or a clip"
            )
        place = root / (find_split(root, split, _where(config)) or ".")
        if classes and place.is_dir():
            return _class_folders(place, names, _where(config))
    return []


def _class_folders(place: Path, names: Sequence[str] | None, where: str) -> list[str]:
    """The folders of classes; a folder without them, or of which none has the name of a class, is refused."""
    inside = sorted(name for name in os.listdir(place) if not name.startswith("."))
    if any(name.lower().endswith(TAR) for name in inside):
        return []
    folders = [name for name in inside if (place / name).is_dir()]
    if inside and not folders:
        raise ValueError(f"{where} has images, but no folders of classes: {inside[0]!r} lies in none")
    if folders and names is not None and not labels_of(folders, names):
        first = f"the first being {folders[0]!r}"
        raise ValueError(f"{where} has no images that can be read: class_map names none of its folders, {first}")
    return folders


def _files_in(root: Path) -> Iterator[str]:
    """The names of the files in a folder and those below it, no folder twice, whatever links to it."""
    seen = set()
    for folder, inside, names in os.walk(root, followlinks=True):
        yield from names
        places = {name: os.path.realpath(os.path.join(folder, name)) for name in inside}
        inside[:] = [name for name, place in places.items() if place not in seen]
        seen |= {*places.values()}


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
def open_digits(
    size: Annotated[int, In("[1, 65536]")] = 32,
    margin: Annotated[int, In("[0, 65536]")] = 4,
    seed: Annotated[int, In("[0, 4294967295]")] = 0,
    channels: Annotated[int, In("[1, 3]")] = 1,
) -> Data:
    """Handwritten digits, 8 x 8 pixels enlarged to `size` - 2 `margin` on black; the training split moves them about.

    Args:
        size: height and width of the images, in pixels.
        margin: black pixels around the digit, at least 0 and below half of `size`.
        seed: decides which digits are held out for the test.
        channels: 1, or 3 that are the same.
    Raises:
        ValueError: the margin leaves no room for a digit, or other channels.
    """
    if channels == 2:
        raise ValueError("digits are grey (1 channel) or RGB (3), not with 2 channels")
    if margin >= size / 2:
        raise ValueError(f"digits' margin must lie in [0, {size / 2:g}), half its size of {size}, got {margin}")
    with needed("reading the digits"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    bunch = load_digits()
    small = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    large = interpolate(small, size=size - 2 * margin, mode="bicubic", antialias=True).clamp(0, 1)
    images = torch.nn.functional.pad(large, (margin,) * 4)
    labels = torch.as_tensor(bunch.target)
    train, test = train_test_split(range(len(labels)), test_size=HELD_OUT, stratify=bunch.target, random_state=seed)
    std, mean = torch.std_mean(images[train])
    images = ((images - mean) / std).expand(-1, channels, -1, -1)
    black, rgb = float(-mean / std), "" if channels == 1 else ", RGB"
    augment = v2.RandomAffine(
        degrees=10,
        translate=(0.08, 0.08),
        scale=(0.85, 1.15),
        fill=black,
        interpolation=v2.InterpolationMode.BILINEAR,
    )
    return Data(
        name=f"scikit-learn's digits ({size} pixels with {margin} of margin, {HELD_OUT} held out by seed {seed}{rgb})",
        train=Images(images[train], labels[train], augment),
        calibration=Images(images[train], labels[train]),
        test=Images(images[test], labels[test]),
        classes=tuple(str(name) for name in bunch.target_names),
        channels=channels,
        size=size,
        mean=(float(mean),) * channels,
        std=(float(std),) * channels,
    )


def pan(picture: Image.Image, frames: int, side: float, across: float, down: float, speed: float) -> list[Image.Image]:
    """A clip of a window that moves over a picture, from a place to its right or left.

    Args:
        side: of the window, from a sixth of the picture's shorter side at 0 to half of it at 1.
        across, down: where it begins, from the left and upper end at 0.
        speed: how far it comes, in sides of the window: from none at 0 to half of one at 1.
    """
    length = round(min(picture.size) * (1 + 2 * side) / 6)
    room, top = picture.width - length, round(down * (picture.height - length))
    start, way = across * room, speed * length / 2
    way = way if start + way <= room else -way
    lefts = [round(start + way * at / max(1, frames - 1)) for at in range(frames)]
    return [picture.crop((left, top, left + length, top + length)) for left in lefts]


def photographs() -> list[Image.Image]:
    """scikit-learn's two photographs, 640 pixels wide, in colour."""
    with needed("reading the sample photographs"):
        from sklearn.datasets import load_sample_images
    return [Image.fromarray(photograph) for photograph in load_sample_images().images]
