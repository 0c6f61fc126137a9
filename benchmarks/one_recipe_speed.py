"""What one_recipe.py trained, by measured speed: python benchmarks/one_recipe_speed.py DATA OUTPUT TABLE

DATA is Imagenette, OUTPUT the folder of one_recipe.py, TABLE a path without ending of its lines (.jsonl), of speeds
(.csv), conditions (.json) and a picture (.png). The models of seed 0 are timed in turns beside timm's, in batches of
32, two threads; points lost are means over seeds.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from one_recipe import BUDGETS, by_method, titled
from tables import write_table

from adaptvit import load
from adaptvit.data import DataConfig, open_data, preparation, spread_over
from adaptvit.files import as_json
from adaptvit.measure.speed import speeds
from adaptvit.show.pictures import INK, write_png
from adaptvit.show.styles import styles

BATCH, THREADS, ROUNDS = 32, 2, 12


def drawn(rows: list[dict[str, Any]], file: Path) -> None:
    """Points lost against the speed over timm's, a line a method."""
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axis = figure.subplots()
    for method, look in styles(dict.fromkeys(row["method"] for row in rows)).items():
        some = [row for row in rows if row["method"] == method]
        x, y, spread = ([row[name] for row in some] for name in ("gain", "lost", "spread"))
        axis.errorbar(x, y, spread, color=look.colour, marker=look.marker, label=titled(method), capsize=2)
    axis.axhline(0, color=INK, linewidth=0.5)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set(xlabel="times as fast as timm's model, measured", ylabel="points of top-1 lost")
    axis.invert_yaxis()
    axis.legend(frameon=False)
    axis.set_title(
        "ViT-Tiny on Imagenette, one recipe: at half of the MACs, and steered up to 65 %\n"
        "whiskers: standard deviation over seeds",
        fontsize=10,
    )
    write_png(figure, file)


def main(data: Path, output: Path, table: Path) -> None:
    """Time, and write table, conditions and picture."""
    torch.set_num_threads(THREADS)
    found = by_method(json.loads(row) for row in table.with_suffix(".jsonl").read_text().splitlines())
    dense = load(output / "dense" / "model.safetensors").eval()
    test = open_data(DataConfig(root=data, crop_pct=1.0, workers=0), preparation(dense, "dense")).test
    images = spread_over(test, BATCH).images
    files = {budget: "model" if budget == BUDGETS[0] else f"at_{budget}" for budget in BUDGETS}
    models = {
        f"{method} {budget}": load(output / f"{method}_0" / f"{file}.safetensors").eval()
        for method in found
        for budget, file in files.items()
    }
    timed = speeds(models, dict.fromkeys(models, images), ROUNDS, ["packed"], (dense.vit, images), "timing")
    rows = []
    for method, seeds in found.items():
        for budget, own in zip(BUDGETS, seeds, strict=True):
            lost = torch.tensor([row["lost"] for row in own], dtype=torch.float64)
            speed = timed[f"{method} {budget}"]
            row: dict[str, Any] = {"method": method, "budget": budget, "seeds": len(own)}
            row |= {"lost": round(lost.mean().item(), 2), "spread": round(lost.std().item(), 2) if len(own) > 1 else 0}
            row |= {"gain": round(speed.gain, 3), "ideal": round(speed.ideal, 3), "ratio": round(speed.ratio, 3)}
            rows.append(row)
            print(as_json(row), flush=True)
    conditions = {"torch": torch.__version__, "threads": THREADS, "load_average": os.getloadavg()[0], "rounds": ROUNDS}
    write_table(rows, conditions, table)
    drawn(rows, table.with_suffix(".png"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
