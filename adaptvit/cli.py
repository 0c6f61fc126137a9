"""Vision transformers that spend compute where an image needs it."""

import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from adaptvit import demo
from adaptvit.bench import BenchConfig, bench
from adaptvit.checkpoints import convert
from adaptvit.files import replacing

Config = TypeVar("Config")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake ends in one sentence and exit code 2."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="adaptvit", description=__doc__, exit_on_error=False)
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("demo", demo_parser(), help="train, adapt, measure and draw, on data that is already here")
    commands.add_subcommand("bench", bench_parser(), help="time dense, masked and packed execution beside their MACs")
    commands.add_subcommand("convert", convert_parser(), help="turn published weights into an adaptvit file")
    try:
        arguments = parser.parse_args([_underscored(word) for word in (sys.argv[1:] if argv is None else argv)])
        with warnings.catch_warnings():
            warnings.showwarning = _say  # type: ignore[assignment]
            COMMANDS[arguments.command](arguments[arguments.command])
    except (ArgumentError, FloatingPointError, OSError, TypeError, ValueError) as error:
        print(f"adaptvit: {str(error).strip().splitlines()[-1].strip()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"adaptvit: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def demo_parser() -> ArgumentParser:
    """`adaptvit demo`."""
    parser = ArgumentParser(
        description="Train a small ViT on scikit-learn's digits, make it adaptive, measure both and write a report."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="Folder of the report and the weights.")
    return parser


def run_demo(arguments: Namespace) -> None:
    """Run the demo at its default sizes; an interrupted one goes on where it stopped."""
    demo.run(arguments.output)


def bench_parser() -> ArgumentParser:
    """`adaptvit bench MODEL`."""
    parser = ArgumentParser(
        description="Move a method's knob to a MACs target, then time dense, masked and packed runs."
    )
    parser.add_class_arguments(BenchConfig, as_positional=True)
    parser.add_argument("--json", type=Path, default=None, help="Also write the figures to this file.")
    return parser


def run_bench(arguments: Namespace) -> None:
    """Print the figures as a table and write them where asked."""
    config = _config(BenchConfig, arguments)
    with replacing(arguments.json) if arguments.json else nullcontext() as partial:
        figures = bench(config)
        if partial is not None:
            partial.write_text(json.dumps(figures, indent=2) + "\n")
    for name in ("dense_images_per_s", "masked_images_per_s", "packed_images_per_s"):
        print(f"{name:>22} {figures[name]:10.2f}")
    for name in ("ideal_speedup", "realised_speedup", "ratio"):
        print(f"{name:>22} {figures[name]:10.3f}")
    for name in ("macs_dense", "macs_executed"):
        print(f"{name:>22} {figures[name] / 1e9:10.3f} G")
    tokens = figures["tokens_per_block"]
    for name in ("mean", "min", "max"):
        print(f"{'tokens ' + name:>22} {' '.join(f'{count:6.1f}' for count in tokens[name])}")
    loads = " to ".join(f"{load:.1f}" for load in figures["load_average"])
    print(f"{figures['rounds']} rounds, {figures['threads']} threads, {figures['dtype']}, load average {loads}")


def convert_parser() -> ArgumentParser:
    """`adaptvit convert SOURCE TARGET MODEL_NAME`."""
    parser = ArgumentParser(description="Turn published A-ViT, DeiT or timm weights into one safetensors file.")
    parser.add_function_arguments(convert, as_positional=True)
    return parser


def run_convert(arguments: Namespace) -> None:
    """Write the file and say which gate it has."""
    config = convert(**arguments.as_dict()).config
    print(f"{arguments.target}: {arguments.model_name}, gate {config.gate_scale:g} / {config.gate_center:g}")


COMMANDS = {"demo": run_demo, "bench": run_bench, "convert": run_convert}


def _config(kind: type[Config], arguments: Namespace) -> Config:
    return kind(**{field.name: arguments[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def _say(message: Warning | str, *_: object) -> None:
    print(f"adaptvit: warning: {message}", file=sys.stderr)


def _underscored(word: str) -> str:
    """An option spelled with dashes, as everywhere on the command line, in the parser's own spelling."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
