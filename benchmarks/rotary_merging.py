"""Where a merged token is to be: two ViT-Tiny/16 that differ in their positions alone, rotary or learned, are merged.

    python benchmarks/rotary_merging.py train --data DIR --weights FILE --out DIR
    python benchmarks/rotary_merging.py compare --data DIR --out DIR
    python benchmarks/families.py --merging  # puts the table into docs/families.md

DIR holds Imagenette as train and val; FILE is a ViT-Tiny/16 in timm's names, from which both are fine-tuned. Both are
timm's Eva at 128 px, the rotary one with DINOv3's rotation. `train` writes {rotary,learned}-{seed}.safetensors with a
.json beside each; run again, it goes on from the last whole epoch. It trains in bfloat16 autocast, 20 to 25 minutes a
model on one core. `compare` merges off the shelf whatever models there are, and writes rotary_merging.json beside
itself after each; run again, it goes on with those that it has not measured.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from families import RECORD, merging
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform
from timm.models.eva import Eva
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

from adaptvit import GridConfig, MergeConfig, ToMeConfig, meet_target
from adaptvit.files import as_json, replacing
from adaptvit.methods.merge import fit_thresholds
from adaptvit.model import AdaptiveViT

SIDE, CLASSES, SEEDS, THREADS = 128, 10, (0, 1, 2), 1
BATCH, EPOCHS, RATE, DECAY, WARMUP, LOG_EVERY = 64, 4, 2e-4, 0.05, 0.5, 49
TINY = {"img_size": SIDE, "embed_dim": 192, "num_heads": 3, "global_pool": "token", "use_fc_norm": False}
POSITIONS: dict[str, dict[str, Any]] = {
    "rotary": {
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": 100,
        "rope_rotate_half": True,
    },
    "learned": {"use_abs_pos_emb": True, "use_rot_pos_emb": False},
}
"""The rotation has the settings of vit_small_patch16_dinov3."""
PIXELS = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
TRAINING = create_transform(SIDE, is_training=True, scale=(0.35, 1.0), hflip=0.5, color_jitter=None, **PIXELS)
VALIDATION = create_transform(SIDE, crop_pct=1.0, **PIXELS)


TARGETS, FITTING, PART = (0.75, 0.65, 0.5), 256, 50
"""Shares of the dense MACs, training images that thresholds are fitted to, and images in a batch."""


def build(positions: str, classes: int = CLASSES) -> Eva:
    """A fresh model."""
    return Eva(num_classes=classes, dynamic_img_size=True, **TINY, **POSITIONS[positions])


def start(model: Eva, weights: Path) -> nn.Module:
    """Give `model` a ViT's weights, all but the head, and return that ViT.

    Eva has no key bias: it is left out, which softmax does not see under learned positions. Without those, the class
    token keeps its own and the patches their mean.
    """
    source = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=SIDE, num_classes=0, **source)
    state = vit.state_dict()
    for name in [name for name in state if name.endswith("qkv.bias")]:
        query, _, value = state.pop(name).chunk(3)
        state |= {name.replace("qkv.bias", "q_bias"): query, name.replace("qkv.bias", "v_bias"): value}
    if model.pos_embed is None:
        places = state.pop("pos_embed")
        state["cls_token"] = state["cls_token"] + places[:, :1]
        state["patch_embed.proj.bias"] = state["patch_embed.proj.bias"] + places[0, 1:].mean(dim=0)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or any(not name.startswith("head.") for name in missing):
        raise ValueError(f"{str(weights)!r} is no ViT-Tiny/16: missing {missing}, unexpected {unexpected}")
    return vit


@torch.no_grad()
def apart(model: nn.Module, vit: nn.Module, images: Tensor) -> dict[str, float]:
    """The greatest difference of their features, and the greatest feature, in float64."""
    features, expected = (each.double().eval().forward_features(images.double()) for each in (model, vit))
    model.float()
    return {"apart_from_the_vit": (features - expected).abs().max().item(), "feature": expected.abs().max().item()}


def batches(data: list[tuple[Image.Image, int]], transform: Any, order: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels."""
    for first in range(0, len(order), BATCH):
        chosen = [data[index] for index in order[first : first + BATCH]]
        yield torch.stack([transform(image) for image, _ in chosen]), torch.tensor([label for _, label in chosen])


