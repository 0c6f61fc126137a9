"""Options as people read and write them: help in plain words, dashes, flags without a value, names that are meant."""

import re
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Collection, Mapping, Sequence, Sized
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from adaptvit.checks import In, OneOf
from adaptvit.terminal import meant
from adaptvit.weights.places import of_model

SAME = {"class_map": "class_names", "class_names": "class_map"}
"""Names of the file of class names: each is taken where a command has the other."""


class PlainHelp(DefaultHelpFormatter):
    """Help in the words that `made_plain` found."""

    def _expand_help(self, action: Action) -> str:
        return action.help or ""

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings or action.nargs == 0:  # as --help and --quiet
            return super()._format_action_invocation(action)
        metavar = self._get_default_metavar_for_optional(action)
        values = "" if is_flag(action) else f" {self._format_args(action, metavar)}"
        return dashed(action.option_strings[-1]) + values

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        kind, _ = _parts(getattr(action, "_typehint", None) or action.type)
        return {int: "N", float: "X", Path: "PATH"}.get(kind, _capitals(action))

    def _get_default_metavar_for_positional(self, action: Action) -> str:
        return _capitals(action)


def made_plain(parser: ArgumentParser, command: str) -> None:
    """Say a command's help without Python in it, and its usage on one line."""
    parser.formatter_class = PlainHelp
    options = {action.dest.rpartition(".")[2] for action in parser._actions if action.option_strings}
    for action in parser._actions:
        words = plain(action, options)
        facts = [fact for fact in (_allowed(action, words), _default(action, words)) if fact]
        action.help = f"{words} ({'; '.join(facts)})" if facts else words
    places = [action for action in parser._actions if not action.option_strings and not action.choices]
    around = {"?": "[{}]", "*": "[{} ...]"}
    words = " ".join(around.get(str(action.nargs), "{}").format(_capitals(action)) for action in places)
    parser.usage = " ".join(f"adaptvit {command} {words} [options]".split())


def written_out(words: Sequence[str], parser: ArgumentParser) -> list[str]:
    """Words in which flags have their values, and options the parser's own names."""
    options: Mapping[str, Action] = parser._option_string_actions
    written = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        path, dot, last = name.rpartition(".") if "." in name else ("--", "", name[2:])
        other = f"{path}{dot}{SAME.get(last, last)}"
        name = other if name.startswith("--") and name not in options and other in options else name
        if name in options and not equals:
            bare = following == "" or following.startswith("--")
            if is_flag(options[name]) and following not in ("true", "false", "null"):
                name += "=true"
            elif name == "--json" and bare:
                name += "=-"
        written.append(name + equals + value)
    return written


def add_told_model(parser: ArgumentParser) -> None:
    """The option that says which model a file is of, where a command takes files of models and has no such option."""
    places = {action.dest for action in parser._actions if not action.option_strings}
    if places & {"model", "models"} and "--model" not in parser._option_string_actions:
        sentence = (
            "timm's name of the model, where MODEL is a file with weights alone: its classes and size are found there."
        )
        parser.add_argument("--model", metavar="NAME", dest="told_model", type=str, default=None, help=sentence)


def tell_model(arguments: Namespace) -> None:
    """Put what `--model` says into the names of the command's models."""
    told = arguments.pop("told_model", None)
    if told is None:
        return
    if "models" in arguments:
        arguments["models"] = [of_model(stored, told) for stored in arguments["models"]]
    else:
        arguments["model"] = of_model(arguments["model"], told)


def in_other_words(error: ArgumentError, parser: ArgumentParser) -> ArgumentError:
    """The same error; of an option that there is not, with the one that may have been meant."""
    found = re.search(r"unrecognized arguments: (?:.* )?(--[^\s=]+)|Option '([^']+)' is not accepted", str(error))
    if found is None:
        return error
    name = dashed(found[1] or f"--{found[2]}")
    options = [dashed(option) for option in parser._option_string_actions if option.startswith("--")]
    return ArgumentError(None, f"no option {name}{meant(name, options) or '; --help lists them'}")


def is_flag(action: Action) -> bool:
    """Whether an option says yes by being there."""
    kind = getattr(action, "_typehint", None)
    return kind is bool and not action.default


def dashed(option: str) -> str:
    """An option with dashes, as the command line has it everywhere; the file of class names has one name."""
    return re.sub(r"\bclass_map$", "class_names", option).replace("_", "-")


def plain(action: Action, options: Collection[str]) -> str:
    """What a docstring says of an argument, as a sentence of the command line.

    Args:
        options: names of the command's, which are spelled as such.
    """
    words = re.sub(r"\bNone\b", "null", " ".join((action.help or "").split()))
    words = re.sub(r"`(\w+)`", lambda found: f"`{dashed(f'--{found[1]}')}`" if found[1] in options else found[0], words)
    kind, beside = _parts(getattr(action, "_typehint", None))
    values = [*get_args(kind), *(name for one in beside if isinstance(one, OneOf) for name in one.words.split(", "))]
    if re.split(r"[ ,;:]", words)[0] not in (*values, "null"):
        words = words[:1].upper() + words[1:]
    return words if words.endswith((".", "?")) or not words else f"{words}."


def _capitals(action: Action) -> str:
    return action.dest.rpartition(".")[2].upper().replace("_", "-")


def _parts(kind: Any) -> tuple[Any, list[Any]]:
    """A type without what may stand beside it, null aside, and what stood there."""
    beside: list[Any] = []
    while True:
        if get_origin(kind) is Annotated:
            kind, *more = get_args(kind)
            beside += more
            continue
        left = [one for one in get_args(kind) if one is not type(None)]
        if get_origin(kind) not in (Union, UnionType) or len(left) != 1:
            return kind, beside
        kind = left[0]


def _allowed(action: Action, words: str) -> str:
    """The values that an option takes, where its sentence does not say so."""
    kind, beside = _parts(getattr(action, "_typehint", None))
    for one in beside:
        if isinstance(one, In) and one.interval not in words:
            return "" if one.interval == "(-inf, inf)" else one.words(kind is int)
        if isinstance(one, OneOf) and one.words not in words:
            return f"one of {one.words}"
    return ""


def _default(action: Action, words: str) -> str:
    """What is taken unless told; nothing where that is nothing."""
    value = action.default
    nothing = value is None or value is False or value == SUPPRESS or (isinstance(value, Sized) and not value)
    if nothing or "default" in words or not action.option_strings:
        return ""
    return f"default: {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
