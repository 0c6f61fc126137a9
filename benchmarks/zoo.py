"""Accuracy and cost of the bundled models on what was held out: python benchmarks/zoo.py [IMAGENETTE]"""

import sys
from pathlib import Path

from adaptvit import load
from adaptvit.commands.sessions import BUNDLED
from adaptvit.data import Data, DataConfig, open_data, open_digits, preparation
from adaptvit.measure.evaluate import evaluate
from adaptvit.methods import is_dense
from adaptvit.model import AdaptiveViT


def held_out(model: AdaptiveViT, root: Path | None) -> Data | None:
    """The images that a model was not trained on, where they are here."""
    size = model.vit.patch_embed.img_size[0]
    if model.vit.patch_embed.proj.in_channels == 1:
        return open_digits(size)
    return None if root is None else open_data(DataConfig(root=root), preparation(model))


root = Path(sys.argv[1]) if len(sys.argv) > 1 else None
for name, file in BUNDLED.items():
    model = load(file).float().eval()
    if (data := held_out(model, root)) is None:
        continue
    ways = {"dense": model.vit} | ({} if is_dense(model) else {model.config.title: model})
    for way, one in ways.items():
        result = evaluate(one, data.test)
        print(f"{name}, {way}: top-1 {result.top1:.1%} of {result.images}, {1e3 * result.gmacs:.1f} MMACs")
