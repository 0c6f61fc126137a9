"""Shards of webdataset: tars whose files of one name, but for what follows its first dot, are one sample.

    a folder and the name of a split -> find_shards -> Split
    Split -> Shards, by number | flow, one sample after the other, shuffled, without a look at all shards first

Nothing is decoded here. A sample without image or class, and a damaged part of a tar, is one that cannot be opened.
"""

import itertools
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from adaptvit.data.classes import label_number
from adaptvit.data.folders import HIDDEN, IMAGE_SUFFIXES, LeftOut, told
from adaptvit.data.tars import Member, scan_tar
from adaptvit.files import check_is_file, open_file
from adaptvit.seeds import stream

FIRST = (".jpg", ".jpeg", ".png", ".webp")
"""Of several images of a sample the first of these is read; the others may be masks."""
BUFFER = 8192
"""Samples that are shuffled at a time; they are read in turn, so that these are their places only."""
NAMELESS = "without a name that tells its sample"


@dataclass(frozen=True)
class Split:
    """Which shards a split is."""

    root: Path
    shards: tuple[str, ...]
    """Paths from the root."""
    count: int | None
    """Of its samples, where that is told."""
    label_field: str
    """Of a sample's .json that holds its label; empty: its .cls does."""
    classes: int | None
    """How many there are; None where that is not known."""


class Sample(NamedTuple):
    """Where its parts are."""

    name: str
    """Of the image, from the root on; of the sample where it has none."""
    image: Member
    label: Member


def find_shards(root: Path, split: str, where: str, classes: int | None = None) -> Split:
    """The shards that timm and webdataset mean by the name of a split.

    Args:
        split: `train-{0000..0009}.tar|10000`, with or without the number of samples, or the name of one that
            `_info.json` or `info.json` in the root tells of.
        where: what the data set is called in messages.
    Raises:
        FileNotFoundError: there is no such split or shard.
        ValueError: the number, or the file that tells of the splits, is none.
    """
    splits = _told_splits(root, where)
    if ".tar" not in split and ".." not in split:
        if split not in splits:
            there = f"tells of {', '.join(map(repr, splits))}" if splits else "is not there"
            raise FileNotFoundError(
                f"{where} has no split {split!r}: its info.json {there}; name shards, as in 'train-{{0000..0009}}.tar'"
            )
        shards, lengths, label_field = splits[split]
        count: int | None = sum(lengths[name] for name in shards)
    else:
        names, bar, number = split.partition("|")
        if bar and not (number.isdecimal() and int(number)):
            raise ValueError(
                f"{where} has the split {split!r}: after | comes the number of its samples, got {number!r}"
            )
        shards = tuple(name for part in names.split("::") for name in expanded(part))
        known = {name: length for _, lengths, _ in splits.values() for name, length in lengths.items()}
        count = int(number) if bar else sum(known[name] for name in shards) if known.keys() >= {*shards} else None
        label_field = next((field for own, _, field in splits.values() if {*shards} <= {*own}), "")
    for name in shards:
        if not (root / name).exists():
            raise FileNotFoundError(f"{where} has no shard {str(root / name)!r}")
        check_is_file(root / name)
    return Split(root, shards, count, label_field, classes)


def _told_splits(root: Path, where: str) -> dict[str, tuple[tuple[str, ...], dict[str, int], str]]:
    """By the names of the splits: their shards, the number of samples of each, and the field of the label."""
    path = next((root / name for name in ("_info.json", "info.json") if (root / name).exists()), None)
    if path is None:
        return {}
    try:
        with open_file(path) as file:
            splits = json.load(file)["splits"]
        return {
            name: (
                tuple(map(str, one["filenames"])),
                dict(zip(map(str, one["filenames"]), map(int, one["shard_lengths"]), strict=True)),
                str(one.get("alt_label") or ""),
            )
            for name, one in splits.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"{where}: {str(path)!r} does not tell its splits as webdataset does: filenames and shard_lengths of each"
        ) from None


