"""What was tried on ToMe's merging, without training: a prototype in which a trial is a line, and nothing is exact.

    python benchmarks/merging_trials.py WEIGHTS IMAGES OUTPUT [STEP OFFSET ...]

WEIGHTS is a ViT-Tiny/16 file in timm's names, IMAGES a folder of ImageNet's class folders, OUTPUT a .csv file. Of every
STEP (5) images those at the OFFSETs (0) are used. All images merge as many tokens; for each trial it tells the mean KL
divergence from the dense model at 65 % of its MACs, the first two blocks merging nothing, and at 50 %, all merging as
many.
"""

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from imagenet_samples import prepared
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

WIDTH, HEADS, DEPTH, PATCHES, BATCH = 192, 3, 12, 196, 50
DENSE = 1.254
"""GMACs of ViT-Tiny/16 at 224 pixels."""
LATE, EVEN = (0, 0, *[1] * 9), (1,) * 11


@dataclass(frozen=True)
class Trial:
    """What is done otherwise than ToMe does it."""

    name: str
    compared: str = "mean key"
    """Or `keys`, head by head; `features`, after attention; `values`; `keys and features`."""
    protection: float = 0.0
    """Taken off, times the root of the product of the two's attention from the class token (mean 1)."""
    protected: str = "product"
    """Or `sum`, `smaller`, `first`: of which attention the root is."""
    sizes: float = 0.0
    """Taken off, times the sum of the logarithms of the two's patches."""
    power: float = 1.0
    """A token of n patches is attended to as n to this power."""
    weights: float = 0.0
    """In the mean a token counts by its patches times this power of its attention."""
    keeps_length: bool = False
    """A merged token is as long as its parts on average."""
    directions: bool = False
    """The mean is that of parts of equal length."""
    share_of_features: float = 0.0
    """Of the similarity, by features in the place of keys."""
    dropped: int = 12
    """From this block on tokens are dropped, those least attended to, in the place of being merged."""
    order: str = "rows"
    """Of the patches, which alternate between the two sets: or `checkers`, `random`."""
    sources: str = "alternate"
    """Or `unimportant`, the half of least attention; `least`, exactly those that go."""
    late: Sequence[float] = LATE
    even: Sequence[float] = EVEN


BEST = {"compared": "keys", "protection": 0.1}
KEPT = {**BEST, "power": 0.85, "sizes": 0.03, "weights": 1.0, "keeps_length": True}
FALLING = (0, 0, *[1.5 - n / 8 for n in range(9)])
TRIALS = (
    Trial("ToMe, all blocks", late=EVEN),
    Trial("ToMe"),
    Trial("keys head by head", compared="keys"),
    Trial("features", compared="features"),
    Trial("values", compared="values"),
    Trial("keys and features", compared="keys and features"),
    Trial("protection 0.05", compared="keys", protection=0.05),
    Trial("protection 0.1", **BEST),
    Trial("protection 0.2", compared="keys", protection=0.2),
    Trial("protection 0.1, of the sum", **BEST, protected="sum"),
    Trial("protection 0.1, of the smaller", **BEST, protected="smaller"),
    Trial("protection 0.1, of the first", **BEST, protected="first"),
    Trial("protection 0.1, mean key", protection=0.1),
    Trial("power 0.85", **BEST, power=0.85),
    Trial("power 0.7", **BEST, power=0.7),
    Trial("power 0.5", **BEST, power=0.5),
    Trial("power 0.7, ToMe's similarity", power=0.7),
    Trial("less 0.03 log sizes", **BEST, power=0.85, sizes=0.03),
    Trial("means by attention", **BEST, power=0.85, weights=1.0),
    Trial("length kept", **BEST, power=0.85, keeps_length=True),
    Trial("the unimportant half into the other", **BEST, power=0.85, sources="unimportant"),
    Trial("the least important into the rest", **BEST, power=0.85, sources="least"),
    Trial("every second block", **BEST, power=0.85, late=[0, 0, 2, 0] + [2, 0] * 3 + [2], even=[2, 0] * 5 + [2]),
    Trial("from the fourth block", **BEST, power=0.85, late=[0] * 3 + [1] * 8, even=[0] + [1] * 10),
    Trial("sizes and means by attention", **BEST, power=0.85, sizes=0.03, weights=1.0),
    Trial("length kept, means by attention", **BEST, power=0.85, keeps_length=True, weights=1.0),
    Trial("length kept, sizes", **BEST, power=0.85, keeps_length=True, sizes=0.03),
    Trial("KEPT", **KEPT),
    Trial("KEPT, of directions", **KEPT, directions=True),
    Trial("KEPT, sizes 0.06", **KEPT | {"sizes": 0.06}),
    Trial("KEPT, half the weights", **KEPT | {"weights": 0.5}),
    Trial("KEPT, power 0.7", **KEPT | {"power": 0.7}),
    Trial("KEPT, protection 0.2", **KEPT | {"protection": 0.2}),
    Trial("KEPT, 0.3 by features", **KEPT, share_of_features=0.3),
    Trial("KEPT, dropped from the tenth block", **KEPT, dropped=9),
    Trial("KEPT, dropped from the ninth block", **KEPT, dropped=8),
    Trial("KEPT, checkers", **KEPT, order="checkers"),
    Trial("KEPT, random", **KEPT, order="random"),
    Trial("KEPT, falling from the third block", **KEPT, late=FALLING, even=FALLING),
    Trial("rising", **BEST, power=0.85, late=[0.5 + n / 10 for n in range(11)], even=[0.5 + n / 10 for n in range(11)]),
)


