"""Methods on a ViT that tells the class of every pixel of CamVid: mIoU, MACs, realised gain, and what fills the map.

    python benchmarks/camvid.py accuracy MODEL CAMVID OUTPUT [TUNED ...]   methods at each budget, models trained at one
    python benchmarks/camvid.py restored MODEL CAMVID OUTPUT               what a patch without a token has
    python benchmarks/camvid.py speed MODEL CAMVID OUTPUT [BATCH [ROW ...]]    of what `accuracy` found, all in turns
    python benchmarks/camvid.py drawn MODEL CAMVID OUTPUT                  image, truth, predictions, where compute went
    python benchmarks/camvid.py large OUTPUT                               960 x 720, batch 1
    python benchmarks/camvid.py memory OUTPUT METHOD                       1024 x 1024, batch 1, in a process of its own

MODEL is what `adaptvit train camvid_dense` leaves, CAMVID the folder with train, val and test; OUTPUT a path without
ending. What is in OUTPUT is not measured again.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import Subset

from adaptvit import (
    AdaViTConfig,
    ATSConfig,
    AViTConfig,
    CalibratedConfig,
    EViTConfig,
    FullConfig,
    MergeConfig,
    MethodConfig,
    ToMeConfig,
    load,
    meet_target,
)
from adaptvit.backbones.segmenting import SegmentingViT
from adaptvit.data import IGNORED, Masks, pixels, preparation, spread_over
from adaptvit.data.masks import find_masks
from adaptvit.files import as_json
from adaptvit.measure.segmentation import evaluate_pixels, iou_of
from adaptvit.measure.speed import interleaved
from adaptvit.methods import METHODS
from adaptvit.methods.ats import RandomConfig
from adaptvit.model import AdaptiveViT
from adaptvit.show.pictures import laid_over, mean_colours
from adaptvit.terminal import say
from adaptvit.training.recipes import camvid_dense

BUDGETS = (0.6, 0.75, 0.5)
CALIBRATION = 4
"""Training images that methods and budgets are fitted to."""
EVERY = int(os.environ.get("EVERY", "6"))
"""Every so many-th test image is measured."""
DRAWS = 200
"""Samples of the images by which the error of a difference in mIoU is estimated."""
CONFIGS: dict[str, MethodConfig] = {
    "merge": MergeConfig(),
    "tome": ToMeConfig(),
    "ats": ATSConfig(blocks=range(1, 12)),
    "evit": EViTConfig(),
    "random": RandomConfig(),
    "calibrated": CalibratedConfig(),
    "adavit": AdaViTConfig(policies=("patches",), first_patch_block=1, macs_target=None),
    "avit": AViTConfig(class_token="stays", prior_weight=0.0, ponder_weight=0.0),
}


def camvid(folder: Path, model: nn.Module, split: str) -> Masks:
    """A split, every image squashed to what the model takes."""
    config = replace(camvid_dense().data, root=folder)
    return Masks(*find_masks(config, split), config, preparation(model))


def told(rows: Path) -> list[dict[str, Any]]:
    """Rows that are known."""
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def tell(rows: Path, row: dict[str, Any]) -> None:
    with rows.open("a") as file:
        file.write(as_json(row) + "\n")
    print(as_json({key: value for key, value in row.items() if key not in ("confusion", "config")}), flush=True)


def difference(own: Tensor, other: Tensor) -> tuple[float, float]:
    """Points of mIoU between (images, C, C) confusions of the same images, and its standard error over samples."""
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(own), (DRAWS, len(own)), generator=generator)

    def miou(one: Tensor) -> Tensor:
        return 100 * iou_of(one).nanmean(dim=-1)

    sampled = miou(own[picked].sum(dim=1)) - miou(other[picked].sum(dim=1))
    return (miou(own.sum(dim=0)) - miou(other.sum(dim=0))).item(), sampled.std().item()


def fitted(config: MethodConfig, vit: nn.Module, images: Tensor, budget: float) -> AdaptiveViT:
    """What `adapt` makes of a config, without the dial that it measures for other budgets."""
    model = config.fitted(vit, images, budget)
    meet_target(model, images, budget)
    return model


def accuracy(file: str, folder: str, output: str, *tuned: str) -> None:
    """mIoU and MACs of every method at every budget, and of models trained at one."""
    rows = Path(output + ".jsonl")
    dense = load(file).eval()
    test = camvid(Path(folder), dense, "test")
    test = Subset(test, range(0, len(test), EVERY))
    known = {row["name"]: row for row in told(rows)}

    def measured(name: str, budget: float | None, make: Callable[[], AdaptiveViT]) -> None:
        if name in known:
            return
        row: dict[str, Any] = {"name": name, "budget": budget}
        try:
            model = make()
        except (TypeError, ValueError) as error:
            row["refused"] = " ".join(str(error).split())
        else:
            found = evaluate_pixels(model, test, batch_size=4)
            row |= {"miou": found.miou, "accuracy": found.accuracy, "share": found.gmacs / found.gmacs_dense}
            row |= {"gmacs": found.gmacs, "images": found.images, "iou": found.iou}
            base = torch.tensor(known["dense"]["confusion"]) if "dense" in known else found.confusion
            row["against_dense"], row["error"] = difference(found.confusion, base)
            row |= {"method": model.config.method, "config": asdict(model.config)}
            row["confusion"] = found.confusion.tolist()
        known[name] = row
        tell(rows, row)

    measured("dense", None, lambda: dense)
    for name in tuned:
        measured(name, None, lambda name=name: load(name).eval())
    calibration = spread_over(camvid(Path(folder), dense, "train"), CALIBRATION).images
    for budget in BUDGETS:
        for method, config in CONFIGS.items():
            measured(f"{method} {budget}", budget, partial(fitted, config, dense.vit, calibration, budget))


def restorations(model: AdaptiveViT, images: Tensor) -> dict[str, Tensor]:
    """Maps of features (B, D, rows, columns), by what a patch without a token of its own has in the end."""
    maps, usage = model.features(images, layers=range(model.depth), detailed=True)
    x, live = torch.stack(maps), usage.live[:, -1, model.prefix :]  # (L, B, D, rows, columns), (B, P)
    depth = usage.patch_depth.clamp(min=1)
    last = x.gather(0, (depth - 1)[None, :, None].expand(-1, -1, x.shape[2], -1, -1))[0]
    rows, columns = usage.grid
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).view(-1, 2)
    apart = torch.cdist(places.float(), places.float())[None].masked_fill(~live[:, None], torch.inf)
    nearest = apart.argmin(dim=2)  # (B, P)
    flat = x[-1].flatten(2)
    filled = flat.gather(2, nearest[:, None].expand_as(flat)).view_as(x[-1])
    own = live.view(len(live), 1, rows, columns)
    return {
        "its token's": x[-1],
        "the last it had": torch.where(own, x[-1], last),
        "that of the nearest token": filled,
        "a hole (zeros)": x[-1] * own,
    }


@torch.inference_mode()
def restored(file: str, folder: str, output: str) -> None:
    """mIoU at 60 % of the MACs by what fills the map."""
    rows = Path(output + "_restored.jsonl")
    dense = load(file).eval()
    split = camvid(Path(folder), dense, "test")
    chosen = Subset(split, range(0, len(split), EVERY))
    accurate = {row["name"]: row for row in told(Path(output + ".jsonl"))}
    for method in ("merge", "calibrated", "tome", "ats", "evit", "random"):
        if method in {row["method"] for row in told(rows)}:
            continue
        row = accurate.get(f"{method} 0.6")
        if row is None or "refused" in row:
            continue
        model = rebuilt(row, dense, folder)
        confusions: dict[str, Tensor] = {}
        gone = []
        for image, label in chosen:
            x = restorations(model, image[None])
            gone.append((x["a hole (zeros)"] == 0).all(dim=1).double().mean().item())
            for how, one in x.items():
                told_ = interpolate(dense.vit.head(one), size=label.shape, mode="bilinear").argmax(dim=1)[0]
                counted = label != IGNORED
                places = label[counted] * 11 + told_[counted]
                found = torch.bincount(places, minlength=121).view(11, 11)
                confusions[how] = confusions.get(how, 0) + found
        mious = {how: 100 * iou_of(one).nanmean().item() for how, one in confusions.items()}
        tell(rows, {"method": method, "without a token": sum(gone) / len(gone), "images": len(chosen), **mious})


def rebuilt(row: dict[str, Any], dense: AdaptiveViT, folder: str) -> AdaptiveViT:
    """The model of a row: of a file that was trained, or on the dense weights, fitted as it was."""
    if Path(row["name"]).is_file():
        return load(row["name"]).eval()
    config = METHODS[row["method"]](**row["config"])
    images = spread_over(camvid(Path(folder), dense, "train"), CALIBRATION).images
    return config.build(config.prepared(dense.vit, images)).eval()


@torch.inference_mode()
def speed(file: str, folder: str, output: str, batch: str = "8", *names: str) -> None:
    """Realised gain over the plain `SegmentingViT`, all in turns."""
    dense = load(file).eval()
    wanted = names or tuple(f"{method} 0.6" for method in CONFIGS)
    rows = {row["name"]: row for row in told(Path(output + ".jsonl")) if "refused" not in row}
    split = camvid(Path(folder), dense, "test")
    images = spread_over(split, int(batch)).images
    models = {name: rebuilt(rows[name], dense, folder) for name in wanted if name in rows}
    for name, model in [*models.items()]:
        if not Path(name).is_file() and any(not key.startswith("vit.") for key in model.state_dict()):
            say(f"{name} has weights of its own, which OUTPUT does not have: it is left out")
            del models[name]
    shares = {name: model(images, detailed=True).usage.share.mean().item() for name, model in models.items()}
    calls: dict[str, Callable[[], object]] = {"dense": lambda: dense.vit(images)}
    calls |= {name: partial(model, images) for name, model in models.items()}
    seconds = interleaved(calls, 5 if int(batch) > 1 else 12)
    rounds = Path(output + "_speed.jsonl")
    for name in models:
        gain = median(slow / fast for slow, fast in zip(seconds["dense"], seconds[name], strict=True))
        row = {"name": name, "batch": int(batch), "gain": gain, "ideal": 1 / shares[name]}
        tell(rounds, row | {"seconds_dense": median(seconds["dense"]), "threads": torch.get_num_threads()})


@torch.inference_mode()
def drawn(file: str, folder: str, output: str) -> None:
    """Images, truth, predictions, and where compute went."""
    from matplotlib.figure import Figure

    dense = load(file).eval()
    split = camvid(Path(folder), dense, "test")
    picked = [split[index] for index in (10, 90, 170)]
    images, labels = torch.stack([one for one, _ in picked]), torch.stack([one for _, one in picked])
    accurate = {row["name"]: row for row in told(Path(output + ".jsonl")) if "refused" not in row}
    models = {name: rebuilt(accurate[name], dense, folder) for name in ("merge 0.6", "ats 0.6") if name in accurate}
    seen = pixels(images, preparation(dense))
    palette = torch.tensor(COLOURS, dtype=torch.float32) / 255

    def coloured(classes: Tensor) -> Tensor:
        return palette[classes.clamp(min=-1)].movedim(-1, 1)

    panels = [("image", seen), ("truth", coloured(labels.where(labels != IGNORED, -1)))]
    panels.append(("dense", coloured(dense(images).argmax(dim=1))))
    for name, model in models.items():
        found = model(images, detailed=True)
        panels.append((name, coloured(found.logits.argmax(dim=1))))
        if found.usage.groups is not None:
            panels.append(("its tokens", mean_colours(seen, found.usage.groups[:, -1].unflatten(1, found.usage.grid))))
        else:
            panels.append(("blocks entered", laid_over(seen, found.usage.patch_depth, model.depth)))
    figure = Figure(figsize=(2.4 * len(panels), 1.9 * len(images)), layout="constrained")
    for line, axes_row in enumerate(figure.subplots(len(images), len(panels), squeeze=False)):
        for axes, (name, shown) in zip(axes_row, panels, strict=True):
            axes.imshow(shown[line].movedim(0, 2).clamp(0, 1).numpy())
            axes.set_axis_off()
            if not line:
                axes.set_title(name, fontsize=10)
    figure.savefig(output + ".png", dpi=75)


COLOURS = (
    *((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0)),
    *((192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192), (0, 0, 0)),
)
"""SegNet's of the eleven classes; the last is void."""


