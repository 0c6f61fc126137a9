"""Tensors out of files that anybody may have written: nothing in them is executed, nothing they say is believed."""

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adaptvit.files import check_is_file
from adaptvit.terminal import shown

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What weights may be stored as."""


def existing(path: Path | str) -> Path:
    """`path`, if an ordinary file is there.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder, or a pipe, socket or device, which could be read for ever.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        check_is_file(path)
    except PermissionError:
        raise
    except OSError as error:
        raise ValueError(str(error)) from None
    return path


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata.

    Raises:
        ValueError: the file is damaged or something else.
    """
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            return file.get_tensors(), file.metadata() or {}
    except OSError:
        raise
    except Exception as error:  # beside SafetensorError what torch makes of sizes and types
        kind = "damaged or not a safetensors file" if isinstance(error, SafetensorError) else "damaged"
        raise ValueError(f"{path} is {kind}: {reason(error)}") from error


def read_torch(path: Path, device: torch.device | str = "cpu") -> Any:
    """What `torch.save` wrote, as long as it is tensors, plain values and an `argparse.Namespace`.

    Raises:
        ValueError: the file is damaged or something else, or reading it could run code.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, KeyError and more
        if isinstance(error, OSError) and error.filename is not None:
            raise
        needed = re.search(r"GLOBAL ([\w.]+)", str(error))
        if needed:
            raise ValueError(
                f"{path} is refused: reading its {needed[1]} could run code; save its state dict alone"
            ) from error
        if "TorchScript" in str(error):
            raise ValueError(f"{path} is a TorchScript program, not weights; save its state dict alone") from error
        raise ValueError(f"{path} is damaged or was not written by torch.save") from error


def read_json(path: Path | str, text: str | bytes) -> Any:
    """JSON as its standard has it: no NaN, no infinity, no name twice.

    Args:
        path: where it was found, for the message.
    Raises:
        ValueError: it is something else.
    """
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"{path} has JSON nested too deeply to be read") from None
    except ValueError as error:  # among them what is not UTF-8
        raise ValueError(f"{path} has JSON that cannot be read: {reason(error)}") from error


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _no_number(digits)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def check_state_dict(path: Path, weights: Any) -> dict[str, Tensor]:
    """Plain tensors by names, as they were given.

    Raises:
        ValueError: there is something else among them.
    """
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(
            f"{path} holds no state dict, bare or under 'state_dict_ema', 'state_dict', 'model' or 'model_ema'"
        )
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} holds no state dict, but {type(value).__name__} under {str(key)[:80]!r}")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "quantised" if value.is_quantized else "without values" if value.is_meta else "sparse"
            raise ValueError(f"{path} holds {shown(key[:80])}, which is {kind}: save plain tensors")
        if value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(
                f"{path} holds {shown(key[:80])}, of {value.nbytes} bytes, few of which are there: save it whole"
            )
    return dict(weights)


def check_fit(complaint: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and kinds of numbers.

    Raises:
        ValueError: the complaint, and which tensors are missing, unexpected, misshaped or of another kind.
    """
    both = [(key, value, wanted[key]) for key, value in found.items() if key in wanted]
    faults = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "misshaped": [
            f"{key} {tuple(value.shape)} instead of {tuple(own.shape)}"
            for key, value, own in both
            if value.shape != own.shape
        ],
        "of another kind": [
            f"{key} {value.dtype} instead of {own.dtype}" for key, value, own in both if not _stands_for(value, own)
        ],
    }
    told = [f"{fault} {some(names)}" for fault, names in faults.items() if names]
    if told:
        raise ValueError(f"{complaint}: {'; '.join(told)}")


def _stands_for(value: Tensor, own: Tensor) -> bool:
    return value.dtype in FLOATS if own.is_floating_point() else value.dtype == own.dtype


def check_finite(path: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are no numbers; of shapes that were compared, as a small file can name huge ones.

    Raises:
        ValueError: naming the tensors.
    """
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not _is_finite(value)]
    if bad:
        raise ValueError(f"{path} holds NaN or infinity in {some(bad)}")


def _is_finite(value: Tensor) -> bool:
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())  # a sum is cheaper, and may overflow


def some(names: Sequence[str]) -> str:
    """The first three names, on one line and at length only where that is little, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name if len(name) <= 160 else f"{name[:160]}..." for name in map(shown, names[:3])) + more


def reason(error: BaseException) -> str:
    """What an error says in its first line, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:300] if lines else type(error).__name__
