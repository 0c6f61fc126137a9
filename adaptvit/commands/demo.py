"""The demo: a small ViT learns to read digits, then where it can stop early; a report shows what that saved."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from jsonargparse import ArgumentParser, Namespace
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import Dataset

from adaptvit.budget import meet_target
from adaptvit.checks import In, check_fields
from adaptvit.commands.console import add_json, check_json, tell_json
from adaptvit.data import Data, open_digits
from adaptvit.files import check_output_folder
from adaptvit.macs import macs
from adaptvit.measure.evaluate import Result, evaluate
from adaptvit.measure.speed import Speed, measure_speed
from adaptvit.methods import turned
from adaptvit.methods.avit import AViT, AViTConfig
from adaptvit.methods.full import FullConfig
from adaptvit.process import as_found, in_float64
from adaptvit.records import version
from adaptvit.show.pictures import cost_histogram, curves, data_uri, depth_maps, macs_unit, tokens_per_block
from adaptvit.show.report import Illustration, Report, Section, Table, machine, write_report
from adaptvit.terminal import say
from adaptvit.tokens import Masked, Packed
from adaptvit.training.loop import fingerprint, train
from adaptvit.training.recipe import Epoch, Recipe
from adaptvit.weights.checkpoints import save

METHOD = AViTConfig(gate_scale=0.15, prior_weight=0.02, prior_depth=5, divergence="model||target")
"""Tokens of a ViT trained for a minute are far larger than DeiT's, so its gate is flatter than the released one."""

DENSE_RECIPE = Recipe(epochs=14, evaluate_every=0, batch_size=48, optimizer="muon", learning_rate=0.02)
ADAPTIVE_RECIPE = Recipe(epochs=6, evaluate_every=0, batch_size=48, learning_rate=3e-4)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo. The defaults take about two minutes on two CPU cores."""

    size: Annotated[int, In("[1, 65536]")] = 32
    """Height and width of the images in pixels."""
    patch: Annotated[int, In("[1, 65536]")] = 4
    """Height and width of a patch in pixels."""
    dim: Annotated[int, In("[4, 65536]")] = 96
    """Channels of a token, a multiple of 4 and of `heads`."""
    blocks: Annotated[int, In("[1, 1024]")] = 8
    """Transformer blocks."""
    heads: Annotated[int, In("[1, 65536]")] = 3
    """Attention heads."""
    dense: Recipe = DENSE_RECIPE
    """How the plain ViT is trained."""
    adaptive: Recipe = ADAPTIVE_RECIPE
    """How it is fine-tuned with halting."""
    method: AViTConfig = METHOD
    """Token halting; its gate is calibrated before the fine-tuning and again after it."""
    target: Annotated[float, In("(0, 1]", "the share of the dense MACs")] = 0.5
    """Share of the dense MACs that the gate is calibrated to."""
    calibration: Annotated[int, In("[1, inf)")] = 240
    """Training images that it is calibrated on."""
    batch: Annotated[int, In("[1, inf)")] = 240
    """Test images in a timed forward pass."""
    rounds: Annotated[int, In("[1, inf)")] = 10
    """Timed turns of each execution."""
    threads: Annotated[int, In("[1, 1024]")] = 2
    """CPU threads of torch."""
    seed: Annotated[int, In("[0, 4294967295]")] = 0
    """Of the starting weights."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.size % self.patch:
            raise ValueError(f"DemoConfig.patch {self.patch} does not divide size {self.size}: choose one that does")
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(f"DemoConfig.dim must be a multiple of 4 and of heads {self.heads}, got {self.dim}")


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo found."""

    dense: Result
    """timm's model on the test digits."""
    masked: Result
    """The adaptive model with every slot computed."""
    packed: Result
    """The adaptive model with live tokens only."""
    speed: Speed
    """The three, timed in turns."""
    ideal: float
    """Dense MACs over executed MACs."""
    report: Path
    """The HTML file."""

    @property
    def figures(self) -> dict[str, Any]:
        """What it found, as JSON takes it."""
        runs = {"dense": self.dense, "masked": self.masked, "packed": self.packed}
        told: dict[str, Any] = {}
        for name, result in runs.items():
            speed = getattr(self.speed, name)
            told[name] = {"top1": result.top1, "gmacs": result.gmacs, "images_per_s": speed, "images": result.images}
        return {**told, "ideal_speedup": self.ideal, "realised_speedup": self.speed.gain, "report": str(self.report)}


