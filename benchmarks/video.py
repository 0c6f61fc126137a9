"""Which clips keep how many tokens: run lengths on the validation clips of `shared/data`, against how much they move.

python benchmarks/video.py [FOLDER]
"""

import argparse
from pathlib import Path

import torch

from adaptvit.commands.draw import spearman
from adaptvit.methods.run_length import run_starts
from adaptvit.video import Clips

SETS = ("asl24", "hockeyfights", "pocus")
THRESHOLDS = (0.02, 0.05, 0.1, 0.2)
GRID = (8, 8, 8)
SETTINGS = {
    "input_size": (3, 128, 128),
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parents[2] / "shared" / "data")
    folder = parser.parse_args().folder
    print("| clips | threshold | tokens kept | of the stillest tenth | of the liveliest tenth | rank correlation |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in SETS:
        data = Clips(folder / f"{name}-clips16.tar", SETTINGS, frames=16, split="val", strip=16)
        items = [data[index] for index in range(len(data))]
        clips = torch.stack([item[0] for item in items])
        motion = clips.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))
        order, tenth = motion.argsort(), max(1, len(clips) // 10)
        for threshold in THRESHOLDS:
            kept = run_starts(clips, GRID, threshold).double().mean(dim=(1, 2, 3))
            still, lively = (kept[some].mean() for some in (order[:tenth], order[-tenth:]))
            rank = spearman(kept, motion.double())
            shares = " | ".join(f"{share:.0%}" for share in (kept.mean(), still, lively))
            print(f"| {name}, {len(clips)} | {threshold} | {shares} | {rank:.2f} |")


if __name__ == "__main__":
    main()
