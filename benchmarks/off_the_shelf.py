"""Merging off the shelf at five budgets: what schedule, similarity and counts of each image buy over ToMe.

    python benchmarks/off_the_shelf.py WEIGHTS IMAGES OUTPUT [BUDGET ...]

WEIGHTS is a ViT-Tiny/16 file in timm's names, IMAGES a folder of ImageNet's class folders, OUTPUT a path without
ending: the script writes .csv, row by row, and .json (the conditions), and leaves out rows that are there. Every eighth
image is for calibration, the others are measured. Of 1000 images it takes half an hour on one core.
"""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from imagenet_samples import paired, prepared
from torch import Tensor, nn

from adaptvit import CalibratedConfig, FullConfig, MergeConfig, ToMeConfig, dense_macs, join, macs, meet_target
from adaptvit.files import as_json
from adaptvit.model import AdaptiveViT

BATCH = 50
BUDGETS = (0.85, 0.75, 0.65, 0.55, 0.5)
TOLERANCE = 0.002
"""Of a budget, relative to it: at half of the MACs one token less of all images is told from one more."""
AS_TOME: dict[str, Any] = {"compared": "mean key", "protection": 0.0, "power": 1.0}

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
    "calibrated, by ToMe's similarity": fitted(CalibratedConfig(**AS_TOME)),
    "merge": fitted(MergeConfig()),
}


def run(model: AdaptiveViT, images: Tensor) -> tuple[Tensor, float]:
    """Log-probabilities, and executed MACs over the dense ones."""
    with torch.inference_mode():
        outputs = [model(batch, detailed=True) for batch in images.split(BATCH)]
    usage = join([output.usage for output in outputs])
    share = macs(usage, model.shape).double().mean().item() / dense_macs(model.shape, usage.grid)
    return torch.cat([output.logits for output in outputs]).log_softmax(dim=1), share


def main(weights: Path, folder: Path, output: Path, *budgets: str) -> None:
    """Measure, and write table and conditions."""
    torch.set_num_threads(1)
    vit, images, labels = prepared(weights, folder)
    fitting = torch.arange(len(images)) % 8 == 0
    calibration, images, labels = images[fitting], images[~fitting], labels[~fitting]
    conditions = {"torch": torch.__version__, "timm": timm.__version__}
    conditions |= {"calibration_images": len(calibration), "images": len(images)}
    output.with_suffix(".json").write_text(as_json(conditions, indent=2) + "\n")

    table = output.with_suffix(".csv")
    rows = list(csv.DictReader(table.open())) if table.exists() else []
    known = {(row["method"], row["budget"]) for row in rows}
    dense, _ = run(FullConfig().build(vit).eval(), images)
    dense_right = (dense.argmax(dim=1) == labels).double()
    for budget in [float(word) for word in budgets] or BUDGETS:
        reference: tuple[Tensor, Tensor] | None = None
        for name, make in METHODS.items():
            if (name, str(budget)) in known and name != "tome":
                continue
            model = make(vit, calibration, budget)
            found, share = run(model, images)
            right = (found.argmax(dim=1) == labels).double()
            divergence = (dense.exp() * (dense - found)).sum(dim=1)
            reference = reference or (right, divergence)
            row: dict[str, Any] = {"method": name, "budget": budget, "share": round(share, 4)}
            row["top1"] = round(right.mean().item(), 4)
            for column, difference in (
                ("lost", dense_right - right),
                ("above_tome", right - reference[0]),
                ("divergence", divergence),
                ("divergence_over_tome", divergence - reference[1]),
            ):
                row[column], row[f"{column}_error"] = paired(difference)
            schedule = model.config.schedule(model.depth)
            row["schedule"] = " ".join(f"{number:.3g}" for number in schedule)
            if (name, str(budget)) not in known:
                rows.append(row)
                print(as_json(row), flush=True)
                with table.open("w", newline="") as file:
                    writer = csv.DictWriter(file, row)
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    weights, folder, output, *budgets = sys.argv[1:]
    main(Path(weights), Path(folder), Path(output), *budgets)
