"""Merging off the shelf at five budgets, on two sets of images: what merging gains over ToMe.

    python benchmarks/off_the_shelf.py WEIGHTS IMAGES IMAGENETTE OUTPUT [BUDGET ...]

WEIGHTS is a ViT-Tiny/16 file in timm's names, IMAGES a folder of ImageNet's 1000 class folders, IMAGENETTE one of some
of them, whose images are classified among all 1000; OUTPUT a path without ending: the script writes .csv, row by row,
and .json (the conditions), and leaves out budgets that are there. Every eighth of IMAGES is for calibration; the rest,
and every third of IMAGENETTE, are measured. It takes an hour on one core.
"""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from imagenet_samples import opened, paired, prepared
from torch import Tensor, nn

from adaptvit import CalibratedConfig, FullConfig, MergeConfig, ToMeConfig, dense_macs, join, macs, meet_target
from adaptvit.files import as_json
from adaptvit.model import AdaptiveViT

BATCH = 50
BUDGETS = (0.85, 0.75, 0.65, 0.55, 0.5)
TOLERANCE = 0.002
"""Of a budget, relative to it: at half of the MACs one token less of all images is told from one more."""
STEP = 3
"""Every so many-th image of Imagenette's is measured."""

Make = Callable[[nn.Module, Tensor, float], AdaptiveViT]


def published(vit: nn.Module, images: Tensor, budget: float) -> AdaptiveViT:
    """ToMe as it is published, as many tokens in every block."""
    model = ToMeConfig().build(vit).eval()
    meet_target(model, images[:1], budget, tolerance=TOLERANCE)
    return model


def fitted(config: MergeConfig | CalibratedConfig) -> Make:
    """What `adapt` makes of a config."""
    return lambda vit, images, budget: config.fit(vit, images, budget, tolerance=TOLERANCE)


METHODS: dict[str, Make] = {
    "tome": published,
    "calibrated": fitted(CalibratedConfig()),
    "merge": fitted(MergeConfig()),
}


def run(model: AdaptiveViT, images: Tensor) -> tuple[Tensor, float]:
    """Log-probabilities, and executed MACs over the dense ones."""
    with torch.inference_mode():
        outputs = [model(batch, detailed=True) for batch in images.split(BATCH)]
    usage = join([output.usage for output in outputs])
    share = macs(usage, model.shape).double().mean().item() / dense_macs(model.shape, usage.grid)
    return torch.cat([output.logits for output in outputs]).log_softmax(dim=1), share


def measured(images: Tensor, labels: Tensor, dense: Tensor, model: AdaptiveViT) -> dict[str, Any]:
    """Of one model on one set: the share of MACs, and of each image whether it is right, as dense, and how far off."""
    found, share = run(model, images)
    right = (found.argmax(dim=1) == labels).double()
    lost = (dense.argmax(dim=1) == labels).double() - right
    return {"share": share, "right": right, "lost": lost, "divergence": (dense.exp() * (dense - found)).sum(dim=1)}


def main(weights: Path, folder: Path, imagenette: Path, output: Path, *budgets: str) -> None:
    """Measure, and write table and conditions."""
    vit, images, labels = prepared(weights, folder)
    fitting = torch.arange(len(images)) % 8 == 0
    calibration = images[fitting]
    names = sorted(one.name for one in folder.iterdir())
    classes = torch.tensor([names.index(one.name) for one in sorted(imagenette.iterdir())])
    others, numbers = opened(vit, imagenette, STEP)
    sets = {"imagenet": (images[~fitting], labels[~fitting]), "imagenette": (others, classes[numbers])}
    conditions: dict[str, Any] = {"torch": torch.__version__, "timm": timm.__version__}
    conditions |= {"calibration_images": len(calibration)} | {name: len(found) for name, (found, _) in sets.items()}
    plain = FullConfig().build(vit).eval()
    dense = {name: run(plain, found)[0] for name, (found, _) in sets.items()}
    for name, (_, right) in sets.items():
        conditions[f"{name}_dense_top1"] = round((dense[name].argmax(dim=1) == right).double().mean().item(), 4)
    output.with_suffix(".json").write_text(as_json(conditions, indent=2) + "\n")

    table = output.with_suffix(".csv")
    rows = list(csv.DictReader(table.open())) if table.exists() else []
    for budget in [float(word) for word in budgets] or BUDGETS:
        known = {(row["images"], row["method"]) for row in rows if row["budget"] == str(budget)}
        if known >= {(name, method) for name in sets for method in METHODS}:
            continue
        tome: dict[str, dict[str, Any]] = {}
        for method, make in METHODS.items():
            model = make(vit, calibration, budget)
            for name, (some, right) in sets.items():
                one = measured(some, right, dense[name], model)
                base = tome.setdefault(name, one)
                row: dict[str, Any] = {"images": name, "method": method, "budget": budget}
                row |= {"share": round(one["share"], 4), "top1": round(one["right"].mean().item(), 4)}
                for column, difference in (
                    ("lost", one["lost"]),
                    ("above_tome", base["lost"] - one["lost"]),
                    ("divergence", one["divergence"]),
                    ("divergence_over_tome", one["divergence"] - base["divergence"]),
                ):
                    row[column], row[f"{column}_error"] = paired(difference)
                row["schedule"] = " ".join(f"{number:.3g}" for number in model.config.schedule(model.depth))
                if (name, method) not in known:
                    rows.append(row)
                    print(as_json(row), flush=True)
                    with table.open("w", newline="") as file:
                        writer = csv.DictWriter(file, row)
                        writer.writeheader()
                        writer.writerows(rows)


if __name__ == "__main__":
    weights, folder, imagenette, output, *budgets = sys.argv[1:]
    main(Path(weights), Path(folder), Path(imagenette), Path(output), *budgets)
