"""Pictures of where a model spends its compute: images beside the depth of their tokens, and the two combined.

    a folder of pictures -> one PNG for each, and a grid of them
    class folders        -> one PNG for each class, of its most varied image, and a grid of them
    either, summarised   -> what all images use and cost, and the cheapest, dearest, easiest and hardest of them

Letters: B images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from torch.nn.functional import cross_entropy

from adaptvit.checks import In, check_device, check_fields
from adaptvit.commands.console import add_json, check_json, config_of, say_unused, tell_json, unused
from adaptvit.data import (
    Clips,
    DataConfig,
    LeftOut,
    Listing,
    Samples,
    Unreadable,
    check_no_strip,
    check_sources,
    class_names,
    collate,
    first_of,
    list_images,
    may_have_clips,
    not_finite,
    open_pictures,
    open_split,
    pixels,
    preparation,
)
from adaptvit.files import check_output_folder
from adaptvit.macs import dense_macs, macs
from adaptvit.model import AdaptiveViT
from adaptvit.process import as_found, best_device, in_float64
from adaptvit.show.pictures import (
    Figure,
    cost_histogram,
    depth_maps,
    sheet_maps,
    sheets,
    usage_per_block,
    write_png,
)
from adaptvit.terminal import progress_bar, say
from adaptvit.usage import Usage, join
from adaptvit.weights.opening import open_model

PAGE = 24
"""Most images on a grid."""
EXTREMES = 8
"""Most images on each grid of a summary."""


@dataclass(frozen=True)
class DrawConfig:
    """What to draw, and where to."""

    model: str
    """A file, folder, repository (`hf-hub:OWNER/NAME`) or timm name of a ViT."""
    folder: Path
    """Pictures, not those in its subfolders; with `per_class`, a folder for each class, or train and val folders of
    these, of which val is read; with `summary`, the one or the other. For a model that takes clips, these: videos,
    folders of frames or strips; or one of them."""
    output: Path = Path("pictures")
    """Folder to write to, made if it is not there. Files of the same names are replaced."""
    per_class: bool = False
    """Draw one image of each class: the one whose patches' depths have the largest standard deviation."""
    summary: bool = False
    """Look at all images, with their class folders or without: draw what the blocks use, what images cost, and the
    cheapest, dearest, easiest and hardest images."""
    limit: Annotated[int | None, In("[1, inf)")] = None
    """Most images drawn, or classes, in the order of their names: 24 unless told. With `summary`, most images looked
    at, evenly spread over all: 1000 unless told."""
    strip: Annotated[int | None, In("[1, 65536]")] = None
    """For a model that takes clips: frames of a picture that shows all of a clip, one below another."""
    batch_size: Annotated[int, In("[1, inf)")] = 32
    """Images per forward pass."""
    device: str = field(default_factory=best_device)
    """Where to run: cpu or cuda; cuda unless told, where there is one."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.summary and self.per_class:
            raise ValueError("DrawConfig.summary and per_class are two kinds of drawing: choose one")
        check_device("DrawConfig.device", self.device)
        folder, output = self.folder.resolve(), self.output.resolve()
        if output == folder or ((self.per_class or self.summary) and folder in output.parents):
            raise ValueError(
                f"DrawConfig.output must lie outside the folder that is read, {str(self.folder)!r}: name another"
            )

    @property
    def most(self) -> int:
        """The limit, or what it is unless told."""
        return (1000 if self.summary else 24) if self.limit is None else self.limit


@dataclass(frozen=True)
class Drawing:
    """What `draw` did."""

    files: tuple[Path, ...]
    """Written, the one to open first being first."""
    unreadable: tuple[Unreadable, ...]
    """Pictures that could not be decoded, or whose logits are not finite; they were left out."""
    beyond_limit: int
    """Pictures, or classes, that were not looked at."""
    finding: str = ""
    """Of a summary: whether images that are harder cost more, in one line."""
    left_out: tuple[LeftOut, ...] = ()
    """What lies in the folder and is not looked at."""
    images: tuple[dict[str, Any], ...] = ()
    """Of each picture looked at its name and GMACs; beside them the mean depth of its patches or, in a summary, the
    cross-entropy of its class."""


@dataclass(frozen=True, eq=False)
class Seen:
    """An image and what the model made of it."""

    name: str
    """Of the file, from the folder on."""
    label: int
    """Of its class; -1 without classes."""
    image: Tensor
    """(channels, height, width) as the model got it, or a clip of these."""
    depth: Tensor
    """(rows, columns) blocks each patch entered, of a clip (steps, rows, columns)."""
    groups: Tensor | None = None
    """The same shape: the token that each patch is part of in the end, where the method merges tokens."""

    @property
    def mean_depth(self) -> float:
        """Over the patches."""
        return in_float64(self.depth).mean().item()

    @property
    def spread(self) -> float:
        """Standard deviation of the depth over the patches."""
        return in_float64(self.depth).std(correction=0).item()


@as_found()
def draw(config: DrawConfig) -> Drawing:
    """Draw what a model computes for pictures, each as the model saw it: resized, cropped.

    Raises:
        FileNotFoundError: there is no such model or folder.
        KeyboardInterrupt: stopped by the user; the files written so far are whole.
        ValueError: the folder has no pictures, or none that can be read, or the model's method has no depth map.
    """
    try:
        return _draw(config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; what was drawn so far is in {config.output}") from None


def _draw(config: DrawConfig) -> Drawing:
    if not config.folder.exists():
        raise FileNotFoundError(f"folder {str(config.folder)!r} does not exist or is not a folder")
    check_output_folder(config.output)
    listing = _listing(config)
    model = open_model(config.model).to(config.device)
    settings = preparation(model, f"model {config.model!r}")
    samples = _samples(config, settings, listing)
    if config.summary:
        return _summary(model, samples, settings, config)
    if config.per_class:
        seen, unreadable, classes = _most_varied(model, samples, config)
        names = [f"class-{classes[one.label]}" for one in seen]
        titles = [f"{classes[one.label]}: {Path(one.name).name}" for one in seen]
        beyond = max(0, len(classes) - config.most)
    else:
        seen, unreadable = _first(model, samples, config)
        names = titles = [one.name for one in seen]
        beyond = len(samples) - len(seen) - len(unreadable)
    if not seen:
        raise _none_readable(unreadable, config.folder)
    images, depth = _drawn(seen, settings)
    gmacs = _gmacs(model, seen, config.batch_size)
    captions = _captions(seen, titles, gmacs, model.depth)

    pages = [slice(start, start + PAGE) for start in range(0, len(seen), PAGE)]
    grids = ["grid"] if len(pages) == 1 else [f"grid-{number}" for number in range(1, len(pages) + 1)]
    singles = [slice(number, number + 1) for number in range(len(seen))]
    config.output.mkdir(parents=True, exist_ok=True)
    files = []
    for name, part in progress_bar([*zip(grids, pages, strict=True), *zip(names, singles, strict=True)], "drawing"):
        small = name in grids and "frames" not in settings  # a clip is a sheet of frames
        columns, panel = (_columns(len(seen[part])), 1.45) if small else (1, 2.6)
        figure = depth_maps(
            images[part], depth[part], model.depth, columns, captions[part], True, panel, _groups(seen[part])
        )
        files.append(config.output / f"{name}.png")
        write_png(figure, files[-1])
    told = tuple(
        {"name": one.name, "gmacs": cost, "depth": one.mean_depth} for one, cost in zip(seen, gmacs, strict=True)
    )
    return Drawing(tuple(files), tuple(unreadable), beyond, left_out=samples.left_out, images=told)


def _drawn(seen: Sequence[Seen], settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Images as they are looked at, a clip as a sheet of its frames, and the depths of their patches."""
    depth = torch.stack([one.depth for one in seen])
    images = pixels(torch.stack([one.image for one in seen]), settings)
    return sheets(images, depth.shape[1:]), sheet_maps(depth)


