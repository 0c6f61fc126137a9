"""Measured speed beside the MACs that were saved: timm's own model, masked and packed execution, in turns."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import timm
import torch
from jsonargparse import ArgumentParser, Namespace
from timm.data import create_transform
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import v2

from adaptvit.backbones.forward import scores
from adaptvit.backbones.video import inflate
from adaptvit.budget import meet_target
from adaptvit.checks import In, OneOf, check_device, check_fields
from adaptvit.commands.console import add_json, check_json, config_of, tell_json
from adaptvit.data import (
    Clips,
    DataConfig,
    Samples,
    Unreadable,
    check_no_strip,
    check_sources,
    in_channels,
    list_folder,
    open_pictures,
    pan,
    photographs,
    preparation,
)
from adaptvit.macs import dense_macs, macs
from adaptvit.measure.speed import Speed, interleaved
from adaptvit.methods import DEFAULT, METHODS, MethodConfig, dense, is_dense
from adaptvit.model import AdaptiveViT
from adaptvit.process import as_found, best_device, in_float64
from adaptvit.terminal import meant, say, warn
from adaptvit.tokens import LAYOUTS
from adaptvit.usage import check_finite, join
from adaptvit.weights.names import method_of
from adaptvit.weights.opening import check_method, open_model, remade
from adaptvit.weights.places import is_stored

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BenchConfig:
    """What to measure, and how."""

    model: str
    """Name of a timm ViT or of a method's model, whose weights are random, which its speed does not depend on; or a
    file, folder or repository of a model, as other commands take it, with its own."""
    method: Annotated[str | None, OneOf(METHODS)] = None
    """Adaptive method; None is the model's own, and merging by similarity where it is a plain ViT."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the method's config that are not to have their defaults."""
    target: Annotated[float | None, In("(0, 1]", "the share of the dense MACs")] = 0.5
    """Share of the dense MACs that the method's knob is moved to, in (0, 1]; None leaves it, and the dense method has
    none."""
    batch_size: Annotated[int, In("[1, inf)")] = 32
    """Images per forward pass."""
    images: Annotated[int, In("[1, inf)")] = 32
    """Images in all, at least `batch_size`; budget and speed are averages over them."""
    img_size: Annotated[int | tuple[int, int] | None, In("[1, 65536]")] = None
    """Side of the input in pixels, or height and width; None is the model's own."""
    frames: Annotated[int | None, In("[1, 65536]")] = None
    """Frames of a clip, for which an image ViT is inflated; None is the model's own, if it takes clips."""
    tubelet: Annotated[int, In("[1, 65536]")] = 2
    """Then the frames of a patch."""
    data: Path | None = None
    """Folder of images; None takes random crops of scikit-learn's two photographs. For clips, of these, and windows
    that move over the photographs."""
    strip: Annotated[int | None, In("[1, 65536]")] = None
    """For a model that takes clips: frames of a picture that shows all of a clip, one below another."""
    train: bool = False
    """Time a training step, forward and backward, instead of evaluation."""
    compile: bool = False
    """Time the ViT and the adaptive model under `torch.compile` too, in evaluation; of a method that keeps as many
    tokens of every image. Compiling takes minutes, before anything is timed."""
    rounds: Annotated[int, In("[1, inf)")] = 10
    """Timed turns of each execution."""
    threads: Annotated[int, In("[1, 1024]")] = 2
    """CPU threads of torch."""
    device: str = field(default_factory=best_device)
    """Where to run: cpu or cuda; cuda unless told, where there is one."""
    dtype: Annotated[str, OneOf(DTYPES)] = "float32"
    """Precision of weights and images: float32, bfloat16 or float16."""
    seed: Annotated[int, In("[0, 4294967295]")] = 0
    """Seed of weights and crops."""

    def __post_init__(self) -> None:
        check_fields(self)
        stored = is_stored(self.model)
        if self.method is not None or not stored:
            own = None if stored else method_of(self.model)
            self.of((METHODS[self.method] if self.method else own or METHODS[DEFAULT])())
        if self.images % self.batch_size:
            raise ValueError(
                f"BenchConfig.images must be a multiple of batch_size, got {self.images} and {self.batch_size}"
            )
        if self.compile and self.train:
            raise ValueError("BenchConfig.compile is of evaluation: leave out train")
        check_device("BenchConfig.device", self.device)
        if not stored and not timm.is_model(self.model):
            near = meant(self.model, timm.list_models())
            raise ValueError(f"BenchConfig.model: timm {timm.__version__} has no model named {self.model!r}{near}")

    def of(self, method: MethodConfig) -> MethodConfig:
        """A method's config with `settings`.

        Raises:
            ValueError: it has no such field, or not such a value.
        """
        known = [field.name for field in fields(method)]  # type: ignore[arg-type]
        for name in self.settings:
            if name not in known:
                raise ValueError(
                    f"BenchConfig.settings of {method.method} must be some of {', '.join(known)}, got {name!r}"
                )
        try:
            return replace(method, **self.settings)  # type: ignore[type-var]
        except ValueError as error:
            raise ValueError(f"BenchConfig.settings: {error}") from None


