"""Accuracy and cost of the bundled model on the digits held out: python benchmarks/zoo.py"""

from pathlib import Path

import adaptvit
from adaptvit.data import open_digits
from adaptvit.measure.evaluate import evaluate

model = adaptvit.load(Path(adaptvit.__file__).parent / "commands" / "digits.safetensors").float().eval()
result = evaluate(model.vit, open_digits(model.vit.patch_embed.img_size[0]).test)
print(f"top-1 {result.top1:.1%} of {result.images}, {1e3 * result.gmacs:.1f} MMACs an image")