@torch.inference_mode()
def large(output: str) -> None:
    """960 x 720, batch 1: what merging at 60 and 50 % of the MACs takes beside timm's own fused attention."""
    torch.manual_seed(0)
    vit = SegmentingViT(timm.create_model("vit_tiny_patch16_224", img_size=(720, 960)), 11).eval()
    images = torch.randn(1, 3, 720, 960)
    models: dict[str, AdaptiveViT] = {}
    for method, config in (("tome", ToMeConfig()), ("ats", CONFIGS["ats"]), ("evit", EViTConfig())):
        for budget in (0.6, 0.5):
            model = config.build(vit).eval()
            meet_target(model, images, budget)
            models[f"{method} {budget}"] = model
    shares = {name: model(images, detailed=True).usage.share.item() for name, model in models.items()}
    calls: dict[str, Callable[[], object]] = {"dense": lambda: vit(images)}
    seconds = interleaved(calls | {name: partial(model, images) for name, model in models.items()}, 7)
    for name in models:
        gain = median(slow / fast for slow, fast in zip(seconds["dense"], seconds[name], strict=True))
        row = {"name": name, "gain": gain, "ideal": 1 / shares[name], "seconds_dense": median(seconds["dense"])}
        tell(Path(output + "_large.jsonl"), row | {"threads": torch.get_num_threads()})


@torch.inference_mode()
def memory(output: str, method: str) -> None:
    """Peak memory of a process that makes features of a 1024 x 1024 image."""
    vit = timm.create_model("vit_tiny_patch16_224", img_size=1024, num_classes=0).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    model = ({"full": FullConfig()} | CONFIGS)[method].build(vit).eval()
    x, usage = model.features(torch.randn(1, 3, 1024, 1024), detailed=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    row = {"method": method, "peak_GiB": peak, "before_GiB": before, "share": usage.share.item(), "map": list(x.shape)}
    tell(Path(output + "_memory.jsonl"), row)


if __name__ == "__main__":
    does = {one.__name__: one for one in (accuracy, restored, speed, drawn, large, memory)}
    does[sys.argv[1]](*sys.argv[2:])