@as_found()
def bench(config: BenchConfig) -> dict[str, Any]:
    """Move the method's knob to the target on the bench images, then time dense, masked and packed execution in turns.

    With `compile`, the ViT and the model under `torch.compile` take their turns too; without a compiler here they do
    not, which a warning says.

    Returns:
        JSON-able figures: images per second (median over rounds), `ideal_speedup` (dense MACs / executed MACs),
        `realised_speedup` (median over rounds of dense time / packed time), `ratio` (realised / ideal), MACs per image,
        tokens attended to per block (mean, min, max over images), and the conditions of the run.
    Raises:
        TypeError: the model is not a ViT that the library reproduces.
        ValueError: the images cannot be read, the target cannot be met, or logits are not finite.
    """
    if config.data is not None:
        check_sources(DataConfig(root=config.data))
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    opened = _opened(config).to(device, dtype).eval()
    vit = opened.vit
    images = bench_images(config, vit).to(device, dtype)
    batches = images.split(config.batch_size)

    model = _with_method(opened, config)
    method = model.config
    if method.knob is not None and config.target is not None:
        meet_target(model, images, config.target)
    model.train(config.train)
    passes: dict[str, Any] = {"dense": partial(_logits, vit)} | {
        name: partial(_with_terms, model, layout) for name, layout in LAYOUTS.items()
    }
    if config.compile:
        passes |= _compiled(vit, model, batches[0])
    with torch.set_grad_enabled(config.train):
        outputs = [model(batch, detailed=True) for batch in batches]
    check_finite(torch.cat([output.logits.detach() for output in outputs]), "logits")
    usage = join([output.usage for output in outputs])
    del outputs  # and their graphs
    load_before = os.getloadavg()[0]
    with torch.inference_mode(not config.train):
        step = _train_step if config.train else _evaluate
        seconds = interleaved(
            {name: partial(step, run, batches) for name, run in passes.items()}, config.rounds, device
        )

    executed = in_float64(macs(usage, model.shape))
    speed = Speed.of({name: seconds[name] for name in ("dense", *LAYOUTS)}, config.images, usage, model.shape)
    per_second = {f"{name}_images_per_s": config.images / median(times) for name, times in seconds.items()}
    attended = in_float64(usage.attended)
    return {
        "model": config.model,
        "method": method.method,
        "settings": config.settings,
        "knob": None if method.knob is None else {method.knob.field: getattr(model.config, method.knob.field)},
        "training_step": config.train,
        **per_second,
        "ideal_speedup": speed.ideal,
        "realised_speedup": speed.gain,
        "ratio": speed.ratio,
        **_of_compiled(seconds, speed.ideal),
        "packed_over_masked": median(m / p for m, p in zip(seconds["masked"], seconds["packed"], strict=True)),
        "macs_dense": dense_macs(model.shape, usage.grid),
        "macs_executed": executed.mean().item(),
        "macs_executed_p10_p90": executed.quantile(torch.tensor([0.1, 0.9]).to(executed)).tolist(),
        "tokens_per_block": {
            "mean": attended.mean(dim=0).tolist(),
            "min": usage.attended.amin(dim=0).tolist(),
            "max": usage.attended.amax(dim=0).tolist(),
        },
        "batch_size": config.batch_size,
        "images": config.images,
        "device": _named(device),
        "dtype": config.dtype,
        "threads": config.threads,
        "load_average": [load_before, os.getloadavg()[0]],
        "rounds": config.rounds,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def _opened(config: BenchConfig) -> AdaptiveViT:
    """The model at the size asked for: stored, with its method; or of a name, untrained."""
    size = {} if config.img_size is None else {"img_size": config.img_size}
    if not is_stored(config.model):
        named = timm.create_model(config.model, **size)
        model = named if isinstance(named, AdaptiveViT) else dense(named)
    else:
        model = open_model(config.model)
        model = _around(model.config, remade(model.vit, **size)[0], model) if size else model
    if config.frames is None:
        return model
    return _around(model.config, inflate(model.vit, config.frames, config.tubelet), model)


def _with_method(model: AdaptiveViT, config: BenchConfig) -> AdaptiveViT:
    """A model under the method that is measured.

    Raises:
        ValueError: it has a method already, which is another; or the settings are not of its own.
    """
    if is_dense(model):
        return config.of(METHODS[config.method or DEFAULT]()).build(model.vit)
    check_method(config.model, model.config, config.method)
    return _around(config.of(model.config), model.vit, model)


def _around(method: Any, vit: nn.Module, like: AdaptiveViT) -> AdaptiveViT:
    """A method around a ViT, with what another model of it has learnt to decide by."""
    model: AdaptiveViT = method.build(vit)
    own = {name: value for name, value in like.state_dict().items() if not name.startswith("vit.")}
    model.load_state_dict(own, strict=False)
    return model


def _logits(vit: Any, images: Tensor) -> Tensor:
    """Of the ViT as its own library runs it."""
    return scores(vit(images))[0]


def _with_terms(model: AdaptiveViT, layout: Any, images: Tensor) -> Tensor:
    """Logits with the sum of the loss terms, in any precision."""
    output = model(images, layout, detailed=True)
    return output.logits + sum(output.terms.values())


def _compiled(vit: nn.Module, model: AdaptiveViT, batch: Tensor) -> dict[str, Any]:
    """Both under `torch.compile`, after they ran once; nothing where that is not possible here.

    Raises:
        ValueError: the method keeps other numbers of tokens of other images.
    """
    if not model.even:
        raise ValueError(
            f"BenchConfig.compile is of methods that keep as many tokens of every image, but {model.config.title} "
            "keeps what each needs"
        )
    passes: dict[str, Any] = {
        "dense_compiled": partial(_logits, torch.compile(vit)),
        "compiled": torch.compile(model, fullgraph=True),
    }
    try:
        with torch.inference_mode():
            for run in passes.values():
                run(batch)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        said = str(error).splitlines()[0]
        warn(f"torch.compile finds no compiler here, so that nothing compiled is timed: {said}", stacklevel=2)
        return {}
    return passes


def _of_compiled(seconds: dict[str, list[float]], ideal: float) -> dict[str, float]:
    """Speed-ups of the compiled model, against the ViT as its own library runs it and against that compiled."""
    if "compiled" not in seconds:
        return {}

    def over(dense: str) -> float:
        return median(slow / fast for slow, fast in zip(seconds[dense], seconds["compiled"], strict=True))

    return {
        "compiled_speedup": over("dense"),
        "compiled_over_dense_compiled": over("dense_compiled"),
        "compiled_ratio": over("dense_compiled") / ideal,
    }


def _named(device: torch.device) -> str:
    """What a device calls itself, where it does."""
    name = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if name is None else name(device)


def _evaluate(run: Any, batches: tuple[Tensor, ...]) -> None:
    for batch in batches:
        run(batch)


def _train_step(run: Any, batches: tuple[Tensor, ...]) -> None:
    for batch in batches:
        logits = run(batch)
        cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long)).backward()