@as_found()
def run_demo(output: Path = Path("runs/demo"), config: DemoConfig = DemoConfig()) -> DemoOutcome:
    """Train, fine-tune, evaluate, draw and report; what an earlier run of the same config finished is not repeated.

    Writes `report.html` and `avit.safetensors`, and the training's checkpoints and logs, in `output`.

    Raises:
        KeyboardInterrupt: stopped by the user; its message says how to go on.
    """
    try:
        return _run(output, config)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped; the same command goes on after the last finished epoch in {output}"
        ) from None


def _run(output: Path, config: DemoConfig) -> DemoOutcome:
    check_output_folder(output)
    torch.set_num_threads(config.threads)
    output.mkdir(parents=True, exist_ok=True)
    data = open_digits(config.size, margin=config.size // 8)

    vit = small_vit(config, data)
    plain = FullConfig().build(vit)
    key = fingerprint(plain, data, config.dense, version())
    learned = train(plain, data, config.dense, output / "dense", "training the ViT", key=key)
    dense = evaluate(vit, data.test)

    adaptive_vit = small_vit(config, data)
    adaptive_vit.load_state_dict(vit.state_dict())
    calibration = _first_images(data.train, config.calibration)
    model = config.method.build(adaptive_vit).eval()
    meet_target(model, calibration, config.target)
    key = fingerprint(model, data, config.adaptive, version())
    adapted = train(model, data, config.adaptive, output / "avit", "fine-tuning with A-ViT", key=key)
    trained_on = next(model.parameters()).device
    turned(model.eval(), calibration.to(trained_on), config.target)
    save(model, output / "avit.safetensors")

    masked, packed = (evaluate(model, data.test, layout) for layout in (Masked, Packed))
    images = _first_images(data.test, config.batch).to(trained_on)
    outcome = DemoOutcome(
        dense=dense,
        masked=masked,
        packed=packed,
        speed=measure_speed(vit, model, images, config.rounds),
        ideal=dense.gmacs / packed.gmacs,
        report=output / "report.html",
    )
    write_report(_report(outcome, model, data, learned, adapted, config), outcome.report)
    for line in ["", *_table(outcome).text().split("\n"), "", _headline(outcome), f"Report: {outcome.report}"]:
        say(line)
    return outcome


def small_vit(config: DemoConfig, data: Data) -> VisionTransformer:
    """A timm ViT with fresh weights; positions start as sines and cosines, which spares it most of the training."""
    torch.manual_seed(config.seed)
    vit = VisionTransformer(
        img_size=data.size,
        patch_size=config.patch,
        in_chans=data.channels,
        num_classes=len(data.classes),
        embed_dim=config.dim,
        depth=config.blocks,
        num_heads=config.heads,
    )
    side = config.size // config.patch
    position = vit.state_dict()["pos_embed"]  # (1, 1 + patches, D), sharing the model's memory
    position[:, 1:] = build_sincos2d_pos_embed([side, side], dim=config.dim, temperature=100.0)
    return vit


def _first_images(data: Dataset, count: int) -> Tensor:
    torch.manual_seed(0)  # training images change from visit to visit
    return torch.stack([data[index][0] for index in range(count)])


def _headline(outcome: DemoOutcome) -> str:
    dense, packed = outcome.dense, outcome.packed
    points = 100 * (packed.top1 - dense.top1)
    error = 100 * (2 * dense.top1 * (1 - dense.top1) / dense.images) ** 0.5
    change = f"{points:+.1f} points, {'within' if abs(points) <= 2 * error else 'beyond'} two standard errors"
    return (
        f"A-ViT reads {packed.top1:.1%} of the test digits with {packed.gmacs / dense.gmacs:.0%} of the dense ViT's "
        f"MACs ({change}) and runs {outcome.speed.gain:.2f} times as fast."
    )


def _table(outcome: DemoOutcome) -> Table:
    unit, scale = macs_unit(outcome.dense.gmacs)

    def row(name: str, result: Result, rate: float, ideal: str, realised: str) -> list[str]:
        return [name, f"{result.top1:.1%}", f"{scale * result.gmacs:.1f}", f"{rate:,.0f}", ideal, realised]

    timing = outcome.speed
    return Table(
        columns=["", "accuracy", unit, "images/s", "ideal gain", "realised gain"],
        rows=[
            row("dense (timm)", outcome.dense, timing.dense, "1.00", "1.00"),
            row("A-ViT, masked", outcome.masked, timing.masked, "", f"{timing.masked / timing.dense:.2f}"),
            row("A-ViT, packed", outcome.packed, timing.packed, f"{outcome.ideal:.2f}", f"{timing.gain:.2f}"),
        ],
        note=f"Accuracy on held-out digits; {unit} are 10{'⁹' if scale == 1 else '⁶'} multiply-accumulates, mean per "
        "image; ideal gain is dense MACs over these; realised gain is speed over the dense speed, the three timed in "
        "turns in one run. Masked computes every token and hides the stopped ones, packed computes only what is left. "
        f"One of the {outcome.dense.images} test digits is {1 / outcome.dense.images:.1%}, and A-ViT had its "
        "fine-tuning epochs on top of the dense training, so a small difference in accuracy says little of halting. "
        "The demo's settings were chosen on these same digits: both accuracies flatter.",
    )


def _report(
    outcome: DemoOutcome, model: AViT, data: Data, learned: list[Epoch], adapted: list[Epoch], config: DemoConfig
) -> Report:
    result, blocks = outcome.packed, model.shape.depth
    unit, scale = macs_unit(outcome.dense.gmacs)
    rows, columns = result.usage.grid
    cost = in_float64(macs(result.usage, model.shape)) / 1e9
    order = cost.argsort()
    cheap, dear = order[:4], order[-4:].flip(0)
    chosen = torch.cat([cheap, order[len(order) // 2 - 2 : len(order) // 2 + 2], dear])
    items = [data.test[int(index)] for index in chosen]
    images = torch.stack([image for image, _ in items])
    with torch.inference_mode():
        whole = model.to_the_end(images.to(next(model.parameters()).device))
    maps = depth_maps(
        data.pixels(images),
        whole.usage.patch_depth,
        blocks,
        captions=[
            f"“{data.classes[label]}”, {scale * cost[index]:.0f} {unit}"
            for index, (_, label) in zip(chosen, items, strict=True)
        ],
    )
    phases = {"dense": learned, "A-ViT": adapted}
    plots = [
        Illustration(
            data_uri(
                curves({name: [epoch.accuracy for epoch in run] for name, run in phases.items()}, "accuracy", True)
            ),
            "Share of the augmented training digits read correctly, epoch by epoch.",
        ),
        Illustration(
            data_uri(curves({name: [epoch.macs for epoch in run] for name, run in phases.items()}, "MACs", True)),
            "MACs of the forward pass while training, over those of timm's model; the dense run is below 100 % because "
            "the last block computes only the token that the classifier reads.",
        ),
    ]
    return Report(
        title="adaptvit demo: token halting on handwritten digits",
        headline=_headline(outcome),
        introduction=[
            f"A vision transformer cuts an image into {rows} by {columns} patches, one token "
            f"each, and takes all of them through all its {blocks} blocks. A-ViT lets a token stop as soon as its "
            "halting scores add up to one, so that compute goes where the image needs it.",
            f"Here a small ViT learned to read {data.name}. It was then fine-tuned with halting, and its gate set "
            f"so that training images cost {config.target:.0%} of the dense MACs.",
        ],
        table=_table(outcome),
        sections=[
            Section(
                "Where the compute goes",
                [
                    Illustration(
                        data_uri(maps, "png"),
                        "Test digits beside the number of blocks that each patch entered, brighter being deeper: the "
                        "four cheapest, four in the middle, the four dearest.",
                        wide=True,
                    ),
                    Illustration(
                        data_uri(tokens_per_block(result.usage)),
                        "Tokens that each block still attends to: bars are the mean image, lines span the middle "
                        "80 % of images.",
                    ),
                    Illustration(
                        data_uri(cost_histogram(cost, outcome.dense.gmacs)),
                        "What the test images cost one by one: the further left of the dotted line, the more is saved.",
                    ),
                ],
            ),
            Section("Training", plots),
        ],
        facts={
            "Settings": {
                f"{group}: {name}": value
                for group, settings in (
                    ("A-ViT", model.config),
                    ("dense training", config.dense),
                    ("fine-tuning", config.adaptive),
                )
                for name, value in asdict(settings).items()
            },
            "Machine": machine(),
        },
    )


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit demo`."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Train a small ViT on scikit-learn's digits, make it adaptive, measure both and write a report.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="Folder of the report and the weights.")
    add_json(parser)
    return parser


def execute(arguments: Namespace) -> None:
    """Run the demo at its default sizes; an interrupted one goes on where it stopped."""
    check_json(arguments.json)
    outcome = run_demo(arguments.output)
    tell_json(arguments.json, outcome.figures)