@torch.inference_mode()
def top1(model: nn.Module, data: list[tuple[Image.Image, int]]) -> float:
    """Share of the images put into their class."""
    model.eval()
    order = list(range(len(data)))
    right = [model(images).argmax(dim=1) == labels for images, labels in batches(data, VALIDATION, order)]
    return torch.cat(right).double().mean().item()


def fit(name: str, model: Eva, seed: int, training: list, validation: list, out: Path) -> list[dict[str, float]]:
    """Train `model`, from its checkpoint where there is one, and return a row for each epoch."""
    steps, checkpoint = len(training) // BATCH, out / f"{name}.pt"
    optimizer = create_optimizer_v2(model, opt="adamw", lr=RATE, weight_decay=DECAY)
    schedule = CosineLRScheduler(
        optimizer, EPOCHS * steps, warmup_t=int(WARMUP * steps), warmup_prefix=True, t_in_epochs=False
    )
    rows: list[dict[str, float]] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        rows = saved["rows"]
        print(f"{name}: goes on after epoch {len(rows)}", flush=True)
    for epoch in range(len(rows), EPOCHS):
        random.seed(seed * 1000 + epoch)  # timm's crops
        torch.manual_seed(seed * 1000 + epoch)
        order = torch.randperm(len(training)).tolist()[: steps * BATCH]
        model.train()
        losses, begun = [], time.perf_counter()
        for step, (images, labels) in enumerate(batches(training, TRAINING, order), 1):
            schedule.step_update(epoch * steps + step - 1)
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if step % LOG_EVERY == 0:
                mean, speed = sum(losses[-LOG_EVERY:]) / LOG_EVERY, step * BATCH / (time.perf_counter() - begun)
                print(f"{name}: epoch {epoch + 1} step {step} loss {mean:.6f}, {speed:.1f} images/s", flush=True)
        if not math.isfinite(sum(losses)):
            raise ValueError(f"{name}: the loss of epoch {epoch + 1} is not finite")
        speed = steps * BATCH / (time.perf_counter() - begun)
        rows.append({"loss": sum(losses) / steps, "top1": top1(model, validation), "images_per_s": speed})
        print(f"{name}: {time.strftime('%H:%M:%S')} {as_json({'epoch': epoch + 1} | rows[-1])}", flush=True)
        with replacing(checkpoint) as path:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows}, path)
    return rows


def train(data: Path, weights: Path, out: Path) -> None:
    """Train what is not there yet: both kinds with one seed, then with the next."""
    torch.set_num_threads(THREADS)
    out.mkdir(parents=True, exist_ok=True)
    training, validation = [
        [(Image.open(path).convert("RGB"), label) for path, label in ImageFolder(data / split).samples]
        for split in ("train", "val")
    ]
    for seed in SEEDS:
        for positions in POSITIONS:
            name = f"{positions}-{seed}"
            if (out / f"{name}.json").exists():
                continue
            torch.manual_seed(seed)
            model = build(positions)
            vit = start(model, weights)
            conditions = {"positions": positions, "seed": seed, "epochs": EPOCHS, "batch": BATCH, "rate": RATE}
            if positions == "learned":
                conditions |= apart(model, vit, next(batches(validation, VALIDATION, list(range(BATCH))))[0])
                print(f"{name}: {as_json(conditions)}", flush=True)
            rows = fit(name, model, seed, training, validation, out)
            with replacing(out / f"{name}.safetensors") as path:
                save_file(model.state_dict(), path)
            conditions |= {"top1": rows[-1]["top1"], "by_epoch": rows, "threads": THREADS}
            conditions |= {"torch": torch.__version__, "timm": timm.__version__}
            with replacing(out / f"{name}.json") as path:
                path.write_text(as_json(conditions, indent=2) + "\n")
            (out / f"{name}.pt").unlink()


