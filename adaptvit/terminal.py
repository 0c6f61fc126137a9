"""A terminal: lines for it, in which what a name holds is shown, never obeyed, and the words that come from it."""

import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from itertools import zip_longest
from typing import Any, TextIO

from tqdm import tqdm

QUIET = ContextVar("quiet", default=False)
"""Whether only warnings and errors are told."""
EVERY = 30
"""Seconds at least between two lines of progress, where nobody watches a terminal."""


def shown(text: object) -> str:
    """Text on one line, each character that a terminal would obey or not show as Python writes it: \\x1b, \\u202e."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in str(text)
    )


def say(line: object, file: TextIO | None = None) -> None:
    """Print one line, at once, to the standard output unless told; what the encoding lacks is shown as `shown` does.

    Where nobody reads any more, as after `| head`, this and what follows goes nowhere, and the work goes on.
    """
    if file is None and QUIET.get():
        return
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


@contextmanager
def quiet() -> Iterator[None]:
    """In the block `say` prints only where it is told a file, and no progress is shown."""
    before = QUIET.set(True)
    try:
        yield
    finally:
        QUIET.reset(before)


class Lines:
    """What a bar writes, as lines in a file or pipe: one every 30 s at most, whichever bar it is of."""

    def __init__(self) -> None:
        """Begin to wait for the first."""
        self.last = time.monotonic()

    def write(self, text: str) -> None:
        line = text.strip()
        if line and time.monotonic() - self.last >= EVERY:
            self.last = time.monotonic()
            say(line, sys.stderr)

    def flush(self) -> None:
        """Nothing is held back."""


LINES = Lines()


def progress_bar(
    things: Iterable[Any] | None = None,
    words: str | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    outer: bool = False,
    stays: bool = False,
    delay: float = 0,
    shown: bool = True,
) -> tqdm:
    """A progress bar on a terminal; in a file or a pipe a line every 30 s at most.

    Args:
        things: what is gone through; None counts by `update`.
        words: what is done.
        outer: whether other bars move within this one.
        stays: whether the bar is left on the terminal at its end.
        delay: seconds after which there is a bar; what is over by then had none.
    """
    watched = sys.stderr.isatty()
    return tqdm(
        things,
        words,
        total,
        leave=stays and watched,
        file=None if watched else LINES,
        ncols=None if watched else 100,
        disable=not shown or QUIET.get(),
        unit=unit,
        initial=initial,
        delay=delay,
        position=int(outer) if watched else 0,
    )


def meant(word: str, names: Iterable[str]) -> str:
    """The end of a sentence about a wrong name, with the one most like it; nothing where none is."""
    names = [*names]
    begun = [name for name in names if word and name.startswith(word)]
    close = [min(begun, key=len)] if begun else get_close_matches(word, names, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


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
