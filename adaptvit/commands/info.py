"""`adaptvit info`: what is installed here, and where a model would run."""

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from adaptvit.commands.console import add_json, check_json, say_listed, tell_json
from adaptvit.extras import EXTRAS, PACKAGES
from adaptvit.process import best_device


def facts() -> dict[str, Any]:
    """Versions, devices, threads and extras, by name."""
    extras: dict[str, list[str]] = {}
    for library, extra in EXTRAS.items():
        extras.setdefault(extra, [])
        if find_spec(library) is None:
            extras[extra].append(PACKAGES.get(library, library))
    return {
        **{name: _version(name) for name in ("adaptvit", "torch", "timm", "torchvision", "transformers")},
        "python": platform.python_version(),
        "system": f"{sys.platform}, {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": ", ".join(_devices()),
        "runs on": f"{best_device()}, unless told by --device",
        **{
            f"extra {name}": f"lacks {', '.join(missing)}: pip install 'adaptvit[{name}]'" if missing else "there"
            for name, missing in sorted(extras.items())
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    """The CPU, and each accelerator that torch finds with its name."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    named = getattr(torch.get_device_module(kind), "get_device_name", None)
    if named is None:
        return ["cpu", kind.type]
    return ["cpu", *(f"{kind.type}:{number} {named(number)}" for number in range(torch.accelerator.device_count()))]


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit info`."""
    parser = ArgumentParser(
        allow_abbrev=False, description="Versions, devices, threads, and what is installed of the extras."
    )
    add_json(parser)
    return parser


def execute(arguments: Namespace) -> None:
    """Print the facts."""
    check_json(arguments.json)
    found = facts()
    say_listed(found)
    tell_json(arguments.json, found)
