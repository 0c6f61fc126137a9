"""What `adaptvit playground` computes: pictures through a ViT and through the adaptive model made of it, side by side.

    Playground   the models, shared by everybody who looks at the page; one computation at a time
    Session      one person's pictures, and what a model makes of the last of them: a `View`

The page itself is `adaptvit.commands.page`. Letters: B images, L blocks, N token slots.
"""

import threading
import warnings
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import Tensor
from torch.nn.functional import interpolate

from adaptvit.backbones.forward import scores
from adaptvit.budget import OutOfReach, attempt, meet_target
from adaptvit.checks import In, check_fields
from adaptvit.data import (
    HELD_OUT,
    decode_image,
    in_channels,
    open_digits,
    open_image,
    pan,
    photographs,
    pixels,
    preparation,
    read_clip,
    read_names,
)
from adaptvit.export import check_names
from adaptvit.extras import MissingLibrary
from adaptvit.files import open_file
from adaptvit.macs import dense_macs, macs
from adaptvit.measure.speed import interleaved
from adaptvit.methods import METHODS, is_dense, untrained
from adaptvit.model import AdaptiveViT
from adaptvit.process import in_float64
from adaptvit.show.pictures import (
    cost_histogram,
    data_uri,
    kept_patches,
    laid_over,
    merged_regions,
    sheet_maps,
    sheets,
    sizes_over,
    token_sizes,
    usage_per_block,
)
from adaptvit.usage import Usage, join
from adaptvit.weights.opening import check_name, classes_told, open_model

PHOTOGRAPHS, DIGITS = "photographs (bundled)", "digits (bundled)"
BUNDLED = {
    PHOTOGRAPHS: Path(__file__).with_name("photographs.safetensors"),
    DIGITS: Path(__file__).with_name("digits.safetensors"),
}
"""ViTs of ten classes each; `docs/playground.md` has the commands that make them."""
DOWNLOADED = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
)
"""timm's ViTs that are offered beside the user's own; their weights are downloaded when one is first chosen."""
SIDE = 640
"""Longer side of the pictures that are kept, in pixels."""
SLIMMEST = 8
"""Of a picture that is longer than so many times its width only the middle is used."""
SEEN = 24
"""Pictures that a session keeps."""
RECENT = 8
"""Of these, the last so many join the examples that a budget is met on."""
TOLERANCE = 0.02
"""How near to the budget is near enough, relative to it."""
FITTED = (0.5, 0.75, 0.95)
"""Shares of the dense MACs that methods are fitted at before a budget is asked for."""
ROUNDS = 5
"""Timed runs of each model."""
TOP = 5
"""Classes told."""


@dataclass(frozen=True, kw_only=True)
class PlaygroundConfig:
    """What the page offers, and where."""

    models: Sequence[str] = ()
    """Files, folders, repositories or timm's names of ViTs, offered beside the bundled ones, the first first."""
    class_names: Path | None = None
    """File with the name of a class on each line, in the order of these models' classes. None: ImageNet's where there
    are as many, else numbers."""
    port: Annotated[int, In("[1, 65535]")] = 7860
    """Of the page, which is on 127.0.0.1 only."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.class_names is not None:
            read_names(self.class_names, "PlaygroundConfig.class_names")
            if not self.models:
                raise ValueError("PlaygroundConfig.class_names is for models of your own: name one")


Pictured = Image.Image | tuple[Image.Image, ...]
"""A picture, or the frames of a clip."""


@dataclass(frozen=True)
class Picture:
    """A picture ready to be looked at."""

    image: Pictured
    """RGB, at most `SIDE` pixels wide and high."""
    note: str = ""
    """What was done to it, in a sentence; empty where nothing was."""


MODES = {
    "1": "black and white",
    "L": "grey",
    "LA": "transparent grey",
    "P": "a palette",
    "RGBA": "transparent colour",
    "I": "16-bit grey",
}
"""Pillow's modes in words."""


def open_picture(path: Path | str) -> Picture:
    """Decode a picture of any kind and size in bounded memory.

    Raises:
        ValueError: it is none, is damaged, or has too many pixels.
    """
    try:
        with open_file(path) as file:
            stored = open_image(file)
            full, mode = stored.size, stored.mode
            image = decode_image(stored, 3, SIDE)
    except Exception as error:  # Pillow raises half a dozen kinds
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"This picture cannot be used: {reason}.") from error
    done = []
    if max(image.size) < max(full):
        done.append(f"{full[0]} x {full[1]} pixels scaled down to {image.width} x {image.height}")
    if mode != "RGB":
        done.append(f"{MODES.get(mode.split(';')[0], mode)} turned into 8-bit colour")
    if max(image.size) > SLIMMEST * min(image.size):
        most = SLIMMEST * min(image.size)
        image = ImageOps.fit(image, (min(image.width, most), min(image.height, most)))
        done.append("cut to its middle, as it is so slim")
    return Picture(image, f"This picture was {', '.join(done)}." if done else "")


