"""Vision transformers that spend compute where an image needs it."""

import csv
import json
import sys
import warnings
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from adaptvit import demo
from adaptvit.bench import BenchConfig, bench
from adaptvit.budget import Trial
from adaptvit.checkpoints import convert
from adaptvit.compare import compare, table
from adaptvit.compare_methods import MethodsConfig, compare_methods
from adaptvit.compare_methods import table as compared_table
from adaptvit.comparisons import COMPARISONS
from adaptvit.data import Unreadable
from adaptvit.draw import DrawConfig, draw
from adaptvit.evaluate import EvaluateConfig, evaluate_model
from adaptvit.files import replacing, write_atomically, write_csv
from adaptvit.playground import PlaygroundConfig
from adaptvit.predict import PredictConfig, predict
from adaptvit.recipes import RECIPES
from adaptvit.run import Run, run, set_budget

Config = TypeVar("Config")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake ends in one sentence and exit code 2."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
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
        commands.add_subcommand(
            "playground", playground_parser(), help="a local page: your pictures, dense and adaptive"
        )
        commands.add_subcommand("bench", bench_parser(), help="time dense, masked and packed runs beside their MACs")
        commands.add_subcommand("convert", convert_parser(), help="turn published weights into an adaptvit file")
        arguments = parser.parse_args([_underscored(word) for word in words])
        with warnings.catch_warnings():
            warnings.showwarning = _say  # type: ignore[assignment]
            return COMMANDS[arguments.command](arguments[arguments.command]) or 0
    except (ArgumentError, FloatingPointError, OSError, TypeError, ValueError) as error:
        print(f"adaptvit: {str(error).strip().splitlines()[-1].strip()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"adaptvit: {stop or 'interrupted'}", file=sys.stderr)
        return 130


def train_parser(words: Sequence[str]) -> ArgumentParser:
    """`adaptvit train RECIPE`, its defaults those of the recipe that the command line's words name."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description=f"Train a recipe, one of {', '.join(RECIPES)}; everything in it can be changed here or by YAML.",
    )
    named = words[1] if len(words) > 1 and words[0] == "train" and not words[1].startswith("-") else "digits"
    if named not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {named!r}")
    recipe = RECIPES[named]()

    def same(name: str) -> str:
        if name != named:
            raise ArgumentTypeError(f"the recipe comes before all options: adaptvit train {name} ...")
        return name

    parser.add_argument("recipe_name", nargs="?", type=same, default=named, help="Name of the recipe.")
    parser.add_argument("--config", action="config", help="YAML file with what differs from the recipe.")
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


def run_train(arguments: Namespace) -> None:
    """Train, and print what came of it."""
    recipe = RECIPES[arguments.recipe_name]()
    parts: dict[str, Any] = {
        group: _config(type(getattr(recipe, group)), arguments.get(group, {})) for group in ("method", "data", "recipe")
    }
    rest = {field.name: arguments[field.name] for field in fields(Run) if field.name not in parts}
    try:
        outcome = run(Run(**rest, **parts), arguments.resume)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; with --resume the same command goes on after the last epoch") from None
    if PartialState().is_main_process:
        print(_listed(outcome.result.figures))
        print(f"{outcome.file}: adaptvit evaluate, predict and draw take this file")


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
    parser.add_function_arguments(compare, skip={"comparison", "output"})
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
        "files", nargs="*", default=[], help="Fine-tuned models of the same classes, as adaptvit files."
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
    outcome = compare_methods(_config(MethodsConfig, arguments))
    print(f"{compared_table(outcome.rows).text()}\n\n{outcome.report}: the report")
    return _say_unreadable(outcome.unreadable)


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
    rows = compare(replace(comparison, variants=variants), output, arguments.seeds, arguments.processes)
    print(f"{comparison.question}\n\n{table(rows).text()}\n\n{output / 'report.html'}: the report")
    return 0


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
        if path and not path.parent.is_dir():
            raise FileNotFoundError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    result, figures = evaluate_model(config)
    print(_listed(figures))
    if arguments.json:
        write_atomically(arguments.json, json.dumps(figures, indent=2) + "\n")
    if arguments.csv:
        _append(arguments.csv, figures)
    return _say_unreadable(result.unreadable)


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
    print(f"{result.output}: {result.images} images{earlier}")
    return _say_unreadable(result.unreadable)


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
    print(f"{len(drawing.files)} pictures in {config.output}, {drawing.files[0].name} the first to open")
    if drawing.beyond_limit:
        what = "classes" if config.per_class else "pictures"
        done = "looked at" if config.summary else "drawn"
        print(f"{drawing.beyond_limit} more {what} are not {done}: --limit {config.most} is the most")
    if drawing.finding:
        print(drawing.finding)
    return _say_unreadable(drawing.unreadable)


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
        print(f"{trial.knob:10.4g}: {trial.share:.1%} of the MACs, {trial.gmacs:.3f} GMACs, ", end="")
        print(f"{trial.images_per_s:.0f} images/s{top1}", flush=True)

    config = set_budget(**arguments.as_dict(), tell=tell)
    assert config.knob is not None  # or there would have been nothing to move
    print(f"{arguments.output}: {config.knob.field} {getattr(config, config.knob.field):g}")


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
    parser.add_argument("models", nargs="*", type=str, help="adaptvit files, or timm's names of ViTs.")
    parser.add_class_arguments(PlaygroundConfig, skip={"models"})
    return parser


def run_playground(arguments: Namespace) -> None:
    """Serve the page until stopped."""
    try:
        from adaptvit.page import serve
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
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Turn published A-ViT, AdaViT, EViT, DynamicViT, DeiT, T2T-ViT or timm weights into one file.",
    )
    parser.add_function_arguments(convert, as_positional=True)
    return parser


def run_convert(arguments: Namespace) -> None:
    """Write the file and say what it has that was not in the tensors."""
    config = convert(**arguments.as_dict()).config
    names = [name for name in ("gate_scale", "gate_center", "keep_rate", "fuse") if hasattr(config, name)]
    told = [f"{name} {getattr(config, name)}" for name in names]
    print(", ".join([f"{arguments.target}: {arguments.model_name}", *told]))


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


def _listed(figures: dict[str, Any]) -> str:
    """A figure a line, names aligned."""
    width = max(map(len, figures))
    shown = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in figures.items()}
    return "\n".join(f"{name:>{width}}  {'-' if value is None else value}" for name, value in shown.items())


def _append(path: Path, figures: dict[str, Any]) -> None:
    """Add a line to a CSV file, and columns for figures that its earlier lines do not have."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    rows.append({name: "" if value is None else value for name, value in figures.items()})
    write_csv(path, rows)


def _say_unreadable(unreadable: Sequence[Unreadable]) -> int:
    """Name what could not be read; the exit code."""
    for name, reason in unreadable:
        print(f"adaptvit: cannot read {name}: {reason}", file=sys.stderr)
    if unreadable:
        print(f"adaptvit: {len(unreadable)} images could not be read and are left out", file=sys.stderr)
    return 1 if unreadable else 0


def _config(kind: type[Config], arguments: Namespace | dict[str, Any]) -> Config:
    return kind(**{field.name: arguments[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def _say(message: Warning | str, *_: object) -> None:
    print(f"adaptvit: warning: {message}", file=sys.stderr)


def _underscored(word: str) -> str:
    """An option spelled with dashes, as everywhere on the command line, in the parser's own spelling."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
