"""What is realised of the ideal gain by every method: python benchmarks/realised.py WEIGHTS IMAGES MODELS [OUTPUT]

WEIGHTS is a ViT-Tiny/16 file in timm's names, IMAGES a folder of ImageNet's class folders. Models at half of the dense
MACs are made for 224 and 128 pixels and kept in the folder MODELS; with OUTPUT, a path without ending, all are timed in
turns, at batch 32 and 1, and a table is written there as .csv, its conditions as .json. Decisions of AdaViT and
DynamicViT, which have to be trained, are drawn at random and by untrained predictors.
"""

import csv
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from imagenet_samples import opened
from torch import Tensor, nn
from torch.nn.functional import interpolate

from adaptvit import dense_macs, load, macs, meet_target, save
from adaptvit.files import as_json
from adaptvit.measure.speed import interleaved
from adaptvit.methods import METHODS
from adaptvit.weights.opening import start_from

SIDES, BUDGET, IMAGES, THREADS = (224, 128), 0.5, 32, 2
FITTED = 8
"""Images that models are made on: it is only their speed that counts."""
ROUNDS = {32: 8, 1: 3}
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


def one_by_one(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Their forward passes."""
    for batch in batches:
        model(batch)


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
            torch.manual_seed(0)
            parts = images.split(batch)[: 8 if batch == 1 else 1]
            with torch.inference_mode():
                usage = {name: [model(part, detailed=True).usage for part in parts] for name, model in found.items()}
                calls = {name: partial(one_by_one, model, parts) for name, model in {"dense": vit, **found}.items()}
                seconds = interleaved(calls, rounds * (1 if batch > 1 else 3))
            for name, model in found.items():
                cost = torch.cat([macs(one, model.shape).double() for one in usage[name]]).mean().item()
                gains = torch.tensor(seconds["dense"]) / torch.tensor(seconds[name])
                ideal = dense_macs(model.shape, usage[name][0].grid) / cost
                row = {"side": side, "batch": batch, "method": name, "ideal": round(ideal, 3)}
                row |= {"realised": round(gains.median().item(), 3), "ratio": round(gains.median().item() / ideal, 3)}
                row["ratio_spread"] = round(gains.std().item() / ideal, 3)
                rows.append(row)
                print(as_json(row), flush=True)
    if output is not None:
        with output.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        conditions = {"torch": torch.__version__, "threads": THREADS, "load_average": os.getloadavg()[0]}
        output.with_suffix(".json").write_text(as_json(conditions, indent=2) + "\n")


if __name__ == "__main__":
    weights, folder, models, *output = map(Path, sys.argv[1:])
    main(weights, folder, models, output[0] if output else None)
