"""Does dropping the neighbours of halted patches pay? Accuracy of each neighbourhood at the MACs of plain halting.

    python benchmarks/wider_halting.py digits OUT [NEIGHBOURHOOD ...]    trains with halting, seeds 0 to 2, then applies
        every neighbourhood to what was trained; trains again with each NEIGHBOURHOOD that is named
    python benchmarks/wider_halting.py imagenette OUT MODEL DATA    a trained A-ViT, or a gate fitted to a plain ViT

A JSON line per model, neighbourhood and share of the dense MACs goes to OUT; `own` is at the gate of plain halting.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_model_data_config

from adaptvit import AViTConfig, dense_macs, macs, meet_target
from adaptvit.checkpoints import open_model
from adaptvit.data import Batch, DataConfig, open_split
from adaptvit.data import digits as digits_data
from adaptvit.methods.avit import AViT
from adaptvit.methods.avit_gate import fit_gate
from adaptvit.methods.avit_widen import NEIGHBOURHOODS
from adaptvit.recipes import RECIPES
from adaptvit.run import run, spread_over
from adaptvit.usage import join

RULES = ("all", "fewer with depth")
PLAIN: dict[str, Any] = {"neighbourhood": None}
SETTINGS = [PLAIN, *({"neighbourhood": name, "neighbours_dropped": rule} for rule in RULES for name in NEIGHBOURHOODS)]


def measure(model: AViT, batch: Batch) -> tuple[torch.Tensor, float]:
    """Which images are classified rightly, and the share of the dense MACs."""
    with torch.inference_mode():
        outputs = [model(part) for part in batch.images.split(64)]
    usage = join([output.usage for output in outputs])
    share = macs(usage, model.shape).double().mean().item() / dense_macs(model.shape, usage.grid)
    return torch.cat([output.logits for output in outputs]).argmax(dim=1) == batch.labels, share


def compare(model: AViT, batch: Batch, targets: list[float], out: Path, **row: Any) -> None:
    """Every neighbourhood on one set of weights: at the gate as it is, and steered to each target on a quarter."""
    plain: dict[float, torch.Tensor] = {}
    gate = model.config
    own = measure(model, batch)[1]
    for setting in SETTINGS:
        config = replace(gate, **setting)
        steered = {"own": config}
        for target in targets:
            wider = config.build(model.vit).eval()
            steered[str(target)] = meet_target(wider, batch.images[::4], target, tolerance=0.004)
        for at, settled in steered.items():
            correct, share = measure(settled.build(model.vit).eval(), batch)
            figures = {"top1": correct.double().mean().item(), "share": share, "gate_center": settled.gate_center}
            if setting is PLAIN:
                plain[at] = correct
            elif at != "own":
                difference = correct.double() - plain[at].double()
                figures["minus_plain"] = difference.mean().item()
                figures["standard_error"] = (difference.std() / len(difference) ** 0.5).item()
            with out.open("a") as file:
                file.write(json.dumps({**row, **setting, "at": at, **figures, "plain_share": own}) + "\n")


def digits(out: Path, names: list[str]) -> None:
    """Three seeds of the digits recipe, with plain halting or each of `names`; what is trained already is read."""
    test = digits_data().test
    batch = spread_over(test, len(test))
    recipe = RECIPES["digits"]()
    for seed in range(3):
        for setting in [{"neighbourhood": name, "neighbours_dropped": "all"} for name in names] or [PLAIN]:
            folder = out.parent / f"digits_{seed}_{setting['neighbourhood']}"
            if not (folder / "model.safetensors").exists():
                method, steps = replace(recipe.method, **setting), replace(recipe.recipe, seed=seed)
                run(replace(recipe, method=method, recipe=steps, output=folder))
            model = open_model(str(folder / "model.safetensors"))
            assert isinstance(model, AViT)
            if setting is PLAIN:
                compare(model, batch, [0.4], out, data="digits", seed=seed)
                continue
            for target in (0.5, 0.4):
                meet_target(model, batch.images[::4], target, tolerance=0.004)
                correct, share = measure(model, batch)
                row = {"data": "digits, trained so", "seed": seed, **setting, "at": str(target)}
                with out.open("a") as file:
                    file.write(json.dumps({**row, "top1": correct.double().mean().item(), "share": share}) + "\n")


def imagenette(out: Path, file: str, folder: str) -> None:
    """A model file on 1000 validation images; a plain ViT has its gate fitted to 256 training images."""
    model = open_model(file)
    settings = resolve_model_data_config(model)
    if not isinstance(model, AViT):
        images = spread_over(open_split(DataConfig(root=Path(folder)), settings, "train"), 256).images
        scale, _ = fit_gate(model.vit, images)
        model = AViTConfig(gate_scale=6 * scale, class_token="stays").build(model.vit).eval()
        meet_target(model, images, 0.65)
    batch = spread_over(open_split(DataConfig(root=Path(folder)), settings, "validation"), 1000)
    compare(model, batch, [0.5], out, data=Path(file).parent.name)


if __name__ == "__main__":
    what, out, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    if what == "digits":
        digits(Path(out), rest)
    else:
        imagenette(Path(out), *rest)
