"""Methods on clips: accuracy against MACs off the shelf, tuned files beside them, and clips per second in turns.

python benchmarks/clips.py accuracy NAME DENSE ROOT [TUNED ...]    adds lines to benchmarks/clips.jsonl
python benchmarks/clips.py speed NAME DENSE ROOT [TUNED ...]       the same, of all models that there are lines of
python benchmarks/clips.py table                                   the lines as a table
python benchmarks/clips.py signers ASL24 ROOT                      links: one person's clips to train on, the other's

ROOT is a set of `shared/data`, unpacked or a tar's folder; DENSE what `adaptvit train asl24_dense` or `hockey_dense`
leaves. Methods are fitted to 32 training clips at the middle budget and turned to each on the same. TUNED are files in
folders of their own, by whose names they are known: of `adaptvit train hockey_runlength`, say, or of `adaptvit adapt`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptvit import (
    ATSConfig,
    AViTConfig,
    CalibratedConfig,
    EViTConfig,
    MergeConfig,
    RunLengthConfig,
    RunLengthMergeConfig,
    ToMeConfig,
)
from adaptvit.budget import meet_target
from adaptvit.commands.draw import spearman
from adaptvit.data import DataConfig, open_split, preparation, spread_over
from adaptvit.macs import dense_macs, macs
from adaptvit.measure.evaluate import outputs
from adaptvit.measure.speed import speeds
from adaptvit.methods import METHODS
from adaptvit.model import AdaptiveViT
from adaptvit.terminal import say
from adaptvit.weights.opening import open_model

BUDGETS = (0.4, 0.6, 0.25)
CALIBRATION = 32
METHODS_MEASURED = {
    "runlength": RunLengthConfig(),
    "calibrated": CalibratedConfig(),
    "merge": MergeConfig(),
    "tome": ToMeConfig(),
    "ats": ATSConfig(blocks=range(1, 12)),
    "evit": EViTConfig(blocks=(1, 4, 7)),
    "runlength_merge": RunLengthMergeConfig(threshold=0.02),
    "avit": AViTConfig(class_token="stays"),
}
LINES = Path(__file__).with_suffix(".jsonl")
BATCHES = (4, 1)


def known(name: str) -> dict[str, dict[str, Any]]:
    """Lines of a set by the models' labels."""
    lines = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
    return {line["label"]: line for line in lines if line["set"] == name}


def keep(line: dict[str, Any]) -> None:
    """Add a line, or put it in the place of the one of the same model."""
    lines = [json.loads(one) for one in LINES.read_text().splitlines()] if LINES.exists() else []
    key = line["set"], line["label"]
    lines = [one for one in lines if (one["set"], one["label"]) != key] + [line]
    LINES.write_text("".join(json.dumps(one) + "\n" for one in lines))


def measured(model: Any, data: Any, shape: Any) -> dict[str, Any]:
    """Accuracy clip by clip, MACs, and how tokens go with motion."""
    right, cost, tokens, motion = [], [], [], []
    grid: tuple[int, ...] = ()
    for batch, output in outputs(model, data, batch_size=8):
        assert output is not None
        right.append(output.logits.argmax(dim=1) == batch.labels)
        cost.append(macs(output.usage, shape).double())
        tokens.append(output.usage.attended.double().mean(dim=1))
        motion.append(batch.images.diff(dim=1).abs().mean(dim=(1, 2, 3, 4)).double())
        grid = output.usage.grid
    share = torch.cat(cost) / dense_macs(shape, grid)
    counts = torch.cat(tokens)
    return {
        "correct": "".join(str(int(one)) for one in torch.cat(right)),
        "top1": torch.cat(right).double().mean().item(),
        "share": share.mean().item(),
        "share_p10_p90": share.quantile(torch.tensor([0.1, 0.9]).double()).tolist(),
        "tokens_with_motion": spearman(counts, torch.cat(motion)) if len(counts.unique()) > 1 else None,
    }


def turned_to(model: AdaptiveViT, images: Tensor, budget: float) -> AdaptiveViT | str:
    """At a budget, or why not."""
    try:
        meet_target(model, images[:4] if model.even else images, budget, tolerance=0.02)
    except ValueError as error:
        return str(error)
    return model


def accuracy(
    name: str, dense: AdaptiveViT, source: DataConfig, tuned: list[Path], budgets: Sequence[float] = BUDGETS
) -> None:
    settings, found = preparation(dense), known(name)
    data = open_split(source, settings, "val")
    if "dense" not in found:
        keep({"set": name, "label": "dense", "budget": None, **measured(dense.vit, data, dense.shape)})
    images = spread_over(open_split(source, settings, "train"), CALIBRATION).images
    models: dict[str, AdaptiveViT] = {}
    for budget, method in product(budgets, METHODS_MEASURED):
        line = {"set": name, "label": f"{method} {budget:g}", "method": method, "budget": budget}
        if line["label"] in found:
            continue
        if method not in models:
            models[method] = METHODS_MEASURED[method].fitted(dense.vit, images, BUDGETS[0])
        met = turned_to(model := models[method], images, budget)
        if isinstance(met, str):
            keep({**line, "refused": met})
            continue
        keep({**line, "config": model.config.to_dict(), **measured(model, data, model.shape)})
        say(f"{name} {method} {budget}")
    for file in tuned:
        label = file.parent.name
        if label not in found:
            model = open_model(file)
            method = model.config.method
            line = {"set": name, "label": label, "method": method, "budget": None, "file": str(file.name)}
            keep({**line, "config": model.config.to_dict(), **measured(model, data, model.shape)})


