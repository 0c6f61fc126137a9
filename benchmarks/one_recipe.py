"""Every method fine-tuned by one recipe from one dense ViT-Tiny, at half of the MACs, and steered up from there.

    python benchmarks/one_recipe.py WEIGHTS DATA OUTPUT [CELL ...]
    python benchmarks/one_recipe.py benchmarks/one_recipe.jsonl         # the table of such lines, over seeds

WEIGHTS is a ViT-Tiny/16 file with ImageNet's head, whose ten rows the dense model begins with; DATA Imagenette with
`train` and `val`. A CELL is METHOD, METHOD:SEED or METHOD:SEED:EPOCHS. OUTPUT is a folder, which goes on
where it was stopped: the models, and `cells.jsonl`, a line a cell and budget.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from adaptvit import FullConfig, dense_macs, macs, save
from adaptvit.data import open_data, preparation, spread_over
from adaptvit.files import as_json
from adaptvit.macs import Shape
from adaptvit.measure.evaluate import Result, evaluate
from adaptvit.methods import METHODS, turned
from adaptvit.training.recipes import RECIPES
from adaptvit.training.run import Run, train_run
from adaptvit.weights.opening import start_from

CLASSES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
"""ImageNet's numbers of Imagenette's folders."""
SIDE, EPOCHS, BUDGETS, FITTED = 128, 3, (0.5, 0.65), 256
CELLS = [
    f"{method}:{seed}"
    for seed in range(3)
    for method in ("merge", "ats", "avit", "adavit", "evit", "dynamicvit", "tome", "calibrated", "exit")
]
SETTINGS = {"avit_class": {"class_token": "halts"}, "dynamicvit_threshold": {"select": "threshold"}}
"""Of methods that differ from the recipe's."""


def titled(method: str) -> str:
    """What a cell's method is called."""
    settings = "".join(f", {name.replace('_', ' ')} {value}" for name, value in SETTINGS.get(method, {}).items())
    return METHODS[method.partition("_")[0] if settings else method].title + settings


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


def told(run: Run, weights: Path, images: Path, output: Path, seed: int = 0, epochs: int = EPOCHS) -> Run:
    """A recipe with what is the same for all here."""
    recipe = replace(run.recipe, epochs=epochs, precision="bfloat16", evaluate_every=0, seed=seed)
    data = replace(run.data, root=images, workers=1)
    return replace(run, weights=weights, data=data, recipe=recipe, output=output)


def line(cell: str, budget: float, result: Result, dense: Result, shape: Shape) -> dict[str, object]:
    """What came of a cell, with the paired difference from the dense model in points and its standard error."""
    lost = 100 * (dense.correct.double() - result.correct.double())
    cost = macs(result.usage, shape).double() / dense_macs(shape, result.usage.grid)
    tenths = cost.argsort().tensor_split(10)
    return {
        "cell": cell,
        "budget": budget,
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


def by_method(rows: Iterable[dict[str, Any]]) -> dict[str, list[list[dict[str, Any]]]]:
    """The lines of each method, over its seeds, at each of `BUDGETS`."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for row in rows:
        budgets = found.setdefault(row["cell"].partition(":")[0], [[] for _ in BUDGETS])
        budgets[BUDGETS.index(row["budget"])].append(row)
    return found


def told_over_seeds(rows: list[dict[str, Any]]) -> str:
    """A table of a method's means and standard deviations over its seeds."""
    lines = [
        "| | seeds | lost at half | at its MACs | steered up | at its MACs | rank correlation | depth over images |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, (half, up) in by_method(rows).items():

        def mean(some: list[dict[str, Any]], name: str, scale: float = 1.0, digits: int = 1) -> str:
            values = torch.tensor([scale * row[name] for row in some], dtype=torch.float64)
            return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(some) > 1 else "")

        follows = mean(half, "rank_correlation_of_macs_and_dense_loss", 1, 2) if half[0]["share_spread"] > 1e-6 else ""
        depth = f"± {mean(half, 'depth_spread').partition(' ')[0]}" if follows else ""
        shares = [mean(some, "share", 100).partition(" ")[0] + " %" for some in (half, up)]
        cells = [mean(half, "lost"), shares[0], mean(up, "lost"), shares[1], follows, depth]
        lines.append(f"| {method} | {len(half)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(weights: Path, data: Path, output: Path, *cells: str) -> None:
    """Train, cell by cell, and write its lines."""
    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    start, table = output / "start.safetensors", output / "cells.jsonl"
    if not start.exists():
        beginning(weights, start)
    taught = train_run(told(RECIPES["imagenette_dense"](), start, data, output / "dense"), resume=True)
    file, dense = taught.file, taught.result
    known = {json.loads(row)["cell"] for row in table.read_text().splitlines()} if table.exists() else set()
    for cell in [cell for cell in cells or CELLS if cell not in known]:
        method, seed, epochs = (cell + "::").split(":")[:3]
        run = RECIPES[f"imagenette_{method.partition('_')[0]}"]()
        run = replace(run, teacher=str(file), method=replace(run.method, **SETTINGS.get(method, {})))
        run = told(run, file, data, output / cell.replace(":", "_"), int(seed or 0), int(epochs or EPOCHS))
        outcome = train_run(run, resume=True)
        opened = open_data(run.data, preparation(outcome.model, cell))
        results = {BUDGETS[0]: outcome.result}
        for budget in BUDGETS[1:]:
            turned(outcome.model, spread_over(opened.calibration, FITTED).images, budget)
            save(outcome.model, run.output / f"at_{budget}.safetensors")
            results[budget] = evaluate(outcome.model, opened.test, batch_size=64)
        rows = []
        for budget, result in results.items():
            found = line(cell, budget, result, dense, outcome.model.shape)
            found |= {"trained_share": outcome.history[-1].macs, "dense_top1": 100 * dense.top1}
            found |= {"epochs": run.recipe.epochs}
            rows.append(as_json(found) + "\n")
        with table.open("a") as lines:
            lines.write("".join(rows))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(told_over_seeds([json.loads(row) for row in Path(sys.argv[1]).read_text().splitlines()]))
    else:
        weights, data, output, *cells = sys.argv[1:]
        main(Path(weights), Path(data), Path(output), *cells)