def bench_images(config: BenchConfig, vit: torch.nn.Module) -> Tensor:
    """The images that `bench` measures on, (images, channels, height, width), as the ViT takes them."""
    settings = preparation(vit, config.model)
    size = settings["input_size"][1:]
    if (frames := settings.pop("frames", None)) is not None:
        return _clips(config, settings, frames)
    check_no_strip(config.strip, config.model)
    if config.data is not None:
        return _of_folder(config.data, config.images, settings)
    crop = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(size, scale=(0.02, 0.6), antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(settings["mean"], settings["std"]),
        ]
    )
    channels = settings["input_size"][0]
    whole = [in_channels(photograph, channels) for photograph in photographs()]
    return torch.stack([crop(whole[i % len(whole)]) for i in range(config.images)])


def _clips(config: BenchConfig, settings: dict[str, Any], frames: int) -> Tensor:
    if config.data is not None:
        clips = Clips(config.data, settings, frames, strip=config.strip)
        return _some(clips, config.data, config.images, "a clip")
    whole, transform = photographs(), create_transform(**settings)
    channels = settings["input_size"][0]
    made = []
    for number in range(config.images):
        moved = pan(whole[number % len(whole)], frames, *torch.rand(4).tolist())
        made.append(torch.stack([transform(in_channels(frame, channels)) for frame in moved]))
    return torch.stack(made)


