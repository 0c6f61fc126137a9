"""Vision transformers that spend compute where an image needs it."""

import os
import re
import signal
import sys
import threading
import traceback
import warnings
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from dis import opmap
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed
import yaml
from accelerate import PartialState  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from adaptvit.budget import Trial
from adaptvit.commands import demo
from adaptvit.commands.bench import BenchConfig, bench
from adaptvit.commands.compare import Row, compare, table
from adaptvit.commands.compare_methods import MethodsConfig, compare_methods
from adaptvit.commands.compare_methods import table as compared_table
from adaptvit.commands.comparisons import COMPARISONS
from adaptvit.commands.draw import DrawConfig, draw
from adaptvit.commands.playground import PlaygroundConfig
from adaptvit.commands.predict import PredictConfig, predict
from adaptvit.data import LeftOut, Unreadable
from adaptvit.files import append_csv, as_json, check_is_file, check_output, read_csv, write_atomically
from adaptvit.measure.evaluate import EvaluateConfig, evaluate_model
from adaptvit.methods import METHODS
from adaptvit.process import as_found
from adaptvit.show.report import Table
from adaptvit.terminal import leave, say
from adaptvit.training.recipes import RECIPES
from adaptvit.training.run import Run, run, set_budget
from adaptvit.weights.checkpoints import convert

Config = TypeVar("Config")


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
        except (ArgumentError, FloatingPointError, OSError, TypeError, ValueError) as error:
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
    _check_files(words)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="adaptvit", description=__doc__, exit_on_error=False, allow_abbrev=False)
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("train", train_parser(words), help="train a recipe, on your own images or the digits")
    commands.add_subcommand(
        "compare", compare_parser(words), help="train variants, or methods on one model: one report"
    )
    commands.add_subcommand("evaluate", evaluate_parser(), help="accuracy, GMACs, depth and speed on a data set")
    commands.add_subcommand("predict", predict_parser(), help="classes, GMACs and tokens left, image by image")
    commands.add_subcommand("draw", draw_parser(), help="images beside the depth of their tokens, as PNG files")
    commands.add_subcommand("budget", budget_parser(), help="make a model meet a MACs or speed budget, untrained")
    commands.add_subcommand("demo", demo_parser(), help="train, adapt, measure and draw, on data already here")
    commands.add_subcommand("playground", playground_parser(), help="a local page: your pictures, dense and adaptive")
    commands.add_subcommand("bench", bench_parser(), help="time dense, masked and packed runs beside their MACs")
    commands.add_subcommand("convert", convert_parser(), help="turn published weights into an adaptvit file")
    arguments = parser.parse_args([_underscored(word) for word in words])
    of_the_caller = torch.distributed.is_initialized()
    code = COMMANDS[arguments.command](arguments[arguments.command]) or 0
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
    if (config := _word_after(words, "--config")) is not None:
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


