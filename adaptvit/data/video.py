"""Clips: frames evenly spaced over a video file, a folder of pictures, or a strip, prepared as a model takes them.

A strip is one picture of all frames of a clip, one below another.

    read_clip    one clip -> its frames
    Clips        a data set of them: an item is (clip, label) or `Unreadable`
"""

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from adaptvit.data.classes import labels_of
from adaptvit.data.folders import IMAGE_SUFFIXES, TAR, ClassFolders, LeftOut, find_split, natural, told
from adaptvit.data.images import Unreadable, decode_image, open_image, read_image
from adaptvit.extras import needed
from adaptvit.files import open_file

VIDEO_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")
"""Of the files that count as videos, readable or not."""

PERHAPS_STRIPS = "; where its pictures are strips of frames, strip says of how many"
"""What is added where clips are found in no folders of classes: a folder of pictures is one clip."""


def evenly(count: int, frames: int) -> list[int]:
    """The numbers, from 0, of so many frames in the middles of equal parts of a clip of `count` frames.

    Raises:
        ValueError: there are fewer.
    """
    if count < frames:
        raise ValueError(f"it has {count or 'no'} frames, but {frames} are asked for")
    return [(2 * place + 1) * count // (2 * frames) for place in range(frames)]


def read_clip(source: Any, frames: int, strip: int | None = None, channels: int = 3) -> list[Image.Image]:
    """Frames of a clip, evenly spaced over all it has, as 8-bit grey (1 channel) or RGB (3).

    Args:
        source: a folder of pictures, in the order of their names; or a file: a strip of `strip` frames where that is
            given, else a video.
        frames: that are wanted.
        strip: frames of a strip.
    Raises:
        ValueError: it has fewer frames, frames of different sizes, or is truncated.
        Exception: of several kinds, where it cannot be decoded.
    """
    if isinstance(source, Path) and source.is_dir():
        return _of_folder(source, frames, channels)
    return _of_video(source, frames, channels) if strip is None else _of_strip(source, frames, strip, channels)


def check_no_strip(strip: int | None, who: str) -> None:
    """Refuse strips for a model that takes images.

    Raises:
        ValueError: naming it.
    """
    if strip is not None:
        raise ValueError(f"strip is {strip}, for clips, but {who} takes images")


def _of_strip(source: Any, frames: int, strip: int, channels: int) -> list[Image.Image]:
    image = read_image(source, channels)
    high, rest = divmod(image.height, strip)
    if rest:
        raise ValueError(f"its height of {image.height} pixels is no whole number of pixels for each of {strip} frames")
    return [image.crop((0, at * high, image.width, (at + 1) * high)) for at in evenly(strip, frames)]


def _of_folder(folder: Path, frames: int, channels: int) -> list[Image.Image]:
    with os.scandir(folder) as entries:
        names = sorted((one.name for one in entries if one.name.lower().endswith(IMAGE_SUFFIXES)), key=natural)
    chosen = [names[at] for at in evenly(len(names), frames)]
    images = []
    for name in chosen:
        try:
            images.append(decode_image(open_image(folder / name), channels))
        except Exception as error:  # Pillow raises half a dozen kinds
            raise ValueError(f"its frame {name}: {str(error) or type(error).__name__}") from error
    _check_sizes([image.size for image in images], chosen)
    return images


def _of_video(source: Any, frames: int, channels: int) -> list[Image.Image]:
    with needed("reading videos"):
        import av
    file = str(source) if isinstance(source, Path) else source
    if isinstance(source, Path) and not source.stat().st_size:
        raise ValueError("it is empty")

    def each() -> Any:
        try:
            with av.open(file) as container:
                if not container.streams.video:
                    raise ValueError("it has no pictures")
                yield container.streams.video[0].frames
                yield from container.decode(video=0)
        except av.FFmpegError as error:
            raise ValueError(f"it is no video, or truncated or damaged: {error.strerror}") from error

    decoded = each()
    told_count = next(decoded)
    sizes = [(frame.width, frame.height) for frame in decoded]  # twice decoded, and few held
    if len(sizes) < told_count:
        raise ValueError(f"it is truncated: {len(sizes)} of its {told_count} frames are there")
    chosen = evenly(len(sizes), frames)
    _check_sizes(sizes, [f"number {at}" for at in range(len(sizes))])
    decoded, wanted = each(), set(chosen)
    next(decoded)
    mode = "RGB" if channels == 3 else "L"
    return [frame.to_image().convert(mode) for at, frame in enumerate(decoded) if at in wanted]


def _check_sizes(sizes: Sequence[tuple[int, int]], names: Sequence[str]) -> None:
    for size, name in zip(sizes, names, strict=True):
        if size != sizes[0]:
            raise ValueError(
                f"its frames are of different sizes: {names[0]} has {sizes[0][0]} x {sizes[0][1]} pixels, {name} has "
                f"{size[0]} x {size[1]}"
            )


class UnreadableClip(Unreadable):
    """What stands where a clip cannot be decoded."""

    @property
    def kind(self) -> str:
        """What it would be one of."""
        return "clips"


class Clips(Dataset):
    """Clips with and without labels: (F, channels, height, width) each, and its label, -1 without classes.

    One that cannot be read is `Unreadable`, never another one.

    Attributes:
        classes: names of the labels.
        left_out: what lies in the folder and is no clip.
    """

    def __init__(
        self,
        root: Path,
        settings: Mapping[str, Any],
        frames: int,
        split: str = ".",
        strip: int | None = None,
        names: Sequence[str] | None = None,
        augmented: Mapping[str, Any] | None = None,
    ) -> None:
        """Find them.

        Args:
            root: a folder of clips, in folders of classes or without; of strips a tar too; or one clip.
            settings: how frames are prepared, as `adaptvit.data.preparation` says it of a model.
            frames: of each clip.
            split: a folder in the root, or one that means the same; `.` is the root itself.
            strip: frames of a strip, where pictures are strips; None takes videos, and folders of pictures.
            names: of the classes, in the order of the labels; None numbers their folders in natural order.
            augmented: what `timm.data.create_transform` is told to train on them; all frames of a clip are changed
                alike.
        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: there are no clips in it.
        """
        self.frames, self.strip, self.channels = frames, strip, settings["input_size"][0]
        prepared = {name: value for name, value in settings.items() if name != "frames"}
        self.transform, self.augments = create_transform(**prepared, **(augmented or {})), augmented is not None
        self.reader = _reader(Path(root), split, strip, names)
        self.samples = [(name, -1 if label is None else label) for name, label in self.reader.samples]
        self.classes, self.left_out = tuple(self.reader.class_to_idx), tuple(self.reader.left_out)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Of the clip, from the split on."""
        return self.samples[index][0]

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        name, label = self.samples[index]
        try:
            source = self.reader[index][0]
            try:
                images = read_clip(source, self.frames, self.strip, self.channels)
            finally:
                if not isinstance(source, Path):
                    source.close()
        except ModuleNotFoundError:
            raise  # of the reader itself
        except Exception as error:  # Pillow and FFmpeg raise a dozen kinds
            return UnreadableClip(name, str(error) or type(error).__name__)
        return self.prepared(images), label

    def prepared(self, images: Sequence[Image.Image]) -> Tensor:
        """Frames as the model takes them, (F, channels, height, width); where they are augmented, all alike."""
        if not self.augments:
            return torch.stack([self.transform(image) for image in images])
        python, arrays, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
        made = []
        for image in images:
            random.setstate(python)
            np.random.set_state(arrays)
            torch.set_rng_state(tensors)
            made.append(self.transform(image))
        return torch.stack(made)


def _reader(root: Path, split: str, strip: int | None, names: Sequence[str] | None) -> Any:
    where = f"the folder of clips {str(root)!r}"
    if not root.exists():
        raise FileNotFoundError(f"{where} does not exist or is not a folder")
    if root.is_file() and root.suffix.lower() != TAR:
        if strip is None and not _is_video(root):
            raise ValueError(
                f"{str(root)!r} is no clip: it is neither a video ({' '.join(VIDEO_SUFFIXES)}) nor a folder of "
                "pictures; a strip of frames needs the number of these, strip"
            )
        return _One(root, strip is not None)
    if strip is not None:
        return ClassFolders(root, split, where, names)
    if not root.is_dir():
        raise ValueError(f"{where} is a tar, which may have strips alone: their number of frames is strip")
    if _has_pictures(root):
        return _One(root, False)
    return ClipFolders(root, split, where, names)


class _One:
    """A clip that is named itself, read as those of a folder are."""

    def __init__(self, path: Path, strip: bool) -> None:
        self.samples: list[tuple[str, int | None]] = [(path.name, None)]
        self.class_to_idx: dict[str, int] = {}
        self.empty: tuple[str, ...] = ()
        self.left_out: tuple[LeftOut, ...] = ()
        self.path, self.opens = path, strip

    def __getitem__(self, index: int) -> tuple[Any, None]:
        return (open_file(self.path) if self.opens else self.path), None

    def filename(self, index: int) -> str:
        """Of the clip."""
        return self.path.name


class ClipFolders:
    """The videos and the folders of pictures of a split, with their labels, as `ClassFolders` has pictures.

    Attributes:
        samples: name and label of each, from the split on; None in the place of labels that are not known.
        class_to_idx: labels by the names of the classes; empty where clips lie in no folders of these.
        empty: classes whose folders hold none.
        left_out: what is not used.
    """

    def __init__(self, root: Path, split: str, where: str, names: Sequence[str] | None = None) -> None:
        """Find them; arguments and errors are those of `ClassFolders`."""
        self.folder = folder = root / (find_split(root, split, where) or ".")
        inside = _entries(folder)
        loose = any(_is_video(path) or _has_pictures(path) for path in inside)
        found = [] if loose else [path.name for path in inside if path.is_dir()]
        numbers = {name: label for label, name in enumerate(found)} if names is None else labels_of(found, names)
        self.class_to_idx = {name: label for label, name in enumerate(found if names is None or loose else names)}
        groups = (
            [(None, inside)]
            if loose
            else [(numbers[name], _entries(folder / name)) for name in found if name in numbers]
        )
        clips = [(path, label) for label, paths in groups for path in paths if path.is_dir() or _is_video(path)]
        self.samples = [(path.relative_to(folder).as_posix(), label) for path, label in clips]
        filled, taken = {label for _, label in clips}, {path for path, _ in clips}
        self.empty = tuple(name for name, label in numbers.items() if label not in filled)
        others = [path for _, paths in groups for path in paths if path not in taken]
        others += [path for path in inside if not loose and not path.is_dir()]
        self.left_out = told(
            {
                "neither videos nor folders": [path.relative_to(folder).as_posix() for path in others],
                "folders that class_map does not name": [name for name in found if name not in numbers],
                "folders of classes without clips": self.empty,
            }
        )
        if not self.samples:
            suffixes = " ".join(VIDEO_SUFFIXES)
            raise ValueError(f"{where} has no clips: neither a video ({suffixes}) nor a folder of pictures")

    def __getitem__(self, index: int) -> tuple[Path, int | None]:
        name, label = self.samples[index]
        return self.folder / name, label

    def filename(self, index: int) -> str:
        """From the split on."""
        return self.samples[index][0]


def may_have_clips(folder: Path) -> bool:
    """Whether there are videos or folders in a folder."""
    return any(path.is_dir() or _is_video(path) for path in _entries(folder))


def _entries(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.name[0] != "."), key=lambda path: natural(path.name))


def _is_video(path: Path) -> bool:
    return path.name.lower().endswith(VIDEO_SUFFIXES) and path.is_file()


def _has_pictures(path: Path) -> bool:
    pictures = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in VIDEO_SUFFIXES)
    return path.is_dir() and any(one.name.lower().endswith(pictures) for one in path.iterdir())
