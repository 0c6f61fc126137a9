"""What a method is: a config that builds its model, and finds out from images what it can; and how others add theirs.

    MethodConfig    what adapt, commands, recipes, comparisons, playground and checkpoints speak with
    Published       its models that have names, and what its authors' files say
    DropConfig      a method that is one function: which tokens go on after a block
    Methods         the methods by name: the library's own, and those of packages outside

Nothing above tells one method from another by its name or its class.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from adaptvit.budget import Trial, measure_dial, meet_target
from adaptvit.model import AdaptiveViT, Knob, Left
from adaptvit.terminal import warn
from adaptvit.tokens import Tokens
from adaptvit.usage import Usage

Role = Literal["method", "dense", "control", "reference", "released", "clips", "many"]

WRITTEN_BY_OTHERS = frozenset({"use_cache"})
"""What Hugging Face's Trainer sets in the config of any model."""
DIAL = 64
"""Images that a dial is measured on, at most."""
DEITS = {
    "tiny": "DeiT-tiny (192 channels, 12 blocks, 3 heads)",
    "small": "DeiT-small (384 channels, 12 blocks, 6 heads)",
    "base": "DeiT-base (768 channels, 12 blocks, 12 heads)",
}
"""What most models that have a name are around."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """A model of a method by a name that timm learns."""

    inside: str
    """timm's name of the ViT."""
    about: str
    """In one line."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Of the method's config, for this size, where they are not its defaults."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the ViT, where timm has none of these sizes, so that there are no weights to download."""


def around_deits(start: str, about: Mapping[str, str], **fields: Any) -> dict[str, Named]:
    """Models around DeiTs by names that begin with `start`.

    Args:
        about: by sizes in `DEITS`, what is to be said after the DeiT.
        fields: of the method's config.
    """
    return {
        f"{start}_{size}_patch16_224": Named(
            inside=f"deit_{size}_patch16_224", about=f"{DEITS[size]}{rest}", fields=fields
        )
        for size, rest in about.items()
    }


@dataclass(frozen=True, kw_only=True)
class Published:
    """What there is of a method beside its code: models that have a name, and files that its authors wrote."""

    names: Mapping[str, Named] = field(default_factory=dict)
    """Models that timm learns. Files may be of them."""
    untold: tuple[str, ...] = ()
    """Fields of the config that the tensors of a file do not say."""
    by_arguments: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda arguments: {}
    """Fields that a file's training arguments say."""
    by_file_name: Callable[[str], dict[str, Any]] = lambda name: {}
    """Fields that a file's name says."""
    our_tensors: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    """A file's tensors by our names: the ViT's by timm's, the method's with `method.` before them. Tensors that are
    named so already, or are of others, stay as they are."""
    fitted: str = ""
    """What the fields `untold` are, in a word, where they are fitted to the weights: with them any ViT's file is of
    this method, and without them a model decides by numbers that nobody fitted to it."""


