"""What a model computed, drawn: images beside the depth of their tokens, and shares per block. Reads `Usage`, no model.

Letters: B images, L blocks, N token slots.
"""

import base64
import io
import math
import warnings
from collections.abc import Container, Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from textwrap import fill
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from adaptvit.extras import needed
from adaptvit.files import replacing
from adaptvit.process import in_float64
from adaptvit.show.styles import styles
from adaptvit.usage import Usage

with needed("drawing"):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, Colormap, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

COLOURS = "viridis"
INK = "#1b2a41"
ACCENT = "#2a788e"
FUSED = "#e76f51"
OUTLINED = 14
"""Pixels of a patch's side, at least, where merged ones are outlined."""


def depth_maps(
    images: Tensor,
    depth: Tensor,
    blocks: int,
    columns: int = 4,
    captions: list[str] | None = None,
    combined: bool = False,
    panel: float = 1.45,
    groups: Tensor | None = None,
) -> Figure:
    """Several images, each beside the depth of its patches, on one colour scale from block 1 to `blocks`.

    Where tokens are merged, the second panel has the number of patches in the token of each, the third the regions.

    Args:
        images: (B, channels, height, width), one channel or three, values in [0, 1].
        depth: (B, rows, columns) blocks each patch entered, `Usage.patch_depth`; a patch of depth 0 is black.
        columns: images in a row.
        captions: B texts, one above each image; they may have several lines, and are not cut to fit.
        combined: a third panel for each image, the map laid over it.
        panel: width of a panel in inches.
        groups: (B, rows, columns) int64, equal where patches are of one token.
    Raises:
        ValueError: the images have neither one nor three channels, or their number differs from the maps'.
    """
    _check(images, depth)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height, width = images.shape[2:]
    panels = 2 + combined
    lines = 0 if captions is None else 1 + max(caption.count("\n") for caption in captions)
    tall = panel * height / width + 0.1 + 0.145 * lines
    figure = Figure(figsize=((panel * panels + 0.1) * columns + 0.8, tall * rows + 0.1), layout="constrained")
    widths = [*[1.0] * panels, 0.03] * columns  # a gap after each image's panels
    axes_grid = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    values = depth if groups is None else token_sizes(groups)
    palette, norm = _scale(blocks) if groups is None else _scale_of_sizes(values)
    for axes in axes_grid.flat:
        axes.set_axis_off()
    overlays = laid_over(images, depth, blocks) if groups is None else merged_regions(images, groups)
    for i in range(len(images)):
        picture, shading, *third = axes_grid[i // columns, (panels + 1) * (i % columns) :][:panels]
        whole = (0, width, height, 0)
        _draw(picture, images[i])
        shading.imshow(values[i].cpu().numpy(), cmap=palette, norm=norm, interpolation="nearest", extent=whole)
        for axes in third:
            _draw(axes, overlays[i])
        if captions is not None:
            picture.set_title("\n".join(" " * lines), fontsize=8.5, loc="left", pad=3)  # the room, and then the words:
            text = picture.annotate(captions[i], (0, 1), (0, 3), "axes fraction", "offset points", fontsize=8.5)
            text.set(color=INK, parse_math=False, in_layout=False)  # they may be wider than the panel
    if groups is None:
        _depth_bar(figure, axes_grid, blocks, below=bool((depth < 1).any()))
    else:
        _bar(figure, axes_grid, palette, norm, norm.boundaries[:-1].astype(int).tolist(), "patches in the token")
    return figure


def one_below_another(rows: Sequence[tuple[str, Tensor, Sequence[str]]], blocks: int, below: bool = False) -> Figure:
    """The same images in several versions, a row for each, beside the colours of the depth maps.

    Args:
        rows: a name, (B, channels, height, width) images of one channel or three, values in [0, 1], and B short texts.
        blocks: where the scale of depth ends.
        below: some patches did not enter the first block.
    """
    columns, panel = len(rows[0][1]), 1.75
    tall = [panel * images.shape[2] / images.shape[3] + 0.22 for _, images, _ in rows]
    figure = Figure(figsize=(panel * columns + 1.7, sum(tall)), layout="constrained")
    axes_grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=tall)
    for (name, images, captions), line in zip(rows, axes_grid, strict=True):
        for axes, image, caption in zip(line, images, captions, strict=True):
            _draw(axes, image)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_xlabel(caption, color=INK, fontsize=8, labelpad=2)
        line[0].set_ylabel(name, color=INK, fontsize=9)
    _depth_bar(figure, axes_grid, blocks, below)
    return figure