def spread(folder: Path, count: int | None) -> tuple[Tensor, Tensor]:
    """So many images and labels, evenly spread over a folder of classes; all of them where that is None."""
    samples = ImageFolder(folder).samples
    places = torch.linspace(0, len(samples) - 1, min(count or len(samples), len(samples))).long().tolist()
    data = [(Image.open(samples[place][0]).convert("RGB"), samples[place][1]) for place in places]
    images, labels = zip(*batches(data, VALIDATION, list(range(len(data)))), strict=True)
    return torch.cat(images), torch.cat(labels)


def merged(method: str, position: str | None, vit: nn.Module, images: Tensor, target: float) -> AdaptiveViT:
    """A model of a method at a share of the dense MACs. Thresholds are fitted to ToMe's even schedule."""
    if method == "grid":
        model: AdaptiveViT = GridConfig().build(vit).eval()
    else:
        model = ToMeConfig(position=position).build(vit).eval()
    meet_target(model, images[:1], target)  # all cost the same
    if method == "merge":
        even = ToMeConfig(r=[max(1, r) for r in model.config.schedule(model.depth)])
        model = fit_thresholds(MergeConfig(position=position), vit, images, even)
        meet_target(model, images, target)
    return model


@torch.inference_mode()
def measured(model: AdaptiveViT, images: Tensor, labels: Tensor, dense: Tensor) -> dict[str, float]:
    """Share of the dense MACs, top-1, and mean divergence from the dense model's log-probabilities, in nats."""
    outputs = [model(batch, detailed=True) for batch in images.split(PART)]
    found = torch.cat([output.logits for output in outputs]).log_softmax(dim=1)
    return {
        "share": torch.cat([output.usage.share for output in outputs]).mean().item(),
        "top1": (found.argmax(dim=1) == labels).double().mean().item(),
        "divergence": (dense.exp() * (dense - found)).sum(dim=1).mean().item(),
    }


def compare(data: Path, out: Path, record: Path, limit: int | None) -> None:
    """Measure the models in `out` that are not in the record yet, and print the table of all that are.

    Raises:
        ValueError: the record is of other conditions.
    """
    torch.set_num_threads(THREADS)
    fitting, _ = spread(data / "train", FITTING)
    images, labels = spread(data / "val", limit)
    conditions = {"fitting": len(fitting), "images": len(images), "torch": torch.__version__, "timm": timm.__version__}
    known = json.loads(record.read_text()) if record.exists() else {"conditions": conditions, "rows": []}
    if known["conditions"] != conditions:
        raise ValueError(f"{str(record)!r} is of {known['conditions']}, not of {conditions}")
    for seed, positions in product(SEEDS, POSITIONS):
        file = out / f"{positions}-{seed}.safetensors"
        if not file.exists() or any((row["positions"], row["seed"]) == (positions, seed) for row in known["rows"]):
            continue
        vit = build(positions).eval()
        vit.load_state_dict(load_file(file))
        with torch.inference_mode():
            dense = torch.cat([vit(batch) for batch in images.split(PART)]).log_softmax(dim=1)
        right = (dense.argmax(dim=1) == labels).double().mean().item()
        places = ("receiver", "mean") if positions == "rotary" else ("receiver",)
        ways = [*product(("tome", "merge"), places), ("grid", None)]
        rows = []
        for target, (method, position) in product(TARGETS, ways):
            model = merged(method, position, vit, fitting, target)
            row = {"positions": positions, "seed": seed, "dense": right, "target": target, "method": method}
            rows.append(row | {"position": position} | measured(model, images, labels, dense))
            print(as_json(rows[-1]), flush=True)
        known["rows"] += rows
        with replacing(record) as path:
            path.write_text(as_json(known, indent=1) + "\n")
    print(merging(known))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("train")
    for option in ("--data", "--weights", "--out"):
        job.add_argument(option, type=Path, required=True)
    job = jobs.add_parser("compare")
    for option in ("--data", "--out"):
        job.add_argument(option, type=Path, required=True)
    job.add_argument("--record", type=Path, default=RECORD)
    job.add_argument("--limit", type=int, help="images of val to measure on; all of them unless told")
    arguments = parser.parse_args()
    if arguments.job == "train":
        train(arguments.data, arguments.weights, arguments.out)
    else:
        compare(arguments.data, arguments.out, arguments.record, arguments.limit)


if __name__ == "__main__":
    main()