def share(removed: Sequence[int]) -> float:
    """Of the dense MACs, where blocks merge so many tokens, deciding by keys of one head's width."""
    tokens, macs = 1 + PATCHES, PATCHES * 768 * WIDTH + WIDTH * 1000
    for block in range(DEPTH):
        if block == DEPTH - 1:
            macs += 2 * tokens * WIDTH**2 + 2 * tokens * WIDTH + 10 * WIDTH**2
            break
        merged = min(removed[block], (tokens - 1) // 2)
        macs += 4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH + 8 * (tokens - merged) * WIDTH**2
        tokens -= merged
    return macs / 1e9 / DENSE


def schedule(shape: Sequence[float], target: float) -> list[int]:
    """Whole numbers in proportion to `shape` that cost `target`."""

    def at(scale: float) -> list[int]:
        sums = [round(scale * sum(shape[:count])) for count in range(len(shape) + 1)]
        return [after - before for before, after in pairwise(sums)]

    least, most = 0.0, 400.0
    for _ in range(40):
        middle = (least + most) / 2
        least, most = (middle, most) if share(at(middle)) > target else (least, middle)
    return at(most)


def forward(vit: Any, images: Tensor, removed: Sequence[int], trial: Trial) -> Tensor:
    """Logits."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    if trial.order != "rows":
        sets = torch.rand(PATCHES, generator=torch.Generator().manual_seed(0))
        if trial.order == "checkers":
            sets = (torch.arange(PATCHES) // 14 + torch.arange(PATCHES)) % 2
        first, second = sets.argsort(stable=True).chunk(2)
        x = torch.cat([x[:, :1], x[:, 1:][:, torch.stack([first, second], 1).flatten()]], 1)
    size = torch.ones(x.shape[:2])
    for number, (block, merged) in enumerate(zip(vit.blocks, [*removed, 0], strict=True)):
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        bias = trial.power * size.log()[:, None, None]
        out = scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        x = x + block.attn.proj(out)
        if merged and number >= trial.dropped:
            x, size = drop(x, q, k, size, min(merged, (x.shape[1] - 1) // 2))
        elif merged:
            x, size = merge(x, q, k, v, size, min(merged, (x.shape[1] - 1) // 2), trial)
        x = x + block.mlp(block.norm2(x))
    return vit.forward_head(vit.norm(x))


def attended(q: Tensor, k: Tensor) -> Tensor:
    """Attention of the class token to patches, mean over heads, mean 1."""
    logits = (q[:, :, :1] @ k.mT)[:, :, 0] * q.shape[-1] ** -0.5
    attention = logits.softmax(dim=-1).mean(dim=1)[:, 1:]
    return attention / attention.mean(dim=1, keepdim=True)


def drop(x: Tensor, q: Tensor, k: Tensor, size: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens and their sizes without those least attended to, as the patches that they are."""
    kept = (attended(q, k) * size[:, 1:]).topk(x.shape[1] - 1 - count, dim=1).indices.sort(dim=1).values + 1
    kept = torch.cat([torch.zeros_like(kept[:, :1]), kept], dim=1)
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])), size.gather(1, kept)