def clip_strip(clip: Tensor, depth: Tensor, blocks: int) -> Figure:
    """A clip, the middle frame of each step in time beside the next, and below each what was computed of it.

    Args:
        clip: (frames, channels, height, width), one channel or three, values in [0, 1].
        depth: (steps, rows, columns) blocks each patch entered, a clip's of `Usage.patch_depth`.
        blocks: where the scale of depth ends.
    Raises:
        ValueError: the frames are no whole number of frames for each step, or as `depth_maps`.
    """
    each, rest = divmod(len(clip), len(depth))
    if rest:
        raise ValueError(f"{len(clip)} frames are no whole number of frames for each of {len(depth)} steps")
    frames = clip[each // 2 :: each]
    numbers = [f"frame {at}" for at in range(each // 2, len(clip), each)]
    shares = [f"{share:.0%} of patches" for share in in_float64(depth > 0).mean(dim=(1, 2)).tolist()]
    rows = [("clip", frames, numbers), ("computed", laid_over(frames, depth, blocks), shares)]
    return one_below_another(rows, blocks, below=bool((depth < 1).any()))


def sheets(images: Tensor, grid: Sequence[int]) -> Tensor:
    """Images as they are; each clip (frames, channels, height, width) as one, the middle frames of its steps in rows.

    Args:
        images: (B, channels, height, width), or clips (B, frames, channels, height, width).
        grid: of `Usage`, which begins with the steps of a clip.
    """
    if images.ndim == 4:
        return images
    each = images.shape[1] // grid[0]
    return _in_rows(images[:, each // 2 :: each])


def sheet_maps(maps: Tensor) -> Tensor:
    """Maps (B, rows, columns) as they are; those of clips (B, steps, rows, columns) laid out as `sheets` does."""
    return maps if maps.ndim == 3 else _in_rows(maps)


def _in_rows(tiles: Tensor) -> Tensor:
    """(B, steps, ..., height, width) -> (B, ..., height of a sheet, width of it), as nearly square as has no gaps."""
    steps = tiles.shape[1]
    across = next(count for count in range(1, steps + 1) if steps % count == 0 and count**2 >= steps)
    rows = [torch.cat(row.unbind(1), dim=-1) for row in tiles.split(across, dim=1)]
    return torch.cat(rows, dim=-2)


def laid_over(images: Tensor, depth: Tensor, blocks: int, opacity: float = 0.5) -> Tensor:
    """The depth maps' colours over the images turned grey: (B, 3, height, width), values in [0, 1], on the CPU.

    Args:
        images: (B, channels, height, width), one channel or three, values in [0, 1].
        depth: (B, rows, columns); a patch covers height / rows by width / columns pixels.
        opacity: of the colours, in [0, 1].
    Raises:
        ValueError: as `depth_maps`.
    """
    _check(images, depth)
    return _coloured(images, depth, *_scale(blocks), opacity)


def sizes_over(images: Tensor, groups: Tensor, opacity: float = 0.5) -> Tensor:
    """The number of patches in the token of each, as colours over the images turned grey, as `laid_over` gives them.

    Args:
        groups: (B, rows, columns) int64, equal where patches are of one token.
    """
    _check(images, groups)
    sizes = token_sizes(groups)
    return _coloured(images, sizes, *_scale_of_sizes(sizes), opacity)


def _coloured(images: Tensor, values: Tensor, palette: Colormap, norm: BoundaryNorm, opacity: float) -> Tensor:
    colours = torch.from_numpy(palette(norm(values.cpu().numpy()))[..., :3]).permute(0, 3, 1, 2).float()
    weights = torch.tensor([1.0] if images.shape[1] == 1 else [0.299, 0.587, 0.114])  # as Pillow turns RGB to grey
    grey = (images.cpu() * weights.view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
    return (1 - opacity) * grey + opacity * interpolate(colours, size=images.shape[2:], mode="nearest-exact")


def kept_patches(images: Tensor, kept: Tensor, fused: Tensor | None = None) -> Tensor:
    """The images with all patches but those kept faded to near white: (B, 3, height, width), on the CPU.

    Args:
        images: (B, channels, height, width), one channel or three, values in [0, 1].
        kept: (B, rows, columns) bool.
        fused: (B, rows, columns) bool, patches whose token stands for dropped ones: they are tinted.
    Raises:
        ValueError: as `depth_maps`.
    """
    _check(images, kept)
    picture = images.cpu().expand(-1, 3, -1, -1)
    size = images.shape[2:]

    def pixels(patches: Tensor) -> Tensor:
        return interpolate(patches[:, None].cpu().float(), size=size, mode="nearest-exact") > 0

    picture = torch.where(pixels(kept), picture, 0.88 + 0.12 * picture)
    if fused is not None:
        tint = torch.tensor(to_rgb(FUSED)).view(1, 3, 1, 1)
        picture = torch.where(pixels(fused), 0.3 * picture + 0.7 * tint, picture)
    return picture


def mean_colours(images: Tensor, groups: Tensor) -> Tensor:
    """The images with each group of patches in its mean colour: (B, channels, height, width), on the CPU.

    Args:
        images: (B, channels, height, width).
        groups: (B, rows, columns) int64, equal where patches are of one token.
    """
    patches = interpolate(images.cpu(), size=groups.shape[1:], mode="area").flatten(2)
    group = groups.cpu().flatten(1)[:, None].expand_as(patches)
    zeros = patches.new_zeros(*patches.shape[:2], int(groups.max()) + 1)
    total, count = zeros.scatter_add(2, group, patches), zeros.scatter_add(2, group, torch.ones_like(patches))
    means = (total / count.clamp(min=1)).gather(2, group).unflatten(2, groups.shape[1:])
    return interpolate(means, size=images.shape[2:], mode="nearest-exact")


def token_sizes(groups: Tensor) -> Tensor:
    """The number of patches in the token of each: (B, rows, columns) int64.

    Args:
        groups: (B, rows, columns) int64, equal where patches are of one token.
    """
    group = groups.flatten(1)
    count = group.new_zeros(len(group), int(group.max()) + 1).scatter_add(1, group, torch.ones_like(group))
    return count.gather(1, group).unflatten(1, groups.shape[1:])


def merged_regions(images: Tensor, groups: Tensor) -> Tensor:
    """The images with the patches of each token as one region, in its mean colour and outlined.

    Args:
        images: (B, channels, height, width), one channel or three, values in [0, 1].
        groups: (B, rows, columns) int64, equal where patches are of one token.
    Returns:
        (B, channels, height, width) on the CPU, enlarged a whole number of times where patches are too small for lines.
    """
    times = max(
        1, *(-(-OUTLINED * some // side) for some, side in zip(groups.shape[1:], images.shape[2:], strict=True))
    )
    regions = mean_colours(images, groups).repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
    group = interpolate(groups[:, None].cpu().double(), size=regions.shape[2:], mode="nearest-exact")
    edge = torch.zeros_like(group, dtype=torch.bool)
    edge[:, :, 1:] |= group.diff(dim=2) != 0
    edge[..., 1:] |= group.diff(dim=3) != 0
    dark = regions.mean(dim=1, keepdim=True) < 0.4
    return torch.where(edge, torch.where(dark, 0.45 + 0.55 * regions, 0.45 * regions), regions)


def tokens_per_block(usage: Usage) -> Figure:
    """Tokens that each block attended to: the mean image, and the range of the middle 80 % of images."""
    attended = usage.attended.cpu().numpy()
    blocks = np.arange(1, attended.shape[1] + 1)
    low, high = np.quantile(attended, (0.1, 0.9), axis=0)
    figure, axes = _plot("block", "tokens")
    axes.bar(blocks, attended.mean(axis=0), color=ACCENT, width=0.72, label="mean image")
    axes.vlines(blocks, low, high, color=INK, linewidth=1.6, label="10th to 90th percentile")
    axes.axhline(usage.prefix + prod(usage.grid), color=INK, linewidth=0.9, linestyle=":", label="all")
    axes.set_xticks(_ticks(len(blocks)))
    axes.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.97))
    return figure


def usage_per_block(usage: Usage, heads: Sequence[int], title: str = "") -> Figure:
    """Shares of the patches, heads and sub-layers that each block computed; what no image left out is not drawn.

    Bars are the mean image, whiskers the range of the middle 80 % of images; a sub-layer is on or off, so has none.

    Args:
        heads: attention heads of each block.
    """
    shares = {"attention": in_float64(usage.attention), "MLP": in_float64(usage.mlp)}
    all_heads = usage.heads.new_tensor(heads)
    if (usage.heads < all_heads).any():
        shares = {"heads": in_float64(usage.heads * usage.attention) / in_float64(all_heads)} | shares
    if usage.live is not None:
        shares = {"patches": in_float64(usage.live[:, :, usage.prefix :]).mean(dim=2)} | shares
    varied = [name for name in shares if (shares[name] < 1).any()] or [*shares][:1]
    figure = Figure(figsize=(4.6, 0.8 + 1.25 * len(varied)), layout="constrained")
    rows = figure.subplots(len(varied), sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(rows, varied, strict=True):
        share = shares[name].cpu().numpy()
        blocks = np.arange(1, share.shape[1] + 1)
        _dress(axes, "block" if axes is rows[-1] else "", name)
        axes.bar(blocks, share.mean(axis=0), color=ACCENT, width=0.72, label="mean image")
        if name in ("patches", "heads"):
            low, high = np.quantile(share, (0.1, 0.9), axis=0)
            axes.vlines(blocks, low, high, color=INK, linewidth=1.6, label="10th to 90th percentile")
        axes.set_xticks(_ticks(len(blocks)))
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    handles, labels = rows[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    rows[0].set_title(title, fontsize=9, color=INK)
    return figure


def cost_histogram(gmacs: Tensor, dense: float, title: str = "") -> Figure:
    """How many images cost how much: (B,) GMACs of a set of images, beside the `dense` GMACs of any of them.

    Models of less than 0.1 GMACs are told in MMACs.
    """
    unit, scale = macs_unit(dense)
    figure, axes = _plot(f"{unit} of an image", "images")
    gmacs, dense = gmacs * scale, dense * scale
    most = max(dense, gmacs.max().item())
    axes.hist(gmacs.cpu().numpy(), bins=60, range=(0, most), color=ACCENT)
    axes.axvline(dense, color=INK, linewidth=0.9, linestyle=":")
    axes.annotate("dense", (dense, 1), (0, 2), ("data", "axes fraction"), "offset points", ha="center", fontsize=8)
    axes.set_xlim(0, most * 1.04)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=9, color=INK, pad=14 if title else None)
    return figure


def macs_unit(dense_gmacs: float) -> tuple[str, float]:
    """The unit that a model's MACs are told in, and how many of it a GMAC is."""
    return ("GMACs", 1.0) if dense_gmacs >= 0.1 else ("MMACs", 1e3)


def curves(runs: dict[str, list[float]], label: str, percent: bool = False) -> Figure:
    """One line per run over epochs that follow one another: `runs` in order, each beginning where the last ended."""
    figure, axes = _plot("epoch", label)
    start = 1
    looks = styles(runs)
    for name, values in runs.items():
        look = looks[name]
        axes.plot(
            range(start, start + len(values)), values, color=look.colour, marker=look.marker, markersize=3, label=name
        )
        start += len(values)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8)
    return figure


def error_bars(points: dict[str, tuple[float, float]], label: str) -> Figure:
    """One line per name: its value, with a bar of its spread to each side."""
    figure, axes = _plot(label, "")
    figure.set_figheight(0.9 + 0.28 * len(points))
    places = range(len(points))
    values, spreads = zip(*points.values(), strict=True)
    axes.errorbar(values, places, xerr=spreads, fmt="o", color=ACCENT, ecolor=INK, markersize=5, capsize=3)
    axes.set_yticks(places, list(points), color=INK)
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    return figure


Point = tuple[float, float] | tuple[float, float, float]
"""What it costs, or how fast it is; the accuracy in [0, 1]; the standard error of that, where it was measured."""


def tradeoff(
    lines: Mapping[str, Sequence[Point]],
    dense: tuple[float, float],
    label: str,
    dotted: Container[str] = (),
    better: Literal["less", "more"] = "less",
    title: str = "",
    dense_gmacs: float | None = None,
    what: str = "top-1",
) -> Figure:
    """Accuracy against what it costs: a line for each name, a star for the dense model, behind them the frontier.

    Each method has its own colour and marker. The frontier is of the points than which none is both better and more
    accurate.

    Args:
        lines: by name, points in any order.
        dense: of the dense model.
        label: of that cost or speed.
        dotted: names whose lines are dotted.
        better: whether `less` of it is better, or `more`.
        dense_gmacs: where the cost is a share of the dense MACs, what these are: a second scale above has GMACs.
        what: the accuracy, or what stands in its place.
    """
    figure, axes = _plot(label, what)
    figure.set_size_inches(6.4, 4.4)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    sign = {"less": 1, "more": -1}[better]
    frontier: list[tuple[float, float]] = []
    for point in sorted([*chain(*lines.values()), dense], key=lambda point: (sign * point[0], -point[1])):
        if not frontier or point[1] > frontier[-1][1]:
            frontier.append(point[:2])
    axes.plot(*zip(*frontier, strict=True), color=INK, alpha=0.35, linewidth=1, dashes=(6, 3), label="frontier")
    looks = styles(lines)
    for name, points in lines.items():
        look, ordered = looks[name], sorted(points)
        x, y = ([point[part] for point in ordered] for part in (0, 1))
        style = ":" if name in dotted else "-"
        axes.plot(x, y, style, color=look.colour, marker=look.marker, markersize=5.5, linewidth=1.3, label=name)
        errors = [point[2] if len(point) > 2 else 0.0 for point in ordered]
        if any(errors):
            axes.errorbar(x, y, errors, fmt="none", ecolor=look.colour, elinewidth=0.8, capsize=2, alpha=0.7)
    axes.plot(*dense, "*", color=INK, markersize=11, label="dense")
    if dense_gmacs is not None:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        to_gmacs: Any = (lambda share: share * dense_gmacs, lambda gmacs: gmacs / dense_gmacs)
        above = axes.secondary_xaxis("top", to_gmacs)
        above.set_xlabel("GMACs an image", fontsize=8.5, color=INK)
        above.tick_params(labelsize=8, colors=INK, length=3)
        above.spines[:].set_visible(False)
    if what == "top-1":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def data_uri(figure: Figure, kind: str = "svg") -> str:
    """The figure as the `src` of an HTML image: "svg" for plots, "png" for photographs."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "adaptvit"}):  # the same picture gives the same bytes
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(stream, format=kind, dpi=160, metadata=metadata)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(stream.getvalue()).decode()}"


def write_png(figure: Figure, path: Path | str) -> None:
    """Write the figure to a file, whole or not at all.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    with replacing(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a caption in a script that the font lacks shows boxes
        figure.savefig(partial, format="png", dpi=160)


def _check(images: Tensor, depth: Tensor) -> None:
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images to draw must have 1 or 3 channels, got {images.shape[1]}")
    if len(images) != len(depth):
        raise ValueError(f"every image needs one depth map, got {len(images)} images and {len(depth)} maps")


def _scale(blocks: int) -> tuple[Colormap, BoundaryNorm]:
    """One colour for each block from 1 to `blocks`, and black for patches that none works on."""
    palette = matplotlib.colormaps[COLOURS].with_extremes(under="black")
    return palette, BoundaryNorm(np.arange(0.5, blocks + 1), ncolors=256)


def _scale_of_sizes(sizes: Tensor) -> tuple[Colormap, BoundaryNorm]:
    """One colour for tokens of 1 patch, 2, 3 or 4, 5 to 8, and so on, up to the largest."""
    steps = max(2, math.ceil(math.log2(int(sizes.max()))) + 1)
    ends = [1, *(2**step + 1 for step in range(steps))]
    return matplotlib.colormaps[COLOURS], BoundaryNorm(ends, ncolors=256)


def _depth_bar(figure: Figure, axes_grid: np.ndarray, blocks: int, below: bool = False) -> None:
    """The colours of the depths beside the pictures; `below`: some are below the first block."""
    most = min(12, int(min(BAR, figure.get_figheight()) / 0.2))
    words = "blocks that worked on the patch"
    _bar(figure, axes_grid, *_scale(blocks), _ticks(blocks, most), words, "min" if below else "neither")


BAR = 5.0
"""Inches of the longest bar of colours."""


def _bar(
    figure: Figure,
    axes_grid: np.ndarray,
    palette: Colormap,
    norm: BoundaryNorm,
    ticks: Sequence[int],
    words: str,
    extend: Literal["neither", "min"] = "neither",
) -> None:
    """Colours and what they say, beside the pictures."""
    high = min(BAR, figure.get_figheight())
    bar = figure.colorbar(
        ScalarMappable(norm, palette),
        ax=axes_grid,
        ticks=ticks,
        fraction=0.03,
        pad=0.01,
        shrink=high / figure.get_figheight(),
        aspect=max(20, high / 0.2),
        anchor=(0, 1),
        extend=extend,
    )
    bar.minorticks_off()
    bar.set_label(fill(words, 20) if high < 2.2 else words, color=INK, fontsize=9)
    bar.ax.tick_params(length=0, labelsize=8.5)
    bar.outline.set_visible(False)


def _draw(axes: Axes, image: Tensor) -> None:
    pixels = image.cpu().permute(1, 2, 0).numpy()
    if pixels.shape[2] == 1:
        axes.imshow(pixels[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(pixels, interpolation="nearest")


def _plot(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    axes = figure.subplots()
    _dress(axes, x, y)
    return figure, axes


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9aa5b1")


def _ticks(blocks: int, most: int = 12) -> list[int]:
    """Whole block numbers, at most so many, the last one among them."""
    step = -(-blocks // most)
    return list(range(blocks, 0, -step))[::-1]
