"""Other ways to merge than by pairs of two sets, without training: a prototype, in which nothing is exact.

    python benchmarks/merging_others.py WEIGHTS IMAGES OUTPUT [STEP]

WEIGHTS is a ViT-Tiny/16 file in timm's names, IMAGES a folder of ImageNet's class folders, OUTPUT a .csv file. Every
eighth image is for calibration, a quarter of which is enough here; of the rest every STEP (1) is measured. Each way is
steered by one number, on the calibration images, to 65 and to 50 % of the dense MACs on average; at 65 % nothing merges
in the first two blocks. Told are the mean KL divergence from the dense model's prediction, how much it is over that of
the first way, image by image, and the points of top-1 that are lost. Linear maps and attention are in bfloat16. A token
that is gone keeps a slot of size 0, so images may keep as many tokens as they need; MACs are those of what is left,
what deciding takes left out.
"""

import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from imagenet_samples import paired, prepared
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

WIDTH, HEADS, DEPTH, PATCHES, BATCH = 192, 3, 12, 196, 50
DENSE = 1.254
"""GMACs of ViT-Tiny/16 at 224 pixels."""
PROTECTION, SIZES, POWER = 0.1, 0.03, 0.85
"""Those of calibrated merging."""
STEPS = 7
"""Of the search for the number that steers a trial."""

Flow = Tensor
"""(B, P, P) the share of each patch slot that goes to each other one; rows sum to 1, or to 0 where the slot is dead."""
Way = Callable[[Tensor, Tensor, Tensor, float], Flow]
"""Similarity (B, P, P), less what it costs, -inf where one is dead; the cosine alone; sizes (B, P), and the number that
steers it."""


def stays(size: Tensor) -> Flow:
    """All where they are."""
    return torch.diag_embed((size > 0).float())


def sets(size: Tensor) -> tuple[Tensor, Tensor]:
    """(B, P) bool, every second of the live tokens, and the others."""
    live = size > 0
    rank = live.long().cumsum(dim=1)
    return live & (rank % 2 == 1), live & (rank % 2 == 0)


def joined(flow: Flow, going: Tensor, to: Tensor) -> Flow:
    """The same flow, where those that are `going` (B, P) go to `to` (B, P) as a whole."""
    moved = torch.zeros_like(flow).scatter(2, to[..., None], 1.0)
    return torch.where(going[..., None], moved, flow)


