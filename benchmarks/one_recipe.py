"""Every method fine-tuned by one recipe from one dense ViT-Tiny.

    python benchmarks/one_recipe.py WEIGHTS DATA OUTPUT [CELL ...]

WEIGHTS is a ViT-Tiny/16 file with ImageNet's head, whose ten rows the dense model begins with; DATA Imagenette with
`train` and `val`. A CELL is METHOD:BUDGET, such as avit:0.5. OUTPUT is a folder, which goes on where it was stopped: a
third of the training images, every second test image, the models, and `cells.jsonl`, a line a cell. One seed.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import timm
import torch

from adaptvit import FullConfig, dense_macs, macs, save
from adaptvit.files import as_json
from adaptvit.macs import Shape
from adaptvit.measure.evaluate import Result
from adaptvit.training.recipes import RECIPES
from adaptvit.training.run import Run, train_run
from adaptvit.weights.opening import start_from

CLASSES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
"""ImageNet's numbers of Imagenette's folders."""
SIDE, EPOCHS, THIRD, HALF = 128, 2, 3, 2
CELLS = [f"{method}:0.5" for method in ("avit", "dynamicvit", "ats", "calibrated", "evit", "adavit", "tome", "merge")]


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([t.argsort().argsort().double() for t in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def beginning(weights: Path, file: Path) -> None:
    """The ViT with its own rows of the head."""
    whole = timm.create_model("vit_tiny_patch16_224", img_size=SIDE)
    start_from(whole, weights)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, num_classes=len(CLASSES))
    kept = {name: value for name, value in whole.state_dict().items() if not name.startswith("head.")}
    rows = {f"head.{name}": value[list(CLASSES)] for name, value in whole.head.state_dict().items()}
    vit.load_state_dict(kept | rows)
    save(FullConfig().build(vit.eval()), file)


def some(data: Path, folder: Path, split: str, step: int) -> None:
    """Links to every `step`-th image of a split."""
    for number, image in enumerate(sorted((data / split).glob("*/*.jpg"))):
        link = folder / split / image.parent.name / image.name
        if number % step == 0 and not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image.resolve())


def told(run: Run, weights: Path, images: Path, epochs: int, output: Path) -> Run:
    """A recipe with what is the same for all here."""
    recipe = replace(run.recipe, epochs=epochs, precision="bfloat16", evaluate_every=0)
    data = replace(run.data, root=images, workers=1)
    return replace(run, weights=weights, data=data, recipe=recipe, output=output)


def line(cell: str, result: Result, dense: Result, shape: Shape) -> dict[str, object]:
    """What came of a cell, with the paired difference from the dense model in points and its standard error."""
    lost = 100 * (dense.correct.double() - result.correct.double())
    cost = macs(result.usage, shape).double() / dense_macs(shape, result.usage.grid)
    tenths = cost.argsort().tensor_split(10)
    return {
        "cell": cell,
        "images": len(lost),
        "top1": 100 * result.correct.double().mean().item(),
        "lost": lost.mean().item(),
        "lost_error": (lost.std() / len(lost) ** 0.5).item(),
        "share": cost.mean().item(),
        "share_spread": cost.std().item(),
        "depth_spread": result.depth_spread,
        "rank_correlation_of_macs_and_dense_loss": rank_correlation(cost, dense.losses),
        "top1_of_least_and_most": [
            100 * result.correct[part].double().mean().item() for part in (tenths[0], tenths[-1])
        ],
        "dense_top1_of_these": [100 * dense.correct[part].double().mean().item() for part in (tenths[0], tenths[-1])],
    }


def main(weights: Path, data: Path, output: Path, *cells: str) -> None:
    """Train, cell by cell, and write a line for each."""
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    images, start, table = output / "images", output / "start.safetensors", output / "cells.jsonl"
    some(data, images, "train", THIRD)
    some(data, images, "val", HALF)
    if not start.exists():
        beginning(weights, start)
    taught = train_run(told(RECIPES["imagenette_dense"](), start, images, 1, output / "dense"), resume=True)
    file, dense = taught.file, taught.result
    known = {json.loads(row)["cell"] for row in table.read_text().splitlines()} if table.exists() else set()
    for cell in [cell for cell in cells or CELLS if cell not in known]:
        method, budget = cell.split(":")
        made = told(RECIPES[f"imagenette_{method}"](), file, images, EPOCHS, output / cell.replace(":", "_"))
        made = replace(made, teacher=str(file), recipe=replace(made.recipe, target=float(budget)))
        outcome = train_run(made, resume=True)
        row = line(cell, outcome.result, dense, outcome.model.shape)
        row["trained_share"] = outcome.history[-1].macs
        row["epochs"], row["train_images"] = EPOCHS, len(list((images / "train").glob("*/*")))
        with table.open("a") as lines:
            lines.write(as_json(row) + "\n")


if __name__ == "__main__":
    weights, data, output, *cells = sys.argv[1:]
    main(Path(weights), Path(data), Path(output), *cells)
