"""Comparisons that have a name: functions that return a `Comparison`, as recipes return a `Run`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from adaptvit.commands.compare_variants import Comparison, VariantRow, compare, summary, variants_table
from adaptvit.commands.console import add_json, check_json, say_table, tell_json
from adaptvit.data import DataConfig
from adaptvit.methods.avit import AViTConfig
from adaptvit.methods.full import FullConfig
from adaptvit.terminal import meant, say
from adaptvit.training.recipe import Recipe
from adaptvit.training.recipes import digits
from adaptvit.training.run import Run

HALTING = AViTConfig(
    gate_scale=2.0, gate_center=3.0, class_token="stays", prior="gaussian", prior_depth=4.0, prior_weight=0.1
)
"""Of the small ViT's six blocks the prior peaks at the fourth."""
PRIORS_COMPARED = ("gaussian", "laplace", "quasi_laplace")


def small() -> Run:
    """A small ViT with halting, from scratch on Imagenette at 64 pixels.

    `root` may be the 160-pixel images; images shrunk to 72 pixels beforehand spare half of the time.
    """
    return Run(
        model="parts_vit",
        model_args={"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 2},
        method=HALTING,
        data=DataConfig(
            root=Path("imagenette160"), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, scale=(0.35, 1.0), workers=0
        ),
        recipe=Recipe(epochs=3, batch_size=128, optimizer="muon", learning_rate=0.02, evaluate_every=0),
    )


def priors() -> Comparison:
    """Gaussian, Laplace and quasi-Laplace priors of the halting depth."""
    base = small()
    return Comparison(
        question="Does it matter which prior the halting depth is drawn to?",
        variants={
            name.replace("_", "-"): replace(base, method=replace(HALTING, prior=name)) for name in PRIORS_COMPARED
        },
    )


PARTS: dict[str, dict[str, str]] = {
    "DeiT's parts": {},
    "sinusoidal": {"position": "sinusoidal"},
    "rotary": {"position": "rotary"},
    "instance norm": {"norm": "instance"},
    "cosine": {"attention": "cosine"},
    "mixer": {"block": "mixer"},
}
"""DeiT's, and one exchanged at a time."""


def _exchanged(base: Run) -> dict[str, Run]:
    return {name: replace(base, model_args=base.model_args | change) for name, change in PARTS.items()}


def parts() -> Comparison:
    """Positions, norms, attentions and blocks, nothing halting."""
    return Comparison(
        question="What do other positions, norms, attentions and blocks change?",
        variants=_exchanged(replace(small(), method=FullConfig())),
    )


def parts_halting() -> Comparison:
    """The same parts under halting."""
    return Comparison(
        question="What do other positions, norms, attentions and blocks change where tokens halt?",
        variants=_exchanged(small()),
    )


def thresholds() -> Comparison:
    """The slack of the halting threshold, from 0.01 to 0.75."""
    base = small()
    return Comparison(
        question="How does epsilon, the slack of the halting threshold, trade accuracy for compute?",
        variants={
            f"epsilon {value:g}": replace(base, method=replace(HALTING, epsilon=value))
            for value in (0.01, 0.15, 0.5, 0.75)
        },
    )


def digits_priors() -> Comparison:
    """The priors on the embedded digits: the quick one."""
    base = digits()
    recipe = replace(base.recipe, target=None, ease_epochs=0.0)
    halting = replace(HALTING, gate_scale=0.2, prior_depth=5.0)
    return Comparison(
        question="Does it matter which prior the halting depth is drawn to, on the digits?",
        variants={
            name.replace("_", "-"): replace(base, method=replace(halting, prior=name), recipe=recipe)
            for name in PRIORS_COMPARED
        },
    )


COMPARISONS: dict[str, Callable[[], Comparison]] = {
    comparison.__name__: comparison for comparison in (priors, parts, parts_halting, thresholds, digits_priors)
}
"""What `adaptvit compare` knows by name."""


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit compare NAME`."""
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
    add_json(parser)
    return parser


def execute(arguments: Namespace) -> int:
    """Train what is not finished, and print the table."""
    if arguments.name not in COMPARISONS:
        raise ValueError(
            f"comparison must be one of {', '.join(COMPARISONS)} or methods, got {arguments.name!r}"
            f"{meant(arguments.name, [*COMPARISONS, 'methods'])}"
        )
    check_json(arguments.json)
    comparison = COMPARISONS[arguments.name]()
    variants = comparison.variants
    if arguments.root is not None:
        variants = {name: replace(run, data=replace(run.data, root=arguments.root)) for name, run in variants.items()}
    if arguments.epochs is not None:
        variants = {
            name: replace(run, recipe=replace(run.recipe, epochs=arguments.epochs)) for name, run in variants.items()
        }
    output = arguments.output or Path("runs") / arguments.name

    def tell(rows: list[VariantRow]) -> None:
        say(comparison.question)
        say("")
        say_table(variants_table(rows))

    rows = compare(replace(comparison, variants=variants), output, arguments.seeds, arguments.processes, tell)
    say(f"{output / 'report.html'}: the report")
    tell_json(arguments.json, [summary(row) for row in rows])
    return 0
