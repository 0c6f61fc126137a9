"""A terminal: lines for it, in which what a name holds is shown, never obeyed, and the words that come from it."""

import os
import sys
import warnings
from collections.abc import Sequence
from itertools import zip_longest
from typing import TextIO


def shown(text: object) -> str:
    """Text on one line, each character that a terminal would obey or not show as Python writes it: \\x1b, \\u202e."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(text)
    )


def say(line: object, file: TextIO | None = None) -> None:
    """Print one line, at once, to the standard output unless told; what the encoding lacks is shown as `shown` does.

    Where nobody reads any more, as after `| head`, this and what follows goes nowhere, and the work goes on.
    """
    file = sys.stdout if file is None else file
    encoding = getattr(file, "encoding", None) or "utf-8"
    try:
        print(shown(line).encode(encoding, "backslashreplace").decode(encoding), file=file, flush=True)
    except BrokenPipeError:
        leave(file)


def warn(words: str, stacklevel: int = 1, everywhere: bool = False) -> None:
    """Warn on one line, as `shown` has it; of the processes of torchrun the first alone does, unless `everywhere`.

    Args:
        stacklevel: as of `warnings.warn`: 1 is the line that calls this.
    """
    if everywhere or os.environ.get("RANK", "0") == "0":
        warnings.warn(shown(words), stacklevel=stacklevel + 1)


def leave(file: TextIO) -> None:
    """What is written to a file from now on goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, file.fileno())
    os.close(nowhere)


def word_after(words: Sequence[str], option: str) -> str | None:
    """The value of an option among words that are not parsed yet, the last one where there are several."""
    found = None
    for word, following in zip_longest(words, words[1:]):
        name, equals, value = word.partition("=")
        if name == option:
            found = value if equals else following
    return found
