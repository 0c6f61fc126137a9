"""The command `adaptvit`: what needs no model, as help, lists and the version, is answered before torch is imported."""

import json
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import filter as matching
from importlib.metadata import entry_points, version
from pathlib import Path

GROUPS = {
    "Use": {
        "adapt": "make a model meet a MACs or speed budget, untrained",
        "predict": "classes, GMACs and tokens left, image by image",
        "serve": "images in, classes out over HTTP; steered by load",
        "export": "a model as ONNX or torch.export, run and compared",
    },
    "Measure": {
        "evaluate": "accuracy, GMACs, depth and speed on a data set",
        "bench": "time dense, masked and packed runs beside their MACs",
        "compare": "train variants, or methods on one model: one report",
    },
    "Make": {
        "train": "train a recipe, on your own images or the digits",
        "convert": "turn published weights into an adaptvit file",
    },
    "Look": {
        "draw": "images beside the depth of their tokens, as PNG files",
        "playground": "a local page: your pictures, dense and adaptive",
        "demo": "train, adapt, measure and draw, on data already here",
        "list": "the methods, models and recipes that there are",
        "info": "versions, devices, and what is installed of the extras",
    },
}
"""What each command does. Of each, `adaptvit.commands` has a module with its `options` and its `execute`."""
COMMANDS = {name: sentence for group in GROUPS.values() for name, sentence in group.items()}
ALIASES = {"budget": "adapt"}
"""Earlier names of commands, taken until the next version."""
ANSWERS = Path(__file__).parent / "adaptvit" / "commands" / "answers.json"
"""Lines by the words that ask for them, as `python -m adaptvit.commands.answers` wrote them."""
MODELS = ANSWERS.with_name("models.json")
"""Names of models with a sentence each, written likewise, and the version of timm that they are of."""


def answer(words: Sequence[str]) -> str | None:
    """What the command line is told before any command is imported; None where a command is to be run.

    Raises:
        ValueError: the first word is none of its commands.
    """
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        return overview()
    if first == "--version":
        return f"adaptvit {version('adaptvit')}"
    if first in COMMANDS or first in ALIASES:
        return None
    if first.startswith("-"):
        raise ValueError(f"{first!r} before a command; the command comes first: adaptvit COMMAND {ascii(first)[1:-1]}")
    close = get_close_matches(first, [*COMMANDS, *ALIASES], 1)
    raise ValueError(
        f"no command {first!r}; {f'did you mean {close[0]!r}?' if close else 'adaptvit --help lists them'}"
    )


def written(words: Sequence[str]) -> str | None:
    """Help of one command, or a list, as it was written down; None where the command itself is to say."""
    asked = " ".join("--help" if word == "-h" else word for word in words)
    lines = json.loads(ANSWERS.read_text(encoding="utf-8")).get(asked) or models_like(words)
    if not lines or entry_points(group="adaptvit.methods"):  # methods of other packages are in no such file
        return None
    return "\n".join(lines)


def models_like(words: Sequence[str]) -> list[str]:
    """Models of the names that `list models PATTERN` asks for; none where the command itself is to say."""
    if len(words) != 3 or [*words[:2]] != ["list", "models"] or words[2].startswith("-"):
        return []
    known = json.loads(MODELS.read_text(encoding="utf-8"))
    if known["timm"] != version("timm"):
        return []
    return aligned({name: known["models"][name] for name in matching(known["models"], words[2])})


def aligned(sentences: dict[str, str]) -> list[str]:
    """A line each, names in a column."""
    width = max(map(len, sentences), default=0)
    return [f"{name:{width}}  {sentence}" for name, sentence in sentences.items()]


def overview() -> str:
    """The commands, in groups, a line each."""
    width = max(map(len, COMMANDS))
    lines = ["usage: adaptvit COMMAND ...", "", "Vision transformers that spend compute where an image needs it."]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:{width}}  {sentence}" for name, sentence in commands.items())]
    return "\n".join([*lines, "", "adaptvit COMMAND --help tells of one; adaptvit --version the version."])


def main(argv: Sequence[str] | None = None) -> int:
    """Answer, or run a command; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    code, file = 0, sys.stdout
    try:
        text = answer(words) or written(words)
    except ValueError as error:
        code, file, text = 2, sys.stderr, f"adaptvit: {error}"
    if text is None:
        from adaptvit.cli import main as run

        return run(words)
    try:
        print(text.encode("ascii", "backslashreplace").decode(), file=file, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # or Python would say so at its end
    return code