def train_parser(words: Sequence[str]) -> ArgumentParser:
    """`adaptvit train RECIPE`, its defaults those of the recipe that the command line's words name."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description=f"Train a recipe, one of {', '.join(RECIPES)}; everything in it can be changed here or by YAML.",
    )
    named = words[1] if len(words) > 1 and words[0] == "train" and not words[1].startswith("-") else "digits"
    if named not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {named!r}")
    recipe = _recipe(named, _word_after(words, "--method_name"))

    def same(name: str) -> str:
        if name != named:
            raise ArgumentTypeError(f"the recipe comes before all options: adaptvit train {name} ...")
        return name

    parser.add_argument("recipe_name", nargs="?", type=same, default=named, help="Name of the recipe.")
    parser.add_argument("--config", action="config", help="YAML file with what differs from the recipe.")
    parser.add_argument(
        "--method_name",
        type=str,
        default=recipe.method.method,
        help="Another method than the recipe's, at its defaults; `--method.FIELD` changes those.",
    )
    parser.add_argument(
        "--resume", type=bool, nargs="?", const=True, default=False, help="Go on where the same run stopped."
    )
    parser.add_class_arguments(Run, skip={"method", "data", "recipe"})
    for group in ("method", "data", "recipe"):
        parser.add_class_arguments(type(getattr(recipe, group)), group)
    values = {name: value for name, value in vars(recipe).items() if name not in ("method", "data", "recipe")}
    for group in ("method", "data", "recipe"):
        values |= {f"{group}.{name}": value for name, value in vars(getattr(recipe, group)).items()}
    parser.set_defaults(values)
    return parser


def _recipe(name: str, method: str | None) -> Run:
    """A recipe, with another method where one is named.

    Raises:
        ValueError: there is no such method.
    """
    recipe = RECIPES[name]()
    if method in (None, recipe.method.method):
        return recipe
    if method not in METHODS:
        raise ValueError(f"method_name must be one of {', '.join(METHODS)}, got {method!r}")
    return replace(recipe, method=METHODS[method]())


def _word_after(words: Sequence[str], option: str) -> str | None:
    """The value of an option among words that are not parsed yet."""
    found = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        name, equals, value = _underscored(word).partition("=")
        if name == option:
            found = value if equals else following
    return found


def run_train(arguments: Namespace) -> None:
    """Train, and print what came of it."""
    recipe = _recipe(arguments.recipe_name, arguments.method_name)
    parts: dict[str, Any] = {
        group: _config(type(getattr(recipe, group)), arguments.get(group, {})) for group in ("method", "data", "recipe")
    }
    rest = {field.name: arguments[field.name] for field in fields(Run) if field.name not in parts}
    try:
        outcome = run(Run(**rest, **parts), arguments.resume, tell=lambda result: _say_listed(result.figures))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; with --resume the same command goes on after the last epoch") from None
    if PartialState().is_main_process:
        _say_unused(outcome.result.unreadable, ())
        say(f"{outcome.file}: adaptvit evaluate, predict and draw take this file")


def compare_parser(words: Sequence[str]) -> ArgumentParser:
    """`adaptvit compare NAME`, or that of methods, where the command line's words say so."""
    if words[:2] == ["compare", "methods"]:
        return methods_parser()
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Train every variant of a comparison with every seed; table, csv, plots and a report with spreads. "
        "What is finished is never run again. `adaptvit compare methods --help`: methods side by side on one model.",
    )
    parser.add_argument("name", type=str, help=f"One of {', '.join(COMPARISONS)}, or methods.")
    parser.add_argument(
        "--root", type=Path, default=None, help="Folder of the images, where it is not the comparison's."
    )
    parser.add_argument("--epochs", type=int, default=None, help="Other than the comparison's.")
    parser.add_argument("--output", type=Path, default=None, help="Folder of the results; runs/NAME by default.")
    parser.add_function_arguments(compare, skip={"comparison", "output", "tell"})
    return parser


