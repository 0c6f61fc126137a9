"""A trained model as the package carries it, in half precision and with names: python benchmarks/bundled.py MODEL FILE

FILE's name says which it is, photographs or digits.
"""

import sys
from pathlib import Path

import torch

import adaptvit

NAMES = {
    "digits": [str(digit) for digit in range(10)],
    "photographs": [
        *("tench", "English springer", "cassette player", "chain saw", "church"),
        *("French horn", "garbage truck", "gas pump", "golf ball", "parachute"),
    ],
}
"""Of the classes, in the order of their folders."""
DTYPES = {"digits": torch.bfloat16, "photographs": torch.float16}

trained, file = (Path(word) for word in sys.argv[1:])
model = adaptvit.load(trained).to(DTYPES[file.stem])
model.class_names = NAMES[file.stem]
adaptvit.save(model, file)
