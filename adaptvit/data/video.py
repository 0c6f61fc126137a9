"""Clips: frames evenly spaced over a video file, a folder of pictures, or a strip, prepared as a model takes them.

A strip is one picture of all frames of a clip, one below another.

    read_clip    one clip -> its frames
    Clips        a data set of them: an item is (clip, label) or `Unreadable`
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from adaptvit.data.folders import IMAGE_SUFFIXES, ClassFolders, LeftOut, find_split, natural, told
from adaptvit.data.images import Unreadable, decode_image, open_image, read_image
from adaptvit.extras import needed

VIDEO_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")
"""Of the files that count as videos, readable or not."""


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

    def each() -> Any:
        with av.open(file) as container:
            if not container.streams.video:
                raise ValueError("it has no pictures")
            yield container.streams.video[0].frames
            yield from container.decode(video=0)

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


class Clips(Dataset):
    """The clips of a folder, in folders of classes or without: (F, channels, height, width) each, and its label.

    One that cannot be read is `Unreadable`, never another one. Labels are -1 without classes.

    Attributes:
        classes: names of the labels.
        left_out: what lies in the folder and is no clip.
    """

    def __init__(
        self, root: Path, settings: dict[str, Any], frames: int, split: str = ".", strip: int | None = None
    ) -> None:
        """Find them.

        Args:
            root: a folder; of strips a tar too.
            settings: how frames are prepared, as `adaptvit.data.preparation` says it of a model.
            frames: of each clip.
            split: a folder in the root, or one that means the same; `.` is the root itself.
            strip: frames of a strip, where pictures are strips; None takes videos, and folders of pictures.
        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: there are no clips in it.
        """
        self.frames, self.strip, self.channels = frames, strip, settings["input_size"][0]
        self.transform = create_transform(**settings)
        where, root = f"the folder of clips {str(root)!r}", Path(root)
        self.open: Callable[[str], Any]
        if strip is not None:
            reader = ClassFolders(root, split, where)
            self.samples = [(name, -1 if label is None else label) for name, label in reader.samples]
            self.classes, self.left_out, self.open = tuple(reader.class_to_idx), reader.left_out, reader.listing.open
        else:
            if not root.is_dir():
                raise FileNotFoundError(f"{where} does not exist or is not a folder")
            folder = root / (find_split(root, split, where) or ".")
            self.samples, self.classes, self.left_out = _found(folder)
            self.open = folder.joinpath
        if not self.samples:
            suffixes = " ".join(VIDEO_SUFFIXES)
            raise ValueError(f"{where} has no clips: neither a video ({suffixes}) nor a folder of pictures")

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        """Of the clip, from the split on."""
        return self.samples[index][0]

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Unreadable:
        name, label = self.samples[index]
        try:
            source = self.open(name)
            try:
                images = read_clip(source, self.frames, self.strip, self.channels)
            finally:
                if not isinstance(source, Path):
                    source.close()
        except ModuleNotFoundError:
            raise  # of the reader itself
        except Exception as error:  # Pillow and FFmpeg raise a dozen kinds
            return Unreadable(name, str(error) or type(error).__name__)
        return torch.stack([self.transform(image) for image in images]), label


def _found(folder: Path) -> tuple[list[tuple[str, int]], tuple[str, ...], tuple[LeftOut, ...]]:
    """The clips of a folder, the names of classes, and what is left out."""
    inside = _entries(folder)
    loose = any(_is_video(path) or _has_pictures(path) for path in inside)
    samples: list[tuple[str, int]] = []
    skipped: dict[str, list[str]] = {}
    classes = () if loose else tuple(path.name for path in inside if path.is_dir())
    groups = [(-1, inside)] if loose else [(label, _entries(folder / name)) for label, name in enumerate(classes)]
    rest = [] if loose else [path for path in inside if not path.is_dir()]
    for label, paths in groups:
        for path in paths:
            if path.is_dir() or _is_video(path):
                samples.append((path.relative_to(folder).as_posix(), label))
            else:
                rest.append(path)
    if rest:
        skipped["neither videos nor folders"] = [path.relative_to(folder).as_posix() for path in rest]
    return samples, classes, told(skipped)


def _entries(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.name[0] != "."), key=lambda path: natural(path.name))


def _is_video(path: Path) -> bool:
    return path.name.lower().endswith(VIDEO_SUFFIXES) and path.is_file()


def _has_pictures(path: Path) -> bool:
    pictures = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in VIDEO_SUFFIXES)
    return path.is_dir() and any(one.name.lower().endswith(pictures) for one in path.iterdir())