def by_pairs(similarity: Tensor, cosine: Tensor, size: Tensor, count: float) -> Flow:
    """As calibrated merging has it: of the first set of every image those of the best matches, so many."""
    first, other = sets(size)
    best, to = similarity.masked_fill(~other[:, None], -torch.inf).max(dim=2)
    rank = best.masked_fill(~first, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
    return joined(stays(size), (rank < round(count)) & first, to)


def by_batch(similarity: Tensor, cosine: Tensor, size: Tensor, count: float) -> Flow:
    """So many on average, the best matches of the whole batch."""
    first, other = sets(size)
    best, to = similarity.masked_fill(~other[:, None], -torch.inf).max(dim=2)
    best = best.masked_fill(~first, -torch.inf)
    least = best.flatten().topk(min(round(count * len(size)), int(first.sum()))).values[-1]
    return joined(stays(size), (best >= least) & first, to)


def by_matrix(similarity: Tensor, cosine: Tensor, size: Tensor, least: float) -> Flow:
    """Matrix merging (MaMe, CVPR 2026 Findings): a source goes to all targets that it is linked to, by shares.

    A link is what the cosine is above `least`, over the sum of its target's, less the mean of those that are not 0,
    and over their sum again. Differs: a source's shares sum to 1, so that no patch is lost or counted twice.
    """
    source, target = sets(size)
    links = (cosine - least).clamp(min=0).where(source[:, :, None] & target[:, None], 0)
    links = links / links.sum(dim=1, keepdim=True).clamp(min=1e-9)
    mean = links.sum(dim=1, keepdim=True) / (links > 0).sum(dim=1, keepdim=True).clamp(min=1)
    links = (links - mean).clamp(min=0)
    links = links / links.sum(dim=1, keepdim=True).clamp(min=1e-9)
    total = links.sum(dim=2, keepdim=True)
    return torch.where(total > 0, links / total.clamp(min=1e-9), stays(size))


def by_matrix_of_similarity(similarity: Tensor, cosine: Tensor, size: Tensor, least: float) -> Flow:
    """The same of the similarity less what it costs."""
    return by_matrix(similarity, similarity.nan_to_num(neginf=-9.0), size, least)


def by_mutual(similarity: Tensor, cosine: Tensor, size: Tensor, least: float) -> Flow:
    """Mutual nearest neighbours (MPM, CVPRF 2026) among all patches, those alike by `least` or more."""
    alike = similarity.masked_fill(torch.eye(similarity.shape[1], dtype=torch.bool), -torch.inf)
    best, to = alike.max(dim=2)
    slots = torch.arange(similarity.shape[1])
    mutual = (to.gather(1, to) == slots) & (to < slots) & (best >= least) & (size > 0)
    return joined(stays(size), mutual, to)


def by_peaks(similarity: Tensor, cosine: Tensor, size: Tensor, count: float) -> Flow:
    """Density peaks: all but `count` tokens are centres, dense and far from what is denser; others join the nearest.

    Density is that of the five nearest, exp(-mean squared distance). Source: DPC-kNN (Du et al., 2016).
    """
    live = size > 0
    far = (2 - 2 * cosine).clamp(min=0).masked_fill(~(live[:, :, None] & live[:, None]), 4.0)
    density = (-far.topk(6, dim=2, largest=False).values[:, :, 1:].mean(dim=2)).exp()
    denser = density[:, None] > density[:, :, None]
    apart = far.masked_fill(~denser, 4.0).amin(dim=2)
    peak = (density * apart).masked_fill(~live, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
    centre = live & (peak < live.sum(dim=1, keepdim=True) - round(count))
    to = similarity.masked_fill(~centre[:, None], -torch.inf).argmax(dim=2)
    return joined(stays(size), live & ~centre, to)


def by_transport(similarity: Tensor, cosine: Tensor, size: Tensor, count: float) -> Flow:
    """The pairs' sources, by a transport that fills targets evenly: three of Sinkhorn's steps, entropy 0.05.

    A source goes, by shares, to the targets that have at least half of what its first one has.
    """
    first, other = sets(size)
    allowed = first[:, :, None] & other[:, None]
    best = similarity.masked_fill(~allowed, -torch.inf).amax(dim=2)
    going = (best.argsort(dim=1, descending=True).argsort(dim=1) < round(count)) & first
    plan = ((similarity - best.nan_to_num(neginf=0.0)[..., None]) / 0.05).exp().where(allowed & going[..., None], 0)
    even = going.sum(dim=1)[:, None, None] / other.sum(dim=1).clamp(min=1)[:, None, None]
    for _ in range(3):
        filled = plan.sum(dim=1, keepdim=True)
        plan = plan * (4 * even / filled.clamp(min=1e-9)).clamp(max=1)  # none gets more than four times its part
        plan = plan / plan.sum(dim=2, keepdim=True).clamp(min=1e-9)
    plan = plan.where(plan >= plan.amax(dim=2, keepdim=True) / 2, 0)
    total = plan.sum(dim=2, keepdim=True)
    return torch.where(going[..., None] & (total > 0), plan / total.clamp(min=1e-9), stays(size))


COUNTS, ALIKE = (0.0, 60.0), (1.0, -1.0)
TRIALS: dict[str, tuple[Way, tuple[float, float]]] = {
    "pairs, as many of each image": (by_pairs, COUNTS),
    "pairs, a budget over the batch": (by_batch, COUNTS),
    "mutual nearest neighbours": (by_mutual, ALIKE),
    "matrix": (by_matrix, ALIKE),
    "matrix, less sizes and importance": (by_matrix_of_similarity, ALIKE),
    "density peaks": (by_peaks, COUNTS),
    "transport": (by_transport, COUNTS),
}
"""How each merges, and between what numbers it is steered, from nothing merged to most."""


def forward(vit: Any, images: Tensor, way: Way, number: float, late: int) -> tuple[Tensor, Tensor]:
    """Logits, and the share of the dense MACs, (B,)."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images))).float()
    size = torch.ones(x.shape[:2])
    cost = torch.full((len(x),), float(PATCHES * 768 * WIDTH + WIDTH * 1000))
    for block_number, block in enumerate(vit.blocks):
        tokens = (size > 0).sum(dim=1)
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        bias = (POWER * size.log())[:, None, None].to(q.dtype)
        out = scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        x = x + block.attn.proj(out)
        if late <= block_number < DEPTH - 1:
            x, size = merged(x, q.float(), k.float(), size, way, number)
        x = x + block.mlp(block.norm2(x))
        left = (size > 0).sum(dim=1)
        if block_number == DEPTH - 1:
            cost += 2 * tokens * WIDTH**2 + 2 * tokens * WIDTH + 10 * WIDTH**2
        else:
            cost += 4 * tokens * WIDTH**2 + 2 * tokens**2 * WIDTH + 8 * left * WIDTH**2
    return vit.forward_head(vit.norm(x)).float(), cost / 1e9 / DENSE


def merged(x: Tensor, q: Tensor, k: Tensor, size: Tensor, way: Way, number: float) -> tuple[Tensor, Tensor]:
    """Tokens and their sizes, which are 0 where one is gone; means by attention, as long as their parts."""
    logits = (q[:, :, :1] @ k.mT)[:, :, 0] * q.shape[-1] ** -0.5
    live = size[:, 1:] > 0
    attention = logits.masked_fill(~(size > 0)[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)[:, 1:]
    attention = attention / (attention.sum(dim=1, keepdim=True) / live.sum(dim=1, keepdim=True))
    metric = normalize(k, dim=-1).transpose(1, 2).flatten(2)[:, 1:] / math.sqrt(HEADS)
    cosine = (metric @ metric.mT).masked_fill(~(live[:, :, None] & live[:, None]), -torch.inf)
    root, logs = (PROTECTION * attention).sqrt(), SIZES * size[:, 1:].clamp(min=1e-6).log()
    similarity = cosine - root[:, :, None] * root[:, None] - logs[:, :, None] - logs[:, None]
    flow = way(similarity, cosine.nan_to_num(neginf=-9.0), size[:, 1:], number)
    sizes = (flow * size[:, 1:, None]).sum(dim=1)
    weights = flow * (size[:, 1:] * attention)[..., None]
    total = weights.sum(dim=1)[..., None].clamp(min=1e-9)
    features = x[:, 1:]
    mean, length = weights.mT @ features / total, weights.mT @ features.norm(dim=2, keepdim=True) / total
    mean = (mean * length / mean.norm(dim=2, keepdim=True).clamp(min=1e-9)).where(sizes[..., None] > 0, 0)
    return torch.cat([x[:, :1], mean], dim=1), torch.cat([size[:, :1], sizes], dim=1)


def run(vit: Any, images: Tensor, way: Way, number: float, late: int) -> tuple[Tensor, float]:
    """Log-probabilities, and the mean share of the MACs."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = [forward(vit, batch.float(), way, number, late) for batch in images.split(BATCH)]
    return torch.cat([one for one, _ in parts]).log_softmax(dim=1), torch.cat([one for _, one in parts]).mean().item()


def steered(vit: Any, images: Tensor, way: Way, ends: tuple[float, float], late: int, target: float) -> float:
    """The number at which images cost the target on average."""
    little, much = ends
    for _ in range(STEPS):
        middle = (little + much) / 2
        costs = run(vit, images, way, middle, late)[1]
        little, much = (middle, much) if costs > target else (little, middle)
    return little if abs(run(vit, images, way, little, late)[1] - target) < 0.01 else much


@torch.inference_mode()
def main(weights: Path, folder: Path, output: Path, step: str = "1") -> None:
    """Run every trial, and write the table row by row."""
    torch.set_num_threads(1)
    measure(*prepared(weights, folder), output, int(step))


def measure(vit: Any, images: Tensor, labels: Tensor, output: Path, step: int) -> None:
    """The table, of a model and its images."""
    fitting = torch.arange(len(images)) % 8 == 0
    calibration, some, right = images[fitting], images[~fitting][::step], labels[~fitting][::step]
    dense = torch.cat([vit(batch.float()) for batch in some.split(BATCH)]).log_softmax(dim=1)
    best = (dense.argmax(dim=1) == right).double()
    pairs: dict[float, Tensor] = {}
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "trial",
                "budget",
                "number",
                "share",
                "divergence",
                "error",
                "over_pairs",
                "over_error",
                "lost",
                "lost_error",
            ]
        )
        for name, (way, ends) in TRIALS.items():
            for target, late in ((0.65, 2), (0.5, 0)):
                number = steered(vit, calibration[::4], way, ends, late, target)
                found, share = run(vit, some, way, number, late)
                far = (dense.exp() * (dense - found)).sum(dim=1)
                lost = 100 * (best - (found.argmax(dim=1) == right).double())
                over = far - pairs.setdefault(target, far)
                row = [name, target, round(number, 4), round(share, 4), *paired(far), *paired(over), *paired(lost)]
                print(*row, flush=True)
                writer.writerow(row)
                file.flush()


if __name__ == "__main__":
    weights, folder, output, *rest = sys.argv[1:]
    main(Path(weights), Path(folder), Path(output), *rest)