def expanded(pattern: str) -> Iterator[str]:
    """`{0..9}`, `{000..127}` and `{a,b}` written out."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    first, last, listed = braces.groups()
    if listed is None:
        padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        parts = [str(number).zfill(width) for number in range(int(first), int(last) + step, step)]
    else:
        parts = listed.split(",")
    for part in parts:
        yield from expanded(pattern[: braces.start()] + part + pattern[braces.end() :])


def scan_shard(split: Split, shard: str) -> tuple[list[Sample], dict[str, list[str]]]:
    """The samples of a shard, in its order, and what is no part of any, by kind; what is no tar is one bad sample."""
    path = split.root / shard
    try:
        tar = scan_tar(path)
    except (OSError, ValueError) as error:
        fault = Member(path, 0, 0, str(error))
        return [Sample(shard, fault, fault)], {}
    parts: dict[str, dict[str, Member]] = {}
    skipped: dict[str, list[str]] = {}
    for name, member in tar.members.items():
        folder, _, file = name.rpartition("/")
        key, dot, ending = file.partition(".")
        if name.startswith(".") or "/." in name:
            skipped.setdefault(HIDDEN, []).append(f"{shard}/{name}")
        elif not dot:
            skipped.setdefault(NAMELESS, []).append(f"{shard}/{name}")
        elif not file.startswith("__"):  # webdataset's own remarks
            parts.setdefault(f"{folder}/{key}" if folder else key, {})["." + ending.lower()] = member
    samples = [_sample(f"{shard}/{key}", found, split.label_field) for key, found in parts.items()]
    samples += [Sample(hole.replace(path.name, shard, 1), member, member) for hole, member in tar.holes.items()]
    return samples, skipped


def _sample(name: str, parts: dict[str, Member], label_field: str) -> Sample:
    there = ", ".join(parts)
    ending = next((one for one in (*FIRST, *IMAGE_SUFFIXES) if one in parts), None)
    labelled = ".json" if label_field else ".cls"
    nowhere = Member(Path(), 0, 0, f"it has no class: there is no {labelled}, but {there}")
    label = parts.get(labelled, nowhere)
    if ending is None:
        return Sample(name, Member(Path(), 0, 0, f"it has no image, but {there}"), label)
    return Sample(name + ending, parts[ending], label)


def open_sample(split: Split, sample: Sample) -> tuple[BinaryIO, int]:
    """The bytes of its image, and its label.

    Raises:
        OSError: one of them is not there, or cannot be read.
        ValueError: its label is none.
    """
    image = sample.image.open()
    with sample.label.open() as file:
        content = file.read()
    if not split.label_field:
        try:
            found: Any = int(content)
        except ValueError:
            found = content.decode(errors="replace")
    else:
        found = json.loads(content)
        for part in split.label_field.split("."):
            found = found.get(part) if isinstance(found, dict) else None
    return image, label_number(found, split.classes)


class Shards:
    """The samples of a split by number; its shards are scanned when it is first asked for one.

    Attributes:
        class_to_idx: empty: shards do not name their classes.
    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self.class_to_idx: dict[str, int] = {}

    @cached_property
    def _scanned(self) -> tuple[list[Sample], tuple[LeftOut, ...]]:
        samples: list[Sample] = []
        skipped: dict[str, list[str]] = {}
        for shard in self.split.shards:
            found, unused = scan_shard(self.split, shard)
            samples += found
            for kind, names in unused.items():
                skipped.setdefault(kind, []).extend(names)
        return samples, told(skipped)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What is no part of a sample."""
        return self._scanned[1]

    def __len__(self) -> int:
        return len(self._scanned[0])

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return open_sample(self.split, self._scanned[0][index])

    def filename(self, index: int) -> str:
        """Of the image, from the root on."""
        return self._scanned[0][index].name


def flow(split: Split, place: int, places: int, count: int, seed: int) -> Iterator[Sample]:
    """`count` samples in the order of a seed, of those that fall to one of `places` readers.

    Shards are dealt out whole where there is one for each reader, else sample by sample; they begin again where they
    hold too few samples. Between `BUFFER` of them the order is random.

    Args:
        seed: the same for all readers.
    Raises:
        ValueError: there is no sample.
    """
    left = count
    for turn in itertools.count():
        order = list(split.shards)
        random.Random(stream("shards", seed, turn)).shuffle(order)
        whole = len(order) >= places
        samples: Iterator[Sample] = (
            sample for shard in (order[place::places] if whole else order) for sample in scan_shard(split, shard)[0]
        )
        mine = samples if whole else itertools.islice(samples, place, None, places)
        before = left
        for sample in itertools.islice(_shuffled(mine, random.Random(stream("samples", seed, turn, place))), left):
            left -= 1
            yield sample
        if not left:
            return
        if left == before:
            raise ValueError(
                f"none of the shards {', '.join(order[:3])} has a sample for reader {place + 1} of {places}"
            )


def _shuffled(samples: Iterator[Sample], draws: random.Random) -> Iterator[Sample]:
    buffer: list[Sample] = []
    for sample in samples:
        if len(buffer) < BUFFER:
            buffer.append(sample)
            continue
        index = draws.randrange(BUFFER)
        yield buffer[index]
        buffer[index] = sample
    draws.shuffle(buffer)
    yield from buffer
