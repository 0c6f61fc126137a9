"""Vision towers whose tokens a language model reads, 2 x 2 patches together: what they keep, cost and take.

    python benchmarks/tower.py WEIGHTS IMAGES     # a ViT-Tiny/16 file in timm's names, a folder of pictures

Inside of the tower tokens are merged or dropped; before its merger, which takes neighbours on the grid, every patch has
a vector again. `cosine` is that of what the merger is given, of real images through real weights: ViT-Tiny's features,
2 x 2 side by side, to the dense model's, mean and 10th percentile over groups. `gain` is of Qwen3-VL's 88M tower with
its merger, at 448 px and weights at random, which the speed of merging does not go by; realised over the dense tower,
in turns.
Writes tower.jsonl.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, pixel_unshuffle

from adaptvit import (
    ATSConfig,
    CalibratedConfig,
    FullConfig,
    MergeConfig,
    MethodConfig,
    ToMeConfig,
    dense_macs,
    macs,
    meet_target,
)
from adaptvit.data import list_folder, open_pictures, spread_over
from adaptvit.weights.opening import start_from

METHODS: dict[str, MethodConfig] = {
    "tome": ToMeConfig(),
    "calibrated": CalibratedConfig(),
    "merge": MergeConfig(),
    "ats": ATSConfig(),
}
TARGETS, COUNT, FITTED, BATCHES, THREADS = (0.75, 0.6, 0.5), 128, 32, {1: 12, 4: 4}, 2
OUT = Path(__file__).with_suffix(".jsonl")


def groups(features: Tensor) -> Tensor:
    """(B, D, rows, columns) -> (B, groups, 4 D)."""
    return pixel_unshuffle(features, 2).flatten(2).mT


def kept(weights: Path, pictures: Path) -> None:
    vit: Any = timm.create_model("vit_tiny_patch16_224").eval()
    start_from(vit, weights)
    settings = timm.data.resolve_model_data_config(vit) | {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9}
    images = spread_over(open_pictures(list_folder(pictures, "IMAGES"), settings), COUNT + FITTED).images
    fitted, images = images[:: (COUNT + FITTED) // FITTED][:FITTED], images[1 :: (COUNT + FITTED) // COUNT][:COUNT]
    vit.reset_classifier(0)
    with torch.inference_mode():
        dense = groups(FullConfig().build(vit).eval().features(images))
        for name, config in METHODS.items():
            for target in TARGETS:
                with torch.inference_mode(False):
                    model = config.fit(vit, fitted, target).eval()
                likeness = cosine_similarity(groups(model.features(images)), dense, dim=-1).flatten()
                usage = model(images, detailed=True).usage
                share = macs(usage, model.shape).double().mean().item() / dense_macs(model.shape, usage.grid)
                tell(
                    {"tower": "ViT-Tiny", "method": name, "target": target, "share": share}
                    | {"cosine": likeness.mean().item(), "cosine_p10": likeness.quantile(0.1).item()}
                )


def timed() -> None:
    torch.manual_seed(0)
    tower: Any = timm.create_model("qwen3_vit_88m_enc", img_size=448).eval()
    images = torch.randn(max(BATCHES), 3, 448, 448)
    for target in TARGETS:
        models = {name: config.build(tower).eval() for name, config in METHODS.items() if name != "ats"}
        for model in models.values():
            meet_target(model, images[:1], target, tolerance=0.02)
        for batch, rounds in BATCHES.items():
            some = images[:batch]
            taken: dict[str, list[float]] = {name: [] for name in ("dense", *models)}
            with torch.inference_mode():
                for turn in range(rounds + 1):
                    for name, model in {"dense": tower, **models}.items():
                        start = time.perf_counter()
                        model(some)
                        if turn:
                            taken[name].append(time.perf_counter() - start)
                for name, model in models.items():
                    usage = model(some, detailed=True).usage
                    ideal = dense_macs(model.shape, usage.grid) / macs(usage, model.shape).double().mean().item()
                    gain = statistics.median(a / b for a, b in zip(taken["dense"], taken[name], strict=True))
                    told = {"tower": "qwen3_vit_88m_enc", "method": name, "target": target, "batch": batch}
                    tell(told | {"dense_s": statistics.median(taken["dense"]), "gain": gain, "ideal": ideal})


def tell(row: dict[str, Any]) -> None:
    print(row, flush=True)
    with OUT.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    if sys.argv[1:]:
        kept(*map(Path, sys.argv[1:]))
    timed()