def methods_parser() -> ArgumentParser:
    """`adaptvit compare methods MODEL ROOT [FILES...]`."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Every method that needs no training, at several budgets, and models that were fine-tuned: "
        "accuracy against MACs and measured speed. What is finished is never run again.",
    )
    parser.add_argument("name", choices=["methods"], help="methods.")
    parser.add_class_arguments(MethodsConfig, as_positional=True, skip={"files"})
    parser.add_argument(
        "files", nargs="*", default=[], help="Fine-tuned models of the same classes, named as MODEL is."
    )
    return parser


def run_compare(arguments: Namespace) -> int:
    """Run what is not finished, and print the table; 1 where images could not be read."""
    try:
        return _compare_methods(arguments) if arguments.name == "methods" else _compare_variants(arguments)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on where it was") from None


def _compare_methods(arguments: Namespace) -> int:
    arguments.files = tuple(arguments.files)
    outcome = compare_methods(_config(MethodsConfig, arguments), lambda rows: _say_table(compared_table(rows)))
    say(f"{outcome.report}: the report")
    return _say_unused(outcome.unreadable, outcome.left_out)


def _compare_variants(arguments: Namespace) -> int:
    if arguments.name not in COMPARISONS:
        raise ValueError(f"comparison must be one of {', '.join(COMPARISONS)} or methods, got {arguments.name!r}")
    comparison = COMPARISONS[arguments.name]()
    variants = comparison.variants
    if arguments.root is not None:
        variants = {name: replace(run, data=replace(run.data, root=arguments.root)) for name, run in variants.items()}
    if arguments.epochs is not None:
        variants = {
            name: replace(run, recipe=replace(run.recipe, epochs=arguments.epochs)) for name, run in variants.items()
        }
    output = arguments.output or Path("runs") / arguments.name

    def tell(rows: list[Row]) -> None:
        say(comparison.question)
        say("")
        _say_table(table(rows))

    compare(replace(comparison, variants=variants), output, arguments.seeds, arguments.processes, tell)
    say(f"{output / 'report.html'}: the report")
    return 0


KNOWN_BY = ("model", "data", "images")
"""Columns of a CSV file that `evaluate` adds lines to."""


def evaluate_parser() -> ArgumentParser:
    """`adaptvit evaluate MODEL ROOT`."""
    parser = ArgumentParser(
        allow_abbrev=False, description="Accuracy, GMACs, depth of tokens and speed of a model on a data set."
    )
    parser.add_class_arguments(EvaluateConfig, as_positional=True)
    parser.add_argument("--json", type=Path, default=None, help="Also write the figures to this file.")
    parser.add_argument("--csv", type=Path, default=None, help="Also append them, a line a model, to this file.")
    return parser


def run_evaluate(arguments: Namespace) -> int:
    """Print the figures, write them where asked; 1 where images could not be read."""
    config = _config(EvaluateConfig, arguments)
    for path in (arguments.json, arguments.csv):
        if path:
            check_output(path)
    if arguments.csv:
        read_csv(arguments.csv, KNOWN_BY)
    result, figures = evaluate_model(config)
    _say_listed(figures)
    if arguments.json:
        write_atomically(arguments.json, as_json(figures, indent=2) + "\n")
    if arguments.csv:
        append_csv(arguments.csv, figures, KNOWN_BY)
    return _say_unused(result.unreadable, result.left_out)


def predict_parser() -> ArgumentParser:
    """`adaptvit predict MODEL FOLDER`."""
    parser = ArgumentParser(description="Classes, GMACs and tokens left per block of every image in a folder.")
    parser.add_class_arguments(PredictConfig, as_positional=True)
    return parser


def run_predict(arguments: Namespace) -> int:
    """Write the file; 1 where images could not be read. Under torchrun the main process speaks for all."""
    result = predict(_config(PredictConfig, arguments))
    if not PartialState().is_main_process:
        return 0
    earlier = f", {result.earlier} of them from an earlier run" if result.earlier else ""
    say(f"{result.output}: {result.images} images{earlier}")
    return _say_unused(result.unreadable, result.left_out)


def draw_parser() -> ArgumentParser:
    """`adaptvit draw MODEL FOLDER`."""
    parser = ArgumentParser(
        description="Draw images beside the depth of their tokens, or what many images use and cost."
    )
    parser.add_class_arguments(DrawConfig, as_positional=True)
    return parser


def run_draw(arguments: Namespace) -> int:
    """Say what was drawn; 1 where images could not be read."""
    config = _config(DrawConfig, arguments)
    drawing = draw(config)
    say(f"{len(drawing.files)} pictures in {config.output}, {drawing.files[0].name} the first to open")
    if drawing.beyond_limit:
        what = "classes" if config.per_class else "pictures"
        done = "looked at" if config.summary else "drawn"
        say(f"{drawing.beyond_limit} more {what} are not {done}: --limit {config.most} is the most")
    if drawing.finding:
        say(drawing.finding)
    return _say_unused(drawing.unreadable, drawing.left_out)


def budget_parser() -> ArgumentParser:
    """`adaptvit budget MODEL FOLDER OUTPUT`."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Make a model meet a budget without training: a plain ViT becomes adaptive, else the knob moves.",
    )
    parser.add_function_arguments(set_budget, as_positional=True, skip={"tell"})
    return parser


def run_budget(arguments: Namespace) -> None:
    """Print each trial, and what was written."""

    def tell(trial: Trial) -> None:
        top1 = "" if trial.top1 is None else f", top-1 {trial.top1:.1%}"
        cost = f"{trial.share:.1%} of the MACs, {trial.gmacs:.3f} GMACs, {trial.images_per_s:.0f} images/s"
        say(f"{trial.knob:10.4g}: {cost}{top1}")

    config = set_budget(**arguments.as_dict(), tell=tell)
    assert config.knob is not None  # or there would have been nothing to move
    say(f"{arguments.output}: {config.knob.field} {getattr(config, config.knob.field):g}")


def demo_parser() -> ArgumentParser:
    """`adaptvit demo`."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Train a small ViT on scikit-learn's digits, make it adaptive, measure both and write a report.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="Folder of the report and the weights.")
    return parser


def run_demo(arguments: Namespace) -> None:
    """Run the demo at its default sizes; an interrupted one goes on where it stopped."""
    demo.run(arguments.output)


def playground_parser() -> ArgumentParser:
    """`adaptvit playground [MODEL ...]`."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Show a page on this machine where pictures go through a dense and an adaptive ViT side by side.",
    )
    parser.add_argument("models", nargs="*", type=str, help="Files, folders, repositories or timm's names of ViTs.")
    parser.add_class_arguments(PlaygroundConfig, skip={"models"})
    return parser


