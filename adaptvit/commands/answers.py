"""What the command line says of itself, written down so that to tell it needs neither torch nor the commands' modules.

python -m adaptvit.commands.answers    # writes both files, where an option, a method, a recipe or timm has changed
"""

import json
import os
from typing import Any

import timm

from adaptvit.commands.list import WHAT, lines, listed
from adaptvit.commands.parsing import made_plain, parser_of
from adaptvit_cli import ANSWERS, COMMANDS, MODELS

COLUMNS = 80
"""Width of the help, for no terminal is asked."""


def asked() -> list[str]:
    """The words of what is written down: help of each command, and the lists."""
    return [f"{command} --help" for command in (*COMMANDS, "compare methods")] + [f"list {what}" for what in WHAT]


def answer(words: str) -> list[str]:
    """What the command line says to them, in lines."""
    *command, last = words.split()
    if last != "--help":
        return lines(last)
    parser = parser_of(command)
    made_plain(parser, command)
    return parser.format_help().splitlines()


def models() -> dict[str, Any]:
    """Every model that timm knows, the methods' among them, with its sentence."""
    return {"timm": timm.__version__, "models": listed("models", "*")}


if __name__ == "__main__":
    os.environ["COLUMNS"] = str(COLUMNS)
    for path, found in ((ANSWERS, {words: answer(words) for words in asked()}), (MODELS, models())):
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