class MethodConfig(ABC):
    """A method's numbers, a frozen dataclass of them: what a method kept elsewhere derives from.

    It writes `method` and `build`, and `fitted` where images tell more than where the knob belongs; `fit`, which
    callers call, is that with the knob turned.
    """

    method: ClassVar[str]
    """Name of the method: on the command line, in checkpoints and tables."""
    title: ClassVar[str]
    """What people call it."""
    trained: ClassVar[bool] = False
    """Whether what it decides by has to be trained, so that images alone make nothing of it."""
    role: ClassVar[Role] = "method"
    """In comparisons: `dense`, which leaves nothing out; `control`, which leaves out just anything; `reference`, which
    the others are held against at the same budget; `released`, a method as its published code has it, which is not
    compared; `clips`, a method of clips alone, which comparisons of images leave out; `many`, one that is fitted to
    more images than comparisons set aside, which take it where it is named."""
    published: ClassVar[Published] = Published()
    """Its models that have names, and what its authors' files say."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "method" in vars(cls):  # another than the one it derives from
            cls.title = vars(cls).get("title", cls.method)
            cls.published = vars(cls).get("published", Published())

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Leave what others write into every model's config to them; fields stay frozen."""
        frozen = vars(cls).get("__setattr__")  # the dataclass's, which refuses any name
        if frozen is not None and frozen.__name__ != "_set":

            def _set(self: MethodConfig, name: str, value: object) -> None:
                if name in WRITTEN_BY_OTHERS:
                    vars(self)[name] = value
                else:
                    frozen(self, name, value)

            cls.__setattr__ = _set  # type: ignore[method-assign, assignment]
        return super().__new__(cls)

    def to_dict(self) -> dict[str, Any]:
        """The method's name and its numbers, as loggers of trainings ask a model's config for them."""
        return {"method": self.method, **asdict(self)}  # type: ignore[call-overload]

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict())

    @property
    def needs(self) -> Set[str]:
        """What it needs of a ViT: names in `adaptvit.backbones.base.OFFERS`."""
        return frozenset()

    @property
    def knob(self) -> Knob | None:
        """What steers it; None where nothing does."""
        return None

    @property
    def aim(self) -> float | None:
        """Share of the dense MACs that its own loss terms train for; None where they know no budget."""
        return None

    @abstractmethod
    def build(self, vit: nn.Module) -> AdaptiveViT:
        """The adaptive model around `vit`, sharing its weights, in the mode that `vit` is in.

        Raises:
            TypeError: the ViT is not one that this library reproduces, or lacks what the method needs.
        """

    def fitted(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        """The model with what the method can find out from images alone, beside its knob: by default, nothing.

        Args:
            vit, images, target, search: as of `fit`.
        Returns:
            In evaluation mode, its knob not turned yet.
        """
        return self.build(vit).eval()

    def fit(self, vit: nn.Module, images: Tensor, target: float, **search: Any) -> AdaptiveViT:
        """The model at a budget: fitted, its knob turned so that images meet the target.

        Args:
            vit: shared by the model, but for methods that have to change its weights, which copy it.
            images: calibration batch, as the model takes them; the more, the better the budget holds on others.
            target: what images are to cost.
            search: `unit`, `tolerance`, `labels`, `tell`, as `adaptvit.meet_target` takes them.
        Returns:
            In evaluation mode, as `vit` then is, with a dial.
        Raises:
            TypeError: the method cannot run on this ViT.
            ValueError: the target cannot be met, or logits that are not finite.
        """
        return turned(self.fitted(vit, images, target, **search), images, target, **search)

    def prepared(self, vit: nn.Module, images: Tensor) -> nn.Module:
        """What a model that was fitted is built on again: `vit`, or a copy with the weights that `fitted` changes."""
        return vit


def turned(
    model: AdaptiveViT,
    images: Tensor,
    target: float,
    *,
    tell: Callable[[Trial], object] | None = None,
    **search: Any,
) -> AdaptiveViT:
    """A model in evaluation mode, its knob turned so that images meet a target, with a dial measured on some."""
    seen: dict[float, float] = {}

    def note(trial: Trial) -> None:
        assert trial.knob is not None  # of a method that has one
        seen[trial.knob] = trial.share
        if tell is not None:
            tell(trial)

    meet_target(model, images, target, tell=note, **search)
    if len(images) > DIAL:
        images, seen = images[torch.linspace(0, len(images) - 1, DIAL).long()], {}
    model.dial = measure_dial(model, images, seen)
    return model


class DropConfig(MethodConfig):
    """A method made of one function: after each block but the last, which tokens go on."""

    @abstractmethod
    def decide(self, before: Tokens, after: Tokens, block: int) -> Tensor | None:
        """The tokens that go on after block number `block`, from 0.

        Args:
            before: the tokens as the block got them.
            after: the same tokens as it leaves them.
        Returns:
            (B, N) bool, of which prefix tokens and dead slots do not matter; None drops nothing. An image that has no
            prefix tokens, and of which nothing would go on, keeps what it has.
        """

    def build(self, vit: nn.Module) -> "DroppingViT":
        """Wrap `vit`, sharing its weights; no parameter is added."""
        return DroppingViT(vit, self)


class DroppingViT(AdaptiveViT):
    """A ViT that drops the tokens that its config's `decide` leaves out."""

    def run(self, tokens: Tokens) -> Left:
        depth = self.deepest(tokens)
        prefix = torch.arange(tokens.shape[1], device=tokens.x.device)[None] < self.prefix
        for number in range(self.depth):
            before, tokens = tokens, self.run_block(number, tokens)
            going = None if number == self.depth - 1 else self.config.decide(before, tokens, number)
            if going is not None:
                live = tokens.live
                self._check_decided(going, live)
                tokens = tokens.keep(going | (prefix if self.prefix else ~(going & live).any(dim=1, keepdim=True)))
                depth = depth.masked_fill(live & ~tokens.live, number + 1)
        usage = partial(Usage.of_depth, depth, self.heads, tokens.source.grid, self.prefix, last_reads=self.read)
        return self.finish(self.read_slots(tokens, tokens.x), usage, tokens.live)

    def _check_decided(self, going: Tensor, live: Tensor) -> None:
        if not isinstance(going, Tensor) or (going.dtype, going.shape) != (torch.bool, live.shape):
            got = f"{going.dtype} {tuple(going.shape)}" if isinstance(going, Tensor) else type(going).__name__
            raise TypeError(
                f"{type(self.config).__name__}.decide must give a bool tensor {tuple(live.shape)}, for each image and "
                f"token slot, prefix tokens first, or None; got {got}"
            )


class Methods(Mapping[str, type[MethodConfig]]):
    """Config types by the names of their methods; those of other packages are found by the entry points `GROUP`.

        [project.entry-points."adaptvit.methods"]
        norm = "my_package:NormConfig"

    One that cannot be loaded is named in a warning, and left out.
    """

    GROUP = "adaptvit.methods"

    def __init__(self, *configs: type[MethodConfig]) -> None:
        self._known = {config.method: config for config in configs}
        self._searched = False
        self._to_tell: list[Callable[[type[MethodConfig]], object]] = []

    def register(self, config: type[MethodConfig]) -> type[MethodConfig]:
        """Make a method known in this process; a decorator of its config.

        Raises:
            ValueError: another has its name.
        """
        if self._known.get(config.method, config) is not config:
            raise ValueError(f"there is a method {config.method!r} already, of {self._known[config.method].__name__}")
        if config.method not in self._known:
            for tell in self._to_tell:
                tell(config)
            self._known[config.method] = config
        return config

    def each(self, tell: Callable[[type[MethodConfig]], object]) -> None:
        """Tell of every method: of those that are known now, and of others as they become known."""
        for config in self._known.values():  # without a search: this package may still be importing
            tell(config)
        self._to_tell.append(tell)

    def _all(self) -> dict[str, type[MethodConfig]]:
        if not self._searched:  # not before somebody asks: those packages import this one
            self._searched = True
            for point in entry_points(group=self.GROUP):
                try:
                    self.register(point.load())
                except Exception as error:  # whatever another package's import raises
                    warn(f"the method {point.name!r} of {point.value} cannot be loaded: {error}", stacklevel=3)
        return self._known

    def __getitem__(self, name: str) -> type[MethodConfig]:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())
