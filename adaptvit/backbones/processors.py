"""How images are prepared for models of Hugging Face's, in the words of timm's records."""

import json
from functools import cache
from pathlib import Path
from typing import Any

FILES = ("preprocessor_config.json", "processor_config.json")
"""Where a folder with a model says it."""
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""By Pillow's numbers."""


@cache
def prepared_by(folder: str) -> dict[str, Any]:
    """What the image processor in a model's folder says; nothing where there is none, or it is not to be read."""
    for path in (Path(folder) / name for name in FILES):
        if path.is_file():
            try:
                told = json.loads(path.read_bytes())
                return _in_timms_words(told.get("image_processor", told))
            except (AttributeError, OSError, TypeError, ValueError, ZeroDivisionError):
                return {}
    return {}


def _in_timms_words(told: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if told.get("do_normalize", True) and told.get("image_mean") and told.get("image_std"):
        found |= {"mean": tuple(told["image_mean"]), "std": tuple(told["image_std"])}
    if told.get("resample") in INTERPOLATIONS:
        found["interpolation"] = INTERPOLATIONS[told["resample"]]
    size = told.get("size") or {}
    size = {"height": size} if isinstance(size, int) else size
    crop = told.get("crop_size") if told.get("do_center_crop") else None
    crop = crop["height"] if isinstance(crop, dict) else crop
    resized = size.get("shortest_edge") or size.get("height")
    if resized:
        found["crop_mode"] = "center" if "shortest_edge" in size else "squash"
        found["crop_pct"] = (crop or resized) / resized
    return found