def _listing(config: DrawConfig) -> Listing | None:
    """The pictures that lie in the folder; None where those of its folders of classes are drawn, or one clip.

    Raises:
        ValueError: there are none, nor anything that may be a clip.
    """
    if config.folder.is_file():
        return None
    listing = list_images(config.folder, below=False)
    if config.per_class or (config.summary and not listing.names):
        check_sources(DataConfig(root=config.folder), "validation", classes=config.per_class)
        return None
    if not listing.names and not may_have_clips(config.folder):
        raise _no_pictures(config, listing)
    return listing


def _no_pictures(config: DrawConfig, listing: Listing) -> ValueError:
    hint = "; for folders of classes, pass --per-class" if "folders" in listing.skipped else ""
    return ValueError(f"folder {str(config.folder)!r} has no pictures: {listing.instead}{hint}")


def _samples(config: DrawConfig, settings: dict[str, Any], listing: Listing | None) -> Samples | Clips:
    if (frames := settings.get("frames")) is not None:
        return _clips(config, settings, frames)
    check_no_strip(config.strip, config.model)
    if config.folder.is_file():
        raise FileNotFoundError(f"folder {str(config.folder)!r} does not exist or is not a folder")
    if listing is not None:
        if not listing.names:
            raise _no_pictures(config, listing)
        return open_pictures(listing, settings)
    samples = open_split(DataConfig(root=config.folder), settings, "validation")
    assert isinstance(samples, Samples)
    return samples


