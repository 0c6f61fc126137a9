"""Does it pay that images differ in what they keep? Each method against itself with as many tokens in all images.

    python benchmarks/per_image.py samples WEIGHTS IMAGES TABLE OUTPUT [BUDGET ...]
    python benchmarks/per_image.py tuned DATA DENSE OUTPUT FILE ...
    python benchmarks/per_image.py draw OUTPUT PICTURE

`samples`: off the shelf, WEIGHTS being a ViT-Tiny/16 file in timm's names, IMAGES a folder of ImageNet's class folders,
of which every eighth is for calibration, TABLE what off_the_shelf.py wrote, whose thresholds merging has. `tuned`:
models of `adaptvit train`, and the dense one, on DATA's `val`. OUTPUT.jsonl has a line for each; those that are there
are left out.

With equal counts every block keeps, of every image, the mean over images of what it keeps otherwise, by the same
scores: merging those most alike, A-ViT those whose scores add up to least, DynamicViT and AdaViT those that score
highest. ATS samples each image with as many points as hit that many patches. Of AdaViT's heads every image has as many
in a block, and all have the sub-layers that most of them use, as many as they use on average.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from imagenet_samples import paired, prepared
from matplotlib.figure import Figure
from timm.data import resolve_model_data_config
from torch import Tensor
from torch.nn.functional import cross_entropy

from adaptvit import (
    AdaViTConfig,
    ATSConfig,
    AViTConfig,
    CalibratedConfig,
    DynamicViTConfig,
    Masked,
    MergeConfig,
    dense_macs,
    join,
    macs,
    meet_target,
)
from adaptvit.data import DataConfig, open_split, spread_over
from adaptvit.files import as_json
from adaptvit.methods import adavit, ats, avit
from adaptvit.methods.merging import MergingConfig
from adaptvit.model import AdaptiveViT
from adaptvit.show.pictures import INK, write_png
from adaptvit.show.styles import styles
from adaptvit.usage import Usage
from adaptvit.weights.opening import open_model

BATCH, BUDGETS = 50, ("0.5", "0.65")


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([t.argsort().argsort().double() for t in (a, b)])
    return round(torch.corrcoef(ranks)[0, 1].item(), 3)


@torch.inference_mode()
def run(model: AdaptiveViT, images: Tensor, **how: Any) -> tuple[Tensor, Usage]:
    """Log-probabilities and the record of all images."""
    outputs = [model(batch, detailed=True, **how) for batch in images.split(BATCH)]
    return torch.cat([one.logits for one in outputs]).log_softmax(dim=1), join([one.usage for one in outputs])


def rounded(counts: Tensor) -> list[int]:
    """Whole numbers whose sums up to every block are nearest to those of `counts`."""
    sums = [0, *[round(one) for one in counts.cumsum(0).tolist()]]
    return [after - before for before, after in pairwise(sums)]


@contextmanager
def halting_alike(counts: list[int]) -> Iterator[None]:
    """A-ViT whose block b leaves `counts[b]` tokens of every image, those whose scores add up to least."""
    published, state = avit.halt, {"block": 0, "live": torch.empty(0)}

    def halt(score: Tensor, remainder: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
        block, live = state["block"] % len(counts), state["live"]
        left = remainder - score
        value = left.clone() if block == 0 else left.masked_fill(~live, -torch.inf)
        value[:, 0] = torch.inf  # the class token stays
        going = value.argsort(dim=1, descending=True).argsort(dim=1) < counts[block]
        state.update(block=block + 1, live=going)
        return torch.where(going, score, remainder), going, left

    avit.halt = halt
    try:
        yield
    finally:
        avit.halt = published


@contextmanager
def sampling_alike(counts: dict[int, int]) -> Iterator[None]:
    """ATS whose block b leaves `counts[b]` patches of every image.

    Its points are as many as hit so many: found by bisection, and where one more hits two more, the lowest score of
    those that are hit is left out.
    """
    published = ats.ATS.sample

    def sample(self: Any, score: Tensor, live: Tensor, block: int, *_: Any) -> Tensor:
        few, many = torch.ones_like(score[:, :1]), torch.full_like(score[:, :1], 1e4)
        for _ in range(30):
            middle = (few + many) / 2
            enough = ats.inverse_transform(score, middle).sum(dim=1, keepdim=True) >= counts[block]
            few, many = torch.where(enough, few, middle), torch.where(enough, middle, many)
        order = (score + ats.inverse_transform(score, many)).masked_fill(~live[:, self.prefix :], -torch.inf)
        return torch.cat([live[:, : self.prefix], first(order, counts[block])], dim=1)

    ats.ATS.sample = sample  # type: ignore[method-assign]
    try:
        yield
    finally:
        ats.ATS.sample = published  # type: ignore[method-assign]


def first(value: Tensor, count: int) -> Tensor:
    """(B, n) bool, those of each row that are highest, so many."""
    return value.argsort(dim=1, descending=True).argsort(dim=1) < count


@contextmanager
def deciding_alike(usage: Usage, patches: list[int]) -> Iterator[None]:
    """AdaViT of whose policies every image gets as much in a block, by the same logits."""
    published, state = (adavit.AdaViT.decide, adavit.AdaViT.gate), {"block": 0}
    sublayers = torch.stack([usage.attention, usage.mlp], dim=2).double().mean(dim=0)
    on = first(sublayers.flatten()[None], round(sublayers.sum().item())).view_as(sublayers)
    heads = [round(count) for count in usage.heads.double().mean(dim=0).tolist()]

    def decide(self: Any, block: int, tokens: Any) -> Any:
        state["block"] = block
        return published[0](self, block, tokens)

    def gate(self: Any, logits: Tensor, threshold: float, masked: bool) -> Tensor:
        block = state["block"]
        if logits.shape[1] == 2:
            return on[block].expand(len(logits), -1)
        return first(logits, heads[block] if logits.shape[1] == self.heads[block] else patches[block])

    adavit.AdaViT.decide, adavit.AdaViT.gate = decide, gate  # type: ignore[method-assign]
    try:
        yield
    finally:
        adavit.AdaViT.decide, adavit.AdaViT.gate = published  # type: ignore[method-assign]


def selecting(model: Any, **fields: Any) -> AdaptiveViT:
    """DynamicViT with other fields, and the predictors that it has."""
    other = replace(model.config, **fields).build(model.vit).eval()
    other.score_predictor.load_state_dict(model.score_predictor.state_dict())
    return other


def alike(model: AdaptiveViT, usage: Usage, images: Tensor) -> tuple[Tensor, Usage] | None:
    """What `run` gives of the model with equal counts; None where the method has none."""
    kept = usage.attended.double().mean(dim=0)
    config = model.config
    if isinstance(config, MergeConfig):
        merged = rounded(kept[:-1] - kept[1:])
        shared = {one.name: getattr(config, one.name) for one in fields(MergingConfig)}
        return run(CalibratedConfig(r=[*merged, 0], **shared).build(model.vit).eval(), images)
    if isinstance(config, AViTConfig):
        with halting_alike([round(count) for count in kept[1:].tolist()]):
            return run(model, images, layout=Masked, early_exit=False)
    if isinstance(config, ATSConfig):
        assert isinstance(model, ats.ATS)
        with sampling_alike({block: round(kept[block + 1].item()) - model.prefix for block in model.points}):
            return run(model, images)
    if isinstance(config, AdaViTConfig):
        assert usage.live is not None
        active = (usage.attention | usage.mlp).sum(dim=0).clamp(min=1)
        shown = usage.live[:, :, model.prefix :].sum(dim=(0, 2)) / active
        with deciding_alike(usage, [round(count) for count in shown.tolist()]):
            return run(model, images)
    if getattr(config, "select", None) == "threshold":
        shares = [((kept[block] - model.prefix) / (usage.grid[0] * usage.grid[1])).item() for block in model.stages]
        return run(selecting(model, select="top-k", keep_rate=shares), images)
    return None


def row(name: str, images: str, model: AdaptiveViT, batch: Tensor, labels: Tensor, dense: Tensor) -> dict[str, Any]:
    """What came of a model: points of top-1 are paired, image by image, with their standard errors."""
    found, usage = run(model, batch)
    cost = macs(usage, model.shape).double() / dense_macs(model.shape, usage.grid)
    right, best = ((log.argmax(dim=1) == labels).double() for log in (found, dense))
    entropy = -(dense.exp() * dense).sum(dim=1)
    tenths = cost.argsort().tensor_split(10)
    line: dict[str, Any] = {
        "images": images,
        "method": name,
        "count": len(batch),
        "share": round(cost.mean().item(), 4),
    }
    line["share_spread"] = round(cost.std().item(), 4)
    line["top1"], line["dense_top1"] = round(100 * right.mean().item(), 2), round(100 * best.mean().item(), 2)
    line["lost"], line["lost_error"] = (round(100 * one, 2) for one in paired(best - right))
    line["rank_dense_loss"] = rank_correlation(cost, cross_entropy(dense, labels, reduction="none"))
    line["rank_entropy"] = rank_correlation(cost, entropy)
    for which, part in (("least", tenths[0]), ("most", tenths[-1])):
        line[f"{which}_share"] = round(cost[part].mean().item(), 3)
        line[f"{which}_top1"] = round(100 * right[part].mean().item(), 1)
        line[f"{which}_dense_top1"] = round(100 * best[part].mean().item(), 1)
    equal = alike(model, usage, batch)
    if equal is not None:
        one, how = equal
        same = (one.argmax(dim=1) == labels).double()
        share = macs(how, model.shape).double().mean().item() / dense_macs(model.shape, how.grid)
        line["equal_share"], line["equal_top1"] = round(share, 4), round(100 * same.mean().item(), 2)
        line["gain"], line["gain_error"] = (round(100 * number, 2) for number in paired(right - same))
        far = [(dense.exp() * (dense - log)).sum(dim=1) for log in (found, one)]
        line["divergence"] = round(far[0].mean().item(), 4)
        line["divergence_gain"], line["divergence_gain_error"] = paired(far[1] - far[0])
    return line


def written(output: Path, made: Callable[[], dict[str, Any]], *key: str) -> None:
    """A line of the file, unless it is there."""
    file = output.with_suffix(".jsonl")
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if any((line["images"], line["method"], line["budget"]) == key for line in known):
        return
    line = made() | {"budget": key[2]}
    print(as_json(line), flush=True)
    with file.open("a") as lines:
        lines.write(as_json(line) + "\n")


def samples(weights: Path, folder: Path, table: Path, output: Path, *budgets: str) -> None:
    """Methods that need no training."""
    vit, images, labels = prepared(weights, folder)
    fitting = torch.arange(len(images)) % 8 == 0
    calibration, some, right = images[fitting], images[~fitting], labels[~fitting]
    with torch.inference_mode():
        dense = torch.cat([vit(batch) for batch in some.split(BATCH)]).log_softmax(dim=1)
    found = {row["budget"]: row["schedule"] for row in csv.DictReader(table.open()) if row["method"] == "merge"}
    patched = AdaViTConfig(policies=("patches",), macs_target=None)
    by_image = DynamicViTConfig(select="threshold")
    makes = {
        "merge": lambda budget: MergeConfig(thresholds=[float(one) for one in found[budget].split()]).build(vit).eval(),
        "avit": lambda budget: steered(AViTConfig().fitted(vit, calibration, float(budget)), budget),
        "ats": lambda budget: steered(ATSConfig(blocks=range(1, 12)).build(vit).eval(), budget),
        "adavit": lambda budget: steered(patched.fitted(vit, calibration, float(budget)), budget),
        "dynamicvit": lambda budget: steered(by_image.fitted(vit, calibration, float(budget)), budget),
    }

    def steered(model: AdaptiveViT, budget: str) -> AdaptiveViT:
        meet_target(model, calibration, float(budget))
        return model

    for budget in budgets or BUDGETS:
        for name, make in makes.items():

            def made(name: str = name, make: Any = make, budget: str = budget) -> dict[str, Any]:
                return row(name, "samples", make(budget), some, right, dense)

            written(output, made, "samples", name, budget)


def tuned(data: Path, file: Path, output: Path, *files: str) -> None:
    """Fine-tuned models in folders METHOD_BUDGET."""
    plain = open_model(file)
    split = open_split(DataConfig(root=data), resolve_model_data_config(plain), "validation")
    images, labels, _ = spread_over(split, len(split))
    with torch.inference_mode():
        dense = torch.cat([plain.vit(batch) for batch in images.split(BATCH)]).log_softmax(dim=1)
    for one in files:
        model = open_model(one)
        name, budget, *_ = Path(one).parent.name.split("_")

        def made(name: str = name, model: AdaptiveViT = model) -> dict[str, Any]:
            return row(name, "tuned", model, images, labels, dense)

        written(output, made, "tuned", name, budget)


def draw(output: Path, picture: Path) -> None:
    """Gain over equal counts, beside the rank correlation of MACs with the dense loss and with entropy."""
    lines = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    lines.sort(key=lambda one: (one["images"], one["method"], -float(one["budget"])))
    names = [f"{one['method']}\n{float(one['budget']):.0%}\n{one['images']}" for one in lines]
    looks = styles(one["method"] for one in lines)
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for place, one in enumerate(lines):
        look = looks[one["method"]]
        kind: dict[str, Any] = {"color": look.colour, "marker": look.marker, "linestyle": ""}
        if "gain" in one:
            above.errorbar(place, one["gain"], 2 * one["gain_error"], capsize=3, **kind)
        below.plot(place - 0.08, one["rank_dense_loss"], **kind)
        below.plot(place + 0.08, one["rank_entropy"], fillstyle="none", **kind)
    for axes in (above, below):
        axes.axhline(0, color=INK, linewidth=0.5)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    above.set(
        ylabel="gain over equal counts, points of top-1", title="Counts by image: whiskers are two standard errors"
    )
    below.set(ylabel="rank correlation of MACs", title="Do MACs follow the dense loss (filled) and the entropy (open)?")
    below.set_xticks(range(len(lines)), names, fontsize=8)
    write_png(figure, picture)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *words = sys.argv[1:]
    if what == "draw":
        draw(*map(Path, words))
    else:
        count = {"samples": 4, "tuned": 3}[what]
        {"samples": samples, "tuned": tuned}[what](*map(Path, words[:count]), *words[count:])