def _of_folder(folder: Path, count: int, settings: dict[str, Any]) -> Tensor:
    listing = list_folder(folder, "BenchConfig.data")
    return _some(open_pictures(listing, settings), folder, count, "an image")


def _some(found: Samples | Clips, folder: Path, count: int, what: str) -> Tensor:
    """So many of them, spread over all."""
    size = len(found)
    if size < count:
        kind = what.partition(" ")[2]
        raise ValueError(f"data folder {str(folder)!r} holds {size} {kind}s, but the bench wants {count}")
    for one in found.left_out:
        warn(f"left out in {str(folder)!r} are {one}", stacklevel=2)
    images = []
    for index in range(0, size, size // count)[:count]:
        item = found[index]
        if isinstance(item, Unreadable):
            name = folder if folder.name == item.name else folder / item.name
            raise ValueError(f"{str(name)!r} cannot be read as {what}: {item.reason}")
        images.append(item[0])
    return torch.stack(images)


def options(_: Sequence[str]) -> ArgumentParser:
    """`adaptvit bench MODEL`."""
    parser = ArgumentParser(
        allow_abbrev=False,
        description="Move a method's knob to a MACs target, then time dense, masked and packed runs.",
    )
    parser.add_class_arguments(BenchConfig, as_positional=True)
    add_json(parser)
    return parser


def execute(arguments: Namespace) -> None:
    """Print the figures as a table and write them where asked."""
    config = config_of(BenchConfig, arguments)
    check_json(arguments.json)
    figures = bench(config)
    for name in [name for name in figures if name.endswith("_images_per_s")]:
        say(f"{name:>22} {figures[name]:10.2f}")
    for name in ("ideal_speedup", "realised_speedup", "ratio", "compiled_speedup", "compiled_ratio"):
        if name in figures:
            say(f"{name:>22} {figures[name]:10.3f}")
    for name in ("macs_dense", "macs_executed"):
        say(f"{name:>22} {figures[name] / 1e9:10.3f} G")
    tokens = figures["tokens_per_block"]
    for name in ("mean", "min", "max"):
        say(f"{'tokens ' + name:>22} {' '.join(f'{count:6.1f}' for count in tokens[name])}")
    loads = " to ".join(f"{load:.1f}" for load in figures["load_average"])
    say(f"{figures['rounds']} rounds, {figures['threads']} threads, {figures['dtype']}, load average {loads}")
    tell_json(arguments.json, figures)
