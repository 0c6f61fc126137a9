"""`adaptvit list`: what there is by name, a line each."""

from collections.abc import Sequence

import timm
from jsonargparse import ArgumentParser, Namespace

from adaptvit.commands.parsing import dashed, parser_of
from adaptvit.methods import METHODS
from adaptvit.terminal import meant, say
from adaptvit.training.recipes import RECIPES
from adaptvit_cli import COMMANDS, aligned

WHAT = ("methods", "models", "recipes", "completion")
COMPLETION = """\
_adaptvit() {{
    local options=""
    case "${{COMP_WORDS[1]}} " in
{cases}
    esac
    [ "$COMP_CWORD" = 1 ] && options="{commands}"
    COMPREPLY=($(compgen -W "$options" -- "$2"))
    [ "$COMP_CWORD" = 1 ] || case "$2" in -*) ;; *) COMPREPLY+=($(compgen -f -- "$2")) ;; esac
}}
complete -o filenames -F _adaptvit adaptvit"""
"""Of bash, and of zsh by its `bashcompinit`: commands, their options, and files."""


def listed(what: str, pattern: str = "") -> dict[str, str]:
    """A sentence by name, of what a word asks for.

    Args:
        pattern: of names of models, such as `vit_small*`, timm's among them; without one, the methods' own.
    Raises:
        ValueError: there is nothing of that name.
    """
    if what not in WHAT:
        raise ValueError(f"there are lists of {', '.join(WHAT)}, not of {what!r}{meant(what, WHAT)}")
    if pattern and what != "models":
        raise ValueError(f"pattern {pattern!r} is of names of models; all {what} are listed")
    if what == "recipes":
        return {name: _sentence(recipe) for name, recipe in RECIPES.items()}
    if what == "methods":
        return {name: f"{kind.title}: {_sentence(kind)}" for name, kind in METHODS.items()}
    own = {name: named.about for kind in METHODS.values() for name, named in kind.published.names.items()}
    if not pattern:
        return own
    found = timm.list_models(pattern)
    if not found:
        raise ValueError(f"no model is named {pattern!r}{meant(pattern, timm.list_models())}")
    return {name: own.get(name, "one of timm's") for name in found}


def completion() -> str:
    """A script by which a shell completes commands and their options."""
    cases = []
    for command in COMMANDS:
        taken = parser_of([command])._option_string_actions
        options = sorted(dashed(option) for option in taken if option.startswith("--"))
        cases.append(f'        {command}\\ ) options="{" ".join(options)}" ;;')
    return COMPLETION.format(cases="\n".join(cases), commands=" ".join(COMMANDS))


def _sentence(what: object) -> str:
    return " ".join((what.__doc__ or "").split()).split(". ")[0].removesuffix(".") + "."


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit list WHAT [PATTERN]`."""
    parser = ArgumentParser(
        allow_abbrev=False, description="The methods, models or recipes that there are, a line each."
    )
    parser.add_argument("what", type=str, help="One of methods, models, recipes; completion is a script for a shell.")
    parser.add_argument(
        "pattern", nargs="?", type=str, default="", help="Of models: names as vit_small*, timm's other models included."
    )
    return parser


def lines(what: str, pattern: str = "") -> list[str]:
    """What is printed: the list, as `listed` takes its arguments, or the script."""
    if what == "completion" and not pattern:
        return completion().split("\n")
    found = listed(what, pattern)
    told = aligned(found)
    if what == "models" and not pattern:
        told.append("Any ViT of timm's too: adaptvit list models 'vit_*'; a file, a folder, or hf-hub:OWNER/NAME.")
    return told


def execute(arguments: Namespace) -> None:
    """Print it."""
    for line in lines(arguments.what, arguments.pattern):
        say(line)
