"""Options as people read and write them: help in plain words, dashes, flags without a value, names that are meant."""

import re
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from adaptvit.checks import In, OneOf
from adaptvit.terminal import meant

SAME = {"class_map": "class_names", "class_names": "class_map"}
"""Names of the file of class names: each is taken where a command has the other."""


class PlainHelp(DefaultHelpFormatter):
    """Help without Python in it."""

    def _expand_help(self, action: Action) -> str:
        words = plain(action.help or "")
        facts = [fact for fact in (_allowed(action, words), _default(action, words)) if fact]
        return f"{words} ({'; '.join(facts)})" if facts else words

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings or isinstance(action.nargs, int):  # as --help and --quiet
            return super()._format_action_invocation(action)
        values = "" if is_flag(action) else f" {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        return dashed(action.option_strings[-1]) + values

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        return _kind(action)

    def _get_default_metavar_for_positional(self, action: Action) -> str:
        return action.dest.upper()


def made_plain(parser: ArgumentParser, command: str) -> None:
    """Give a command's parser plain help, and a usage of one line."""
    parser.formatter_class = PlainHelp
    places = [action for action in parser._actions if not action.option_strings and action.dest != SUPPRESS]
    words = [{"?": f"[{one.dest.upper()}]", "*": f"[{one.dest.upper()} ...]"}.get(str(one.nargs), "") for one in places]
    named = [word or one.dest.upper() for word, one in zip(words, places, strict=True)]
    parser.usage = " ".join(["adaptvit", command, *named, "[options]"])


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
    """An option with dashes, as the command line has it everywhere."""
    return option.replace("_", "-")


def plain(words: str) -> str:
    """A docstring's words of an argument as a sentence of the command line."""
    words = " ".join(words.split())
    words = re.sub(r"\bNone\b", "null", words)
    words = re.sub(r"`(\w+)`", lambda found: f"`{found[1]}`".replace("_", "-"), words)
    words = words[:1].upper() + words[1:]
    return words if words.endswith((".", "?")) or not words else f"{words}."


def _parts(kind: Any) -> tuple[Any, list[Any]]:
    """A type without what may stand beside it, null aside, and what stood there."""
    beside: list[Any] = []
    while True:
        if get_origin(kind) is Annotated:
            kind, *more = get_args(kind)
            beside += more
        elif get_origin(kind) in (Union, UnionType) and len(left := [k for k in get_args(kind) if k is not type(None)]) == 1:
            kind = left[0]
        else:
            return kind, beside


def _kind(action: Action) -> str:
    """What an option takes, in capitals."""
    kind, _ = _parts(getattr(action, "_typehint", None) or action.type)
    if kind is Path:
        return "PATH"
    return {int: "N", float: "X"}.get(kind, action.dest.rsplit(".")[-1].upper())


def _allowed(action: Action, words: str) -> str:
    """The values that an option takes, where its sentence does not say so."""
    kind, beside = _parts(getattr(action, "_typehint", None))
    for one in beside:
        if isinstance(one, In) and one.interval not in words:
            return one.words(kind is int).replace("whole", "").replace("finite", "")
        if isinstance(one, OneOf) and one.words not in words:
            return f"one of {one.words}"
    return ""


def _default(action: Action, words: str) -> str:
    """What is taken unless told; nothing where that is nothing."""
    value = action.default
    if value in (None, SUPPRESS, "", False) or value in ((), [], {}) or "default" in words or not action.option_strings:
        return ""
    return f"default: {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