def open_clip(path: Path | str, frames: int) -> Picture:
    """Evenly spaced frames of a video, scaled down.

    Raises:
        ValueError: it is none, is damaged, or has fewer.
    """
    try:
        images = read_clip(Path(path), frames)
    except MissingLibrary:
        raise
    except Exception as error:  # Pillow and FFmpeg raise a dozen kinds
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"This clip cannot be used: {reason}.") from error
    for image in images:
        image.thumbnail((SIDE, SIDE), reducing_gap=2.0)
    return Picture(tuple(images))


def coloured() -> list[Image.Image]:
    """The left half of each of scikit-learn's two photographs, and all of it."""
    whole = photographs()
    return [part for one in whole for part in (one.crop((0, 0, one.width // 2, one.height)), one)]


def moving(frames: int) -> list[tuple[Image.Image, ...]]:
    """A window over each of the photographs, once still and once moving, as clips."""
    return [tuple(pan(one, frames, 1.0, 0.2, 0.5, speed)) for one in photographs() for speed in (0.0, 1.0)]


def handwritten() -> list[Image.Image]:
    """Digits of the test split, one of each class."""
    data = open_digits()
    first = {data.test[index][1]: data.test[index][0] for index in reversed(range(HELD_OUT))}
    shown = [(255 * data.pixels(first[kind])[0]).round().byte().numpy() for kind in sorted(first)]
    return [Image.fromarray(grey) for grey in shown]


@dataclass(frozen=True)
class Subject:
    """A model as it was opened, and what it takes to show pictures to it."""

    opened: AdaptiveViT
    classes: Sequence[str]
    """Names, in the order of the logits."""
    examples: Sequence[Pictured]
    """Pictures of the kind it takes, to begin with."""
    settings: dict[str, Any]
    """How timm prepares its images."""
    frames: int | None = None
    """Of a clip, where it takes clips."""

    @classmethod
    def of(cls, opened: AdaptiveViT, classes: Sequence[str] | None = None) -> "Subject":
        """Find names and examples for a model.

        Raises:
            ValueError: it takes neither grey images nor colour, or has another number of classes than there are names.
        """
        settings = preparation(opened)
        frames = settings.pop("frames", None)
        channels, count = settings["input_size"][0], opened.num_classes
        if count < 1:
            raise ValueError("the model has no classes: the playground shows what a model takes a picture for")
        classes = classes or opened.class_names or None
        if classes is None:
            subset = infer_imagenet_subset(opened.vit) if count >= 1000 else None
            names = ImageNetInfo(subset) if subset else None
            classes = [names.index_to_description(k) if names else f"class {k}" for k in range(count)]
        if len(classes) != count:
            raise ValueError(f"there are names of {len(classes)} classes, but the model has {count}")
        examples: list[Any] = handwritten() if channels == 1 else coloured()
        if frames is not None:
            examples = moving(frames)
        return cls(opened.float(), classes, examples, settings, frames)

    @property
    def channels(self) -> int:
        """Of an image: 1 or 3."""
        return self.settings["input_size"][0]

    @property
    def kind(self) -> tuple[int, int | None]:
        """What tells pictures that it takes from others: channels, and frames of a clip."""
        return self.channels, self.frames

    def opened_picture(self, path: Path | str) -> Picture:
        """A file, decoded as the model takes it: `open_clip` or `open_picture`."""
        return open_picture(path) if self.frames is None else open_clip(path, self.frames)

    @property
    def methods(self) -> tuple[str, ...]:
        """What it can be shown with: its own method, where it is no plain ViT, and those that need no training."""
        own = () if is_dense(self.opened) else (self.opened.config.method,)
        others = (name for name in untrained(self.frames is not None) if METHODS[name].role != "control")
        return tuple(dict.fromkeys([*own, *others]))

    @cached_property
    def calibration(self) -> Tensor:
        """The examples as the model takes them."""
        return self.prepared(self.examples)

    def prepared(self, pictures: Sequence[Pictured]) -> Tensor:
        """Pictures as the model takes them: (B, channels, height, width), or clips (B, frames, ...)."""
        transform = create_transform(**self.settings)

        def tensor(picture: Pictured) -> Tensor:
            if isinstance(picture, tuple):
                return torch.stack([tensor(frame) for frame in picture])
            return transform(in_channels(picture, self.channels))

        return torch.stack([tensor(picture) for picture in pictures])

    def told(self, logits: Tensor) -> list[tuple[str, float]]:
        """The most probable classes of an image, and their probabilities.

        Raises:
            ValueError: the logits are not finite.
        """
        if not logits.isfinite().all():
            raise ValueError("What the model says of this picture is not finite.")
        best = logits[0].softmax(dim=0).topk(min(TOP, len(self.classes)))
        return [(self.classes[k], p) for k, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def adapted(self, method: str) -> AdaptiveViT:
        """The model under one of its methods, fitted to the examples at the first of `FITTED` that it can meet.

        Raises:
            TypeError, ValueError: the method needs what this ViT lacks.
        """
        own = self.opened
        if method == own.config.method:
            return own
        for share in FITTED[:-1]:
            try:
                return METHODS[method]().fitted(own.vit, self.calibration, share)
            except OutOfReach:  # the next one spends more
                pass
        return METHODS[method]().fitted(own.vit, self.calibration, FITTED[-1])


@dataclass(frozen=True)
class Budget:
    """Where a method's knob was set, and what that costs."""

    config: Any
    """Of the method."""
    share: float
    """Of the dense MACs, mean over the calibration images."""
    note: str = ""
    """Why this is not what was asked for, in a sentence; empty where it is."""


def steer(model: AdaptiveViT, images: Tensor, target: float) -> Budget:
    """Set a model's knob so that `images` cost the share `target` of the dense MACs, or as near as its method gets.

    The search begins at the model's config, which is replaced.
    """
    name, config = model.config.method, model.config
    assert config.knob is not None  # of all methods that are shown
    ends = [replace(config, **{config.knob.field: value}) for value in (config.knob.lowest, config.knob.highest)]
    if config.knob.sign < 0:
        ends.reverse()
    costs = []
    for model.config in ends:
        costs.append(attempt(model, images).share)
    least, most = costs
    reach = f"on these pictures {name} reaches {least:.0%} to {most:.0%} of the dense MACs"
    if target < least * (1 - TOLERANCE):
        model.config = ends[0]
        return Budget(ends[0], least, f"A budget of {target:.0%} is out of reach: {reach}.")
    if target > most * (1 + TOLERANCE):
        model.config = ends[1]
        return Budget(ends[1], most, f"A budget of {target:.0%} is more than can be spent: {reach}.")
    model.config = config
    config = meet_target(model, images, target, tolerance=TOLERANCE)
    share = attempt(model, images).share
    if abs(share - target) > max(0.02, 2 * TOLERANCE * target):
        return Budget(config, share, f"The nearest that {name} gets to {target:.0%} is {share:.0%}, as its cost jumps.")
    return Budget(config, share)


class Playground:
    """The models, which all sessions share. Whoever computes holds `lock`, whoever downloads `opening` alone."""

    def __init__(self, config: PlaygroundConfig) -> None:
        """Open the models that the config names, and the bundled ones.

        Raises:
            FileNotFoundError, TypeError, ValueError: one of them cannot be shown.
        """
        self.lock, self.opening = threading.Lock(), threading.Lock()
        self.subjects: dict[str, Subject] = {}
        self.adapted: dict[tuple[str, str], AdaptiveViT] = {}
        names = None
        if config.class_names is not None:
            names = read_names(config.class_names, "PlaygroundConfig.class_names")
        for model in config.models:
            check_name(model)
            check_names(names, classes_told(model))
        for model in config.models:
            try:
                self.subjects[model] = Subject.of(open_model(model), names)
            except ValueError as error:
                raise ValueError(f"{model}: {error}") from error
        for name, file in BUNDLED.items():
            self.subjects[name] = Subject.of(open_model(file))

    @property
    def names(self) -> list[str]:
        """Of the models that can be chosen, the user's own first."""
        return list(dict.fromkeys([*self.subjects, *DOWNLOADED]))

    def subject(self, name: str) -> Subject:
        """A model by its name, downloaded where it has to be.

        Raises:
            ValueError: there is no such model, or it cannot be downloaded.
        """
        if name not in self.names:
            raise ValueError(f"There is no model {name!r}; there are {', '.join(self.names)}.")
        with self.opening if name not in self.subjects else nullcontext():
            if name not in self.subjects:
                try:
                    self.subjects[name] = Subject.of(open_model(name))
                except Exception as error:  # the Hub's client raises a dozen kinds
                    raise ValueError(f"The weights of {name} are not here and cannot be downloaded now.") from error
        return self.subjects[name]

    def model(self, name: str, method: str) -> AdaptiveViT:
        """A model under a method.

        Raises:
            ValueError: it cannot be shown with that method.
        """
        subject = self.subject(name)
        if method not in subject.methods:
            raise ValueError(f"{name} can be shown with {', '.join(subject.methods)}, not with {method!r}.")
        if (name, method) not in self.adapted:
            try:
                self.adapted[name, method] = subject.adapted(method)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} cannot be shown with {method}: {error}.") from error
        return self.adapted[name, method]


@dataclass(frozen=True)
class Answer:
    """What a model says of an image."""

    top: list[tuple[str, float]]
    """Classes and their probabilities, the most probable first."""
    gmacs: float
    """What the image cost."""
    milliseconds: float
    """Median of a few runs with this image alone, the two models taking turns."""
    times: float = 1.0
    """How much faster than the dense model."""


@dataclass(frozen=True, eq=False)
class View:
    """A picture through both models."""

    model: str
    method: str
    pixels: Tensor
    """(1, channels, height, width) as the models got it, values in [0, 1]; of a clip a sheet of its frames."""
    usage: Usage
    """Of the adaptive model, to the last block even where the image could leave early."""
    dense: Answer
    """timm's own model."""
    adaptive: Answer
    budget: Budget
    seen: Usage
    """Of the adaptive model on all pictures of the session that are for such a model."""
    seen_gmacs: Tensor
    """What each of them cost."""
    heads: tuple[int, ...]
    """Of a block."""

    @property
    def blocks(self) -> int:
        """L."""
        return self.usage.attended.shape[1]

    def image(self) -> np.ndarray:
        """The picture as the models got it."""
        return enlarged(self.pixels.expand(-1, 3, -1, -1))

    @property
    def groups(self) -> Tensor | None:
        """(1, rows, columns) the token that each patch is part of in the end; None where none are merged."""
        return None if self.usage.groups is None else self._map(self.usage.groups[:, -1])

    @property
    def largest(self) -> int:
        """Patches in the largest token; 1 where none are merged."""
        return 1 if self.groups is None else int(token_sizes(self.groups).max())

    def shading(self) -> np.ndarray:
        """Colours over the picture: the blocks that each patch entered or, where merged, the patches in its token."""
        if self.groups is not None:
            return enlarged(sizes_over(self.pixels, self.groups))
        return enlarged(laid_over(self.pixels, sheet_maps(self.usage.patch_depth), self.blocks))

    def block(self, number: int) -> tuple[np.ndarray, str]:
        """What block `number`, from 1, works on: the picture, and a sentence.

        Patches that are gone are faded, those whose token stands for dropped ones tinted; merged ones are a region in
        their mean colour.

        Raises:
            ValueError: there is no such block, or the method does not track token slots.
        """
        if not 1 <= number <= self.blocks:
            raise ValueError(f"block must lie in 1..{self.blocks}, got {number}")
        usage, patches = self.usage, slice(self.usage.prefix, None)
        if usage.live is None:
            raise ValueError("Usage.live is None: this method does not track token slots, so blocks cannot be shown")
        live = usage.live[:, number - 1, patches]
        tokens, count = int(live.sum()), live.shape[1]
        if usage.groups is not None:
            said = f"Block {number} of {self.blocks} works on {tokens} tokens, which hold all {count} patches."
            if number == 1:
                return self.image(), said
            merged = merged_regions(magnified(self.pixels), self._map(usage.groups[:, number - 2]))
            return enlarged(merged.expand(-1, 3, -1, -1)), said
        fused = None if usage.fused is None else self._map(usage.fused[:, number - 1, patches])
        said = f"Block {number} of {self.blocks} works on {tokens} of {count} patches."
        if fused is not None and fused.any():
            said = (
                f"Block {number} of {self.blocks} works on {tokens - 1} of {count} patches, and on one token, tinted, "
                "that stands for the others."
            )
        return enlarged(kept_patches(self.pixels, self._map(live), fused)), said

    def _map(self, patches: Tensor) -> Tensor:
        """(1, patches) -> where they are in `pixels`."""
        return sheet_maps(patches.unflatten(1, self.usage.grid))

    def costs(self) -> str:
        """Histogram of what the pictures of the session cost, as the `src` of an HTML image."""
        return data_uri(cost_histogram(self.seen_gmacs, self.dense.gmacs))

    def usage_per_block(self) -> str:
        """What the blocks computed for them, as the `src` of an HTML image."""
        return data_uri(usage_per_block(self.seen, self.heads))


def magnified(picture: Tensor, side: int = 448) -> Tensor:
    """A picture (1, channels, height, width), a whole number of times larger.

    Args:
        side: pixels that the longer side comes near to.
    """
    return interpolate(picture, scale_factor=max(1, side // max(picture.shape[2:])), mode="nearest-exact")


def enlarged(picture: Tensor) -> np.ndarray:
    """A picture (1, 3, height, width) in [0, 1], magnified, as pixels (height, width, 3)."""
    return (255 * magnified(picture)[0]).round().byte().permute(1, 2, 0).numpy()


@dataclass
class Shown:
    """A picture of a session, and what the last model that it was shown to made of it."""

    picture: Pictured
    setting: Any = None
    """The model's name and config."""
    usage: Usage | None = None


class Session:
    """One person's pictures, those for models of grey images, of colour and of clips apart, and how far each knob was
    turned."""

    def __init__(self, playground: Playground) -> None:
        self.playground = playground
        self.shown: dict[tuple[int, int | None], deque[Shown]] = defaultdict(lambda: deque(maxlen=SEEN))
        self.budgets: dict[tuple[str, str], tuple[float, Budget]] = {}

    def add(self, picture: Pictured, model: str) -> None:
        """Take a picture, to be shown to this model and to those that take such."""
        self.shown[self.playground.subject(model).kind].append(Shown(picture))

    def view(self, model: str, method: str, share: float) -> View:
        """The last picture through a model, dense and with a method that is given a share of the dense MACs.

        Where there is none yet it is the first example. The knob is set when model, method or share are others than
        before, and then stays, so that pictures can be compared.

        Raises:
            ValueError: a sentence for the page.
        """
        subject = self.playground.subject(model)
        with self.playground.lock, torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of gates that halt everything: the page shows that
            adaptive = self.playground.model(model, method)
            shown = self.shown[subject.kind]
            if not shown:
                shown.append(Shown(subject.examples[0]))
            budget = self._budget(subject, adaptive, model, share)
            adaptive.config = budget.config
            usages = []
            for one in shown:
                if one.usage is None or one.setting != (model, budget.config):
                    one.usage = adaptive(subject.prepared([one.picture]), detailed=True).usage
                    one.setting = model, budget.config
                usages.append(one.usage)
            return _view(model, subject, adaptive, subject.prepared([shown[-1].picture]), budget, join(usages))

    def _budget(self, subject: Subject, adaptive: AdaptiveViT, model: str, share: float) -> Budget:
        """The knob as it stands where the same was asked before; else set on the examples and the last pictures."""
        key = model, adaptive.config.method
        asked, budget = self.budgets.get(key, (None, None))
        if budget is None or asked != share:
            if budget is not None:
                adaptive.config = budget.config
            recent = [one.picture for one in self.shown[subject.kind]][-RECENT:]
            budget = steer(adaptive, torch.cat([subject.calibration, subject.prepared(recent)]), share)
            self.budgets[key] = share, budget
        return budget


def _view(model: str, subject: Subject, adaptive: AdaptiveViT, image: Tensor, budget: Budget, seen: Usage) -> View:
    """Run and time both models on an image, the last of those seen."""
    vit, gmacs = subject.opened.vit, in_float64(macs(seen, adaptive.shape)) / 1e9
    seconds = interleaved({"dense": lambda: vit(image), "adaptive": lambda: adaptive(image)}, ROUNDS)
    dense = dense_macs(adaptive.shape, seen.grid) / 1e9
    faster = median(slow / fast for slow, fast in zip(seconds["dense"], seconds["adaptive"], strict=True))
    return View(
        model=model,
        method=adaptive.config.method,
        pixels=sheets(pixels(image, subject.settings), seen.grid),
        usage=adaptive.to_the_end(image).usage,
        dense=Answer(subject.told(scores(vit(image))[0]), dense, 1e3 * median(seconds["dense"])),
        adaptive=Answer(subject.told(adaptive(image)), gmacs[-1].item(), 1e3 * median(seconds["adaptive"]), faster),
        budget=budget,
        seen=seen,
        seen_gmacs=gmacs,
        heads=adaptive.heads,
    )
