"""ATS off the shelf: accuracy against GMACs and measured speed, over schedules and budgets, beside random patches.

    python benchmarks/ats_imagenet.py WEIGHTS IMAGES OUTPUT

WEIGHTS is a ViT-Tiny/16 file in timm's names, IMAGES a folder of 1000 class folders, OUTPUT a path without ending: the
script writes .csv, .png and .json (the conditions). It takes half an hour on one core.
"""

import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from imagenet_samples import prepared
from matplotlib.figure import Figure
from tables import write_table
from torch import Tensor

from adaptvit import ATSConfig, FullConfig, Output, dense_macs, join, macs, meet_target
from adaptvit.files import as_json
from adaptvit.measure.speed import interleaved
from adaptvit.methods import ats
from adaptvit.methods.released import ReleasedATSConfig
from adaptvit.model import AdaptiveViT
from adaptvit.show.pictures import INK, write_png
from adaptvit.show.styles import Style, styles

BATCH, TIMED, ROUNDS, THREADS = 50, 32, 5, 1
BUDGETS = (0.8, 0.65, 0.55, 0.45)


def falling(blocks: range, patches: int) -> ATSConfig:
    """K from all patches in the first of these blocks to half of them in the last."""
    steps = torch.linspace(patches, patches / 2, len(blocks))
    return ATSConfig(blocks=blocks, tokens=[round(count) for count in steps.tolist()])


def random_patches(score: Tensor, points: float) -> Tensor:
    """As many patches as the scores would keep, but any."""
    count = QUANTILES(score, points).sum(dim=1, keepdim=True)
    order = torch.rand_like(score).masked_fill(score == 0, 2).argsort(dim=1).argsort(dim=1)
    return order < count


def by_score(score: Tensor, points: float) -> Tensor:
    """The quantiles of the scores in ascending order, as the released code has them, rather than in slot order."""
    ascending, order = score.sort(dim=1)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order, QUANTILES(ascending, points))


QUANTILES = ats.inverse_transform
SAMPLERS = {"quantiles": QUANTILES, "random": random_patches, "by score": by_score}


def run(model: AdaptiveViT, images: Tensor) -> Output:
    """The outputs of all images as one."""
    with torch.inference_mode():
        outputs = [model(batch, detailed=True) for batch in images.split(BATCH)]
    return Output(torch.cat([output.logits for output in outputs]), join([output.usage for output in outputs]))


def main(weights: Path, folder: Path, output: Path) -> None:
    """Measure, and write table, plot and conditions."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    vit, images, labels = prepared(weights, folder)
    calibration, timed = images[::8], images[:: len(images) // TIMED][:TIMED]
    patches = 196
    schedules: dict[str, tuple[ATSConfig, str]] = {
        "blocks 3-10, K even": (ATSConfig(blocks=range(3, 11)), "quantiles"),
        "blocks 1-10, K falling": (falling(range(1, 11), patches), "quantiles"),
        "blocks 2-10, K falling": (falling(range(2, 11), patches), "quantiles"),
        "blocks 2-10, K falling, by score": (falling(range(2, 11), patches), "by score"),
        "blocks 2-10, K falling, random patches": (falling(range(2, 11), patches), "random"),
    }
    entries: list[tuple[str, ATSConfig | FullConfig, str]] = [("dense", FullConfig(), "quantiles")]
    for mode in ("mask", "single"):
        entries.append((f"released, {mode}", ReleasedATSConfig(mode=mode), "quantiles"))
    for name, (config, sampler) in schedules.items():
        ats.inverse_transform = SAMPLERS[sampler]
        for budget in BUDGETS:
            try:
                entries.append((name, meet_target(config.build(vit), calibration, budget), sampler))
            except ValueError as error:
                print(f"{name} at {budget}: {error}", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    dense_right = None
    for name, config, sampler in entries:
        ats.inverse_transform = SAMPLERS[sampler]
        model = config.build(vit)
        result = run(model, images)
        right = (result.logits.argmax(dim=1) == labels).double()
        dense_right = right if dense_right is None else dense_right
        cost = macs(result.usage, model.shape).double() / 1e9
        with torch.inference_mode():
            calls = {"dense": lambda: vit(timed), "packed": lambda model=model: model(timed)}
            seconds = interleaved(calls, ROUNDS)
            usage = model(timed, detailed=True).usage
        timed_macs = macs(usage, model.shape).double().mean().item()
        gain = median(slow / fast for slow, fast in zip(seconds["dense"], seconds["packed"], strict=True))
        ideal = dense_macs(model.shape, usage.grid) / timed_macs
        row = {
            "schedule": name,
            "rate": getattr(config, "rate", ""),
            "top1": round(right.mean().item(), 4),
            "minus_dense": round((right - dense_right).mean().item(), 4),
            "standard_error": round(((right - dense_right).std() / len(right) ** 0.5).item(), 4),
            "gmacs": round(cost.mean().item(), 4),
            "gmacs_p10": round(cost.quantile(0.1).item(), 4),
            "gmacs_p90": round(cost.quantile(0.9).item(), 4),
            "tokens_per_block": " ".join(f"{n:.0f}" for n in result.usage.attended.double().mean(dim=0)),
            "packed_images_per_s": round(TIMED / median(seconds["packed"]), 1),
            "dense_images_per_s": round(TIMED / median(seconds["dense"]), 1),
            "ideal": round(ideal, 3),
            "realised": round(gain, 3),
        }
        rows.append(row)
        print(as_json(row), flush=True)
    conditions = {"threads": THREADS, "batch": TIMED, "rounds": ROUNDS, "torch": torch.__version__}
    conditions |= {"timm": timm.__version__, "load_average": os.getloadavg()[0], "images": len(images)}
    write_table(rows, conditions, output)
    plot(rows, output.with_suffix(".png"))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against the share of the MACs and against measured speed, each in turns with the dense model."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    dense = rows[0]["gmacs"] * rows[0]["ideal"]  # timm's own MACs: the first row skips what nobody reads
    names = list(dict.fromkeys(row["schedule"] for row in rows[1:]))
    skipped = {"dense": "nothing dropped; the last block computes the class token alone"}
    for name, look in {"dense": Style(INK, "*"), **styles(names)}.items():
        points = sorted((row for row in rows if row["schedule"] == name), key=lambda row: row["gmacs"])
        top1, errors = ([100 * row[part] for row in points] for part in ("top1", "standard_error"))
        for axes, x in ((left, [row["gmacs"] / dense for row in points]), (right, [row["realised"] for row in points])):
            style = ":" if "random" in name else "-"
            axes.errorbar(
                x,
                top1,
                errors,
                color=look.colour,
                marker=look.marker,
                linestyle=style,
                capsize=2,
                label=skipped.get(name, name),
            )
    left.set(xlabel=f"share of the dense MACs ({dense:.3f} GMACs), mean over images", ylabel="top-1")
    left.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    right.set(xlabel="measured speed over timm's, in turns")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#9aa5b1")
        axes.tick_params(colors=INK, length=3)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small", frameon=False
    )
    figure.suptitle("ATS off the shelf: ViT-Tiny, 1,000 ImageNet images; whiskers: one standard error", fontsize=10)
    write_png(figure, path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