def run_playground(arguments: Namespace) -> None:
    """Serve the page until stopped."""
    try:
        from adaptvit.commands.page import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the playground needs gradio: pip install 'adaptvit[playground]'") from None
    serve(_config(PlaygroundConfig, arguments))


def bench_parser() -> ArgumentParser:
    """`adaptvit bench MODEL`."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Move a method's knob to a MACs target, then time dense, masked and packed runs.",
    )
    parser.add_class_arguments(BenchConfig, as_positional=True)
    parser.add_argument("--json", type=Path, default=None, help="Also write the figures to this file.")
    return parser


def run_bench(arguments: Namespace) -> None:
    """Print the figures as a table and write them where asked."""
    config = _config(BenchConfig, arguments)
    if arguments.json:
        check_output(arguments.json)
    figures = bench(config)
    for name in ("dense_images_per_s", "masked_images_per_s", "packed_images_per_s"):
        say(f"{name:>22} {figures[name]:10.2f}")
    for name in ("ideal_speedup", "realised_speedup", "ratio"):
        say(f"{name:>22} {figures[name]:10.3f}")
    for name in ("macs_dense", "macs_executed"):
        say(f"{name:>22} {figures[name] / 1e9:10.3f} G")
    tokens = figures["tokens_per_block"]
    for name in ("mean", "min", "max"):
        say(f"{'tokens ' + name:>22} {' '.join(f'{count:6.1f}' for count in tokens[name])}")
    loads = " to ".join(f"{load:.1f}" for load in figures["load_average"])
    say(f"{figures['rounds']} rounds, {figures['threads']} threads, {figures['dtype']}, load average {loads}")
    if arguments.json:
        write_atomically(arguments.json, as_json(figures, indent=2) + "\n")


def convert_parser() -> ArgumentParser:
    """`adaptvit convert SOURCE TARGET MODEL_NAME`."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Turn published A-ViT, AdaViT, EViT, DynamicViT, DeiT, T2T-ViT or timm weights into one file.",
    )
    parser.add_function_arguments(convert, as_positional=True)
    return parser


def run_convert(arguments: Namespace) -> None:
    """Write the file and say what it has that was not in the tensors."""
    check_output(arguments.target)
    config = convert(**arguments.as_dict()).config
    names = [name for name in ("gate_scale", "gate_center", "keep_rate", "fuse") if hasattr(config, name)]
    told = [f"{name} {getattr(config, name)}" for name in names]
    say(", ".join([f"{arguments.target}: {arguments.model_name}", *told]))


COMMANDS: dict[str, Callable[[Namespace], int | None]] = {
    "train": run_train,
    "compare": run_compare,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "draw": run_draw,
    "budget": run_budget,
    "demo": run_demo,
    "playground": run_playground,
    "bench": run_bench,
    "convert": run_convert,
}


def _say_listed(figures: dict[str, Any]) -> None:
    """A figure a line, names aligned."""
    width = max(map(len, figures))
    shown = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in figures.items()}
    for name, value in shown.items():
        say(f"{name:>{width}}  {'-' if value is None else value}")


def _say_table(cells: Table) -> None:
    for line in [*cells.text().split("\n"), ""]:
        say(line)


def _say_unused(unreadable: Sequence[Unreadable], left_out: Sequence[LeftOut]) -> int:
    """Name what could not be read, and the first few of what was left out; the exit code."""
    for other in left_out:
        say(f"adaptvit: left out: {other}", sys.stderr)
    for one in unreadable:
        say(f"adaptvit: {one}", sys.stderr)
    spoilt = sum(one.decoded for one in unreadable)
    for count, what in ((len(unreadable) - spoilt, "could not be read"), (spoilt, "have logits that are not finite")):
        if count:
            say(f"adaptvit: {count} images {what} and are left out", sys.stderr)
    return 1 if unreadable else 0


def _config(kind: type[Config], arguments: Namespace | dict[str, Any]) -> Config:
    return kind(**{field.name: arguments[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def _say(message: Warning | str, *_: object) -> None:
    say(f"adaptvit: warning: {message}", sys.stderr)


def _underscored(word: str) -> str:
    """An option spelled with dashes, as everywhere on the command line, in the parser's own spelling."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
