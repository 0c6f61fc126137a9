"""`adaptvit train`: a recipe, with what is changed of it by options and YAML."""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from adaptvit.commands.console import add_json, check_json, config_of, say_listed, say_unused, tell_json
from adaptvit.data import MasksConfig
from adaptvit.methods import METHODS
from adaptvit.terminal import meant, say, word_after
from adaptvit.training.recipes import RECIPES
from adaptvit.training.run import Run, is_main, train_run


def options(words: Sequence[str]) -> ArgumentParser:
    """`adaptvit train RECIPE`, its defaults those of the recipe that the command line's words name."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description=f"Train a recipe, one of {', '.join(RECIPES)}; everything in it can be changed here or by YAML.",
    )
    named = words[1] if len(words) > 1 and words[0] == "train" and not words[1].startswith("-") else "digits"
    if named not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {named!r}{meant(named, RECIPES)}")
    recipe = _recipe(named, word_after(words, "--method_name"))

    def same(name: str) -> str:
        if name != named:
            raise ArgumentTypeError(f"the recipe comes before all options: adaptvit train {name} ...")
        return name

    parser.add_argument("recipe_name", nargs="?", type=same, default=named, help="Name of the recipe.")
    parser.add_argument("--config", action="config", help="YAML file with what differs from the recipe.")
    parser.add_argument(
        "--method_name",
        type=str,
        default=recipe.method.method,
        help="Another method than the recipe's, at its defaults; `--method.FIELD` changes those.",
    )
    parser.add_argument(
        "--resume", type=bool, nargs="?", const=True, default=False, help="Go on where the same run stopped."
    )
    parser.add_class_arguments(Run, skip={"method", "data", "recipe"})
    for group in ("method", "data", "recipe"):
        parser.add_class_arguments(type(getattr(recipe, group)), group)
    values = {name: value for name, value in vars(recipe).items() if name not in ("method", "data", "recipe")}
    for group in ("method", "data", "recipe"):
        values |= {f"{group}.{name}": value for name, value in vars(getattr(recipe, group)).items()}
    parser.set_defaults(values)
    add_json(parser)
    return parser


def _recipe(name: str, method: str | None) -> Run:
    """A recipe, with another method where one is named.

    Raises:
        ValueError: there is no such method.
    """
    recipe = RECIPES[name]()
    if method in (None, recipe.method.method):
        return recipe
    if method not in METHODS:
        raise ValueError(f"method_name must be one of {', '.join(METHODS)}, got {method!r}{meant(method, METHODS)}")
    return replace(recipe, method=METHODS[method]())


def execute(arguments: Namespace) -> None:
    """Train, and print what came of it."""
    check_json(arguments.json)
    recipe = _recipe(arguments.recipe_name, arguments.method_name)
    parts: dict[str, Any] = {
        group: config_of(type(getattr(recipe, group)), arguments.get(group, {}))
        for group in ("method", "data", "recipe")
    }
    rest = {field.name: arguments[field.name] for field in fields(Run) if field.name not in parts}
    run = Run(**rest, **parts)
    try:
        outcome = train_run(run, arguments.resume, tell=lambda result: say_listed(result.figures))
    except FileNotFoundError as error:
        if str(error) != f"{run.weights} does not exist":
            raise
        raise FileNotFoundError(
            f"{error}: --weights names others, --weights null --pretrained true takes timm's"
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; with --resume the same command goes on after the last epoch") from None
    if is_main():
        say_unused(outcome.result.unreadable, ())
        pixels = isinstance(parts["data"], MasksConfig)
        take = "adaptvit.load opens" if pixels else "adaptvit evaluate, predict and draw take"
        say(f"{outcome.file}: {take} this file")
        tell_json(arguments.json, {"file": str(outcome.file), **outcome.result.figures})
