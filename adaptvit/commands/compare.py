"""`adaptvit compare`: variants of a training, or methods side by side on one model."""

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from jsonargparse import ArgumentParser, Namespace


def options(words: Sequence[str]) -> ArgumentParser:
    """`adaptvit compare NAME`, or that of methods, where the command line's words say so."""
    parser: ArgumentParser = _comparing(words[1] if words[:1] == ["compare"] and len(words) > 1 else "").options(words)
    return parser


def execute(arguments: Namespace) -> int:
    """Run what is not finished, and print the table; 1 where images could not be read."""
    try:
        code: int = _comparing(arguments.name).execute(arguments)
        return code
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on where it was") from None


def _comparing(what: str) -> ModuleType:
    """The one of the two that is asked for: each needs other libraries."""
    return import_module(f"adaptvit.commands.{'compare_methods' if what == 'methods' else 'comparisons'}")