def merge(x: Tensor, q: Tensor, k: Tensor, v: Tensor, size: Tensor, count: int, trial: Trial) -> tuple[Tensor, Tensor]:
    """Tokens and their sizes, so many fewer."""

    def heads(t: Tensor) -> Tensor:
        return normalize(t, dim=-1).transpose(1, 2).flatten(2) / math.sqrt(HEADS)

    metric = {
        "mean key": lambda: normalize(k.mean(dim=1), dim=-1),
        "keys": lambda: heads(k),
        "values": lambda: heads(v),
        "features": lambda: normalize(x, dim=-1),
        "keys and features": lambda: torch.cat([heads(k), normalize(x, dim=-1)], dim=2) * 0.5**0.5,
    }[trial.compared]()[:, 1:]
    attention = attended(q, k)
    if trial.share_of_features:
        share = trial.share_of_features
        metric = torch.cat([metric * (1 - share) ** 0.5, normalize(x[:, 1:], dim=-1) * share**0.5], dim=2)
    patches = torch.arange(metric.shape[1]).expand(len(x), -1)
    if trial.sources == "alternate":
        a, b = patches[:, ::2], patches[:, 1::2]
    else:
        order, some = attention.argsort(dim=1), count if trial.sources == "least" else patches.shape[1] // 2
        a, b = order[:, :some], order[:, some:]

    def at(t: Tensor, index: Tensor) -> Tensor:
        return t.gather(1, index if t.ndim == 2 else index[..., None].expand(-1, -1, t.shape[2]))

    similarity = at(metric, a) @ at(metric, b).mT
    first, other = at(attention, a)[:, :, None], at(attention, b)[:, None]
    cost = {
        "product": lambda: (first * other).sqrt(),
        "sum": lambda: (first.sqrt() + other.sqrt()) / 2,
        "smaller": lambda: torch.minimum(first, other),
        "first": lambda: first.expand_as(similarity),
    }[trial.protected]()
    sizes = size[:, 1:]
    logs = at(sizes, a).log()[:, :, None] + at(sizes, b).log()[:, None]
    best, to = (similarity - trial.protection * cost - trial.sizes * logs).max(dim=2)
    ranked = best.argsort(dim=1, descending=True)
    going, staying = ranked[:, :count], ranked[:, count:].sort(dim=1).values
    into, weights = to.gather(1, going), sizes * attention**trial.weights

    def total(t: Tensor) -> Tensor:
        joined = at(at(t, a), going)
        index = into if t.ndim == 2 else into[..., None].expand_as(joined)
        return at(t, b).scatter_add(1, index, joined)

    features, summed = x[:, 1:], total(weights)[..., None]
    mean = total((normalize(features, dim=2) if trial.directions else features) * weights[..., None]) / summed
    if trial.keeps_length:
        length = total(features.norm(dim=2) * weights)[..., None] / summed
        mean = mean * length / mean.norm(dim=2, keepdim=True)
    kept = at(at(features, a), staying), at(at(sizes, a), staying)
    return torch.cat([x[:, :1], kept[0], mean], dim=1), torch.cat([size[:, :1], kept[1], total(sizes)], dim=1)


@torch.inference_mode()
def main(weights: Path, folder: Path, output: Path, step: str = "5", *offsets: str) -> None:
    """Run every trial, and write the table row by row."""
    torch.set_num_threads(1)
    vit, images, _ = prepared(weights, folder)
    images = torch.cat([images[int(offset) :: int(step)] for offset in offsets or ("0",)])
    dense = torch.cat([vit(batch) for batch in images.split(BATCH)]).log_softmax(dim=1)
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "images", "divergence_65", "error_65", "divergence_50", "error_50"])
        for trial in TRIALS:
            row: list[Any] = [trial.name, len(images)]
            for target, shape in ((0.65, trial.late), (0.5, trial.even)):
                removed = schedule(shape, target)
                logits = torch.cat([forward(vit, batch, removed, trial) for batch in images.split(BATCH)])
                divergence = (dense.exp() * (dense - logits.log_softmax(dim=1))).sum(dim=1)
                error = divergence.std() / len(divergence) ** 0.5
                row += [round(divergence.mean().item(), 4), round(error.item(), 4)]
            print(*row, flush=True)
            writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    weights, folder, output, *rest = sys.argv[1:]
    main(Path(weights), Path(folder), Path(output), *rest)
