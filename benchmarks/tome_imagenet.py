"""Merging off the shelf: ToMe, and thresholds in its place, at equal numbers of tokens: accuracy against GMACs.

Then both at one budget, merging evenly or more in later blocks.

    python benchmarks/tome_imagenet.py WEIGHTS IMAGES OUTPUT

WEIGHTS is a ViT-Tiny/16 file in timm's names, IMAGES a folder of 1000 class folders, OUTPUT a path without ending: the
script writes .csv and .json (the conditions). Every fifth image fits the thresholds, the others are measured. It takes
fifteen minutes on one core.
"""

import csv
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from imagenet_samples import paired, prepared
from torch import Tensor

from adaptvit import FullConfig, MergeConfig, ToMeConfig, join, macs, meet_target
from adaptvit.files import as_json
from adaptvit.methods.merge import fit_thresholds
from adaptvit.model import AdaptiveViT

BATCH, THREADS = 50, 1
SCHEDULES = (8, 12, 16)
RELATIVE = (0.25, 0.0, 0.5)
INFLECTIONS = (0.0, 0.5, 1.0)
MERGE = MergeConfig(compared="mean key", protection=0.0, power=1.0)
"""By ToMe's similarity."""
SHARE = 0.75
"""Of the dense MACs, where schedules that rise with depth are compared."""


def run(model: AdaptiveViT, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, GMACs of each image, and the mean tokens that each block attended to."""
    with torch.inference_mode():
        outputs = [model(batch, detailed=True) for batch in images.split(BATCH)]
    usage = join([output.usage for output in outputs])
    logits = torch.cat([output.logits for output in outputs])
    return logits.log_softmax(dim=1), macs(usage, model.shape).double() / 1e9, usage.attended.double().mean(dim=0)


def main(weights: Path, folder: Path, output: Path) -> None:
    """Measure, and write table and conditions."""
    torch.set_num_threads(THREADS)
    vit, images, labels = prepared(weights, folder)
    fitting = torch.arange(len(images)) % 5 == 0
    calibration, images, labels = images[fitting], images[~fitting], labels[~fitting]
    conditions = {"threads": THREADS, "torch": torch.__version__, "timm": timm.__version__}
    conditions |= {"calibration_images": len(calibration), "images": len(images)}
    output.with_suffix(".json").write_text(as_json(conditions, indent=2) + "\n")

    dense = run(FullConfig().build(vit), images)[0]
    rows: list[dict[str, Any]] = []

    def measure(name: str, model: AdaptiveViT, other: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Top-1 and divergence of each image, `other` being those to compare with."""
        logits, gmacs, tokens = run(model, images)
        right = (logits.argmax(dim=1) == labels).double()
        divergence = (dense.exp() * (dense - logits)).sum(dim=1)
        row = {"method": name, "top1": round(right.mean().item(), 4), "divergence": round(divergence.mean().item(), 4)}
        for part, own, of in zip(
            ("top1", "divergence"), (right, divergence), other or (right, divergence), strict=True
        ):
            row[f"{part}_minus_tome"], row[f"{part}_standard_error"] = paired(own - of)
        row |= {"gmacs": round(gmacs.mean().item(), 4)}
        row |= {f"gmacs_p{p}": round(gmacs.quantile(p / 100).item(), 4) for p in (10, 90)}
        row |= {"tokens_per_block": " ".join(f"{n:.0f}" for n in tokens)}
        rows.append(row)
        print(as_json(row), flush=True)
        with output.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerows(rows)
        return right, divergence

    measure("dense", FullConfig().build(vit), None)
    for r in SCHEDULES:
        schedule = ToMeConfig(r=r)
        tome = measure(f"tome r={r}", schedule.build(vit), None)
        for relative in RELATIVE:
            model = fit_thresholds(replace(MERGE, relative=relative), vit, calibration, schedule)
            measure(f"merge r={r} relative={relative}", model, tome)
    even = None
    for inflection in INFLECTIONS:
        like = ToMeConfig(inflection=inflection).build(vit)
        met = meet_target(like, calibration[:1], SHARE)
        found = measure(f"tome {SHARE:.0%} inflection={inflection}", like, even)
        even = even or found
        schedule = ToMeConfig(r=[max(1, r) for r in met.schedule(like.depth)])
        model = fit_thresholds(MERGE, vit, calibration, schedule)
        meet_target(model, calibration, SHARE)
        measure(f"merge {SHARE:.0%} inflection={inflection}", model, even)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
