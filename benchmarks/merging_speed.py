"""Merging's accuracy against its measured speed: python benchmarks/merging_speed.py WEIGHTS IMAGES TABLE OUTPUT

WEIGHTS is a ViT-Tiny/16 file in timm's names, IMAGES a folder of ImageNet's class folders, TABLE what off_the_shelf.py
wrote: accuracies, and the schedules of the models, which are built again and timed in turns beside timm's model, at
batch 32 and 8, two threads. OUTPUT is a path without ending, of a table (.csv), its conditions (.json) and a picture.
"""

import csv
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from imagenet_samples import opened
from matplotlib.figure import Figure
from tables import write_table
from torch import nn

from adaptvit import CalibratedConfig, MergeConfig, ToMeConfig, dense_macs, macs
from adaptvit.files import as_json
from adaptvit.measure.speed import interleaved
from adaptvit.show.pictures import INK, write_png
from adaptvit.show.styles import styles
from adaptvit.weights.opening import start_from

BUDGETS, IMAGES, THREADS = ("0.75", "0.65", "0.55", "0.5"), 32, 2
ROUNDS = {32: 8, 8: 16}
TITLES = {"tome": "ToMe", "calibrated": "calibrated merging", "merge": "merging by similarity"}


def built(vit: nn.Module, method: str, schedule: str) -> nn.Module:
    """The model of a row."""
    numbers = [float(word) for word in schedule.split()]
    if method == "merge":
        return MergeConfig(thresholds=numbers).build(vit).eval()
    kind = CalibratedConfig if method == "calibrated" else ToMeConfig
    return kind(r=[int(number) for number in numbers]).build(vit).eval()


def drawn(rows: list[dict[str, Any]], file: Path) -> None:
    """Points lost against the speed over timm's, a panel for each batch and set of images."""
    kinds = [("imagenet", "875 ImageNet samples"), ("imagenette", "1308 Imagenette images, of 1000 classes")]
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(len(kinds), len(ROUNDS), sharey="row", sharex="col")
    for line, (images, title) in zip(axes, kinds, strict=True):
        for axis, batch in zip(line, ROUNDS, strict=True):
            for method, look in styles(TITLES).items():
                some = [row for row in rows if (row["method"], row["batch"]) == (method, batch)]
                x, y = ([row[name] for row in some] for name in ("realised", f"lost_{images}"))
                error = [row[f"error_{images}"] for row in some]
                axis.errorbar(x, y, error, color=look.colour, marker=look.marker, label=TITLES[method], capsize=2)
            axis.set_title(f"{title}, batch {batch}", fontsize=10)
            axis.grid(alpha=0.3)
            axis.axhline(0, color=INK, linewidth=0.5)
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("points of top-1 lost")
        line[0].invert_yaxis()
    for axis in axes[-1]:
        axis.set_xlabel("times as fast as timm's model, measured")
    axes[0, 0].legend(frameon=False)
    figure.suptitle("ViT-Tiny, nothing trained, at 75 to 50 % of the MACs; whiskers: one standard error", fontsize=11)
    write_png(figure, file)


def main(weights: Path, folder: Path, table: Path, output: Path) -> None:
    """Time, and write table, conditions and picture."""
    torch.set_num_threads(THREADS)
    vit = timm.create_model("vit_tiny_patch16_224").eval()
    start_from(vit, weights)
    images = opened(vit, folder, 1000 // IMAGES)[0][:IMAGES]
    found = {(row["images"], row["method"], row["budget"]): row for row in csv.DictReader(table.open())}
    models = {
        (method, budget): built(vit, method, found["imagenet", method, budget]["schedule"])
        for budget in BUDGETS
        for method in TITLES
    }
    rows = []
    for batch, rounds in ROUNDS.items():
        some = images[:batch]
        with torch.inference_mode():
            usage = {key: model(some, detailed=True).usage for key, model in models.items()}
            calls = {"dense": partial(vit, some)} | {
                " ".join(key): partial(model, some) for key, model in models.items()
            }
            seconds = interleaved(calls, rounds)
        for (method, budget), model in models.items():
            gains = torch.tensor(seconds["dense"]) / torch.tensor(seconds[f"{method} {budget}"])
            cost = macs(usage[method, budget], model.shape).double().mean().item()
            row: dict[str, Any] = {"batch": batch, "method": method, "budget": budget}
            row["ideal"] = round(dense_macs(model.shape, usage[method, budget].grid) / cost, 3)
            row["realised"] = round(gains.median().item(), 3)
            row["realised_error"] = round(gains.std().item() / rounds**0.5, 3)
            for name in ("imagenet", "imagenette"):
                one = found[name, method, budget]
                row |= {f"{kind}_{name}": round(100 * float(one[f"lost{end}"]), 2) for kind, end in ENDS.items()}
            rows.append(row)
            print(as_json(row), flush=True)
    conditions = {"torch": torch.__version__, "threads": THREADS, "load_average": os.getloadavg()[0], "rounds": ROUNDS}
    write_table(rows, conditions, output)
    drawn(rows, output.with_suffix(".png"))


ENDS = {"lost": "", "error": "_error"}

if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
