"""`adaptvit list`: what there is by name, a line each."""

from collections.abc import Sequence

import timm
from jsonargparse import ArgumentParser, Namespace

from adaptvit.methods import METHODS
from adaptvit.terminal import meant, say
from adaptvit.training.recipes import RECIPES

WHAT = ("methods", "models", "recipes")


def listed(what: str, pattern: str = "") -> dict[str, str]:
    """A sentence by name, of what a word asks for.

    Args:
        pattern: of names of models, such as `vit_small*`, among timm's too; without one only those of methods are listed.
    Raises:
        ValueError: there is nothing of that name.
    """
    if what not in WHAT:
        raise ValueError(f"there are lists of {', '.join(WHAT)}, not of {what!r}{meant(what, WHAT)}")
    if pattern and what != "models":
        raise ValueError(f"pattern {pattern!r} is of names of models; all {what} are listed")
    if what == "recipes":
        return {name: _first_line(recipe) for name, recipe in RECIPES.items()}
    if what == "methods":
        return {name: f"{kind.title}: {_first_line(kind)}" for name, kind in METHODS.items()}
    own = {name: named.about for kind in METHODS.values() for name, named in kind.published.names.items()}
    if not pattern:
        return own
    found = timm.list_models(pattern)
    if not found:
        raise ValueError(f"no model is named {pattern!r}{meant(pattern, timm.list_models())}")
    return {name: own.get(name, "timm's") for name in found}


def _first_line(what: object) -> str:
    return (what.__doc__ or "").strip().split("\n")[0]


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit list WHAT [PATTERN]`."""
    parser = ArgumentParser(allow_abbrev=False, description="The methods, models or recipes that there are, a line each.")
    parser.add_argument("what", type=str, help=f"One of {', '.join(WHAT)}.")
    parser.add_argument(
        "pattern", nargs="?", type=str, default="", help="Of models: names as vit_small*, timm's other models included."
    )
    return parser


def execute(arguments: Namespace) -> None:
    """Print the list."""
    found = listed(arguments.what, arguments.pattern)
    width = max(map(len, found))
    for name, sentence in found.items():
        say(f"{name:{width}}  {sentence}")
    if arguments.what == "models" and not arguments.pattern:
        say("Any ViT of timm's too: adaptvit list models 'vit_*'; a file, a folder, or hf-hub:OWNER/NAME.")
