"""Options as people read and write them: help in plain words, dashes, flags without a value, names that are meant."""

import re
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Mapping, Sequence, Sized
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

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


def parser_of(words: Sequence[str]) -> ArgumentParser:
    """The parser of the command that words of the command line begin with, its help in Python's words still."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser: ArgumentParser = import_module(f"adaptvit.commands.{words[0]}").options(words)
    parser.add_argument("--quiet", action="store_true", help="Tell warnings and errors alone: no figures, no progress.")
    add_told_model(parser)
    return parser


def made_plain(parser: ArgumentParser, words: Sequence[str]) -> None:
    """Say the help of the words' command without Python in it, and its usage on one line."""
    command = " ".join(words[:2]) if words[:2] == ["compare", "methods"] else words[0]
    parser.formatter_class = PlainHelp
    names = {action.dest.rpartition(".")[2]: action for action in parser._actions if not action.choices}
    spelled = {
        name: dashed(f"--{name}") if action.option_strings else _capitals(action) for name, action in names.items()
    }
    for action in parser._actions:
        sentence = plain(action, spelled)
        facts = [fact for fact in (_allowed(action, sentence), _default(action, sentence)) if fact]
        action.help = f"{sentence} ({'; '.join(facts)})" if facts else sentence
    places = [action for action in parser._actions if not action.option_strings and not action.choices]
    around = {"?": "[{}]", "*": "[{} ...]"}
    taken = " ".join(around.get(str(action.nargs), "{}").format(_capitals(action)) for action in places)
    parser.usage = " ".join(f"adaptvit {command} {taken} [options]".split())


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
    """The same error; of an option that there is not, with the one that may have been meant; of places left empty."""
    if empty := re.search(r"the following arguments are required: (.*)", str(error)):
        places = [name.rpartition(".")[2].upper().replace("_", "-") for name in empty[1].split(", ")]
        return ArgumentError(None, f"no {' and no '.join(places)}; --help tells what is taken")
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


def plain(action: Action, spelled: Mapping[str, str]) -> str:
    """What a docstring says of an argument, as a sentence of the command line.

    Args:
        spelled: how the command line has them, by the names of the command's options and places.
    """
    words = re.sub(r"\bNone\b", "null", " ".join((action.help or "").split()))
    words = re.sub(r"`(\w+)`", lambda found: f"`{spelled.get(found[1], found[1])}`", words)
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
    if nothing or "default" in words or "unless told" in words or not action.option_strings:
        return ""
    return f"default: {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
