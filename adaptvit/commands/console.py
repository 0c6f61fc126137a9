"""Between a command and who called it: options become a config, figures and tables become lines."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser, Namespace

from adaptvit.data import LeftOut, Unreadable
from adaptvit.files import as_json, check_output, write_atomically
from adaptvit.show.report import Table
from adaptvit.terminal import say

Config = TypeVar("Config")


def config_of(kind: type[Config], arguments: Namespace | dict[str, Any]) -> Config:
    """What a command was told, as a config."""
    return kind(**{field.name: arguments[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def say_listed(figures: dict[str, Any]) -> None:
    """A figure a line, names aligned."""
    width = max(map(len, figures))
    shown = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in figures.items()}
    for name, value in shown.items():
        say(f"{name:>{width}}  {'-' if value is None else value}")


def add_json(parser: ArgumentParser) -> None:
    """The option that `tell_json` takes."""
    sentence = (
        "Write the figures as JSON to this file; with `-`, or no file, to the standard output, and nothing else there."
    )
    parser.add_argument("--json", metavar="[FILE]", type=str, default=None, help=sentence)


def check_json(where: str | None) -> None:
    """Refuse a file that cannot be written, before there are figures."""
    if where not in (None, "-"):
        check_output(Path(where))


def tell_json(where: str | None, figures: Any) -> None:
    """Write figures where the option says, if it does."""
    if where == "-":
        for line in as_json(figures, indent=2).split("\n"):
            say(line, sys.stdout)
    elif where is not None:
        write_atomically(Path(where), as_json(figures, indent=2) + "\n")


def unused(unreadable: Sequence[Unreadable], left_out: Sequence[LeftOut]) -> dict[str, Any]:
    """The same as `say_unused` says, as figures."""
    return {
        "unreadable": [{"name": one.name, "reason": one.reason} for one in unreadable],
        "left_out": [asdict(one) for one in left_out],
    }


def say_table(cells: Table) -> None:
    """The table, and an empty line."""
    for line in [*cells.text().split("\n"), ""]:
        say(line)


def say_unused(unreadable: Sequence[Unreadable], left_out: Sequence[LeftOut]) -> int:
    """Name what could not be read, and the first few of what was left out; the exit code."""
    for other in left_out:
        say(f"adaptvit: left out: {other}", sys.stderr)
    for one in unreadable:
        say(f"adaptvit: {one}", sys.stderr)
    spoilt = sum(one.decoded for one in unreadable)
    for count, what in ((len(unreadable) - spoilt, "could not be read"), (spoilt, "have logits that are not finite")):
        if count:
            say(f"adaptvit: {count} {unreadable[0].kind} {what} and are left out", sys.stderr)
    return 1 if unreadable else 0
