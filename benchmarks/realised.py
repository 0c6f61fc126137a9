"""What is realised of the ideal gain by every method, and what could be:

    python benchmarks/realised.py WEIGHTS IMAGES MODELS [OUTPUT]
    python benchmarks/realised.py draw OUTPUT PICTURE

WEIGHTS is a ViT-Tiny/16 file in timm's names, IMAGES a folder of ImageNet's class folders. Models at half of the dense
MACs are made for 224 and 128 pixels and kept in the folder MODELS; with OUTPUT, a path without ending, all are timed in
turns, at batch 32 and 1, and a table is written there as .csv, its conditions as .json. Decisions of AdaViT and
DynamicViT, which have to be trained, are drawn at random and by untrained predictors.

`bare` is timm's own blocks on as many tokens, by slices, of an image by itself at batch 1 and of the mean image at 32:
what a method could have if deciding took nothing and all images were alike. AdaViT has none: it drops heads too.
"""

import csv
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from bare_blocks import Bare
from imagenet_samples import opened
from matplotlib.figure import Figure
from tables import write_table
from torch import Tensor, nn
from torch.nn.functional import interpolate

from adaptvit import dense_macs, load, macs, meet_target, save
from adaptvit.files import as_json
from adaptvit.measure.speed import interleaved
from adaptvit.methods import METHODS
from adaptvit.show.pictures import INK, write_png
from adaptvit.show.styles import styles
from adaptvit.usage import Usage
from adaptvit.weights.opening import start_from

SIDES, BUDGET, IMAGES, THREADS = (224, 128), 0.5, 32, 2
FITTED = 8
"""Images that models are made on: it is only their speed that counts."""
ROUNDS = {32: 12, 1: 15}
SETTINGS = {
    "adavit": {"random": True, "macs_target": None},
    "ats": {"blocks": range(1, 12)},
    "evit": {"blocks": (1, 4, 7)},
}
NAMES = ("avit", "ats", "adavit", "evit", "dynamicvit", "tome", "calibrated", "merge")