def _clips(config: DrawConfig, settings: dict[str, Any], frames: int) -> Clips:
    """The clips, likewise."""
    split = "validation" if config.per_class or config.summary else "."
    clips = Clips(config.folder, settings, frames, split, config.strip)
    if clips.classes and not (config.per_class or config.summary):
        raise ValueError(
            f"folder {str(config.folder)!r} has no clips but in folders: for folders of classes, pass --per-class"
        )
    return clips


def _summary(model: AdaptiveViT, samples: Samples | Clips, settings: dict[str, Any], config: DrawConfig) -> Drawing:
    labelled = 0 < len(class_names(samples)) == model.num_classes
    record = _measure(model, samples, config, labelled)
    gmacs = in_float64(macs(record.usage, model.shape)).cpu() / 1e9

    def extremes(values: Tensor, highest: bool) -> Figure:
        rows = values.argsort(stable=True, descending=highest)[:EXTREMES]
        seen = _again(model, samples, record, rows)
        captions = _captions(seen, [one.name for one in seen], gmacs[rows].tolist(), model.depth)
        for place, row in enumerate(rows.tolist()):
            which = "right class" if labelled else f"class {record.classes[row]}"
            captions[place] += f", {which} at {(-record.difficulty[row]).exp():.1%}"
        images, depth = _drawn(seen, settings)
        return depth_maps(images, depth, model.depth, _columns(len(seen)), captions, True, 1.45, _groups(seen))

    dense = dense_macs(model.shape, record.usage.grid) / 1e9
    title = (
        f"{model.config.title} at {gmacs.mean() / dense:.0%} of the MACs, {len(gmacs)} images of {config.folder.name}"
    )
    figures: dict[str, Callable[[], Figure]] = {
        "usage": lambda: usage_per_block(record.usage, model.heads, title),
        "gmacs": lambda: cost_histogram(gmacs, dense, title),
        "cheapest": lambda: extremes(gmacs, highest=False),
        "dearest": lambda: extremes(gmacs, highest=True),
        "easiest": lambda: extremes(record.difficulty, highest=False),
        "hardest": lambda: extremes(record.difficulty, highest=True),
    }
    config.output.mkdir(parents=True, exist_ok=True)
    files = [config.output / f"{name}.png" for name in figures]
    for file, figure in zip(files, progress_bar(figures.values(), "drawing"), strict=True):
        write_png(figure(), file)
    beyond = len(samples) - len(gmacs) - len(record.unreadable)
    finding = _finding(gmacs, record.difficulty, labelled)
    figures_of = zip(record.indices, gmacs.tolist(), record.difficulty.tolist(), strict=True)
    told = tuple(
        {"name": samples.name(index), "gmacs": cost, "cross_entropy": loss} for index, cost, loss in figures_of
    )
    return Drawing(tuple(files), tuple(record.unreadable), beyond, finding, samples.left_out, told)


@dataclass(frozen=True, eq=False)
class Record:
    """What the images of a summary used, and what the model made of them; B of them could be read."""

    indices: list[int]
    """(B,) their numbers in the data set."""
    usage: Usage
    classes: Tensor
    """(B,) the right class where it is known, else the one that the model names."""
    difficulty: Tensor
    """(B,) cross-entropy of that class, in nats: minus the logarithm of its probability."""
    unreadable: list[Unreadable]
    merged: bool
    """Whether tokens were merged, of which `usage` does not keep the groups."""


