"""Fine-tuned models side by side: python benchmarks/imagenette.py DATA DENSE AVIT [AVIT ...] > imagenette.jsonl

DATA is a folder with `val`; the others are model files of `adaptvit train`, the first the dense one. Accuracy with the
paired difference from the dense model and its standard error, MACs, depth, what depth goes with, and speed in turns.
"""

import os
import sys
from pathlib import Path
from statistics import median

import torch
from timm.data import resolve_model_data_config

from adaptvit import Masked, Packed, dense_macs, macs
from adaptvit.data import DataConfig, collate, open_split
from adaptvit.files import as_json
from adaptvit.measure.evaluate import evaluate
from adaptvit.measure.speed import interleaved
from adaptvit.weights.opening import open_model

BATCH, ROUNDS = 64, 20


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([t.argsort().argsort().double() for t in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def main(data: Path, files: list[str]) -> None:
    """Print a JSON line per model."""
    torch.set_num_threads(2)
    models = {name: open_model(name) for name in files}
    dense = models[files[0]]
    split = open_split(DataConfig(root=data), resolve_model_data_config(dense), "validation")
    results = {name: evaluate(model, split, batch_size=BATCH, workers=2) for name, model in models.items()}
    images = collate([split[index * len(split) // BATCH] for index in range(BATCH)]).images
    runs = {files[0]: lambda: dense.vit(images)}
    for name, model in list(models.items())[1:]:
        runs[f"{name} packed"] = lambda model=model: model(images, Packed)
        runs[f"{name} masked"] = lambda model=model: model(images, Masked)
    with torch.inference_mode():
        seconds = interleaved(runs, ROUNDS)
        batch_usage = {name: model(images, detailed=True).usage for name, model in models.items()}
    difficulty = results[files[0]].losses
    for name, model in models.items():
        result = results[name]
        row = {"model": name, **{key: value for key, value in result.figures.items() if value is not None}}
        row["images_per_s"] = BATCH / median(seconds[name if name == files[0] else f"{name} packed"])
        if name != files[0]:
            right = result.correct.double() - results[files[0]].correct.double()
            row["top1_minus_dense"] = right.mean().item()
            row["standard_error"] = (right.std() / len(right) ** 0.5).item()
            pairs = zip(seconds[files[0]], seconds[f"{name} packed"], strict=True)
            row["realised_speedup"] = median(slow / fast for slow, fast in pairs)
            usage = batch_usage[name]
            row["ideal_speedup"] = dense_macs(model.shape, usage.grid) / macs(usage, model.shape).double().mean().item()
            row["masked_images_per_s"] = BATCH / median(seconds[f"{name} masked"])
            cost = macs(result.usage, model.shape).double() / dense_macs(model.shape, result.usage.grid)
            row["rank_correlation_of_macs_and_dense_loss"] = rank_correlation(cost, difficulty)
            row["rank_correlation_of_macs_and_own_loss"] = rank_correlation(cost, result.losses)
            fifths = cost.argsort().tensor_split(5)
            row["macs_of_the_cheapest_to_the_dearest_fifth"] = [round(cost[part].mean().item(), 3) for part in fifths]
            row["dense_loss_of_these"] = [round(difficulty[part].mean().item(), 3) for part in fifths]
            row["top1_of_these"] = [round(result.correct[part].double().mean().item(), 3) for part in fifths]
        print(as_json(row))
    print(as_json({"load_average": os.getloadavg()[0], "batch": BATCH, "rounds": ROUNDS, "torch": torch.__version__}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