def made(weights: Path, folder: Path, models: Path, side: int) -> tuple[nn.Module, Tensor, dict[str, nn.Module]]:
    """The plain ViT, its images, and the models around it at the budget, read back where they were made before."""
    vit = timm.create_model("vit_tiny_patch16_224", img_size=side).eval()
    start_from(vit, weights)
    images, _ = opened(vit, folder, 1000 // IMAGES)
    images = interpolate(images[:IMAGES], side, mode="area")
    found = {}
    for name in NAMES:
        file = models / f"{name}_{side}.safetensors"
        if not file.exists():
            torch.manual_seed(0)
            model = METHODS[name](**SETTINGS.get(name, {})).fitted(vit, images[:FITTED], BUDGET)
            meet_target(model, images[:FITTED], BUDGET, tolerance=0.02)
            save(model, file)
        found[name] = load(file).eval()
    return vit, images, found


def each(models: Sequence[nn.Module], batches: Sequence[Tensor]) -> None:
    """The forward pass of each batch, by the model of its own; what is drawn is drawn alike each time."""
    torch.manual_seed(0)
    for model, batch in zip(models, batches, strict=True):
        model(batch)


def bare(vit: nn.Module, usage: Usage) -> Bare:
    """The ViT's own blocks on as many tokens as the images have in the mean, as many in attention and in the MLP."""
    attended = usage.attended.double().mean(dim=0).round().int().clamp(min=1).tolist()
    updated = usage.updated.double().mean(dim=0).round().int().clamp(min=1).tolist()
    return Bare(vit, attended, updated if usage.groups is None else [*attended[1:], 1])


def draw(output: Path, picture: Path) -> None:
    """Realised over ideal, beside what bare blocks have of it: a picture, and a table for a page."""
    with output.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    print("| pixels | batch | method | ideal | realised | ratio | bare blocks |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        ratios = (f"{row[key + '_ratio']} ± {row[key + '_error']}" if row[key] else "" for key in ("realised", "bare"))
        print("|", " | ".join([*(row[key] for key in ("side", "batch", "method", "ideal", "realised")), *ratios]), "|")
    looks = styles(NAMES)
    figure = Figure(figsize=(10, 6), layout="constrained")
    cells = [(batch, side) for batch in ROUNDS for side in SIDES]
    for axes, (batch, side) in zip(figure.subplots(2, 2, sharey=True).flat, cells, strict=True):
        some = [row for row in rows if (int(row["batch"]), int(row["side"])) == (batch, side)]
        for place, row in enumerate(some):
            look = looks[row["method"]]
            kind: dict[str, Any] = {"color": look.colour, "linestyle": "", "capsize": 3}
            for key, shift, marker, fill in (("realised", -0.1, look.marker, "full"), ("bare", 0.1, "_", "none")):
                if row[f"{key}_ratio"]:
                    values = float(row[f"{key}_ratio"]), 2 * float(row[f"{key}_error"])
                    axes.errorbar(place + shift, *values, marker=marker, markersize=9, fillstyle=fill, **kind)
        goal = 0.95 if batch > 1 else 0.9
        axes.axhline(goal, color=INK, linewidth=0.7, linestyle="--")
        axes.set_xticks(range(len(some)), [row["method"] for row in some], rotation=20)
        axes.set_title(f"batch {batch}, {side} pixels: goal {goal}")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supylabel("realised over ideal gain (symbols), bare blocks' (lines)")
    write_png(figure, picture)


def main(weights: Path, folder: Path, models: Path, output: Path | None) -> None:
    """Make the models, and time them."""
    torch.set_num_threads(THREADS)
    models.mkdir(parents=True, exist_ok=True)
    rows = []
    for side in SIDES:
        vit, images, found = made(weights, folder, models, side)
        if output is None:
            continue
        for batch, rounds in ROUNDS.items():
            parts = images.split(batch)[: 8 if batch == 1 else 1]
            with torch.inference_mode():
                usage: dict[str, list[Usage]] = {}
                for name, model in found.items():
                    torch.manual_seed(0)
                    usage[name] = [model(part, detailed=True).usage for part in parts]
                timed: dict[str, list[nn.Module]] = {
                    name: [model] * len(parts) for name, model in {"dense": vit, **found}.items()
                }
                for name, own in usage.items():
                    if name != "adavit":
                        timed[f"bare {name}"] = [bare(vit, one) for one in own]
                calls = {name: partial(each, own, parts) for name, own in timed.items()}
                seconds = interleaved(calls, rounds, bar=f"{side} pixels, batch {batch}")
            for name, model in found.items():
                cost = torch.cat([macs(one, model.shape).double() for one in usage[name]]).mean().item()
                ideal = dense_macs(model.shape, usage[name][0].grid) / cost
                row: dict[str, Any] = {"side": side, "batch": batch, "method": name, "ideal": round(ideal, 3)}
                for key, run in (("realised", name), ("bare", f"bare {name}")):
                    if run in seconds:
                        gains = torch.tensor(seconds["dense"]) / torch.tensor(seconds[run])
                        row[key] = round(gains.median().item(), 3)
                        row[f"{key}_ratio"] = round(gains.median().item() / ideal, 3)
                        row[f"{key}_error"] = round(gains.std().item() / ideal / rounds**0.5, 3)
                rows.append(row)
                print(as_json(row), flush=True)
    if output is not None:
        conditions = {"torch": torch.__version__, "threads": THREADS, "load_average": os.getloadavg()[0]}
        write_table(rows, conditions, output)


if __name__ == "__main__":
    if sys.argv[1] == "draw":
        draw(*map(Path, sys.argv[2:]))
    else:
        weights, folder, models, *output = map(Path, sys.argv[1:])
        main(weights, folder, models, output[0] if output else None)
