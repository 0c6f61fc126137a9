"""Images that leave early, fitted to a fine-tuned ViT: what they lose, what they cost, and how fast that is.

    python benchmarks/early_exit.py accuracy MODEL DATA OUTPUT exit|merge_exit [IMAGES ...]
    python benchmarks/early_exit.py others MODEL DATA OUTPUT METHOD ...
    python benchmarks/early_exit.py speed MODEL DATA OUTPUT
    python benchmarks/early_exit.py known MODEL DATA OUTPUT

MODEL is a plain ViT's file, DATA a folder with `train` and `val`, IMAGES numbers of training images that exits are
fitted to (2400 unless told), METHOD what is fitted to 256 of them. OUTPUT is a file of lines of JSON, to which lines
are added; models are kept beside it, and timed.
"""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from one_recipe import line, rank_correlation
from timm.data import ImageNetInfo
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from adaptvit import ExitConfig, FullConfig, Masked, adapt, load, save
from adaptvit.data import Data, DataConfig, collate, open_data, preparation, spread_over
from adaptvit.files import as_json
from adaptvit.measure.evaluate import evaluate
from adaptvit.measure.speed import measure_speed
from adaptvit.methods import METHODS, turned
from adaptvit.methods.exits import HELD
from adaptvit.model import AdaptiveViT

BUDGETS = (0.75, 0.65, 0.55, 0.5, 0.4)
ROUNDS = {32: 24, 1: 1}
"""Rounds by batch size; one at a time, so many rounds of each of `ALONE` images."""
ALONE = 40


def opened(model: Path, root: Path) -> tuple[AdaptiveViT, Data]:
    """A plain ViT and its images, some of ImageNet's classes where it tells these."""
    dense, config = load(model).eval(), DataConfig(root=root, crop_pct=1.0)
    with TemporaryDirectory() as folder:
        if dense.num_classes == 1000:
            config = replace(config, class_map=Path(folder) / "imagenet.txt")
            config.class_map.write_text("\n".join(ImageNetInfo().label_names()))
        return dense, open_data(config, preparation(dense, str(model)))


def write(output: Path, row: dict[str, object]) -> None:
    with output.open("a") as lines:
        lines.write(as_json(row) + "\n")


def accuracy(model: Path, root: Path, output: Path, method: str = "merge_exit", *counts: str) -> None:
    """A line for each number of images and budget."""
    dense, data = opened(model, root)
    of_dense = evaluate(dense, data.test, batch_size=64)
    for count in map(int, counts or ("2400",)):
        images = spread_over(data.calibration, count).images
        held = torch.arange(len(images)) % HELD == HELD - 1
        for budget in BUDGETS:
            exits = METHODS[method]().fitted(dense.vit, images[~held], budget)
            turned(exits, images[held], budget, tolerance=0.01)
            name = f"{method}, {count} images"
            found = line(name, budget, evaluate(exits, data.test, batch_size=64), of_dense, exits.shape)
            write(output, found | {"threshold": exits.config.threshold, "dense_top1": 100 * of_dense.top1})
            save(exits, output.with_name(f"{output.stem}_{method}_{count}_{budget}.safetensors"))


def others(model: Path, root: Path, output: Path, *methods: str) -> None:
    """A line for each other method and budget."""
    dense, data = opened(model, root)
    of_dense = evaluate(dense, data.test, batch_size=64)
    images = spread_over(data.calibration, 256).images
    for method, budget in product(methods, BUDGETS):
        made = adapt(dense.vit, images, budget, METHODS[method]())
        found = line(method, budget, evaluate(made, data.test, batch_size=64), of_dense, made.shape)
        write(output, found | {"dense_top1": 100 * of_dense.top1})
        save(made, output.with_name(f"{output.stem}_{method}_{budget}.safetensors"))


def speed(model: Path, root: Path, output: Path) -> None:
    """A line for each model kept and batch size."""
    dense, data = opened(model, root)
    images = spread_over(data.test, max(*ROUNDS, ALONE)).images
    for file in sorted(output.parent.glob(f"{output.stem}_*.safetensors")):
        exits = load(file).eval()
        for size, rounds in ROUNDS.items():
            batches = images[:32].split(size) if size > 1 else images[:ALONE].split(1)
            found = [measure_speed(dense.vit, exits, batch, rounds=rounds) for batch in batches]
            spent, ideal = sum(1 / one.packed for one in found), sum(1 / one.ideal for one in found)
            gain = sum(1 / one.dense for one in found) / spent
            write(output, {"file": file.stem, "batch": size, "gain": gain, "ideal": len(found) / ideal})


def known(model: Path, root: Path, output: Path) -> None:
    """A line for each block: how its exit's entropy goes with the dense loss, and how often the exit is right."""
    dense, data = opened(model, root)
    exits = ExitConfig().fitted(dense.vit, spread_over(data.calibration, 2400).images, BUDGETS[0])
    plain = FullConfig().build(dense.vit).eval()
    losses, entropies, right = list[Tensor](), list[Tensor](), list[Tensor]()
    with torch.inference_mode():
        for batch in DataLoader(data.test, 64, collate_fn=collate):
            losses.append(cross_entropy(dense(batch.images), batch.labels, reduction="none"))
            tokens, found, hits = plain.enter(batch.images, Masked), list[Tensor](), list[Tensor]()
            for block in exits.exits:
                tokens = plain.run_block(block, tokens)
                told = exits.lens(tokens, block)
                found.append(exits.entropy(told))
                hits.append(exits.readout(told.flatten(1)).argmax(dim=1) == batch.labels)
            entropies.append(torch.stack(found))
            right.append(torch.stack(hits))
    for block, (entropy, hit) in enumerate(zip(torch.cat(entropies, 1), torch.cat(right, 1), strict=True)):
        correlation = rank_correlation(entropy, torch.cat(losses))
        write(
            output, {"block": block, "entropy_with_dense_loss": correlation, "top1": 100 * hit.double().mean().item()}
        )


if __name__ == "__main__":
    what, model, root, output, *counts = sys.argv[1:]
    {"accuracy": accuracy, "others": others, "speed": speed, "known": known}[what](
        Path(model), Path(root), Path(output), *counts
    )