def rebuilt(line: dict[str, Any], dense: AdaptiveViT, images: Tensor, tuned: Mapping[str, Path]) -> AdaptiveViT:
    """The model of a line: of its file, or on the dense weights, fitted to `images` as it was."""
    if line["label"] in tuned:
        return open_model(tuned[line["label"]]).eval()
    told = {key: value for key, value in line["config"].items() if key != "method"}
    config = METHODS[line["method"]](**told)
    return config.build(config.prepared(dense.vit, images)).eval()


def speed(
    name: str, dense: AdaptiveViT, source: DataConfig, tuned: list[Path], rounds: int, budgets: Sequence[float]
) -> None:
    files = {file.parent.name: file for file in tuned}
    lines = {
        label: line
        for label, line in known(name).items()
        if "config" in line and (line["budget"] in budgets or label in files)
    }
    settings = preparation(dense)
    images = spread_over(open_split(source, settings, "val"), 12).images
    fitting = spread_over(open_split(source, settings, "train"), CALIBRATION).images
    models = {label: rebuilt(line, dense, fitting, files) for label, line in lines.items()}
    gains: dict[str, dict[str, Any]] = {label: {} for label in models}
    for size in BATCHES:
        parts = [images[at : at + size] for at in range(0, 12, max(size, 4))][:3]
        for part in parts:
            timed = speeds(models, dict.fromkeys(models, part), rounds, ["packed"], dense=(dense.vit, part))
            for label, one in timed.items():
                gains[label].setdefault(str(size), []).append([one.gain, one.packed, one.dense, one.ideal])
    for label, line in lines.items():
        keep({**line, "gain": {size: torch.tensor(rows).mean(dim=0).tolist() for size, rows in gains[label].items()}})


def table() -> None:
    """A table for each set: points of top-1 less dense, with their standard error, and MACs, by budget."""
    budgets = sorted(BUDGETS, reverse=True)
    gains = [f"gain at {BUDGETS[0]:.0%}, batch {size}" for size in BATCHES]
    head = ["", *(f"{budget:.0%}" for budget in budgets), *gains, f"clips/s, batch {BATCHES[0]}", "tokens with motion"]
    for name in dict.fromkeys(json.loads(line)["set"] for line in LINES.read_text().splitlines()):
        lines = known(name)
        dense = lines.pop("dense")
        base = torch.tensor([float(digit) for digit in dense["correct"]])
        print(f"\n{name}: {len(base)} clips, dense {100 * dense['top1']:.1f} %\n")
        print(f"| {' | '.join(head)} |\n| --- |{' ---: |' * (len(head) - 1)}")
        rows: dict[str, dict[float, dict[str, Any]]] = {}
        for label, line in lines.items():
            budget = line["budget"] or BUDGETS[0]
            title = METHODS[line["method"]].title
            if line["budget"] is None:
                title += ", fine-tuned" if label == f"{name}_{line['method']}" else f", `{label}`"
            rows.setdefault(title, {})[budget] = line
        for title, row in rows.items():
            middle = row.get(BUDGETS[0], {})
            cells = [title, *(cell(row[budget], base) if budget in row else "" for budget in budgets)]
            timed = middle.get("gain", {})
            cells += [f"{timed[str(size)][0]:.2f}" if timed else "" for size in BATCHES]
            cells.append(f"{timed[str(BATCHES[0])][1]:.0f}" if timed else "")
            rank = middle.get("tokens_with_motion")
            print(f"| {' | '.join([*cells, '' if rank is None else f'{rank:.2f}'])} |")


def cell(line: dict[str, Any], base: Tensor) -> str:
    """A cell: points of top-1 less dense, clip by clip, and the share of the MACs."""
    if "refused" in line:
        return "refused"
    gap = torch.tensor([float(digit) for digit in line["correct"]]) - base
    return f"{100 * gap.mean():+.1f} ± {100 * gap.std() / len(gap) ** 0.5:.1f} ({line['share']:.0%})"


def signers(asl24: Path, root: Path) -> None:
    """Links to the clips of person s1 that are to be trained on, and to all clips of s2, by letters."""
    for split, clips in (("train", asl24.glob("train/*/s1_*.jpg")), ("val", asl24.glob("*/*/s2_*.jpg"))):
        for clip in clips:
            link = root / split / clip.parent.name / clip.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(clip.resolve())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["accuracy", "speed", "table", "signers"])
    parser.add_argument("name", nargs="?", help="of the set, in the lines")
    parser.add_argument("dense", nargs="?", type=Path)
    parser.add_argument("root", nargs="?", type=Path)
    parser.add_argument("tuned", nargs="*", type=Path)
    parser.add_argument("--budgets", nargs="*", type=float, default=BUDGETS)
    parser.add_argument("--rounds", type=int, default=5)
    told = parser.parse_args()
    if told.what == "table":
        return table()
    if told.what == "signers":
        return signers(Path(told.name), told.dense)
    dense, source = open_model(told.dense), DataConfig(root=told.root, strip=16)
    if told.what == "accuracy":
        return accuracy(told.name, dense, source, told.tuned, told.budgets)
    return speed(told.name, dense, source, told.tuned, told.rounds, told.budgets)


if __name__ == "__main__":
    main()
