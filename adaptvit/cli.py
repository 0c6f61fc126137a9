"""Vision transformers that spend compute where an image needs it."""

import os
import re
import signal
import sys
import threading
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dis import opmap
from importlib import import_module
from pathlib import Path
from typing import Any

import torch.distributed
import yaml

from adaptvit.extras import MissingLibrary, needed
from adaptvit.files import check_is_file
from adaptvit.process import as_found
from adaptvit.terminal import leave, quiet, say, word_after
from adaptvit_cli import ALIASES, answer

TRACEBACK = "ADAPTVIT_TRACEBACK"
"""Variable of the environment that shows where an error came from, before the sentence that says it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what cannot be done ends in one sentence and exit code 2, a fault of ours in a traceback.

    Ctrl+C ends it with exit code 130, and SIGTERM in the same way with 143.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with _stoppable() as came, as_found():
        warnings.showwarning = _say  # type: ignore[assignment]
        try:
            return _command(words)
        except BrokenPipeError:
            leave(sys.stdout)
            return 128 + signal.SIGPIPE
        except (ArgumentError, FloatingPointError, MissingLibrary, OSError, TypeError, ValueError) as error:
            if os.environ.get(TRACEBACK):
                for line in "".join(traceback.format_exception(error)).rstrip().split("\n"):
                    say(line, sys.stderr)
            say(f"adaptvit: {_sentence(error)}", sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            say(f"adaptvit: {str(stop) or 'interrupted'}", sys.stderr)
            return 128 + (came[-1] if came else signal.SIGINT)
        except Exception as error:
            error.add_note("This is a fault of adaptvit, not yours: please report it with the lines above.")
            raise
        finally:
            try:
                sys.stdout.flush()
            except BrokenPipeError:
                leave(sys.stdout)


def _command(words: list[str]) -> int:
    told = answer(words)
    if told is not None:
        for line in told.split("\n"):
            say(line)
        return 0
    with needed("the command line"):
        from jsonargparse import ArgumentParser
    from adaptvit.commands.parsing import in_other_words, made_plain, parser_of, tell_model, written_out

    if words[0] in ALIASES:
        name, words = words[0], [ALIASES[words[0]], *words[1:]]
        say(f"adaptvit: {name} is called {words[0]} now, and by its old name until the next version", sys.stderr)
    _check_files(words)
    parser = ArgumentParser(prog="adaptvit", description=__doc__, exit_on_error=False, allow_abbrev=False)
    words = [_underscored(word) for word in words]
    module: Any = import_module(f"adaptvit.commands.{words[0]}")
    own = parser_of(words)
    parser.add_subcommands(dest="command").add_subcommand(words[0], own)
    made_plain(own, words)
    try:
        arguments = parser.parse_args(written_out(words, own))[words[0]]
    except ArgumentError as error:
        raise in_other_words(error, own) from error
    tell_model(arguments)
    of_the_caller = torch.distributed.is_initialized()
    silent = arguments.pop("quiet") or arguments.get("json") == "-"
    with quiet() if silent else nullcontext():
        code: int = module.execute(arguments) or 0
    if torch.distributed.is_initialized() and not of_the_caller:
        torch.distributed.destroy_process_group()  # of torchrun, which has served
    return code


def _check_files(words: Sequence[str]) -> None:
    """Refuse a pipe, a socket or a device, which may never end, before the parser reads it for a file of options."""
    for word in words:
        option, equals, value = word.partition("=")
        for name in (word, value):
            try:
                _check_is_file(name)
            except OSError as error:
                raise OSError(f"{option}: {error}" if equals else str(error)) from None
    if (config := word_after([_underscored(word) for word in words], "--config")) is not None:
        _check_groups(Path(config))


def _check_groups(config: Path) -> None:
    """Refuse such files where a YAML file names one for a whole group of options."""
    try:
        groups = yaml.safe_load(config.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):  # of which the parser says more
        return
    for group, name in groups.items() if isinstance(groups, dict) else ():
        if isinstance(name, str):
            try:
                _check_is_file(config.parent / name)
            except OSError as error:
                raise OSError(f"{group}: {error}") from None


def _check_is_file(name: Path | str) -> None:
    """Refuse what is there and neither a file nor a folder."""
    path = os.path.expanduser(name)
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        check_is_file(path)


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """SIGTERM ends the block as Ctrl+C does; the signals that came."""
    came: list[int] = []
    process = os.getpid()

    def stop(number: int, _: object) -> None:
        if os.getpid() == process:  # and not one that it has just forked
            came.append(number)
            raise KeyboardInterrupt

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, stop)
    try:
        yield came
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _sentence(error: Exception) -> str:
    """What an error says, on one line."""
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f": {os.fsdecode(error.filename)!r}"
        return f"{error.strerror}{where}"
    lines = [line.strip() for line in str(error).split("\n") if line.strip()] or [type(error).__name__]
    if isinstance(error, ArgumentError):
        key = re.search(r'Parser key "([^"]+)"', str(error))
        expected, given = _expected(str(error)), re.search(r"(?:Given|Got) value: (.*)$", lines[-1])
        if key and expected and given:
            return f"{key[1]} must be {expected}, got {given[1]}"
        name = f"{key[1]}: " if key and key[1] not in lines[-1] else ""
        return name + lines[-1]  # which follows the whole of the parser's thoughts
    if _own_fault(error):
        fault = f"{type(error).__name__}, which looks like a fault of adaptvit itself; {TRACEBACK}=1 shows where"
        return f"{fault}: {lines[-1]}"
    return " ".join(lines)


EXPECTED = {
    "float": "a number",
    "int": "a whole number",
    "str": "a string",
    "bool": "true or false",
    "collections.abc.Sequence[int]": "several as [1, 2]",
    "collections.abc.Sequence[float]": "several as [1, 2]",
    "NoneType": "null",
}
"""What the parser asks for, by the names of its types."""


def _expected(thoughts: str) -> str:
    """The types that the parser tried in vain, in words; nothing where one of them has none."""
    several = re.findall(r"Subtypes: \[(.+)\]", thoughts)
    one = re.findall(r"Expected an? (<class '\w+'>)", thoughts)
    kinds = [kind.removeprefix("<class '").removesuffix("'>") for kind in (several or one or [""])[-1].split(", ")]
    return " or ".join(EXPECTED[kind] for kind in kinds) if EXPECTED.keys() >= {*kinds} else ""


def _own_fault(error: Exception) -> bool:
    """Whether Python itself found an error in a line of ours, rather than a line of ours a mistake of the user's."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or isinstance(error, OSError | UnicodeError):
        return False
    code = place.tb_frame.f_code
    ours = Path(code.co_filename).is_relative_to(Path(__file__).parent)
    return ours and code.co_code[place.tb_lasti] not in (opmap["RAISE_VARARGS"], opmap["RERAISE"])


def _say(message: Warning | str, *_: object) -> None:
    say(f"adaptvit: warning: {message}", sys.stderr)


def _underscored(word: str) -> str:
    """An option spelled with dashes, as everywhere on the command line, in the parser's own spelling."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