@torch.inference_mode()
def _measure(model: AdaptiveViT, samples: Samples | Clips, config: DrawConfig, labelled: bool) -> Record:
    """Run images evenly spread over the data set, up to the limit; the images themselves are not kept.

    Raises:
        ValueError: none can be read, or the model's method has no depth map.
    """
    count, like = min(config.most, len(samples)), next(model.parameters())
    indices = [place * len(samples) // count for place in range(count)]
    readable, usages, classes, difficulty, unreadable, merged = [], [], [], [], [], False
    for start in progress_bar(range(0, count, config.batch_size), "looking"):
        part = indices[start : start + config.batch_size]
        items = [samples[index] for index in part]
        batch = collate(items)
        unreadable += batch.unreadable
        there = [index for index, item in zip(part, items, strict=True) if not isinstance(item, Unreadable)]
        if not len(batch.labels):
            continue
        output = model(batch.images.to(like), detailed=True)
        _check_tracked(model, output.usage)
        merged |= output.usage.groups is not None
        logits = in_float64(output.logits).cpu()
        sound = logits.isfinite().all(dim=1)
        for index, fine in zip(there, sound.tolist(), strict=True):
            readable += [index] if fine else []
            unreadable += [] if fine else [not_finite(samples.name(index))]
        usages.append(output.usage.to_keep().of_images(sound))
        labels = batch.labels if labelled else logits.argmax(dim=1)
        classes.append(labels[sound])
        difficulty.append(cross_entropy(logits[sound], classes[-1], reduction="none"))
    if not readable:
        raise _none_readable(unreadable, config.folder)
    return Record(readable, join(usages), torch.cat(classes), torch.cat(difficulty), unreadable, merged)


@torch.inference_mode()
def _again(model: AdaptiveViT, samples: Samples | Clips, record: Record, rows: Tensor) -> list[Seen]:
    """Some images of the record, decoded again, with the depths of their tokens; run again only where the record lacks
    something of them: they left early, or were merged."""
    indices = [record.indices[row] for row in rows.tolist()]
    items: list[Any] = [samples[index] for index in indices]
    usage = record.usage.of_images(rows)
    if model.leaves_early or record.merged:
        images = torch.stack([image for image, _ in items])
        usage = model.to_the_end(images.to(next(model.parameters()))).usage
    return [
        Seen(samples.name(index), label, image, depth, groups)
        for index, (image, label), depth, groups in zip(
            indices, items, usage.patch_depth.cpu(), last_groups(usage), strict=True
        )
    ]


def last_groups(usage: Usage) -> Sequence[Tensor | None]:
    """Of each image, the token that each patch is part of in the end: by `Usage.grid`; None where none are merged."""
    if usage.groups is None:
        return [None] * len(usage.attended)
    return usage.groups[:, -1].unflatten(1, usage.grid).cpu().unbind()


def _groups(seen: Sequence[Seen]) -> Tensor | None:
    """The groups of several images; None where their patches are not merged."""
    groups = [one.groups for one in seen if one.groups is not None]
    return sheet_maps(torch.stack(groups)) if groups else None


def _finding(gmacs: Tensor, difficulty: Tensor, labelled: bool) -> str:
    count, of = f"{len(gmacs)} images", "right class" if labelled else "class that the model names"
    if any((values == values[0]).all() for values in (gmacs, difficulty)):
        return f"GMACs against difficulty: no correlation, as one of them is the same for all {count}"
    rank = spearman(gmacs, difficulty)
    return f"GMACs against difficulty, the cross-entropy of the {of}: Spearman {rank:.2f} over {count}"


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation of two (B,) tensors; equal values share the mean of their ranks. NaN where one is constant."""
    ranks = []
    for values in (one, other):
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        ranks.append((count.cumsum(dim=0) - (count - 1) / 2)[place])
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def _none_readable(unreadable: list[Unreadable], folder: Path) -> ValueError:
    done = "be drawn" if unreadable[0].decoded else "be read"
    kind = "pictures" if unreadable[0].kind == "images" else unreadable[0].kind
    return ValueError(f"none of {len(unreadable)} {kind} in {str(folder)!r} can {done}{first_of(unreadable)}")


def _check_tracked(model: AdaptiveViT, usage: Usage) -> None:
    if usage.live is None:
        method = model.config.method
        raise ValueError(f"method {method!r} does not track token slots, so there is no depth map to draw")


def _first(model: AdaptiveViT, samples: Samples | Clips, config: DrawConfig) -> tuple[list[Seen], list[Unreadable]]:
    """The first readable images, up to the limit."""
    seen: list[Seen] = []
    unreadable: list[Unreadable] = []
    for one in _look(model, samples, range(len(samples)), min(config.batch_size, config.most)):
        if isinstance(one, Unreadable):
            unreadable.append(one)
        else:
            seen.append(one)
        if len(seen) == config.most:
            break
    return seen, unreadable


def _most_varied(
    model: AdaptiveViT, samples: Samples | Clips, config: DrawConfig
) -> tuple[list[Seen], list[Unreadable], tuple[str, ...]]:
    """Of each class up to the limit, the image whose patches' depths have the largest standard deviation.

    Source: A-ViT's released code (`--demo`). Differs: the class token is not among the depths, and of images with equal
    deviations the first is taken, not the last.
    """
    classes = class_names(samples)
    labels = [label for _, label in samples.reader.samples]
    if not classes:
        loose = samples.name(0)
        raise ValueError(f"per_class needs a folder for each class, but {str(config.folder)!r} itself holds {loose!r}")
    best: dict[int, Seen] = {}
    unreadable = []
    wanted = [index for index, label in enumerate(labels) if label is not None and label < config.most]
    for one in _look(model, samples, wanted, config.batch_size):
        if isinstance(one, Unreadable):
            unreadable.append(one)
        elif one.label not in best or one.spread > best[one.label].spread:
            best[one.label] = one
    return [best[label] for label in sorted(best)], unreadable, classes


@torch.inference_mode()
def _look(
    model: AdaptiveViT, samples: Samples | Clips, indices: Sequence[int], batch_size: int
) -> Iterator[Seen | Unreadable]:
    """Each image as it comes through the model, in order; what is not asked for is not decoded, but for its batch."""
    like = next(model.parameters())
    for start in progress_bar(range(0, len(indices), batch_size), "looking"):
        part = indices[start : start + batch_size]
        items: list[Any] = [samples[index] for index in part]
        good = [item[0] for item in items if not isinstance(item, Unreadable)]
        if good:
            output = model.to_the_end(torch.stack(good).to(like))
            usage = output.usage
            _check_tracked(model, usage)
            sound = output.logits.isfinite().all(dim=1).tolist()
            maps = iter(zip(sound, usage.patch_depth.cpu(), last_groups(usage), strict=True))
        for index, item in zip(part, items, strict=True):
            if isinstance(item, Unreadable):
                yield item
                continue
            fine, depth, groups = next(maps)
            name = samples.name(index)
            yield Seen(name, item[1], item[0], depth, groups) if fine else not_finite(name)


@torch.inference_mode()
def _gmacs(model: AdaptiveViT, seen: list[Seen], batch_size: int) -> list[float]:
    """What each image costs as the model is used, where images may leave early."""
    like, found = next(model.parameters()), []
    for start in range(0, len(seen), batch_size):
        images = torch.stack([one.image for one in seen[start : start + batch_size]])
        found += (in_float64(model(images.to(like), detailed=True).usage.macs) / 1e9).tolist()
    return found


def _captions(seen: list[Seen], titles: list[str], gmacs: list[float], blocks: int) -> list[str]:
    """Two lines for each image."""
    lines = []
    for one, title, cost in zip(seen, titles, gmacs, strict=True):
        gmacs_text = f"{cost:#.3g}".rstrip(".")
        kept = f"depth {one.mean_depth:.1f} ± {one.spread:.1f} of {blocks}"
        if one.groups is not None:
            kept = f"{len(one.groups.unique())} tokens of {one.groups.numel()} patches"
        lines.append(f"{shortened(title)}\n{kept}, {gmacs_text} GMACs")
    return lines


def _columns(count: int) -> int:
    """Of a grid: three, or two where these leave fewer places empty and the grid does not get long."""
    return 3 if count > 12 else min((3, 2), key=lambda columns: -count % columns)


def shortened(name: str, most: int = 48) -> str:
    """A file name on one line of at most so many characters, cut in the middle."""
    name = "".join(character if character.isprintable() else "?" for character in name)
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-((most - 1) // 2) :]}"


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit draw MODEL FOLDER`."""
    parser = ArgumentParser(
        description="Draw images beside the depth of their tokens, or what many images use and cost."
    )
    parser.add_class_arguments(DrawConfig, as_positional=True)
    add_json(parser)
    return parser


def execute(arguments: Namespace) -> int:
    """Say what was drawn; 1 where images could not be read."""
    config = config_of(DrawConfig, arguments)
    check_json(arguments.json)
    drawing = draw(config)
    say(f"{len(drawing.files)} pictures in {config.output}, {drawing.files[0].name} the first to open")
    if drawing.beyond_limit:
        what = "classes" if config.per_class else "pictures"
        done = "looked at" if config.summary else "drawn"
        say(f"{drawing.beyond_limit} more {what} are not {done}: --limit {config.most} is the most")
    if drawing.finding:
        say(drawing.finding)
    told = {"files": [str(file) for file in drawing.files], "images": list(drawing.images)}
    told |= {"beyond_limit": drawing.beyond_limit, "finding": drawing.finding or None}
    tell_json(arguments.json, told | unused(drawing.unreadable, drawing.left_out))
    return say_unused(drawing.unreadable, drawing.left_out)
