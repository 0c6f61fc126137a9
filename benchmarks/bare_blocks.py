"""What a ViT's blocks gain by fewer tokens where nobody decides which: the most that a method can gain.

    python benchmarks/bare_blocks.py vit_tiny_patch16_224 128 1     # model, image size, batch; to bare_blocks.jsonl

`bare` is timm's own model whose blocks are given the first so many tokens, as many as ToMe or EViT have at 60 % of the
MACs, by slices, which cost nothing. Each model, the plain one, the bare one and the method, runs as it is and compiled
by inductor, in turns in one process; ratios are of realised to ideal gain over the plain one run in the same way.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from adaptvit import EViTConfig, ToMeConfig, dense_macs, macs, meet_target

TARGET = 0.6
OUT = Path(__file__).with_suffix(".jsonl")


class Bare(nn.Module):
    """A class-token ViT of timm whose attention and MLPs are given the first so many tokens."""

    def __init__(self, vit: Any, attended: list[int], left: list[int]) -> None:
        super().__init__()
        self.vit, self.attended, self.left = vit, attended, left

    def forward(self, images: Tensor) -> Tensor:
        vit = self.vit
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        for block, attended, left in zip(vit.blocks, self.attended, self.left, strict=True):
            x = x[:, :attended]
            x = (x + block.attn(block.norm1(x)))[:, :left]
            x = x + block.mlp(block.norm2(x))
        return vit.forward_head(vit.norm(x))


def measure(name: str, size: int, batch: int, threads: int, rounds: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    vit = timm.create_model(name, img_size=size).eval()
    images = torch.randn(batch, 3, size, size)
    models: dict[str, nn.Module] = {"plain": vit}
    ideal = {"plain": 1.0}
    for method, config in (("tome", ToMeConfig()), ("evit", EViTConfig())):
        model = config.build(vit).eval()
        meet_target(model, images[:1], TARGET)
        usage = model(images[:1], detailed=True).usage
        attended = usage.attended[0].tolist()
        left = [*attended[1:], 1]  # of the last block the class token is read
        share = macs(usage, model.shape)[0].item() / dense_macs(model.shape, usage.grid)
        models |= {method: model, f"bare {method}": Bare(vit, attended, left)}
        ideal |= dict.fromkeys((method, f"bare {method}"), 1 / share)
    calls: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {}
    for key, model in models.items():
        calls[key, "eager"] = model
        torch.compiler.reset()
        calls[key, "compiled"] = torch.compile(model, fullgraph=True)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    with torch.inference_mode():
        for call in calls.values():
            for _ in range(3):
                call(images)
        for _ in range(rounds):
            for key, call in calls.items():
                start = time.perf_counter()
                call(images)
                taken[key].append(time.perf_counter() - start)
    rows = []
    for (key, how), spent in taken.items():
        gain = statistics.median(slow / fast for slow, fast in zip(taken["plain", how], spent, strict=True))
        rows.append({"model": name, "size": size, "batch": batch, "threads": threads, "run": key, "how": how})
        rows[-1] |= {"ms": 1e3 * statistics.median(spent), "gain": gain, "ratio": gain / ideal[key]}
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("size", type=int)
    parser.add_argument("batch", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    with OUT.open("a") as file:
        for row in measure(**vars(parser.parse_args())):
            print(row, flush=True)
            file.write(json.dumps(row) + "\n")
